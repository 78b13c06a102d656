"""The models that are measured: presets with random, seeded weights, or a checkpoint folder."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minimoe import checkpoint
from minimoe.arrays import BFLOAT16
from minimoe.bench import device
from minimoe.config import PRESETS, ConfigError, ModelConfig
from minimoe.params import Params, quantized, random, stack_experts

SEED = 0
USUAL = ("prefill", "decode", "first-token")  # what is measured of a model
DTYPES = {
    "float32": np.dtype(np.float32), "float64": np.dtype(np.float64), "bfloat16": BFLOAT16, "int8": np.dtype(np.int8),
}  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """Sizes to measure.

    Attributes
    ----------
    config : ModelConfig
    dtypes : storage types that are measured unless others are asked for
    context : tokens of a prompt, unless asked for
    what : what is measured, unless asked for
    mapped : whether the weights are written to a temporary folder and mapped from there, as a checkpoint is
    on_device : whether the weights are drawn on a device, of which the host needs none: for the cuda backend only
    """

    config: ModelConfig
    dtypes: tuple[str, ...]
    context: int
    what: tuple[str, ...]
    mapped: bool = False
    on_device: bool = False


_MEDIUM = ModelConfig(
    vocab_size=32000, hidden_size=1024, intermediate_size=3584, num_layers=8, num_heads=16, num_kv_heads=4, head_dim=64,
    max_length=32768,
)  # fmt: skip

BENCHMARKS: dict[str, Preset] = {
    "tiny": Preset(PRESETS["tiny"], ("float32",), 128, (*USUAL, "train")),
    "medium": Preset(_MEDIUM, ("float32", "bfloat16", "int8"), 512, USUAL),
    "mixtral-2-layers": Preset(
        PRESETS["mixtral-8x7b"].replace(num_layers=2), ("bfloat16",), 128, ("decode",), mapped=True
    ),
    "mixtral-8x7b": Preset(PRESETS["mixtral-8x7b"], ("bfloat16",), 4096, USUAL, on_device=True),
}


def benchmark(name: str) -> Preset:
    """Return the sizes called `name`.

    Raises
    ------
    ConfigError
        If there are none; the message lists them.
    """
    if name not in BENCHMARKS:
        raise ConfigError(f"unknown preset {name!r}; minimoe bench has {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def kind(dtype: str) -> Any:
    """Return the storage type called `dtype`."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    return DTYPES[dtype]


@dataclass(frozen=True)
class Source:
    """Where a model's weights come from: drawn from SEED, or a folder. Small: it is sent to other processes.

    Attributes
    ----------
    config, dtype : of the model
    folder : of the checkpoint, or None
    on_device : whether they are drawn on the device
    """

    config: ModelConfig
    dtype: str
    folder: str | None = None
    on_device: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return self.config.num_parameters() * int(kind(self.dtype).itemsize)

    def params(self, stacked: bool = True) -> Params:
        """Make the weights: in memory, experts stacked or in a list, mapped from the folder, or on the device."""
        if self.on_device:
            return device.draw(self.config, SEED, kind(self.dtype))
        int8 = self.dtype == "int8"
        if self.folder is not None:
            held = checkpoint.load_params(self.folder, None if int8 else kind(self.dtype))[1]
            return quantized(held) if int8 else held
        checkpoint.check_memory(self.config, kind(self.dtype))
        drawn = random(self.config, SEED, "int8" if int8 else kind(self.dtype))
        return stack_experts(drawn) if stacked else drawn

    def written(self, folder: Path) -> Source:
        """Write the weights as a checkpoint; return them as its source.

        Raises
        ------
        ValueError
            If memory or the disk has no room for them.
        """
        free = shutil.disk_usage(folder.parent).free
        if self.nbytes > free:
            needed = f"{self.nbytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
            raise ValueError(f"{folder.parent}: the checkpoint that is to be mapped needs {needed} (set TMPDIR)")
        checkpoint.save(folder, self.config, self.params(stacked=False))
        return Source(self.config, self.dtype, str(folder))


def folder_preset(folder: str) -> Preset:
    """Return the sizes of a checkpoint folder, in the type that most of its weights are stored in.

    Raises
    ------
    CheckpointError
        If it is not one.
    """
    config, sizes = checkpoint.read_config(folder), Counter[str]()
    for tensor in checkpoint.headers(folder).tensors:
        sizes[str(tensor.dtype)] += tensor.size
    stored = max(sizes, key=lambda name: sizes[name])
    dtype = stored if stored in DTYPES else "float32"  # float16 is widened
    return Preset(config, (dtype,), max(1, min(512, config.max_length - 1)), USUAL, mapped=True)


def with_layers(config: ModelConfig, layers: int) -> ModelConfig:
    """Return the config with its first layers only.

    Raises
    ------
    ConfigError
        If it has fewer.
    """
    if not 1 <= layers <= config.num_layers:
        raise ConfigError(f"--layers must be between 1 and the model's {config.num_layers}, not {layers}")
    return config.replace(num_layers=layers)


def that_fit(config: ModelConfig, dtype: str, size: float) -> ModelConfig:
    """Return the config with as many of its layers as `size` bytes hold.

    Raises
    ------
    ConfigError
        If they do not hold one.
    """

    def needed(layers: int) -> int:
        return config.replace(num_layers=layers).num_parameters() * int(kind(dtype).itemsize)

    if needed(1) > size:
        raise ConfigError(f"one layer and the vocabulary need {needed(1) / 1e9:.1f} GB, {size / 1e9:.1f} GB are there")
    return config.replace(num_layers=max(n for n in range(1, config.num_layers + 1) if needed(n) <= size))


def with_experts(config: ModelConfig, experts: int) -> ModelConfig:
    """Return the config with another number of experts, of which a token still chooses k where there are so many."""
    if config.dense:
        raise ConfigError("--experts: a dense model has no experts to vary")
    return config.replace(num_experts=experts, num_experts_per_token=min(config.num_experts_per_token, experts))
