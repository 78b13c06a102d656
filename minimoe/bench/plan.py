"""What is asked for, checked as a whole before anything is made: models, tasks, threads, memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minimoe import threads
from minimoe.backends import make_backend
from minimoe.bench import limits, peers
from minimoe.bench.models import Preset, Source, benchmark, folder_preset, kind, that_fit, with_experts, with_layers
from minimoe.bench.workloads import WORKLOADS, task
from minimoe.checkpoint.memory import require_memory

TRAIN_BATCH, TRAIN_CONTEXT = 16, 256  # unless asked for otherwise
_RESERVED = 24e9


@dataclass(frozen=True, kw_only=True)
class Order:
    """What to measure; None is the preset's choice.

    Attributes
    ----------
    preset, folder : one of the two says which model
    what : tasks, and "ops" for the time of each op
    ops : the time of each op besides whatever else
    peers : () or ("transformers",)
    layers : so many of the model's first layers only
    """

    preset: str | None = "tiny"
    folder: str | None = None
    backends: Sequence[str] = ("numba",)
    dtypes: Sequence[str] | None = None
    batches: Sequence[int] | None = None
    contexts: Sequence[int] | None = None
    experts: Sequence[int] | None = None
    what: Sequence[str] | None = None
    ops: bool = False
    rounds: int = 5
    threads: int | None = None
    peers: Sequence[str] = ()
    layers: int | None = None


@dataclass(frozen=True)
class Plan:
    """An order that has been checked: the models, and the tasks of each."""

    sources: Sequence[Source]
    tasks: Sequence[tuple[str, int, int]]  # what, batch, context; training last, as it changes a peer's weights
    profiled: Sequence[tuple[str, int, int]]
    mapped: bool
    threads: int
    cold: tuple[int, int]  # batch and context of the fresh process
    peer_device: str  # "cpu" or "gpu"
    layers: int  # of the whole model


def check(order: Order) -> Plan:
    """Check an order before anything is made.

    Raises
    ------
    ValueError
        If it names what there is not, or what does not fit the model; ConfigError and CheckpointError are such.
    """
    if order.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, not {order.rounds}")
    devices = {limits.device_of(make_backend(name).name) for name in order.backends}
    for name in order.peers:
        if name != "transformers":
            raise ValueError(f"--peers knows transformers, not {name!r}")
        peers.require()
    preset = benchmark(order.preset or "tiny") if order.folder is None else folder_preset(order.folder)
    plan = Plan(
        sources=_sources(order, preset),
        tasks=_tasks(order, preset),
        profiled=_profiled(order, preset),
        mapped=preset.mapped,
        threads=threads.most() if order.threads is None else order.threads,
        cold=(max(order.batches or [1]), max(order.contexts or [preset.context])),
        peer_device="gpu" if "gpu" in devices else "cpu",
        layers=preset.config.num_layers,
    )
    for name, B, T in [*plan.tasks, *plan.profiled]:
        task(name, preset.config, B, T)
    _check_memory(plan, bool(order.peers))
    return plan


def _sources(order: Order, preset: Preset) -> list[Source]:
    """A model for each number of experts and each type."""
    for name, value in (("experts", order.experts), ("layers", order.layers)):
        if order.folder is not None and value is not None:
            raise ValueError(f"--{name}: the {name} of a folder are given; choose a --preset")
    if preset.on_device and any(make_backend(name).name != "cuda" for name in order.backends):
        raise ValueError(f"--preset {order.preset}: its weights are drawn on the device: choose --backend cuda alone")
    if "int8" in (order.dtypes or ()):
        _check_int8(order, preset)
    config = preset.config if order.layers is None else with_layers(preset.config, order.layers)
    configs = [with_experts(config, E) for E in order.experts] if order.experts else [config]
    found = [(c, dtype) for c in configs for dtype in order.dtypes or preset.dtypes if kind(dtype)]
    if preset.on_device:
        room = _device_memory() / (3 if order.peers else 1)  # theirs are as large, and made from as many again
        found = [(that_fit(c, dtype, room), dtype) for c, dtype in found]
    return [Source(c, dtype, order.folder, preset.on_device) for c, dtype in found]


def _check_int8(order: Order, preset: Preset) -> None:
    if any(make_backend(name).name == "cuda" for name in order.backends):
        raise ValueError("--dtype int8: is for the CPU: the cuda backend has no kernels for it")
    if preset.mapped and order.folder is None:
        raise ValueError(f"--dtype int8: no checkpoint holds it, and --preset {order.preset} is mapped from one")
    if "train" in (order.what or preset.what):
        raise ValueError("--dtype int8: is for inference: choose --what without train")


def _device_memory() -> float:
    """Bytes for weights: what is free but for the read test, products, cache, and what a pass keeps between its ops."""
    ops = make_backend("cuda")
    ops.xp.get_default_memory_pool().free_all_blocks()
    free, total = ops.xp.cuda.runtime.memGetInfo()
    return float(free - min(_RESERVED, total / 4))


def _tasks(order: Order, preset: Preset) -> list[tuple[str, int, int]]:
    """What, batch and context of everything that is timed."""
    what = order.what or preset.what
    if unknown := [name for name in what if name not in (*WORKLOADS, "ops")]:
        raise ValueError(f"--what must be of {', '.join(WORKLOADS)} and ops, not {unknown[0]!r}")
    found = []
    for name in WORKLOADS:  # training is the last of them
        batches, contexts = order.batches or [1], order.contexts or [preset.context]
        if name == "train":
            batches = order.batches or [TRAIN_BATCH]
            contexts = order.contexts or [min(TRAIN_CONTEXT, preset.config.max_length)]
        if name in what:
            found += [(name, B, T) for B in batches for T in contexts]
    return found


def _profiled(order: Order, preset: Preset) -> list[tuple[str, int, int]]:
    """What, batch and context of the passes whose ops are timed."""
    if not order.ops and "ops" not in (order.what or preset.what):
        return []
    contexts = order.contexts or [preset.context]
    return [(name, B, T) for B in order.batches or [1] for T in contexts for name in ("prefill", "decode")]


def _check_memory(plan: Plan, peer: bool) -> None:
    """Weights exist twice while they are made or handed to a peer; training adds gradients and two moments to a copy.

    Weights that are mapped take no memory once their file is written, nor do those of a folder.
    """
    for source in plan.sources:
        if source.on_device:
            continue
        once = source.nbytes
        made, kept = (0, 0) if source.folder is not None else (once, 0) if plan.mapped else (2 * once, once)
        size = max(made, kept + (2 * once if peer else 0))
        if any(what == "train" for what, _, _ in plan.tasks):
            size += (2 if peer else 1) * 4 * 4 * source.config.num_parameters()
        told = f"the weights of {source.config.num_parameters():,} parameters in {source.dtype}"
        require_memory(
            size, f"minimoe bench: {told}{', those of transformers,' if peer else ''} and what goes with them"
        )
