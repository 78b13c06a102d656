"""tokenizer.json against the package `tokenizers` itself, and every way in which such a file cannot be used."""

import json
import shutil
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import minimoe
from minimoe import cli
from minimoe.tokenizer import UNKNOWN, Tokenizer, TokenizerError
from minimoe.tokenizer_json import JsonTokenizer, tokenizer_of
from tests import small

tokenizers = pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
from tests import tokenizer_files  # noqa: E402  (imports it)

KINDS = sorted(tokenizer_files.KINDS)
any_text = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n\u2581<s>é日😀"))
CONTROL = ["<s>", "</s>", "<unk>", "<think>"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{kind: (ours, the package's own)}."""
    found = {}
    for kind, made in tokenizer_files.KINDS.items():
        path = tmp_path_factory.mktemp("tokenizers") / "tokenizer.json"
        made().save(str(path))
        found[kind] = JsonTokenizer(path), tokenizers.Tokenizer.from_file(str(path))
    return found


@pytest.mark.parametrize("kind", KINDS)
@given(text=any_text)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_texts_are_encoded_and_decoded_as_the_package_does(files, kind, text):
    ours, theirs = files[kind]
    if any(name in text for name in CONTROL):
        return  # these the package takes for tokens: see below
    ids = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, bos=False) == ids
    if 0 not in ids or kind == "byte level":  # an unknown piece leaves no trace there
        assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_ids_are_decoded_as_the_package_does_where_their_bytes_are_a_text(files, kind, data):
    ours, theirs = files[kind]
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1) | st.integers(3, 258), max_size=12))
    decoded = theirs.decode(ids)
    if kind == "byte level" or not ("\ufffd" in decoded or 0 in ids):
        assert ours.decode(ids) == decoded
    assert "".join(ours.decode_stream(ids)) == ours.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@given(text=any_text)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_stream_shows_whole_characters_only(files, kind, text):
    ours, _ = files[kind]
    pieces = list(ours.decode_stream(ours.encode(text)))
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)
    if kind != "mistral" and "\u2581" not in text:
        assert "".join(pieces) == text


@pytest.mark.parametrize("kind", KINDS)
def test_a_character_comes_with_its_last_byte(files, kind):
    ours, _ = files[kind]
    ids = ours.encode("x😀y", bos=False)
    assert len(ids) >= 6
    assert [piece for piece in ours.decode_stream(ids) if piece not in " x y"] == ["😀"]
    cut = ids[: ours.pieces(ids).index("y") - 1] if "y" in ours.pieces(ids) else ids[:-2]
    assert ours.decode(cut) == "x\ufffd"


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_in_a_text_are_text_and_leave_no_trace_as_tokens(files, kind):
    ours, theirs = files[kind]
    text = "a <s> b</s><unk>"
    ids = ours.encode(text)
    assert ids[0] == ours.bos_id == theirs.token_to_id("<s>") and ours.eos_id == theirs.token_to_id("</s>")
    assert not {ours.bos_id, ours.eos_id} & set(ids[1:])
    assert ours.decode(ids) == text
    assert ours.decode([ours.bos_id, *ids[1:], ours.eos_id]) == text


def test_bytes_and_unknown_pieces_are_as_in_a_sentencepiece_file(files):
    ours, _ = files["llama"]
    assert ours.pieces([3 + ord("\n"), 3 + ord("a"), 3 + 0xC3, 1]) == ["<0x0A>", "a", "<0xC3>", "<s>"]
    assert ours.decode([0], continuing=True) == UNKNOWN.decode()
    byte_level, _ = files["byte level"]
    assert byte_level.pieces(byte_level.encode("\n é", bos=False))[0] == "\n"
    assert byte_level.decode([byte_level.encode("<think>", bos=False)[0]]) == "<think>"


# ---- files that cannot be used


def _changed(change):
    says = json.loads(tokenizer_files.llama().to_str())
    change(says)
    return json.dumps(says).encode()


def _in_model(**values):
    return lambda says: says["model"].update(values)


def _in_vocab(**values):
    return lambda says: says["model"]["vocab"].update(values)


def _part(name, value):
    return lambda says: says.update({name: value})


