"""Sampling as jitted loops: the tokens are put in order by a radix sort, whose time does not grow with the disorder.

Numbers in [0, 1] have the same order as their float64 bits read as integers. A stable counting sort by eleven bits at a
time, from the lowest to the highest, therefore sorts them in six passes, and equals keep the order of their ids.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from minimoe.loops import jit
from minimoe.shapes import Array
from minimoe.stages import SMALL, share, threads_if

DIGIT = 11  # bits per pass: 2048 counters fit into the first-level cache
PASSES = 6  # 6 · 11 >= 64


def forward(
    logits: Float[Array, "B V"], temperature: float, top_p: float, uniform: Float[Array, " B"]
) -> Int[Array, " B"]:
    """See the contract."""
    if temperature == 0:
        return logits.argmax(axis=-1)  # the first of equals; NumPy's is vectorised already
    # In NumPy: its exp of float64 is vectorised, the C library's is not. And being the reference's, to the last bit, it
    # leaves no room for another token where the uniform number falls on a boundary.
    scaled = logits.astype(np.float64)
    scaled = (scaled - scaled.max(axis=-1, keepdims=True)) / temperature
    probs = np.exp(scaled)
    probs = probs / probs.sum(axis=-1, keepdims=True)
    ids = np.empty(logits.shape[0], np.int64)
    threads = threads_if(len(ids) > 1 and probs.size >= SMALL)
    _draw(np.ascontiguousarray(probs), float(top_p), np.ascontiguousarray(uniform, np.float64), threads, ids)
    return ids


@jit()
def _draw(probs, top_p, uniform, threads, ids):
    share(_draw_rows, len(ids), (probs, top_p, uniform, ids), threads)


@jit()
def _draw_rows(start, stop, probs, top_p, uniform, ids):
    for b in range(start, stop):
        ids[b] = _draw_row(probs[b], top_p, uniform[b])


@jit()
def _draw_row(probs, top_p, uniform):
    V = probs.size
    order = _descending(probs)
    mass = np.empty(V)
    total, size = 0.0, 0
    while size < V and total < top_p:  # the nucleus ends with the token that reaches top_p
        total += probs[order[size]]
        mass[size] = total
        size += 1
    for rank in range(size - 1):
        if mass[rank] > uniform * total:
            return order[rank]
    return order[size - 1]


@jit()
def _descending(probs):
    """The ids in descending order of their numbers, equals in ascending order of ids."""
    V = probs.size
    keys, sorted_keys = np.empty(V, np.uint64), np.empty(V, np.uint64)
    order, sorted_order = np.empty(V, np.int64), np.empty(V, np.int64)
    counts = np.zeros((PASSES, 1 << DIGIT), np.int64)
    mask = np.uint64((1 << DIGIT) - 1)
    for v in range(V):
        keys[v] = ~probs.view(np.uint64)[v]  # inverted: the largest comes first
        order[v] = v
        for i in range(PASSES):
            counts[i, (keys[v] >> np.uint64(i * DIGIT)) & mask] += 1
    for i in range(PASSES):
        shift = np.uint64(i * DIGIT)
        if counts[i, (keys[0] >> shift) & mask] == V:
            continue  # all numbers agree in these bits
        start = 0
        for digit in range(1 << DIGIT):
            count = counts[i, digit]
            counts[i, digit] = start
            start += count
        for v in range(V):
            digit = (keys[v] >> shift) & mask
            place = counts[i, digit]
            counts[i, digit] = place + 1
            sorted_keys[place], sorted_order[place] = keys[v], order[v]
        keys, sorted_keys = sorted_keys, keys
        order, sorted_order = sorted_order, order
    return order
