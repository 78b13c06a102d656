"""Pieces of HTML in which everything that comes from a model or a text is escaped."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Mapping, Sequence

from minimoe.colours import expert_colour, ink


class Html(str):
    """Source that is safe already; every other string is escaped before it gets into a page."""

    __slots__ = ()


def safe(value: object) -> Html:
    """Escape a value, unless it is source already."""
    return value if isinstance(value, Html) else Html(html.escape(str(value), quote=True))


def tag(name: str, content: object = "", **attributes: object) -> Html:
    """Return an element; `class_` and `data_x` become class and data-x, and True an attribute without a value.

    >>> tag("p", "a < b", class_="note")
    '<p class="note">a &lt; b</p>'
    """
    return Html(f"<{name}{_attributes(attributes)}>{safe(content)}</{name}>")


def image(data: bytes, alt: str, **attributes: object) -> Html:
    """Return a picture that is in the page itself."""
    source = "data:image/png;base64," + base64.b64encode(data).decode()
    return Html(f"<img{_attributes({'src': source, 'alt': alt, **attributes})}>")


def _attributes(given: Mapping[str, object]) -> str:
    parts = []
    for key, value in given.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            parts.append(f" {key}")
        elif value is not None and value is not False:
            parts.append(f' {key}="{safe(value)}"')
    return "".join(parts)


def joined(parts: Iterable[object], between: str = "") -> Html:
    """Join values, escaping those that are no source."""
    return Html(between.join(safe(part) for part in parts))


def chip(expert: int) -> Html:
    """The number of an expert on its colour."""
    return Html(f'<span class="chip e{expert}">{expert}</span>')


def table(caption: object, head: Sequence[object], rows: Iterable[Sequence[object]]) -> Html:
    """Return a table whose columns and rows have headings that screen readers announce."""
    top = joined(tag("th", cell, scope="col") for cell in head)
    body = joined(
        Html(f"<tr>{tag('th', row[0], scope='row')}{joined(tag('td', cell) for cell in row[1:])}</tr>\n")
        for row in rows
    )
    source = f"<table>{tag('caption', caption)}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    # What scrolls must be reachable by the keyboard.
    return Html(f'<div class="scroll" tabindex="0" role="region" aria-label="{safe(_plain(caption))}">{source}</div>')


def details(summary: object, content: object) -> Html:
    """Return what is folded away until it is asked for."""
    return Html(f"<details>{tag('summary', summary)}{safe(content)}</details>")


def number(value: float, digits: int = 1) -> str:
    """Return a number with so many digits, a real minus, and a dash where there is none.

    >>> number(-0.04), number(-0.06), number(float("nan")), number(float("inf"))
    ('0.0', '−0.1', '–', '∞')
    """
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def percent(share: float, digits: int = 1) -> str:
    """Return a share in percent, without the sign."""
    return number(100 * share, digits)


def three_digits(share: float) -> str:
    """Return a share in percent, as people write it: 12.5, 6.25, 1.56.

    >>> three_digits(1 / 8), three_digits(1 / 64), three_digits(1)
    ('12.5', '1.56', '100')
    """
    return f"{100 * share:.3g}"


def expert_styles(num_experts: int) -> str:
    """Return one CSS rule per expert."""
    rules = []
    for e in range(num_experts):
        colour = expert_colour(e)
        rules.append(f".e{e}{{background:{colour};color:{ink(colour)}}}")
    return "\n".join(rules)


def _plain(caption: object) -> str:
    return caption if isinstance(caption, str) and not isinstance(caption, Html) else "table"
