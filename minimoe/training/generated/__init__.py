"""Documents that a seeded program writes: arithmetic, JSON, HTML and small C modules.

A generated document looks like what its domain looks like, and rewards a reader who remembers: totals that are sums of
what stands above, closing tags, names that return, digits carried from one line to the next.
"""

from collections.abc import Callable, Iterator
from random import Random

from ..document import Document
from . import arithmetic, c_modules, html_pages, json_records

GENERATORS: dict[str, Callable[[Random], str]] = {
    "arithmetic": arithmetic.write,
    "json": json_records.write,
    "html": html_pages.write,
    "c": c_modules.write,
}


def generated_documents(kind: str, seed: int, max_bytes: int) -> Iterator[Document]:
    """Yield documents of one kind until they add up to `max_bytes`; each depends on (seed, kind, number) alone."""
    size = number = 0
    while size < max_bytes:
        text = GENERATORS[kind](Random(f"{seed}/{kind}/{number}"))
        yield Document(f"generated/{kind}/{seed}/{number:06d}", text)
        size += len(text)
        number += 1
