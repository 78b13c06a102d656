"""Chat: the template's structure with the bundled tokenizer, answers, memory, and the command.

That every token is mistral-common's is tested in tests/instruct, where that package is; here what it said is on record.
"""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from itertools import pairwise

import pytest

from minimoe import cli
from minimoe.chat import ChatError, encode
from minimoe.model import Model, load, random
from minimoe.tokenizer import Tokenizer
from tests import small
from tests.instruct.conversations import BY_HAND, RECORD, draw

TOKENIZER = Tokenizer(small.TOKENIZER)
BOS, EOS = 1, 2


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def text_ids(text):
    return TOKENIZER.encode(text, bos=False)


# ---- the template


def test_a_conversation_is_bos_then_turns_each_encoded_by_itself_and_eos_after_answers():
    found = encode([system("Be brief."), user("a"), assistant(" x "), user("b")], TOKENIZER)
    turns = text_ids("[INST] Be brief.\n\na [/INST]"), text_ids(" x "), text_ids("[INST] b [/INST]")
    assert found == [BOS, *turns[0], *turns[1], EOS, *turns[2]]


def test_every_recorded_conversation_has_the_texts_between_control_tokens_that_mistral_common_gave_it():
    recorded = json.loads(RECORD.read_text())
    accepted = 0
    for case in recorded:
        try:
            ids = encode(case["messages"], TOKENIZER)
        except ChatError:
            assert case["says"] is None, case
            continue
        cuts = [-1, *(i for i, token in enumerate(ids) if token in (BOS, EOS)), len(ids)]
        texts = [TOKENIZER.decode(ids[a + 1 : b]) for a, b in pairwise(cuts)]
        assert texts == case["says"]["texts"], case
        accepted += 1
    assert accepted > 30 and len(recorded) - accepted > 10


def test_the_record_is_of_the_conversations_that_are_drawn_here():
    recorded = [case["messages"] for case in json.loads(RECORD.read_text())]
    assert recorded == [*BY_HAND, *map(draw, range(len(recorded) - len(BY_HAND)))]


def test_control_tokens_and_inst_in_a_text_are_plain_text():
    ids = encode([user("<s> </s> <unk> [INST] [/INST]")], TOKENIZER)
    assert ids.count(BOS) == 1 and EOS not in ids and 0 not in ids
    assert TOKENIZER.decode(ids) == "[INST] <s> </s> <unk> [INST] [/INST] [/INST]"


MISTAKES = [
    ([], "messages must hold at least one message"),
    ("hi", "messages must be a list of dicts with a role and a content, not a value of type str"),
    (user("hi"), "messages must be a list of dicts with a role and a content, not a value of type dict"),
    (None, "messages must be a list of dicts with a role and a content, not None"),
    (["hi"], "message 0 must be a dict with a role and a content, not a value of type str"),
    ([{"content": "x"}], "message 0: role must be one of user, assistant, system, not None"),
    ([user("a"), {"role": "tool", "content": "x"}], "message 1: role must be one of user, assistant, system, not"),
    ([{"role": ["user"], "content": "x"}], "message 0: role must be one of"),
    ([{"role": "user"}], "message 0: content must be a text, not None"),
    ([user(5)], "message 0: content must be a text, not a value of type int"),
    ([user([{"type": "text", "text": "x"}])], "message 0: content must be a text, not a value of type list"),
    ([user("a"), assistant(None), user("b")], "message 1: content must be a text, not None"),
    ([user("a"), assistant(""), user("b")], "message 1: an answer of the assistant cannot be empty"),
    ([{**user("a"), "prefix": True}], "message 0: has prefix; a message has a role and a content only"),
    ([assistant("x")], "message 0: the last message must be the user's, not the assistant's"),
    ([user("a"), assistant("x")], "message 1: the last message must be the user's, not the assistant's"),
    ([user("a"), assistant("x"), system("s"), user("b")], "message 2: a system message cannot follow an answer"),
    ([user("a\ud800b")], "message 0: content is not a text: a lone surrogate at character 1"),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "complaint"), MISTAKES)
