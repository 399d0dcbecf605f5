"""The Python of the pages runs: every block of a page, in the page's order, in one namespace."""

import re
import textwrap
from pathlib import Path

import pytest
import torch
import torch.distributed as dist  # noqa: TID251  (what users do)
from torch import nn
from torch.nn import functional as F

import natgrad
from in_parts import free_port
from natgrad.layers.layer import layer_of
from structure import ROOT, public_names, undocumented

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


class MyModel(nn.Sequential):
    """What pages call a model."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(48, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 5))


def prepared() -> dict:
    """What pages take for granted: a model, a loader, one batch and its loss."""
    torch.manual_seed(0)
    model = MyModel()
    loader = [(torch.randn(32, 3, 4, 4), torch.randint(5, (32,))) for _ in range(4)]
    images, labels = loader[0]
    return {
        "torch": torch,
        "nn": nn,
        "F": F,
        "natgrad": natgrad,
        "MyModel": MyModel,
        "model": model,
        "loader": loader,
        "images": images,
        "labels": labels,
        "loss": F.cross_entropy(model(images), labels),
        "__name__": "page",
    }


SPAN = re.compile(r"`((?:natgrad\.)?(?:SPNGD|KFAC|SENG|NLCG|Preconditioner)\(model[^`]*\))`")


def spans() -> list[str]:
    """Constructors within the text of pages, tables included, that are complete."""
    found = {span for page in PAGES for span in SPAN.findall(page.read_text(encoding="utf-8")) if "..." not in span}
    return sorted(found)


WITH_CODE = [page for page in PAGES if blocks(page)]


@pytest.mark.parametrize("page", WITH_CODE, ids=[page.relative_to(ROOT).as_posix() for page in WITH_CODE])
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """Pages that open a process group have one of a single rank, as `torchrun` would give."""
    monkeypatch.chdir(tmp_path)
    group = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    registered = dict(layer_of.registry)
    names = prepared() | {"__file__": str(page)}
    code = blocks(page)
    try:
        if any("init_process_group" in block for block in code):
            for name, value in group.items():
                monkeypatch.setenv(name, str(value))
        for block in code:
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


def test_every_public_name_is_on_a_page():
    assert not undocumented()
    assert set(natgrad.__all__) <= public_names().keys()
    assert public_names()["World"] == {"natgrad.World", "natgrad.parallel.World"}
