"""A cell asks for its trials in rounds, the same number for everyone, and goes by their results alone."""

from pathlib import Path

import pytest

from natgrad.train.compare.cell import cell, count_steps
from natgrad.train.compare.contenders import chosen
from natgrad.train.compare.protocol import Plan, Rung
from natgrad.train.compare.tasks import Profile
from natgrad.train.compare.trials import merit

SGD = chosen(("SGD",))[0]


def plan(halving, trials=8, finalists=2, seeds=3):
    return Plan(Profile(("SGD",), (64,), trials=trials, seeds=seeds, finalists=finalists, halving=halving), Path())


def order(results):
    return sorted(range(len(results)), key=lambda place: merit(results[place]))


def result(trial, loss):
    return {"values": trial.values, "budget": trial.steps, "seed": trial.seed, "evaluations": [{"loss": loss}]}


def play(plan, steps, loss_of):
    """Run a cell with made-up losses; return its outcome and the rounds of trials that it asked for."""
    one, asked = cell(SGD, 64, steps, plan, order, ranks=1), []
    wanted = next(one)
    while True:
        asked.append(wanted)
        try:
            wanted = one.send([result(trial, loss_of(trial)) for trial in wanted])
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