UNUSABLE = {
    "empty": (b"", "the file is empty"),
    "a Git-LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git-LFS pointer"),
    "not JSON": (b"{", "not a tokenizer.json"),
    "not UTF-8": (b'{"a": "\xff"}', "not a tokenizer.json"),
    "a list": (b"[]", "model must be a byte-pair encoding"),
    "nested": (b"[" * 200_000, "not a tokenizer.json"),
    "another model": (_changed(_in_model(type="Unigram")), "model must be a byte-pair encoding"),
    # at this one the package ends the process
    "a prefix": (_changed(_in_model(continuing_subword_prefix="x")), "another name at the beginning or end of a word"),
    "no vocabulary": (_changed(_in_model(vocab=None)), "vocab must be an object"),
    "a huge id": (_changed(_in_vocab(new=4_000_000_000)), "must be integers in"),
    "a negative id": (_changed(_in_vocab(new=-1)), "must be integers in"),
    "an id that is none": (_changed(_in_vocab(new=True)), "must be integers in"),
    "an id twice": (_changed(_in_vocab(new=300)), "two tokens have the same id"),
    "a false merge": (_changed(_in_model(merges=[["a", "zzz"]])), "of tokens that are not there"),
    "a merge of one": (_changed(_in_model(merges=["a"])), "a merge must be two tokens"),
    "an unknown part": (_changed(_part("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"})),
                        "normalizer: Precompiled is not known"),
    "a part in a sequence": (
        _changed(_part("pre_tokenizer", {"type": "Sequence", "pretokenizers": [{"type": "FixedLength", "length": 0}]})),
        "pre_tokenizer: FixedLength is not known",
    ),
    "a text that grows": (
        _changed(_part("normalizer", {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"})),
        "by none that is longer",
    ),
    "nothing replaced": (_changed(_part("normalizer", {"type": "Replace", "pattern": {"String": ""}, "content": "a"})),
                         "by none that is longer"),
    "no decoder": (_changed(_part("decoder", None)), "decodes by nothing"),
    "another decoder": (_changed(_part("decoder", {"type": "WordPiece"})), "decoder: WordPiece is not known"),
    "a half decoder": (_changed(_part("decoder", {"type": "Fuse"})), "decodes by Fuse"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNUSABLE)
def test_an_unusable_file_is_named_in_one_line_and_status_2(tmp_path, capsys, case):
    content, complaint = UNUSABLE[case]
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(TokenizerError) as caught:
        JsonTokenizer(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and complaint in message and message.isprintable() and len(message) < 500
    status = cli.main(["generate", "a", "--backend", "numpy", "--tokenizer", str(path)])
    out, err = capsys.readouterr()
    assert (status, out) == (2, "") and complaint in err and err.count("\n") == 1


def test_a_pattern_that_takes_too_long_is_an_error_of_the_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    path.write_bytes(_changed(_part("pre_tokenizer", split)))
    slow = JsonTokenizer(path)
    with pytest.raises(TokenizerError, match="the package tokenizers fails"):
        slow.encode("a" * 1000 + "!")


def test_without_the_package_a_line_says_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(TokenizerError, match=r"pip install 'minimoe\[tokenizers\]'"):
        JsonTokenizer(tmp_path / "tokenizer.json")


# ---- in a checkpoint's folder


@pytest.fixture
def folder(tmp_path):
    """A checkpoint that has a tokenizer.json only."""
    made = tokenizer_files.llama()
    config = small.SPARSE.replace(vocab_size=made.get_vocab_size())
    path = small.save(tmp_path / "model", config, tokenizer=False)
    made.save(str(path / "tokenizer.json"))
    return path


def test_a_folder_is_read_written_and_generates_with_its_tokenizer_json(folder, tmp_path):
    model = minimoe.load(folder, backend="numpy")
    assert isinstance(model.tokenizer, JsonTokenizer)
    text = model.generate("def add", max_new_tokens=8)
    assert "".join(model.generate("def add", max_new_tokens=8, stream=True)) == text
    model.save(tmp_path / "copy")
    assert sorted(path.name for path in (tmp_path / "copy").glob("tokenizer*")) == ["tokenizer.json"]
    assert minimoe.load(tmp_path / "copy", backend="numpy").generate("def add", max_new_tokens=8) == text
    small.save(tmp_path / "copy")  # with a tokenizer.model: the old one would not be its own
    assert sorted(path.name for path in (tmp_path / "copy").glob("tokenizer*")) == ["tokenizer.model"]


def test_tokenizer_model_comes_first_and_another_file_may_be_named(folder, tmp_path):
    both = small.save(tmp_path / "both")
    shutil.copy(folder / "tokenizer.json", both)
    config = minimoe.load(both, backend="numpy").config
    assert type(tokenizer_of(both, config)) is Tokenizer
    assert isinstance(tokenizer_of(both, config, both / "tokenizer.json"), JsonTokenizer)
    (both / "tokenizer.model").unlink()
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: has 859 tokens, the model 1,024; another file may be"):
        tokenizer_of(both, config)
    with pytest.raises(TokenizerError, match=r"has 859 tokens, the model only 500"):
        tokenizer_of(both, config.replace(vocab_size=500), both / "tokenizer.json")
    with pytest.raises(TokenizerError, match="no such file"):
        tokenizer_of(both, config, both / "nowhere.json")


def test_the_config_says_which_tokens_begin_and_end_a_text(folder):
    config = minimoe.load(folder, backend="numpy").config
    found = tokenizer_of(folder, config.replace(bos_id=5, eos_id=6))
    assert (found.bos_id, found.eos_id) == (5, 6)