def test_what_is_no_conversation_is_refused_in_one_line(messages, complaint):
    with pytest.raises(ChatError) as caught:
        encode(messages, TOKENIZER)
    assert str(caught.value).startswith(complaint) and "\n" not in str(caught.value)


def test_messages_are_not_changed():
    messages = [system("s"), user("a"), user("b")]
    encode(messages, TOKENIZER)
    assert messages == [system("s"), user("a"), user("b")]


# ---- answers


@pytest.fixture(scope="module")
def model():
    return load("tiny", backend="numpy")


def small_model(seed=0, *, scale=8.0, **changes):
    """A model whose weights are large enough that its answers differ from each other."""
    made = random(small.SPARSE.replace(**changes), seed, backend="numpy")
    made.params.output[...] *= scale
    return Model(made.config, made.params, made.ops, TOKENIZER)


def test_an_answer_is_the_continuation_of_the_template(model):
    messages = [user("def add(a, b):")]
    ids = model.generate_ids(encode(messages, TOKENIZER), max_new_tokens=20)
    answer = model.chat(messages, max_new_tokens=20)
    assert answer == TOKENIZER.decode(ids) and answer
    pieces = model.chat(messages, max_new_tokens=20, stream=True)
    assert not isinstance(pieces, str) and "".join(pieces) == answer


def test_an_answer_ends_before_eos_whether_the_config_names_it_or_not():
    for eos_id in (EOS, None):
        one = small_model(eos_id=eos_id)
        free = one.generate_ids(encode([user("a")], TOKENIZER), max_new_tokens=8)
        one.params.output[EOS] = 1.5 * one.params.output[free[3]]  # so that EOS wins where the fourth token did
        ids = Model(one.config.replace(eos_id=None), one.params, one.ops).generate_ids(
            encode([user("a")], TOKENIZER), max_new_tokens=20
        )
        assert EOS in ids
        said = ids[: ids.tolist().index(EOS)]
        assert one.chat([user("a")], max_new_tokens=20) == TOKENIZER.decode(said)


def test_sampling_is_reproducible_by_its_seed():
    one = small_model()
    given = {"max_new_tokens": 20, "temperature": 1.0}
    first, again, other = (one.chat([user("a")], seed=seed, **given) for seed in (1, 1, 2))
    assert first == again != other


def test_settings_out_of_range_and_bad_messages_are_refused_at_once_even_by_a_stream(model):
    for given in ({"max_new_tokens": -1}, {"temperature": -1.0}, {"top_p": 0.0}):
        with pytest.raises(ValueError, match=next(iter(given))):
            model.chat([user("a")], stream=True, **given)
    with pytest.raises(ChatError, match="at least one message"):
        model.chat([], stream=True)


def test_no_new_tokens_is_an_empty_answer(model):
    assert model.chat([user("a")], max_new_tokens=0) == ""


def test_a_model_without_tokenizer_says_so():
    with pytest.raises(ValueError, match="this model has no tokenizer"):
        random(small.SPARSE, backend="numpy").chat([user("a")])


# ---- memory


class Counting:
    """Counts the tokens that a model reads."""

    def __init__(self, monkeypatch):
        from minimoe import mixtral

        self.read = []
        forward = mixtral.forward

        def counted(ops, config, params, inputs, **given):
            self.read.append(inputs.tokens.shape[1])
            return forward(ops, config, params, inputs, **given)

        monkeypatch.setattr(mixtral, "forward", counted)


@pytest.mark.parametrize("window", [None, 24, 200])
def test_a_conversation_gives_the_answers_that_reading_everything_anew_gives(window):
    one = small_model(sliding_window=window)
    conversation = one.conversation()
    messages = [system("Be brief.")]
    for turn in range(5):
        messages.append(user(f"question {turn}"))
        answer = conversation.chat(messages, max_new_tokens=12, temperature=0.7, seed=turn)
        assert answer == one.chat(messages, max_new_tokens=12, temperature=0.7, seed=turn)
        messages.append(assistant(answer))


