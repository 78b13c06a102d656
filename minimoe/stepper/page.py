"""The parts of a step's page: HTML without scripts or style sheets, which notebooks, nbviewer and GitHub all show."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from minimoe.plots.html import visible
from minimoe.schedule import Cost, Step
from minimoe.stepper.code import DIALECTS, sources

MUTED = "opacity:.7"  # what is said in passing; on white and on black it keeps a contrast of 7 and more
_MOST_TOKENS = 60  # shown above the arrays


def fold(number: int, step: Step, content: str, unfolded: bool) -> str:
    """Fold a whole step away below its name and equation."""
    return (
        f'<details{_open(unfolded)}><summary style="margin:.15em 0"><b>{number}</b> {html.escape(step.name)}'
        f" &nbsp; <code>{html.escape(step.equation)}</code></summary>"
        f'<div style="margin:.3em 0 1em 1em">{content}</div></details>'
    )


def title(number: int, of: int, step: Step) -> str:
    """Name the step, and set its equation large, a line each part; no <h3>, which would fill a notebook's contents."""
    parts = "<br>".join(html.escape(part) for part in step.equation.split(";  "))
    return (
        f'<div role="heading" aria-level="3" style="font-size:19px;margin:.5em 0 .3em">'
        f'<b>{number} of {of}: <code style="font-size:inherit">{html.escape(step.name)}</code></b></div>'
        f'<div><code style="font-size:19px;line-height:1.5">{parts}</code></div>'
    )


def work(cost: Cost) -> str:
    """Say what a step costs; the smallest ones, which the schedule does not count, say nothing."""
    if not cost.bytes:
        return ""
    text = f"{cost.flops:,} floating-point operations, at least {cost.bytes:,} bytes moved"
    return f'<div style="{MUTED};margin:.3em 0">{text}</div>'


def tokens(pieces: Sequence[str]) -> str:
    """Show the tokens in boxes: they are the rows of most arrays."""
    box = '<code style="border:1px solid #8888;border-radius:3px;padding:0 3px" title="token {}">{}</code>'
    shown = [box.format(n, html.escape(visible(piece)).strip() or "∅") for n, piece in enumerate(pieces[:_MOST_TOKENS])]
    left = len(pieces) - len(shown)
    more = f" and {left} more" if left else ""
    return f'<div style="margin:.3em 0;line-height:1.7">tokens: {" ".join(shown)}{more}</div>'


def columns(groups: Mapping[str, Sequence[str]]) -> str:
    """Set what a step reads, its weights and what it writes side by side; below one another where there is no room."""
    shown = "".join(
        f'<div style="flex:{len(arrays)} 1 300px;min-width:0;max-width:100%"><div style="border-bottom:2px solid #8888;'
        f'margin-bottom:.4em"><b>{name}</b></div>'
        f'<div style="display:flex;flex-wrap:wrap;gap:0 16px">{"".join(arrays)}</div></div>'
        for name, arrays in groups.items()
        if arrays
    )
    return f'<div style="display:flex;flex-wrap:wrap;gap:0 24px;margin-top:.5em">{shown}</div>' if shown else ""


def code(step: Step, unfolded: bool) -> str:
    """Show the op in its dialects, side by side; one that is not written takes no more room than to say so."""
    found = sources(step.room, step.function)
    shown = "".join(
        f'<div style="flex:{"0 1 15em" if text.startswith("#") and chr(10) not in text else "1 1 22em"};min-width:0">'
        f'<b>{DIALECTS[name]}</b><pre style="font-size:12px;line-height:1.35;margin:.3em 0;max-height:32em;'
        f'overflow:auto;white-space:{"pre-wrap" if text.startswith("#") else "pre"}">{html.escape(text)}</pre></div>'
        for name, text in found.items()
    )
    summary = f"code of <code>{step.room}.{step.function}</code> in {len(found)} dialects"
    return (
        f"<details{_open(unfolded)}><summary>{summary}</summary>"
        f'<div style="display:flex;flex-wrap:wrap;gap:0 24px;margin-top:.4em">{shown}</div></details>'
    )


def _open(unfolded: bool) -> str:
    return " open" if unfolded else ""
