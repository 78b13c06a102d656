"""The command line: what it prints is what the library says, and every mistake is one line."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import minimoe
from minimoe import cli, golden_tiny, texts
from minimoe.cli import demo, route
from minimoe.config import PRESETS
from minimoe.model import BUNDLED, load
from tests import small

TEXT = "def add(a, b):\n    return a + b\n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints: a sparse one with golden outputs, a dense one, one without tokenizer, one with NaN and Inf."""
    base = tmp_path_factory.mktemp("models")

    def spoil(tree):
        tree.layers[1].attention.wq[2, 3] = np.nan
        tree.norm[4] = np.inf

    golden_tiny.make(small.save(base / "tiny"))
    small.save(base / "dense", small.DENSE)
    small.save(base / "mute", tokenizer=False)
    small.save(base / "spoilt", change=spoil)
    return base


@pytest.fixture
def minimoe_command(folders, tmp_path, capsys, monkeypatch):
    """Run a command in a folder of its own, beside the checkpoints; return status, stdout and stderr."""
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    for name in folders.iterdir():
        os.symlink(name, tmp_path / name.name)
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text("The router sends every token to two experts. " * 3)

    def run(*arguments, backend="numpy"):
        arguments = [*arguments, "--backend", backend] if backend else list(arguments)
        try:
            status = cli.main(arguments)
        except SystemExit as stopped:  # argparse's --help
            status = stopped.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def tiny(folders):
    return load(folders / "tiny", backend="numpy")


def process(*arguments, **settings):
    """Run a command in a process of its own."""
    command = [sys.executable, "-m", "minimoe", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **settings)


# ---- what every command does


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_has_help(minimoe_command, command):
    status, out, err = minimoe_command(command, "--help", backend=None)
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: minimoe {command}")
    assert ("--backend" in out) == (command not in ("convert", "init"))  # which compute nothing


def test_the_command_without_a_command_shows_help(minimoe_command):
    status, out, _ = minimoe_command(backend=None)
    assert status == 0 and all(name in out for name in cli.COMMANDS)


