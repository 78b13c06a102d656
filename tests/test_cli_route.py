"""`minimoe route`: its figures, tables and page say what the router did, and nothing is written halfway."""

import csv
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from minimoe import cli, texts
from minimoe.cli import route
from minimoe.model import load
from minimoe.plots.atlas import files, page, sections
from tests import small
from tests.plots.parsed import numbers, parsed

TEXT = 'def add(a, b):\n    return "a, b", a + b\n'


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints: a sparse one, a dense one, one whose tokens use all experts."""
    base = tmp_path_factory.mktemp("models")
    small.save(base / "tiny")
    small.save(base / "dense", small.DENSE)
    small.save(base / "every", small.SPARSE.replace(num_experts=2))
    return base


@pytest.fixture
def run(folders, tmp_path, capsys, monkeypatch):
    """Run `minimoe route` in a folder of its own, beside the checkpoints; return status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sections, "small", lambda page: (page.draw_without_rendering(), b"\x89PNG")[1])
    for name in folders.iterdir():
        os.symlink(name, tmp_path / name.name)
    Path("a.txt").write_text(TEXT)
    Path("b.txt").write_text("The router sends every token to two experts. " * 3)

    def run(*arguments, model="./tiny"):
        try:
            status = cli.main(["route", *map(str, arguments), "--model", model, "--backend", "numpy"])
        except SystemExit as stopped:  # argparse's own
            status = stopped.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def tiny(folders):
    return load(folders / "tiny", backend="numpy")


# ---- what is counted


def test_the_counts_are_those_of_the_routers_choices(run, tiny):
    status, out, _ = run("a.txt", "b.txt", "--json", "--csv", "t.csv")
    told = json.loads(out)
    rows = list(csv.DictReader(Path("t.csv").read_text().splitlines()))
    assert status == 0 and len(rows) == 2 * 3 * 8
    for name, one in zip(("a", "b"), told["texts"], strict=True):
        ids = tiny.trace(Path(f"{name}.txt").read_text()).routing.ids[:, 1:]  # without BOS
        for layer in range(3):
            counts = Counter(ids[layer].reshape(-1).tolist())
            assert one["shares"][layer] == pytest.approx([counts[e] / ids[layer].size for e in range(8)])
            first = np.array([n / ids.shape[1] for n in Counter(ids[layer, :, 0].tolist()).values()])
            assert one["first_choice_entropy"][layer] == pytest.approx(-(first * np.log2(first)).sum())
            same = [a == b for a, b in zip(ids[layer, :-1, 0], ids[layer, 1:, 0], strict=True)]
            assert one["repeats"]["first"][layer] == pytest.approx(np.mean(same))
            common = [bool({*a} & {*b}) for a, b in zip(ids[layer, :-1], ids[layer, 1:], strict=True)]
            assert one["repeats"]["any"][layer] == pytest.approx(np.mean(common))
            for e in range(8):
                [row] = [r for r in rows if (r["text"], r["layer"], r["expert"]) == (name, str(layer), str(e))]
                assert int(row["assignments"]) == counts[e]
                assert int(row["first_choices"]) == (ids[layer, :, 0] == e).sum()
                assert float(row["share"]) == pytest.approx(counts[e] / ids[layer].size, abs=1e-6)
    assert len(told["information"]["bits"]) == len(told["information"]["shuffled"]["max"]) == 3


def test_tables_are_printed_and_the_shipped_texts_drawn(run):
    status, out, err = run("--figure", "shares.png")
    assert (status, err) == (0, "wrote shares.png\n")
    assert Path("shares.png").read_bytes().startswith(b"\x89PNG")
    assert all(re.search(rf"^{name}: [\d,]+ tokens$", out, re.MULTILINE) for name in texts.names())
    assert "measured  shuffled mean  shuffled max" in out
    assert "read in windows" in out


def test_one_token_has_no_repeats_and_one_text_no_information(run):
    Path("one.txt").write_text(" ")
    status, out, _ = run("one.txt", "--json")
    told = json.loads(out)
    assert (status, told["information"], told["texts"][0]["tokens"]) == (0, None, 1)
    assert told["texts"][0]["repeats"]["first"] == [None] * 3
    status, out, _ = run("one.txt")
    assert status == 0 and "– (–)" in out


