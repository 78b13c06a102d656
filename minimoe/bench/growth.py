"""How the cost of a decoding step grows: with experts, chosen experts, context and batch, one at a time.

Measured beside what the machine's limits, read in the same rounds, predict: flat in E at fixed k (only chosen experts
are read), linear in k, in the context (each step reads the whole cache) and in the experts that a batch touches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from minimoe import threads
from minimoe.backends import make_backend
from minimoe.bench import machine
from minimoe.bench.limits import PROBES, device_of, held_to
from minimoe.bench.measure import rounds
from minimoe.bench.models import Source
from minimoe.bench.plan import Order
from minimoe.bench.report import digits, percent
from minimoe.bench.work import experts_chosen
from minimoe.bench.workloads import Decode, task
from minimoe.config import ModelConfig
from minimoe.params import Params

# As wide as the medium preset, so that every matrix is read from memory; few layers, so that many experts fit.
CONFIG = ModelConfig(
    vocab_size=4096, hidden_size=1024, intermediate_size=3584, num_layers=2, num_heads=16, num_kv_heads=4, head_dim=64,
    max_length=16384,
)  # fmt: skip
_USUAL = {"experts": 8, "chosen": 2, "context": 128, "batch": 1}  # what is held while another is varied
AXES = {
    "experts": (2, 4, 8, 16, 32),
    "chosen": (1, 2, 4, 8),
    "context": (128, 2048, 4096, 8192, 16000),
    "batch": (1, 2, 4, 8, 16),
}
HEAD = ("varied", "value", "ms", "predicted", "of it", "experts touched")


class Filled(Decode):
    """Decoding with random keys and values in the cache: what it holds does not matter to the time."""

    def _fill(self) -> None:
        rng, (B, T) = np.random.default_rng(0), self.task.prompt.shape
        for layer in self._cache.layers:
            for held in (layer.k, layer.v):
                held[:, :T] = rng.standard_normal((B, T, *held.shape[2:]), np.float32)
        self._cache.positions[:, :T] = np.arange(T)
        self._cache.lengths[:] = T

    def touched(self) -> float:
        """Experts that the first steps choose at all: the mean over layers and steps."""
        self._rewind()
        steps = min(4, self.task.following.shape[1])
        return float(np.mean([experts_chosen(self._step(i)[1]) for i in range(steps)]))


def run(order: Order, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Measure all points on the order's first backend, in its first type; return the document.

    Parameters
    ----------
    order : its rounds are those of each point, whose seconds and prediction are medians over them
    say : is told what is going on
    """
    backend, dtype = order.backends[0], (order.dtypes or ("float32",))[0]
    count = threads.most() if order.threads is None else order.threads
    with held_to(count):
        points = _points(backend, dtype, order.rounds, say)
    return {
        "format": "minimoe bench growth 1", "backend": backend, "dtype": dtype, "rounds": order.rounds,
        "threads": count, "points": points, "machine": machine.describe(),
    }  # fmt: skip


def rows(points: Sequence[dict[str, Any]]) -> list[Sequence[str]]:
    """One row per point, under HEAD."""
    return [
        (
            point["axis"], f"{point['value']:,}", digits(1e3 * point["seconds"]), digits(1e3 * point["predicted"]),
            percent(point["predicted"] / point["seconds"]), f"{point['touched']:.3g}",
        )
        for point in points
    ]  # fmt: skip


def _points(backend: str, dtype: str, count: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Measure axis by axis: all values of one and the limits in the same rounds, so that a curve is of one machine."""
    ops = make_backend(backend)
    probe, found = PROBES[device_of(ops.name)](), []
    for axis, values in AXES.items():
        params: dict[int, Params] = {}
        workloads = dict[int, Filled]()
        for value in values:
            say(f"{axis}: making {value:,} …")
            E, k, T, B = (value if name == axis else usual for name, usual in _USUAL.items())
            if E not in params:
                params[E] = Source(CONFIG.replace(num_experts=E), dtype).params()
            sized = CONFIG.replace(num_experts=E, num_experts_per_token=k)
            workloads[value] = Filled(ops, sized, params[E], task("decode", sized, B, T))
        say(f"{axis}: measuring …")
        turns: dict[str, Callable[[], float]] = {"bandwidth": probe.bandwidth, "rate": partial(probe.rate, dtype)}
        samples = rounds(count, turns | {f"{value}": workload.run for value, workload in workloads.items()})
        limits = samples["bandwidth"].median, samples["rate"].median
        found += [
            {
                "axis": axis, "value": value, "seconds": samples[f"{value}"].median,
                "predicted": workload.work().bound(*limits)[0], "touched": workload.touched(),
            }
            for value, workload in workloads.items()
        ]  # fmt: skip
    return found
