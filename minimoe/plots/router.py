"""How sure routers are: the distribution of margins and of entropies in every layer, against shuffled logits."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes

from minimoe.plots.page import FAINT, INK, MARGIN, Head, Page, checked_routing, styled
from minimoe.routing_statistics import router_entropy, shuffled_logits
from minimoe.shapes import Array, Routing

_LABEL, _WIDE, _GAP = 0.75, 4.1, 0.5
_FILL, _LINE = "#9ec5e0", "#12436d"


@styled
def router_distributions(
    routing: Routing | None, *, bins: int = 48, seed: int = 0, title: str = "How sure the routers are"
) -> Page:
    """Draw histograms of the routers' margins and entropies, a row per layer.

    The margin is the distance in logits between the last expert chosen and the best one that was not: below it,
    rounding or another dtype can change the choice. The entropy is that of the softmax over all experts.

    Parameters
    ----------
    routing : with logits, as `model.trace(text).routing`; None is refused: a dense model
    bins : of each histogram
    seed : of the shuffled logits, see `routing_statistics.shuffled_logits`
    title : above all
    """
    routing = checked_routing(routing, logits=True)
    logits, k = np.asarray(routing.logits), routing.ids.shape[-1]
    L, _, E = logits.shape
    routed = np.asarray(routing.ids)[..., 0] >= 0
    if not np.isfinite(logits[routed]).all():
        raise ValueError("the router's logits hold NaN or Inf: margins and entropies mean nothing")
    if k == E:
        raise ValueError(f"every token uses all {E} experts: there is no margin")
    kept = [logits[i][routed[i]] for i in range(L)]
    dealt = [shuffled_logits(one[None], seed=seed)[0] for one in kept]
    seen = {"margin": [_margins(one, k) for one in kept], "entropy": [router_entropy(one) for one in kept]}
    chance = {"margin": [_margins(one, k) for one in dealt], "entropy": [router_entropy(one) for one in dealt]}
    width = _LABEL + 2 * _WIDE + _GAP
    row = min(0.55, 9.0 / L)
    head = Head(
        title, "Tokens per layer, every row to its own height. Thin line: the same logits with each expert's dealt out "
        "anew among the tokens. Tick: the median.", width,
    )  # fmt: skip
    page = Page(width + 2 * MARGIN, 2 * MARGIN + head.height + 0.35 + row * L + 0.45)
    top = head.draw(page)
    ends = {"margin": _margin_end([*seen["margin"], *chance["margin"]]), "entropy": float(np.log2(E))}
    names = {
        "margin": ("Margin", f"logits, {_ordinal(k)} choice above the next"),
        "entropy": ("Entropy", f"bits; all {E} experts alike: {np.log2(E):.3g}"),
    }
    for j, kind in enumerate(names):
        left = MARGIN + _LABEL + j * (_WIDE + _GAP)
        page.write(left, top - 0.02, names[kind][0], 10, weight="bold")
        page.write(left + 0.75, top, names[kind][1], 8.5, color=FAINT)
        axes = page.chart(left, top + 0.3, _WIDE, row * L, grid="x")
        _draw_ridges(axes, seen[kind], chance[kind], np.linspace(0, ends[kind], bins + 1), kind)
        axes.set_yticks(range(L), [f"layer {i}" if j == 0 else "" for i in range(L)])
        axes.yaxis.set_tick_params(labelsize=min(8, 72 * row * 0.9), labelcolor=FAINT)
    return page


def _margins(logits: Float[Array, "N E"], k: int) -> Float[Array, " N"]:
    ordered = -np.sort(-logits.astype(np.float64), axis=-1)
    margins: Array = ordered[:, k - 1] - ordered[:, k]
    return margins


def _margin_end(margins: list[Float[Array, " N"]]) -> float:
    """Where the axis ends: nearly all margins are below; the few above are counted in the last bin."""
    every = np.concatenate(margins)
    return float(np.quantile(every, 0.995)) or 1.0


def _ordinal(k: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(k, f"{k}th")


def _draw_ridges(axes: Axes, seen: list[Array], chance: list[Array], edges: Float[Array, " bins+1"], kind: str) -> None:
    """Draw one histogram per layer, upwards from its own base line; values beyond the last edge are in the last bin."""
    for i, (values, dealt) in enumerate(zip(seen, chance, strict=True)):
        if not values.size:
            continue
        counts, null = (np.histogram(np.clip(x, edges[0], edges[-1]), edges)[0] for x in (values, dealt))
        scale = 0.88 / max(counts.max(), null.max())
        axes.stairs(i + 0.5 - counts * scale, edges, baseline=i + 0.5, fill=True, color=_FILL, gid=f"{kind}-{i}")
        axes.stairs(i + 0.5 - null * scale, edges, baseline=None, color=INK, linewidth=0.7, gid=f"{kind}-null-{i}")
        middle = float(np.median(np.clip(values, edges[0], edges[-1])))
        axes.plot([middle] * 2, [i + 0.5, i + 0.12], color=_LINE, linewidth=2, solid_capstyle="butt",
                  gid=f"{kind}-median-{i}")  # fmt: skip
    axes.set_ylim(len(seen) - 0.45, -0.5)
    axes.set_xlim(edges[0], edges[-1])
    axes.spines["left"].set_visible(False)
