"""Golden outputs of the bundled model: what its logits are in exact arithmetic, and how far a backend is from them.

error = max |logits - truth| / max |truth|                over the first 64 tokens of every shipped text
bound = 2 · (error of the array-code reference in the same number format) + 8 u √n

The truth is the reference in float64, with the stored weights widened: no rounding but that of the weights. The error
is taken with the truth's experts imposed, since a rounding that turns a near tie over changes the logits by a jump that
no bound on roundings covers; how many choices differ when the router is free is counted apart. u is the unit roundoff
of the accumulation (float32: 2⁻²⁴), n the longest sum.

`python -m minimoe.golden_tiny` writes the file anew, after a training run has replaced the weights.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from minimoe import mixtral, texts
from minimoe.arrays import BFLOAT16, to_host
from minimoe.backends import Backend, make_backend
from minimoe.checkpoint import load_params, load_tensors, save_tensors
from minimoe.config import ModelConfig
from minimoe.params import Params, map_leaves
from minimoe.shapes import Array, Routing
from minimoe.tokenizer import Tokenizer

FOLDER = Path(__file__).parent / "models" / "tiny"
FILE = "golden.safetensors"
TOKENS = 64  # of each text
EVERY = 8  # logits are stored at every eighth position: all of them would take half as much as the model
_FORMATS = (np.dtype(np.float32), BFLOAT16)  # those whose reference error is stored, in this order


class GoldenError(ValueError):
    """Golden outputs that are missing, or were made for other weights."""


@dataclass(frozen=True)
class Comparison:
    """How far a model's logits are from the golden ones.

    Attributes
    ----------
    error : relative to the largest logit, with the experts of the truth
    bound : what roundings may amount to
    same_choices, choices : of the free router's expert sets, how many are the truth's
    """

    error: float
    bound: float
    same_choices: int
    choices: int

    @property
    def ratio(self) -> float:
        """Error ÷ bound: at most 1 where all is well."""
        return self.error / self.bound


def compare(ops: Backend, config: ModelConfig, params: Params, folder: str | Path = FOLDER) -> Comparison:
    """Hold a backend against the golden outputs beside the weights in `folder`.

    Raises
    ------
    GoldenError
        If there are none, or they were made for other weights.
    """
    path = Path(folder) / FILE
    if not path.exists():
        raise GoldenError(f"{path}: there is no such file; `python -m minimoe.golden_tiny` makes it")
    golden = load_tensors(path)
    if golden["weights"].tobytes() != _digest(Path(folder)):
        raise GoldenError(f"{path}: was made for other weights; `python -m minimoe.golden_tiny` makes it anew")
    ids: Array = golden["ids"].astype(np.int64)
    _, free = _run(ops, config, params, golden["tokens"], None)
    logits, _ = _run(ops, config, params, golden["tokens"], ids)
    same = (np.sort(free, axis=-1) == np.sort(ids, axis=-1)).all(axis=-1)
    error = relative_error(logits, golden["logits"])
    return Comparison(error, _bound(config, params.dtype, golden["errors"]), int(same.sum()), same.size)


def make(folder: str | Path = FOLDER) -> dict[str, Array]:
    """Compute the golden outputs of the model in `folder` and write them beside its weights."""
    folder = Path(folder)
    ops = make_backend("numpy")
    config, params = load_params(folder)
    tokenizer = Tokenizer(folder / "tokenizer.model")
    tokens = np.array([tokenizer.encode(text)[:TOKENS] for text in texts.load().values()])  # (G, TOKENS)
    truth, ids = _run(ops, config, _as(params, np.float64), tokens, None)
    errors = [relative_error(_run(ops, config, _as(params, kind), tokens, ids)[0], truth) for kind in _FORMATS]
    golden = {
        "tokens": tokens,
        "logits": truth,
        "ids": ids.astype(np.uint8),
        "errors": np.array(errors),
        "weights": np.frombuffer(_digest(folder), np.uint8),
    }
    save_tensors(folder / FILE, golden)
    return golden


def relative_error(result: Array, truth: Array) -> float:
    """Return max |result - truth| / max |truth|."""
    return float(np.abs(result.astype(np.float64) - truth).max() / np.abs(truth).max())


def _run(
    ops: Backend, config: ModelConfig, params: Params, tokens: Int[Array, "G T"], ids: Int[Array, "L N k"] | None
) -> tuple[Float[Array, "G t V"], Int[Array, "L N k"]]:
    """Return the logits of every eighth position, and the experts of every token."""
    inputs = mixtral.check_inputs(tokens, config.vocab_size)
    choose = mixtral.choices(ops, config, tokens.size, None if ids is None else Routing(ids), ())
    logits, routed = mixtral.forward(ops, config, params, inputs, choose=choose)
    chosen = np.stack([to_host(layer.ids) for layer in routed])
    return to_host(logits)[:, EVERY - 1 :: EVERY], chosen


def _as(params: Params, kind: Any) -> Params:
    return map_leaves(params, lambda w: w.astype(kind))


def _bound(config: ModelConfig, kind: np.dtype[Any], errors: Float[Array, " formats"]) -> float:
    if kind == np.float64:
        return 1e-10  # what two evaluations in float64 are held to everywhere in this project
    longest = max(config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim, TOKENS)
    return float(2 * errors[_FORMATS.index(kind)] + 8 * 2.0**-24 * longest**0.5)


def _digest(folder: Path) -> bytes:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).digest()


if __name__ == "__main__":
    written = make(*sys.argv[1:2])
    print(f"error of the reference in float32 {written['errors'][0]:.2e}, in bfloat16 {written['errors'][1]:.2e}")
