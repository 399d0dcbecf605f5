"""A comparison's page and tables: right figures from known runs, who wins and who loses, one self-contained page."""

import json
import math
import re

import pytest

from natgrad_lab.report import write
from natgrad_lab.report.compare_page import page
from natgrad_lab.report.compare_read import comparison_of, read_comparison
from natgrad_lab.report.compare_table import at_edges, fewer_points, findings, losses, rows, verdicts
from natgrad_lab.report.compare_terminal import show

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


def final(seed, accuracies, seconds=0.5, diverged=None):
    """A run judged after every second step."""
    points = [[2 * n, 2 * n * seconds, accuracy, 1 - accuracy] for n, accuracy in enumerate(accuracies, 1)]
    return {
        "seed": seed,
        "diverged": diverged,
        "train_loss": None if diverged else 0.1,
        "points": points,
        "losses": [1.0, None, 0.5],
        "step_seconds": seconds,
        "stages": {"network": 0.2, "measure": 0.1},
        "statistics": None,
        "refreshed": None,
        "made_by": {"commit": "abc"},
    }


def budget(steps, finals, edges=()):
    values = {"lr": 0.1, "momentum": 0.9}
    tried = [
        {"values": {**values, "lr": lr}, "runs": [{"seed": 100, "accuracy": 0.9, "loss": lr}]} for lr in (0.1, 0.2)
    ]
    tried.append({"values": {**values, "lr": 5.0}, "runs": [{"seed": 100, "accuracy": None, "loss": None}]})
    return {"steps": steps, "values": values, "at_edge": list(edges), "tried": tried, "finals": finals}


def cell(name, kind, batch, samples, full, half):
    budgets = [budget(8, full, ["lr"] if name == "SPNGD" else ()), budget(4, half)]
    return {"contender": name, "kind": kind, "batch": batch, "samples": samples, "of": 80, "budgets": budgets}


def results(metric="accuracy"):
    slow = [
        final(seed, row)
        for seed, row in ((1, [0.1, 0.5, 0.7, 0.80]), (2, [0.1, 0.5, 0.7, 0.9]), (3, [0.1, 0.5, 0.7, 0.82]))
    ]
    fast = [
        final(seed, row, 1.5)
        for seed, row in ((1, [0.5, 0.82, 0.9, 0.9]), (2, [0.5, 0.7, 0.7, 0.7]), (3, [0.5, 0.7, 0.9, 0.95]))
    ]
    half = [final(seed, [0.6, 0.83], 1.5) for seed in (1, 2, 3)]
    poor = [final(seed, [0.1, 0.2], 0.5) for seed in (1, 2, 3)]
    gone = [final(1, [], diverged=2), final(2, [], diverged=2), final(3, [0.1, 0.2, 0.3, 0.4])]
    cells = [
        cell("Nesterov", "first-order", 10, 10, slow, poor),
        cell("SPNGD", "natgrad", 10, 10, fast, half),
        cell("Nesterov", "first-order", "full", 80, slow, poor),
        cell("SOAP", "matrix", "full", 80, fast, poor),
        cell("SPNGD", "natgrad", "full", 80, gone, poor),
    ]
    recipe = {"data": {"kind": "Digits"}, "model": {"kind": "Mlp", "hidden": [16]}}
    plan = {
        "task": {"name": "digits", "metric": metric, "held_out": 0.2, "recipe": recipe},
        "targets": [0.7],
        "profile": {"trials": 4, "finalists": 1, "seeds": 3, "halving": True},
        "spaces": {"SPNGD": {"lr": "0.1 to 1"}},
        "ranks": 1,
        "workers": 2,
    }
    return {"kind": "comparison", "about": "a <test>", "plan": plan, "machine": MACHINE, "cells": cells}


@pytest.fixture
def made():
    return comparison_of(results())


def test_the_goal_is_where_the_best_first_order_optimizer_ends(made):
    assert made.goal("10") == 0.82
    assert made.goal_line("10").name == "Nesterov"
    assert made.batches == ["10", "full"]


def test_a_row_takes_the_better_budget_for_each_figure(made):
    table = {row.name: row for row in rows(made, "10")}
    assert [row.name for row in rows(made, "10")] == ["SPNGD", "Nesterov"]
    # with all steps its seeds get there at 4, never, 6; with half of them at 4, 4, 4
    assert (table["SPNGD"].steps, table["SPNGD"].seconds, table["SPNGD"].given) == (4, 6.0, 8)
    assert table["Nesterov"].cells()[3] == "8 of 8"
    assert table["Nesterov"].cells()[1:3] == ["82.0 (80.0-90.0)", "20.0 (20.0-20.0)"]


def test_targets_are_first_reached_in_the_median_over_seeds(made):
    line = made.at("10", "SPNGD")[0]
    assert made.reach(line, 0.82) == (6, 9.0)
    assert made.reach(line, 0.7) == (4, 6.0)
    assert made.reach(line, 0.96) == (math.inf, math.inf)
    assert made.reach(line, None) == (math.inf, math.inf)


