"""A pytest plugin: `pytest --minimoe-adapter my_module:Adapter` makes one test of each case of the golden kit.

Without paths on the command line only these tests run; with paths, the tests found there too. A test is called
golden::<case>, which pytest takes as an argument, as `-k`, `--lf`, `-x` and pytest-xdist work too. What the adapter
does not offer is skipped; a failure shows what is wrong with the outputs, not where in this package that was noticed.

pytest imports this file at every start, also in projects that only have minimoe installed: without the flag it does
nothing, and whatever takes time to import is imported inside functions.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from minimoe.golden.adapters import Adapter
    from minimoe.golden.verify import Case, CaseResult

ROOT = "golden"  # how the ids of the tests begin
_PATTERN = "cases by id or call, as 'gating*'; may be given more than once"
_FLAGS: dict[str, tuple[str, str, Any, str]] = {
    "--minimoe-profile": ("NAME", "store", None, "numeric profile to be held to (default: the adapter's own)"),
    "--minimoe-kit": ("FOLDER", "store", None, "another kit than the bundled one, as `minimoe golden make` writes"),
    "--minimoe-include": ("PATTERN", "append", [], f"only these {_PATTERN}"),
    "--minimoe-exclude": ("PATTERN", "append", [], f"leave out these {_PATTERN}"),
    "--minimoe-expect-failure": (
        "PATTERN", "append", [],
        f"these must fail: {_PATTERN}; or a file with a pattern a line, its reason after a #",
    ),
}  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the flags."""
    group = parser.getgroup("minimoe", "minimoe's golden kit")
    group.addoption(
        "--minimoe-adapter", metavar="MODULE:NAME", help="the implementation to test, or path/to/file.py:NAME"
    )
    for flag, (metavar, action, default, says) in _FLAGS.items():
        group.addoption(flag, metavar=metavar, action=action, default=default, help=says)


def pytest_configure(config: pytest.Config) -> None:
    """Load the adapter; leave pytest only the paths and ids that the user gave."""
    spec = config.getoption("minimoe_adapter")
    if spec is None:
        given = [flag for flag in _FLAGS if config.getoption(flag[2:].replace("-", "_"))]
        if given:
            raise pytest.UsageError(f"{given[0]} needs --minimoe-adapter")
        return
    own = [argument for argument in config.args if argument.partition("::")[0] == ROOT]
    if config.args_source is pytest.Config.ArgsSource.ARGS:
        config.args[:] = [argument for argument in config.args if argument not in own]
    else:  # the current folder, or the ini file's testpaths
        config.args.clear()
    ids = [argument.partition("::")[2] for argument in own]
    config.pluginmanager.register(_Kit(config, spec, [i for i in ids if i]), "minimoe-golden-kit")


