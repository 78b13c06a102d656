"""Where our tensors are found in Hugging Face transformers and in mistral-inference.

Two tables: parameters, under the names of their files, and intermediates, under the module whose output or input they
are, so that a hook can fetch them. `N` is the layer, `M` the expert. README.md of the vectors shows both tables.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from minimoe import schedule
from minimoe.checkpoint.formats import hf_name
from minimoe.checkpoint.layouts import GROK


@dataclass(frozen=True)
class Parameter:
    """A weight.

    Attributes
    ----------
    ours, letters : its name here (and in `grads.*`, `updated.*`), its shape
    memory : where transformers 5 keeps it once a Mixtral is loaded; None as on disk
    only : "mixtral" or "grok" where one alone has it: neither Mixtral nor Mistral norms twice, no Grok-1 is dense
    """

    ours: str
    letters: str
    memory: str | None = None
    only: str = ""

    @property
    def hugging_face(self) -> str:
        """Its name in model.safetensors of Mixtral or Mistral."""
        return "" if self.only == "grok" else _unnumbered(hf_name(_numbered(self.ours)))

    @property
    def grok(self) -> str:
        """Its name in the files of Grok-1's port to Hugging Face."""
        return "" if self.only == "mixtral" else _unnumbered(GROK.name_of(_numbered(self.ours)))

    @property
    def mistral(self) -> str:
        """Its name in Mistral's consolidated.safetensors."""
        return "" if self.only == "grok" else self.ours + ".weight"


@dataclass(frozen=True)
class Intermediate:
    """A computed array.

    Attributes
    ----------
    ours : its name in a trace and in the `model` cases; in `block` cases without `layers.N.`
    hugging_face, mistral : where theirs is; "output of", "input of" a module where a hook finds it
    """

    ours: str
    hugging_face: str
    mistral: str

    @property
    def letters(self) -> str:
        """Its shape."""
        return letters(self.ours)


def _numbered(name: str) -> str:
    return name.replace(".N.", ".0.").replace(".M.", ".1.")


def _unnumbered(name: str) -> str:
    return name.replace("layers.0.", "layers.N.").replace("experts.1.", "experts.M.")


