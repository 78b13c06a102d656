"""minimoe: Mixtral with every step visible.

>>> import minimoe
>>> model = minimoe.load("tiny", backend="numpy")
>>> model.config.num_experts, model.config.num_experts_per_token
(8, 2)
"""

from minimoe.config import PRESETS, ConfigError, ModelConfig, preset
from minimoe.model import Model, load, random
from minimoe.shapes import Routing

__version__ = "0.1.0"

__all__ = ["PRESETS", "ConfigError", "Model", "ModelConfig", "Routing", "load", "preset", "random"]
