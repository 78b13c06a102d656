"""What a section of the page is: a question, how to read the answer, what chance would give, and figures and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minimoe.plots.atlas.markup import Html, image, joined, safe, tag
from minimoe.plots.atlas.plates import Plates
from minimoe.plots.page import Page
from minimoe.plots.tokens import middle_layers

_CSS_PIXELS = 96  # to the inch
_MOST_BYTES = 240_000  # of a figure
_MOST_CELLS = 4_000  # of a table


@dataclass(frozen=True)
class Section:
    """One section.

    Attributes
    ----------
    anchor : its address in the page
    title : what it is about
    read : one sentence on how to read it
    chance : one sentence on what chance would give; "" where chance has no say
    body : figures and tables
    """

    anchor: str
    title: str
    read: str
    chance: str
    body: Html

    @property
    def source(self) -> Html:
        """As HTML."""
        notes = [tag("p", joined([tag("b", "How to read it "), self.read]), class_="read")]
        if self.chance:
            notes.append(tag("p", joined([tag("b", "By chance "), self.chance]), class_="chance"))
        head = tag("h2", tag("a", self.title, href=f"#{self.anchor}"))
        return tag("section", joined([head, tag("div", joined(notes), class_="notes"), self.body]), id=self.anchor)


def plate(plates: Plates, name: str) -> Html:
    """A figure with its text for those who cannot see it, or why it is not there."""
    one = plates.by_name[name]
    if one.draw is None:
        return missing(one.missing)
    page = one.draw()
    width, height = (round(_CSS_PIXELS * inches) for inches in page.get_size_inches())
    picture = image(small(page), one.alt, width=width, height=height)
    return tag("figure", picture, class_="plate", id=f"figure-{name}")


def small(page: Page) -> bytes:
    """A picture that keeps the page small."""
    from minimoe.plots.readme import small_png  # not at the top: it is also run as a program

    return small_png(page, _MOST_BYTES)


def missing(reason: str) -> Html:
    """Say what is not there, and why."""
    return tag("p", joined([tag("b", "Not computed. "), reason]), class_="missing")


def tabled_layers(num_layers: int, cells: int) -> tuple[Sequence[int], Html]:
    """Return the layers that a table of so many cells a layer has room for, and what to say if these are not all."""
    if num_layers * cells <= _MOST_CELLS:
        return range(num_layers), Html("")
    note = "The first, the middle and the last layer; --csv writes all of them."
    return middle_layers(num_layers), tag("p", note, class_="note")


def layers_told(layers: Sequence[int]) -> Html:
    """Name layers as they head a table's rows."""
    return joined((safe(layer) for layer in layers), ", ")
