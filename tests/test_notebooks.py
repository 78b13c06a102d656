"""The notebooks as they are committed: complete, in order, without errors; their solutions solve, and each still runs.

Most tests read the files, and run of a notebook only the statements that its exercises need. To run the notebooks from
top to bottom takes minutes and a Jupyter kernel: `pytest -m notebooks` does that.
"""

from __future__ import annotations

import ast
import contextlib
import html
import importlib.util
import io
import json
import os
import re
import symtable
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from minimoe.stepper.code import DIALECTS, sources

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
TITLES = (
    "tour", "norms_and_positions", "attention", "kv_cache", "gate", "experts", "one_tokens_journey", "routing_atlas",
    "gradients", "balance", "dialects", "why_sparse", "verify_your_own",
)  # fmt: skip
LIMIT = 900_000  # bytes of a notebook
SECONDS = 180  # a minute is promised; machines are noisy, and the first kernel compiles what Numba has not cached
MISSING = [name for name in ("ipykernel", "nbclient", "nbformat") if importlib.util.find_spec(name) is None]

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
needs_jupyter = [
    pytest.mark.notebooks,
    pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not installed: pip install -e '.[notebooks]'"),
]


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [{**cell, "source": "".join(cell["source"])} for cell in found if cell["cell_type"] == kind]


def prose(path: Path) -> str:
    return "\n\n".join(cell["source"] for cell in cells(path, "markdown"))


def shown(cell: dict[str, Any]) -> str:
    """What a cell put out as text, HTML included; pictures left out."""
    parts = []
    for output in cell["outputs"]:
        parts += [output.get("text", ""), *output.get("traceback", [])]
        parts += [text for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join("".join(part) for part in parts)


# ---- what stands in the files


def test_the_course_is_complete():
    assert [path.stem for path in NOTEBOOKS] == [f"{i:02d}_{title}" for i, title in enumerate(TITLES)]


@each
def test_required_sections(path):
    first, text = cells(path, "markdown")[0]["source"], prose(path)
    assert re.match(rf"# {path.stem[:2]} · \w", first)
    for section in ("**Goal", "**You need", "**Time", "**Before"):
        assert section in first or (section == "**Before" and path == NOTEBOOKS[0]), section
    for section in ("## Check yourself", "<details><summary>Solutions</summary>", "</details>", "**Think further"):
        assert section in text, section


@each
def test_badges_open_this_notebook(path):
    line = cells(path, "markdown")[0]["source"].splitlines()[1]
    assert re.findall(r"\[!\[[^]]+\]\([^)]+\)\]\(([^)]+)\)", line) == [
        f"https://colab.research.google.com/github/minimoe/minimoe/blob/main/notebooks/{path.name}",
        f"https://mybinder.org/v2/gh/minimoe/minimoe/main?labpath=notebooks%2F{path.name}",
    ]
    assert cells(path, "markdown")[0]["source"].splitlines()[2].startswith("(Colab opens this page alone: ")


@each
def test_each_leads_to_the_next(path):
    following = re.findall(r"^Next: \[(\d\d) · .+\]\((.+)\)$", prose(path), re.M)
    i = int(path.stem[:2]) + 1
    assert following == ([(f"{i:02d}", f"{i:02d}_{TITLES[i]}.ipynb")] if i < len(TITLES) else [])


@each
def test_every_heading_begins_a_slide(path):
    headings = [cell for cell in cells(path, "markdown") if cell["source"].startswith(("# ", "## "))]
    assert {cell["metadata"].get("slideshow", {}).get("slide_type") for cell in headings} == {"slide"}


@each
def test_committed_with_outputs_in_order_and_without_errors(path):
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]


@each
def test_outputs_tell_nothing_of_the_machine_they_came_from(path):
    for cell in cells(path, "code"):
        text = shown(cell)
        assert "Traceback (most recent call last)" not in text
        assert "site-packages" not in text
        places = re.search(r"(?<![\w.<:/])/(?:home|root|work|tmp|usr|opt|mnt|srv|var|Users|content)/\S+", text)
        assert places is None, places
        address = re.search(r"<[^<>]* at 0x[0-9a-f]{6,}>", text)
        assert address is None, address


