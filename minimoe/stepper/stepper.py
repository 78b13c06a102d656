"""The stepper: a traced forward pass to walk through."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np

from minimoe import schedule
from minimoe.arrays import to_host
from minimoe.display import text_pieces
from minimoe.model import Model
from minimoe.params import leaves
from minimoe.schedule import Step
from minimoe.stepper.arrays import array_html
from minimoe.stepper.code import DIALECTS, sources
from minimoe.stepper.network import network_svg

_MOST_STATIC = 12  # steps of a static page that are shown in full


class Stepper(Sequence[Step]):
    """One forward pass, step by step.

    Parameters
    ----------
    model : Model
    text_or_ids : a text, or token ids (T,); short ones are read best
    only : names to keep, as in `Model.trace`; the steps show what there is

    Attributes
    ----------
    trace : Trace
    """

    def __init__(self, model: Model, text_or_ids: str | Any, *, only: Any = "*") -> None:
        self.trace = model.trace(text_or_ids, only=only)
        self._steps = self.trace.steps
        self._weights = dict(leaves(model.params))
        tokens = self.trace.tokens.reshape(-1)
        self._pieces = None if model.tokenizer is None else text_pieces(model.tokenizer, tokens)

    def __getitem__(self, index: Any) -> Any:
        return self._steps[index]

    def __len__(self) -> int:
        return len(self._steps)

    def __repr__(self) -> str:
        return f"Stepper of {len(self)} steps over tokens {self.trace.tokens.shape}"

    def html(self, index: int) -> str:
        """Return one step as HTML without scripts: place, equation, cost, arrays and code."""
        step = self._steps[index]
        cost = self.trace.cost(step)
        return (
            '<div style="font-size:14px;line-height:1.45">'
            f"{network_svg(self.trace.config, step)}"
            f'<h3 style="margin:.4em 0">{index + 1} of {len(self)}: <code>{html.escape(step.name)}</code></h3>'
            f'<div style="font-size:16px;margin:.3em 0 .6em"><code>{html.escape(step.equation)}</code></div>'
            f'<div style="opacity:.65;margin-bottom:.6em">{cost.flops:,} floating-point operations, at least '
            f"{cost.bytes:,} bytes moved</div>{self._tokens(step)}{self._arrays(step)}{_code(step)}</div>"
        )

    def static(self, steps: Sequence[int] | None = None) -> str:
        """Return steps as one HTML page without scripts, each folded: the first layer and the ends unless chosen."""
        if steps is None:
            steps = [i for i, step in enumerate(self._steps) if step.layer in (None, 0)][:_MOST_STATIC]
        folded = [
            f"<details{' open' if n == 0 else ''}><summary><b>{i + 1}</b> {html.escape(self._steps[i].name)}"
            f" &nbsp; <code>{html.escape(self._steps[i].equation)}</code></summary>{self.html(i)}</details>"
            for n, i in enumerate(steps)
        ]
        left = len(self) - len(steps)
        more = f"<p>{left} further steps: <code>Stepper.html(i)</code> shows any of them.</p>" if left else ""
        return "".join(folded) + more

    def widget(self) -> Any:
        """Return the stepper with Back, Next and a slider; needs ipywidgets."""
        import ipywidgets as widgets  # an extra: minimoe[notebooks]

        last = len(self) - 1
        slider = widgets.IntSlider(0, 0, last, description="step", continuous_update=False, readout_format="d")
        back, forth = widgets.Button(description="◀ Back"), widgets.Button(description="Next ▶")
        page = widgets.HTML()

        def show(change: Any = None) -> None:
            page.value = self.html(slider.value)
            back.disabled, forth.disabled = slider.value == 0, slider.value == last

        def move(by: int) -> Any:
            def moved(_: Any) -> None:
                slider.value = min(max(slider.value + by, 0), last)

            return moved

        slider.observe(show, "value")
        back.on_click(move(-1))
        forth.on_click(move(1))
        show()
        return widgets.VBox([widgets.HBox([back, forth, slider]), page])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """Offer both forms: a notebook page takes the widget where it can, and the static one elsewhere."""
        bundle: dict[str, Any] = {"text/plain": repr(self), "text/html": self.static()}
        try:
            shown = self.widget()._repr_mimebundle_()
        except ImportError:
            return bundle
        return bundle | {kind: data for kind, data in shown.items() if kind.startswith("application/")}

    def _tokens(self, step: Step) -> str:
        """The tokens of the rows, where the model has a tokenizer."""
        if self._pieces is None or "tokens" not in step.reads:
            return ""
        shown = " ".join(f"<code>{html.escape(repr(piece)[1:-1]) or '∅'}</code>" for piece in self._pieces)
        return f'<div style="margin-bottom:.6em">tokens: {shown}</div>'

    def _arrays(self, step: Step) -> str:
        groups = {
            "reads": [
                (name, self.trace.arrays.get(name), schedule.letters(name)) for name in step.reads if name != "tokens"
            ],
            "weights": [(name, self._weight(name), _weight_letters(name)) for name in step.weights],
            "writes": [(name, self.trace.arrays.get(name), schedule.letters(name)) for name in step.writes],
        }
        shown = []
        for group, members in groups.items():
            maps = "".join(array_html(name, x, letters, self._pieces) for name, x, letters in members if x is not None)
            if maps:
                shown.append(f'<div style="margin-top:.3em"><b>{group}</b></div><div>{maps}</div>')
        return "".join(shown)

    def _weight(self, name: str) -> Any:
        weight = self._weights[name]
        return np.stack([to_host(w) for w in weight]) if isinstance(weight, list) else to_host(weight)


def _weight_letters(name: str) -> str:
    last = name.rpartition(".")[2]
    plain = {
        "tok_embeddings": "V D", "output": "V D", "norm": "D", "attention_norm": "D", "ffn_norm": "D", "gate": "E D",
        "wq": "HC D", "wk": "KC D", "wv": "KC D", "wo": "D HC", "w1": "F D", "w2": "D F", "w3": "F D",
    }[last]  # fmt: skip
    return f"E {plain}" if ".experts." in name else plain


def _code(step: Step) -> str:
    """The op in its dialects, side by side."""
    columns = [
        f'<div style="flex:1 1 0;min-width:22em;overflow:auto;max-height:26em"><b>{DIALECTS[name]}</b>'
        f'<pre style="font-size:12px;line-height:1.35">{html.escape(text)}</pre></div>'
        for name, text in sources(step.room, step.function).items()
    ]
    title = f"code of <code>{step.room}.{step.function}</code> in {len(columns)} dialects"
    side_by_side = f'<div style="display:flex;gap:1em;flex-wrap:wrap">{"".join(columns)}</div>'
    return f"<details><summary>{title}</summary>{side_by_side}</details>"
