"""A cell asks for its trials in rounds, the same number for everyone, and goes by their results alone."""

import json
from pathlib import Path

import pytest

from natgrad_lab.compare.cell import cell, count_steps
from natgrad_lab.compare.contenders import chosen
from natgrad_lab.compare.protocol import Plan, Rung
from natgrad_lab.compare.race import Standing
from natgrad_lab.compare.tasks import Profile
from natgrad_lab.compare.transfer import Transfer
from natgrad_lab.compare.trials import merit

SGD = chosen(("SGD",))[0]


def plan(halving, trials=8, finalists=2, seeds=3, **others):
    profile = Profile(("SGD",), (64,), trials=trials, seeds=seeds, finalists=finalists, halving=halving, **others)
    return Plan(profile, Path())


def order(results):
    return sorted(range(len(results)), key=lambda place: merit(results[place]))


def result(trial, loss):
    return {"values": trial.values, "budget": trial.steps, "seed": trial.seed, "evaluations": [{"loss": loss}]}


def play(plan, steps, loss_of, far=False):
    """Run a cell with made-up losses; return its outcome and the rounds of trials that it asked for.

    far: what it is told when it asks whether it is far behind.
    """
    one, asked = cell(SGD, 64, steps, plan, order, ranks=1), []
    wanted = next(one)
    while True:
        told = [far for request in wanted if isinstance(request, Standing)]
        if not told:
            asked.append(wanted)
        try:
            wanted = one.send(told or [result(trial, loss_of(trial)) for trial in wanted])
        except StopIteration as finished:
            return finished.value, asked


def likes(lr):
    """The loss grows with the distance of the learning rate from the one that is liked."""
    return lambda trial: abs(trial.values["lr"] - lr)


def test_halving_tries_all_at_a_quarter_half_at_half_and_a_quarter_at_all_steps():
    assert plan(True).rungs(40) == [Rung(8, 10), Rung(4, 20), Rung(2, 40)]
    outcome, asked = play(plan(True), 40, likes(0.5))
    assert [(len(trials), trials[0].steps) for trials in asked[:3]] == [(8, 10), (4, 20), (2, 40)]
    kept = [{trial.values["lr"] for trial in trials} for trials in asked[:3]]
    assert kept[2] < kept[1] < kept[0]
    best = min(kept[0], key=lambda lr: abs(lr - 0.5))
    assert all(one.values["lr"] == best for one in outcome.tuned)


def test_without_halving_everything_is_tried_at_both_budgets():
    outcome, asked = play(plan(False), 40, likes(0.5))
    assert [(len(trials), trials[0].steps) for trials in asked[:2]] == [(8, 20), (8, 40)]
    assert [one.steps for one in outcome.tuned] == [40, 20]


@pytest.mark.parametrize("halving", [True, False])
def test_finalists_get_another_seed_and_finals_fresh_ones(halving):
    outcome, asked = play(plan(halving), 40, likes(0.5))
    again, finals = asked[-4:-2], asked[-2] + asked[-1]
    assert [{trial.seed for trial in trials} for trials in again] == [{101}, {101}]
    assert [len(trials) for trials in again] == [2, 2]
    assert all(trial.final for trial in finals)
    seeds = [(run["budget"], run["seed"]) for run in outcome.finals]
    assert seeds == [(40, 1), (40, 2), (40, 3), (20, 1), (20, 2), (20, 3)]
    assert not {1, 2, 3} & {trial.seed for trials in asked for trial in trials if not trial.final}


def test_another_seed_may_overturn_the_choice_and_a_diverged_run_never_wins():
    first, second = (point["lr"] for point in SGD.points(2))

    def loss(trial):
        if trial.seed == 101:
            return 0.0 if trial.values["lr"] == second else 10.0
        return 1.0 if trial.values["lr"] == first else 1.5

    outcome, _ = play(plan(False, trials=2), 40, loss)
    assert outcome.tuned[0].values["lr"] == second

    def diverging(trial):
        return None if trial.values["lr"] == first else 9.0

    outcome, _ = play(plan(False, trials=2), 40, diverging)
    assert outcome.tuned[0].values["lr"] == second
    assert merit([{"evaluations": []}]) == float("inf")


def test_each_budget_has_its_own_choice():
    first, second = (point["lr"] for point in SGD.points(2))
    outcome, _ = play(plan(False, trials=2), 40, lambda t: float((t.values["lr"] == first) == (t.steps == 20)))
    assert [one.values["lr"] for one in outcome.tuned] == [first, second]


@pytest.mark.parametrize("finalists", [1, 2])
@pytest.mark.parametrize("halving", [True, False])
def test_steps_are_counted_beforehand(halving, finalists):
    given = plan(halving, trials=7, finalists=finalists)
    _, asked = play(given, 41, likes(0.5))
    assert count_steps(given, 41) == sum(trial.steps for trials in asked for trial in trials)


