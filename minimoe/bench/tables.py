"""The benchmark table of a README, generated from results that were kept.

    python -m minimoe.bench.tables README.md [figures/benchmarks]

writes between the lines `<!-- bench: begin -->` and `<!-- bench: end -->`; doing it again changes nothing.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minimoe.bench.report import FORMAT, digits, percent, reached, right
from minimoe.bench.report import sizes as model_sizes

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
HEAD = ("model", "what", "weights", "backend", "ms", "tokens/s", "reached", "of the roof", "× transformers")


def markdown(documents: Sequence[Mapping[str, Any]]) -> str:
    """Return the table, and under it where each set of results comes from."""
    lines = ["| " + " | ".join(HEAD) + " |", "| --- | --- | --- | --- |" + " ---: |" * (len(HEAD) - 4)]
    for document in documents:
        lines += ["| " + " | ".join(_row(document, entry)) + " |" for entry in document["results"]]
    return "\n".join([*lines, "", *(_origin(document) for document in documents)])


def _row(document: Mapping[str, Any], entry: Mapping[str, Any]) -> Sequence[str]:
    if not right(entry):
        raise ValueError(f"{document['model']}, {entry['what']}, {entry['dtype']}: the answer was wrong: not published")
    peer = entry.get("peer")
    shape = f"{entry['what']}, {entry['batch']} × {entry['context']}"
    roof = "memory" if entry["roof"] == "memory" else "arithmetic"
    return (
        model_sizes(document), shape, entry["dtype"], entry["backend"], digits(1e3 * entry["seconds"]["median"]),
        f"{entry['tokens_per_second']:,.0f}", reached(entry), f"{percent(entry['of_roof']['median'])} ({roof})",
        "" if peer is None else f"{peer['ratio']['median']:.2f}",
    )  # fmt: skip


def _origin(document: Mapping[str, Any]) -> str:
    machine = document["machine"]
    versions = {**machine["packages"], **document.get("peer_versions", {})}
    told = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    threads = "1 thread" if document["threads"] == 1 else f"{document['threads']} threads"
    where = f"{machine['processor']}, {machine['cores']} cores, {threads}; {told}"
    if gpu := machine.get("gpu"):
        where = f"{gpu['card']}, driver {gpu['driver']}, CUDA {gpu['cuda']}; {where}"
    return f"`{document['command']}`: {where}; the median of {document['rounds']} rounds.\n"


def insert(readme: str, table: str) -> str:
    """Return the text with `table` between the two markers.

    >>> insert(f"a\\n{BEGIN}\\nold\\n{END}\\nb", "new")
    'a\\n<!-- bench: begin -->\\nnew\\n<!-- bench: end -->\\nb'

    Raises
    ------
    ValueError
        If the markers are not there once each, in this order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"there must be one line {BEGIN} and after it one line {END}")
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n{table.strip()}\n{END}{rest.partition(END)[2]}"


def load(folder: Path) -> list[dict[str, Any]]:
    """Read every result of a folder, in the order of the names.

    Raises
    ------
    ValueError
        If there is none, or a file holds something else.
    """
    documents = []
    for path in sorted(folder.glob("*.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}") from None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError(f"{path}: not a result that `minimoe bench --out` wrote")
        documents.append(document)
    if not documents:
        raise ValueError(f"{folder}: holds no results (*.json): make some with `minimoe bench --out FILE`")
    return documents


def main(arguments: Sequence[str]) -> int:
    """Rewrite a README; return the exit status."""
    if len(arguments) not in (1, 2):
        print("usage: python -m minimoe.bench.tables README.md [FOLDER]", file=sys.stderr)
        return 2
    path = Path(arguments[0])
    folder = Path(arguments[1]) if len(arguments) == 2 else path.parent / "figures" / "benchmarks"
    try:
        text = path.read_text(encoding="utf-8")
        new = insert(text, markdown(load(folder)))
    except (OSError, ValueError) as error:
        print(f"minimoe: error: {error}", file=sys.stderr)
        return 2
    if new != text:
        temporary = path.with_name(path.name + ".new")
        temporary.write_text(new, encoding="utf-8")
        os.replace(temporary, path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
