"""The layouts of weights: which tensor of each holds which parameters, and in which order of their values.

| layout  | experts of a layer                                        | other names    | RoPE        | config      |
| ------- | --------------------------------------------------------- | -------------- | ----------- | ----------- |
| hf      | one by one, `block_sparse_moe.experts.M.{w1,w2,w3}`       | Hugging Face's | half-split  | config.json |
| fused   | `mlp.experts.gate_up_proj` (E, 2F, D), w1 rows then w3's; | Hugging Face's | half-split  | config.json |
|         | `mlp.experts.down_proj` (E, D, F)                         |                |             |             |
| mistral | one by one, `feed_forward.experts.M.{w1,w2,w3}`           | Mistral's      | interleaved | params.json |
| stacked | `block_sparse_moe.{w1,w2,w3}` (E·F, D), w2 transposed     | Mistral's      | interleaved | params.json |
| gguf    | `ffn_{gate,down,up}_exps`, (E, F, D) and (E, D, F)        | llama.cpp's    | interleaved | in the file |

Grok-1's hf is another, called grok, with the names of its port: `moe_block.experts.M.{linear,linear_v,linear_1}` are
w1, w3 and w2, and norms are called `.scale`.

hf is what transformers saves, and v4 loads; fused what transformers v5 holds in memory; mistral the consolidated files;
stacked the first release of Mixtral-8x7B; gguf, with `ffn_{gate,down,up}.M` one by one in old files, is only read. A
dense model has no experts to join: hf = fused, mistral = stacked.

A new parameter needs no entry here where it is called as in `formats.hf_name`, or Mistral's way: our name + `.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from minimoe.checkpoint.errors import LayoutError, listed
from minimoe.checkpoint.formats import CONFIG, hf_name
from minimoe.config import ModelConfig
from minimoe.params import shapes
from minimoe.shapes import Array

PARAMS = "params.json"
_EXPERT = r"^layers\.(\d+)\.feed_forward\.experts\.(\d+)\."
_GATE = r"^layers\.(\d+)\.feed_forward\.gate$"
Names = tuple[tuple[str, str], ...]  # (pattern of our names, theirs): the first that matches the whole name


@dataclass(frozen=True)
class Form:
    """How the values of a matrix are ordered in a file.

    Attributes
    ----------
    transposed : columns for rows
    interleaved : C where rows 2i and 2i + 1 of each head make a pair for RoPE; 0 where rows i and i + C/2 do, as ours
    """

    transposed: bool = False
    interleaved: int = 0

    @property
    def plain(self) -> bool:
        """Whether the file's order is ours."""
        return not (self.transposed or self.interleaved)

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape in the file."""
        return ours[::-1] if self.transposed else ours

    def read(self, w: Array) -> Array:
        """Return a file's values in our order: the array itself where that is the file's, a copy otherwise."""
        if self.transposed:
            return w.T.copy()
        if self.interleaved:
            pairs = w.reshape(-1, self.interleaved // 2, 2, w.shape[-1])  # (H, C/2, 2, D)
            return pairs.swapaxes(1, 2).reshape(w.shape)
        return w

    def written(self, w: Array) -> Array:
        """Return our values in the file's order; undoes `read`."""
        if self.transposed:
            return w.T
        if self.interleaved:
            halves = w.reshape(-1, 2, self.interleaved // 2, w.shape[-1])  # (H, 2, C/2, D)
            return halves.swapaxes(1, 2).reshape(w.shape)
        return w


@dataclass(frozen=True)
class Stored:
    """One tensor of a layout.

    Attributes
    ----------
    name, shape
    parts : our parameters whose values lie in it, one after the other, all of one size
    form : the order of each one's values
    part_shape : the shape of each in the file
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    form: Form
    part_shape: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """A way to name and order the weights of a model in files.

    Attributes
    ----------
    name, title : for the command line, and for people
    names : what is called otherwise than by `base`
    base : {"hf", "mistral", ""}: how everything else is called
    by_expert : whether a tensor of all experts has an axis of experts in front
    transposed : pattern of our names that are transposed
    interleaved : whether RoPE pairs neighbouring rows of wq and wk
    marks : pattern of the names that no other layout has
    config, stem : the file of the config, and how the names of weight files begin
    """

    name: str
    title: str
    names: Names
    base: str = ""
    marks: str = r"(?!)"
    by_expert: bool = False
    transposed: str = r"(?!)"
    interleaved: bool = False
    config: str = CONFIG
    stem: str = "model"

    def name_of(self, ours: str) -> str:
        """Return what the tensor that holds our parameter is called.

        >>> LAYOUTS["stacked"].name_of("layers.3.feed_forward.experts.7.w2")
        'layers.3.block_sparse_moe.w2'
        """
        for pattern, theirs in self.names:
            if match := re.fullmatch(pattern, ours):
                return match.expand(theirs)
        return hf_name(ours) if self.base == "hf" else f"{ours}.weight"

    def tensors(self, config: ModelConfig) -> list[Stored]:
        """Return all tensors of a model, in the order of `params.named`: the w1 of all experts, then w2, then w3."""
        expected, parts = shapes(config), dict[str, list[str]]()
        for ours in expected:
            parts.setdefault(self.name_of(ours), []).append(ours)
        order = {leaf: i for i, leaf in enumerate(dict.fromkeys(map(_leaf, expected)))}
        return [
            self._stored(name, tuple(ours), expected[ours[0]], config)
            for name, ours in sorted(parts.items(), key=lambda item: order[_leaf(item[1][0])])
        ]

    def _stored(self, name: str, parts: tuple[str, ...], shape: tuple[int, ...], config: ModelConfig) -> Stored:
        rotated = self.interleaved and parts[0].endswith((".attention.wq", ".attention.wk"))
        form = Form(bool(re.search(self.transposed, parts[0])), config.head_dim if rotated else 0)
        part = form.shape(shape)
        rows, E = len(parts) * part[0], config.num_experts
        whole = (E, rows // E) if self.by_expert and ".experts." in parts[0] else (rows,)
        return Stored(name, whole + part[1:], parts, form, part)


_GGUF_NAMES: Names = (
    (r"tok_embeddings", "token_embd.weight"),
    (r"norm", "output_norm.weight"),
    (r"output", "output.weight"),
    (r"layers\.(\d+)\.attention_norm", r"blk.\1.attn_norm.weight"),
    (r"layers\.(\d+)\.attention\.w([qkv])", r"blk.\1.attn_\2.weight"),
    (r"layers\.(\d+)\.attention\.wo", r"blk.\1.attn_output.weight"),
    (r"layers\.(\d+)\.ffn_norm", r"blk.\1.ffn_norm.weight"),
    (_GATE, r"blk.\1.ffn_gate_inp.weight"),
    *((rf"layers\.(\d+)\.feed_forward\.w{i}", rf"blk.\1.ffn_{their}.weight") for i, their in
      ((1, "gate"), (2, "down"), (3, "up"))),
)  # fmt: skip


def _leaf(ours: str) -> str:
    return re.sub(r"\.experts\.\d+", "", ours)


def _gguf_experts(theirs: str) -> Names:
    return tuple((rf"{_EXPERT}w{i}", theirs.format(n)) for i, n in ((1, "gate"), (2, "down"), (3, "up")))


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("hf", "Hugging Face", (), "hf", r"^model\.layers\.\d+\.block_sparse_moe\."),
        Layout(
            "fused",
            "Hugging Face, experts fused",
            (
                (_EXPERT + "w[13]", r"model.layers.\1.mlp.experts.gate_up_proj"),
                (_EXPERT + "w2", r"model.layers.\1.mlp.experts.down_proj"),
                (_GATE, r"model.layers.\1.mlp.gate.weight"),
            ),
            "hf",
            r"^model\.layers\.\d+\.mlp\.(experts\.|gate\.weight$)",
            by_expert=True,
        ),
        Layout(
            "mistral", "Mistral", (), "mistral", r"^layers\.\d+\.feed_forward\.(experts\.|gate\.)", interleaved=True,
            config=PARAMS, stem="consolidated",
        ),
        Layout(
            "stacked",
            "Mixtral's first release, experts stacked",
            (
                (_EXPERT + "(w[123])", r"layers.\1.block_sparse_moe.\3"),
                (_GATE, r"layers.\1.block_sparse_moe.gate.weight"),
            ),
            "mistral",
            r"^layers\.\d+\.block_sparse_moe\.",
            transposed=r"\.experts\.\d+\.w2$",
            interleaved=True,
            config=PARAMS,
            stem="consolidated",
        ),
    )
}  # fmt: skip
GROK = Layout(
    "grok",
    "Grok-1, ported to Hugging Face",
    (
        (r"norm", "model.norm.scale"),
        *((rf"layers\.(\d+)\.{ours}", rf"model.layers.\1.{theirs}_norm.scale") for ours, theirs in (
            ("attention_norm", "pre_attn"), ("attention_post_norm", "post_attn"), ("ffn_norm", "pre_moe"),
            ("ffn_post_norm", "post_moe"))),
        (r"layers\.(\d+)\.attention\.w([qkvo])", r"model.layers.\1.attn.\2_proj.weight"),
        (_GATE, r"model.layers.\1.moe_block.gate.weight"),
        *((rf"{_EXPERT}{ours}", rf"model.layers.\1.moe_block.experts.\2.{theirs}.weight") for ours, theirs in (
            ("w1", "linear"), ("w2", "linear_1"), ("w3", "linear_v"))),
    ),
    "hf",
    r"^model\.layers\.\d+\.moe_block\.",
)  # fmt: skip
GGUF = Layout(
    "gguf",
    "GGUF (for files that you trust)",
    (*_gguf_experts(r"blk.\1.ffn_{}_exps.weight"), *_GGUF_NAMES),
    by_expert=True,
    interleaved=True,
)
GGUF_OLD = Layout(
    "gguf",
    "GGUF, experts one by one (for files that you trust)",
    (*_gguf_experts(r"blk.\1.ffn_{}.\2.weight"), *_GGUF_NAMES),
    interleaved=True,
)
# Names that say whose they are where no expert does.
_BASES = {
    "hf": re.compile(r"(model|lm_head)\..*"),
    "mistral": re.compile(
        r"(tok_embeddings|norm|output)\.weight|layers\.\d+\.(attention|attention_norm|feed_forward|ffn_norm)\..*"
    ),
}


def recognise(names: Iterable[str], where: str) -> Layout:
    """Return the layout whose names these are.

    Raises
    ------
    LayoutError
        If some are of one layout and some of another.
    """
    names = list(names)
    layouts = LAYOUTS | {GROK.name: GROK}
    marked = {key: [name for name in names if re.search(layout.marks, name)] for key, layout in layouts.items()}
    marked = {key: found for key, found in marked.items() if found}
    for base, pattern in _BASES.items():
        if (found := [name for name in names if pattern.fullmatch(name)]) and not any(
            layouts[key].base == base for key in marked
        ):
            marked[base] = found
    if len(marked) > 1:
        mixed = "; ".join(f"{key} ({len(found)}): {listed(found, 3)}" for key, found in marked.items())
        raise LayoutError(f"{where}: holds tensors of several layouts: {mixed}")
    return layouts[next(iter(marked), "hf")]
