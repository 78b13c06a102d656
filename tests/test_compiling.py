"""What a compiled loop computes does not depend on what else its process has compiled or loaded."""

import os
import subprocess
import sys
from pathlib import Path

ATTENTION = """
import hashlib
import numpy as np
from minimoe.ops.attention import numba_cpu as attention

rng = np.random.default_rng(0)
positions = np.arange(100)[None]
q, k, v = (rng.normal(size=(1, 100, heads, 48)).astype(np.float32) for heads in (8, 2, 2))


def forward():
    return attention.forward(q, k, v, positions, positions, None)


def backward(out, lse):
    return attention.backward(out, q, k, v, positions, positions, None, out, lse)


def digest(arrays):
    return hashlib.sha256(b"".join(x.tobytes() for x in arrays)).hexdigest()


out = rng.normal(size=q.shape).astype(np.float32)
lse = rng.normal(5, 0.1, size=q.shape[:3]).astype(np.float32)
"""
FORWARD_FIRST = ATTENTION + "one = digest(forward())\nprint(one, digest(backward(out, lse)))"
BACKWARD_FIRST = ATTENTION + "two = digest(backward(out, lse))\nprint(digest(forward()), two)"


def printed(program: str, cache: Path) -> str:
    """What a process prints that keeps its compiled loops in a folder."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return run.stdout


def test_bits_are_the_same_just_compiled_and_from_the_cache_and_in_any_order(tmp_path: Path) -> None:
    """The loops of attention share functions that divide and add up, and that are too large to be put into each."""
    compiled = printed(FORWARD_FIRST, tmp_path)
    assert list(tmp_path.glob("*/*/*.nbc"))  # kept, so what follows reads it
    assert printed(FORWARD_FIRST, tmp_path) == compiled
    assert printed(BACKWARD_FIRST, tmp_path) == compiled