def calls(node: ast.AST) -> set[str]:
    """The names of the functions that a piece of code calls."""
    return {
        getattr(n.func, "attr", getattr(n.func, "id", "")) for n in ast.walk(node) if isinstance(n, ast.Call)
    }  # fmt: skip


@each
def test_code_that_is_shown_is_the_code_as_it_is(path):
    """Cells that print a part of the package's sources are run again, and must print the same."""
    before: list[ast.stmt] = []
    for cell in cells(path, "code"):
        body = ast.parse(cell["source"]).body
        names = set().union(*map(reads, body)) if body else set()
        kept = [node for node in needed(before, names) if isinstance(node, ast.Assign)]  # code = sources(…)
        shows = any(calls(node) & {"getsource", "sources", "kernels"} for node in [*body, *kept])
        if shows and any("print" in calls(node) for node in body):
            space: dict[str, Any] = {"__name__": "__main__"}
            with contextlib.redirect_stdout(io.StringIO()):
                _run(needed(before, names), space)
            with contextlib.redirect_stdout(io.StringIO()) as out:
                _run(body, space)
            assert out.getvalue() == "".join("".join(o.get("text", "")) for o in cell["outputs"])
        before += body


@each
def test_code_in_the_steppers_pages_is_the_code_as_it_is(path):
    for page in map(shown, cells(path, "code")):
        for op, dialects in re.findall(r"code of <code>([\w.]+)</code>(.*?)</details>", page, re.S):
            found = dict(re.findall(r"<b>(.+?)</b><pre[^>]*>(.*?)</pre>", dialects, re.S))
            wanted = {DIALECTS[name]: html.escape(text) for name, text in sources(*op.split(".")).items()}
            assert found == wanted


@each
def test_small_enough_to_read_in_a_browser(path):
    assert path.stat().st_size <= LIMIT


@pytest.mark.parametrize("path", [*NOTEBOOKS, FOLDER / "README.md"], ids=lambda path: path.stem)
def test_every_relative_link_resolves(path):
    text = prose(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert target.startswith(("https://", "http://")) or (FOLDER / target).exists(), target


def test_the_syllabus_lists_every_notebook_by_its_title():
    table = re.findall(r"^\| \[(.+?)\]\((.+?)\) \|", (FOLDER / "README.md").read_text(encoding="utf-8"), re.M)
    titles = [cells(path, "markdown")[0]["source"].splitlines()[0].removeprefix("# ") for path in NOTEBOOKS]
    assert table == [(title, path.name) for title, path in zip(titles, NOTEBOOKS, strict=True)]


# ---- exercises and solutions


def functions(source: str) -> dict[str, ast.stmt]:
    return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


def exercises(path: Path) -> tuple[list[ast.stmt], list[dict[str, Any]], dict[str, ast.stmt]]:
    """The statements of the notebook before its exercises, the cells of these, and the solutions by name."""
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    start = next(i for i, cell in enumerate(found) if "## Check yourself" in "".join(cell["source"]))
    code = [{**cell, "source": "".join(cell["source"]), "at": i} for i, cell in enumerate(found)]
    code = [cell for cell in code if cell["cell_type"] == "code"]
    solutions: dict[str, ast.stmt] = {}
    for block in re.findall(r"```python\n(.*?)```", prose(path).partition("<summary>Solutions</summary>")[2], re.S):
        solutions |= functions(block)
    before = [node for cell in code if cell["at"] < start for node in ast.parse(cell["source"]).body]
    return before, [cell for cell in code if cell["at"] > start], solutions


def is_stub(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef) and ast.unparse(node.body[-1]) == "return None"


def reads(node: ast.stmt) -> set[str]:
    """The names of the notebook that a statement uses, also inside of functions; their own variables left out."""
    top = symtable.symtable(ast.unparse(node), "<statement>", "exec")
    found, inner = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_referenced()}, top.get_children()
    while inner:
        table = inner.pop()
        found |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
        inner += table.get_children()
    return found


def gives(node: ast.stmt) -> set[str]:
    """The names that get a value from a statement."""
    top = symtable.symtable(ast.unparse(node), "<statement>", "exec")
    return {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()}


