"""What optimizers meet on: data, a network, and how many steps a batch of each size gets. One entry a task.

Steps fall as batches grow, but more slowly, as a fixed number of epochs would leave nothing to compare at the largest.
Everybody gets the same number. A size that is not listed gets steps between its neighbours', on logarithmic scales.
"""

import difflib
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from natgrad_lab.compare.contenders import CONTENDERS, Contender, chosen
from natgrad_lab.compare.space import Space
from natgrad_lab.compare.transfer import Batch, Stated
from natgrad_lab.data import Cifar100, Digits, ImageSet
from natgrad_lab.data.text import Charlm, Stdlib
from natgrad_lab.import_path import is_path, resolve
from natgrad_lab.models import Architecture, CifarResNet, ImageResNet, Transformer
from natgrad_lab.train.optimizers import Sgd
from natgrad_lab.train.part_kinds import made
from natgrad_lab.train.recipe import Recipe

EVERYONE = tuple(contender.name for contender in CONTENDERS)
STRONGEST = ("AdamW", "Muon", "SOAP", "SPNGD", "KFAC", "NLCG-K-FAC")
IMAGES = ("LARS", *STRONGEST)
"""On images LARS is the strongest first-order optimizer at large batches (digits, all contenders)."""
ALL_BUT_ONE_SGD = tuple(name for name in EVERYONE if name != "Nesterov")
FEW = ("LARS", "Muon", "SOAP", "SPNGD")
WRITERS = ("AdamW", "Muon", "SOAP", "SPNGD")
"""On tasks of real size, whose runs take minutes to an hour of one core: the more a run costs, the fewer take part."""


@dataclass(frozen=True)
class Profile:
    """How much of a task's comparison is made; every number can be replaced on the command line.

    Without trials nothing is tuned: settings are those of another comparison, or `stated` ones.
    """

    optimizers: tuple[str, ...]
    batch: tuple[Batch, ...]
    trials: int
    seeds: int = 3
    finalists: int = 2
    halving: bool = True
    half: bool = True
    far_behind: float | None = None
    steps: int | None = None
    """Steps of a run; None: the task's, by the size of a batch."""
    stated: "Stated | None" = None
    """What contenders take without tuning where neither --trials nor --settings says otherwise."""


