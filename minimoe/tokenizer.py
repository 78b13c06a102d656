"""Text to token ids and back: SentencePiece byte-pair encoding with byte fallback, as Mixtral's `tokenizer.model`.

Decoding is defined here, over bytes, so that whole texts and streams agree: the bytes of all pieces are joined, the one
leading space that encoding adds is dropped, and the result is read as UTF-8, malformed bytes becoming U+FFFD.

Control tokens written in a text (`<s>`, `</s>`, `<unk>`) are encoded as the characters they are.
"""

import codecs
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import sentencepiece

_SPACE = "\u2581"  # SentencePiece's mark for a space
UNKNOWN = " \u2047 ".encode()  # what SentencePiece itself shows for an unknown piece
_LFS = b"version https://git-lfs"
_MAX_FILE = 200_000_000  # bytes; the largest vocabularies take some tens of millions
Piece = tuple[bytes, str]  # what a token adds to a text, and how it is shown by itself


class TokenizerError(ValueError):
    """A tokenizer file that cannot be used, or ids that are not its own."""


class Tokenizer:
    """A SentencePiece model file, and what every tokenizer does with ids.

    Attributes
    ----------
    path : Path
    vocab_size : int
    bos_id, eos_id : int
        -1 where there is none.

    Parameters
    ----------
    path
        The file, usually called `tokenizer.model`.

    Raises
    ------
    TokenizerError
        If it is missing, a folder, empty, a Git-LFS pointer or not a SentencePiece model.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._model: Any = sentencepiece.SentencePieceProcessor()
        data = read(self.path)
        try:
            self._model.LoadFromSerializedProto(data)
            self.vocab_size: int = self._model.vocab_size()
            self.bos_id: int = self._model.bos_id()
            self.eos_id: int = self._model.eos_id()
            self._pieces = [self._piece(i) for i in range(self.vocab_size)]
        except (RuntimeError, ValueError) as error:  # ValueError: the name of a token is not UTF-8, or that of no byte
            raise TokenizerError(f"{self.path}: not a SentencePiece model") from error
        self._drops_space = True

    @classmethod
    def v1(cls) -> Self:
        """Return Mixtral-8x7B's own tokenizer, from the file that the package mistral-common carries.

        Raises
        ------
        TokenizerError
            If mistral-common is not installed.
        """
        found = importlib.util.find_spec("mistral_common")  # not imported: only its file is needed
        if found is None or found.origin is None:
            raise TokenizerError("the v1 tokenizer is a file of mistral-common: pip install 'minimoe[mistral]'")
        return cls(Path(found.origin).parent / "data" / "tokenizer.model.v1")

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Encode a text; with `bos`, the ids start with `bos_id`, if there is one."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(f"not a text: a lone surrogate at character {error.start}") from None
        ids = self._text_ids(text)
        return [self.bos_id, *ids] if bos and self.bos_id >= 0 else ids

    def decode(self, ids: Iterable[int], continuing: bool = False) -> str:
        """Decode ids; control tokens leave no trace.

        Parameters
        ----------
        ids
            Integers in [0, vocab_size).
        continuing
            True when the ids continue a text, so that a space at their start is the text's own.
        """
        return "".join(self.decode_stream(ids, continuing))

    def decode_stream(self, ids: Iterable[int], continuing: bool = False) -> Iterator[str]:
        """Yield text as ids arrive, whole characters only; joined, the pieces are what `decode` gives.

        A character spread over several byte tokens is held back until its last byte; what is incomplete when the ids
        end comes out as U+FFFD.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        at_start = self._drops_space and not continuing
        for token in ids:
            data = self._pieces[self._checked(token)][0]
            if at_start and data:
                data, at_start = data.removeprefix(b" "), False
            if text := decoder.decode(data):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Show each token by itself: its text, a byte as <0x0A> unless it is printable, a control token by its name."""
        return [self._pieces[self._checked(token)][1] for token in ids]

    def _text_ids(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text, out_type=int)
        return ids

    def _piece(self, token: int) -> Piece:
        name: str = self._model.id_to_piece(token)
        if self._model.is_control(token):
            return b"", name
        if self._model.is_unknown(token):
            return UNKNOWN, name
        return byte_piece(name) if self._model.is_byte(token) else text_piece(name)

    def _checked(self, token: int) -> int:
        if not 0 <= token < self.vocab_size:
            raise TokenizerError(f"{self.path}: token id {token} is not in [0, {self.vocab_size})")
        return int(token)


def text_piece(name: str) -> Piece:
    """Return the piece of a token that is text, in which U+2581 stands for a space."""
    text = name.replace(_SPACE, " ")
    return text.encode(), text


def byte_piece(name: str) -> Piece:
    """Return the piece of a token that is one byte, named `<0x0A>`."""
    value = int(name[3:5], 16)
    character = chr(value)
    return bytes([value]), character if character.isascii() and character.isprintable() else name


def read(path: Path) -> bytes:
    """Read a tokenizer's file, or say in one line what is wrong with it."""
    if path.is_dir():
        raise TokenizerError(f"{path}: a folder; expected a tokenizer's file")
    if path.exists() and not path.is_file():
        raise TokenizerError(f"{path}: not a regular file")
    try:
        if (size := path.stat().st_size) > _MAX_FILE:
            raise TokenizerError(f"{path}: {size:,} bytes; at most {_MAX_FILE:,} are read")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise TokenizerError(f"{path}: no such file") from error
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read ({error.strerror})") from error
    if not data:
        raise TokenizerError(f"{path}: the file is empty")
    if data.startswith(_LFS):
        raise TokenizerError(f"{path}: a Git-LFS pointer, not the file itself; fetch it with `git lfs pull`")
    return data
