"""The picture of the demo: what each expert gets of each domain, and one text as its tokens travel."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float, Int

from minimoe.plots.page import FAINT, MARGIN, Page, styled
from minimoe.plots.shares import LEFT, SharesBlock
from minimoe.plots.tokens import TokensBlock, draw_legend, middle_layers
from minimoe.shapes import Array

_WIDTH = 10.0
_HEAD = 0.68


@styled
def routing_overview(
    shares: Float[Array, "G L E"],
    names: Sequence[str],
    pieces: Sequence[str],
    ids: Int[Array, "L N k"],
    *,
    text_name: str,
    max_lines: int = 24,
) -> Page:
    """Draw shares per domain above, and the tokens of one text coloured by first-choice expert below.

    Parameters
    ----------
    shares : (G, L, E) share of assignments per domain
    names : G domains
    pieces, ids : the tokens of one text and their experts
    text_name : which text it is
    max_lines : the text is cut after so many lines
    """
    above = SharesBlock(shares, names)
    below = TokensBlock(pieces, ids[..., 0], middle_layers(len(ids)), _WIDTH, max_lines=max_lines)
    page = Page(_WIDTH + 2 * MARGIN, _HEAD + above.height() + _HEAD + below.height() + 2 * MARGIN)
    top = MARGIN
    _head(page, top, "Which expert gets what", "How much of each domain every expert of every layer is given")
    above.draw(page, MARGIN - LEFT, top + _HEAD, _WIDTH + LEFT)
    top += _HEAD + above.height() + 0.1
    _head(page, top, "One text on its way", f"The tokens of the {text_name} text, coloured by the expert chosen first")
    draw_legend(page, MARGIN + _WIDTH, top + 0.02, range(shares.shape[2]))
    below.draw(page, MARGIN, top + _HEAD)
    return page


def _head(page: Page, top: float, title: str, subtitle: str) -> None:
    page.write(MARGIN, top, title, 14, weight="bold")
    page.write(MARGIN, top + 0.32, subtitle, 9.5, color=FAINT)
