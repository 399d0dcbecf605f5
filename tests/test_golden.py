"""A change of structure moves no weight: twenty steps of every optimizer end where they ended before (golden.py)."""

import json

import pytest

import golden

KEPT = json.loads(golden.FILE.read_text())


@pytest.mark.parametrize("ranks", golden.RANKS)
@pytest.mark.parametrize("case", golden.CASES)
def test_twenty_steps_end_where_they_ended(case, ranks):
    found, kept = golden.made(case, ranks), KEPT[f"{case}, {ranks}"]
    assert found.keys() == kept.keys()
    assert golden.difference(found, kept) < 1e-9
