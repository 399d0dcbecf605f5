"""Every test starts from the same random state, on one thread, and leaves compiled models free to run compiled."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    yield
    torch.compiler.set_stance("default")


@pytest.fixture
def double():
    """Float64 by default within a test."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