def test_switching_off_is_measured_and_announced(run, tiny):
    status, out, err = run("a.txt", "--switch-off", "--json")
    assert status == 0 and re.search(
        r"^switching off: 25 passes over [\d,]+ tokens, about [\d,]+ s$", err, re.MULTILINE
    )
    found = np.array(json.loads(out)["switched_off"]["costs"])
    ids = np.array(tiny.tokenizer.encode(TEXT))

    def loss(disabled):
        logits = tiny.forward(ids, disabled_experts=disabled).astype(np.float64)[:-1]
        return np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(ids.size - 1), ids[1:]])

    assert found.shape == (1, 3, 8)
    assert found[0, 2, 5] == pytest.approx(loss([(2, 5)]) - loss([]), abs=1e-6)
    status, out, _ = run("a.txt", "--switch-off")
    _, layer, e = np.unravel_index(np.argmax(found), found.shape)
    assert re.search(rf"^a +{layer} +{e} +{found.max():.3f} ", out, re.MULTILINE)


# ---- the table of decisions


def test_every_decision_has_a_row(run, tiny):
    Path('odd, "name".txt').write_text(TEXT)
    assert run('odd, "name".txt', "b.txt", "--tokens-csv", "t.csv")[0] == 0
    with open("t.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "text",
        "layer",
        "token",
        "token_id",
        "piece",
        "slot",
        "expert",
        "weight",
        "logit",
        "margin",
    ]
    for name in ('odd, "name"', "b"):
        tokens = tiny.tokenizer.encode(Path(f"{name}.txt").read_text())
        routing = tiny.trace(tokens, only="layers.0.gating.ids").routing
        mine = [row for row in rows if row["text"] == name]
        places = [(int(row["layer"]), int(row["token"]), int(row["slot"])) for row in mine]
        assert places == [(i, n, s) for i in range(3) for n in range(len(tokens) - 1) for s in range(2)]
        for row, (i, n, s) in zip(mine, places, strict=True):
            expert, logits = int(routing.ids[i, n + 1, s]), routing.logits[i, n + 1]
            best = np.sort(logits)[::-1]
            assert (int(row["expert"]), int(row["token_id"])) == (expert, tokens[n + 1])
            assert float(row["weight"]) == pytest.approx(float(routing.weights[i, n + 1, s]), rel=1e-4)
            assert float(row["logit"]) == pytest.approx(float(logits[expert]), rel=1e-4, abs=1e-5)
            assert float(row["margin"]) == pytest.approx(float(best[1] - best[2]), rel=1e-2, abs=1e-5)
        first = [row["piece"] for row in mine if row["layer"] == row["slot"] == "0"]
        assert "".join(first) == Path(f"{name}.txt").read_text().rstrip("\n") + "\n" * (name[0] == "o")


def test_decisions_of_tokens_that_use_all_experts_have_no_margin(run):
    assert run("a.txt", "--tokens-csv", "t.csv", model="./every")[0] == 0
    with open("t.csv", newline="", encoding="utf-8") as file:
        assert {row["margin"] for row in csv.DictReader(file)} == {"inf"}


# ---- page and figures


def test_the_page_says_what_is_printed(run):
    status, out, err = run("a.txt", "b.txt", "--html", "page.html", "--json")
    told, shown = json.loads(out), parsed(Path("page.html").read_text(encoding="utf-8"))
    assert (status, err) == (0, "wrote page.html\n")
    for one in told["texts"]:
        shares = numbers(shown.tables[f"{one['name']}: percent of each layer’s assignments"])
        np.testing.assert_allclose(shares, 100 * np.array(one["shares"]), atol=0.0501)
    assert "tiny" in shown.text and "Not computed. It was not asked for" in shown.text
    bits = numbers(shown.tables["Bits about the first choice"])[:, 4]
    np.testing.assert_allclose(bits, told["information"]["bits"], atol=6e-4)


