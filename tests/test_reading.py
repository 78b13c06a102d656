"""Reading a text in windows gives every token what the model says of it in its own window."""

import math

import numpy as np
import pytest

from minimoe import params, reading
from minimoe.backends import make_backend
from minimoe.cli.common import load_text
from minimoe.model import Model
from minimoe.tokenizer import Tokenizer
from tests.small import DENSE, SPARSE, TOKENIZER

TEXT = "def add(a, b):\n    return a + b\n" * 4


@pytest.fixture(scope="module")
def model():
    return Model(SPARSE, params.random(SPARSE, 0), make_backend("numpy"), Tokenizer(TOKENIZER))


def read(model, text=TEXT, **settings):
    return reading.read(model.ops, model.config, model.params, model.tokenizer, text, **settings)


def by_hand(model, tokens, start, stop):
    """The losses and experts of tokens start+1 .. stop-1, each as the model reads tokens[start:stop] alone."""
    trace = model.trace(tokens[start:stop])
    logits = trace["logits"][0].astype(np.float64)
    each = np.log(np.exp(logits).sum(axis=1))[:-1] - logits[np.arange(stop - start - 1), tokens[start + 1 : stop]]
    return each, trace.routing.ids[:, 1:]


def test_a_text_that_fits_is_read_at_once(model):
    found = read(model, window=512)
    tokens = np.array(model.tokenizer.encode(TEXT))
    losses, ids = by_hand(model, tokens, 0, tokens.size)
    np.testing.assert_allclose(found.losses, losses, rtol=1e-5)
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_array_equal(found.tokens, tokens[1:])
    assert not found.in_windows


@pytest.mark.parametrize("window", [2, 7, 16, 33])
def test_in_windows_every_token_is_seen_from_the_window_that_sees_most_before_it(model, window):
    found = read(model, window=window)
    tokens, half = np.array(model.tokenizer.encode(TEXT)), window // 2
    assert found.in_windows
    for t in range(1, tokens.size):
        # windows start at multiples of half a window; a token belongs to the one where it is past the half
        start = min(max(t // half - 1, 0) * half, (math.ceil((tokens.size - half) / half) - 1) * half)
        losses, ids = by_hand(model, tokens, start, min(start + window, tokens.size))
        assert found.losses[t - 1] == pytest.approx(losses[t - start - 1], rel=1e-5)
        np.testing.assert_array_equal(found.ids[:, t - 1], ids[:, t - start - 1])


@pytest.mark.parametrize("n", range(2, 12))
def test_texts_of_every_length_fill_whole_windows(model, n):
    text = "0" * n  # digits are single tokens, after the one for the space in front
    size = len(model.tokenizer.encode(text))
    calls = []
    found = read(model, text, window=6, progress=calls.append)
    assert found.losses.size == found.ids.shape[1] == size - 1
    assert np.isfinite(found.losses).all()
    assert (found.ids >= 0).all()
    assert sum(calls) == reading.count_windows(size, 6)
    assert found.in_windows == (size > 6)
    if size <= 6:
        assert sum(calls) == 1


def test_bits_per_byte_and_perplexity(model):
    found = read(model, "é", window=8)
    assert found.num_bytes == 2
    assert found.perplexity == pytest.approx(math.exp(found.losses.mean()))
    assert found.bits_per_byte == pytest.approx(found.losses.sum() / math.log(2) / 2)


def test_a_dense_model_has_losses_and_no_experts():
    model = Model(DENSE, params.random(DENSE, 0), make_backend("numpy"), Tokenizer(TOKENIZER))
    found = read(model)
    assert found.ids is None
    assert np.isfinite(found.losses).all()
    assert reading.join([found, found]).ids is None


def test_joined_readings_are_one_after_the_other(model):
    one, two = read(model, "a b c"), read(model, "1 + 2 = 3")
    both = reading.join([one, two])
    np.testing.assert_array_equal(both.ids, np.concatenate([one.ids, two.ids], axis=1))
    assert both.losses.size == one.losses.size + two.losses.size
    assert both.num_bytes == one.num_bytes + two.num_bytes


def test_a_text_without_tokens_and_a_window_without_target_are_refused(model):
    with pytest.raises(reading.TextError, match="no tokens"):
        read(model, "")
    with pytest.raises(ValueError, match="window must be at least 2"):
        read(model, window=1)


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "empty"), (b"ab\xff\xfe", "not UTF-8 text .byte 0xff at offset 2"), (b"a\0b", "zero byte at offset 1")],
)
def test_files_that_hold_no_text_are_named(tmp_path, data, message):
    path = tmp_path / "file.txt"
    path.write_bytes(data)
    with pytest.raises(reading.TextError, match=message) as caught:
        load_text(path)
    assert str(path) in str(caught.value)
