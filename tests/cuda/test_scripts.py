"""The scripts for a machine with a device keep to their time and survive what fails in them."""

import json
import sys

import pytest

from minimoe.bench.models import BENCHMARKS
from minimoe.bench.plan import Order, check
from minimoe.cli import bench
from tests.cuda import on_a_device, sanitize
from tests.cuda.on_a_device import PARTS, Part


def test_every_part_is_tried_whatever_the_others_do(tmp_path, capsys):
    parts = [
        Part("good", ("-c", "print('all well')"), 60),
        Part("bad", ("-c", "print('so far'); raise SystemExit(3)"), 60),
        Part("slow", ("-c", "import time; print('begun', flush=True); time.sleep(60)"), 1),
        Part("keeps", ("-c", "import sys; open(sys.argv[2], 'w').write('{\"model\": \"tiny\"}')"), 60, "x.json"),
    ]
    assert on_a_device.main(["--out", str(tmp_path / "out")], parts) == 1
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [(one["name"], one["ended"], one["last"]) for one in found["parts"]] == [
        ("good", "ok", "all well"), ("bad", "failed (status 3)", "so far"), ("slow", "out of time", "begun"),
        ("keeps", "ok", ""),
    ]  # fmt: skip
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "==== bad: " in log and log.index("all well") < log.index("so far") < log.index("begun")
    assert (tmp_path / "out" / "x.json").exists() and "summary" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"log.txt", "summary.json", "x.json"}


def test_time_that_is_over_is_given_to_nobody(tmp_path):
    parts = [Part("late", ("-c", "raise SystemExit(1)"), 60)]
    assert on_a_device.main(["--out", str(tmp_path), "--seconds", "1"], parts) == 0
    [one] = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert one["ended"] == "not reached"


def test_a_part_that_is_not_there_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        on_a_device.main(["--out", str(tmp_path), "--only", "dinner"])
    assert "there is no part 'dinner'" in capsys.readouterr().err


@pytest.mark.parametrize("part", [part for part in PARTS if part.keeps], ids=lambda part: part.name)
def test_the_benchmarks_it_orders_are_ones_that_there_are(part, cupy, monkeypatch):
    """Up to the memory, of which the stand-in has less."""
    import argparse

    monkeypatch.setattr(cupy.cuda.runtime, "memGetInfo", lambda: (140 * 10**9, 141 * 10**9))
    monkeypatch.setattr("minimoe.bench.peers.require", lambda: None)
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    order = bench._order(parser.parse_args(list(part.arguments[3:])))
    assert isinstance(order, Order) and order.preset in BENCHMARKS
    assert check(order).sources[0].config.num_layers > 3


def test_without_a_sanitizer_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sanitize"])
    monkeypatch.setattr(sanitize, "program", lambda: None)
    assert sanitize.main() == 0 and capsys.readouterr().out == "skipped: compute-sanitizer is not installed\n"


def test_the_sanitizer_is_believed(monkeypatch, capsys, tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\n[ $2 = memcheck ] || exit 9\n")
    tool.chmod(0o755)
    monkeypatch.setattr(sanitize, "program", lambda: str(tool))
    monkeypatch.setattr(sanitize, "missing", lambda: None)
    for tools, status, told in ((["memcheck"], 0, "memcheck: clean"), (["racecheck"], 1, "racecheck: found something")):
        monkeypatch.setattr(sys, "argv", ["sanitize", "--tool", *tools])
        assert sanitize.main() == status and told in capsys.readouterr().out