@dataclass(frozen=True)
class Task:
    """One problem: what is trained, for how many steps at each size of batch, and by what it is judged."""

    name: str
    about: str
    recipe: Recipe
    """Data, network, regularisation; the optimizer, schedule, batch, steps and seed are each trial's."""
    steps: tuple[tuple[int, int], ...]
    """(samples in a batch, steps), rising in the samples."""
    full: int
    """Steps of the whole training set as one batch."""
    targets: tuple[float, ...]
    """Fixed values of the metric to be reached, for pictures across sizes of batch."""
    profiles: Mapping[str, Profile]
    metric: Literal["accuracy", "loss"] = "accuracy"
    """What a run is judged by on the test split."""
    held_out: float = 1 / 6
    """Share of the training samples on which tuning is judged."""
    points: int = 24
    """Places along a final run at which it is judged."""
    judged: int | None = None
    """Samples of a split on which a run is judged at most, evenly spread; None: all."""
    spaces: Mapping[str, Space] = field(default_factory=dict)
    """What is different here in contenders' spaces, by the contender's name."""
    firsts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What is different in their first points."""

    def steps_of(self, batch: Batch) -> int:
        """Return how many steps a batch of this size gets."""
        if batch == "full":
            return self.full
        sizes = [size for size, _ in self.steps]
        if batch <= sizes[0] or batch >= sizes[-1]:
            return self.steps[0 if batch <= sizes[0] else -1][1]
        above = next(place for place, size in enumerate(sizes) if size >= batch)
        (low, many), (high, few) = self.steps[above - 1 : above + 1]
        share = math.log(batch / low) / math.log(high / low)
        return round(many * (few / many) ** share)

    def chosen(self, names: tuple[str, ...]) -> tuple[Contender, ...]:
        """Return the contenders of these names, with what is different in their spaces here."""
        return tuple(
            replace(
                one,
                space={**one.space, **self.spaces.get(one.name, {})},
                first={**one.first, **self.firsts.get(one.name, {})},
            )
            for one in chosen(names)
        )

    def profile(self, name: str | None) -> Profile:
        """Return a profile by name; without one, the first."""
        if name is None:
            return next(iter(self.profiles.values()))
        if name not in self.profiles:
            raise ValueError(f"there is no profile {name!r} of {self.name}; choose {', '.join(self.profiles)}")
        return self.profiles[name]

    def with_model(self, name: str | None) -> "Task":
        """Return the task with another network, by name or import path."""
        if name is None:
            return self
        return replace(self, recipe=replace(self.recipe, model=made(Architecture, name, "--model")))

    def located(self, path: str | None) -> "Task":
        """Return the task with its data elsewhere."""
        if path is None:
            return self
        if not hasattr(self.recipe.data, "path"):
            raise ValueError(f"--data.path {path!r} says nothing to {self.name}, whose data are installed with python")
        changed: Any = {"path": path}
        return replace(self, recipe=replace(self.recipe, data=replace(self.recipe.data, **changed)))


SMALL = CifarResNet(depth=8, widths=(16, 32, 64))
DIGITS = Task(
    name="digits",
    about="scikit-learn's digits, 1,437 images of 8x8 for training, on ResNet-8",
    recipe=Recipe(Digits(), SMALL, Sgd(), norm_samples=1024),
    steps=((64, 48), (128, 36), (256, 24), (479, 16)),
    full=10,
    targets=(0.95, 0.97),
    profiles={
        "demo": Profile(("Nesterov", "SPNGD"), (479,), trials=24, finalists=3),
        "full": Profile(EVERYONE, (64, 128, 256, 479, "full"), trials=12, seeds=5),
    },
)

CIFAR100_SMALL = Task(
    name="cifar100-small",
    about="2,000 images of 10 classes of CIFAR-100, averaged to 16x16, on ResNet-8; mirrored and shifted",
    recipe=Recipe(Cifar100(size=16, keep_classes=10, subset=2000), SMALL, Sgd(), norm_samples=1024),
    steps=((125, 160), (500, 80)),
    full=32,
    targets=(0.55, 0.6, 0.65),
    held_out=0.25,
    points=20,
    profiles={
        "cpu": Profile(IMAGES, ("full",), trials=10),
        "full": Profile(EVERYONE, (500, "full"), trials=12),
    },
)

CIFAR100 = Task(
    name="cifar100",
    about="CIFAR-100, 50,000 images of 32x32, on ResNet-32; mirrored and shifted",
    recipe=Recipe(Cifar100(), CifarResNet(depth=32), Sgd(), norm_samples=4096, micro_batch=8192),
    steps=((1024, 1500), (2048, 1000), (4096, 600), (8192, 400), (16384, 240)),
    full=120,
    targets=(0.4, 0.5, 0.6),
    held_out=0.1,
    profiles={
        "gpu": Profile(IMAGES, (4096, 16384, "full"), trials=12),
        "full": Profile(EVERYONE, (1024, 2048, 4096, 8192, 16384, "full"), trials=12),
    },
)

CHARLM = Task(
    name="charlm",
    about="the next character of python's help topics, windows of 64, on a transformer of two blocks of width 64",
    recipe=Recipe(Charlm(), Transformer(), Sgd()),
    steps=((64, 240), (128, 160), (512, 48)),
    full=24,
    targets=(2.8, 2.6, 2.4),
    metric="loss",
    held_out=0.1,
    points=16,
    profiles={
        "cpu": Profile(STRONGEST, (512,), trials=10),
        "full": Profile(EVERYONE, (64, 128, 512), trials=10),
    },
)

CIFAR100_16 = Task(
    name="cifar100-16",
    about="CIFAR-100, 50,000 images averaged to 16x16, on ResNet-8; mirrored and shifted; 10 epochs at every batch",
    recipe=Recipe(Cifar100(size=16), SMALL, Sgd(), norm_samples=4096, micro_batch=6250, channels_last=True),
    steps=((1000, 500), (5000, 100), (12500, 40)),
    full=10,
    targets=(0.3, 0.4, 0.45),
    held_out=0.1,
    points=20,
    profiles={
        "cpu": Profile(ALL_BUT_ONE_SGD, (5000,), trials=6, finalists=1, half=False, far_behind=0.6),
        "batches": Profile(FEW, (1000, 12500, "full"), trials=4, finalists=1, half=False, far_behind=0.6),
        "full": Profile(EVERYONE, (1000, 5000, 12500, "full"), trials=12),
    },
)

CIFAR100_32 = Task(
    name="cifar100-32",
    about="CIFAR-100, 50,000 images of 32x32, on ResNet-20; mirrored and shifted; 20 epochs",
    recipe=Recipe(Cifar100(), CifarResNet(depth=20), Sgd(), norm_samples=4096, micro_batch=1024, channels_last=True),
    steps=((4096, 245),),
    full=40,
    targets=(0.4, 0.5, 0.55),
    held_out=0.1,
    points=20,
    profiles={"cpu": Profile(FEW, (4096,), trials=0, seeds=1, half=False)},
)

CHOSEN_ON_TEXT = Stated(
    {
        "AdamW": {"lr": 0.00378, "betas": (0.9, 0.95), "weight_decay": 0.01, "schedule": "quadratic", "warm_up": 0.15},
        "Muon": {
            "lr": 0.0436,
            "rest_lr": 0.00334,
            "momentum": 0.7,
            "weight_decay": 0.1,
            "schedule": "linear",
            "warm_up": 0.0,
        },
        "SOAP": {
            "lr": 0.018,
            "betas": (0.8, 0.95),
            "every": 1,
            "weight_decay": 0.0,
            "schedule": "linear",
            "warm_up": 0.15,
        },
        "SPNGD": {
            "lr": 0.076,
            "largest_change": 0.211,
            "damping": 0.000256,
            "weight_decay": 0.03,
            "rescale": None,
            "schedule": "linear",
            "warm_up": 0.15,
        },
    },
    "text at batch 32 and 500 steps, four points each",
)
"""`natgrad compare text`, rounded to three digits: what four points of each space came to on held-out text."""

TEXT = Task(
    name="text",
    about="the next character of python's standard library, windows of 128, on a transformer of 4 blocks of width 128",
    recipe=Recipe(Stdlib(), Transformer(blocks=4, width=128), Sgd(), micro_batch=128),
    steps=((32, 500), (256, 500)),
    full=20,
    targets=(2.2, 1.8, 1.5),
    metric="loss",
    held_out=0.1,
    points=10,
    judged=1024,
    profiles={
        "cpu": Profile(WRITERS, (32,), trials=4, seeds=2, finalists=1, half=False, far_behind=0.6),
        "demo": Profile(WRITERS, (32,), trials=0, seeds=1, half=False, steps=200, stated=CHOSEN_ON_TEXT),
        "large": Profile(WRITERS, (256,), trials=0, seeds=1, half=False),
        "full": Profile(EVERYONE, (32, 256), trials=12),
    },
)

TEXT_TIED = replace(
    TEXT,
    name="text-tied",
    about=f"{TEXT.about}, whose head shares the embedding's weight",
    recipe=replace(TEXT.recipe, model=Transformer(blocks=4, width=128, tied=True)),
    profiles={**TEXT.profiles, "large": Profile(("AdamW", "SPNGD"), (256,), trials=0, seeds=1, half=False)},
)

IMAGENET = Task(
    name="imagenet",
    about="ImageNet in train/CLASS and val/CLASS folders, on ResNet-50; for clusters (--ranks or torchrun)",
    recipe=Recipe(
        ImageSet("data/imagenet", size=256, crop=224, in_memory=False),
        ImageResNet(50),
        Sgd(),
        micro_batch=32,
        drop_last=True,
        label_smoothing=0.1,
    ),
    steps=((4096, 11000), (8192, 5500), (16384, 2800), (32768, 1700), (65536, 1100), (131072, 900)),
    full=400,
    targets=(0.7, 0.74, 0.75),
    held_out=0.02,
    profiles={"full": Profile(("Nesterov", "LARS", "SPNGD"), (32768, 131072), trials=8, seeds=1)},
)


_TASKS = (DIGITS, CIFAR100_SMALL, CIFAR100, CIFAR100_16, CIFAR100_32, CHARLM, TEXT, TEXT_TIED, IMAGENET)


def tasks() -> dict[str, Task]:
    """Return all tasks by name."""
    return {task.name: task for task in _TASKS}


def find_task(name: str) -> Task:
    """Return a task of ours by name, or anybody's by import path; raise ValueError with near misses."""
    if is_path(name):
        found = resolve(name)
        task = found() if inspect.isfunction(found) else found
        if not isinstance(task, Task):
            raise ValueError(f"{name} is no task; name a Task, or a function without arguments that returns one")
        return task
    known = tasks()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"choose among {', '.join(known)}"
        raise ValueError(f"there is no task {name!r}; {hint}")
    return known[name]
