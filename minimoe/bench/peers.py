"""Hugging Face transformers on the same weights and inputs, in a process of its own.

Its own process: so that its threads wait as torch means them to, not as our settings for OpenMP say, and so that the
peak of its memory is its own. It is told what to run over a pipe, in turn with us.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
from typing import Any

import numpy as np

from minimoe.bench.models import Source
from minimoe.bench.theirs import serve
from minimoe.bench.workloads import Task


def require() -> None:
    """Raise a ValueError that says how to get transformers where it is not installed."""
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        raise ValueError(
            f"--peers transformers needs {' and '.join(missing)}, not installed here: pip install 'minimoe[peers]'"
        )


class Peer:
    """The other process: `transformers` with one model, on "cpu" or "gpu"."""

    def __init__(self, source: Source, threads: int, device: str = "cpu") -> None:
        self.device = device
        context = multiprocessing.get_context("spawn")
        self._pipe, other_end = context.Pipe()
        self._process = context.Process(target=serve, args=(other_end, source, threads, device), daemon=True)
        self._process.start()
        other_end.close()
        self.versions: dict[str, str] = self._receive()

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of `theirs.Theirs` there; return its result, or raise what it raised."""
        self._pipe.send((method, arguments))
        return self._receive()

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()

    def _receive(self) -> Any:
        try:
            failed, value = self._pipe.recv()
        except EOFError:
            raise ValueError("the process that runs transformers has ended: perhaps it lacked memory") from None
        if failed:
            raise ValueError(f"transformers: {value}")
        return value


class PeerWorkload:
    """One task there, with the implementation of the experts that is fastest for it.

    Attributes
    ----------
    implementation : its name
    expected : what our workload of the same name answers, computed before anything is timed
    """

    def __init__(self, peer: Peer, task: Task) -> None:
        self._peer = peer
        self.implementation: str = peer.ask("prepare", task)
        self.expected = np.asarray(peer.ask("answer"))

    def run(self) -> float:
        """Do it once; return the seconds it took there."""
        return float(self._peer.ask("run"))

    def peak(self) -> int:
        """Run once more; return the peak of that process's memory, in bytes."""
        return int(self._peer.ask("peak"))
