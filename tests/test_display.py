"""Tokens in a terminal: coloured, numbered, and harmless."""

import io
import re

import pytest

from minimoe import colours, display

PIECES, EXPERTS = ["def", " add", "(", ")", ":\n    ", "\n\n"], [3, 1, 0, 12, 7, 2]


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


class Pipe(io.TextIOWrapper):
    def __init__(self, encoding):
        super().__init__(io.BytesIO(), encoding=encoding)


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def test_a_terminal_gets_colours_and_a_pipe_numbers(monkeypatch):
    assert display.capability(Terminal()) == "colour"
    assert display.capability(Pipe("utf-8")) == "superscript"
    assert display.capability(Pipe("ascii")) == "ascii"
    monkeypatch.setenv("TERM", "dumb")
    assert display.capability(Terminal()) == "superscript"


def test_no_color_wins_over_everything(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert display.capability(Terminal()) == "superscript"
    monkeypatch.delenv("NO_COLOR")
    assert display.capability(Pipe("ascii")) == "colour"


def test_numbers_follow_their_tokens():
    assert display.tokens_by_expert(PIECES, EXPERTS, "superscript") == "def³ add¹(⁰)¹²:↵⁷\n    ↵↵²\n\n"
    assert display.tokens_by_expert(PIECES[:5], EXPERTS[:5], "ascii") == "def{3} add{1}({0}){12}:~{7}\n    "


def test_colours_carry_the_text_and_the_experts_colour():
    painted = display.tokens_by_expert(PIECES, EXPERTS, "colour")
    spans = re.findall(r"\x1b\[48;5;(\d+);38;5;(?:16|231)m([^\x1b]*)\x1b\[0m", painted)
    assert re.sub(r"\x1b\[[\d;]*m", "", painted) == "def add():↵\n    ↵\n↵\n"
    assert [int(colour) for colour, _ in spans[:4]] == [
        colours.xterm256(colours.expert_colour(e)) for e in (3, 1, 0, 12)
    ]
    assert [text for _, text in spans] == ["def", " add", "(", ")", ":↵", "    ", "↵", "↵"]


def test_control_characters_of_a_text_never_reach_the_terminal():
    shown = display.tokens_by_expert(["a\x1b[2J", "\x07\r", "\u202e"], [0, 1, 2], "superscript")
    assert shown == "a\\x1b[2J⁰\\x07\\r¹\\u202e²"


@pytest.mark.parametrize("how", ["colour", "superscript", "ascii"])
def test_the_legend_is_one_line(how):
    assert "\n" not in display.legend(8, how)
    assert "expert" in display.legend(1, how)


def test_the_eight_colours_differ_in_a_terminal_too():
    assert len({colours.xterm256(colours.expert_colour(e)) for e in range(8)}) == 8
    assert colours.xterm256("#ff0000") == 196
    assert colours.xterm256("#808080") == 244