def test_one_finalist_is_chosen_at_once():
    _, asked = play(plan(True, finalists=1), 40, likes(0.5))
    assert len(asked) == 3 + 2


def test_half_of_the_steps_may_be_left_out():
    for halving, rounds in ((True, 3), (False, 1)):
        given = plan(halving, half=False)
        outcome, asked = play(given, 40, likes(0.5))
        assert [one.steps for one in outcome.tuned] == [40]
        assert [len(trials) for trials in asked[rounds:]] == [2, 3]
        assert count_steps(given, 40) == sum(trial.steps for trials in asked for trial in trials)


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("halving", [True, False])
def test_what_is_far_behind_goes_on_with_its_best_point_and_the_same_seeds(halving, half):
    given = plan(halving, far_behind=0.5, half=half)
    level, _ = play(given, 40, likes(0.5), far=False)
    outcome, asked = play(given, 40, likes(0.5), far=True)
    assert (level.far_behind, outcome.far_behind) == (False, True)
    tuning = [trial for trials in asked[1:] for trial in trials if not trial.final]
    assert 40 in {trial.steps for trials in asked for trial in trials if not trial.final}
    best = min(SGD.points(8), key=lambda point: abs(point["lr"] - 0.5))
    assert all(trial.values == best for trial in tuning)
    assert all(trial.seed == 100 for trial in tuning)
    assert len(tuning) == len(given.rungs(40)) - 1
    assert len(outcome.finals) == len(level.finals) == 3 * (1 + half)
    assert count_steps(given, 40, far=True) == sum(trial.steps for trials in asked for trial in trials)


def test_it_reports_its_best_point_after_the_first_round():
    one = cell(SGD, 64, 40, plan(True, far_behind=0.5), order, ranks=1)
    trials = next(one)
    losses = [abs(trial.values["lr"] - 0.5) for trial in trials]
    (standing,) = one.send([result(trial, loss) for trial, loss in zip(trials, losses)])
    assert isinstance(standing, Standing)
    assert (standing.contender, standing.batch, merit(standing.runs)) == ("SGD", 64, min(losses))


def record(folder, batches=(64, 128), half=True):
    """A finished comparison's file with the fields that settings are taken from."""
    points = SGD.points(4)
    budgets = [{"steps": 20, "values": points[1]}, {"steps": 40, "values": points[2]}]
    cells = [{"contender": "SGD", "batch": batch, "budgets": budgets[not half :]} for batch in batches]
    cells[-1] = {**cells[-1], "budgets": [{"steps": 40, "values": {**points[3], "momentum": [0.1, 0.2]}}]}
    plan = {"task": {"name": "other"}}
    (folder / "results.json").write_text(json.dumps({"plan": plan, "cells": cells}))
    return points


def test_settings_are_taken_over_without_tuning(tmp_path):
    points = record(tmp_path)
    given = plan(True, trials=0)._replace(transfer=Transfer(tmp_path, 64))
    outcome, asked = play(given, 40, likes(0.5))
    assert [(one.steps, one.values, one.tried) for one in outcome.tuned] == [(40, points[2], []), (20, points[1], [])]
    assert all(trial.final for trials in asked for trial in trials)
    assert count_steps(given, 40) == sum(trial.steps for trials in asked for trial in trials) == 3 * 60


def test_lists_come_back_as_tuples_and_all_steps_stand_in_for_half_of_them(tmp_path):
    points = record(tmp_path)
    given = plan(True, trials=0)._replace(transfer=Transfer(tmp_path, 128))
    outcome, _ = play(given, 40, likes(0.5))
    assert [one.values for one in outcome.tuned] == [{**points[3], "momentum": (0.1, 0.2)}] * 2


def test_the_size_of_batch_is_the_same_or_the_only_one_or_named(tmp_path):
    points = record(tmp_path)
    assert Transfer(tmp_path).values(SGD, 64)[0] == points[2]
    assert Transfer(tmp_path, 64).words(9) == "other at batch 64"
    with pytest.raises(ValueError, match=r"no batch 9; set --settings-batch to one of 64, 128"):
        Transfer(tmp_path).values(SGD, 9)
    record(tmp_path, batches=(64, "full"))
    assert Transfer(tmp_path, "full").values(SGD, 64)
    record(tmp_path, batches=(64,))
    assert Transfer(tmp_path).values(SGD, 9)


def test_settings_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--settings .* holds no finished comparison; name a folder"):
        Transfer(tmp_path).values(SGD, 64)
    record(tmp_path)
    with pytest.raises(ValueError, match=r"has no Muon; leave it out of --optimizers"):
        Transfer(tmp_path).values(chosen(("Muon",))[0], 64)
    found = json.loads((tmp_path / "results.json").read_text())
    for budget in found["cells"][0]["budgets"]:
        budget["values"] = {"lr": 0.1}
    (tmp_path / "results.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"chose lr for SGD, whose space is now lr, momentum"):
        Transfer(tmp_path).values(SGD, 64)
