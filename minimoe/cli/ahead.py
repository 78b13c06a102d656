"""Compile the loops of the CPU before they are needed, by two processes at once: in one, Numba compiles one at a time.

This process compiles what reads a prompt, another (this file run as a program) what continues it, half of it all. The
second finds the way back by the cache on the disk, where every process looks first.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from minimoe.model import Model, load


def compile_ahead(model: Model) -> None:
    """Compile what generating with a model of this storage type needs; on the bundled one, which is small."""
    kind = np.dtype(model.params.layers[0].attention.wq.dtype).name
    command = [sys.executable, "-m", "minimoe.cli.ahead", kind]
    other = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        small = _small(kind)
        # The experts of few tokens first: the other process comes to them last, and finds them done.
        layer, k = small.params.layers[0].feed_forward, small.config.num_experts_per_token
        x = np.zeros((1, small.config.hidden_size), "float64" if kind == "float64" else "float32")
        small.ops.experts.forward(x, layer.w1, layer.w2, layer.w3, np.arange(k)[None], np.ones((1, k), np.float32))
        small.generate_ids(np.zeros((2, 32), np.int64), max_new_tokens=1)
        other.wait()
    finally:
        other.kill()  # where Ctrl-C or an error comes first; what it has compiled until then is kept


def _compile_step(kind: str) -> None:
    """Compile a step of decoding, without reading a prompt."""
    from minimoe import compiled_step

    model = _small(kind)
    step = compiled_step.prepared(model.ops, model.config, model.params, model.new_cache())
    if step is not None:  # float64 is done op by op
        step(np.zeros((1, 1), np.int64), np.zeros((1, 1), np.int64))


def _small(kind: str) -> Model:
    return load("tiny", backend="numba", dtype=kind)


if __name__ == "__main__":
    _compile_step(sys.argv[1])
