"""The bundled texts are what they claim to be."""

import contextlib
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from minimoe import texts


def test_every_domain_has_a_text_of_two_to_four_kilobytes_and_a_prompt() -> None:
    assert tuple(texts.load()) == texts.names() == tuple(texts.prompts())
    for domain, text in texts.load().items():
        assert 1900 <= len(text) <= 4096, domain
        assert text.isascii() and text.endswith("\n")


def test_the_python_text_passes_its_own_checks() -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(texts.load()["python"], "python.txt", "exec"), {"__name__": "__main__"})
    assert printed.getvalue() == "all checks passed\n"


def test_the_c_text_compiles_without_a_warning(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source = tmp_path / "text.c"
    source.write_text(texts.load()["c"])
    done = subprocess.run([compiler, "-Wall", "-Wextra", "-fsyntax-only", source], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_json_text_adds_up() -> None:
    record = json.loads(texts.load()["json"])
    items = record["items"]
    assert all(item["crates"] * item["crate_mass"] == item["mass"] for item in items)
    assert all(part["manifest"] == record["manifest"] for part in items + record["unloading"])
    assert sum(item["crates"] for item in items) == record["total_crates"]
    assert sum(item["mass"] for item in items) == record["total_mass"]
    left = record["total_crates"]
    for step in record["unloading"]:
        left -= step["crates"]
        assert step["left"] == left


def test_every_equation_of_the_arithmetic_text_without_unknowns_holds() -> None:
    checked = 0
    for line in texts.load()["arithmetic"].splitlines():
        sides = re.sub(r"^check: ", "", re.split(r": write| rest", line)[0]).replace("/", "//").split(" = ")
        if len(sides) > 1 and all(re.fullmatch(r"[-+*/() \d]+", side) for side in sides):
            assert len({eval(side) for side in sides}) == 1, line
            checked += 1
    assert checked > 50
