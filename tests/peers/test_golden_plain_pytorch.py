"""The file-based example: a Mixtral in plain PyTorch answers the kit, and breaking it is noticed."""

import ast
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from minimoe.golden import verify
from minimoe.golden.examples import plain_pytorch
from minimoe.golden.external import check_program
from tests.peers.kit import CASES, KIT

pytestmark = pytest.mark.peers

PROGRAM = Path(plain_pytorch.__file__)
MIXTRAL = [case for case in CASES if "grok" not in case.tags]
OFFERED = {case.id for case in MIXTRAL if case.call in plain_pytorch.OFFERED}
# What to change in the program, and a case of an op (or the block) that must notice.
BREAKS = [
    ("distance < window", "distance <= window", "attention/window-slides"),
    ("repeat_interleave(G, dim=2), v.repeat_interleave(G, dim=2)", "repeat(1, 1, G, 1), v.repeat(1, 1, G, 1)",
     "attention/grouped"),
    ("/ math.sqrt(q.shape[-1])", "", "attention/multi-head"),
    (".where(visible.any(dim=-1, keepdim=True), 0)", "", "attention/nothing-visible"),
    ("torch.cat([a * c - b * s, b * c + a * s], dim=-1)", "torch.cat([a * c + b * s, b * c - a * s], dim=-1)",
     "rope/one-pair"),
    ("dtype=torch.float64) / C", "dtype=torch.float32) / C", "rope/far"),
    ("descending=True", "descending=False", "gating/top-2"),
    ("softmax(logits.gather(1, ids.clamp(min=0)), dim=-1)", "softmax(logits, dim=-1).gather(1, ids.clamp(min=0))",
     "gating/top-2"),
    ("silu(x[n] @ w1[e].T) * (x[n] @ w3[e].T)", "silu(x[n] @ w3[e].T) * (x[n] @ w1[e].T)", "experts/main"),
    ("hidden[n, slot] @ w2[e].T", "hidden[n, slot] @ w2[e]", "experts/square"),
    ("+ eps) * weight", ") * weight + eps", "rmsnorm/eps-inside"),
    ("eps, residual=x)", "eps, residual=y)", "block/main"),
    ("k_rotated, v))", "k_rotated, k))", "block/main"),
]  # fmt: skip


def check(program, **options):
    return check_program([sys.executable, str(program), "{inputs}", "{outputs}"], KIT, "float32", **options)


def test_it_passes_everything_that_it_offers():
    report = check(PROGRAM, allow_missing=True)
    status = {result.id: result.status for _, result, _ in report.entries}
    assert {id for id, found in status.items() if found == "pass"} == OFFERED
    assert "fail" not in status.values()
    given = [t for _, result, _ in report.entries for t in result.tensors]
    assert not any(t.status in ("extra", "missing") for t in given)
    assert 0 < max(t.ratio for t in given) < 1


def test_it_gives_every_intermediate_that_the_kit_names():
    cases = [case for case in MIXTRAL if case.call in ("model", "block", "experts", "attention")]
    report = check(PROGRAM, mixtral=True, allow_missing=True, only=["model", "block", "experts", "attention"])
    given = {(result.id, t.name) for _, result, _ in report.entries for t in result.tensors}
    assert given == {(case.id, output.name) for case in cases if "float32" in case.profiles for output in case.outputs}


@pytest.mark.parametrize(("right", "wrong", "noticed"), BREAKS, ids=[f"{b[2]}-{i}" for i, b in enumerate(BREAKS)])
def test_a_mistake_in_it_is_noticed_by_the_case_made_for_it(right, wrong, noticed, tmp_path):
    source = PROGRAM.read_text()
    assert source.count(right) == 1
    (tmp_path / "broken.py").write_text(source.replace(right, wrong))
    case = next(case for case in CASES if case.id == noticed)
    found = run_in_process(tmp_path / "broken.py", case, tmp_path / "outputs")
    assert verify.compare(case, found).status == "fail"
    assert verify.compare(case, run_in_process(PROGRAM, case, tmp_path / "right")).status == "pass"


def run_in_process(program, case, outputs):
    """Run the program's main for one case without starting another Python."""
    namespace = {"__name__": "program"}
    exec(compile(program.read_text(), str(program), "exec"), namespace)
    with namespace["torch"].no_grad():
        namespace["main"](KIT, outputs, case.id)
    return verify.read_outputs(outputs, case)


def test_it_needs_nothing_but_torch_and_safetensors():
    imported = set()
    for node in ast.walk(ast.parse(PROGRAM.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch", "safetensors"}
