"""What `minimoe generate --stats` says: which experts' weights were read, and what a cache of experts would save."""

from __future__ import annotations

import threading
from typing import Any, Self

import numba
import numpy as np
from jaxtyping import Float

from minimoe.checkpoint import MappedFiles, memory_in_use
from minimoe.checkpoint.errors import gigabytes
from minimoe.cli.common import number, table
from minimoe.expert_traffic import Traffic
from minimoe.model import Model
from minimoe.shapes import Array

_COLUMNS = 10  # sizes of caches that are shown, at most
_INTERVAL = 0.01  # seconds between two looks at the memory in use, each of which takes about 50 µs


class MemoryPeak:
    """The most memory in use while a block runs, as a thread sees it that looks again and again.

    What a call needs only while it runs would not be seen between two tokens. `seen` is None where the system does not
    say.
    """

    def __init__(self) -> None:
        self.seen: dict[str, int] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.is_set():
            self._look()
            self._ended.wait(_INTERVAL)
        self._look()

    def _look(self) -> None:
        if (now := memory_in_use()) is not None:
            self.seen = {name: max(now[name], (self.seen or now)[name]) for name in now}


def facts(traffic: Traffic, model: Model, peak: MemoryPeak) -> dict[str, Any]:
    """All figures, as --json prints them: (L, E) experts, (L, n) and (n,) caches of n = 1, 2, … experts."""
    layers, one, files = traffic.layer_caches(), traffic.one_cache(), MappedFiles(model.params)
    return {
        "calls": len(traffic.ids),
        "tokens": traffic.tokens,
        "choices": traffic.choices,
        "touches": traffic.touches,
        "expert_bytes": traffic.expert_bytes,
        "bytes": traffic.bytes,
        "other_bytes_per_call": traffic.other_bytes,
        "bytes_per_token": traffic.bytes_per_token,
        "share_of_experts_touched": traffic.share_touched,
        "lru_per_layer": {
            "hit_rate": layers.hit_rate,
            "bytes_read": layers.bytes_read,
            "all_layers": {"hit_rate": layers.together.hit_rate, "bytes_read": layers.together.bytes_read},
            "chance": {"hit_rate": traffic.chance()},
        },
        "lru_over_layers": {"hit_rate": one.hit_rate, "bytes_read": one.bytes_read},
        "memory": None if peak.seen is None else peak.seen | {"bound": bound(traffic, model, files.copied_bytes)},
        "mapped_bytes": files.nbytes,
    }


def bound(traffic: Traffic, model: Model, copied: int) -> int | None:
    """Return how many bytes the process has allocated at most, once its loops are compiled; None but for Numba's.

    128 MB for Python, NumPy, Numba and its loops, 16 MB a thread, all weights that are not mapped, keys and values in
    at most 4 bytes, and 4·N·(k·(3F + 2D) + 10·D) for the activations of N tokens at once.
    """
    if model.ops.name != "numba":
        return None
    c = model.config
    N = max((ids.shape[1] for ids in traffic.ids), default=0)
    per_token = c.num_experts_per_token * (3 * c.intermediate_size + 2 * c.hidden_size) + 10 * c.hidden_size
    own = 128_000_000 + 16_000_000 * int(numba.get_num_threads())
    return own + copied + c.kv_bytes_per_token(4) * (traffic.tokens + 1) + 4 * N * per_token


def shown(facts: dict[str, Any]) -> str:
    """Lay the figures out as text."""
    L, E = facts["touches"].shape
    touched, reads = facts["touches"] > 0, int(facts["touches"].sum())
    lines = [
        f"{facts['tokens']:,} tokens in {facts['calls']:,} calls; weights read: {_size(facts['bytes_per_token'])} a "
        f"token ({_size(facts['bytes'].sum())} of experts in all, {gigabytes(facts['other_bytes_per_call'])} of the "
        "others in every call)",
        f"experts touched: {touched.sum():,} of {L * E:,} ({number(100 * facts['share_of_experts_touched'])} %), in "
        f"{reads:,} reads",
        "",
        _table(facts),
        "",
        "under n: percent of reads that find their expert in an LRU cache of n experts per layer; one cache: as many",
        "experts in all, shared by the layers; chance: experts chosen evenly; MB read: what all layers' caches miss",
    ]
    if facts["memory"] is not None:
        seen = facts["memory"]
        limit = "" if seen["bound"] is None else f" (bound: {seen['bound'] / 1e6:,.0f})"
        lines.append(
            f"memory, at most: {seen['anonymous'] / 1e6:,.0f} MB allocated{limit}, {seen['files'] / 1e6:,.0f} MB of "
            f"mapped files; those of the model have {facts['mapped_bytes'] / 1e6:,.0f} MB"
        )
    return "\n".join(lines)


def _table(facts: dict[str, Any]) -> str:
    """A row per layer, and below what all layers, one cache of the same size, and chance would give."""
    L, E = facts["touches"].shape
    sizes = _sizes(E)
    caches, one = facts["lru_per_layer"], facts["lru_over_layers"]

    def percents(rates: Float[Array, " n"]) -> list[str]:
        return [number(100 * float(rates[n - 1])) for n in sizes]

    def row(name: str, touches: Array, size: int, rates: Float[Array, " n"]) -> list[str]:
        return [name, f"{(touches > 0).sum():,}", f"{touches.sum():,}", f"{size / 1e6:,.1f}", *percents(rates)]

    rows = [row(str(i), facts["touches"][i], int(facts["bytes"][i].sum()), caches["hit_rate"][i]) for i in range(L)]
    all_layers = caches["all_layers"]
    rows.append(row("all", facts["touches"], int(facts["bytes"].sum()), all_layers["hit_rate"]))
    rows.append(["one cache", "", "", "", *percents(one["hit_rate"][L - 1 :: L])])
    rows.append(["chance", "", "", "", *percents(caches["chance"]["hit_rate"])])
    rows.append(["MB read", "", "", "", *(f"{all_layers['bytes_read'][n - 1] / 1e6:,.1f}" for n in sizes)])
    return table(["layer", "touched", "reads", "MB", f"n = {sizes[0]}", *map(str, sizes[1:])], rows)


def _sizes(E: int) -> list[int]:
    """Every n from 1 to E, or of many experts the powers of two and E."""
    if E <= _COLUMNS:
        return list(range(1, E + 1))
    return sorted({1 << i for i in range(E.bit_length()) if 1 << i <= E} | {E})


def _size(count: float) -> str:
    return "–" if np.isnan(count) else gigabytes(int(count))
