"""Checkpoints from the Hugging Face Hub, through the package `huggingface_hub` (an extra): `hf:owner/name@revision`.

Weights in safetensors, JSON and the tokenizer are fetched, into the Hub's own cache on this machine; pickles and code
never are. Where a repository holds the weights twice, in Hugging Face's and in Mistral's layout, only Hugging Face's
are. A download that was interrupted goes on where it stopped, and what is complete opens without a network.
"""

from __future__ import annotations

import re
from pathlib import Path

from minimoe.checkpoint.errors import CheckpointError, shown

PREFIX = "hf:"
_DESCRIPTIONS = ["*.json", "tokenizer.model", "chat_template.jinja"]
_WEIGHTS = ("model*.safetensors", "*.safetensors")  # the first that there are
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_NAME = re.compile(rf"hf:({_PART}/{_PART})(?:@([A-Za-z0-9][A-Za-z0-9._/-]{{0,199}}))?")


class DownloadError(CheckpointError):
    """A model that cannot be fetched from the Hub."""


def parse(name: str) -> tuple[str, str]:
    """Return repository and revision.

    >>> parse("hf:mistralai/Mixtral-8x7B-v0.1")
    ('mistralai/Mixtral-8x7B-v0.1', 'main')
    >>> parse("hf:someone/model@v2")
    ('someone/model', 'v2')
    """
    match = _NAME.fullmatch(name)
    if match is None or ".." in name or "--" in name or "//" in name or name.endswith("/"):
        raise DownloadError(f"{shown(name)}: a model on the Hub is called hf:owner/name or hf:owner/name@revision")
    return match[1], match[2] or "main"


def fetch(name: str) -> Path:
    """Return the folder that holds the model called `hf:owner/name@revision`, downloaded if it is not there yet.

    Raises
    ------
    DownloadError
        If that is not such a name, huggingface_hub is not installed, there is no such model, it holds no safetensors,
        or it cannot be reached.
    """
    repository, revision = parse(name)
    try:
        import huggingface_hub
    except ImportError:
        raise DownloadError(f"{name}: downloading needs pip install 'minimoe[download]'") from None

    def files(patterns: list[str]) -> Path:
        found = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]
        )
        return Path(found)

    try:
        folder = files(_DESCRIPTIONS)
        for pattern in _WEIGHTS:
            if any(files([pattern]).glob(pattern)):
                return folder
    except Exception as error:  # of the network, the Hub, or the disk
        raise DownloadError(f"{name}: {_reason(error, repository, revision)}") from error
    raise DownloadError(f"{name}: holds no safetensors; other formats are not opened")


def _reason(error: Exception, repository: str, revision: str) -> str:
    """What went wrong, in one line; the Hub's own messages have several."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"accept its terms at https://huggingface.co/{repository}, then log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such model on the Hub, or it is private (then log in with `hf auth login`)"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {revision!r}"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return "the Hub cannot be reached, and the model is not complete on this machine"
    lines = str(error).strip().splitlines()
    return f"the download failed, and goes on when repeated: {type(error).__name__}: {lines[0] if lines else ''}"
