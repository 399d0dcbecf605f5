"""The docs' tables: made from results, between their marks, and what a comparison's results keep."""

import json
import sys
from pathlib import Path

import pytest

from natgrad_lab.compare.tasks import find_task
from natgrad_lab.report.compare_read import comparison_of
from test_report_compare import results as compared

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bench
import tables

PAGE = "before\n<!-- table {} -->\nold\n<!-- end -->\nafter\n"


def test_a_table_replaces_what_is_between_its_marks(tmp_path):
    rows = [{"name": "pack[64]", "median_ms": 0.03, "iqr_ms": 0.004}]
    (tmp_path / "micro-cpu.json").write_text(json.dumps({"cases": [{"rows": rows}]}))
    page = tables.filled(PAGE.format("micro-cpu"), tmp_path)
    assert "old" not in page
    assert "| pack[64] | 0.03 | 0.004 |" in page
    assert page.startswith("before\n<!-- table micro-cpu -->\n")
    assert page.endswith("<!-- end -->\nafter\n")
    assert tables.filled(page, tmp_path) == page


def test_results_that_are_missing_are_said_to_be(tmp_path):
    assert "Not measured yet: `make bench`" in tables.filled(PAGE.format("scaling-cpu"), tmp_path)


def test_a_comparison_keeps_its_tables_choices_and_seeds(tmp_path):
    digest = bench.digest(comparison_of(compared()), "digits")
    json.dumps(digest)
    assert digest["machine"]["command"] == "natgrad compare digits --profile full --workers 2"
    ours = next(line for line in digest["lines"] if line["optimizer"] == "SPNGD" and line["batch"] == "10")
    assert ours["seeds"] == {1: 0.9, 2: 0.7, 3: 0.95}
    assert ours["reached"] == {"0.7": 4}
    (tmp_path / "compare-digits.json").write_text(json.dumps(digest))
    page = tables.filled(PAGE.format("compare-digits full"), tmp_path)
    assert "Batch full (80 samples), 8 and 4 steps; goal 82.00 %:" in page
    assert "Batch 10 " not in page
    assert "| SOAP | 90.0 (70.0-95.0) |" in page
    assert "| 10 | seconds | Nesterov 4 | - | SPNGD 6 | first-order |" in tables.filled(
        PAGE.format("compare-digits wins"), tmp_path
    )
    first, *rest = [line for line in tables.filled(PAGE.format("largest"), tmp_path).splitlines() if "digits" in line]
    assert first == "| digits, full: 82.00 % | end | Nesterov 82.00 % | SOAP 90.00 % | never | matrix |"
    assert len(rest) == 2  # by steps, by seconds
    with pytest.raises(ValueError, match="no batch 7"):
        tables.filled(PAGE.format("compare-digits 7"), tmp_path)


def test_a_comparison_keeps_its_pictures_always_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "HERE", tmp_path / "benchmarks")
    for folder in ("benchmarks/results", "docs"):
        (tmp_path / folder).mkdir(parents=True)
    found = comparison_of(compared())
    bench.keep(found, "digits")
    pictures = {path.name: path.read_text() for path in (tmp_path / "docs").iterdir()}
    assert set(pictures) == {"compare-digits-steps.svg", "compare-digits-curves.svg"}
    bench.keep(found, "digits")
    assert pictures == {path.name: path.read_text() for path in (tmp_path / "docs").iterdir()}
    assert (tmp_path / "benchmarks/results/compare-digits.json").exists()


def test_a_comparison_that_is_kept_by_name_says_how_it_is_made_again():
    command = "natgrad compare toy --data.path PATH --out some/where --workers 2 --reuse"
    found = comparison_of({**compared(), "machine": {"command": command}})
    assert bench.digest(found, "other")["machine"]["command"] == "natgrad compare toy --data.path PATH"
    assert bench.digest(found, "digits")["machine"]["command"] == "natgrad compare digits --profile full --workers 2"


def test_the_docs_are_as_the_results_are():
    for page in [tables.ROOT / "README.md", *sorted((tables.ROOT / "docs").glob("*.md"))]:
        text = page.read_text()
        assert tables.filled(text) == text, f"{page.name} is out of date; python benchmarks/tables.py"


def test_the_plan_stays_under_two_hours_and_names_what_needs_images():
    listed = bench.parts("somewhere")
    assert sum(part.minutes for part in listed) <= 120
    assert [part.name for part in listed if part.images] == ["cifar100-small"]
    assert listed[-1].words[-4:-2] == ("--data.path", "somewhere")
    for part in listed:
        if part.name in bench.COMPARISONS:
            words = bench.COMPARISONS[part.name]
            profile = find_task(words[0]).profile(words[2] if words[1] == "--profile" else None)
            assert profile.seeds >= 3 or profile.stated, "one seed is for the demo, which tunes nothing"
        else:
            assert Path(part.words[0]).exists()


def test_without_a_first_order_optimizer_nobody_never_reaches_the_goal():
    told = compared()
    ours = {**told, "cells": [cell for cell in told["cells"] if cell["kind"] == "natgrad"]}
    for results, word in ((told, True), (ours, False)):
        sizes = bench.digest(comparison_of(results), "digits")["batches"]
        assert any("goal" in size["title"] for size in sizes) == word
        assert word or all(row[3] == "-" for size in sizes for row in size["rows"])
