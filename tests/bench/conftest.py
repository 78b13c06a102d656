"""Whole runs in tests: a fixed machine, short turns, no fresh process; each test may undo what it is about."""

import pytest

from minimoe.bench import cold, limits, measure
from tests.bench.documents import FixedProbe, fresh_process


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(measure, "BURST", 0.0)
    monkeypatch.setattr(measure, "SETTLE", 0.0)
    monkeypatch.setitem(limits.PROBES, "cpu", FixedProbe)
    monkeypatch.setattr(cold, "measure", fresh_process)