class _Kit:
    """The part of the plugin that exists only where an adapter is given."""

    def __init__(self, config: pytest.Config, spec: str, ids: Sequence[str]) -> None:
        from minimoe.golden.report import VECTORS
        from minimoe.golden.verify import KitError, read_kit

        self.spec, self.adapter = spec, _load(spec)
        self.adapter.profile = config.getoption("minimoe_profile") or self.adapter.profile
        folder = Path(config.getoption("minimoe_kit") or VECTORS)
        try:
            manifest, cases = read_kit(folder)
            _check_models(manifest)
            self.cases = self._choose(config, cases, ids)
            self.expected = self._expected(config)
        except KitError as error:
            raise pytest.UsageError(str(error)) from None
        self.entries: list[tuple[Case, CaseResult, Mapping[str, Any]]] = []

    def _choose(self, config: pytest.Config, cases: list[Case], ids: Sequence[str]) -> list[Case]:
        from minimoe.golden.verify import select

        only = [*config.getoption("minimoe_include"), *ids]
        chosen = select(cases, self.adapter.profile, only)
        exclude = config.getoption("minimoe_exclude")
        if exclude:
            select(chosen, self.adapter.profile, exclude)  # complains of a pattern that matches nothing
        return [case for case in chosen if not _matching(case, exclude)]

    def _expected(self, config: pytest.Config) -> dict[str, str]:
        """{pattern: reason} of the cases that must fail: the adapter's own deviations, and what the flags name."""
        from minimoe.golden.verify import expected_failures

        found = expected_failures(config.getoption("minimoe_expect_failure"), self.cases)
        return found | dict(getattr(self.adapter, "deviations", {}))

    def pytest_report_header(self) -> str:
        """Say what is tested."""
        return f"minimoe golden kit: {len(self.cases)} cases, {self.spec} in profile {self.adapter.profile}"

    @pytest.hookimpl(tryfirst=True)  # before -k, -m and --lf choose among the items
    def pytest_collection_modifyitems(self, session: pytest.Session, items: list[pytest.Item]) -> None:
        """Add the kit's cases to what was found in the paths given."""
        collector = GoldenKit.from_parent(session, name=ROOT, nodeid=ROOT, kit=self)
        items.extend(session.genitems(collector))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Name the mistake that all failures together look like."""
        failures = sum(result.status == "fail" for _, result, _ in self.entries)
        if failures > 1 and (lines := _likely(self.entries, self.adapter.profile)):
            terminalreporter.section("golden kit: likely mistake")
            for line in lines:
                terminalreporter.write_line(line)


class GoldenKit(pytest.Collector):
    """Parent of the tests."""

    def __init__(self, *, kit: _Kit, **settings: Any) -> None:
        super().__init__(**settings)
        self.kit = kit

    def collect(self) -> Iterator[pytest.Item]:
        for case in self.kit.cases:
            item = GoldenCase.from_parent(self, name=case.id, nodeid=f"{ROOT}::{case.id}", case=case)
            if reasons := [reason for pattern, reason in self.kit.expected.items() if _matching(case, [pattern])]:
                item.add_marker(pytest.mark.xfail(reason=reasons[0], strict=True))
            yield item


class GoldenCase(pytest.Item):
    """The test of one case."""

    parent: GoldenKit

    def __init__(self, *, case: Case, **settings: Any) -> None:
        super().__init__(**settings)
        self.case, self.kit = case, self.parent.kit

    def runtest(self) -> None:
        from minimoe.golden.adapters import NotOffered, outputs_of
        from minimoe.golden.verify import compare, force_routing

        adapter = self.kit.adapter
        try:
            outputs = outputs_of(self.case, adapter.run(self.case))
        except NotOffered as reason:
            pytest.skip(str(reason))
        result = compare(self.case, outputs, adapter.profile)
        if getattr(adapter, "forces_routing", False):
            force_routing(self.case, result, lambda ids: adapter.run(self.case, ids), adapter.profile)
        entry = (self.case, result, outputs)
        if self.get_closest_marker("xfail") is None:
            self.kit.entries.append(entry)
        if result.status == "fail":
            raise _Mismatch("\n".join(_shown(entry, adapter.profile)))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException]) -> Any:  # type: ignore[override]
        """Show the report of a mismatch as it is, and of an exception the part that is the adapter's."""
        from minimoe.golden.adapters import AdapterError

        if isinstance(excinfo.value, _Mismatch | AdapterError):
            return str(excinfo.value)
        here = Path(__file__).parent
        own = [
            i for i, entry in enumerate(excinfo.traceback) if entry.path in (here / "plugin.py", here / "adapters.py")
        ]
        excinfo.traceback = excinfo.traceback[own[-1] + 1 :] if own else excinfo.traceback
        return super().repr_failure(excinfo)

    def reportinfo(self) -> tuple[Path, None, str]:
        # "case …", because pytest writes the dots of a title that ends the test's id as "::".
        return self.config.rootpath / ROOT, None, f"case {self.case.id}"


class _Mismatch(AssertionError):
    """Outputs that do not fit; its text is the whole report."""


def _shown(entry: tuple[Case, CaseResult, Mapping[str, Any]], profile: str) -> list[str]:
    from minimoe.golden.verify import describe, details

    _, result, _ = entry
    likely = _likely([entry], profile)
    return [describe(result), *details(result), *(["likely mistake:"] if likely else []), *(f"  {x}" for x in likely)]


def _likely(entries: Sequence[tuple[Case, CaseResult, Mapping[str, Any]]], profile: str) -> list[str]:
    from minimoe.golden.report import likely
    from minimoe.golden.verify import Report

    return likely(Report("", profile, list(entries), len(entries)))


def _load(spec: str) -> Adapter:
    from minimoe.golden import adapters

    try:
        return adapters.load(spec)
    except adapters.AdapterError as error:
        raise pytest.UsageError(str(error)) from None
    except Exception:
        raise pytest.UsageError(f"{spec} cannot be loaded:\n{traceback.format_exc()}") from None


def _check_models(manifest: Mapping[str, Any]) -> None:
    """Refuse a kit whose checkpoint has changed since; the bundled one carries its own."""
    if any("folder" in model for model in manifest["models"].values()):
        from minimoe.golden.own_kit import check_models

        check_models(manifest)


def _matching(case: Case, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in (case.id, case.call) for pattern in patterns)