def test_the_page_of_switched_off_experts_has_their_costs(run):
    _, out, _ = run("a.txt", "--html", "page.html", "--json", "--switch-off")
    shown = parsed(Path("page.html").read_text(encoding="utf-8"))
    rows = shown.tables["The experts that are missed most"][1:]
    costs = np.array(json.loads(out)["switched_off"]["costs"])[0]
    assert [float(row[3].split()[0]) for row in rows] == [round(x, 3) for x in np.sort(costs.ravel())[::-1][:10]]
    assert any(image["alt"].startswith("Coloured tables: rise of the loss") for image in shown.images)


@pytest.mark.parametrize(("kind", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_every_figure_is_written_in_every_format(run, kind, begins):
    status, _, err = run("a.txt", "b.txt", "--figures", "folder", *(["--format", kind] if kind != "png" else []))
    names = ["domains", "information", "pairs", "paths", "repeats", "router", "shares", "token_types", "tokens_1_a",
             "tokens_2_b"]  # fmt: skip
    assert status == 0 and sorted(os.listdir("folder")) == [f"{name}.{kind}" for name in names]
    assert all(Path("folder", f"{name}.{kind}").read_bytes().startswith(begins) for name in names)
    assert all(f"wrote folder/{name}.{kind}\n" in err for name in names)


def test_what_else_is_in_the_folder_stays(run):
    os.mkdir("folder")
    Path("folder/mine.txt").write_text("mine")
    Path("folder/router.png").write_text("old")
    assert run("a.txt", "--figures", "folder")[0] == 0
    assert Path("folder/mine.txt").read_text() == "mine"
    assert Path("folder/router.png").read_bytes().startswith(b"\x89PNG")


def test_files_of_one_name_and_hostile_names_are_told_apart(run):
    os.mkdir("other")
    Path("other/a.txt").write_text("1 + 1 = 2\n")
    hostile = "<script>alert(1)<\u2215script>\u202e.txt"
    Path(hostile).write_text("</script><script>alert(2)</script>")
    broken = os.fsdecode(b"half\xff.txt")
    Path(broken).write_text("x")
    status, _, _ = run("a.txt", "other/a.txt", hostile, broken, "--html", "p.html", "--csv", "t.csv", "--figures", "f")
    shown = parsed(Path("p.html").read_text(encoding="utf-8"))
    assert status == 0
    assert [row[0] for row in shown.tables["The texts"][1:]] == [
        "a.txt", "other/a.txt", "<script>alert(1)<\u2215script>\\u202e", "half\\udcff"]  # fmt: skip
    assert len(shown.scripts) == 2 and "alert" not in shown.scripts[0][1] + shown.scripts[1][1]
    assert "tokens_3_script_alert_1_script_u202e.png" in os.listdir("f")
    assert "half\\udcff,0,0," in Path("t.csv").read_text(encoding="utf-8")


def test_long_texts_are_read_in_windows_and_the_page_says_so(run):
    run("a.txt", "b.txt", "--html", "p.html", "--window", "32")
    shown = parsed(Path("p.html").read_text(encoding="utf-8"))
    assert "Texts longer than 32 tokens are read in windows of that length which overlap by half." in shown.text
    windows = {row[0]: int(row[3]) for row in shown.tables["The texts"][1:]}
    assert windows["a"] == 1 < windows["b"]


# ---- mistakes

MISTAKES = {
    "figure into nowhere": (["--figure", "no/x.png"], "no/x.png: there is no folder no"),
    "figure of no kind": (["--figure", "x.doc"], "x.doc: the name must end in .png"),
    "figure that is a folder": (["--figure", "f.png"], "f.png: is a folder"),
    "csv into nowhere": (["--csv", "no/x.csv"], "no/x.csv: there is no folder no"),
    "tokens into nowhere": (["--tokens-csv", "no/x.csv"], "no/x.csv: there is no folder no"),
    "page into nowhere": (["--html", "no/x.html"], "no/x.html: there is no folder no"),
    "page of no kind": (["--html", "x.pdf"], "x.pdf: the name must end in .html"),
    "figures into nowhere": (["--figures", "no/where"], "no/where: there is no folder no"),
    "figures into a file": (["--figures", "a.txt"], "a.txt: is a file, not a folder"),
    "figures of no kind": (["--figures", "x", "--format", "gif"], "argument --format: invalid choice: 'gif'"),
    "format of nothing": (["--format", "pdf"], "--format pdf says how to write --figures, which was not given"),
    "two into one file": (["--csv", "x", "--tokens-csv", "./x"], "--tokens-csv x: is the file of --csv, too"),
    "over its own text": (["a.txt", "--csv", "a.txt"], "--csv a.txt: is a text to read"),
    "negative seed": (["--seed", "-1"], "--seed must be at least 0, not -1"),
    "empty text": (["empty.txt", "--html", "x.html"], "empty.txt: the file is empty"),
    "not UTF-8": (["binary.txt", "--html", "x.html"], "binary.txt: not UTF-8 text (byte 0x80 at offset 1)"),
    "window too long": (["a.txt", "--html", "x.html", "--window", "513"], "--window must be between 2 and"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_before_the_work_is_done(run, monkeypatch, name):
    Path("empty.txt").write_bytes(b"")
    Path("binary.txt").write_bytes(b"a\x80\x81")
    os.mkdir("f.png")
    if "window" not in name:
        monkeypatch.setattr(route, "read_texts", lambda *args: pytest.fail("the work began"))
    before = sorted(os.listdir())
    arguments, message = MISTAKES[name]
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert re.fullmatch(r"minimoe: error: [^\n]+\n", err), err
    assert message in err and sorted(os.listdir()) == before


def test_models_with_nothing_to_route_or_to_spare_are_refused_before_reading(run, monkeypatch):
    monkeypatch.setattr(route, "read_texts", lambda *args: pytest.fail("the work began"))
    _, _, err = run("a.txt", "--html", "x.html", model="dense")
    assert "dense: a dense model has no router: there is nothing to route" in err
    _, _, err = run("a.txt", "--switch-off", model="every")
    assert "--switch-off: every token uses all 2 experts: none can be switched off" in err


def test_places_that_cannot_be_written_are_refused(run, monkeypatch):
    monkeypatch.setattr(route, "read_texts", lambda *args: pytest.fail("the work began"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # whoever runs the tests may be allowed to write
    for flag, path in (("--html", "x.html"), ("--figures", "folder"), ("--csv", "x.csv"), ("--tokens-csv", "x.csv")):
        status, _, err = run("a.txt", flag, path)
        assert status == 2 and f"{path}: cannot be written: permission denied" in err


def test_nothing_is_written_if_anything_fails(run, monkeypatch):
    def fall(plates, step):
        raise ValueError("no page today")

    Path("t.csv").write_text("old")
    before = sorted(os.listdir())
    monkeypatch.setattr(page, "page_of", fall)
    status, _, err = run("a.txt", "--csv", "t.csv", "--tokens-csv", "u.csv", "--html", "p.html", "--figures", "f")
    assert (status, err) == (2, "minimoe: error: no page today\n")
    assert Path("t.csv").read_text() == "old" and sorted(os.listdir()) == before


def test_nothing_is_written_if_the_disk_is_full_at_the_last_file(run, monkeypatch):
    def write(outputs, path, data):
        if path.name == "tokens_1_a.png":
            raise OSError(28, "No space left on device")
        return whole(outputs, path, data)

    Path("p.html").write_text("old")
    before, whole = sorted(os.listdir()), files.Outputs.write
    monkeypatch.setattr(files.Outputs, "write", write)
    status, _, err = run("a.txt", "--csv", "t.csv", "--html", "p.html", "--figures", "f")
    assert status == 2 and "No space left on device" in err
    assert Path("p.html").read_text() == "old" and sorted(os.listdir()) == before


def test_a_pipe_is_written_to_as_it_is(folders, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    command = [sys.executable, "-m", "minimoe", "route", str(tmp_path / "a.txt"), "--csv", "/dev/stderr", "--json"]
    command += ["--model", str(folders / "tiny"), "--backend", "numpy"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and json.loads(done.stdout)["experts"] == 8
    assert done.stderr.startswith("text,layer,expert,tokens")
