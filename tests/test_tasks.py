"""Tasks of real size: what each trains, and that every contender takes its steps on them."""

from dataclasses import replace

import pytest
import torch

from natgrad.parallel import World
from natgrad_lab.compare.contenders import CONTENDERS
from natgrad_lab.compare.tasks import find_task
from natgrad_lab.train.loop import build_model, prepare, steps
from test_cifar import write_cifar


def size(task):
    return sum(parameter.numel() for parameter in build_model(task.recipe).parameters())


def test_images_get_ten_and_twenty_epochs_at_every_size_of_batch():
    small, large = find_task("cifar100-16"), find_task("cifar100-32")
    assert {batch: batch * small.steps_of(batch) for batch in (1000, 5000, 12500)} == dict.fromkeys(
        (1000, 5000, 12500), 500_000
    )
    assert small.steps_of("full") == 10
    assert large.steps_of(4096) == round(20 * 50_000 / 4096 + 0.5)
    assert large.recipe.data.shape() == (3, 32, 32)
    assert min(task.recipe.micro_batch or 0 for task in (small, large)) > 0
    assert (small.recipe.micro_batch or 0) >= 5000


def test_texts_are_the_next_character_of_windows_of_128():
    untied, tied = find_task("text"), find_task("text-tied")
    assert [task.recipe.data.shape()[2] * batch for task, batch in ((untied, 32), (tied, 256))] == [4096, 32768]
    assert all(task.steps_of(batch) == 500 for task in (untied, tied) for batch in (32, 256))
    assert size(untied) - size(tied) == 128 * 128
    assert size(untied) == pytest.approx(8.4e5, rel=0.01)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The two tasks that differ most, with their data: a few images, and a part of the text."""
    folder = tmp_path_factory.mktemp("cifar100")
    write_cifar(folder, labels=("fine_label", "coarse_label"), counts=(40, 20))
    found = {}
    for name, path in (("cifar100-16", str(folder)), ("text-tied", None)):
        task = find_task(name).located(path)
        found[name] = task, task.recipe.data.load()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar100-16", "text-tied"])
@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda one: one.name)
def test_every_contender_takes_steps_on_it(loaded, name, contender):
    task, splits = loaded[name]
    values = contender.points(1)[0]
    given = {"optimizer": contender.settings(values), "schedule": contender.schedule(values)}
    job = prepare(replace(task.recipe, **given, batch=8, micro_batch=4, steps=3), World(), splits)
    before = [parameter.detach().clone() for parameter in job.model.parameters()]
    losses = [step.loss for step in steps(job)]
    assert len(losses) == 3
    assert all(torch.isfinite(parameter).all() for parameter in job.model.parameters())
    assert not any(torch.equal(old, new) for old, new in zip(before, job.model.parameters()) if new.dim() > 1)
