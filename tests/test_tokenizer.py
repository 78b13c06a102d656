"""Tokenizer: round trips, streams of whole characters, and one clear line for every unusable file."""

from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from minimoe import texts
from minimoe.tokenizer import Tokenizer, TokenizerError

MODEL = Path(__file__).parents[1] / "minimoe" / "models" / "tiny" / "tokenizer.model"
TOKENIZER = Tokenizer(MODEL)
# U+2581 is SentencePiece's mark for a space: it comes back as one.
any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))
any_ids = st.lists(st.integers(0, TOKENIZER.vocab_size - 1))


def test_ids_are_those_of_the_mixtral_family() -> None:
    assert (TOKENIZER.vocab_size, TOKENIZER.bos_id, TOKENIZER.eos_id) == (1024, 1, 2)


def test_empty_text_is_bos_alone() -> None:
    assert TOKENIZER.encode("") == [1]
    assert TOKENIZER.encode("", bos=False) == []


@given(any_text)
def test_encoding_and_decoding_gives_the_text_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.decode(TOKENIZER.encode(text, bos=False)) == text


@given(any_text)
def test_encoding_is_sentencepieces_own(text: str) -> None:
    model = sentencepiece.SentencePieceProcessor(model_file=str(MODEL))
    assert TOKENIZER.encode(text, bos=False) == model.encode(text)
    assert TOKENIZER.decode(model.encode(text)) == model.decode(model.encode(text))


@given(any_ids, st.booleans())
def test_a_stream_joins_to_what_decode_gives(ids: list[int], continuing: bool) -> None:
    whole = b"".join(TOKENIZER._pieces[i][0] for i in ids)
    if not continuing:
        whole = whole.removeprefix(b" ")
    assert "".join(TOKENIZER.decode_stream(ids, continuing)) == whole.decode("utf-8", "replace")
    assert TOKENIZER.decode(ids, continuing) == whole.decode("utf-8", "replace")


@given(any_text)
def test_a_stream_of_valid_text_never_shows_half_a_character(text: str) -> None:
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in TOKENIZER.decode_stream(TOKENIZER.encode(text)))


def test_a_character_comes_with_its_last_byte() -> None:
    ids = TOKENIZER.encode("\u20ac", bos=False)
    bytes_only = [i for i in ids if TOKENIZER._pieces[i][0][0] >= 0x80]
    assert len(bytes_only) == 3
    stream = TOKENIZER.decode_stream(iter([*bytes_only, *TOKENIZER.encode("x", bos=False)]), continuing=True)
    assert next(stream) == "\u20ac"
    assert "".join(stream) == " x"


def test_an_incomplete_character_is_flushed_as_a_replacement() -> None:
    first = TOKENIZER.encode("\u20ac", bos=False)[-3]
    assert list(TOKENIZER.decode_stream([first])) == ["\ufffd"]


def test_control_tokens_leave_no_trace_in_text_but_are_shown_as_pieces() -> None:
    ids = [1, *TOKENIZER.encode("a", bos=False), 2]
    assert TOKENIZER.decode(ids) == "a"
    assert TOKENIZER.pieces(ids) == ["<s>", " a", "</s>"]


def test_pieces_show_spaces_newlines_and_bytes() -> None:
    shown = TOKENIZER.pieces(TOKENIZER.encode("x\n    return \u00e9", bos=False))
    assert shown[:3] == [" ", "x", "\n    "]
    assert shown[-2:] == ["<0xC3>", "<0xA9>"]


@pytest.mark.parametrize("text", ["\n", "\n\n", "\t", "\n    ", "\n        ", "    ", "        "])
def test_white_space_of_code_is_one_piece(text: str) -> None:
    assert TOKENIZER.pieces(TOKENIZER.encode(f"({text}(", bos=False))[-2:] == [text, "("]


@pytest.mark.parametrize("token", [-1, 1024, 10**9])
def test_ids_out_of_range_are_refused(token: int) -> None:
    for use in (TOKENIZER.decode, TOKENIZER.pieces, lambda ids: list(TOKENIZER.decode_stream(ids))):
        with pytest.raises(TokenizerError, match=rf"token id {token} is not in \[0, 1024\)"):
            use([token])


@pytest.mark.parametrize(
    ("prepare", "complaint"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "a folder"),
        (lambda path: path.write_bytes(b""), "the file is empty"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "Git-LFS pointer"),
        (lambda path: path.write_bytes(b"neither this nor that"), "not a SentencePiece model"),
        (lambda path: path.write_bytes(MODEL.read_bytes()[:5000]), "not a SentencePiece model"),
    ],
)
def test_an_unusable_file_is_named_in_one_line(
    tmp_path: Path, prepare: Callable[[Path], object], complaint: str
) -> None:
    path = tmp_path / "tokenizer.model"
    prepare(path)
    with pytest.raises(TokenizerError, match=complaint) as caught:
        Tokenizer(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_bundled_text_survives_a_round_trip() -> None:
    for text in texts.load().values():
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
