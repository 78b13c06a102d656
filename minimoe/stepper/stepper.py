"""The stepper: a traced forward pass to walk through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minimoe import schedule
from minimoe.arrays import to_host
from minimoe.display import text_pieces
from minimoe.model import Model
from minimoe.ops.rope import reference as rope
from minimoe.params import leaves
from minimoe.schedule import Step
from minimoe.stepper import page
from minimoe.stepper.arrays import KEY, array_html
from minimoe.stepper.network import network_svg


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

    def html(self, index: int, *, numbers: bool = False, code: bool = False) -> str:
        """Return one step as HTML without scripts: place, equation, cost, tokens, arrays and code.

        Parameters
        ----------
        index : of the step, from 0
        numbers, code : unfold the numbers of all arrays, and the code, which fold at a click
        """
        index = range(len(self))[index]
        step = self._steps[index]
        return (
            '<div style="font-size:14px;line-height:1.4">'
            f"{network_svg(self.trace.config, step)}{page.title(index + 1, len(self), step)}"
            f"{page.work(self.trace.cost(step))}{page.tokens(self._pieces) if self._pieces else ''}"
            f"{page.columns(self._arrays(step, numbers))}{KEY}{page.code(step, code)}</div>"
        )

    def static(self, steps: Sequence[int] | None = None) -> str:
        """Return steps as HTML without scripts, folded but for the first: layer 0 and the ends, unless chosen."""
        if steps is None:
            steps = [i for i, step in enumerate(self._steps) if step.layer in (None, 0)]
        folded = [page.fold(i + 1, self._steps[i], self.html(i), n == 0) for n, i in enumerate(steps)]
        left = len(self) - len(steps)
        more = f"<p>{left} further steps: <code>Stepper.html(i)</code> shows any of them.</p>" if left else ""
        return "".join(folded) + more

    def widget(self) -> Any:
        """Return the stepper with Back, Next, a slider, and switches that unfold every step; needs ipywidgets."""
        import ipywidgets as widgets  # an extra: minimoe[notebooks]

        last = len(self)  # steps are counted from 1, as their titles do
        slider = widgets.IntSlider(
            1, 1, last, description="step", continuous_update=False, layout=widgets.Layout(flex="1 1 200px")
        )
        back = widgets.Button(description="◀ Back")
        forth = widgets.Button(description="Next ▶", button_style="primary")
        numbers, code = (widgets.ToggleButton(description=name) for name in ("numbers", "code"))
        for button in (back, forth, numbers, code):
            button.layout.width = "100px"
        shown = widgets.HTML()

        def show(change: Any = None) -> None:
            shown.value = self.html(slider.value - 1, numbers=numbers.value, code=code.value)
            back.disabled, forth.disabled = slider.value == 1, slider.value == last

        def move(by: int) -> Any:
            def moved(_: Any) -> None:
                slider.value = min(max(slider.value + by, 1), last)

            return moved

        for control in (slider, numbers, code):
            control.observe(show, "value")
        back.on_click(move(-1))
        forth.on_click(move(1))
        show()
        return widgets.VBox([widgets.HBox([back, forth, slider, numbers, code]), shown])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """Offer both forms: a notebook page takes the widget where it can, and the static one elsewhere."""
        bundle: dict[str, Any] = {"text/plain": repr(self), "text/html": self.static()}
        try:
            shown = self.widget()._repr_mimebundle_()
        except ImportError:
            return bundle
        return bundle | {kind: data for kind, data in shown.items() if kind.startswith("application/")}

    def _arrays(self, step: Step, numbers: bool) -> dict[str, list[str]]:
        """The arrays of a step by their part in it."""
        groups = {
            "reads": [self._traced(name) for name in step.reads if name != "tokens"],
            "weights": [(name, self._weight(name), _weight_letters(name)) for name in step.weights],
            "writes": [self._traced(name) for name in step.writes] + (self._angles() if step.name == "rope" else []),
        }
        return {
            group: [array_html(*member, self._pieces, numbers) for member in members if member[1] is not None]
            for group, members in groups.items()
        }

    def _traced(self, name: str) -> tuple[str, Any, str]:
        return name, self.trace.arrays.get(name), schedule.letters(name)

    def _angles(self) -> list[tuple[str, Any, str]]:
        """What the first step makes. A trace does not hold it: it follows from the positions alone."""
        B, T = self.trace.tokens.shape
        config = self.trace.config
        cos, sin = rope.table(np.tile(np.arange(T), B), config.head_dim, config.rope_theta, np.float32)
        return [("cos", cos, "N c"), ("sin", sin, "N c")]

    def _weight(self, name: str) -> Any:
        weight = self._weights[name]
        return np.stack([to_host(w) for w in weight]) if isinstance(weight, list) else to_host(weight)


def _weight_letters(name: str) -> str:
    last = name.rpartition(".")[2]
    plain = {
        "tok_embeddings": "V D", "output": "V D", "norm": "D", "attention_norm": "D", "ffn_norm": "D", "gate": "E D",
        "attention_post_norm": "D", "ffn_post_norm": "D",
        "wq": "HC D", "wk": "KC D", "wv": "KC D", "wo": "D HC", "w1": "F D", "w2": "D F", "w3": "F D",
    }[last]  # fmt: skip
    return f"E {plain}" if ".experts." in name else plain
