"""The figures of an atlas, by name, each with a sentence for those who cannot see it, or with why it is not there."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

from minimoe.plots.ablation import switched_off
from minimoe.plots.atlas import numbers
from minimoe.plots.atlas.gather import Atlas
from minimoe.plots.coactivation import expert_pairs
from minimoe.plots.domains import domain_shares
from minimoe.plots.information import choice_information
from minimoe.plots.page import Page
from minimoe.plots.paths import token_paths
from minimoe.plots.repeats import repeated_assignments
from minimoe.plots.router import router_distributions
from minimoe.plots.shares import expert_shares
from minimoe.plots.specialisation import token_type_specialisation
from minimoe.plots.tokens import token_colours
from minimoe.repetition import RepeatTable, mixtral_repeats
from minimoe.shapes import Array

FORMATS = ("png", "svg", "pdf")
_LINES = 36  # of a coloured text


@dataclass(frozen=True)
class Plate:
    """A figure to be drawn, or the reason why there is none."""

    name: str
    alt: str
    draw: Callable[[], Page] | None = None
    missing: str = ""


@dataclass(frozen=True, eq=False)
class Plates:
    """All figures of one atlas, and the numbers that several of them share."""

    atlas: Atlas

    @cached_property
    def shares(self) -> Float[Array, "G L E"]:
        """Of every shown text."""
        return numbers.text_shares(self.atlas)

    @cached_property
    def repeats(self) -> RepeatTable:
        """Of every shown text."""
        return numbers.repeated(self.atlas)

    @cached_property
    def information(self) -> dict[str, numbers.Information]:
        """Of all texts together."""
        return numbers.information(self.atlas)

    @cached_property
    def by_name(self) -> dict[str, Plate]:
        """Every figure that the page shows."""
        plates = [self._domains(), self._shares(), self._repeats(), self._router(), self._pairs(), self._paths(),
                  self._types(), self._information(), self._switched_off()]  # fmt: skip
        return {plate.name: plate for plate in plates}

    def drawn(self) -> Iterator[tuple[str, Page]]:
        """Draw every figure that can be drawn, the coloured texts last."""
        for plate in self.by_name.values():
            if plate.draw is not None:
                yield plate.name, plate.draw()
        atlas = self.atlas
        for g, text in enumerate(atlas.shown):
            page = token_colours(text.pieces, text.ids, num_experts=atlas.sizes[1], title=text.name, max_lines=_LINES)
            yield f"tokens_{g + 1}_{_file_name(text.name)}", page

    def _names(self) -> list[str]:
        return [text.name for text in self.atlas.shown]

    def _domains(self) -> Plate:
        alt = f"Bar charts: share of the assignments per expert, for {_listed(self._names())}, beside the even share."
        return Plate("domains", alt, lambda: domain_shares(self.shares, self._names()))

    def _shares(self) -> Plate:
        alt = "Coloured tables: share of the assignments per layer and expert, one for each text."
        return Plate("shares", alt, lambda: expert_shares(self.shares, self._names()))

    def _repeats(self) -> Plate:
        _, E, k = self.atlas.sizes
        beside = mixtral_repeats() if (E, k) == (8, 2) else None
        alt = "Dot chart: how often consecutive tokens get the same expert, beside even chance and shuffled order"
        alt += ", above the figures published for Mixtral 8x7B." if beside else "."
        return Plate("repeats", alt, lambda: repeated_assignments(self.repeats, beside=beside))

    def _router(self) -> Plate:
        _, E, k = self.atlas.sizes
        alt = "Histograms per layer: margins and entropies of the routers, beside shuffled logits."
        if k == E:
            return Plate("router", alt, None, f"Every token uses all {E} experts, so there is no margin to draw.")
        if not np.isfinite(np.asarray(self.atlas.routing.logits)).all():
            return Plate("router", alt, None, "The logits hold NaN or Inf: margins and entropies mean nothing.")
        return Plate("router", alt, lambda: router_distributions(self.atlas.routing, seed=self.atlas.seed))

    def _pairs(self) -> Plate:
        _, E, k = self.atlas.sizes
        alt = "Coloured triangles: how often two experts serve the same token, compared with independent experts."
        if k == 1:
            return Plate("pairs", alt, None, "Each token has one expert only: there are no pairs.")
        if k == E:
            return Plate("pairs", alt, None, f"Every token uses all {E} experts: every pair shares every token.")
        return Plate("pairs", alt, lambda: expert_pairs(self.atlas.ids, E))

    def _paths(self) -> Plate:
        L, E, _ = self.atlas.sizes
        alt = "Bands between the experts of successive layers, as wide as the number of tokens that go that way."
        if L == 1:
            return Plate("paths", alt, None, "The model has one layer: there is no path to follow.")
        return Plate("paths", alt, lambda: token_paths(self.atlas.ids, E))

    def _types(self) -> Plate:
        alt = "Coloured tables: share of each kind of token that every expert gets, beside its share of all tokens."
        atlas = self.atlas
        return Plate("token_types", alt, lambda: token_type_specialisation(atlas.ids, atlas.kinds, atlas.sizes[1]))

    def _information(self) -> Plate:
        alt = "Line charts: bits that the first choice tells about its token and text, beside shuffled labels."

        def draw() -> Page:
            bits = {name: (one.seen, one.shuffled) for name, one in self.information.items()}
            return choice_information(bits, self.atlas.sizes[1])

        return Plate("information", alt, draw)

    def _switched_off(self) -> Plate:
        L, E, k = self.atlas.sizes
        costs = self.atlas.costs
        alt = "Coloured tables: rise of the loss when one expert is switched off, for each text."
        if costs is not None:
            return Plate("switched_off", alt, lambda: switched_off(costs))
        if k == E:
            return Plate("switched_off", alt, None, f"Every token uses all {E} experts: none can be switched off.")
        told = (
            f"It was not asked for: `minimoe route --switch-off` (in Python `switch_off=True`) runs the model "
            f"L · E + 1 = {L * E + 1:,} times over two windows of every text."
        )
        return Plate("switched_off", alt, None, told)


def rendered(page: Page, kind: str) -> bytes:
    """Return a figure as a file of this kind: the same bytes whenever it is drawn."""
    if kind not in FORMATS:
        raise ValueError(f"figures are {', '.join(FORMATS)}, not {kind!r}")
    data = io.BytesIO()
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    page.savefig(data, format=kind, metadata=metadata)
    return data.getvalue()


def _file_name(name: str) -> str:
    """A name that every file system takes: letters, digits, dots and dashes."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("_.")[:60] or "text"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
