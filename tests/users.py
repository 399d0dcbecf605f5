"""A user's own module in the folder where a test runs."""

import sys

import pytest

MINE = '''
from dataclasses import dataclass
from torch import nn
from natgrad_lab.models import Architecture
from natgrad_lab.train.optimizers import Sgd
from beside import widths

def make(num_classes, shape, width=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], width), nn.Linear(width, num_classes))

def other(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes), nn.Dropout(0.5), nn.BatchNorm1d(classes))

def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def wrong(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes + 1))

def images():
    return nn.Identity()

def several(classes):
    return Several()

def deep():
    return nn.Linear(3, 10)

def number():
    return 3

def broken():
    raise KeyError("my own mistake")

class Several(nn.Module):
    def forward(self, x):
        return x, x

@dataclass(frozen=True)
class Kind(Architecture):
    width: int = 7
    def build(self, shape, classes):
        return make(classes, shape, self.width)

@dataclass(frozen=True)
class Faster(Sgd):
    lr: float = 3.0

KIND = Kind(9)
built = plain()
three = 3

def recipe():
    """My recipe."""
    from natgrad_lab.recipes.digits import digits_sgd
    return digits_sgd()

RECIPE = recipe()
'''


@pytest.fixture(autouse=True)
def _mine(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "beside.py").write_text("widths = (1, 2)\n")
    (tmp_path / "lame.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE", "NATGRAD_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]
