"""`natgrad plan`: what is asked for, checked before anything is built, and what becomes of the answer."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from natgrad.parallel import World, check_replicas
from natgrad_lab.plan.advice import advise, parsed
from natgrad_lab.plan.machines import named
from natgrad_lab.plan.remedies import in_words, remedies
from natgrad_lab.plan.scaling import Network, Planner, scaled
from natgrad_lab.plan.shape_only import CLASSES, asked, numbers, taken
from natgrad_lab.recipes import find
from natgrad_lab.train.arguments import parse
from natgrad_lab.train.optimizers import KFac, Nlcg, Seng, Settings, Sgd, SpNgd
from natgrad_lab.train.recipe import Recipe, described

USAGE = """Predict a step's time, messages and memory on other machines. {which}

Another network: natgrad plan --model package.module:function --input 3,224,224 [--tokens VOCABULARY] [--batch 1024].
This machine as others are described: natgrad plan --calibrate FILE [--ranks N], in less than two minutes.
"""

NAMES: dict[str, type[Settings]] = {"SGD": Sgd, "SP-NGD": SpNgd, "K-FAC": KFac, "SENG": Seng, "NLCG": Nlcg}
IMAGES = {"Cifar10": 50_000, "Cifar100": 50_000, "Digits": 1437}
"""Training images of data that are always the same."""


@dataclass(frozen=True)
class PlanOptions:
    """On what, and what of it."""

    shard: bool = False
    """Plan models that are cut over ranks (FSDP2), as natgrad train --shard does; on one rank they are whole."""
    replicas: int = 1
    """With --shard: how many ranks hold each part (HSDP)."""
    machine: str = "h100"
    """v100-ib, a100, h100, h200, cpu, or a JSON file that --calibrate has written."""
    ranks: str = "1,8,64,128,512,1024"
    """Numbers of ranks, one for each row."""
    per_rank: int | None = None
    """Samples of each rank, so that the batch grows with the ranks; None: --batch over all ranks."""
    optimizers: str = "SGD,SP-NGD,K-FAC,SENG,NLCG"
    """Which stand beside the recipe's own, with their default settings."""
    share: float = 0.1
    """Share of the statistics in a step where intervals adapt (SP-NGD's paper: 0.05 to 0.24)."""
    images: int | None = None
    """Training images, where the recipe's data do not say how many they are."""
    classes: int | None = None
    """Classes of the network, where the recipe's data are not here to be asked; None: ImageNet's 1,000 then."""
    overhead: str | None = None
    """Share of SGD's step that second-order work may take, such as 5%: settings for it are printed."""
    remedies: bool = True
    """Whether to plan what would bring the step on the most ranks nearer to SGD's."""
    json: str | None = None
    """File for the plan as JSON."""
    out: str | None = None
    """File for a page of plots."""


@dataclass(frozen=True)
class Planning:
    """A recipe's fields and the options of its plan, side by side."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    options: Annotated[PlanOptions, tyro.conf.arg(name="")] = field(default_factory=PlanOptions)


def beside(recipe: Recipe, words: str) -> dict[str, Settings]:
    """The recipe's optimizer, then those asked for, by name."""
    own = next((n for n, kind in NAMES.items() if type(recipe.optimizer) is kind), type(recipe.optimizer).__name__)
    found: dict[str, Settings] = {own: recipe.optimizer}
    for name in [word.strip() for word in words.split(",") if word.strip()]:
        if name not in NAMES:
            raise ValueError(f"optimizers={name!r} is unknown; choose of {', '.join(NAMES)}")
        found.setdefault(name, NAMES[name]())
    return found


