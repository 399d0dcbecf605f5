"""The recipes of ImageNet against the tables of their papers, written out, and at a small size for real."""

from dataclasses import replace

import pytest
import torch

from natgrad.parallel import World
from natgrad_lab.data import Regularisation
from natgrad_lab.models.imagenet import ImageResNet
from natgrad_lab.recipes import find
from natgrad_lab.schedules import Constant, Polynomial
from natgrad_lab.train.loop import prepare, steps
from natgrad_lab.train.optimizers import KFac, SpNgd
from pictures import write_images

IMAGES = 1_281_167

# Osawa et al. 2020, Table 2: batch, alpha_mixup, p_decay, e_start, e_end, eta0, m0, lambda, steps; section 7.2: epochs
PAPER = {
    "4k": (4096, 0.4, 11.0, 1, 53, 8.18e-3, 0.997, 2.5e-4, 10_948, 35),
    "8k": (8192, 0.4, 8.0, 1, 53.5, 1.25e-2, 0.993, 2.5e-4, 5_434, 35),
    "16k": (16_384, 0.4, 8.0, 1, 53.5, 2.5e-2, 0.985, 2.5e-4, 2_737, 35),
    "32k": (32_768, 0.6, 3.5, 1.5, 49.5, 3.0e-2, 0.97, 2.0e-4, 1_760, 45),
    "64k": (65_536, 0.6, 2.9, 2, 64.5, 4.0e-2, 0.95, 1.5e-4, 1_173, 60),
    "128k": (131_072, 1.0, 2.9, 3, 100, 7.0e-2, 0.93, 1.0e-4, 873, 90),
}
# The learning rate when the paper's runs stop, over that at their start.
STOP = {"4k": 8.6e-6, "8k": 2.4e-4, "16k": 2.4e-4, "32k": 2.5e-4, "64k": 4.9e-4, "128k": 1.4e-3}
# The release of 2019, configs/*.json: epochs run; all else is the paper's but for the last row.
RELEASE = {name: (*PAPER[name][:8], None, epochs) for name, epochs in zip(PAPER, (36, 36, 36, 46, 61, 81))}
RELEASE["128k"] = (131_072, 1.0, 3.0, 1, 95, 7.0e-2, 0.93, 1.0e-4, None, 81)
# Osawa et al. 2019: 978 steps at the largest batch, 100 epochs, decay to 107.7; the other rows as above.
KFAC = {**PAPER, "128k": (131_072, 1.0, 2.9, 3, 107.7, 7.0e-2, 0.93, 1.0e-4, 978, 100)}

FAMILIES = {"spngd": PAPER, "spngd_d": RELEASE, "kfac": KFAC}
CASES = [(family, size) for family, table in FAMILIES.items() for size in table]


@pytest.mark.parametrize(("family", "size"), CASES)
def test_a_recipe_is_its_row(family, size):
    recipe = find(f"imagenet_{family}_{size}")()
    batch, alpha, power, start, end, lr, momentum, damping, count, epochs = FAMILIES[family][size]
    if count is None:
        count = round(epochs * IMAGES / batch)
    assert (recipe.batch, recipe.steps, recipe.epochs, recipe.drop_last) == (batch, count, epochs, True)
    optimizer = recipe.optimizer
    assert isinstance(optimizer, KFac if family == "kfac" else SpNgd)
    assert (optimizer.lr, optimizer.momentum, optimizer.damping) == (lr, momentum, damping)
    whole = count * batch / IMAGES
    assert whole == pytest.approx(epochs, rel=0.01)
    assert isinstance(recipe.schedule, Polynomial)
    assert recipe.schedule.power == power
    assert recipe.schedule.begin * whole == pytest.approx(start, rel=1e-12)
    assert recipe.schedule.end * whole == pytest.approx(end, rel=1e-12)
    assert recipe.damping_schedule == Constant()
    assert recipe.regularisation.mixup == alpha
    assert recipe.micro_batch == 32


@pytest.mark.parametrize("size", STOP)
def test_the_rate_at_the_stop_is_the_papers(size):
    batch, *_, count, epochs = PAPER[size]
    schedule = find(f"imagenet_spngd_{size}")().schedule
    assert schedule(epochs / (count * batch / IMAGES)) == pytest.approx(STOP[size], rel=0.03)
    assert schedule(0.0) == 1.0


@pytest.mark.parametrize(("family", "size"), CASES)
def test_a_recipe_is_of_its_family(family, size):
    recipe = find(f"imagenet_{family}_{size}")()
    optimizer, paper = recipe.optimizer, family == "spngd"
    assert isinstance(optimizer, SpNgd | KFac)
    assert optimizer.refresh == (None if paper and size in ("4k", "8k", "16k", "32k") else 1)
    assert (optimizer.tolerance, optimizer.limit, optimizer.ema_decay, optimizer.weight_decay) == (0.1, None, 0, 0)
    assert (optimizer.fisher, optimizer.rows_per_dim) == ("empirical", None)
    assert (optimizer.norms, optimizer.norm_damping) == (("full", 16) if family == "spngd_d" else ("unitwise", 1))
    assert optimizer.displaced == paper
    assert (optimizer.length, optimizer.before, optimizer.max_norm) == ("plain", False, None)
    assert (optimizer.coefficient, optimizer.rescale) == (("tied", "always") if paper else ("corrected", "shrink"))
    assert getattr(optimizer, "gather", None) == ("directions" if family == "kfac" else None)
    assert recipe.regularisation == Regularisation(
        mixup=recipe.regularisation.mixup,
        per_sample=not paper,
        fresh_majority=not paper,
        erase=0.5,
        area=(0.02, 0.25),
        aspect=(0.3, 1.0),
        keep_erased=not paper,
    )
    assert recipe.model == ImageResNet(50, width=64, deep_stem=family == "spngd_d")
    data = recipe.data
    assert (data.size, data.crop, data.subtract, data.augment) == (256, 224, "image", True)
    assert not data.in_memory
    assert data.shape() == (3, 224, 224)


@pytest.mark.parametrize(
    "name", ["imagenet_spngd_4k", "imagenet_spngd_64k", "imagenet_spngd_d_128k", "imagenet_kfac_8k"]
)
def test_a_recipe_runs_when_made_small(name, tmp_path):
    write_images(tmp_path, classes=("cat", "cow", "dog"), count=6)
    recipe = find(name)()
    data = replace(recipe.data, path=str(tmp_path), size=36, crop=32)
    small = replace(recipe, data=data, model=replace(recipe.model, depth=18, width=4), batch=12, micro_batch=5, steps=3)
    job = prepare(small, World(), data.load())
    records = list(steps(job))
    assert [r.step for r in records] == [1, 2, 3]
    assert [r.lr for r in records] == pytest.approx([recipe.optimizer.lr * recipe.schedule(k / 3) for k in range(3)])
    assert all(torch.tensor(r.loss).isfinite() for r in records)
    assert job.score().loss > 0
