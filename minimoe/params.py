"""The parameters of a model: a tree of arrays, and its names.

Names are Mistral's without `.weight`: `layers.3.attention.wq`, `layers.3.feed_forward.experts.7.w2`. A gradient is the
same tree. Experts are addressed one at a time, `w1[e]`, so they may be one stacked array or a list of views.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minimoe.config import ModelConfig
from minimoe.quantized import Int8, quantize
from minimoe.shapes import Array


@dataclass(eq=False)
class AttentionParams:
    """wq (H·C, D), wk and wv (K·C, D), wo (D, H·C)."""

    wq: Array
    wk: Array
    wv: Array
    wo: Array


@dataclass(eq=False)
class FeedForwardParams:
    """gate (E, D), None in a dense model; E experts of w1 and w3 (F, D), w2 (D, F)."""

    gate: Array | None
    w1: Sequence[Array]
    w2: Sequence[Array]
    w3: Sequence[Array]


@dataclass(eq=False)
class LayerParams:
    """One block: norms (D,) before attention and experts, and after them where there are post-norms."""

    attention_norm: Array
    attention: AttentionParams
    ffn_norm: Array
    feed_forward: FeedForwardParams
    attention_post_norm: Array | None = None
    ffn_post_norm: Array | None = None


@dataclass(eq=False)
class Params:
    """A whole decoder. `output` is None where the embeddings are tied."""

    tok_embeddings: Array
    layers: list[LayerParams]
    norm: Array
    output: Array | None

    @property
    def head(self) -> Array:
        """(V, D) the matrix that turns states into logits."""
        return self.tok_embeddings if self.output is None else self.output

    @property
    def dtype(self) -> Any:
        """The storage type, that of the embedding table."""
        return self.tok_embeddings.dtype

    @property
    def storage(self) -> str:
        """The name of the type that most weights are stored in: "int8", or that of `dtype`."""
        return "int8" if isinstance(self.layers[0].attention.wq, Int8) else str(self.dtype)


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every parameter, in the order of the forward pass."""
    V, D, F = config.vocab_size, config.hidden_size, config.intermediate_size
    HC, KC = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    expert = {"w1": (F, D), "w2": (D, F), "w3": (F, D)}
    found: dict[str, tuple[int, ...]] = {"tok_embeddings": (V, D)}
    for i in range(config.num_layers):
        layer = f"layers.{i}."
        found[layer + "attention_norm"] = (D,)
        for name, shape in {"wq": (HC, D), "wk": (KC, D), "wv": (KC, D), "wo": (D, HC)}.items():
            found[f"{layer}attention.{name}"] = shape
        if config.post_norms:
            found[layer + "attention_post_norm"] = (D,)
        found[layer + "ffn_norm"] = (D,)
        if config.dense:
            found |= {f"{layer}feed_forward.{name}": shape for name, shape in expert.items()}
        else:
            found[layer + "feed_forward.gate"] = (config.num_experts, D)
            for e in range(config.num_experts):
                found |= {f"{layer}feed_forward.experts.{e}.{name}": shape for name, shape in expert.items()}
        if config.post_norms:
            found[layer + "ffn_post_norm"] = (D,)
    found["norm"] = (D,)
    if not config.tie_embeddings:
        found["output"] = (V, D)
    return found


def named(params: Params) -> Iterator[tuple[str, Array]]:
    """Yield (name, array) for every parameter, in the order of `shapes`; experts as views."""
    for name, leaf in leaves(params):
        if ".experts." in name:
            prefix, _, weight = name.rpartition(".")
            yield from ((f"{prefix}.{e}.{weight}", leaf[e]) for e in range(len(leaf)))
        else:
            yield name, leaf


def leaves(params: Params) -> Iterator[tuple[str, Array]]:
    """Yield (name, array) for every leaf of the tree: the experts of a layer are one leaf, `…experts.w1`."""
    yield "tok_embeddings", params.tok_embeddings
    for i, layer in enumerate(params.layers):
        yield f"layers.{i}.attention_norm", layer.attention_norm
        for field in dataclasses.fields(layer.attention):
            yield f"layers.{i}.attention.{field.name}", getattr(layer.attention, field.name)
        if layer.attention_post_norm is not None:
            yield f"layers.{i}.attention_post_norm", layer.attention_post_norm
        yield f"layers.{i}.ffn_norm", layer.ffn_norm
        ffn = layer.feed_forward
        if ffn.gate is not None:
            yield f"layers.{i}.feed_forward.gate", ffn.gate
        for name in ("w1", "w2", "w3"):
            weights = getattr(ffn, name)
            if ffn.gate is None:
                yield f"layers.{i}.feed_forward.{name}", weights[0]
            else:
                yield f"layers.{i}.feed_forward.experts.{name}", weights
        if layer.ffn_post_norm is not None:
            yield f"layers.{i}.ffn_post_norm", layer.ffn_post_norm
    yield "norm", params.norm
    if params.output is not None:
        yield "output", params.output


