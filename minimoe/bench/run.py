"""The whole benchmark: every model, task and backend that was asked for, as one JSON document."""

from __future__ import annotations

import dataclasses
import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minimoe.backends import Backend, make_backend, reference_over
from minimoe.bench import cold, device, limits, machine, peers
from minimoe.bench.measure import NOISY, Samples, mean, ratio, rounds, turn
from minimoe.bench.models import Source
from minimoe.bench.plan import Order, Plan, check
from minimoe.bench.profile import profile
from minimoe.bench.report import FORMAT
from minimoe.bench.work import Work
from minimoe.bench.workloads import WORKLOADS, Task, distance, task
from minimoe.loops import keep_freed_memory
from minimoe.params import Params
from minimoe.placement import placed

MOST_CHECKED = 8192  # tokens of a task on a device: the reference keeps the scores of all pairs of a sequence
ALLOWED = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 0.1, "int8": 1e-3}  # of `distance` to another implementation


def run(order: Order, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Measure; return the document.

    Parameters
    ----------
    say : is told what is going on
    """
    plan = check(order)
    document: dict[str, Any] = {
        "format": FORMAT, "model": order.preset if order.folder is None else str(order.folder),
        "layers": plan.layers, "rounds": order.rounds, "threads": plan.threads,
        "results": [], "processes": [], "ops": [],
    }  # fmt: skip
    with limits.held_to(plan.threads):
        probes: dict[str, limits.Probe] = {}
        for backend in order.backends:
            name = limits.device_of(make_backend(backend).name)
            probes[name] = probes.get(name) or limits.PROBES[name]()
        for source in plan.sources:
            with _placed(source, plan.mapped, say) as placed:
                _measure_model(order, plan, placed, probes, document, say)
    document["machine"] = machine.describe()
    if "gpu" in probes:
        document["machine"]["gpu"] = device.describe()
    document["warnings"] = _warnings(document["results"])
    return document


@contextmanager
def _placed(source: Source, mapped: bool, say: Callable[[str], None]) -> Iterator[Source]:
    """Write the weights to a temporary folder where they are to be mapped and are in none yet."""
    if not mapped or source.folder is not None:
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="minimoe-bench-") as folder:
        say(f"writing {source.nbytes / 1e9:.1f} GB of random weights to {folder} …")
        yield source.written(Path(folder, "model"))


def _measure_model(
    order: Order, plan: Plan, source: Source, probes: dict[str, limits.Probe], document: dict[str, Any],
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """All tasks of one model, then the times of its ops, and a fresh process for each backend."""
    named = (
        f"{document['model']}, {source.dtype}, {source.config.num_layers} layers, {source.config.num_experts} experts"
    )
    keep_freed_memory()  # as the other commands do
    say(f"{named}: making the model …")
    params = source.params()
    with ExitStack() as stack:
        peer = None
        if order.peers and source.dtype != "int8":  # which transformers does not have
            say(f"{named}: making transformers' …")
            peer = peers.Peer(source, plan.threads, plan.peer_device)
            stack.callback(peer.close)
            document["peer_versions"], document["peer_device"] = peer.versions, plan.peer_device
            rate = peer.ask("rate", source.dtype, device.SIDE if plan.peer_device == "gpu" else limits.SIDE)
            document.setdefault("peer_rates", {})[source.dtype] = rate
        for what, batch, context in plan.tasks:
            say(f"{named}: {what}, batch {batch}, context {context} …")
            wanted = task(what, source.config, batch, context)
            document["results"] += _measure_task(order, source, params, wanted, probes, peer)
    for what, batch, context in plan.profiled:
        for backend in order.backends:
            say(f"{named}: ops of {what} on {backend} …")
            wanted = task(what, source.config, batch, context)
            document["ops"] += _profiled(backend, source, params, wanted, probes)
    del params
    gc.collect()
    for backend in () if source.on_device else order.backends:  # a process without any has nothing to be fresh with
        say(f"{named}: a fresh process on {backend} …")
        figures = cold.measure(source, backend, *plan.cold)
        document["processes"].append(_about(source, backend, *plan.cold) | figures)


def _about(source: Source, backend: str, batch: int, context: int) -> dict[str, Any]:
    return {
        "backend": make_backend(backend).name, "dtype": source.dtype, "batch": batch, "context": context,
        "layers": source.config.num_layers, "experts": source.config.num_experts,
        "parameters": source.config.num_parameters(),
    }  # fmt: skip


def _measure_task(
    order: Order, source: Source, params: Params, wanted: Task, probes: dict[str, limits.Probe],
    peer: peers.Peer | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One task on every backend and, if asked, by transformers: first whether the answers agree, then the rounds."""
    kind_of = WORKLOADS[wanted.what]
    truth = _truth(source, params, wanted)
    backends = {name: make_backend(name) for name in order.backends}
    ours = {name: kind_of(ops, source.config, _on(ops, params), wanted) for name, ops in backends.items()}
    answers = {name: workload.answer() for name, workload in ours.items()}
    work = {name: workload.work() for name, workload in ours.items()}
    theirs = None if peer is None else peers.PeerWorkload(peer, wanted)
    # What memory gives changes within a second on a shared machine: it is measured right before and right after.
    turns: dict[str, Callable[[], float]] = {
        f"rate {name}": partial(p.rate, source.dtype) for name, p in probes.items()
    }
    turns |= {f"bandwidth {name} before": probe.bandwidth for name, probe in probes.items()}
    turns |= {name: workload.run for name, workload in ours.items()}
    turns |= {f"bandwidth {name} after": probe.bandwidth for name, probe in probes.items()}
    if theirs is not None:
        turns["peer"] = theirs.run
    samples = rounds(order.rounds, turns)
    for name in probes:
        samples[f"bandwidth {name}"] = mean(*(samples[f"bandwidth {name} {when}"] for when in ("before", "after")))
    found = []
    for name, workload in ours.items():
        device_of = limits.device_of(make_backend(name).name)
        entry = {"what": wanted.what, "device": device_of} | _about(source, name, *wanted.prompt.shape)
        entry |= {"tokens": workload.tokens, "tokens_per_second": workload.tokens / samples[name].median}
        entry |= _against_roof(
            work[name], samples[name], samples[f"bandwidth {device_of}"], samples[f"rate {device_of}"]
        )
        if truth is not None and workload.ops.name != "numpy":
            entry["check"] = _checked(
                answers[name], truth, source.dtype, "numpy" if not source.on_device else "array code"
            )
        else:
            entry["check"] = None
        if theirs is not None and peer is not None and peer.device == device_of:
            entry["peer"] = _checked(answers[name], theirs.expected, source.dtype, "transformers") | {
                "experts": theirs.implementation, "seconds": samples["peer"].summary(),
                "spread": samples["peer"].spread, "peak_bytes": theirs.peak(),
                "ratio": ratio(samples["peer"], samples[name]).summary(),
            }  # fmt: skip
        found.append(entry)
    return found


def _on(ops: Backend, params: Params) -> Params:
    """The weights where a backend computes."""
    return params if ops.xp is np else placed(params, ops)


def _truth(source: Source, params: Params, wanted: Task) -> Any:
    """What the reference answers where the weights are; None where a device has no room for all its scores at once."""
    if source.on_device and wanted.prompt.size > MOST_CHECKED:
        return None
    ops = reference_over(make_backend("cuda")) if source.on_device else make_backend("numpy")
    return WORKLOADS[wanted.what](ops, source.config, params, wanted).answer()


def _against_roof(work: Work, seconds: Samples, bandwidth: Samples, rate: Samples) -> dict[str, Any]:
    """Times, and what part of the machine's limits they are, each round by itself."""
    bounds = [work.bound(b, r) for b, r in zip(bandwidth.values, rate.values, strict=True)]
    of_roof = Samples([bound / took for (bound, _), took in zip(bounds, seconds.values, strict=True)])
    return {
        "seconds": seconds.summary(), "spread": seconds.spread,
        "flops": work.flops, "weight_bytes": work.weights, "cache_bytes": work.cache,
        "bandwidth": bandwidth.summary(), "rate": rate.summary(),
        "roof": work.bound(bandwidth.median, rate.median)[1], "of_roof": of_roof.summary(),
    }  # fmt: skip


def _checked(answer: Any, other: Any, dtype: str, against: str) -> dict[str, Any]:
    found = distance(answer, other)
    return {"against": against, "distance": found, "allowed": ALLOWED[dtype], "right": found <= ALLOWED[dtype]}


def _profiled(
    backend: str, source: Source, params: Params, wanted: Task, probes: dict[str, limits.Probe]
) -> list[dict[str, Any]]:
    """The time of every op, beside the limits measured before and after."""
    ops = make_backend(backend)
    probe = probes[limits.device_of(ops.name)]
    rate = partial(probe.rate, source.dtype)
    before = turn(probe.bandwidth), turn(rate)
    times = profile(ops, source.config, _on(ops, params), wanted)
    roof = {"bandwidth": (before[0] + turn(probe.bandwidth)) / 2, "rate": (before[1] + turn(rate)) / 2}
    about = {"what": wanted.what} | _about(source, backend, *wanted.prompt.shape) | roof
    return [about | dataclasses.asdict(one) for one in times]


def _warnings(results: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader should know before believing the figures."""
    found = []
    for name in sorted({entry["device"] for entry in results}):
        read = [entry["bandwidth"]["median"] / 1e9 for entry in results if entry["device"] == name]
        if max(read) > (1 + 2 * NOISY) * min(read):
            found.append(
                f"{name}: its read bandwidth moved between {min(read):.0f} and {max(read):.0f} GB/s in this run"
            )
    for entry in results:
        named = f"{entry['what']} {entry['backend']} {entry['dtype']} batch {entry['batch']}"
        if (most := max(entry["spread"], (entry.get("peer") or {}).get("spread", 0.0))) > NOISY:
            found.append(f"{named}: the quartiles of the rounds are {100 * most:.0f}% apart: the machine was busy")
        for one in (entry["check"], entry.get("peer")):
            if one is not None and not one["right"]:
                told = f"{one['distance']:.1e} from {one['against']}, allowed {one['allowed']:.0e}"
                found.append(f"{named}: WRONG ANSWER, {told}")
    return found
