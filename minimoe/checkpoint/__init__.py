"""Checkpoints: Mixtral, Mistral and Llama folders in every layout, read with care and written atomically.

>>> import tempfile
>>> from minimoe.config import ModelConfig
>>> from minimoe.params import random
>>> config = ModelConfig(vocab_size=16, hidden_size=8, intermediate_size=4, num_layers=1, num_heads=2, num_kv_heads=1,
...                      head_dim=4)
>>> with tempfile.TemporaryDirectory() as folder:
...     save(f"{folder}/model", config, random(config, seed=0))
...     loaded, params = load_params(f"{folder}/model")
>>> loaded == config, params.tok_embeddings.shape
(True, (16, 8))
"""

from minimoe.checkpoint.atomic import write_folder_atomically
from minimoe.checkpoint.converting import convert, initialise
from minimoe.checkpoint.errors import (
    ChangedFileError,
    CheckpointError,
    ConfigFileError,
    DamagedFileError,
    LayoutError,
    MissingFileError,
    NotEnoughMemoryError,
    OutsideFolderError,
    SaveError,
    ShardIndexError,
    TensorMismatchError,
    UnsafeFormatError,
    UnsupportedTypeError,
)
from minimoe.checkpoint.header import TensorInfo
from minimoe.checkpoint.mapped import MappedFiles, memory_in_use
from minimoe.checkpoint.memory import check_memory
from minimoe.checkpoint.reading import Headers, copied_bytes, headers, load_params, read_config
from minimoe.checkpoint.tensors import load_tensors, save_tensors
from minimoe.checkpoint.verifying import Problem, verify
from minimoe.checkpoint.writing import TOKENIZER, TRAINING_STATE, save

__all__ = [
    "load_params", "read_config", "headers", "verify", "save", "convert", "initialise",
    "check_memory", "memory_in_use", "copied_bytes",
    "write_folder_atomically", "save_tensors", "load_tensors",
    "Headers", "MappedFiles", "TensorInfo", "Problem", "TOKENIZER", "TRAINING_STATE",
    "ChangedFileError", "CheckpointError", "ConfigFileError", "DamagedFileError", "LayoutError", "MissingFileError",
    "NotEnoughMemoryError", "OutsideFolderError", "SaveError", "ShardIndexError", "TensorMismatchError",
    "UnsafeFormatError", "UnsupportedTypeError",
]  # fmt: skip
