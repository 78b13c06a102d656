"""Text to token ids and back: SentencePiece byte-pair encoding with byte fallback, as Mixtral's `tokenizer.model`.

Decoding is defined here, over bytes, so that whole texts and streams agree: the bytes of all pieces are joined, the one
leading space that encoding adds is dropped, and the result is read as UTF-8, malformed bytes becoming U+FFFD.
"""

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

_SPACE = "\u2581"  # SentencePiece's mark for a space
_LFS = b"version https://git-lfs"


class TokenizerError(ValueError):
    """A tokenizer file that cannot be used, or ids that are not its own."""


class Tokenizer:
    """A SentencePiece model file.

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
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(_read(self.path))
        except RuntimeError as error:
            raise TokenizerError(f"{self.path}: not a SentencePiece model") from error
        self.vocab_size: int = self._model.vocab_size()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        self._bytes = [self._piece_bytes(i) for i in range(self.vocab_size)]

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Encode a text; with `bos`, the ids start with `bos_id`."""
        ids: list[int] = self._model.encode(text, out_type=int)
        return [self.bos_id, *ids] if bos else ids

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
        at_start = not continuing
        for token in ids:
            data = self._bytes[self._checked(token)]
            if at_start and data:
                data, at_start = data.removeprefix(b" "), False
            if text := decoder.decode(data):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Show each token by itself: its text, a byte as <0x0A> unless it is printable, a control token by its name."""
        return [self._shown(self._checked(token)) for token in ids]

    def _shown(self, token: int) -> str:
        name: str = self._model.id_to_piece(token)
        if self._model.is_byte(token):
            character = chr(self._bytes[token][0])
            return character if character.isascii() and character.isprintable() else name
        return name.replace(_SPACE, " ")

    def _piece_bytes(self, token: int) -> bytes:
        if self._model.is_control(token):
            return b""
        if self._model.is_unknown(token):
            return " \u2047 ".encode()  # what SentencePiece itself shows for an unknown piece
        name: str = self._model.id_to_piece(token)
        return bytes([int(name[3:5], 16)]) if self._model.is_byte(token) else name.replace(_SPACE, " ").encode()

    def _checked(self, token: int) -> int:
        if not 0 <= token < self.vocab_size:
            raise TokenizerError(f"{self.path}: token id {token} is not in [0, {self.vocab_size})")
        return int(token)


def _read(path: Path) -> bytes:
    """Read the file, or say in one line what is wrong with it."""
    if path.is_dir():
        raise TokenizerError(f"{path}: a folder; expected a tokenizer.model file")
    try:
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
