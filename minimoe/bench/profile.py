"""What each op of a prompt and of a decoding step costs: every call of a wrapped backend is timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from itertools import cycle
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import numpy as np

from minimoe import schedule
from minimoe.backends import ROOMS, Backend
from minimoe.bench.work import Pass
from minimoe.bench.workloads import Decode, Prefill, Task
from minimoe.config import ModelConfig
from minimoe.params import Params
from minimoe.schedule import Step

BETWEEN = "between ops"


@dataclasses.dataclass(frozen=True)
class OpTime:
    """All calls of one op in one pass.

    Attributes
    ----------
    name : the room, and of linear maps which one
    calls : in one pass
    flops, bytes : counted by the schedule, intermediates included
    seconds : median over the passes
    """

    name: str
    calls: int
    flops: int
    bytes: int
    seconds: float


class Timer:
    """A backend wrapper that times every call."""

    def __init__(self, ops: Backend) -> None:
        self.calls: list[tuple[str, str, float]] = []  # room, function, seconds
        rooms: dict[str, Any] = {
            room: SimpleNamespace(**{name: self._timed(room, name, f) for name, f in vars(getattr(ops, room)).items()})
            for room in ROOMS
        }
        self._device = None if ops.xp is np else ops.xp.cuda
        self.ops = dataclasses.replace(ops, graphs=False, **rooms)  # a graph calls no op

    def _timed(self, room: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = perf_counter()
            result = function(*args, **kwargs)
            if self._device is not None:
                self._device.get_current_stream().synchronize()
            self.calls.append((room, name, perf_counter() - start))
            return result

        return call


def profile(ops: Backend, config: ModelConfig, params: Params, task: Task, passes: int = 5) -> list[OpTime]:
    """Time every op of a prompt, or of a decoding step (the mean of all), and what passes between ops."""
    timer = Timer(ops)
    made: type[Prefill] | type[Decode] = Prefill if task.what == "prefill" else Decode
    workload = made(timer.ops, config, params, task)
    steps = 1 if task.what == "prefill" else task.following.shape[1]
    workload.run()
    found = []
    for _ in range(passes):
        timer.calls.clear()
        whole = workload.run()
        seconds = dict.fromkeys(_labels(config), 0.0)
        for name, took in _named(config, timer.calls):
            seconds[name] += took / steps
        found.append(seconds | {BETWEEN: whole - sum(seconds.values())})
    counted = _costs(config, workload.first_pass())
    return [
        OpTime(name, *counted.get(name, (0, 0, 0)), seconds=float(np.median([one[name] for one in found])))
        for name in found[0]
    ]  # fmt: skip


def _label(step: Step) -> str:
    return f"linear {step.name.rpartition('.')[2]}" if step.room == "linear" else step.room


def _labels(config: ModelConfig) -> list[str]:
    """The ops of a pass in the order in which they first come; the cache is written next to attention, or by rope."""
    names = list(dict.fromkeys(_label(step) for step in schedule.schedule(config)))
    return [*names, "kv_cache"]


def _named(config: ModelConfig, calls: list[tuple[str, str, float]]) -> Iterator[tuple[str, float]]:
    """Name the calls of one or several passes by the schedule, which leaves the cache out and turns q, then k."""
    expected = cycle(schedule.schedule(config))
    for room, function, took in calls:
        if room == "kv_cache":
            yield room, took
            continue
        step = next(expected)
        if function == "forward_into_cache":
            step, function = next(expected), "forward"
        assert (room, function) == (step.room, step.function), "the schedule does not match the model"
        yield _label(step), took


def _costs(config: ModelConfig, described: Pass) -> dict[str, tuple[int, int, int]]:
    """Calls, operations and bytes of every op in one pass."""
    found: dict[str, tuple[int, int, int]] = {}
    for step in schedule.schedule(config):
        cost, (calls, flops, size) = described.cost(config, step), found.get(_label(step), (0, 0, 0))
        found[_label(step)] = (calls + 1, flops + cost.flops, size + cost.bytes)
    written = described.batch * described.tokens * config.kv_bytes_per_token(described.stored)
    if described.tokens == 1 and described.held:  # q and k are turned at once, and the cache is written by the way
        calls, flops, size = found["rope"]
        return found | {"rope": (calls - config.num_layers, flops, size + written), "kv_cache": (0, 0, 0)}
    return found | {"kv_cache": (config.num_layers, 0, written)}
