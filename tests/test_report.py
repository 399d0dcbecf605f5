"""The report: right figures from known runs, one self-contained page, and folders that are refused."""

import json
import re

import pytest

from natgrad.report import write
from natgrad.report.read import Curve, Results, read
from natgrad.report.table import findings, goal, rows, show

MACHINE = {
    "command": "natgrad compare digits <&>",
    "commit": None,
    "ranks": 2,
    "threads": 1,
    "device": "a processor",
    "cores": 2,
    "system": "Linux",
    "python": "3.11",
    "versions": {"torch": "2.13.0"},
    "date": "2026-01-01",
}


def run(name, budget, seed, accuracies, seconds=0.5, second_order=False):
    """A run whose step takes `seconds` and whose accuracies are given."""
    numbers = range(1, len(accuracies) + 1)
    steps = [
        {"step": n, "loss": 1 / n, "seconds": seconds, "elapsed": n * seconds, "stages": {"network": 0.2}}
        for n in numbers
    ]
    if second_order:
        for step in steps:
            step |= {
                "intervals": {"a.A": step["step"], "a.G": 1},
                "traffic": {"statistics": 1000 * step["step"]},
            }
    judged = [
        {"step": n, "elapsed": n * seconds, "accuracy": accuracy, "loss": 0.1, "train_loss": 1 - accuracy}
        for n, accuracy in zip(numbers, accuracies)
    ]
    values = {"lr": 0.1, "momentum": 0.9}
    return {
        "contender": name,
        "values": values,
        "seed": seed,
        "budget": budget,
        "batch": 10,
        "final": True,
        "steps": steps,
        "evaluations": judged,
    }


FINALS = [
    run("SGD", 4, 1, [0.5, 0.6, 0.7, 0.80]),
    run("SGD", 4, 2, [0.5, 0.6, 0.7, 0.90]),
    run("SGD", 4, 3, [0.5, 0.6, 0.7, 0.82]),
    run("SP-NGD", 4, 1, [0.6, 0.82, 0.9, 0.95], 1.0, True),
    run("SP-NGD", 4, 2, [0.6, 0.70, 0.7, 0.75], 1.0, True),
    run("SP-NGD", 4, 3, [0.6, 0.70, 0.9, 0.95], 1.0, True),
    run("SGD", 2, 1, [0.5, 0.55]),
    run("SP-NGD", 2, 1, [0.7, 0.90], 1.0, True),
]


def comparison():
    tuned = [
        {
            "name": name,
            "values": {"lr": 0.1, "momentum": 0.9},
            "at_edge": edges,
            "trials": [{"values": {"lr": lr, "momentum": 0.9}, "accuracy": 0.9, "loss": 1.0} for lr in (0.01, 0.1)],
        }
        for name, edges in (("SGD", []), ("SP-NGD", ["lr"]))
    ]
    plan = {
        "task": {"name": "digits", "data": {"kind": "Digits"}, "model": {"kind": "Mlp", "hidden": [16]}},
        "steps": 4,
        "trials": 2,
        "finalists": 1,
        "held_out": 0.2,
    }
    return {
        "plan": plan,
        "about": "a <test>",
        "batch": 10,
        "machine": MACHINE,
        "tuned": tuned,
        "finals": FINALS,
    }


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(comparison()))
    return tmp_path


def test_the_table_has_medians_over_seeds(folder):
    results = read([folder])
    assert goal(results) == 0.82
    table = {(row.name, row.budget): row for row in rows(results)}
    assert [(row.name, row.budget) for row in rows(results)] == [
        ("SGD", 4),
        ("SP-NGD", 4),
        ("SGD", 2),
        ("SP-NGD", 2),
    ]
    # seed 1 never reaches the goal, seeds 2 and 3 at the end
    assert (table["SGD", 4].steps, table["SGD", 4].seconds) == (4, 2.0)
    # reached at steps 2, never, 3
    assert (table["SP-NGD", 4].steps, table["SP-NGD", 4].seconds) == (3, 3.0)
    assert table["SGD", 2].cells()[2:4] == ["never", "-"]
    assert table["SP-NGD", 4].step_seconds == 1.0
    assert table["SP-NGD", 4].statistics == 2500
    assert table["SGD", 4].statistics is None
    assert table["SGD", 4].cells()[4] == "82.00 (80.00-90.00)"


def test_the_findings_say_what_the_table_shows(folder):
    said = findings(read([folder]))
    assert said[0] == "Tuned SGD ends with 82.00 % after 4 steps (the goal)."
    assert said[1] == "SP-NGD reaches the goal after 3 of 4 steps, in 3.00 s."
    assert said[2] == (
        "SP-NGD trained for 2 steps reaches the goal after 2 and ends with 90.00 %; "
        "its train loss is 0.1000, below SGD's 0.1800 after 4."
    )
    assert said[3] == "Tuning SP-NGD chose lr at the edge of its grid; a wider grid may be better."
    assert len(said) == 4


def test_the_table_is_printed(folder, capsys):
    show(read([folder]))
    said = capsys.readouterr().out
    assert "82.00" in said
    assert "(80.00-90.00)" in said
    assert "never" in said
    assert "3 of 4 steps" in said


def test_the_page_needs_no_other_file(folder):
    html = write([folder]).read_text()
    assert len(re.findall(r"<img [^>]*src=\"data:image/svg\+xml;base64,", html)) == 5
    assert not re.findall(r"(?:src|href)=\"(?!data:)", html)
    assert "@import" not in html
    assert "url(" not in html
    assert "<script" not in html
    assert "natgrad compare digits &lt;&amp;&gt;" in html
    assert "a &lt;test&gt;" in html
    assert "Mlp (hidden [16])" in html


def test_an_empty_curve_draws_nothing():
    curve = Curve("x", 1, [run("x", 1, 0, [0.5])])
    curve.runs[0]["evaluations"] = []
    results = Results("t", "a", [curve], MACHINE, {})
    assert goal(results) is None
    assert findings(results) == []
    assert rows(results)[0].cells()[2] == "never"
