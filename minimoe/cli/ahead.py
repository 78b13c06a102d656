"""Compile the loops of the CPU before they are needed, by two processes at once: in one, Numba compiles one at a time.

This process compiles what reads a prompt; another, this file run as a program, compiles a step of decoding, which is
about as much. What the second has compiled reaches the first through the cache on the disk: the loops for few tokens,
which both need, are the first in the second process and the last in this one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np

from minimoe.model import Model, load

PATIENCE = 300  # seconds to wait for the second process; without it, everything is compiled when it is needed
PROGRAM = [sys.executable, "-P", "-m", "minimoe.cli.ahead"]  # -P: nothing is imported from the user's folder


def compile_ahead(model: Model) -> None:
    """Compile what generating with a model of this storage type needs (int8: made from bfloat16).

    It is tried on the bundled model, which is small. If the second process cannot be started, or fails, this one
    compiles its part too, when it comes to it.
    """
    kind = np.dtype(model.params.layers[0].attention.wq.dtype).name
    other = _start(kind)
    try:
        _read_a_prompt(kind)
        if other is not None:
            with suppress(subprocess.TimeoutExpired):
                other.wait(PATIENCE)
    finally:
        if other is not None:
            other.kill()  # where it hangs, or Ctrl-C came first; what it has compiled until then is kept
            other.wait()


def _start(kind: str) -> subprocess.Popen[bytes] | None:
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    nothing = subprocess.DEVNULL
    with suppress(OSError):
        return subprocess.Popen(
            [*PROGRAM, kind], env=os.environ | {"PYTHONPATH": path}, stdin=nothing, stdout=nothing, stderr=nothing
        )
    return None


def _read_a_prompt(kind: str) -> None:
    """Compile what reads a prompt of many tokens and draws the next, and then the experts and attention of a few."""
    model = load("tiny", backend="numba", dtype=kind)
    model.generate_ids(np.zeros((2, 32), np.int64), max_new_tokens=1, temperature=1.0)
    c, experts, held = model.config, model.params.layers[0].feed_forward, model.new_cache()
    dtype = "float64" if kind == "float64" else "float32"
    x, ids = np.zeros((1, c.hidden_size), dtype), np.arange(c.num_experts_per_token)[None]
    model.ops.experts.forward(x, experts.w1, experts.w2, experts.w3, ids, np.ones(ids.shape, dtype))
    q, keys = np.zeros((1, 1, c.num_heads, c.head_dim), dtype), held.layers[0]
    model.ops.attention.forward(q, keys.k, keys.v, np.zeros((1, 1), np.int64), held.positions, None)


def _decode_a_step(kind: str) -> None:
    """Compile a step of decoding, and the loss of what was read."""
    from minimoe import compiled_step

    model = load("tiny", backend="numba", dtype=kind)
    step = compiled_step.prepared(model.ops, model.config, model.params, model.new_cache())
    if step is not None:  # float64 is done op by op
        step(np.zeros((1, 1), np.int64), np.zeros((1, 1), np.int64))
    logits = np.zeros((1, model.config.vocab_size), "float64" if kind == "float64" else "float32")
    model.ops.cross_entropy.forward(logits, np.zeros(1, np.int64))


if __name__ == "__main__":
    _decode_a_step(sys.argv[1])
