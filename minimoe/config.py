"""What a model is made of: `ModelConfig`, frozen and validated where it is made, and the presets.

Sizes follow the papers, Mistral 7B (arXiv 2310.06825), Mixtral of Experts (arXiv 2401.04088) and Llama 2
(arXiv 2307.09288), and Grok-1's released code (2024).
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any, Self

BALANCE_FORMS = ("per_layer", "concatenated", "switch")
ACTIVATIONS = ("silu", "gelu_tanh")
_POSITIVE = ("attention_scale", "attention_cap", "embedding_multiplier", "output_multiplier")
_OPTIONAL = ("attention_scale", "attention_cap")
_LIMIT = 2**31 - 1  # every single dimension fits a 32-bit index
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
    "num_experts", "num_experts_per_token", "max_length",
)  # fmt: skip


class ConfigError(ValueError):
    """A configuration that describes no model; the message names the field, its value and what would be right."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of one decoder.

    A *dense* model (Mistral-7B, Llama-2) is the same decoder with one expert and no gate. The fields from `activation`
    to `post_norms` say what Grok-1 does otherwise; their defaults are Mixtral.

    Attributes
    ----------
    vocab_size, hidden_size, intermediate_size : int
        V, D and F.
    num_layers, num_heads, num_kv_heads, head_dim : int
        L, H, K and C. H is a multiple of K; C is even; C need not be D / H.
    num_experts, num_experts_per_token : int
        E and k, 1 <= k <= E.
    dense : bool
        No gate: the one expert serves every token with weight 1. Needs E = k = 1.
    norm_eps : float
        Added to the mean square inside the root of RMSNorm.
    rope_theta : float
        Base of the rotary angles.
    sliding_window : int or None
        W: keys a query may see, itself included; None is unbounded.
    max_length : int
        Longest context the model was made for, in tokens (a default for caches, not a limit of the arithmetic).
    tie_embeddings : bool
        The output projection is the embedding table.
    activation : {"silu", "gelu_tanh"}
        Of the experts.
    renormalise : bool
        Gate weights are a softmax over the k chosen logits; False: over all E.
    attention_scale : float or None
        What q · k is multiplied by; None is 1 / sqrt(C).
    attention_cap : float or None
        Scores are bounded: cap · tanh(score / cap). None is no bound.
    embedding_multiplier, output_multiplier : float
        What embeddings and logits are multiplied by.
    post_norms : bool
        What attention writes, and what the experts write, is normed before it joins the residual stream: four norms in
        a block. Needs norm_eps > 0, since padding writes zeros.
    balance_coefficient : float
        Weight of the load-balancing loss in the training loss.
    balance_form : {"per_layer", "concatenated", "switch"}
        Which balance loss; see `minimoe.ops.balance_loss`. transformers computes "concatenated".
    router_jitter : float
        epsilon of the multiplicative noise U(1 - epsilon, 1 + epsilon) in training.
    bos_id, eos_id : int or None
        Control tokens.

    Raises
    ------
    ConfigError
        If the fields contradict each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int = 8
    num_experts_per_token: int = 2
    dense: bool = False
    norm_eps: float = 1e-5
    rope_theta: float = 1e6
    sliding_window: int | None = None
    max_length: int = 32768
    tie_embeddings: bool = False
    activation: str = "silu"
    renormalise: bool = True
    attention_scale: float | None = None
    attention_cap: float | None = None
    embedding_multiplier: float = 1.0
    output_multiplier: float = 1.0
    post_norms: bool = False
    balance_coefficient: float = 0.02
    balance_form: str = "concatenated"
    router_jitter: float = 0.0
    bos_id: int | None = 1
    eos_id: int | None = 2

    def __post_init__(self) -> None:
        for name in _SIZES:
            _check_size(name, getattr(self, name))
        if self.sliding_window is not None:
            _check_size("sliding_window", self.sliding_window)
        for name in ("dense", "tie_embeddings", "renormalise", "post_norms"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, not {getattr(self, name)!r}")
        self._check_relations()
        self._check_numbers()
        for name in ("bos_id", "eos_id"):
            token = getattr(self, name)
            if token is not None and not (_is_int(token) and 0 <= token < self.vocab_size):
                raise ConfigError(f"{name} must be None or an id in [0, {self.vocab_size}), not {token!r}")

    def _check_relations(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads (H = {self.num_heads}) must be a multiple of num_kv_heads (K = {self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim (C = {self.head_dim}) must be even: RoPE rotates pairs")
        if self.dense and (self.num_experts, self.num_experts_per_token) != (1, 1):
            raise ConfigError(
                "a dense model needs num_experts = num_experts_per_token = 1, "
                f"not {self.num_experts} and {self.num_experts_per_token}"
            )
        if self.num_experts_per_token > self.num_experts:
            raise ConfigError(
                f"num_experts_per_token (k = {self.num_experts_per_token}) exceeds num_experts (E = {self.num_experts})"
            )
        if self.balance_form not in BALANCE_FORMS:
            raise ConfigError(f"balance_form must be one of {', '.join(BALANCE_FORMS)}, not {self.balance_form!r}")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {self.activation!r}")
        if self.dense and not self.renormalise:
            raise ConfigError("a dense model has no gate weights: renormalise must be True")

    def _check_numbers(self) -> None:
        for name in ("norm_eps", "rope_theta", "balance_coefficient", "router_jitter", *_POSITIVE):
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max:
                raise ConfigError(f"{name} must be a finite number of at least 0, not {value!r}")
            if value == 0 and (name in _POSITIVE or name == "rope_theta"):
                raise ConfigError(f"{name} must be positive, not 0")
        if self.post_norms and self.norm_eps == 0:
            raise ConfigError("post_norms need a positive norm_eps, not 0: padding writes zeros")
        if self.router_jitter >= 1:
            raise ConfigError(f"router_jitter must be below 1, not {self.router_jitter!r}")

    def replace(self, **changes: Any) -> Self:
        """Return a copy with `changes`; validated again."""
        unknown = sorted(set(changes) - {field.name for field in dataclasses.fields(self)})
        if unknown:
            raise ConfigError(f"unknown configuration field {', '.join(unknown)}")
        return dataclasses.replace(self, **changes)

    def num_parameters(self) -> int:
        """All parameters, embeddings included."""
        return self._parameters(self.num_experts)

    def num_active_parameters(self) -> int:
        """Parameters that take part in one token: k of the E experts, everything else."""
        return self._parameters(self.num_experts_per_token)

    @property
    def norms_per_block(self) -> int:
        """Two before, and two after where there are post-norms."""
        return 4 if self.post_norms else 2

    def _parameters(self, experts: int) -> int:
        D, H, K, C = self.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim
        attention = 2 * D * H * C + 2 * D * K * C
        gate = 0 if self.dense else self.num_experts * D
        block = attention + gate + experts * 3 * D * self.intermediate_size + self.norms_per_block * D
        tables = 1 if self.tie_embeddings else 2
        return self.num_layers * block + tables * self.vocab_size * D + D

    def kv_bytes_per_token(self, itemsize: int = 2) -> int:
        """Bytes of key/value cache that one token takes, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize

    def flops_per_token(self, context: int = 1) -> int:
        """Floating-point operations to decode one token that attends to `context` keys (2 per multiply-add).

        Matrix products only: what norms, softmax and rotations add is below a percent.
        """
        if self.sliding_window is not None:
            context = min(context, self.sliding_window)
        embedding = 0 if self.tie_embeddings else self.vocab_size * self.hidden_size  # a gather, not a product
        norms = (self.norms_per_block * self.num_layers + 1) * self.hidden_size
        weights = self.num_active_parameters() - embedding - norms
        attention = self.num_layers * 2 * self.num_heads * self.head_dim * context
        return 2 * (weights + attention)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_size(name: str, value: object) -> None:
    if not _is_int(value) or not 1 <= value <= _LIMIT:  # type: ignore[operator]
        raise ConfigError(f"{name} must be an integer in [1, {_LIMIT}], not {value!r}")


_MISTRAL = ModelConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8,
    head_dim=128, num_experts=1, num_experts_per_token=1, dense=True, rope_theta=1e4, sliding_window=4096,
)  # fmt: skip
_MIXTRAL = _MISTRAL.replace(num_experts=8, num_experts_per_token=2, dense=False, rope_theta=1e6, sliding_window=None)

PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=160, num_layers=6, num_heads=4, num_kv_heads=2,
        head_dim=32, max_length=256, balance_coefficient=0.02, balance_form="per_layer",
    ),
    "mistral-7b": _MISTRAL,
    "mixtral-8x7b": _MIXTRAL,
    "mixtral-8x22b": _MIXTRAL.replace(
        hidden_size=6144, num_layers=56, num_heads=48, intermediate_size=16384, balance_coefficient=0.001,
        max_length=65536,
    ),
    "llama-2-70b": _MISTRAL.replace(
        hidden_size=8192, num_layers=80, num_heads=64, intermediate_size=28672, sliding_window=None, max_length=4096
    ),
    "grok-1": ModelConfig(
        vocab_size=131072, hidden_size=6144, intermediate_size=32768, num_layers=64, num_heads=48, num_kv_heads=8,
        head_dim=128, rope_theta=1e4, max_length=8192, tie_embeddings=True, activation="gelu_tanh", renormalise=False,
        attention_scale=0.08838834764831845, attention_cap=30.0, embedding_multiplier=78.38367176906169,
        output_multiplier=0.5773502691896257, post_norms=True,
    ),
}  # fmt: skip


def preset(name: str) -> ModelConfig:
    """Return the preset called `name`.

    Raises
    ------
    ConfigError
        If there is none; the message lists them.

    Examples
    --------
    >>> preset("mixtral-8x7b").num_parameters(), preset("mixtral-8x7b").num_active_parameters()
    (46702792704, 12879925248)
    """
    try:
        return PRESETS[name]
    except KeyError:
        raise ConfigError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}") from None
