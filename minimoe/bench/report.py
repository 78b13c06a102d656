"""A benchmark's document as lines to read: the main table, the limits, fresh processes, ops."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

FORMAT = "minimoe bench 1"  # of the document
Row = Sequence[str]
HEAD = ("what", "backend", "dtype", "B", "context", "ms", "tokens/s", "reached", "of roof", "× peer", "spread", "check")
OPS_HEAD = ("op", "pass", "backend", "dtype", "B", "calls", "ms", "share", "GFLOP/s", "GB/s", "of roof")
PROCESS_HEAD = ("fresh process", "dtype", "B", "context", "import", "model", "first token", "peak memory")


def rows(document: Mapping[str, Any]) -> list[Row]:
    """One row per result, under HEAD."""
    return [_row(entry, several_experts(document)) for entry in document["results"]]


def sizes(document: Mapping[str, Any]) -> str:
    """The model's name, and how many of its layers were measured where these are not all."""
    layers = sorted({entry.get("layers") for entry in document["results"]} - {None, document.get("layers")})
    if not layers:
        return str(document["model"])
    return f"{document['model']}, {', '.join(map(str, layers))} of {document['layers']} layers"


def several_experts(document: Mapping[str, Any]) -> bool:
    """Whether models of different numbers of experts were measured."""
    return len({entry["experts"] for entry in document["results"]}) > 1


def _row(entry: Mapping[str, Any], experts: bool) -> Row:
    peer, check = entry.get("peer"), entry["check"]
    name = f"{entry['what']} E={entry['experts']}" if experts else entry["what"]
    return (
        name, entry["backend"], entry["dtype"], str(entry["batch"]), str(entry["context"]),
        digits(1e3 * entry["seconds"]["median"]), f"{entry['tokens_per_second']:,.0f}", reached(entry),
        percent(entry["of_roof"]["median"]), "" if peer is None else f"{peer['ratio']['median']:.2f}",
        percent(entry["spread"]), "" if check is None else ("ok" if right(entry) else "WRONG"),
    )  # fmt: skip


def right(entry: Mapping[str, Any]) -> bool:
    """Whether what was timed gave the right answer, by every comparison that was made."""
    checks = [check for check in (entry["check"], entry.get("peer")) if check is not None]
    return all(check["right"] for check in checks)


def reached(entry: Mapping[str, Any]) -> str:
    """What the run reached in the unit of what limits it."""
    seconds = entry["seconds"]["median"]
    if entry["roof"] == "memory":
        return f"{(entry['weight_bytes'] + entry['cache_bytes']) / seconds / 1e9:.1f} GB/s"
    return f"{entry['flops'] / seconds / 1e9:,.0f} GFLOP/s"


def lines(document: Mapping[str, Any]) -> Iterator[str]:
    """What is said around the tables."""
    for device, dtype in sorted({(entry["device"], entry["dtype"]) for entry in document["results"]}):
        here = [e for e in document["results"] if (e["device"], e["dtype"]) == (device, dtype)]
        bandwidth = sorted(e["bandwidth"]["median"] for e in here)
        rate = sorted(e["rate"]["median"] for e in here)
        theirs = document.get("peer_rates", {}).get(dtype)
        yield (
            f"{device}: reads {_range(bandwidth)} GB/s, multiplies {dtype} weights at {_range(rate)} GFLOP/s"
            + ("" if theirs is None else f" (torch: {theirs / 1e9:,.0f})")
        )
    if gpu := document.get("machine", {}).get("gpu"):
        driver = f"driver {gpu['driver'] or 'unknown'} (CUDA {gpu['driver_serves_cuda']})"
        yield f"gpu: {gpu['card']}, {gpu['memory_bytes'] / 1e9:,.0f} GB, {driver}, CUDA {gpu['cuda']}"
    yield from goals(document)
    yield from ratios(document["results"])
    compared = [entry for entry in document["results"] if entry.get("peer")]
    if compared:
        versions = ", ".join(f"{name} {version}" for name, version in document["peer_versions"].items())
        used = sorted({entry["peer"]["experts"] for entry in compared})
        yield f"peer: {versions}; experts by whichever was fastest of eager, grouped_mm, batched_mm: {', '.join(used)}"
        most = max(compared, key=lambda entry: entry["peer"]["distance"] / entry["peer"]["allowed"])
        yield f"logits differ from theirs by at most {most['peer']['distance']:.0e} ({most['what']}, {most['dtype']})"
    checked = [entry["check"] for entry in document["results"] if entry["check"] is not None]
    if checked:
        most_off = max(check["distance"] for check in checked)
        yield f"answers checked against the numpy reference in this run: at most {most_off:.0e} apart"
    yield from (f"warning: {text}" for text in document["warnings"])


GOALS = (  # what, batch, prompt, the figure, and what it is to reach: of Mixtral-8x7B's sizes on a device
    ("decode", 1, None, "of_roof", 0.80),
    ("decode", 16, None, "of_roof", 0.70),
    ("prefill", 1, 4096, "of_roof", 0.50),
    ("decode", 1, None, "ratio", 4.0),
    ("prefill", 1, 4096, "ratio", 1.3),
)


