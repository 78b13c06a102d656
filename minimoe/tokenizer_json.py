"""`tokenizer.json`, read by the package `tokenizers` (an extra): the same tokens, under the same interface.

The package encodes; decoding is ours (see `tokenizer`), from the bytes that each token stands for. They follow from the
file's decoder: U+2581 for spaces and `<0x0A>` for bytes (Llama, Mistral), or an alphabet of 256 characters, one for
each byte (GPT-2, Llama 3). Some files put a space before a text only where it does not begin with one, and decoding
takes one away either way: a text's own first space is then lost, as it is with the package itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minimoe.config import ModelConfig
from minimoe.tokenizer import UNKNOWN, Piece, Tokenizer, TokenizerError, byte_piece, read, text_piece

_BYTE_NAMES = {f"<0x{value:02X}>" for value in range(256)}
# Bytes that are printable characters stand for themselves, the others for those from U+0100 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTE_OF = {chr(b): b for b in _PRINTABLE} | {
    chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in _PRINTABLE)
}

_PARTS = {
    "normalizer": ("Prepend", "Replace", "NFC", "NFD", "NFKC", "NFKD"),
    "pre_tokenizer": ("Metaspace", "ByteLevel", "Split", "Digits"),
    "decoder": ("Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "ByteLevel"),
}
_SEQUENCES = ("normalizers", "pretokenizers", "decoders")  # under which keys a Sequence holds its parts


class JsonTokenizer(Tokenizer):
    """A tokenizer.json.

    Parameters
    ----------
    path
        The file.
    bos_id, eos_id
        Which tokens begin and end a text; without, those called `<s>` and `</s>`, if there are such.

    Raises
    ------
    TokenizerError
        If the package `tokenizers` is not installed, or the file is missing or not usable.
    """

    def __init__(self, path: str | Path, bos_id: int | None = None, eos_id: int | None = None) -> None:
        self.path = Path(path)
        data = read(self.path)
        try:
            import tokenizers
        except ImportError:
            raise TokenizerError(f"{self.path}: reading it needs pip install 'minimoe[tokenizers]'") from None
        try:
            says = _checked(json.loads(data))
            self._model = tokenizers.Tokenizer.from_str(json.dumps(says))
        except Exception as error:  # the package raises no narrower type
            raise TokenizerError(f"{self.path}: not a tokenizer.json: {str(error)[:200]!r}") from None
        self._model.encode_special_tokens = True  # <s> in a text is three characters, not the control token
        names: dict[str, int] = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(names.values(), default=-1) + 1
        self.bos_id = names.get("<s>", -1) if bos_id is None else bos_id
        self.eos_id = names.get("</s>", -1) if eos_id is None else eos_id
        self._drops_space = False
        self._pieces = self._read_pieces(says, {token: name for name, token in names.items()})

    def _text_ids(self, text: str) -> list[int]:
        try:
            ids: list[int] = self._model.encode(text, add_special_tokens=False).ids
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of the package: a pattern takes too long, say
                raise
            raise TokenizerError(f"{self.path}: the package tokenizers fails: {str(error)[:200]!r}") from None
        return ids

    def _read_pieces(self, says: dict[str, Any], names: dict[int, str]) -> list[Piece]:
        """What each id stands for; an id that no token has adds nothing."""
        decoders = list(_parts(says.get("decoder")))
        kinds = {str(decoder.get("type")) for decoder in decoders}
        if "ByteLevel" in kinds:
            piece = _byte_level
        elif "Metaspace" in kinds or any(_turns_into_spaces(decoder) for decoder in decoders):
            piece = _byte_fallback if "ByteFallback" in kinds else text_piece
            self._drops_space = any(_drops_space(decoder) for decoder in decoders)
        else:
            kind = ", ".join(sorted(kinds)) or "nothing"
            raise TokenizerError(f"{self.path}: decodes by {kind}; known are U+2581 for spaces, and ByteLevel")
        added = self._model.get_added_tokens_decoder()
        pieces: list[Piece] = []
        for token in range(self.vocab_size):
            name = names.get(token, "")
            if name == "<unk>":
                pieces.append((UNKNOWN, name))
            elif token in added:
                pieces.append((b"" if added[token].special else name.encode(), name))
            else:
                pieces.append(piece(name))
        return pieces


def tokenizer_of(folder: Path, config: ModelConfig, file: str | Path | None = None) -> Tokenizer | None:
    """Return the tokenizer of a checkpoint's folder: tokenizer.model, else tokenizer.json, else None.

    Parameters
    ----------
    folder, config : the checkpoint's
    file : "v1", or a file to use in place of the folder's own; this one may know fewer tokens than the model, as with
        vocabularies that were padded

    Raises
    ------
    TokenizerError
        If the file cannot be used, or its tokens are not as many as the model's.
    """
    if file is None:
        file = next((path for name in NAMES if (path := folder / name).exists()), None)
        if file is None:
            return None
        found = _opened(file, config)
        if found.vocab_size != config.vocab_size:
            raise TokenizerError(
                f"{file}: has {found.vocab_size:,} tokens, the model {config.vocab_size:,}; "
                "another file may be given as tokenizer="
            )
        return found
    found = Tokenizer.v1() if file == "v1" else _opened(Path(file), config)
    if found.vocab_size > config.vocab_size:
        raise TokenizerError(f"{found.path}: has {found.vocab_size:,} tokens, the model only {config.vocab_size:,}")
    return found


NAMES = ("tokenizer.model", "tokenizer.json")


def _opened(path: Path, config: ModelConfig) -> Tokenizer:
    return JsonTokenizer(path, config.bos_id, config.eos_id) if path.suffix == ".json" else Tokenizer(path)


def _checked(says: Any) -> dict[str, Any]:
    """Return what a file says, without what would keep a text from being encoded exactly and whole.

    The package trusts its files: at some it ends the process, and for some it takes any amount of memory. So nothing is
    given to it but a byte-pair encoding of tokens and merges that fit together, with parts of the types known here.

    Raises
    ------
    ValueError
    """
    model = says.get("model") if isinstance(says, dict) else None
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise ValueError("model must be a byte-pair encoding (BPE)")
    if any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix")):
        raise ValueError("tokens with another name at the beginning or end of a word are not known")
    vocab, merges, added = model.get("vocab"), model.get("merges"), says.get("added_tokens", [])
    if not isinstance(vocab, dict) or not isinstance(merges, list) or not isinstance(added, list):
        raise ValueError("vocab must be an object, merges and added_tokens lists")
    ids = [*vocab.values(), *(token.get("id") if isinstance(token, dict) else None for token in added)]
    if not all(type(token) is int and 0 <= token < 2 * len(ids) for token in ids):
        raise ValueError(f"the ids of {len(ids):,} tokens must be integers in [0, {2 * len(ids):,})")
    if len(set(vocab.values())) < len(vocab):
        raise ValueError("two tokens have the same id")
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise ValueError(f"a merge must be two tokens, not {merge!r}")
        if not {*pair, "".join(pair)} <= vocab.keys():
            raise ValueError(f"the merge {merge!r} is of tokens that are not there")
    for part, known in _PARTS.items():
        if unknown := {str(inner.get("type")) for inner in _parts(says.get(part))} - {"Sequence", *known}:
            raise ValueError(f"{part}: {', '.join(sorted(unknown))} is not known, only {', '.join(known)}")
    for inner in _parts(says.get("normalizer")):
        if inner.get("type") == "Replace" and not _shortens(inner.get("pattern"), inner.get("content")):
            raise ValueError(f"normalizer: only a text can be replaced, and by none that is longer, not {inner!r}")
    exact = model | {"type": "BPE", "dropout": None}
    return {**says, "truncation": None, "padding": None, "post_processor": None, "model": exact}


def _shortens(pattern: Any, content: Any) -> bool:
    """Whether replacing cannot lengthen a text: many such replacements, one after the other, would fill all memory."""
    text = pattern.get("String") if isinstance(pattern, dict) else None
    return isinstance(text, str) and isinstance(content, str) and max(1, len(content)) <= len(text)


def _parts(value: Any) -> Iterator[dict[str, Any]]:
    """Walk through a part, and those of a sequence of parts."""
    if isinstance(value, dict):
        yield value
        for inner in (item for key in _SEQUENCES for item in value.get(key) or []):
            yield from _parts(inner)


def _turns_into_spaces(decoder: dict[str, Any]) -> bool:
    return decoder.get("type") == "Replace" and decoder.get("pattern") == {"String": "\u2581"}


def _drops_space(decoder: dict[str, Any]) -> bool:
    """Whether decoding removes the space that encoding puts in front."""
    if decoder.get("type") == "Metaspace":
        return bool(decoder.get("prepend_scheme", "always") != "never" and decoder.get("add_prefix_space", True))
    return decoder.get("type") == "Strip" and decoder.get("content") == " " and decoder.get("start") == 1


def _byte_fallback(name: str) -> Piece:
    return byte_piece(name) if name in _BYTE_NAMES else text_piece(name)


def _byte_level(name: str) -> Piece:
    try:
        data = bytes(_BYTE_OF[character] for character in name)
    except KeyError:
        data = name.encode()  # a token that was added, and is written as it is
    return data, data.decode("utf-8", "backslashreplace")
