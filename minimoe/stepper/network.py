"""Where in the network a step stands: a small map, as SVG."""

from __future__ import annotations

from html import escape

from minimoe.config import ModelConfig
from minimoe.schedule import Step, schedule

_BLOCK = (
    ("attention_norm", "norm"), ("attention.qkv", "q k v"), ("attention.q_rotated", "rotate q"),
    ("attention.k_rotated", "rotate k"), ("attention", "attend"), ("attention.out", "wo"),
    ("attention_post_norm", "norm"), ("ffn_norm", "norm"), ("gating", "gate"), ("experts", "experts"),
    ("ffn_post_norm", "norm"),
)  # fmt: skip
_HERE, _PLAIN, _TEXT = "#e69f00", "none", "currentColor"
_SCALE = 1.2  # a unit of the drawing in pixels, where the page is wide enough


def network_svg(config: ModelConfig, step: Step) -> str:
    """Draw the layers as a row, the steps of the present one as a second row, and mark where `step` stands."""
    ends = [("rope", "angles"), ("tok_embeddings", "embed")], [("norm", "norm"), ("logits", "logits")]
    outer = [*ends[0], *((f"layers.{i}", f"layer {i}") for i in range(config.num_layers)), *ends[1]]
    shown = _around(outer, step)
    boxes = [_box(x, 4, name, label, _is_here(name, step)) for x, (name, label) in enumerate(shown)]
    calls = {one.name for one in schedule(config)}
    block = [(name, label) for name, label in _BLOCK if f"layers.0.{name}" in calls]
    rows = 1
    if step.layer is not None:
        inner = [(f"layers.{step.layer}.{name}", label) for name, label in block]
        boxes += [_box(x, 36, name, label, name == step.name) for x, (name, label) in enumerate(inner)]
        rows = 2
    width = 78 * max(len(shown), len(block))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {rows * 32 + 4}" width="{_SCALE * width:.0f}" '
        f'style="display:block;max-width:100%" role="img" aria-label="step {escape(step.name)}">{"".join(boxes)}</svg>'
    )


def _around(outer: list[tuple[str, str]], step: Step, most: int = 11) -> list[tuple[str, str]]:
    """The part of a long row around the present step; dots stand for what is left out."""
    if len(outer) <= most:
        return outer
    here = next(i for i, (name, _) in enumerate(outer) if _is_here(name, step))
    first = min(max(here - most // 2, 0), len(outer) - most)
    part = outer[first : first + most]
    if first > 0:
        part[0] = ("", "…")
    if first + most < len(outer):
        part[-1] = ("", "…")
    return part


def _is_here(name: str, step: Step) -> bool:
    return name == (f"layers.{step.layer}" if step.layer is not None else step.name)


def _box(column: int, top: int, name: str, label: str, here: bool) -> str:
    fill, ink, weight = (_HERE, "#000", "bold") if here else (_PLAIN, _TEXT, "normal")
    frame = (
        ""
        if not name
        else f'<rect x="{column * 78 + 2}" y="{top}" width="72" height="24" rx="4" fill="{fill}" stroke="#888"/>'
    )
    return (
        f'{frame}<text x="{column * 78 + 38}" y="{top + 16}" text-anchor="middle" font-size="12" '
        f'font-weight="{weight}" font-family="sans-serif" fill="{ink}">{escape(label)}</text>'
    )