def from_named(config: ModelConfig, arrays: Mapping[str, Array]) -> Params:
    """Build the tree from named arrays; the experts of a layer become a list of the arrays given."""

    def layer(i: int) -> LayerParams:
        prefix = f"layers.{i}."
        ffn = prefix + "feed_forward."

        def post_norm(name: str) -> Array | None:
            return arrays[prefix + name] if config.post_norms else None

        def experts(name: str) -> Sequence[Array]:
            if config.dense:
                return [arrays[ffn + name]]
            return [arrays[f"{ffn}experts.{e}.{name}"] for e in range(config.num_experts)]

        return LayerParams(
            arrays[prefix + "attention_norm"],
            AttentionParams(*(arrays[f"{prefix}attention.{name}"] for name in ("wq", "wk", "wv", "wo"))),
            arrays[prefix + "ffn_norm"],
            FeedForwardParams(
                None if config.dense else arrays[ffn + "gate"], experts("w1"), experts("w2"), experts("w3")
            ),
            post_norm("attention_post_norm"),
            post_norm("ffn_post_norm"),
        )

    output = None if config.tie_embeddings else arrays["output"]
    layers = [layer(i) for i in range(config.num_layers)]
    return Params(arrays["tok_embeddings"], layers, arrays["norm"], output)


def map_leaves(params: Params, change: Callable[[Array], Array]) -> Params:
    """Return the tree with `change` applied to every array; a list of experts stays a list, int8 stays int8."""

    def held(w: Any) -> Any:
        return w.map(change) if isinstance(w, Int8) else change(w)

    return _rebuilt(params, held, held)


def quantized(params: Params) -> Params:
    """Return the tree with the matrices of linear maps and experts in int8, one after the other.

    The embedding table (which is also the head, where they are tied), norms and router gates stay as they are.
    """

    return _rebuilt(params, quantize, lambda w: w)


def _rebuilt(params: Params, matrix: Callable[[Any], Any], other: Callable[[Any], Any]) -> Params:
    """Return the tree with `matrix` applied to what linear maps and experts multiply by, `other` to all else."""

    def experts(weights: Any) -> Any:
        return [matrix(w) for w in weights] if isinstance(weights, list) else matrix(weights)

    def layer(old: LayerParams) -> LayerParams:
        a, f = old.attention, old.feed_forward
        return LayerParams(
            other(old.attention_norm),
            AttentionParams(matrix(a.wq), matrix(a.wk), matrix(a.wv), matrix(a.wo)),
            other(old.ffn_norm),
            FeedForwardParams(None if f.gate is None else other(f.gate), experts(f.w1), experts(f.w2), experts(f.w3)),
            None if old.attention_post_norm is None else other(old.attention_post_norm),
            None if old.ffn_post_norm is None else other(old.ffn_post_norm),
        )

    output = None if params.output is None else matrix(params.output)
    return Params(other(params.tok_embeddings), [layer(old) for old in params.layers], other(params.norm), output)


def stack_experts(params: Params, stack: Callable[[Sequence[Any]], Any] | None = None) -> Params:
    """Return the tree with every layer's experts copied into one (E, ., .) array each, as training needs it.

    `stack` makes the array, elsewhere if need be.
    """
    joined = stack or _stack

    def stacked(layer: LayerParams) -> LayerParams:
        ffn = layer.feed_forward
        experts: list[Any] = [joined(w) if isinstance(w, list) else w for w in (ffn.w1, ffn.w2, ffn.w3)]
        return dataclasses.replace(layer, feed_forward=FeedForwardParams(ffn.gate, *experts))

    return dataclasses.replace(params, layers=[stacked(layer) for layer in params.layers])


def _stack(weights: Sequence[Any]) -> Any:
    if isinstance(weights[0], Int8):
        return Int8(np.stack([w.values for w in weights]), np.stack([w.scale for w in weights]), weights[0].source)
    return np.stack(weights)


def random(config: ModelConfig, seed: int, dtype: Any = np.float32) -> Params:
    """Draw fresh weights (see `draw`); with `dtype` "int8" it is `quantized` of the float32 tree, tensor by tensor."""
    kind, narrow = (np.dtype(np.float32), True) if dtype == "int8" else (dtype, False)

    def drawn(name: str, shape: tuple[int, ...]) -> Any:
        values = draw(config, name, shape, seed, kind)
        matrix = len(shape) > 1 and name != "tok_embeddings" and not name.endswith(".gate")
        return quantize(values) if narrow and matrix else values

    return from_named(config, {name: drawn(name, shape) for name, shape in shapes(config).items()})


def draw(config: ModelConfig, name: str, shape: tuple[int, ...], seed: int, dtype: Any) -> Array:
    """Draw one parameter; every one has a stream of its own, so its values do not depend on the others.

    Embeddings have unit variance, matrices 1 / fan-in (tied embeddings too: they make the logits). Those that write to
    the residual stream (wo, w2) are divided by sqrt(2 L), so that its variance stays of order one whatever the depth.
    Norms start at one.
    """
    if len(shape) == 1:
        return np.ones(shape, dtype)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    values = rng.standard_normal(shape, np.float32)
    values *= np.float32(initial_scale(config, name, shape))
    return values.astype(dtype, copy=False)


def initial_scale(config: ModelConfig, name: str, shape: tuple[int, ...]) -> float:
    """Return the standard deviation of a fresh matrix (see `draw`)."""
    scale = 1.0 if name == "tok_embeddings" and not config.tie_embeddings else shape[1] ** -0.5
    if name.endswith((".wo", ".w2")):
        scale *= (2 * config.num_layers) ** -0.5
    return float(scale)
