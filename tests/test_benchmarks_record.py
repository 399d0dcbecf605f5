"""Which cases of a benchmark's file are done already, on this machine and on another."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import record

CASE = {"kind": "kill", "seed": 3}


@pytest.mark.parametrize("fact", ["machine", "commit", "torch", "steps"])
@pytest.mark.parametrize("outcomes", [False, True])
def test_cases_of_another_origin_are_done_where_they_are_outcomes(tmp_path, fact, outcomes):
    path = tmp_path / "results.json"
    record.Record(path, "cpu", outcomes, steps=1).add(CASE, [{"right": True}])
    again = record.Record(path, "cpu", outcomes, steps=1)
    assert again.find(CASE) == [{"right": True}]
    assert again.find({**CASE, "seed": 4}) is None

    old = json.loads(path.read_text())
    mine = old[fact]
    path.write_text(json.dumps({**old, fact: "another", "cases": [CASE | {"rows": old["cases"][0]["rows"]}]}))
    other = record.Record(path, "cpu", outcomes, steps=1)
    kept = outcomes and fact in ("machine", "commit")
    assert (other.find(CASE) is not None) == kept
    other.add({**CASE, "seed": 5}, [{"right": True}])
    cases = json.loads(path.read_text())["cases"]
    assert [case.get(fact) for case in cases] == (["another", mine] if kept else [None])
    assert record.Record(path, "cpu", outcomes, steps=1).find({**CASE, "seed": 5}) == [{"right": True}]
