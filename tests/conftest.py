"""Every test starts from the same random state, on one thread and without a network, and leaves compiled models free
to run compiled.
"""

import importlib.util
import os

import pytest
import torch

from natgrad import capture
from natgrad_lab.data import Digits

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    modes = torch._C._len_torch_function_stack()
    yield
    capture._armed.clear()  # optimizers of other tests may be there yet, and would keep compiled models eager
    torch.compiler.set_stance("default")
    assert torch._C._len_torch_function_stack() == modes, "a mode was left behind"


@pytest.fixture
def double():
    """Float64 by default within a test."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def splits():
    """scikit-learn's digits."""
    return Digits().load()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder to be in, and no world around."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE", "NATGRAD_DEBUG"):
        monkeypatch.delenv(name, raising=False)


def pytest_terminal_summary(terminalreporter):
    """Say which trainers the suite did not run with."""
    missing = [name for name in ("lightning", "accelerate", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        terminalreporter.write_line(f"not installed, so their examples and trainers were skipped: {', '.join(missing)}")