PARAMETERS = (
    Parameter("tok_embeddings", "V D"),
    Parameter("layers.N.attention_norm", "D"),
    Parameter("layers.N.attention.wq", "H·C D"),
    Parameter("layers.N.attention.wk", "K·C D"),
    Parameter("layers.N.attention.wv", "K·C D"),
    Parameter("layers.N.attention.wo", "D H·C"),
    Parameter("layers.N.attention_post_norm", "D", only="grok"),
    Parameter("layers.N.ffn_norm", "D"),
    Parameter("layers.N.feed_forward.gate", "E D", "model.layers.N.mlp.gate.weight"),
    Parameter("layers.N.feed_forward.experts.M.w1", "F D", "model.layers.N.mlp.experts.gate_up_proj[M, :F]"),
    Parameter("layers.N.feed_forward.experts.M.w2", "D F", "model.layers.N.mlp.experts.down_proj[M]"),
    Parameter("layers.N.feed_forward.experts.M.w3", "F D", "model.layers.N.mlp.experts.gate_up_proj[M, F:]"),
    Parameter("layers.N.feed_forward.w1", "F D", only="mixtral"),
    Parameter("layers.N.feed_forward.w2", "D F", only="mixtral"),
    Parameter("layers.N.feed_forward.w3", "F D", only="mixtral"),
    Parameter("layers.N.ffn_post_norm", "D", only="grok"),
    Parameter("norm", "D"),
    Parameter("output", "V D"),
)
_LAYER, _ATTENTION, _MLP = "model.layers.N", "model.layers.N.self_attn", "model.layers.N.mlp"
_FFN = "layers.N.feed_forward"
_NONE = "none: Grok-1 has it"
INTERMEDIATES = (
    Intermediate("tok_embeddings", "output of `model.embed_tokens`", "output of `tok_embeddings`"),
    Intermediate(
        "layers.N.attention_norm", f"output of `{_LAYER}.input_layernorm`", "output of `layers.N.attention_norm`"
    ),
    Intermediate(
        "layers.N.attention.q", f"output of `{_ATTENTION}.q_proj`", "output of `layers.N.attention.wq` ¹"
    ),
    Intermediate(
        "layers.N.attention.k", f"output of `{_ATTENTION}.k_proj`", "output of `layers.N.attention.wk` ¹"
    ),
    Intermediate(
        "layers.N.attention.v", f"output of `{_ATTENTION}.v_proj`", "output of `layers.N.attention.wv`"
    ),
    Intermediate(
        "layers.N.attention.q_rotated", "first result of `apply_rotary_pos_emb`, as (B, H, T, C)",
        "first result of `apply_rotary_emb` ¹",
    ),
    Intermediate(
        "layers.N.attention.k_rotated", "second result of `apply_rotary_pos_emb`, as (B, K, T, C)",
        "second result of `apply_rotary_emb` ¹",
    ),
    Intermediate(
        "layers.N.attention.scores", "`attn_weights` in `eager_attention_forward`, before the softmax",
        "inside `memory_efficient_attention`: not to be seen",
    ),
    Intermediate(
        "layers.N.attention.probs", f"output[1] of `{_ATTENTION}` (eager attention only)",
        "inside `memory_efficient_attention`: not to be seen",
    ),
    Intermediate(
        "layers.N.attention.context", f"input of `{_ATTENTION}.o_proj`", "input of `layers.N.attention.wo`"
    ),
    Intermediate(
        "layers.N.attention.out", f"output of `{_ATTENTION}.o_proj`", "output of `layers.N.attention.wo`"
    ),
    Intermediate("layers.N.attention_post_norm", _NONE, _NONE),
    Intermediate(
        "layers.N.attention_residual", f"input of `{_LAYER}.post_attention_layernorm`",
        "input of `layers.N.ffn_norm`",
    ),
    Intermediate(
        "layers.N.ffn_norm", f"output of `{_LAYER}.post_attention_layernorm`", "output of `layers.N.ffn_norm`"
    ),
    Intermediate("layers.N.gating.logits", f"output[0] of `{_MLP}.gate`", f"output of `{_FFN}.gate`"),
    Intermediate(
        "layers.N.gating.ids", f"output[2] of `{_MLP}.gate`", "`selected_experts` in `MoeLayer.forward`"
    ),
    Intermediate("layers.N.gating.weights", f"output[1] of `{_MLP}.gate`", "`weights` in `MoeLayer.forward`"),
    Intermediate(
        "layers.N.experts.hidden", "`current_hidden_states` in `MixtralExperts.forward`, before `down_proj`",
        f"input of `{_FFN}.experts.M.w2`, the rows of its tokens",
    ),
    Intermediate(
        "layers.N.experts.slots", "`current_hidden_states` after `down_proj`, before the gate weight",
        f"output of `{_FFN}.experts.M`, the rows of its tokens",
    ),
    Intermediate(
        "layers.N.experts.out", f"output of `{_MLP}`",
        f"result of `{_FFN}.forward`, called past its hooks: output of `layers.N` − input of `layers.N.ffn_norm`",
    ),
    Intermediate("layers.N.ffn_post_norm", _NONE, _NONE),
    Intermediate("layers.N.out", f"output of `{_LAYER}`", "output of `layers.N`"),
    Intermediate("norm", "output of `model.norm`", "output of `norm`"),
    Intermediate("logits", "output of `lm_head`", "output of `output`"),
)  # fmt: skip
NOTES = """¹ Mistral's files hold `wq` and `wk` with interleaved rotary pairs (2i, 2i+1); ours, and Hugging Face's, with
halves (i, i+C/2). Within each head, `x.reshape(H, C/2, 2).swapaxes(1, 2).reshape(H, C)` turns theirs into ours; scores
and everything after them are the same. Theirs are (B, T, …) where ours are (N, …), N = B·T: reshape."""


def letters(name: str) -> str:
    """Return the letters of an intermediate's shape.

    >>> letters("layers.3.experts.slots"), letters("gating.ids"), letters("logits")
    ('N k D', 'N k', 'B T V')
    """
    for known in (name, f"layers.0.{name}"):  # the names inside a `block` case have no prefix
        with contextlib.suppress(KeyError):
            return schedule.letters(known).replace("HC", "H·C").replace("KC", "K·C")
    raise KeyError(f"there is no intermediate {name!r}")


def tables() -> str:
    """Return both tables and their notes in Markdown."""
    return "\n\n".join((_parameters(), _intermediates(), NOTES))


def _parameters() -> str:
    head = ("parameter", "shape", "Hugging Face, on disk", "transformers 5, in memory", "Mistral", "Grok-1's port")
    rows = []
    for p in PARAMETERS:
        memory = _code(p.memory or "") if p.memory or p.only == "grok" else "as on disk"
        rows.append((_code(p.ours), p.letters, _code(p.hugging_face), memory, _code(p.mistral), _code(p.grok)))
    return markdown(head, rows)


def _intermediates() -> str:
    head = ("intermediate", "shape", "transformers", "mistral-inference")
    return markdown(head, [(_code(i.ours), i.letters, i.hugging_face, i.mistral) for i in INTERMEDIATES])


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def _code(name: str) -> str:
    return f"`{name}`" if name else "–"
