"""Every example runs as it stands, where its package is installed, and learns; trainers make the steps of a loop."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}
COMPARED = EXAMPLES.pop("compare_mine")  # test_compare_open.py has it
EXAMPLES.pop("own_script")  # complete, so not short; test_gallery.py has it
NEEDS = {"hf_trainer": "transformers", "lightning_module": "lightning", "accelerate_loop": "accelerate"}
RANKS = {"join": 2}


def run(*command, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)


def installed(package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'natgrad[integrations]'")


def test_every_example_is_short():
    assert set(NEEDS) | set(RANKS) <= set(EXAMPLES)
    for name, path in {**EXAMPLES, "compare_mine": COMPARED}.items():
        assert len(path.read_text().splitlines()) <= 40, name


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_learns(name, tmp_path):
    if name in NEEDS:
        installed(NEEDS[name])
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS[name])] if name in RANKS else []
    )
    done = run(sys.executable, *launch, str(EXAMPLES[name]), str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    first, last = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", done.stdout).groups())
    assert last < 0.8 * first, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("package", ["lightning", "accelerate", "transformers"])
def test_a_trainer_makes_the_steps_of_a_loop(package, monkeypatch):
    """On one rank, bit for bit; benchmarks/trainers.py has two ranks too."""
    installed(package)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import trainers

    found, _ = trainers.table([package], ranks=(1,))
    assert {way: both["1"] for way, both in found[package].items()} == {
        way: told(package, way) for way in trainers.WAYS
    }


def told(package, way):
    """What comes of a way: Lightning clips no gradients in mixed precision, where `max_norm=` does."""
    return "refused by Lightning" if (package, way) == ("lightning", "bf16, clip") else "equal"


def test_the_committed_table_has_equal_runs():
    result = json.loads((ROOT / "benchmarks" / "results" / "trainers.json").read_text())
    runs = {(t, way): both for t, ways in result["equal to the loop"].items() for way, both in ways.items()}
    assert len(runs) == 3 * 8
    assert runs == {(t, way): dict.fromkeys("12", told(t, way)) for t, way in runs}
    whole, divided = result["memory"].values()
    assert whole["state of the largest rank"] > divided["state of the largest rank"]
