"""Every piece of a text has one kind, judged by what is there."""

import numpy as np
import pytest

from minimoe import texts
from minimoe.token_types import TYPES, token_types
from minimoe.tokenizer import Tokenizer
from tests.small import TOKENIZER


@pytest.mark.parametrize(
    ("pieces", "kinds"),
    [
        (["def", " add", "er"], ["word start", "word start", "word continued"]),
        (["_", "x1", "2", "ab"], ["word start", "word continued", "digit", "word continued"]),
        (["(", "a", ".", "b"], ["operator, bracket", "word start", "punctuation", "word start"]),
        (["\n", "    ", "\n        ", "\t"], ["line end", "space, indent", "line end", "space, indent"]),
        (["<s>", "a", "</s>", "b"], ["control", "word start", "control", "word start"]),
        (["<0x0A>", "<0x09>", "<0xE4>", "<0x41>"], ["line end", "space, indent", "other", "word start"]),
        ([" 42", "½", " ==", " -", "!", "…", "—", "$"],
         ["digit", "digit", "operator, bracket", "operator, bracket", "operator, bracket", "punctuation", "punctuation",
          "punctuation"]),
        (["é", "世", "界", "😀", ""], ["word start", "word continued", "word continued", "other", "other"]),
    ],
)  # fmt: skip
def test_kinds_of_pieces(pieces, kinds):
    assert [TYPES[i] for i in token_types(pieces)] == kinds


def test_every_token_of_the_shipped_texts_has_a_kind_that_fits():
    tokenizer = Tokenizer(TOKENIZER)
    for text in texts.load().values():
        pieces = tokenizer.pieces(tokenizer.encode(text))
        kinds = token_types(pieces)
        assert kinds.shape == (len(pieces),) and TYPES[kinds[0]] == "control"
        assert np.mean(kinds == TYPES.index("other")) < 0.01


def test_nothing_has_no_kinds():
    assert token_types([]).shape == (0,)
