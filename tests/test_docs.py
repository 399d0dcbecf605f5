"""The Python of the pages runs: every block of a page, in the page's order, in one namespace."""

import ast
import importlib
import inspect
import re
import textwrap
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist  # noqa: TID251  (what users do)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import natgrad
from in_parts import free_port
from natgrad.layers.layer import layer_of
from structure import REFERENCED, ROOT, public_names, undocumented

PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]
BLOCK = re.compile(
    r"(?:^<!-- not run: ([^\n]+) -->\n)?^(?P<indent> *)```python\n(?P<code>.*?)^ *```$", re.DOTALL | re.MULTILINE
)


def blocks(page: Path) -> list[str]:
    """The blocks of a page that run, each at its own line of the file, so that errors name it."""
    text = page.read_text(encoding="utf-8")
    return [
        "\n" * text.count("\n", 0, found.start("code")) + textwrap.dedent(found["code"])
        for found in BLOCK.finditer(text)
        if not found[1]
    ]


class MyModel(nn.Module):
    """What pages call a model."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(48, 16), nn.LayerNorm(16), nn.ReLU()])
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = x.flatten(1)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def prepared() -> dict:
    """What pages take for granted: a model, a loader, one batch and its loss."""
    torch.manual_seed(0)
    model = MyModel()
    data = TensorDataset(torch.randn(128, 3, 4, 4), torch.randint(5, (128,)))
    loader = DataLoader(data, batch_size=32)
    images, labels = next(iter(loader))
    return {
        "torch": torch,
        "nn": nn,
        "F": F,
        "natgrad": natgrad,
        "MyModel": MyModel,
        "model": model,
        "data": data,
        "loader": loader,
        "steps": len(loader),
        "epochs": 1,
        "device": torch.device("cpu"),
        "images": images,
        "labels": labels,
        "loss": F.cross_entropy(model(images), labels),
        "__name__": "page",
    }


SPAN = re.compile(r"`((?:natgrad\.)?(?:SPNGD|KFAC|SENG|NLCG|Preconditioner)\(model[^`]*\))`")


def spans() -> list[str]:
    """Constructors within the text of pages, tables included, that are complete."""
    found = {
        span
        for page in PAGES
        for span in SPAN.findall(page.read_text(encoding="utf-8"))
        if "..." not in span and ")." not in span
    }
    return sorted(found)


class Language(nn.Module):
    """A language model that is called as those of transformers are."""

    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(7, 8), nn.Linear(8, 7)

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.head(self.tokens(input_ids) * attention_mask[..., None]))


def texts() -> dict:
    """A language model, its optimizer and micro-batches that are padded to lengths of their own."""
    model = Language()
    micro_batches = []
    for length in (5, 9):
        tokens = torch.randint(7, (4, length))
        mask = torch.arange(length) < torch.randint(2, length + 1, (4, 1))
        labels = tokens.masked_fill(~mask, -100)
        micro_batches.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return {"model": model, "micro_batches": micro_batches, "optimizer": natgrad.SPNGD(model, lr=0.1)}


def stepped() -> dict:
    """An optimizer that has made a step."""
    names = prepared()
    optimizer = natgrad.SPNGD(names["model"], lr=0.1)
    F.cross_entropy(names["model"](names["images"]), names["labels"]).backward()
    optimizer.step()
    optimizer.zero_grad()
    return names | {"optimizer": optimizer}


OWN = {"training.md": texts, "troubleshooting.md": stepped}
"""What single pages take for granted beside."""

WITH_CODE = [page for page in PAGES if blocks(page)]


@pytest.mark.parametrize("page", WITH_CODE, ids=[page.relative_to(ROOT).as_posix() for page in WITH_CODE])
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """Pages that open a process group have one of a single rank, as `torchrun` would give."""
    monkeypatch.chdir(tmp_path)
    group = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    registered = dict(layer_of.registry)
    names = prepared() | {"__file__": str(page)} | OWN.get(page.name, dict)()
    code = blocks(page)
    try:
        if any("init_process_group" in block for block in code):
            for name, value in group.items():
                monkeypatch.setenv(name, str(value))
        for block in code:
            if "init_process_group" in block and dist.is_initialized():
                dist.destroy_process_group()
            exec(compile(block, str(page), "exec"), names)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for kind in layer_of.registry.keys() - registered.keys():
            layer_of.register(kind, lambda module: "no longer known")


@pytest.mark.parametrize("span", spans())
def test_a_constructor_within_a_text_is_taken(span):
    offered = {name: getattr(natgrad.optim, name) for name in natgrad.optim.__all__}
    optimizer = eval(span, offered | prepared())
    assert isinstance(optimizer, torch.optim.Optimizer)


def test_pages_have_blocks_and_say_why_one_does_not_run():
    assert len(WITH_CODE) > 10
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert text.count("<!-- not run: ") == len([found for found in BLOCK.finditer(text) if found[1]])


def described() -> set[str]:
    """The names at the top of a module of natgrad whose value has a text behind it."""
    found = set()
    for path in (ROOT / "src" / "natgrad").rglob("*.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        for node, after in pairwise(body):
            if isinstance(node, ast.Assign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                found.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return found


def test_every_public_name_has_a_docstring():
    offered = [importlib.import_module(module) for module in REFERENCED]
    objects = {name: getattr(module, name) for module in offered for name in module.__all__}
    explained = {name for name, it in objects.items() if (inspect.isclass(it) or inspect.isroutine(it)) and it.__doc__}
    assert objects.keys() - explained - described() == set()


def test_every_public_name_is_on_a_page():
    assert not undocumented()
    assert set(natgrad.__all__) <= public_names().keys()
    assert public_names()["World"] >= {"natgrad.World", "natgrad.parallel.World"}
