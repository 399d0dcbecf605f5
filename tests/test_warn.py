"""Warnings: each once, in a line, by rank 0, in the run's file too."""

import io
import sys
import warnings

from natgrad_lab.train.display import Display
from natgrad_lab.train.log import Journal, RunFolder
from natgrad_lab.train.warn import clean, listeners, told_once


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_warning_is_told_once_in_a_line_by_rank_0(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("NATGRAD_DEBUG", raising=False)
    journal = Journal(RunFolder(tmp_path / "run", {}))
    for rank in (0, 1):
        with told_once(rank), warnings.catch_warnings():
            warnings.simplefilter("always")
            for _ in range(3):
                warnings.warn("the layer\n  is  new (Triggered internally at /torch/a.cpp:12.)", stacklevel=1)
    journal.close("finished")
    assert capsys.readouterr().err == "warning: the layer is new\n"
    told = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert told == '{"kind": "warning", "step": 0, "text": "the layer is new"}\n'
    assert journal not in listeners


def test_a_warning_is_shown_above_the_panel(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NATGRAD_DEBUG", raising=False)
    stream = Terminal()
    before = sys.stderr
    shows = Display("mine", 10, stream)
    with told_once(0):
        warnings.warn("mind the step", stacklevel=1)
    shows.close()
    assert "warning: mind the step" in stream.getvalue()
    assert sys.stderr is before


def test_debugging_shows_warnings_as_python_does(monkeypatch):
    monkeypatch.setenv("NATGRAD_DEBUG", "1")
    shows = warnings.showwarning
    with told_once(1):
        assert warnings.showwarning is shows


def test_clean_keeps_the_message():
    assert clean("a (b)\n c") == "a (b) c"
