"""The corpus: always the same, split without overlap, and its generated parts true and well formed."""

import ast
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest

from minimoe.tokenizer import Tokenizer
from minimoe.training import corpus, sources
from minimoe.training.document import Document, is_held_out, place_in_part
from minimoe.training.generated import GENERATORS, generated_documents
from minimoe.training.generated.html_pages import VOID
from minimoe.training.prose import is_prose, paragraphs
from minimoe.training.sources import strip_docstrings
from minimoe.training.tokenizer_training import sample_texts, train_tokenizer

MODEL = Path(__file__).parents[2] / "minimoe" / "models" / "tiny" / "tokenizer.model"
SMALL = 150_000
DRAWS = range(60)


@pytest.fixture(scope="module")
def small() -> corpus.Corpus:
    return corpus.build(max_bytes=SMALL)


def test_two_builds_have_the_same_manifest_and_another_seed_has_not(small: corpus.Corpus) -> None:
    first = corpus.manifest(small)
    assert json.loads(json.dumps(first)) == corpus.manifest(corpus.build(max_bytes=SMALL)) == first
    other = corpus.manifest(corpus.build(("json", "python"), seed=1, max_bytes=SMALL))["domains"]
    assert other["json"]["train"]["sha256"] != first["domains"]["json"]["train"]["sha256"]
    assert other["python"] == first["domains"]["python"]


def test_no_document_is_on_both_sides_or_there_twice(small: corpus.Corpus) -> None:
    for domain in corpus.DOMAINS:
        train, held_out = small.train[domain], small.held_out[domain]
        assert train and held_out
        texts = [document.text for document in train + held_out]
        assert len(set(texts)) == len(texts)
        assert all(is_held_out(document.name) for document in held_out)
        assert not any(is_held_out(document.name) for document in train)


def test_a_text_that_comes_twice_is_taken_once() -> None:
    documents = [Document(f"name {i}", f"text {i % 40}") for i in range(400)]
    train, held_out = corpus._split(iter(documents), None)
    assert len(train) + len(held_out) == 40


def test_the_side_of_a_name_is_the_same_everywhere() -> None:
    assert [i for i in range(100) if is_held_out(f"name {i}")] == [2, 5, 20, 26, 31, 36, 58, 72, 86]


def test_a_share_of_the_places_is_that_share_of_either_part() -> None:
    names = [f"name {i}" for i in range(10_000)]
    for part in (True, False):
        places = [place_in_part(name) for name in names if is_held_out(name) == part]
        assert min(places) >= 0 and max(places) < 1
        assert 0.25 < np.mean(np.array(places) < 0.3) < 0.35


def test_about_six_in_a_hundred_names_are_held_out() -> None:
    assert 500 < sum(is_held_out(f"name {i}") for i in range(10_000)) < 700


def test_docstrings_are_held_out_with_their_file(small: corpus.Corpus) -> None:
    code = {document.name for document in small.train["python"]}
    prose = {document.name for document in small.held_out["english"]}
    assert not code & prose