def test_lost_runs_count_and_are_named(made):
    row = next(row for row in rows(made, "full") if row.name == "SPNGD")
    assert row.end == "40.0 (40.0-40.0, 2 diverged)"
    assert row.cells()[3:5] == ["never", "-"]
    assert made.at("full", "SPNGD")[0].end(made.column) is None


def test_it_says_who_wins_and_where_ours_lose(made):
    found = {(verdict.batch, verdict.measure): verdict for verdict in verdicts(made)}
    assert found["10", "end"].winner == "natgrad"
    assert found["10", "steps"].winner == "natgrad"
    assert found["10", "seconds"].winner == "first-order"
    assert found["full", "steps"].best["natgrad"] == ("never", "")
    assert [key for key, verdict in found.items() if verdict.lost] == [
        ("10", "seconds"),
        ("full", "end"),
        ("full", "steps"),
        ("full", "seconds"),
    ]
    assert losses(made) == [
        "Behind at batch 10 in seconds to the goal: Nesterov 4, natgrad's SPNGD 6.",
        "Behind at batch full in accuracy after all steps: SOAP 90.00 %, natgrad's never.",
        "Behind at batch full in steps to the goal: SOAP 6, natgrad's never.",
        "Behind at batch full in seconds to the goal: Nesterov 4, natgrad's never.",
    ]


def test_the_findings_begin_with_the_largest_batch(made):
    said = findings(made)
    assert said[0].startswith(
        "Batch full (80 samples): Nesterov, the best tuned first-order optimizer, ends at 82.00 %"
    )
    assert said[1] == "Of natgrad's none gets there."
    assert said[2] == "Of Muon, Shampoo and SOAP SOAP is there first, after 6 of 8 steps and 9.0 s."
    assert "SPNGD is there first, after 4 of 8 steps and 6.0 s." in said[4]


def test_who_went_on_with_one_point_has_a_star_and_the_reason(capsys):
    some = results()
    some["plan"]["profile"]["far_behind"] = 0.6
    some["cells"][0]["far_behind"] = True
    made = comparison_of(some)
    assert [row.cells()[0] for row in rows(made, "10")] == ["SPNGD", "Nesterov*"]
    assert "(less than 0.6 of the best optimizer's progress)" in fewer_points(made, "10")
    assert fewer_points(made, "full") == ""
    assert "<td>Nesterov*</td>" in page(made)
    show(made)
    said = capsys.readouterr().out
    assert "Nesterov*" in said
    assert said.count("* Far behind") == 1


def test_settings_that_were_taken_over_are_said_and_one_budget_is_enough(capsys):
    some = results()
    some["plan"]["settings"] = {"10": "other at batch 5"}
    for one in some["cells"]:
        one["budgets"] = [{**one["budgets"][0], "tried": []}]
    made = comparison_of(some)
    assert "none; settings at 10 of other at batch 5" in page(made)
    show(made)
    assert "batch 10, 8 steps; goal" in capsys.readouterr().out


def test_edges_are_named_with_where_they_were_chosen(made):
    assert at_edges(made) == ["SPNGD: lr (0.1 at 10, 8 steps; 0.1 at full, 8 steps)"]


def test_a_loss_is_better_when_lower():
    made = comparison_of(results("loss"))
    assert made.goal("10") == pytest.approx(0.18)
    assert made.reach(made.at("10", "Nesterov")[0], 0.31) == (6, 3.0)
    assert made.best(made.at("10")).name == "SPNGD"
    assert "0.1800" in findings(made)[3]


def test_the_page_needs_no_other_file(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results()))
    html = write([tmp_path]).read_text()
    assert (
        len(re.findall(r"<img [^>]*src=\"data:image/svg\+xml;base64,", html)) == 2 + 2 + 7 + 8
    )  # scaling, ends; by batch curves, losses, stages, tuning of each
    assert not re.findall(r"(?:src|href)=\"(?!data:)", html)
    assert "<script" not in html
    assert "natgrad compare digits &lt;&amp;&gt;" in html
    assert "a &lt;test&gt;" in html
    assert html.count('<tr class="lost">') == 4
    assert "<b>lr 0.1</b>" in html


def test_one_size_of_batch_and_no_first_order_optimizer_can_be_shown(capsys):
    some = results()
    some["cells"] = [one for one in some["cells"] if one["contender"] == "SPNGD" and one["batch"] == 10]
    made = comparison_of(some)
    assert made.goal("10") is None
    assert findings(made) == []
    assert page(made).count("<img ") == 3 + 1 + 1 + 1
    show(made)
    assert "SPNGD" in capsys.readouterr().out


def test_the_tables_are_printed_within_80_letters(made, capsys):
    show(made)
    said = capsys.readouterr().out
    assert "(80.0-90.0)" in said
    tables = said[: said.index("Batch full (80")]
    assert max(len(line.rstrip()) for line in tables.splitlines()) <= 80
    for name in ("Nesterov", "SPNGD", "SOAP", "never"):
        assert name in tables


def test_files_that_cannot_be_read_are_refused_in_one_line(tmp_path):
    for text in ("{", '{"plan": 1}', "[]"):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(ValueError, match=r"results\.json' is no (comparison|JSON) that (this version )?can"):
            read_comparison(tmp_path)
