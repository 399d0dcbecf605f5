"""Work that takes more than a moment says how far it is, once, to whoever watches or to a file."""

import io

import pytest

from natgrad_lab import progress
from natgrad_lab.progress import tracked


class Clock:
    """A second passes between any two looks."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress.time, "monotonic", Clock())


def test_a_file_gets_few_lines():
    out = io.StringIO()
    assert list(tracked(range(40), 40, "reading", out)) == list(range(40))
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("reading: 5%, about ")
    assert lines[-1].startswith("reading: ")
    assert lines[-1].endswith(" s")
    assert len(lines) <= 5


def test_a_terminal_gets_one_line_that_changes():
    out = Terminal()
    list(tracked(range(10), 10, "reading", out))
    assert out.getvalue().count("\n") == 1
    assert out.getvalue().count("\r") > 5


def test_what_is_quick_says_nothing(monkeypatch):
    monkeypatch.setattr(progress.time, "monotonic", lambda: 0.0)
    out = io.StringIO()
    list(tracked(range(10), 10, "reading", out))
    assert out.getvalue() == ""


def test_other_ranks_say_nothing(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    out = io.StringIO()
    assert list(tracked(range(10), 10, "reading", out)) == list(range(10))
    assert out.getvalue() == ""