def test_python_documents_have_no_docstrings_and_still_parse(small: corpus.Corpus) -> None:
    for document in small.train["python"]:
        for node in ast.walk(ast.parse(document.text)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                assert ast.get_docstring(node) is None, document.name


def test_stripping_keeps_comments_and_leaves_a_body() -> None:
    source = 'class A:\n    """Doc."""\n\n    # why\n    def f(self):\n        "caf\u00e9"\n'
    source += '    def g(self): "doc"; return 1\n'
    wanted = "class A:\n    # why\n    def f(self):\n        pass\n    def g(self): pass; return 1\n"
    assert strip_docstrings(source, ast.parse(source)) == wanted


def test_licence_comments_are_left_out_and_other_comments_stay() -> None:
    c = "/* Copyright of somebody.\n * All rights reserved. */\n/* Adds. */\nint add(int, int);\n"
    assert sources._drop_legal(sources._C_COMMENT, c) == "/* Adds. */\nint add(int, int);\n"
    python = "# Licensed under terms\n# of some kind.\n\n# Adds.\nx = 1\n"
    assert sources._drop_legal(sources._COMMENT_BLOCK, python) == "\n# Adds.\nx = 1\n"


def test_prose_is_sentences_without_code_and_without_repetition() -> None:
    sentence = "Return the number of items that are\nstill waiting in the queue at this time."
    more = [
        f"The {word} paragraph has enough words to make up a document." for word in ("next", "third", "last", "extra")
    ]
    docstring = f"f(x) -> int\n\n{sentence}\n\n>>> f(1)\n2\n\nParameters\n----------\nx : int\n    {sentence}\n"
    lines = paragraphs("\n\n".join([docstring, *more]), set()).splitlines()
    assert lines[0] == sentence.replace("\n", " ")
    assert len(lines) == 5
    assert not is_prose("a | b | c | d | e | f | g | h.")


@pytest.mark.parametrize("kind", GENERATORS)
def test_generated_documents_depend_on_seed_and_number_alone(kind: str) -> None:
    few = list(generated_documents(kind, 3, 5_000))
    assert list(generated_documents(kind, 3, 20_000))[: len(few)] == few
    assert few != list(generated_documents(kind, 4, 5_000))


def test_every_arithmetic_step_is_true() -> None:
    checked = 0
    for seed in DRAWS:
        for line in GENERATORS["arithmetic"](Random(seed)).splitlines():
            if match := re.fullmatch(r"(\d+) ([+-]) (\d+) [+-] (\d) = (-?\d+): write (\d), \w+ (\d)", line):
                x, sign, y, carried, result, written, carry = match.groups()
                assert eval(f"{x} {sign} {y} {sign} {carried}") == int(result)
                assert int(result) == int(written) + 10 * int(carry) * (1 if sign == "+" else -1)
            elif match := re.fullmatch(r"(\d+) / (\d+) = (\d+) rest (\d+)", line):
                assert divmod(int(match[1]), int(match[2])) == (int(match[3]), int(match[4]))
            elif re.fullmatch(r"[-+*() \d]+( = [-+*() \d]+)+", line):
                assert len({eval(side) for side in line.split(" = ")}) == 1, line
            else:
                assert re.match(r"[a-z]+\b", line) or not line, line
                continue
            checked += 1
    assert checked > 500


def test_the_digits_written_down_make_up_the_result() -> None:
    checked = 0
    for seed in DRAWS:
        for task in GENERATORS["arithmetic"](Random(seed)).strip().split("\n\n"):
            steps = re.findall(r"[+-] (\d) = .*: write (\d), \w+ (\d)", task)
            if steps:
                assert [step[0] for step in steps] == ["0", *(step[2] for step in steps[:-1])]
                written = "".join(step[1] for step in reversed(steps))
                assert int(steps[-1][2] + written) == int(task.split(" = ")[-1])
                checked += 1
    assert checked > 20


def test_arithmetic_results_follow_from_their_tasks() -> None:
    text = "\n".join(GENERATORS["arithmetic"](Random(seed)) for seed in range(200))
    for start, a, b in re.findall(r"gcd of (\d+) and (\d+)\n(?:.* = .*\n)*?gcd\(\1, \2\) = (\d+)", text):
        assert np.gcd(int(start), int(a)) == int(b)
    for left, name, right, end in re.findall(r"solve (\d+)(\w) \+ (\d+) = (.*)\n", text):
        x = re.search(
            rf"solve {left}{name} \+ {right} = {re.escape(end)}\n(?:take.*\n)+divide.*: {name} = (-?\d+)", text
        )
        assert x is not None
        other = int(x[1]) + int(end.split()[-1]) if " + " in end else int(end)
        assert int(left) * int(x[1]) + int(right) == other
    for given, answer in re.findall(r"sort ([\d ]+)\n(?:smallest .*\n)+sorted ([\d ]+)", text):
        assert sorted(map(int, given.split())) == list(map(int, answer.split()))


def test_json_documents_parse_and_add_up() -> None:
    totals = 0
    for seed in DRAWS:
        record = json.loads(GENERATORS["json"](Random(seed)))
        rows = record if isinstance(record, list) else next((v for v in record.values() if isinstance(v, list)), [])
        if rows and isinstance(rows[0], dict):
            assert len({tuple(row) for row in rows}) == 1  # the same keys in the same order
        if isinstance(record, dict) and "manifest" in record:
            assert {item["manifest"] for item in record["items"]} == {record["manifest"]}
            total = next(value for key, value in record.items() if re.fullmatch(r"total.?mass", key, re.IGNORECASE))
            assert sum(item["mass"] for item in record["items"]) == total
            totals += 1
        if isinstance(record, list):
            reserved = [row["in_stock" if "in_stock" in row else next(k for k in row if "tock" in k)] for row in record]
            assert all(row["free"] == stock - row["reserved"] for row, stock in zip(record, reserved, strict=True))
        if isinstance(record, dict) and "events" in record:
            events = record["events"]
            assert all(a["after"] == b["before"] for a, b in pairwise(events))
            assert record["final"] == events[-1]["after"]
    assert totals > 3


class Strict(HTMLParser):
    """Fails on a closing tag that does not match, a repeated id, or a link to nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str | None] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [value for key, value in attrs if key == "id"]
        self.links += [str(value)[1:] for key, value in attrs if key == "href"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_documents_are_well_formed_and_their_links_lead_somewhere() -> None:
    for seed in DRAWS:
        parser = Strict()
        parser.feed(GENERATORS["html"](Random(seed)))
        parser.close()
        assert parser.open == []
        assert parser.links and set(parser.links) <= set(parser.ids)


def test_html_tables_add_up() -> None:
    rows = 0
    for seed in DRAWS:
        for row in re.findall(r"<tr><td.*", GENERATORS["html"](Random(seed))):
            *figures, total = map(int, re.findall(r"<td>(\d+)</td>", row))
            assert sum(figures) == total
            rows += 1
    assert rows > 50


def test_generated_c_compiles_without_a_warning(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    for seed in range(12):
        source = tmp_path / "module.c"
        source.write_text(re.sub(r'#include ".*"\n', "", GENERATORS["c"](Random(seed))))
        options = ["-Wall", "-Wno-format", "-fsyntax-only"]  # int64_t may be long or long long
        done = subprocess.run([compiler, *options, source], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_encoded_documents_start_with_bos_end_with_eos_and_come_back(small: corpus.Corpus) -> None:
    tokenizer = Tokenizer(MODEL)
    encoded = corpus.encode(small, tokenizer)
    for part, documents in (("train", small.train), ("held_out", small.held_out)):
        for domain in corpus.DOMAINS:
            array = encoded[part][domain]
            assert array.dtype == np.uint16
            pieces = np.split(array, np.flatnonzero(array == tokenizer.bos_id))[1:]
            assert all(piece[-1] == tokenizer.eos_id for piece in pieces)
            assert [tokenizer.decode(piece) for piece in pieces] == [document.text for document in documents[domain]]


def test_an_unknown_domain_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown domain 'poetry'"):
        corpus.build(("poetry",))


def test_training_a_tokenizer_is_deterministic_and_keeps_white_space(small: corpus.Corpus, tmp_path: Path) -> None:
    texts = sample_texts(small, 60_000)
    first = train_tokenizer(texts, tmp_path / "a", 512).read_bytes()
    assert train_tokenizer(texts, tmp_path / "b", 512).read_bytes() == first
    tokenizer = Tokenizer(tmp_path / "a" / "tokenizer.model")
    assert tokenizer.vocab_size == 512
    assert "\n    " in tokenizer.pieces(tokenizer.encode("def f():\n    return"))
