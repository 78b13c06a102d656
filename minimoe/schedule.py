"""The static schedule of a forward pass: every op call in order, its equation, what it reads, and what it writes.

What is known before anything is computed: names, shapes, floating-point operations, bytes. Tracing names what it sees
by this table, and the stepper walks along it; the tests hold it against what a model really calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from minimoe.config import ModelConfig


@dataclass(frozen=True)
class Step:
    """One op call.

    Attributes
    ----------
    name : what it computes, `layers.0.attention.qkv`
    room, function : the op, `linear`, `forward`
    equation : one line, in the letters of the arrays it names
    reads, writes : names of intermediates, as in a trace
    weights : names of the parameters it reads; of experts without their number, `layers.0.feed_forward.experts.w1`
    layer : the block it belongs to, or None
    """

    name: str
    room: str
    function: str
    equation: str
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    layer: int | None = None


# Letters of the inner names of a block; see `letters`.
_LETTERS = {
    "attention_norm": "N D", "attention.q": "N HC", "attention.k": "N KC", "attention.v": "N KC",
    "attention.q_rotated": "N H C", "attention.k_rotated": "N K C", "attention.scores": "B H T S",
    "attention.probs": "B H T S", "attention.context": "N HC", "attention.out": "N D", "attention_residual": "N D",
    "ffn_norm": "N D", "gating.logits": "N E", "gating.ids": "N k", "gating.weights": "N k",
    "experts.hidden": "N k F", "experts.slots": "N k D", "experts.out": "N D", "out": "N D",
    "attention_post_norm": "N D", "ffn_post_norm": "N D",
}  # fmt: skip
_OUTER = {"tok_embeddings": "N D", "norm": "N D", "logits": "B T V"}


def schedule(config: ModelConfig) -> list[Step]:
    """Return every op call of a forward pass without cache, in order."""
    steps = [
        Step("rope", "rope", "table", "angle[n, i] = position[n] · theta^(-2i / C);  cos, sin"),
        Step(
            "tok_embeddings", "embedding", "forward",
            f"x[n] = {_factor(config.embedding_multiplier)}table[tokens[n]]", ("tokens",), ("tok_embeddings",),
            ("tok_embeddings",),
        ),
    ]  # fmt: skip
    stream = "tok_embeddings"  # the residual stream where the next norm finds it
    for i in range(config.num_layers):
        steps += _block(config, i, stream, first=i == 0)
        stream = f"layers.{i}.out"
    reads, total = _handed_on(config, config.num_layers - 1)
    head = "tok_embeddings" if config.tie_embeddings else "output"
    return [
        *steps,
        Step(
            "norm", "rmsnorm", "forward", f"{total}y = h · norm / sqrt(mean(h²) + eps)", reads, (stream, "norm"),
            ("norm",),
        ),
        Step(
            "logits", "linear", "forward", f"logits = {_factor(config.output_multiplier)}y · outputᵀ", ("norm",),
            ("logits",), (head,),
        ),
    ]  # fmt: skip


def _factor(value: float) -> str:
    return "" if value == 1 else f"{value:.5g} · "


def _handed_on(config: ModelConfig, i: int) -> tuple[tuple[str, str], str]:
    """The two arrays that block i hands on, and how the next norm adds them."""
    written = "ffn_post_norm" if config.post_norms else "experts.out"
    return (f"layers.{i}.{written}", f"layers.{i}.attention_residual"), f"h = residual + {written};  "


def _block(config: ModelConfig, i: int, stream: str, first: bool) -> list[Step]:
    """The calls of one block; its first norm makes the sum that ended the block before it."""
    at = f"layers.{i}."
    ffn = at + ("feed_forward." if config.dense else "feed_forward.experts.")
    reads, total = ((stream,), "") if first else _handed_on(config, i - 1)

    def step(
        name: str, room: str, equation: str, reads: tuple[str, ...], writes: tuple[str, ...],
        weights: tuple[str, ...] = (),
    ) -> Step:  # fmt: skip
        return Step(at + name, room, "forward", equation, reads, writes, weights, i)

    def here(*names: str) -> tuple[str, ...]:
        return tuple(at + name for name in names)

    def post_norm(name: str, read: str) -> list[Step]:
        equation = f"y = {read} · {name} / sqrt(mean({read}²) + eps)"
        return [step(name, "rmsnorm", equation, here(read), here(name), here(name))] if config.post_norms else []

    attended = "attention_post_norm" if config.post_norms else "attention.out"
    found = [
        step(
            "attention_norm", "rmsnorm", f"{total}y = h · attention_norm / sqrt(mean(h²) + eps)", reads,
            (*(() if first else (stream,)), at + "attention_norm"), here("attention_norm"),
        ),
        step(
            "attention.qkv", "linear", "q = y · wqᵀ,  k = y · wkᵀ,  v = y · wvᵀ", here("attention_norm"),
            here("attention.q", "attention.k", "attention.v"), here("attention.wq", "attention.wk", "attention.wv"),
        ),
        step(
            "attention.q_rotated", "rope", "turn each pair (q[i], q[i + C/2]) by the angle of its position",
            here("attention.q"), here("attention.q_rotated"),
        ),
        step(
            "attention.k_rotated", "rope", "turn each pair (k[i], k[i + C/2]) by the angle of its position",
            here("attention.k"), here("attention.k_rotated"),
        ),
        step(
            "attention", "attention",
            f"{_scores(config)};  probs = softmax over the visible keys;  context = probs · v",
            here("attention.q_rotated", "attention.k_rotated", "attention.v"),
            here("attention.scores", "attention.probs", "attention.context"),
        ),
        step(
            "attention.out", "linear", "out = context · woᵀ", here("attention.context"), here("attention.out"),
            here("attention.wo"),
        ),
        *post_norm("attention_post_norm", "attention.out"),
        step(
            "ffn_norm", "rmsnorm", f"h = residual + {attended};  y = h · ffn_norm / sqrt(mean(h²) + eps)",
            (at + attended, stream), here("attention_residual", "ffn_norm"), here("ffn_norm"),
        ),
    ]  # fmt: skip
    if not config.dense:
        found.append(
            step(
                "gating", "gating",
                "logits = y · gateᵀ;  ids = the top k;  weights = "
                + ("softmax(logits[ids])" if config.renormalise else "softmax(logits)[ids]"),
                here("ffn_norm"), here("gating.logits", "gating.ids", "gating.weights"), here("feed_forward.gate"),
            )
        )  # fmt: skip
    routed = () if config.dense else here("gating.ids", "gating.weights")
    return [
        *found,
        step(
            "experts", "experts",
            f"hidden = {config.activation}(w1 · y) ⊙ (w3 · y);  slot = w2 · hidden;  "
            "out = Σ over slots of weight · slot",
            (at + "ffn_norm", *routed), here("experts.hidden", "experts.slots", "experts.out"),
            (ffn + "w1", ffn + "w2", ffn + "w3"),
        ),
        *post_norm("ffn_post_norm", "experts.out"),
    ]  # fmt: skip


def _scores(config: ModelConfig) -> str:
    scale = "/ sqrt(C)" if config.attention_scale is None else f"· {config.attention_scale:.5g}"
    if config.attention_cap is None:
        return f"scores = q · kᵀ {scale}"
    return f"scores = {config.attention_cap:g} · tanh(q · kᵀ {scale} / {config.attention_cap:g})"


def names(config: ModelConfig) -> list[str]:
    """Return the names of all intermediates, in execution order."""
    return [name for step in schedule(config) for name in step.writes]


def letters(name: str) -> str:
    """Return the shape of an intermediate in letters, `N H C`; what is joined in one axis is written together, `HC`.

    Examples
    --------
    >>> letters("layers.3.attention.q_rotated"), letters("logits")
    ('N H C', 'B T V')
    """
    if name.startswith("layers."):
        return _LETTERS[name.split(".", 2)[2]]
    return _OUTER[name]


def sizes(config: ModelConfig, B: int, T: int) -> dict[str, int]:
    """Return what each letter stands for in a forward pass of B sequences of T tokens without cache."""
    return {
        "B": B, "T": T, "S": T, "N": B * T, "D": config.hidden_size, "H": config.num_heads, "K": config.num_kv_heads,
        "C": config.head_dim, "HC": config.num_heads * config.head_dim, "KC": config.num_kv_heads * config.head_dim,
        "F": config.intermediate_size, "E": config.num_experts, "k": config.num_experts_per_token,
        "V": config.vocab_size,
    }  # fmt: skip


def shape(config: ModelConfig, name: str, B: int, T: int) -> tuple[int, ...]:
    """Return the shape of an intermediate."""
    meaning = sizes(config, B, T)
    return tuple(meaning[letter] for letter in letters(name).split())


@dataclass(frozen=True)
class Cost:
    """Floating-point operations, and the bytes that must be read and written at least once."""

    flops: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def cost(
    config: ModelConfig,
    step: Step,
    B: int,
    T: int,
    *,
    visible: int,
    experts: int,
    stored: int = 4,
    computed: int = 4,
    int8: bool = False,
) -> Cost:
    """Count the work of one call.

    A multiply-add is two operations; exp, tanh, division and square root are one each. Bytes count every intermediate
    that the call needs or hands on, and every weight once: what a perfect cache would move.

    Parameters
    ----------
    B, T : sequences, and tokens of each
    visible : pairs of a query and a key it sees, over all sequences (B · T · (T + 1) / 2 if causal and unpadded)
    experts : experts that were chosen at all, in this layer
    stored, computed : bytes of a weight and of a computed number
    int8 : whether the matrices of linear maps and experts are stored in int8, with a float32 for each row
    """

    def matrix(rows: int, columns: int) -> int:
        return rows * (columns + 4) if int8 else rows * columns * stored

    z = sizes(config, B, T)
    N, D, H, C, F, k = z["N"], z["D"], z["H"], z["C"], z["F"], z["k"]
    inner = {"attention.scores", "attention.probs", "experts.hidden", "experts.slots"}  # never leave the op
    handed = [name for name in (*step.reads, *step.writes) if not name.endswith(tuple(inner))]
    moved = sum(8 * N if name == "tokens" else _bytes(config, name, B, T, computed) for name in handed)
    if step.room == "embedding":
        multiplied = N * D if config.embedding_multiplier != 1 else 0
        return Cost(multiplied, moved + N * D * stored)  # one row of the table per token
    if step.room == "rmsnorm":
        return Cost((3 + len(step.reads)) * N * D + 3 * N, moved + D * stored)
    if step.room == "linear":
        heads, keys = z["HC"], z["KC"]
        wide, tall = {"qkv": (D, heads + 2 * keys), "out": (heads, D), "logits": (D, z["V"])}[
            step.name.rpartition(".")[2]
        ]
        tied = step.name == "logits" and config.tie_embeddings
        multiplied = N * tall if step.name == "logits" and config.output_multiplier != 1 else 0
        return Cost(2 * N * wide * tall + multiplied, moved + (wide * tall * stored if tied else matrix(tall, wide)))
    if step.room == "rope":
        heads = z["HC"] if step.name.endswith("q_rotated") else z["KC"]
        return Cost(0, 0) if step.function == "table" else Cost(3 * N * heads, moved + N * C * computed)
    if step.room == "attention":
        capping = 0 if config.attention_cap is None else 3  # a division, tanh, a product
        return Cost(visible * H * (4 * C + 4 + capping), moved)
    if step.room == "gating":
        softmax = 3 * k if config.renormalise else 2 * z["E"] + k
        return Cost(N * (2 * D * z["E"] + softmax), moved + z["E"] * D * stored)
    act = 5 if config.activation == "silu" else 10  # its product with w3 · y included
    return Cost(N * k * (6 * D * F + act * F + 2 * D), moved + experts * (2 * matrix(F, D) + matrix(D, F)))


def _bytes(config: ModelConfig, name: str, B: int, T: int, computed: int) -> int:
    return prod(shape(config, name, B, T)) * (8 if name.endswith("gating.ids") else computed)