def test_python_m_minimoe_is_the_command():
    done = process("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"minimoe {minimoe.__version__}\n", "")


def test_help_and_version_do_not_load_the_libraries():
    code = "import sys, minimoe.cli as c; c.main(['--version']); sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def write(name, data):
    Path(name).write_bytes(data)
    return name


MISTAKES = {
    "no such command": (["fly"], "invalid choice: 'fly'"),
    "unknown flag": (["eval", "a.txt", "--colour"], "unrecognized arguments: --colour"),
    "abbreviated flag": (["eval", "a.txt", "--mod", "tiny"], "unrecognized arguments: --mod"),
    "no file": (["eval"], "FILE"),
    "flag that is no number": (["generate", "x", "--top-p", "most"], "--top-p: invalid float value: 'most'"),
    "flag out of range": (["generate", "x", "--model", "./tiny", "--top-p", "2"], "top_p must be in (0, 1], not 2.0"),
    "negative seed": (["generate", "x", "--model", "./tiny", "--seed", "-1"], "--seed must be at least 0, not -1"),
    "negative tokens": (["generate", "x", "--model", "./tiny", "--max-new-tokens", "-1"], "max_new_tokens must be"),
    "missing folder": (["generate", "x", "--model", "nowhere"], "nowhere: there is no such folder"),
    "folder that is a file": (["generate", "x", "--model", "a.txt"], "a.txt: is a file"),
    "folder without model": (["generate", "x", "--model", "."], "there is no config.json"),
    "no tokenizer": (["generate", "x", "--model", "mute"], "mute: there is no tokenizer.model"),
    "missing text": (["eval", "nothing.txt", "--model", "./tiny"], "nothing.txt: No such file or directory"),
    "text that is a folder": (["eval", "tiny", "--model", "./tiny"], "tiny: Is a directory"),
    "empty text": (["eval", "empty.txt", "--model", "./tiny"], "empty.txt: the file is empty"),
    "binary": (["route", "binary.txt", "--model", "./tiny"], "binary.txt: not UTF-8 text (byte 0x80 at offset 1)"),
    "zero bytes": (["route", "zero.txt", "--model", "./tiny"], "zero.txt: not a text file (a zero byte at offset 0)"),
    "same text twice": (["eval", "a.txt", "a.txt", "--model", "./tiny"], "a.txt: given more than once"),
    "dense": (["route", "--model", "dense"], "dense: a dense model has no router: there is nothing to route"),
    "window too long": (["eval", "a.txt", "--model", "./tiny", "--window", "513"], "--window must be between 2 and"),
    "window too short": (["route", "--model", "./tiny", "--window", "1"], "--window must be between 2 and"),
    "demo into nowhere": (["demo", "--out", "no"], "no/minimoe_demo.png: there is no folder no"),
}
NO_BACKEND = {
    "unknown preset": (["info", "--preset", "giant"], "unknown preset 'giant'; there are tiny, mistral-7b"),
    "preset and folder": (["info", "tiny", "--preset", "tiny"], "--preset tiny has no files"),
    "no context": (["info", "tiny", "--context", "0"], "--context must be at least 1, not 0"),
    "info on nothing": (["info", "nowhere"], "nowhere: there is no such folder"),
    "unknown backend": (["eval", "a.txt", "--model", "./tiny", "--backend", "abacus"], "unknown backend 'abacus'"),
    "unknown backend of info": (["info", "--backend", "abacus"], "unknown backend 'abacus'"),
}


@pytest.mark.parametrize("name", [*MISTAKES, *NO_BACKEND])
def test_mistakes_are_one_line_and_status_2(minimoe_command, name):
    write("empty.txt", b"")
    write("binary.txt", b"a\x80\x81")
    write("zero.txt", bytes(10))
    os.mkdir("f.png")
    arguments, message = (MISTAKES | NO_BACKEND)[name]
    status, out, err = minimoe_command(*arguments, backend="numpy" if name in MISTAKES else None)
    assert (status, out) == (2, "")
    assert re.fullmatch(r"minimoe: error: [^\n]+\n", err), err
    assert message in err


def test_cuda_without_a_device_says_what_is_missing(minimoe_command):
    if importlib.util.find_spec("cupy"):
        pytest.skip("there is CuPy")
    status, _, err = minimoe_command("eval", "a.txt", "--model", "./tiny", backend="cuda")
    assert status == 2 and "pip install" in err


@pytest.mark.parametrize("error", [ValueError("a\nb"), MemoryError(), FloatingPointError("nan"), OSError(28, "full")])
def test_whatever_a_command_raises_is_one_line(monkeypatch, capsys, error):
    def fall(args):
        raise error

    monkeypatch.setattr(route, "run", fall)
    assert cli.main(["route"]) == 2
    assert re.fullmatch(r"minimoe: error: [^\n]+\n", capsys.readouterr().err)


def test_ctrl_c_is_quiet(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(route, "run", interrupted)
    assert cli.main(["route"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_reader_that_has_enough_is_no_error():
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "minimoe", "info", "--preset", "tiny"]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_terminal_without_unicode_gets_what_it_can_show(folders):
    settings = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = process("route", "--model", str(folders / "tiny"), "--backend", "numpy", env=settings)
    assert (done.returncode, done.stderr) == (0, "")


# ---- generate


def test_generate_prints_what_the_model_generates(minimoe_command, tiny):
    expected = tiny.generate("def add", max_new_tokens=9, temperature=0.8, top_p=0.9, seed=3)
    flags = "--model ./tiny --max-new-tokens 9 --temperature 0.8 --top-p 0.9 --seed 3".split()
    for extra in ([], ["--stream"], ["--no-stream"]):
        assert minimoe_command("generate", "def add", *flags, *extra) == (0, expected + "\n", "")
    status, out, err = minimoe_command("generate", "def add", *flags, "--json")
    told = json.loads(out)
    assert (status, err) == (0, "")
    assert (told["prompt"], told["text"], told["backend"]) == ("def add", expected, "numpy")


def test_generate_reads_a_prompt_from_standard_input(folders, tiny):
    flags = ["--model", str(folders / "tiny"), "--backend", "numpy", "--max-new-tokens", "5"]
    expected = tiny.generate("a\nb", max_new_tokens=5)
    assert process("generate", "-", *flags, input="a\nb").stdout == expected + "\n"
    done = subprocess.run(
        [sys.executable, "-m", "minimoe", "generate", "-", *flags], input=b"\xff", capture_output=True, check=False
    )
    assert done.returncode == 2 and done.stderr.startswith(b"minimoe: error: ") and done.stderr.count(b"\n") == 1


def test_an_empty_prompt_is_bos_alone_and_broken_bytes_are_refused(minimoe_command, tiny):
    expected = tiny.generate("", max_new_tokens=4)
    flags = ["--model", "./tiny", "--max-new-tokens", "4"]
    assert minimoe_command("generate", "", *flags) == (0, expected + "\n", "")
    status, _, err = minimoe_command("generate", "\udcff", *flags)
    assert (status, err) == (2, "minimoe: error: PROMPT is not valid UTF-8\n")


# ---- eval


def test_eval_gives_the_loss_and_the_ends_of_the_shares(minimoe_command, tiny):
    status, out, err = minimoe_command("eval", "a.txt", "b.txt", "--model", "./tiny", "--json")
    told = json.loads(out)
    assert (status, err) == (0, "")
    losses, routed, num_bytes = [], [], 0
    for name, told_text in zip(("a", "b"), told["texts"], strict=True):
        text = Path(f"{name}.txt").read_text()
        tokens = np.array(tiny.tokenizer.encode(text))
        trace = tiny.trace(tokens)
        logits = trace["logits"][0].astype(np.float64)
        loss = np.log(np.exp(logits).sum(axis=1))[:-1] - logits[np.arange(tokens.size - 1), tokens[1:]]
        assert told_text["name"] == name
        assert told_text["loss"] == pytest.approx(loss.mean(), rel=1e-5)
        assert told_text["perplexity"] == pytest.approx(np.exp(loss.mean()), rel=1e-4)
        assert told_text["bits_per_byte"] == pytest.approx(loss.sum() / np.log(2) / len(text.encode()), rel=1e-5)
        assert told_text["in_windows"] is False
        losses, num_bytes = [*losses, *loss], num_bytes + len(text.encode())
        routed.append(trace.routing.ids[:, 1:])
    assert told["all"]["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert told["all"]["bits_per_byte"] == pytest.approx(np.sum(losses) / np.log(2) / num_bytes, rel=1e-5)
    for layer, ends in zip(np.concatenate(routed, axis=1), told["balance"], strict=True):
        counts = Counter(layer.reshape(-1).tolist())
        each = [counts[e] / layer.size for e in range(8)]
        assert ends["least"]["share"] == pytest.approx(min(each)) == pytest.approx(each[ends["least"]["expert"]])
        assert ends["most"]["share"] == pytest.approx(max(each)) == pytest.approx(each[ends["most"]["expert"]])


def test_eval_says_that_long_texts_are_read_in_windows(minimoe_command):
    _, out, _ = minimoe_command("eval", "a.txt", "b.txt", "--model", "./tiny", "--window", "32")
    assert "longer than 32 tokens, read in windows that overlap by half: b" in out
    assert re.search(r"^a +\d+ +32 +\d+\.\d{4} +[\d,.]+ +\d+\.\d{4}$", out, re.MULTILINE)
    assert re.search(r"^all ", out, re.MULTILINE)
    assert "windows" not in minimoe_command("eval", "b.txt", "--model", "./tiny")[1]


def test_files_of_the_same_name_are_told_apart_by_their_paths(minimoe_command):
    os.mkdir("other")
    write("other/a.txt", b"1 + 1 = 2\n")
    _, out, _ = minimoe_command("eval", "a.txt", "other/a.txt", "b.txt", "--model", "./tiny", "--json")
    assert [one["name"] for one in json.loads(out)["texts"]] == ["a.txt", "other/a.txt", "b"]


def test_eval_of_one_token_and_of_a_dense_model(minimoe_command):
    write("one.txt", b"{")
    status, out, _ = minimoe_command("eval", "one.txt", "--model", "dense", "--json")
    told = json.loads(out)
    assert status == 0 and told["balance"] == [] and told["texts"][0]["tokens"] >= 1
    status, out, _ = minimoe_command("eval", "one.txt", "--model", "dense")
    assert status == 0 and "layer" not in out


# ---- info


@pytest.mark.parametrize("name", list(PRESETS))
def test_info_of_presets_gives_the_configs_figures(minimoe_command, name):
    status, out, _ = minimoe_command("info", "--preset", name, "--json", "--context", "100", backend=None)
    told, config = json.loads(out), PRESETS[name]
    assert status == 0
    assert told["parameters"] == config.num_parameters()
    assert told["active_parameters"] == config.num_active_parameters()
    assert told["kv_cache_bytes_per_token"] == config.kv_bytes_per_token()
    assert told["flops_per_token"] == config.flops_per_token(100)
    _, out, _ = minimoe_command("info", "--preset", name, backend=None)
    assert f"{config.num_parameters():,}" in out and f"{config.num_active_parameters():,}" in out


def test_info_of_mixtral_is_what_the_literature_says(minimoe_command):
    _, out, _ = minimoe_command("info", "--preset", "mixtral-8x7b", backend=None)
    assert "46,702,792,704" in out and "12,879,925,248" in out and "131,072 bytes per token" in out


def test_info_of_a_folder_reads_its_headers(minimoe_command):
    status, out, _ = minimoe_command("info", "tiny", "--json", backend=None)
    told = json.loads(out)
    assert status == 0
    assert told["parameters"] == told["stored_parameters"] == small.SPARSE.num_parameters()
    assert told["dtypes"] == {"bfloat16": told["tensors"]}
    assert told["bytes_on_disk"] == Path("tiny/model.safetensors").stat().st_size
    assert told["tokenizer"] is True
    assert told["kv_cache_bytes_per_token"] == small.SPARSE.kv_bytes_per_token(2)
    _, out, _ = minimoe_command("info", "dense", backend=None)
    assert "dense (Mistral or Llama)" in out


def test_verify_reads_everything_and_names_what_is_wrong(minimoe_command):
    status, out, _ = minimoe_command("info", "tiny", "--verify", backend=None)
    assert status == 0 and "without NaN or Inf" in out
    status, out, _ = minimoe_command("info", "spoilt", "--verify", backend=None)
    assert status == 1
    assert "model.layers.1.self_attn.q_proj.weight holds 1 NaN, the first at [2, 3]" in out
    assert "model.norm.weight holds 1 Inf, the first at [4]" in out
    status, out, _ = minimoe_command("info", "spoilt", "--verify", "--json", backend=None)
    assert status == 1 and len(json.loads(out)["problems"]) == 2


def test_info_shows_which_op_is_whose(minimoe_command):
    status, out, _ = minimoe_command("info", "--backends", "--json", backend=None)
    cells = json.loads(out)["backends"]
    assert status == 0 and set(cells) == {"numpy", "numba", "cuda"}
    assert set(cells["numpy"].values()) == {"reference"}
    assert cells["numba"]["rmsnorm.forward"] == "numba_cpu"
    _, out, _ = minimoe_command("info", "--backends", backend=None)
    assert re.search(r"^experts\.forward +reference +\w+", out, re.MULTILINE)
    _, out, _ = minimoe_command("info")
    assert out.splitlines()[0].split() == ["op", "numpy"]


# ---- demo


@pytest.fixture
def bundled(folders, monkeypatch):
    """Let the small checkpoint stand in for the bundled one."""
    monkeypatch.setattr("minimoe.model.BUNDLED", folders)
    monkeypatch.setattr(demo, "BUNDLED", folders)


@pytest.mark.usefixtures("bundled")
def test_demo_continues_colours_draws_and_compares(minimoe_command, monkeypatch, tiny):
    status, out, err = minimoe_command("demo", "--max-new-tokens", "6")
    assert (status, err) == (0, "")
    assert Path("minimoe_demo.png").read_bytes().startswith(b"\x89PNG")
    assert out.count("‖") == 7  # once in the explanation, once per prompt
    assert re.search(r"error ÷ bound = [01]\.\d\d, within it", out)
    assert re.search(r"expert choices as in float64: [\d,]+ of 1,152", out)
    # python's prompt, with the numbers of layer L // 2
    prompt = texts.prompts()["python"]
    ids = tiny.trace(prompt).routing.ids[1, 1:, 0]
    block = out.split("\npython\n")[1].split("‖")[0]
    assert ["⁰¹²³⁴⁵⁶⁷".index(digit) for digit in re.findall("[⁰¹²³⁴⁵⁶⁷]", block)] == ids.tolist()
    assert re.sub("[⁰¹²³⁴⁵⁶⁷↵]", "", block) == prompt
    monkeypatch.setenv("FORCE_COLOR", "1")
    _, out, _ = minimoe_command("demo", "--max-new-tokens", "6")
    assert "\x1b[48;5;" in out and "⁰" not in out


@pytest.mark.usefixtures("bundled")
def test_demo_tells_the_same_in_json_and_a_seed_fixes_it(minimoe_command):
    def told(seed):
        return json.loads(minimoe_command("demo", "--max-new-tokens", "6", "--json", "--seed", seed)[1])

    one, same, other = told("1"), told("1"), told("2")
    assert one == same and one["continuations"] != other["continuations"]
    assert list(one["continuations"]) == list(texts.names())
    assert one["golden"]["error_over_bound"] <= 1


@pytest.mark.usefixtures("bundled")
def test_demo_continuations_are_those_of_each_prompt_alone(tiny):
    for domain, one in demo.continuations(tiny, 5, 0).items():
        prompt = tiny.tokenizer.encode(texts.prompts()[domain])
        assert one.tokens[: one.prompt_length] == prompt
        assert one.text == tiny.tokenizer.decode(one.tokens[len(prompt) :], continuing=True)
        np.testing.assert_array_equal(one.ids, tiny.trace(one.tokens).routing.ids)


@pytest.mark.skipif(not (BUNDLED / "tiny" / "config.json").exists(), reason="the bundled model is not trained yet")
def test_the_demo_of_the_bundled_model(tmp_path):
    done = process("demo", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "within it" in done.stdout
    assert (tmp_path / "minimoe_demo.png").stat().st_size > 50_000
