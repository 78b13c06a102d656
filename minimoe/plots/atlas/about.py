"""The beginning and the end of the page: what was read, what stands out, what is missing and what not to conclude."""

from __future__ import annotations

import numpy as np

from minimoe.arrays import is_bfloat16
from minimoe.plots.atlas import numbers
from minimoe.plots.atlas.gather import MOST_TEXTS
from minimoe.plots.atlas.markup import Html, chip, joined, number, percent, table, tag, three_digits
from minimoe.plots.atlas.plates import Plates
from minimoe.plots.atlas.sections import Section
from minimoe.plots.atlas.text import excerpt_length
from minimoe.reading import count_windows
from minimoe.routing_statistics import shares

_MODEL = (
    ("layers", "num_layers"), ("experts per layer", "num_experts"), ("experts per token", "num_experts_per_token"),
    ("width", "hidden_size"), ("expert’s hidden width", "intermediate_size"), ("vocabulary", "vocab_size"),
)  # fmt: skip


def what_was_read(plates: Plates) -> Section:
    """Model and texts, as two tables."""
    atlas, config = plates.atlas, plates.atlas.model.config
    stored = "bfloat16" if is_bfloat16(atlas.model.params.tok_embeddings) else str(atlas.model.params.dtype)
    model = [
        ("parameters", f"{config.num_parameters():,}"),
        ("of these used per token", f"{config.num_active_parameters():,}"),
        *((name, f"{getattr(config, field):,}") for name, field in _MODEL), ("weights stored as", stored),
    ]  # fmt: skip
    rows = []
    for text in atlas.texts:
        one = text.reading
        windows = count_windows(one.tokens.size + 1, one.window)
        rows.append([text.name, f"{one.num_bytes:,}", f"{one.tokens.size:,}", f"{windows:,}", number(one.loss, 3),
                     number(one.bits_per_byte, 3)])  # fmt: skip
    head = ["text", "bytes", "tokens", "windows", "loss", "bits per byte"]
    pair = [table("The model", ["", atlas.name], model), table("The texts", head, rows[:200])]
    if len(rows) > 200:
        pair.append(tag("p", f"The first 200 of {len(rows):,} texts.", class_="note"))
    window = max(text.reading.window for text in atlas.texts)
    cut = any(text.reading.in_windows for text in atlas.texts)
    read = "Loss is in nats per token: how surprised the model is by the text. "
    if cut:
        read += f"Texts longer than {window:,} tokens are read in windows of that length which overlap by half. "
    read += "The token that marks the beginning of a text is read, but not counted."
    return Section("read", "What was read", read, "", tag("div", joined(pair), class_="pair"))


def tiles(plates: Plates) -> Html:
    """Four findings at a glance, each beside chance."""
    atlas = plates.atlas
    L, E, _ = atlas.sizes
    share = shares(atlas.ids, E)
    layer, e = (int(x) for x in np.unravel_index(np.nanargmax(share), share.shape))
    found = [(
        f"{percent(share[layer, e])} %", joined(["of layer ", layer, "’s work goes to expert ", chip(e)]),
        f"even use: {three_digits(1 / E)} %",
    )]  # fmt: skip
    seen, shuffled = numbers.favourites(atlas)
    if not np.isnan(seen).any():
        best = int(np.argmax(seen - shuffled))
        told = f"of the occurrences of a token go to its favourite expert in layer {best}"
        found.append((f"{percent(seen[best], 0)} %", Html(told), f"choices shuffled: {percent(shuffled[best], 0)} %"))
    if "domain" in plates.information:
        bits = plates.information["domain"]
        best = int(np.argmax(bits.seen))
        chance = number(float(bits.shuffled[:, best].max()), 2)
        told = f"is what the first choice of layer {best} tells about the text"
        found.append((f"{number(float(bits.seen[best]), 2)} bits", Html(told), f"shuffled texts: {chance} at most"))
    rate, shuffled_rate = _joined_repeats(plates)
    if not np.isnan(rate):
        told = f"of neighbouring tokens share their first choice in layer {L - 1}"
        chance = f"even use: {three_digits(1 / E)} %, shuffled order: {percent(shuffled_rate)} %"
        found.append((f"{percent(rate)} %", Html(told), chance))
    items = (
        tag("li", joined([tag("strong", value), " ", tag("span", told), tag("small", chance)]))
        for value, told, chance in found
    )
    return tag("ul", joined(items), class_="tiles")


def _joined_repeats(plates: Plates) -> tuple[float, float]:
    """How often neighbours of one text share the last layer's first choice, seen and shuffled, over all shown texts."""
    pairs = np.array([len(text.pieces) - 1 for text in plates.atlas.shown])
    rows = [row["first"] for row in plates.repeats.rows.values()]
    if not pairs.any():
        return float("nan"), float("nan")
    seen = sum(n * row.rate[-1] for n, row in zip(pairs, rows, strict=True) if n)
    shuffled = sum(n * row.shuffled[-1] for n, row in zip(pairs, rows, strict=True) if n and row.shuffled is not None)
    return float(seen / pairs.sum()), float(shuffled / pairs.sum())


def limits(plates: Plates) -> Section:
    """What is not on the page, and what must not be concluded from what is."""
    absent = [one.missing for one in plates.by_name.values() if one.draw is None]
    atlas = plates.atlas
    G = len(atlas.texts)
    if G == 1:
        absent.append("One text was read: what the experts tell about the text needs at least two.")
    if G > MOST_TEXTS:
        absent.append(f"Panels and excerpts are of the first {MOST_TEXTS} of {G:,} texts; joint numbers are of all.")
    n = excerpt_length(atlas)
    if any(len(text.pieces) > n for text in atlas.shown):
        absent.append(f"Of longer texts the first {n} tokens are shown in colour; every number is of the whole text.")
    if atlas.sizes[1] > 64:
        absent.append("Colours repeat after 64 experts; the numbers beside them tell experts apart.")
    caution = (
        "A share says how often an expert is chosen, not what it is for: only switching it off tells what it is worth.",
        "Texts differ in their very tokens. Where the token decides, texts must differ, without any expert knowing "
        "what a text is about.",
        "Tokens of a text resemble each other, so independent throws are the wrong yardstick: hence runs of 64 tokens.",
        "Among many numbers some look striking by luck.",
        "Another training run would number its experts differently.",
    )
    parts = [
        tag("h3", "Not on this page"), tag("ul", joined(tag("li", one) for one in absent)) if absent else
        tag("p", "Nothing is left out."),
        tag("h3", "What not to conclude"), tag("ul", joined(tag("li", one) for one in caution)),
    ]  # fmt: skip
    read = "What the numbers above cannot tell."
    return Section("limits", "What is missing, and what not to conclude", read, "", joined(parts))
