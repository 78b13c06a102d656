"""The template, token for token, against mistral-common; skipped where no interpreter has it."""

import json

import pytest

from minimoe.chat import ChatError, encode
from minimoe.tokenizer import Tokenizer
from tests.instruct import conversations
from tests.instruct.conversations import BY_HAND, INTERPRETER, RECORD, draw

SEEDS = range(600)

if conversations.interpreter() is None:
    reason = f"no mistral-common here; {INTERPRETER} may name an interpreter that has it"
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(conversations.tokenizer_file())


def ours(messages, tokenizer):
    try:
        return encode(messages, tokenizer)
    except ChatError:
        return None


@pytest.mark.parametrize("cases", [BY_HAND, [draw(seed) for seed in SEEDS]], ids=["by hand", "drawn"])
def test_every_conversation_gives_the_tokens_of_mistral_common_or_is_refused_by_both(cases, tokenizer):
    wrong = [
        (messages, expected, found)
        for messages, expected in zip(cases, conversations.truth(cases), strict=True)
        if (found := ours(messages, tokenizer)) != (expected and expected["ids"])
    ]
    assert not wrong, f"{len(wrong)} of {len(cases)}, first: {wrong[0]}"


def test_what_is_drawn_is_refused_and_accepted_often_enough_to_mean_something(tokenizer):
    found = [ours(draw(seed), tokenizer) for seed in SEEDS]
    assert 60 < found.count(None) < 300


def test_the_recorded_tokens_are_those_of_the_mistral_common_that_is_here():
    recorded = json.loads(RECORD.read_text())
    assert conversations.truth([case["messages"] for case in recorded]) == [case["says"] for case in recorded]


def test_text_that_looks_like_control_tokens_never_becomes_one(tokenizer):
    """Of the control tokens, only the template's own: one at the start, one after every answer."""
    for messages in map(draw, SEEDS):
        ids = ours(messages, tokenizer)
        if ids is not None:
            assert ids.count(tokenizer.bos_id) == 1 and 0 not in ids
            assert ids.count(tokenizer.eos_id) <= sum(message["role"] == "assistant" for message in messages)


def test_the_v1_tokenizer_is_the_file_of_mistral_common(tokenizer):
    if conversations.find_spec("mistral_common") is None:
        pytest.skip("mistral-common is not in this environment")
    assert Tokenizer.v1().path == tokenizer.path
    assert Tokenizer.v1().encode("[INST]", bos=False) == [733, 16289, 28793]
