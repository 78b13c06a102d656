"""A CUDA device in the benchmark: what it is, what it can do, and weights that are drawn on it."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from minimoe import cuda
from minimoe.arrays import BFLOAT16, cuda_version, cupy_module
from minimoe.config import ModelConfig
from minimoe.params import Params, from_named, initial_scale, shapes
from minimoe.shapes import Array

KERNELS = Path(__file__).with_name("kernels.cu")
INSTANCES = ("read_all<float>", *(f"draw_normal<{stored}>" for stored in ("float", "double", "bfloat16")))

READ_BYTES = 4 << 30  # many times the second-level cache
SIDE = 8192  # of the square matrices: 1.1 TFLOP in one product
_THREADS = 256


class GpuProbe:
    """The device: a kernel that only reads, over 4 GiB; cuBLAS for products, as our prefill uses it."""

    def __init__(self) -> None:
        self._xp = xp = cupy_module()
        rng = np.random.default_rng(0)
        # Small whole numbers, so that every sum is exact; random, as a device may compress what repeats.
        part = xp.asarray(rng.integers(0, 4, READ_BYTES // 64, np.uint8))
        self._read = xp.empty(READ_BYTES // 4, np.float32)
        for i in range(16):
            self._read[i * part.size : (i + 1) * part.size] = part
        self._total = 16 * int(part.sum())
        self._sums = xp.zeros(_blocks(xp), np.float32)
        self._matrices: dict[str, tuple[Array, Array]] = {}

    def bandwidth(self) -> float:
        """Read everything."""
        vectors = self._read.size // 4

        arguments = [self._read, self._sums, vectors]
        seconds = self._timed(lambda: cuda.launch(KERNELS, "read_all<float>", len(self._sums), _THREADS, arguments))
        assert self._sums.get().sum(dtype=np.float64) == self._total, "the read test did not read everything"
        return float(self._read.nbytes / seconds)

    def rate(self, dtype: str) -> float:
        """Multiply."""
        x, w = self._operands(dtype)
        seconds = self._timed(lambda: cuda.product(x, w))
        return float(2 * SIDE**3 / seconds)

    def _operands(self, dtype: str) -> tuple[Array, Array]:
        """Random numbers: zeros are multiplied faster."""
        if dtype not in self._matrices:
            kind = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
            x, w = (self._xp.empty((SIDE, SIDE), kind) for _ in range(2))
            for i, one in enumerate((x, w)):
                draw_normal(self._xp, one, 0, i, 1.0)
            cuda.product(x, w)  # cuBLAS is loaded
            self._matrices = {dtype: (x, w)}  # one pair at a time
        return self._matrices[dtype]

    def _timed(self, work: Any) -> float:
        """Seconds on the device, between two events of its stream."""
        events = self._xp.cuda.Event(), self._xp.cuda.Event()
        events[0].record()
        work()
        events[1].record()
        events[1].synchronize()
        return float(self._xp.cuda.get_elapsed_time(*events)) / 1e3


def draw_normal(xp: Any, w: Array, seed: int, stream: int, scale: float) -> None:
    """Overwrite a contiguous array with normal numbers that depend on seed and stream."""
    cuda.launch(
        KERNELS, f"draw_normal<{cuda.c_type(w)}>", _blocks(xp), _THREADS, [w, w.size, seed, stream, float(scale)]
    )


def draw(config: ModelConfig, seed: int, dtype: Any, quiet: bool | None = None) -> Params:
    """Draw fresh weights on the device: distributed as `params.random` does, from other random numbers.

    The host could draw the 47 G of Mixtral-8x7B in some minutes, if it had 93 GB of memory; the device has it.
    """
    xp = cupy_module()
    experts: dict[str, Array] = {}  # those of a layer are one array

    def made(name: str, shape: tuple[int, ...]) -> Array:
        if len(shape) == 1:
            return xp.ones(shape, dtype)
        layer, _, rest = name.partition(".experts.")
        if rest:
            e, _, weight = rest.partition(".")
            if e == "0":
                experts[f"{layer}.{weight}"] = xp.empty((config.num_experts, *shape), dtype)
            w = experts[f"{layer}.{weight}"][int(e)]
        else:
            w = xp.empty(shape, dtype)
        draw_normal(xp, w, seed, zlib.crc32(name.encode()), initial_scale(config, name, shape))
        return w

    with tqdm(shapes(config).items(), desc="drawing weights", disable=quiet, leave=False) as bar:
        params = from_named(config, {name: made(name, shape) for name, shape in bar})
    for i, layer in enumerate(params.layers):
        for weight in ("w1", "w2", "w3"):
            whole = experts.get(f"layers.{i}.feed_forward.{weight}")
            setattr(
                layer.feed_forward, weight, getattr(layer.feed_forward, weight)[0][None] if whole is None else whole
            )
    return params


def describe() -> dict[str, Any]:
    """The card, its driver, and the CUDA that CuPy was built for."""
    xp = cupy_module()
    runtime = xp.cuda.runtime
    found = runtime.getDeviceProperties(xp.cuda.Device().id)
    return {
        "card": found["name"].decode(), "memory_bytes": int(found["totalGlobalMem"]),
        "multiprocessors": int(found["multiProcessorCount"]),
        "compute_capability": f"{found['major']}.{found['minor']}",
        "driver": _driver(), "driver_serves_cuda": cuda_version(runtime.driverGetVersion()),
        "cuda": cuda_version(runtime.runtimeGetVersion()),
    }  # fmt: skip


def _blocks(xp: Any) -> int:
    """Enough blocks to fill the device eight times over."""
    return 8 * int(xp.cuda.Device().attributes["MultiProcessorCount"])


def _driver() -> str | None:
    """The driver's own version, which CUDA does not tell."""
    try:
        line = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return None
    return next((word for word in line.split() if word.count(".") >= 1 and word[0].isdigit()), None)
