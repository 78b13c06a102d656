"""README says nothing that is not so: its Python runs, its numbers and names are the code's."""

import re
from pathlib import Path

import numpy as np

from minimoe.cli import parser

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_ten_lines_run_and_give_what_they_say():
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    trace, grads, model = names["trace"], names["grads"], names["model"]
    assert f"one of {len(trace)} named intermediates" in README
    assert f"{model.config.num_parameters() / 1e6:.1f} M parameters" in README
    assert trace["layers.0.gating.logits"].shape == (trace.tokens.size, 8)
    assert np.isfinite(names["loss"]) and all(np.isfinite(g).all() for g in grads.values())


def test_the_table_of_commands_is_complete():
    listed = set(re.findall(r"^\| `minimoe (\w+)", README, re.M))
    (commands,) = (action.choices for action in parser()._actions if action.choices and "demo" in action.choices)
    assert listed == set(commands)


def test_every_file_it_names_exists():
    root = Path(__file__).parents[1]
    for path in re.findall(r"\]\(([^)#:]+)\)|`((?:minimoe|figures|tests)/[\w/.]+)`", README):
        assert (root / (path[0] or path[1])).exists(), path
