"""Images read ahead by worker processes are those read on demand, whatever happens to the workers."""

import gc
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import torch.multiprocessing as mp

from natgrad.parallel import World
from natgrad_lab.data import ImageSet, read_ahead
from natgrad_lab.data.pictures import Pictures
from natgrad_lab.models import Mlp
from natgrad_lab.train.loop import prepare, steps
from natgrad_lab.train.optimizers import Sgd
from natgrad_lab.train.recipe import Recipe
from pictures import write_images
from test_gloo import free_port


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, count=40)
    return str(folder)


def source(folder, **options):
    return ImageSet(folder, **{"size": 8, "in_memory": False, "workers": 2, **options})


def test_announced_or_not_the_same_images_come(folder):
    images, kept = source(folder).load().train, source(folder, in_memory=True).load().train
    order = [torch.randperm(80)[:n] for n in (70, 3, 80, 64)]
    ahead = read_ahead(images, iter(order))
    asked = [order[0], torch.tensor([5, 6]), order[1], order[2][:9], order[2], order[3], torch.tensor([1])]
    for index in asked:  # some are out of the order, and leave it as it was
        for one, other in zip(ahead.batch(index), kept.batch(index)):
            assert torch.equal(one, other)
    assert not ahead.images.coming.coming


def test_only_pictures_that_are_decoded_on_demand_are_read_ahead(folder):
    kept, alone = source(folder, in_memory=True).load().train, source(folder, workers=0).load().train
    for images in (kept, alone):
        assert read_ahead(images, [torch.arange(3)]) is images or images.images.ahead([]) is images.images


def test_reading_ahead_draws_nothing(folder):
    images, before = source(folder).load().train, torch.get_rng_state()
    read_ahead(images, [torch.arange(9)]).batch(torch.arange(9))
    assert torch.equal(torch.get_rng_state(), before)


RECIPE = Recipe(ImageSet(), Mlp((8,)), Sgd(lr=0.05), batch=30, micro_batch=8, steps=7, seed=3, norm_samples=20)


def losses(data, world=None):
    job = prepare(replace(RECIPE, data=data), world or World(), data.load())
    told = []
    for record in steps(job):
        told.append(record.loss)
        if record.step % 3 == 0:
            told.append(job.score().loss)
    assert job.splits.train.images.coming is not None if data.workers and not data.in_memory else True
    return told


def test_training_is_the_same_from_memory_from_files_and_ahead(folder):
    expected = losses(source(folder, in_memory=True))
    assert losses(source(folder)) == expected
    assert losses(source(folder, workers=0)) == expected


def rank(number, port, folder, results):
    import torch.distributed as dist  # noqa: TID251

    torch.set_num_threads(1)
    torch.randn(300, 300) @ torch.randn(300, 300)  # threads before workers
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=2)
    results[number] = losses(source(folder, augment=False), World())
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_with_workers_each_train_as_one(folder):
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(rank, (free_port(), folder, results), nprocs=2)
        both = dict(results)
    assert both[0] == both[1]
    assert both[0] == pytest.approx(losses(source(folder, workers=0, augment=False)), rel=1e-4)


def workers_of(images: Pictures):
    return [worker.pid for worker in images.coming.made._workers]


def test_killed_workers_are_done_without(folder):
    images = source(folder).load().train
    order = [torch.arange(80) for _ in range(60)]
    ahead = read_ahead(images, order)
    first = ahead.batch(order[0])
    for pid in workers_of(ahead.images):
        os.kill(pid, signal.SIGKILL)
    with pytest.warns(UserWarning, match="images are no longer read ahead"):
        later = [ahead.batch(index)[0] for index in order[1:]]
    assert all(torch.equal(inputs, first[0]) for inputs in later)


def test_an_interrupt_of_the_terminal_leaves_workers_alone(folder):
    images = source(folder).load().train
    order = [torch.arange(80) for _ in range(60)]
    ahead = read_ahead(images, order)
    ahead.batch(order[0])
    for pid in workers_of(ahead.images):
        os.kill(pid, signal.SIGINT)
    for index in order[1:]:
        ahead.batch(index)
    assert len(ahead.images.coming.coming) == 0


def running(pids):
    return [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


def test_workers_end_when_a_run_is_over(folder):
    data = source(folder)
    job = prepare(replace(RECIPE, data=data), World(), data.load())
    taking = steps(job)
    next(taking)
    pids = workers_of(job.splits.train.images)
    assert running(pids) == pids
    gc.disable()  # no cycle may hold them
    try:
        del job, taking
        assert not running(pids)
    finally:
        gc.enable()


KILLED = """
import itertools, os, sys, time, torch
from natgrad_lab.data import ImageSet, read_ahead
if __name__ == "__main__":
    train = ImageSet(sys.argv[1], size=8, in_memory=False, workers=2).load().train
    ahead = read_ahead(train, itertools.repeat(torch.arange(80)))
    ahead.batch(torch.arange(80))
    print(*[worker.pid for worker in ahead.images.coming.made._workers], flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_workers_end_with_a_rank_that_is_killed(folder, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    with subprocess.Popen([sys.executable, str(script), folder], stdout=subprocess.PIPE, text=True) as process:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()
        for _ in range(400):
            if not running(pids):
                break
            time.sleep(0.05)
    assert len(pids) == 2
    assert not running(pids)