def goals(document: Mapping[str, Any]) -> Iterator[str]:
    """Each goal that a result of the preset mixtral-8x7b is held against, and whether it is met."""
    if document["model"] != "mixtral-8x7b":
        return
    for entry in document["results"]:
        for what, batch, context, figure, wanted in GOALS:
            if (entry["what"], entry["batch"]) != (what, batch) or context not in (None, entry["context"]):
                continue
            if figure == "ratio" and not entry.get("peer"):
                continue
            reached = (entry["peer"]["ratio"] if figure == "ratio" else entry["of_roof"])["median"]
            named = f"{what}, batch {batch}, context {entry['context']:,}"
            units = "times as fast as transformers" if figure == "ratio" else "of the roof"
            verdict = "met" if reached >= wanted else "NOT met"
            yield f"goal {verdict}: {named}: {reached:.2f} {units}, wanted {wanted:.2f}"


def ratios(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """How much faster bfloat16 is than float32, and int8 than bfloat16, where both were measured."""
    keys = ("what", "backend", "batch", "context", "experts")
    wider = {"bfloat16": "float32", "int8": "bfloat16"}
    found = {(e["dtype"], *(e[key] for key in keys)): e for e in results}
    for entry in results:
        other = found.get((wider.get(entry["dtype"]), *(entry[key] for key in keys)))
        if other is not None:
            factor = other["seconds"]["median"] / entry["seconds"]["median"]
            named = f"{entry['what']} on {entry['backend']}, batch {entry['batch']}, context {entry['context']}"
            yield f"{entry['dtype']} is {factor:.2f} times as fast as {other['dtype']}: {named}"


def op_rows(document: Mapping[str, Any]) -> list[Row]:
    """One row per op, under OPS_HEAD; `share` is of the whole pass."""
    found: list[Row] = []
    for entry in document["ops"]:
        seconds = max(entry["seconds"], 1e-12)
        bound = max(entry["flops"] / entry["rate"], entry["bytes"] / entry["bandwidth"])
        found.append(
            (
                entry["name"], entry["what"], entry["backend"], entry["dtype"], str(entry["batch"]),
                str(entry["calls"] or ""),
                digits(1e3 * seconds), percent(share(document, entry)),
                f"{entry['flops'] / seconds / 1e9:,.1f}" if entry["flops"] else "",
                f"{entry['bytes'] / seconds / 1e9:,.1f}" if entry["bytes"] else "",
                percent(bound / seconds) if bound else "",
            )
        )  # fmt: skip
    return found


def share(document: Mapping[str, Any], entry: Mapping[str, Any]) -> float:
    """What part of its pass an op takes."""
    return float(entry["seconds"] / sum(e["seconds"] for e in document["ops"] if _pass(e) == _pass(entry)))


def _pass(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[key] for key in ("what", "backend", "dtype", "batch", "context", "experts"))


def process_rows(document: Mapping[str, Any]) -> list[Row]:
    """One row per fresh process, under PROCESS_HEAD."""
    return [
        (
            entry["backend"], entry["dtype"], str(entry["batch"]), str(entry["context"]),
            *(f"{entry[f'{name}_seconds']:.2f} s" for name in ("import", "model", "first_token")),
            f"{entry['peak_bytes'] / 1e6:,.0f} MB",
        )
        for entry in document["processes"]
    ]  # fmt: skip


def roofline_points(document: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `minimoe.plots.roofline`: every op that computes, and takes 1% of its pass, is a point."""
    shown = [e for e in document["ops"] if e["flops"] and e["bytes"] and share(document, e) >= 0.01]
    names = [f"{entry['backend']}, {entry['dtype']}" for entry in shown]
    return {
        "intensity": [entry["flops"] / entry["bytes"] for entry in shown],
        "speed": [entry["flops"] / entry["seconds"] for entry in shown],
        "labels": [f"{entry['what']}: {entry['name']}" for entry in shown],
        "backends": names,
        "bandwidth": {name: _mean(shown, names, name, "bandwidth") for name in dict.fromkeys(names)},
        "peak": {name: _mean(shown, names, name, "rate") for name in dict.fromkeys(names)},
    }


def _mean(shown: Sequence[Mapping[str, Any]], names: Sequence[str], name: str, what: str) -> float:
    values = [entry[what] for entry, other in zip(shown, names, strict=True) if other == name]
    return float(sum(values) / len(values))


def percent(share: float) -> str:
    """A share as a whole number of percent.

    >>> percent(0.876)
    '88%'
    """
    return f"{100 * share:.0f}%"


def digits(value: float) -> str:
    """Three significant digits.

    >>> digits(0.01234), digits(3.14159), digits(1234.5)
    ('0.0123', '3.14', '1,234')
    """
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _range(values: Sequence[float]) -> str:
    low, high = (f"{value / 1e9:,.0f}" for value in (values[0], values[-1]))
    return low if low == high else f"{low} to {high}"