def test_a_conversation_reads_only_what_is_new(monkeypatch):
    one, counting = small_model(), Counting(monkeypatch)
    conversation = one.conversation()
    messages = [user("a long question " * 8)]
    answer = conversation.chat(messages, max_new_tokens=6)
    first = len(encode(messages, TOKENIZER))
    messages += [assistant(answer), user("b")]
    conversation.chat(messages, max_new_tokens=6)
    assert counting.read[0] == first
    assert counting.read[1] < len(encode(messages, TOKENIZER)) - first + 8 < first


def test_another_beginning_is_not_answered_from_memory():
    one = small_model()
    conversation = one.conversation()
    conversation.chat([user("the first question")], max_new_tokens=6)
    for messages in ([user("the second one")], [system("s"), user("the first question")], [user("the")]):
        assert conversation.chat(messages, max_new_tokens=6) == one.chat(messages, max_new_tokens=6)


@pytest.mark.parametrize("window", [None, 24])
def test_an_answer_that_was_closed_early_leaves_a_memory_that_can_be_used(window):
    one = small_model(sliding_window=window)
    conversation, messages = one.conversation(), [user("a long question " * 4)]
    pieces = conversation.chat(messages, max_new_tokens=40, stream=True)
    said = "".join(next(pieces) for _ in range(5))
    pieces.close()
    messages += [assistant(said), user("go on")]
    assert conversation.chat(messages, max_new_tokens=10) == one.chat(messages, max_new_tokens=10)


def test_two_streams_of_one_conversation_do_not_disturb_each_other():
    one = small_model()
    conversation, asked = one.conversation(), ([user("a question")], [user("another one")])
    streams = [conversation.chat(messages, max_new_tokens=10, stream=True) for messages in asked]
    said = ["", ""]
    for _ in range(12):
        for i, stream in enumerate(streams):
            said[i] += next(stream, "")
    assert said == [one.chat(messages, max_new_tokens=10) for messages in asked]


def test_after_an_error_during_an_answer_everything_is_read_anew(monkeypatch):
    one = small_model()
    conversation, messages = one.conversation(), [user("a question")]
    pieces = conversation.chat(messages, max_new_tokens=10, stream=True)
    next(pieces)
    with monkeypatch.context() as patch:
        patch.setattr("minimoe.generate.Decoding.logits", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            list(pieces)
    assert conversation.chat(messages, max_new_tokens=10) == one.chat(messages, max_new_tokens=10)


# ---- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture
def chat(folder, capsys, monkeypatch):
    """Run the command on lines; return status, stdout and stderr."""

    def run(lines, *arguments, model=folder):
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        status = cli.main(["chat", "--model", str(model), "--backend", "numpy", "--max-new-tokens", "12", *arguments])
        return status, *capsys.readouterr()

    return run


def test_each_line_of_a_pipe_is_a_message_of_one_conversation(chat, folder):
    model = load(folder, backend="numpy")
    first = model.chat([system("s"), user("one")], max_new_tokens=12)
    second = model.chat([system("s"), user("one"), assistant(first), user(" two")], max_new_tokens=12)
    assert chat("one\n two", "--system", "s")[:2] == (0, f"{first}\n{second}\n")


def test_reset_forgets_all_but_the_system_message_and_exit_ends(chat, folder):
    first = load(folder, backend="numpy").chat([system("s"), user("one")], max_new_tokens=12)
    status, out, _ = chat("one\n/reset\none\n/exit\none\n", "--system", "s")
    assert (status, out) == (0, f"{first}\n{first}\n")


def test_a_seed_is_one_for_the_whole_session(chat):
    given = ("--temperature", "1", "--seed", "3")
    once, again = chat("a\n/reset\na\n", *given)[1], chat("a\n/reset\na\n", *given)[1]
    assert once == again
    assert len(set(once.splitlines())) > 1


def test_a_question_without_an_answer_is_forgotten(chat):
    status, out, err = chat("one\ntwo\n", "--max-new-tokens", "0")
    assert (status, out) == (0, "\n\n") and err.count("no answer: the question is forgotten\n") == 2


def test_a_model_that_was_not_made_for_chat_is_named_in_one_line(chat, tmp_path):
    bare = small.save(tmp_path / "bare")
    _, _, err = chat("", model=bare)
    assert err.startswith(f"{bare}: does not say that it was made for chat") and err.count("\n") == 1
    config = bare / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "<|im_start|>{{ x }}"}))
    assert "has another chat template" in chat("", model=bare)[2]
    config.write_text(json.dumps({"chat_template": "{{ bos_token }}[INST] {{ x }} [/INST]"}))
    assert chat("", model=bare)[2] == ""
    config.unlink()
    (bare / "chat_template.jinja").write_text("[INST]")
    assert chat("", model=bare)[2] == ""


