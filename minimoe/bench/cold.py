"""A fresh process: how long until it can answer, and the most memory it takes. Run by `run` as a program of its own."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minimoe.bench.models import Source


def measure(source: Source, backend: str, batch: int, context: int) -> dict[str, float]:
    """Start a process that imports minimoe, makes or opens a model, and generates a token; return its figures.

    Returns
    -------
    import_seconds, model_seconds : until minimoe is imported; until the model is there (random weights are drawn)
    first_token_seconds : of the first call of all, compiled loops being read from the cache
    peak_bytes : of the process, from when the model is there: its weights as far as they are used, cache, activations
    """
    order: dict[str, Any] = {
        "backend": backend,
        "batch": batch,
        "context": context,
        "folder": source.folder,
        "dtype": source.dtype,
    }
    order["config"] = dataclasses.asdict(source.config)
    command = [sys.executable, "-m", "minimoe.bench.cold", json.dumps(order)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"the process that measures memory failed (status {done.returncode}): {last}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _main(order: dict[str, Any]) -> dict[str, float]:
    start = perf_counter()
    import minimoe

    load, random = minimoe.load, minimoe.random  # imported when they are asked for
    imported = perf_counter()
    import numpy as np

    from minimoe.bench.memory import peak_bytes, reset_peak

    config = minimoe.ModelConfig(**order["config"])
    setting = {"backend": order["backend"], "dtype": order["dtype"]}
    begin = perf_counter()
    if order["backend"] == "numba":
        from minimoe.loops import keep_freed_memory

        keep_freed_memory()  # as the commands do
    model = random(config, **setting) if order["folder"] is None else load(order["folder"], **setting)
    there = perf_counter()
    reset_peak()
    rng = np.random.default_rng(0)
    model.generate_ids(rng.integers(0, config.vocab_size, (order["batch"], order["context"])), max_new_tokens=1)
    return {
        "import_seconds": imported - start, "model_seconds": there - begin,
        "first_token_seconds": perf_counter() - there, "peak_bytes": peak_bytes(),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(_main(json.loads(sys.argv[1]))))
