"""The complete script and the gallery run in a tiny form; the script's runs resume to the last bit."""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch.testing import assert_close

ROOT = Path(__file__).parents[1]
GALLERY = sorted((ROOT / "examples" / "gallery").glob("*.py"))
RANKS = 2
STOPPED = 3
SHORT = ["--epochs", "1", "--batch", "240", "--save-every", "2"]
"""Five steps of the script, checkpoints after 2, 4 and 5."""


def script(path):
    """The script as a module of its own, as fresh as in a new process."""
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(folder, stop=None):
    """Run the script in this process, to its end or until it is asked to stop in a step; returns what it ends with."""
    module = script(ROOT / "examples" / "own_script.py")
    step, made = module.train_step, []

    def counted(*given):
        made.append(step(*given))
        if len(made) == stop:
            signal.raise_signal(signal.SIGTERM)
        return made[-1]

    module.train_step = counted
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        model = module.main([*SHORT, "--out", str(folder)])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, len(made)


def checkpoints(folder):
    return sorted(path.parent.name for path in folder.glob("step-*/.metadata"))


def test_a_stopped_script_goes_on_to_the_same_bits(tmp_path, capsys):
    whole, steps = train(tmp_path / "whole")
    assert steps == 5
    assert checkpoints(tmp_path / "whole") == ["step-00000004", "step-00000005"]  # the last two are kept
    _, steps = train(tmp_path / "parts", stop=STOPPED)
    assert steps == STOPPED
    assert checkpoints(tmp_path / "parts") == ["step-00000002", "step-00000003"]
    shutil.copytree(tmp_path / "parts" / "step-00000003", tmp_path / "parts" / "step-00000009")
    (tmp_path / "parts" / "step-00000009" / ".metadata").unlink()  # as a killed run leaves it
    resumed, steps = train(tmp_path / "parts")
    assert steps == 5 - STOPPED
    assert "step 3 of 5" in capsys.readouterr().out
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    rows = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]


def test_a_batch_that_does_not_divide_is_refused(tmp_path, monkeypatch):
    module = script(ROOT / "examples" / "own_script.py")
    with pytest.raises(ValueError, match="batch of 241 does not divide by 2 ranks"):
        module.Batches(1000, 241, 0, 2, 0, 0, 5)
    shares = [list(module.Batches(1000, 240, rank, 2, 0, 3, 6)) for rank in range(2)]
    alone = list(module.Batches(1000, 240, 0, 1, 0, 3, 6))
    assert [sorted(a + b) for a, b in zip(*shares)] == [sorted(batch) for batch in alone]  # on any number of ranks


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def on_two_ranks(rank, ports, folder, results):
    """All that two processes are asked, in one go: to start them takes longer than most of it."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1")
    ports = iter(ports)

    def run(work):
        os.environ["MASTER_PORT"] = str(next(ports))
        return work()

    sys.stdout = (folder / f"rank{rank}.txt").open("w")
    found = {"whole": run(lambda: train(folder / "whole"))}
    found["stopped"] = run(lambda: train(folder / "parts", stop=STOPPED if rank == 1 else None))  # one rank hears of it
    found["resumed"] = run(lambda: train(folder / "parts"))
    for name, more in (("cifar", ["--batch", "64"]), ("sharded", ["--batch", "8", "--out", str(folder / "sharded")])):
        run(lambda name=name, more=more: script(ROOT / f"examples/gallery/{name}.py").main(["--steps", "2", *more]))
    sys.stdout.close()
    results[rank] = found


@pytest.mark.slow
def test_two_processes_stop_and_go_on_together(tmp_path):
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(on_two_ranks, ([free_port() for _ in range(5)], tmp_path, results), RANKS)
        first, second = results[0], results[1]
    (whole, steps), (resumed, rest) = first["whole"], first["resumed"]
    assert (steps, first["stopped"][1], second["stopped"][1], rest) == (5, STOPPED, STOPPED, 5 - STOPPED)
    for name, tensor in whole.items():
        assert torch.equal(tensor, second["whole"][0][name])
        if "running" in name:  # a run that is stopped averages them once more
            assert_close(resumed[name], tensor, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(resumed[name], tensor), name
    alone, _ = train(tmp_path / "alone")
    assert_close(alone["0.weight"], whole["0.weight"], rtol=0.5, atol=0.05)  # BatchNorm sees halves of the batch
    said = (tmp_path / "rank0.txt").read_text()
    assert "SPNGD, 2 ranks:" in said
    assert re.search(r"resumed from step 1: weights differ by 0$", said, re.MULTILINE)
    assert (tmp_path / "rank1.txt").read_text() == ""


PRINTED = {
    "pinn": r"refused: the loss holds derivatives.*Adam: 10 steps.*NLCG: 2 steps.*100\.0% of the weights",
    "fine_tune": r"head alone: 1 layer.*everything: 5 layers.*from scratch: ",
    "language_model": r"AdamW: .*SPNGD: .*a mean over 64 predictions.*100\.0% of the weights",
    "lora": r"7,168 of 123,744 weights train.*source held out: .*100\.0% of the weights",
}
SMALLER = {"language_model": ["--batch", "8"], "lora": ["--batch", "8"]}


@pytest.mark.parametrize("name", PRINTED)
def test_a_script_of_the_gallery_prints_what_it_says(name, capsys):
    script(ROOT / f"examples/gallery/{name}.py").main(["--steps", "2", *SMALLER.get(name, [])])
    assert re.search(PRINTED[name], capsys.readouterr().out, re.DOTALL)


def test_every_script_of_the_gallery_is_short_and_on_its_page():
    assert {path.stem for path in GALLERY} == {*PRINTED, "cifar", "sharded"}
    page = (ROOT / "docs" / "gallery.md").read_text()
    for path in GALLERY:
        text = path.read_text()
        assert len(text.splitlines()) <= 100, path.name
        assert "One learns:" in text, path.name
        assert "It prints" in text, path.name
        assert f"gallery/{path.name}" in page, path.name


@pytest.mark.parametrize(
    ("given", "started"),
    [
        (["own_script.py", "--out", "runs/own"], "own_script.py --out runs/own"),
        (["digits_spngd", "--out", "a"], "-m natgrad_lab train digits_spngd --out a --auto-resume"),
        (["./mine.py:recipe"], "-m natgrad_lab train ./mine.py:recipe --auto-resume"),
    ],
)
def test_the_launcher_starts_a_recipe_or_a_script(given, started, tmp_path):
    fake = tmp_path / "torchrun"
    fake.write_text('#!/bin/bash\necho "$@"\n')
    fake.chmod(0o755)
    around = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOSTS": "2", "FIRST": "one", "RANKS": "8"}
    launcher = ["bash", str(ROOT / "examples" / "two_hosts.sh"), *given]
    said = subprocess.run(launcher, env=around, capture_output=True, text=True, check=True).stdout
    assert said.strip().endswith(f"--rdzv-id natgrad {started}")


def test_the_page_shows_lines_of_the_script():
    """Each block of Python stands in the script, line by line; what is indented there is not on the page."""
    lines = [line.strip() for line in (ROOT / "examples" / "own_script.py").read_text().splitlines()]
    page = (ROOT / "docs" / "many-nodes.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        shown = [line.strip() for line in block.splitlines()]
        assert any(lines[k : k + len(shown)] == shown for k in range(len(lines))), block
