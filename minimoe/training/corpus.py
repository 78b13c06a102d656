"""The corpus of the bundled model: six domains, rebuilt offline, split by document into a training and a held-out part.

`python`, `c` and `english` are read from what is installed (the standard library, header files, docstrings);
`arithmetic`, `json`, `html` and part of `c` are written by seeded programs. Nothing of it is in the repository; the
manifest says exactly what a corpus consisted of.
"""

import hashlib
import importlib.metadata
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .document import HELD_OUT_SHARE, Document, is_held_out
from .generated import generated_documents
from .sources import c_documents, english_documents, installed_packages, python_documents

DOMAINS = ("python", "c", "english", "arithmetic", "json", "html")
GENERATED_BYTES = {"arithmetic": 6_000_000, "json": 6_000_000, "html": 6_000_000, "c": 3_000_000}


class Encoder(Protocol):
    """What `encode` needs of a tokenizer."""

    vocab_size: int
    eos_id: int

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Turn text into token ids, BOS first."""
        ...


@dataclass(frozen=True)
class Corpus:
    """Documents by domain, in two parts that share no document."""

    train: dict[str, list[Document]]
    held_out: dict[str, list[Document]]


def build(domains: tuple[str, ...] = DOMAINS, seed: int = 0, max_bytes: int | None = None) -> Corpus:
    """Collect the corpus.

    Parameters
    ----------
    domains
        Any of `DOMAINS`.
    seed
        Of the generated documents.
    max_bytes
        Take about so much of each domain's training part, and as much less of its held-out part; None takes all there
        is.

    Returns
    -------
    Corpus
        The same for the same seed, Python and package versions.
    """
    unknown = [domain for domain in domains if domain not in DOMAINS]
    if unknown:
        raise ValueError(f"unknown domain {unknown[0]!r}: choose from {', '.join(DOMAINS)}")
    corpus = Corpus({}, {})
    for domain in domains:
        corpus.train[domain], corpus.held_out[domain] = _split(_documents(domain, seed), max_bytes)
    return corpus


def from_files(paths: Sequence[Path]) -> Corpus:
    """Make a corpus of a user's own text files: each is a domain, named by its stem, cut at empty lines into documents.

    By the hash of its number a document trains or is held out; the first one always trains.

    Raises
    ------
    ValueError
        If a file is empty or not UTF-8, or two have the same stem.
    """
    corpus = Corpus({}, {})
    for path in paths:
        if path.stem in corpus.train:
            raise ValueError(f"{path}: a second file named {path.stem}; each file is a domain of that name")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None
        parts = [part for part in text.split("\n\n") if part.strip()]
        if not parts:
            raise ValueError(f"{path}: no text in it")
        documents = [Document(f"{path.stem}/{i}", part + "\n") for i, part in enumerate(parts)]
        held_out = [d for d in documents[1:] if is_held_out(d.name)]
        corpus.train[path.stem] = [d for d in documents if d not in held_out]
        corpus.held_out[path.stem] = held_out
    return corpus


def _split(documents: Iterator[Document], max_bytes: int | None) -> tuple[list[Document], list[Document]]:
    """Put each different text into its part, until both parts are as large as wanted."""
    limit = float("inf") if max_bytes is None else max_bytes
    room = {False: limit, True: limit * HELD_OUT_SHARE}
    parts: dict[bool, list[Document]] = {False: [], True: []}
    seen: set[str] = set()
    for document in documents:
        held_out = is_held_out(document.name)
        if document.text not in seen and room[held_out] > 0:
            seen.add(document.text)
            parts[held_out].append(document)
            room[held_out] -= len(document.text)
        if max(room.values()) <= 0:
            break
    return parts[False], parts[True]


def _documents(domain: str, seed: int) -> Iterator[Document]:
    if domain == "python":
        return python_documents()
    if domain == "english":
        return english_documents()
    generated = generated_documents(domain, seed, GENERATED_BYTES[domain])
    return chain(c_documents(), generated) if domain == "c" else generated


def manifest(corpus: Corpus) -> dict[str, Any]:
    """Say what a corpus consists of, so that another can be compared with it.

    Returns
    -------
    dict
        JSON-able: versions, and per domain and part the number of documents, of UTF-8 bytes, one SHA-256 over all names
        and texts, and `documents`: for harvested ones [name, first 16 hex digits of SHA-256, bytes]; generated ones
        follow from the seed and are only counted.
    """
    versions = {name: importlib.metadata.version(name) for name, _ in installed_packages()}
    domains = {
        domain: {"train": _summary(corpus.train[domain]), "held_out": _summary(corpus.held_out[domain])}
        for domain in corpus.train
    }
    return {"python": platform.python_version(), "packages": versions, "domains": domains}


def _summary(documents: list[Document]) -> dict[str, Any]:
    combined = hashlib.sha256()
    listed = []
    for document in documents:
        data = document.text.encode()
        combined.update(f"{document.name}\0{len(data)}\0".encode() + data)
        if not document.name.startswith("generated/"):
            listed.append([document.name, hashlib.sha256(data).hexdigest()[:16], len(data)])
    size = sum(len(document.text.encode()) for document in documents)
    return {"count": len(documents), "bytes": size, "sha256": combined.hexdigest(), "documents": listed}


def encode(corpus: Corpus, tokenizer: Encoder) -> dict[str, dict[str, NDArray[np.uint16]]]:
    """Tokenise a corpus.

    Returns
    -------
    dict
        `["train" or "held_out"][domain]`: one (tokens,) uint16 array; each document starts with BOS and ends with EOS.
    """
    if tokenizer.vocab_size > 2**16:
        raise ValueError(f"a vocabulary of {tokenizer.vocab_size} does not fit uint16")
    parts = {"train": corpus.train, "held_out": corpus.held_out}
    return {part: {domain: _encode(texts, tokenizer) for domain, texts in parts[part].items()} for part in parts}


def _encode(documents: list[Document], tokenizer: Encoder) -> NDArray[np.uint16]:
    pieces = [np.array([*tokenizer.encode(document.text), tokenizer.eos_id], np.uint16) for document in documents]
    return np.concatenate(pieces) if pieces else np.zeros(0, np.uint16)
