"""The loop and evaluation."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from natgrad.parallel import World, run_threads
from natgrad_lab.data import Digits, Images
from natgrad_lab.models import CifarResNet, Mlp
from natgrad_lab.schedules import Cosine, Polynomial
from natgrad_lab.train import loop
from natgrad_lab.train.environment import describe
from natgrad_lab.train.evaluate import estimate_norms, evaluate
from natgrad_lab.train.loop import loss_of, prepare, steps
from natgrad_lab.train.optimizers import AdamW, KFac, Seng, Settings, Sgd, SpNgd
from natgrad_lab.train.recipe import Recipe, described

MLP = Recipe(Digits(), Mlp((16,)), Sgd(lr=0.1), batch=101, steps=4, seed=3)
OPTIMIZERS = [Sgd(lr=0.1, nesterov=True), AdamW(), SpNgd(lr=0.1), KFac(lr=0.1, refresh=2), Seng(lr=0.2, refresh=2)]


def weights(job):
    return torch.cat([parameter.detach().flatten() for parameter in job.model.parameters()])


def trained(recipe, world, splits):
    job = prepare(recipe, world, splits)
    return job, list(steps(job))


@pytest.mark.parametrize("optimizer", [Sgd(lr=0.1), AdamW()])
@pytest.mark.parametrize("ranks", [2, 3])
def test_uneven_shares_over_ranks_are_the_step_of_the_whole_batch(splits, optimizer, ranks, monkeypatch):
    recipe = replace(MLP, optimizer=optimizer)
    built = loop.build_model(recipe)
    monkeypatch.setattr(loop, "build_model", lambda _: copy.deepcopy(built))  # threads share one random generator
    alone, records = trained(recipe, World(), splits)
    for job, others in run_threads(ranks, lambda world: trained(recipe, world, splits)):
        torch.testing.assert_close(weights(job), weights(alone), rtol=1e-4, atol=1e-5)
        for one, other in zip(records, others):
            assert other.loss == pytest.approx(one.loss, rel=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda settings: type(settings).__name__)
def test_every_optimizer_learns_and_tells(splits, optimizer):
    model = CifarResNet(8, (4, 8, 8))
    recipe = Recipe(Digits(), model, optimizer, batch=240, steps=12)
    job, records = trained(recipe, World(), splits)
    assert records[-1].loss < 0.75 * records[0].loss
    assert job.score().accuracy > 0.3
    for record in records:
        json.dumps(record.second_order)
        assert all(seconds >= 0 for seconds in record.stages.values())
        assert sum(record.stages.values()) == pytest.approx(record.seconds, rel=0.05)
        assert record.images_per_second > 0
    if isinstance(optimizer, SpNgd | KFac | Seng):
        assert 0 <= records[-1].second_order["refreshed"] <= 1
        assert records[-1].second_order["intervals"]
        assert {"measure", "factor", "precondition"} <= set(records[-1].stages)
        assert records[0].second_order["refreshed"] == 1
    else:
        assert records[-1].second_order == {}


def test_the_schedule_multiplies_the_learning_rate_by_progress(splits):
    _, records = trained(replace(MLP, schedule=Cosine()), World(), splits)
    assert [record.lr for record in records] == pytest.approx([0.1 * Cosine()(t) for t in (0, 0.25, 0.5, 0.75)])


def test_epochs_count_batches_and_steps_count_instead_where_given(splits):
    assert prepare(replace(MLP, steps=None, epochs=2, batch=1000), World(), splits).steps == 4
    assert prepare(replace(MLP, steps=None, epochs=2, batch=1000, drop_last=True), World(), splits).steps == 2
    assert prepare(replace(MLP, steps=3, epochs=2), World(), splits).steps == 3
    with pytest.raises(ValueError, match=r"epochs=0\.1 of 2 steps"):
        prepare(replace(MLP, steps=None, epochs=0.1, batch=1000), World(), splits)


def test_evaluation_counts_every_image_once_on_any_number_of_ranks(splits):
    model = Mlp((16,)).build((1, 8, 8), 10)
    inputs, labels = splits.test.batch(torch.arange(360))
    logits = model(inputs)
    expected = nn.functional.cross_entropy(logits, labels).item()
    right = (logits.argmax(1) == labels).float().mean().item()
    for score in [
        evaluate(model, splits.test, World()),
        *run_threads(3, lambda w: evaluate(model, splits.test, w)),
    ]:
        assert score.loss == pytest.approx(expected, rel=1e-5)
        assert score.accuracy == pytest.approx(right)


@pytest.mark.parametrize("soft", [False, True])
def test_label_smoothing_gives_the_other_classes_their_share(soft):
    torch.manual_seed(0)
    output, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    targets = torch.full((6, 4), 0.1 / 3).scatter_(1, labels.unsqueeze(1), 0.9)
    expected = -(targets * output.log_softmax(1)).sum()
    given = nn.functional.one_hot(labels, 4).float() if soft else labels
    torch.testing.assert_close(loss_of(output, given, 0.1), expected)
    torch.testing.assert_close(
        loss_of(output, given, 0.0), nn.functional.cross_entropy(output, labels, reduction="sum")
    )


def test_a_recipe_smooths_its_labels_while_learning(splits):
    losses = [trained(replace(MLP, steps=1, label_smoothing=share), World(), splits)[1][0].loss for share in (0, 0.5)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    with pytest.raises(ValueError, match="label_smoothing=1 "):
        replace(MLP, label_smoothing=1.0).check_values()


def norm_net():
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4, momentum=0.3), nn.Dropout(0.5))


def test_norm_statistics_are_those_of_the_training_images():
    torch.manual_seed(0)
    images = Images(torch.randn(600, 1, 2, 2) * 3 + 5, torch.zeros(600, dtype=torch.int64), 2, (1.0,), (2.0,))
    inputs, _ = images.batch(torch.arange(600))
    model = norm_net()
    estimate_norms(model, images, World())
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm1d)
    torch.testing.assert_close(norm.running_mean, inputs.flatten(1).mean(0))
    torch.testing.assert_close(norm.running_var, inputs.flatten(1).var(0))
    assert norm.momentum == 0.3
    assert all(module.training for module in model.modules())


def test_norm_statistics_are_the_mean_over_ranks_and_equal_on_all():
    torch.manual_seed(0)
    images = Images(torch.randn(600, 1, 2, 2), torch.zeros(600, dtype=torch.int64), 2, (0.0,), (1.0,))
    shares = [images.take(torch.arange(rank, 600, 2)).images.flatten(1) for rank in range(2)]

    def estimated(world):
        model = norm_net().eval()
        estimate_norms(model, images, world)
        assert not any(module.training for module in model.modules())
        return model[1]

    for norm in run_threads(2, estimated):
        torch.testing.assert_close(norm.running_mean, (shares[0].mean(0) + shares[1].mean(0)) / 2)
        torch.testing.assert_close(norm.running_var, (shares[0].var(0) + shares[1].var(0)) / 2)


def test_an_error_while_estimating_leaves_mode_and_momentum_as_they_were():
    images = Images(torch.randn(8, 1, 3, 3), torch.zeros(8, dtype=torch.int64), 2, (0.0,), (1.0,))
    model = norm_net()
    with pytest.raises(RuntimeError):
        estimate_norms(model, images, World())
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.momentum == 0.3


@pytest.mark.parametrize("optimizer", [SpNgd(lr=0.05, refresh=1), KFac(lr=0.05, refresh=1)])
def test_judging_between_two_steps_changes_no_step(splits, optimizer):
    """Evaluation passes data through a model that is being watched; nothing of it may be measured."""
    recipe = replace(MLP, optimizer=optimizer, model=CifarResNet(8, (4, 4, 4)), batch=64)
    quiet, _ = trained(recipe, World(), splits)
    judged = prepare(recipe, World(), splits)
    for _ in steps(judged):
        judged.score()
    torch.testing.assert_close(weights(judged), weights(quiet), rtol=1e-5, atol=1e-6)


def test_settings_are_described_with_their_kinds():
    plain = described(replace(MLP, schedule=Polynomial(3.5)))
    assert plain["schedule"] == {"kind": "Polynomial", "power": 3.5, "begin": 0.0, "end": 1.0}
    assert json.loads(json.dumps(plain))["model"] == {"kind": "Mlp", "hidden": [16]}


def test_the_machine_is_described_in_plain_values():
    about = json.loads(json.dumps(describe(World(), torch.device("cpu"))))
    assert about["versions"]["torch"]
    assert about["ranks"] == 1


def test_a_kind_without_a_build_says_so():
    with pytest.raises(NotImplementedError, match="Settings"):
        Settings().build(nn.Linear(1, 1), World())