def changes(node: ast.stmt) -> set[str]:
    """The names whose value a statement changes in place, as far as that shows."""
    found = set()
    for n in ast.walk(node):
        if isinstance(n, ast.Subscript | ast.Attribute):
            stored = isinstance(n.ctx, ast.Store) or getattr(n, "attr", "") in ("append", "extend", "update", "add")
            found |= {m.id for m in ast.walk(n.value) if isinstance(m, ast.Name)} if stored else set()
    return found


def needed(statements: Iterable[ast.stmt], wanted: set[str]) -> list[ast.stmt]:
    """Those of the statements on which the values of the names depend."""
    found, wanted = [], set(wanted)
    for node in reversed(list(statements)):
        if (gives(node) | changes(node)) & wanted:
            found.append(node)
            if isinstance(node, ast.Assign | ast.FunctionDef | ast.Import | ast.ImportFrom):
                wanted -= gives(node)
            wanted |= reads(node)
    return found[::-1]


def solved(text: str) -> bool:
    """Whether an exercise says that the answer is right: "right", "3 of 3 cases", and nothing that is not."""
    counts = re.findall(r"\b(\d+) of (\d+) cases\b", text)
    says_right = "right" in text or bool(counts)
    return (
        says_right
        and all(a == b != "0" for a, b in counts)
        and not re.search(r"\b(wrong|FAIL|nothing returned)\b", text)
    )


@each
def test_every_exercise_has_a_stub_and_a_solution(path):
    _, tasks, solutions = exercises(path)
    stubs = {name for cell in tasks for name, node in functions(cell["source"]).items() if is_stub(node)}
    assert stubs == set(solutions)
    assert 2 <= len(stubs) <= 4


@each
def test_stubs_are_told_that_they_are_not_right_yet(path):
    for cell in exercises(path)[1]:
        if any(is_stub(node) for node in ast.parse(cell["source"]).body):
            assert shown(cell).strip()
            assert not solved(shown(cell))


@each
def test_solutions_solve(path):
    before, tasks, solutions = exercises(path)
    bodies = [[solutions.get(getattr(n, "name", ""), n) for n in ast.parse(cell["source"]).body] for cell in tasks]
    wanted = set().union(*(reads(node) for body in bodies for node in body))
    space: dict[str, Any] = {"__name__": "__main__", "display": print}
    with warnings.catch_warnings(), matplotlib.rc_context({"backend": "Agg"}):
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(io.StringIO()):
            _run(needed(before, wanted), space)
        for cell, body in zip(tasks, bodies, strict=True):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                _run(body, space)
            if any(is_stub(node) for node in ast.parse(cell["source"]).body):
                assert solved(out.getvalue()), out.getvalue()


def _run(statements: list[ast.stmt], space: dict[str, Any]) -> None:
    exec(compile(ast.fix_missing_locations(ast.Module(statements, [])), "<notebook>", "exec"), space)


# ---- with Jupyter


class TestInAKernel:
    pytestmark = needs_jupyter

    @each
    def test_valid_format(self, path):
        import nbformat

        nbformat.validate(nbformat.read(path, as_version=4))

    # What Jupyter's own packages leave open or deprecate is theirs.
    @pytest.mark.filterwarnings("default")
    @each
    def test_runs_from_top_to_bottom(self, path, tmp_path, monkeypatch):
        import nbformat
        from nbclient import NotebookClient

        # From another folder, without a display; the package is this one, also where it is not installed.
        monkeypatch.delenv("DISPLAY", raising=False)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(":"))
        notebook = nbformat.read(path, as_version=4)
        resources = {"metadata": {"path": str(tmp_path)}}
        started = time.perf_counter()
        NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=resources).execute()
        taken = time.perf_counter() - started
        assert not list(tmp_path.iterdir()), "a notebook leaves files in the folder it runs in"
        errors = [shown(cell) for cell in notebook.cells if cell.cell_type == "code"
                  for output in cell.outputs if output.get("name") == "stderr"]  # fmt: skip
        assert not errors
        assert taken < SECONDS, f"{taken:.0f} s"
