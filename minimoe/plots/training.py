"""How evenly experts are used while a model trains: the balance loss, the least used expert, every expert's share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from matplotlib.patches import Rectangle

from minimoe.colours import expert_colour
from minimoe.plots.page import EDGE, FAINT, INK, MARGIN, Head, Page, checked_layers, styled
from minimoe.plots.tokens import middle_layers
from minimoe.shapes import Array

# Series, which are no experts: told apart by lightness as well as by hue.
SERIES = ("#12436d", "#b5541c", "#4f9e8f", "#8a6fb3", "#8c8c8c", "#d9a441")
_WIDE, _TALL, _GAP = 7.6, 1.55, 0.62
_PANELS = {
    "balance": ("Balance loss", "dashed: all experts used alike"),
    "least_share": ("Least used expert", "its share of a layer's assignments, times E; dashed: all used alike"),
    "loss": ("Cross-entropy", "nats per token"),
}


@styled
def balance_over_training(
    runs: Mapping[str, Mapping[str, Float[Array, " S"]]],
    *,
    even: float = 2.0,
    title: str = "Balance of the experts during training",
) -> Page:
    """Draw the balance of one or more runs over their steps.

    Parameters
    ----------
    runs : name -> {"step": (S,), "balance": (S,), "least_share": (S,), "loss": (S,)}, as the lines of a run's
        `log.jsonl` hold them; `loss` and either of the two others may be missing, the same in every run
    even : what the balance loss reads when all experts are used alike: k, or 1 in Switch's form
    title : above all
    """
    kinds = _checked_runs(runs)
    dense = any(len(values["step"]) >= 100 for values in runs.values())
    smoothed = "Pale: every step that was logged; dark: the mean over the neighbouring fiftieth of the run."
    head = Head(title, smoothed if dense else "Straight lines join the steps that were measured.", _WIDE)
    page = Page(
        _WIDE + 2 * MARGIN, 2 * MARGIN + head.height + 0.3 * (len(runs) > 1) + len(kinds) * (_TALL + _GAP) + 0.1
    )
    top = head.draw(page)
    if len(runs) > 1:
        _draw_legend(page, top - 0.05, list(runs))
        top += 0.3
    for kind in kinds:
        name, told = _PANELS[kind]
        page.write(MARGIN, top, name, 10, weight="bold")
        page.write(MARGIN + 0.093 * len(name) + 0.15, top + 0.015, told, 8.5, color=FAINT)
        axes = page.chart(MARGIN + 0.35, top + 0.27, _WIDE - 0.35, _TALL)
        for i, (run, values) in enumerate(runs.items()):
            step, y, colour = np.asarray(values["step"]), np.asarray(values[kind], np.float64), SERIES[i % len(SERIES)]
            axes.plot(step, y, color=colour, alpha=0.28, linewidth=0.8, gid=f"{kind}-{run}")
            axes.plot(step, _smoothed(y), color=colour, linewidth=1.6, gid=f"{kind}-{run}-mean")
        if kind != "loss":
            axes.axhline(even if kind == "balance" else 1.0, color=INK, linewidth=0.9, linestyle=(0, (4, 2)))
        axes.set_ylim(bottom=None if kind == "balance" else 0)
        axes.margins(x=0.01)
        top += _TALL + _GAP
    page.write(MARGIN + _WIDE, top - 0.17, "training steps", 8.5, color=FAINT, ha="right")
    return page


def _checked_runs(runs: Mapping[str, Mapping[str, Array]]) -> list[str]:
    """Return the panels there is something for."""
    kinds = [kind for kind in _PANELS if runs and all(kind in values for values in runs.values())]
    if not kinds:
        raise ValueError(f"every run must give 'step' and some of {', '.join(_PANELS)}: there is nothing to draw")
    for name, values in runs.items():
        sizes = {kind: np.shape(values.get(kind, ())) for kind in ("step", *kinds)}
        if len(set(sizes.values())) > 1 or len(sizes["step"]) != 1 or not sizes["step"][0]:
            raise ValueError(f"run {name!r}: all values must be arrays of one length, not {sizes}")
    return kinds


def _smoothed(y: Float[Array, " S"]) -> Float[Array, " S"]:
    """Centred running mean over a fiftieth of the run; NaN is left out."""
    half = len(y) // 100
    sums = np.concatenate([[0.0], np.cumsum(np.nan_to_num(y))])
    counts = np.concatenate([[0], np.cumsum(~np.isnan(y))])
    low, high = np.maximum(np.arange(len(y)) - half, 0), np.minimum(np.arange(len(y)) + half + 1, len(y))
    number = counts[high] - counts[low]
    return np.divide(sums[high] - sums[low], number, out=np.full(len(y), np.nan), where=number > 0)


def _draw_legend(page: Page, top: float, names: Sequence[str]) -> None:
    x = MARGIN
    for i, name in enumerate(names):
        axes = page.box(x, top + 0.055, 0.25, 0.04, frame=False)
        axes.add_patch(Rectangle((0, 0), 1, 1, color=SERIES[i % len(SERIES)]))
        page.write(x + 0.32, top, name, 8.5)
        x += 0.55 + 0.078 * len(name)


@styled
def shares_over_training(
    steps: Int[Array, " S"],
    shares: Float[Array, "S L E"],
    *,
    layers: Sequence[int] | None = None,
    title: str = "What each expert gets during training",
) -> Page:
    """Draw the experts' shares of the assignments over the steps, stacked, a panel per layer.

    Parameters
    ----------
    steps : (S,)
    shares : (S, L, E) rows sum to 1; `routing_statistics.shares` of a text, or of the batch, at every step
    layers : which to show; None shows the first, the middle and the last
    title : above all
    """
    steps, shares = np.asarray(steps), np.asarray(shares, np.float64)
    if shares.ndim != 3 or steps.shape != shares.shape[:1] or len(steps) < 2:
        raise ValueError(f"shares must be (S, L, E) with at least 2 steps (S,), not {shares.shape} with {steps.shape}")
    _, L, E = shares.shape
    layers = checked_layers(layers, L, middle_layers(L))
    head = Head(title, f"Percent of a layer's assignments, expert 0 below. All alike: {100 / E:.3g} each.", _WIDE)
    page = Page(_WIDE + 2 * MARGIN, 2 * MARGIN + head.height + 0.35 + len(layers) * (_TALL + _GAP) + 0.15)
    top = head.draw(page)
    page.chips(MARGIN + _WIDE, top - 0.02, range(E), room=_WIDE)
    top += 0.35
    for layer in layers:
        page.write(MARGIN, top, f"layer {layer}", 10, weight="bold")
        axes = page.chart(MARGIN + 0.35, top + 0.27, _WIDE - 0.35, _TALL, grid="")
        edges = np.concatenate([np.zeros((len(steps), 1)), np.cumsum(100 * shares[:, layer], axis=1)], axis=1)
        for e in range(E):
            axes.fill_between(steps, edges[:, e], edges[:, e + 1], facecolor=expert_colour(e), edgecolor=EDGE,
                              linewidth=0.3, gid=f"area-{layer}-{e}")  # fmt: skip
        axes.set_ylim(0, 100)
        axes.set_xlim(float(steps[0]), float(steps[-1]))
        top += _TALL + _GAP
    page.write(MARGIN + _WIDE, top - 0.17, "training steps", 8.5, color=FAINT, ha="right")
    return page
