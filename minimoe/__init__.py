"""minimoe: Mixtral with every step visible.

>>> import minimoe
>>> model = minimoe.load("tiny", backend="numpy")
>>> model.config.num_experts, model.config.num_experts_per_token
(8, 2)

What is offered here is imported when it is first asked for: pytest imports this package at every start, for the plugin
of the golden kit, and must not wait for all of it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from minimoe import threads as _threads

if TYPE_CHECKING:
    from minimoe.config import PRESETS, ConfigError, ModelConfig, preset
    from minimoe.golden.check import check
    from minimoe.model import Model, load, random
    from minimoe.shapes import Routing

__version__ = "0.1.0"

__all__ = ["PRESETS", "ConfigError", "Model", "ModelConfig", "Routing", "check", "load", "preset", "random"]

_HOMES = {
    "PRESETS": "config", "ConfigError": "config", "ModelConfig": "config", "preset": "config",
    "Model": "model", "load": "model", "random": "model", "Routing": "shapes", "check": "golden.check",
}  # fmt: skip


_threads.before_numba()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'minimoe' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"minimoe.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