def plan(name: str, recipe: Recipe, options: PlanOptions, tokens: int = 0) -> dict[str, Any]:
    """The whole plan as plain values."""
    recipe.check_values()
    if not 0 < options.share <= 1:
        raise ValueError(f"share={options.share:g} must lie above 0 and at most at 1; set --share")
    overhead = None if options.overhead is None else parsed(options.overhead)
    ranks, machine = numbers("--ranks", options.ranks), named(options.machine)
    if options.replicas != 1 and not options.shard:
        raise ValueError("--replicas says nothing without --shard, where every rank has the whole model")
    for count in ranks if options.shard else ():
        if count > 1:
            check_replicas(count, options.replicas)
    worlds = [(r, r * options.per_rank if options.per_rank else recipe.batch) for r in ranks]
    for count, batch in worlds:
        if batch % count:
            raise ValueError(f"batch={batch} is not divisible by {count} ranks; change --batch, --per-rank or --ranks")
    shape, classes = recipe.data.shape(), options.classes or classes_of(recipe)
    network = Network(name, lambda: recipe.model.build(shape, classes), tuple(shape), tokens)
    planner = Planner(network, machine, recipe.micro_batch, options.replicas if options.shard else None)
    optimizers = beside(recipe, options.optimizers)
    found = scaled(planner, optimizers, worlds, options.share, steps_of(recipe, options))
    advice = None if overhead is None else advise(planner, recipe.optimizer, *worlds[-1], overhead)
    most = max(worlds)
    remedy = remedies(planner, recipe.optimizer, *most, options.share) if options.remedies and most[0] > 1 else None
    return {
        "name": name,
        "about": f"{type(recipe.model).__name__}, inputs {'x'.join(map(str, shape))}",
        "parameters": sum(p.numel() for p in planner.model.parameters()),
        "machine": machine.described(),
        "epochs": recipe.epochs,
        "share": options.share,
        "replicas": planner.replicas,
        "settings": described(recipe.optimizer),
        "torch": torch.__version__,
        **found,
        "advice": advice,
        "remedies": None if remedy is None else {**remedy, "words": in_words(remedy, next(iter(optimizers)))},
    }


def classes_of(recipe: Recipe) -> int:
    """The classes of the recipe's data; where these are not here to be counted, ImageNet's."""
    try:
        return recipe.data.classes()
    except ValueError:
        return CLASSES


def steps_of(recipe: Recipe, options: PlanOptions) -> Callable[[int], int | None]:
    """The steps of the recipe's run with a batch; None where nobody says how many samples there are."""
    images = options.images or IMAGES.get(type(recipe.data).__name__)

    def steps(batch: int) -> int | None:
        if recipe.steps is not None and (batch == recipe.batch or images is None):
            return recipe.steps if batch == recipe.batch else math.ceil(recipe.steps * recipe.batch / batch)
        return None if images is None else math.ceil(recipe.epochs * images / batch)

    return steps


def show_usage(example: str, which: str) -> None:
    """Explain the command by the fields of a recipe, and leave."""
    parse(Planning(find(example)()), "natgrad plan RECIPE", USAGE.format(which=which), ["--help"])


def run(arguments: list[str]) -> None:
    """Plan, show, and write what was asked for."""
    from natgrad_lab.plan.show import show

    name, recipe, tokens, rest = asked(arguments)
    values = parse(Planning(recipe), f"natgrad plan {name}", "Time, messages and memory by ranks.", rest)
    options = values.options
    for flag, path in (("--json", options.json), ("--out", options.out)):
        if path is not None and not Path(path).resolve().parent.is_dir():
            raise ValueError(f"{flag} {path!r} lies in a folder that does not exist; name another file")
    found = plan(name, values.recipe, options, tokens)
    show(found)
    if options.json is not None:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(options.json)
    if options.out is not None:
        from natgrad_lab.report.plan import write_plan

        print(write_plan(json.loads(json.dumps(found)), Path(options.out)))


def calibrate(path: Path, world: World) -> None:
    """Measure this machine, or the links between the ranks of this world, and write the file (rank 0's)."""
    from natgrad_lab.plan.calibrate import measured
    from natgrad_lab.plan.calibrate_links import links_of, with_links

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if world.rank == 0 and (world.size == 1 or not path.is_file()):
        write(path, measured(device, cores()).described())
    if world.size == 1:
        return
    world.max([torch.zeros(1)])  # the others wait until rank 0 has measured itself
    found = links_of(world, device)
    if world.rank == 0:
        write(path, with_links(named(str(path)), found, world.size).described())


def calibration(arguments: list[str]) -> tuple[Path, int]:
    """The file to write and the ranks to measure links with; by default one for each device, at most four."""
    path, rest = taken(arguments, "--calibrate")
    ranks, rest = taken(rest, "--ranks")
    if rest:
        raise ValueError(f"--calibrate takes --ranks and nothing else, not {rest[0]!r}")
    if path is None or not Path(path).resolve().parent.is_dir():
        raise ValueError(f"--calibrate {path!r} lies in a folder that does not exist; name another file")
    devices = torch.cuda.device_count() if torch.cuda.is_available() else cores()
    return Path(path), min(4, devices) if ranks is None else numbers("--ranks", ranks)[0]


def write(path: Path, content: dict[str, Any]) -> None:
    """Write plain values as JSON."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
