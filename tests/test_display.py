"""What a user sees while a run goes on: figures in words, a panel on a terminal, lines in a file, warnings once."""

import io
import math
import os
import re
import sys

import pytest

from natgrad_lab.report.number_format import ago, brief, duration, number, size
from natgrad_lab.train import display
from natgrad_lab.train.display import Display
from natgrad_lab.train.evaluate import Score
from natgrad_lab.train.figures import Figures
from natgrad_lab.train.log import Journal, RunFolder
from natgrad_lab.train.loop import Step

STAGES = {"data": 0.01, "network": 0.35, "messages": 0.04, "factor": 0.06, "update": 0.03, "other": 0.001, "own": 0.01}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NATGRAD_DEBUG", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def step(number, seconds=0.5, loss=0.25, **second):
    told = {"damping": 1e-3, "refreshed": 0.5, "skipped": 0, **second}
    return Step(number, number / 8, loss, 0.02, seconds, seconds * number, 1024 / seconds, STAGES, told)


def shown(text):
    """The last drawing of a terminal's text, without its colours."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).split("mine ")[-1]


def test_what_is_left_counts_steps_and_what_passes_beside_them():
    now = [0.0]
    figures = Figures(100, clock=lambda: now[0])
    assert figures.left() is None
    now[0] = 50.0  # reading the data
    figures.record(step(11), None)  # a run taken up after step 10
    assert figures.left() == pytest.approx(89 * 0.5)
    now[0] = 52.0  # 1.5 seconds of judging beside two steps
    figures.record(step(12), None)
    now[0] = 52.0
    assert figures.left() == pytest.approx(88 * (0.5 + 0.75))


def test_a_count_of_steps_alone_knows_what_is_left():
    now = [0.0]
    figures = Figures(10, clock=lambda: now[0])
    for done in (4, 5):  # four were remembered from an earlier run
        now[0] += 3.0
        figures.count(done, 1.0)
    assert figures.left() == pytest.approx(5 * 3.0)
    assert figures.rows() == [[("loss", "1.0000")]]


def test_running_means_follow_a_change_and_small_stages_are_not_named():
    figures = Figures(1000)
    for place in range(1, 401):
        figures.record(step(place, seconds=0.5 if place < 200 else 1.0, refreshed=float(place < 200)), 3 * 10**9)
    assert figures.seconds == pytest.approx(1.0, rel=1e-3)
    assert figures.refreshed == pytest.approx(0.0, abs=1e-3)
    named = [name for name, _ in figures.split()]
    assert named == ["data", "network", "messages", "factor", "update", "own"]
    told = dict(figures.rows()[1])
    assert (told["refreshed"], told["memory"], told["time"]) == ("0%", "3 GB", "6:40")


def test_a_row_has_what_matters_and_only_what_there_is():
    figures = Figures(100)
    figures.record(step(3, skipped=2), None)
    figures.judged = 2, Score(1.0, 0.7124)
    assert figures.rows()[0] == [
        ("loss", "0.2500"),
        ("test accuracy", "71.24 % (step 2)"),
        ("lr", "0.02"),
        ("damping", "0.001"),
        ("skipped", "2"),
    ]
    plain = Figures(100)
    plain.record(Step(1, 0.1, 0.5, 0.1, 0.5, 0.5, 10.0, {"network": 0.5}), None)
    assert [name for row in plain.rows() for name, _ in row] == ["loss", "lr", "", "", "time", "network"]


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (duration(7.4), "0:07"),
        (duration(754), "12:34"),
        (duration(3723), "1:02:03"),
        (duration(2 * 86400 + 61), "2 d 0:01:01"),
        (brief(0.0534), "53.4 ms"),
        (brief(0.9996), "1 s"),
        (brief(12.345), "12.3 s"),
        (size(544e6), "544 MB"),
        (size(544), "0.544 KB"),
        (ago(5), "5 seconds ago"),
        (ago(119), "119 seconds ago"),
        (ago(150), "2 minutes ago"),
        (ago(3 * 86400), "3 days ago"),
        (size(1.2e9), "1.2 GB"),
        (size(999.6e6), "1 GB"),
        (size(1.2345e12), "1234 GB"),
        (number(0.5), "0.5000"),
        (number(0.0), "0.0000"),
        (number(3.2e-5), "3.2e-05"),
        (number(math.nan), "nan"),
        (number(1.5e9), "1.5e+09"),
    ],
)
def test_numbers_in_words(told, expected):
    assert told == expected


def test_a_file_gets_a_line_an_evaluation_and_one_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    shows = Display("mine", 400, stream)
    for place in range(1, 101):
        now[0] += 1.0
        shows.record(step(place, seconds=1.0), 10**9)
        if place == 50:
            shows.judged(step(place, seconds=1.0), Score(1.5, 0.5))
    shows.end(
        "interrupted", {"steps": 100, "seconds": 100.0, "test_accuracy": 0.5}, None, "natgrad train mine --resume"
    )
    assert stream.getvalue().splitlines() == [
        "step  30/400  epoch   3.8  loss  0.2500  1 s a step  lr 0.02  ETA 6:10",
        "step  50/400  epoch   6.2  loss  0.2500  test 50.00 %, loss  1.5000  0:50",
        "step  80/400  epoch  10.0  loss  0.2500  1 s a step  lr 0.02  ETA 5:20",
        "interrupted after 100 of 400 steps in 1:40 of training, test accuracy 50.00 %",
        "to go on: natgrad train mine --resume",
    ]


def test_a_terminal_gets_a_panel_that_fits_and_goes_away():
    stream = Terminal()
    shows = Display("mine", 12345, stream)
    shows.record(step(1234), 544 * 10**6)
    shows.judged(step(1234), Score(1.0, 0.7124))
    shows.live.refresh()
    panel = shown(stream.getvalue()).splitlines()
    shows.close()
    assert all(len(line.rstrip()) <= 80 for line in panel)
    text = " ".join(" ".join(panel).split())
    for said in (
        "1234/12345",
        "epoch 154.2",
        "ETA",
        "loss 0.2500",
        "71.24 %",
        "lr 0.02",
        "damping 0.001",
        "500 ms a step",
    ):
        assert said in text
    for said in ("2048 images/s", "refreshed 50%", "memory 544 MB", "network 70%", "messages 8%", "own 2%"):
        assert said in text
    assert stream.getvalue().count("\x1b[?25l") == stream.getvalue().count("\x1b[?25h") == 1
    assert "step  1234/12345  epoch 154.2" in stream.getvalue()


def test_a_narrow_terminal_tears_no_entry_apart(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    shows = Display("mine", 12345, Terminal())
    shows.record(step(1234), 544 * 10**6)
    lines = [part.plain for part in shows.panel().renderables[1:]]
    shows.close()
    assert lines[-1].splitlines() == ["data 2%   network 70%   messages 8%", "factor 12%   update 6%   own 2%"]
    assert all(len(line) <= 40 for text in lines for line in text.splitlines())


def test_a_panel_is_drawn_seldom(monkeypatch):
    stream = Terminal()
    shows = Display("mine", 1000, stream)
    drawn = []
    monkeypatch.setattr(shows.live, "refresh", lambda: drawn.append(now[0]))
    now = [1e6]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    for place in range(1, 401):
        now[0] += 0.01
        shows.record(step(place, seconds=0.01), None)
    shows.close()
    assert 25 <= len(drawn) - 1 <= 33  # four seconds, eight a second; stopping draws once


def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    shows = Display("mine", 10, Terminal())
    assert shows.live is None


def test_events_are_lines_on_the_screen_and_in_the_file(tmp_path):
    stream = io.StringIO()
    journal = Journal(RunFolder(tmp_path / "run", {}), Display("mine", 10, stream))
    journal.step(step(4))
    journal.event("bad_images", count=3, first="x[1].jpg")
    journal.close("failed", resume="natgrad train mine --resume")
    assert "step  4/10  bad images: count 3, first x[1].jpg\n" in stream.getvalue()
    assert f"results: {tmp_path / 'run'}" in stream.getvalue().replace("\n", "")
    line = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1]
    assert line == '{"kind": "bad_images", "step": 4, "count": 3, "first": "x[1].jpg"}'


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_children_write_past_the_panel():
    shows = Display("mine", 10, Terminal())
    assert sys.stderr is not sys.__stderr__
    child = os.fork()
    if child == 0:
        os._exit(0 if sys.stderr is sys.__stderr__ and sys.stdout is sys.__stdout__ else 1)
    shows.close()
    assert os.waitpid(child, 0)[1] == 0


def test_an_evaluation_is_seen_to_go_on():
    """Where the end of training would be said to be now."""
    figures = Figures(4)
    figures.count(4, 1.0)
    assert "ETA 0:00" in figures.place()
    figures.judging = 0.25
    assert "evaluating 25%" in figures.place()
    assert "evaluating 25%" in figures.essentials()