def test_mistakes_are_one_line_and_status_2(chat, tmp_path):
    mute = small.save(tmp_path / "mute", tokenizer=False)
    for arguments, complaint in [
        ({"model": mute}, f"{mute}: there is no tokenizer.model"),
        ({"model": tmp_path / "nowhere"}, "there is no such folder"),
    ]:
        status, out, err = chat("a\n", **arguments)
        assert (status, out) == (2, "") and complaint in err and err.count("\n") == 1
    for flags, complaint in [(("--seed", "-1"), "--seed must be"), (("--top-p", "2"), "top_p must be in (0, 1]")]:
        status, _, err = chat("a\n", *flags)
        assert status == 2 and complaint in err.splitlines()[-1]


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, *arguments):
        self._ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "minimoe", "chat", "--backend", "numpy", *arguments]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "dumb"}
        )
        os.close(theirs)
        self.shown = b""

    def type(self, text):
        os.write(self._ours, text.encode())

    def wait_for(self, text, seconds=60):
        """Read until the screen shows `text` after what was read before; return what came."""
        end, start = time.monotonic() + seconds, len(self.shown)
        while text.encode() not in self.shown[start:]:
            assert time.monotonic() < end and select.select([self._ours], [], [], seconds)[0], self.shown
            self.shown += os.read(self._ours, 4096)
        return self.shown[start:].decode(errors="replace")

    def interrupt_prompt(self):
        """Ctrl-C at the prompt. One that comes before readline waits for a key is seen with the next: so repeat it."""
        for _ in range(60):
            self.process.send_signal(signal.SIGINT)
            if select.select([self._ours], [], [], 1)[0]:
                return

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.fixture
def terminal(folder):
    opened = Terminal("--model", str(folder), "--max-new-tokens", "100000")
    yield opened
    opened.close()


def test_ctrl_c_ends_the_answer_and_keeps_the_session_and_ctrl_d_ends_it(terminal):
    assert "/reset" in terminal.wait_for("> ")
    for question in ("one", "two"):
        terminal.type(f"{question}\n")
        terminal.wait_for(f"{question}\r\n")
        while len(terminal.shown.rpartition(b"\r\n")[2]) < 20:  # an answer is under way
            terminal.shown += os.read(terminal._ours, 4096)
        assert terminal.process.poll() is None
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait_for("> ")
    terminal.interrupt_prompt()
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.process.wait(60) == 0
    assert b"Traceback" not in terminal.shown


def test_an_empty_line_typed_in_a_terminal_is_no_message(terminal):
    terminal.wait_for("> ")
    terminal.type("\n")
    assert terminal.wait_for("> ").split() == [">"]
    terminal.type("/exit\n")
    assert terminal.process.wait(60) == 0
