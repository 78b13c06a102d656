"""The kit's README is the specification: what the code says stands in it, and its commands are commands."""

import re
import shlex

import pytest

from minimoe.cli import parser
from minimoe.golden import calls, specification
from minimoe.golden.calls import CALLS
from minimoe.golden.profiles import PROFILES
from minimoe.golden.verify import VERSION

TEXT = specification.README.read_text(encoding="utf-8")


def test_the_tables_are_what_the_code_says():
    assert specification.written(TEXT) == TEXT, "run: python -m minimoe.golden.specification"


def test_every_tensor_and_setting_of_every_call_is_in_the_table():
    for call in CALLS.values():
        part = TEXT[TEXT.index(f"**`{call.name}`**") :].split("\n**`")[0]
        for tensor in call.inputs:
            role = "input, optional" if tensor.optional else "input"
            assert re.search(
                rf"^\| `{re.escape(tensor.name)}` \| {role} \| .* \| {tensor.kind} \|$", part, re.MULTILINE
            )
        for tensor in call.outputs:
            assert f"| `{tensor.name}` | output" in part
        assert all(f"| `{name}` | setting |" in part for name in call.settings)
        assert all(f"| `{name}` | setting, optional |" in part for name in call.optional)


def test_every_setting_profile_and_call_is_explained():
    assert set(specification.SETTINGS) == {name for call in CALLS.values() for name in (*call.settings, *call.optional)}
    assert all(f"`{name}`" in TEXT for name in PROFILES)
    semantics = TEXT[TEXT.index("## What they compute") : TEXT.index("## Numeric profiles")]
    for name in {name.removesuffix(".backward") for name in calls.CALLS}:
        assert f"**{name}.**" in semantics, name


def test_a_part_that_is_missing_is_noticed():
    with pytest.raises(AssertionError, match="one place for models"):
        specification.written(TEXT.replace("<!-- begin models -->", ""))


def test_links_lead_to_headings():
    headings = re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    places = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]*)\)", TEXT)) <= places


def test_its_commands_are_understood():
    lines = [line.split("#")[0] for line in re.findall(r"^(minimoe golden .*)$", TEXT, re.MULTILINE)]
    assert len(lines) >= 7
    for line in lines:
        arguments = shlex.split(line)[1:]
        assert parser("golden").parse_args(arguments).subcommand == arguments[1]


def test_it_speaks_of_the_version_there_is():
    assert VERSION == 1 and f'"minimoe_golden": "{VERSION}"' in TEXT
