"""SecondOrder: the torch.optim.Optimizer of which every method here is a choice on five axes.

One step:  hooks have measured what is stale -> gradients and moments go to their owners (`_gradients`, `refresh`)
-> owners average, factor and precondition -> the rule -> owners update -> new weights go to everyone (`_update`).
Everything moves one way. With nothing stale, nothing but gradients and weights travel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from natgrad.cell import Cell
from natgrad.curvature import Curvature
from natgrad.layers import Found, Loose, find_layers
from natgrad.optim import checks
from natgrad.optim.blocks import Blocks
from natgrad.optim.fallback import Fallback, adam
from natgrad.optim.gradients import Gradients
from natgrad.optim.lengths import Keeps, Length, layerwise
from natgrad.optim.owners import place_layers
from natgrad.optim.rescale import Rescale
from natgrad.optim.rules import Rule, takes_loose
from natgrad.optim.scaling import hook_scale, known_scale, loss_scale
from natgrad.optim.state import exact_copies, whole_state
from natgrad.optim.unseen import look_after
from natgrad.optim.update import master, update
from natgrad.optim.views import Views
from natgrad.parallel import World
from natgrad.preconditioner import Preconditioner
from natgrad.staleness import Every, Staleness

PLACEMENT_ROWS = 4096  # rows for which placement weighs layers


class SecondOrder(Views, Optimizer):
    """Trains every trainable parameter of `model`. See SPNGD and KFAC for what the arguments mean."""

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        curvature: Blocks,
        rule: Rule,
        length: Length,
        refresh: int | Staleness,
        momentum: float,
        damping: float,
        weight_decay: float,
        decay: float = 0.0,
        samples: int | None = 8,
        rescale: Rescale | None = None,
        fisher: Literal["empirical", "sampled"] = "empirical",
        gather: Literal["weights", "directions"] = "weights",
        params: Iterable | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        predictions: float | None = None,
        max_norm: float | None = None,
        scaler: Any = None,
        fallback: Fallback = adam,
        max_size: int = 8192,
        strict: bool = False,
        seed: int = 0,
        world: Any = None,
    ):
        model = checks.plain_model(model)
        groups = checks.groups_of(model, params)
        checks.check_start(lr, model, groups)
        checks.one_of("reduction", reduction, ("mean", "sum"))
        checks.one_of("rescale", rescale, ("always", "shrink", None))
        checks.one_of("fisher", fisher, ("empirical", "sampled"))
        checks.one_of("gather", gather, ("weights", "directions"))
        checks.whole("samples", samples, 1, none=True)
        checks.whole("max_size", max_size, 1)
        checks.between("decay", decay, 0, 1)
        for name, value in (("predictions", predictions), ("max_norm", max_norm)):
            checks.above(name, 1 if value is None else value, 0)
        defaults = {"lr": lr, "momentum": momentum, "damping": damping, "weight_decay": weight_decay, "batch": 0}
        super().__init__(groups, defaults)
        for group in self.param_groups:
            checks.check_group(group)
        self._places: dict[nn.Parameter, int] = {}
        self.staleness = refresh if isinstance(refresh, Staleness) else Every(refresh)
        self.rule, self.length, self.fallback, self.natural = rule, length, fallback, layerwise
        self.rescale: Rescale | None = rescale
        self.gather = gather
        self.reduction, self.scaler, self.decay, self.skipped = reduction, scaler, decay, 0
        self._step_supports_amp_scaling = True  # GradScaler calls step() even where it found an overflow
        self.world = world if isinstance(world, World) else World(world)
        self.gradients = Gradients(self.world, max_norm, partial(known_scale, self))
        found = find_layers(model, [p for group in groups for p in group["params"]])
        checks.no_loose(found, strict)
        self.strict = strict
        blocks = [curvature(f.layer, samples, max_size) for f in found]
        owners = place_layers([c.cost(f.layer, PLACEMENT_ROWS) for f, c in zip(found, blocks)], self.world)
        cells = [self.make_cell(f, c, *where) for f, c, where in zip(found, blocks, owners)]
        self.whys = [f.why for f in found]
        for cell in cells:
            for parameter, state in self.fresh_state(cell, self.world.rank).items():
                self.state[parameter] = state
        self.engine = Preconditioner(cells, self.world, seed, fisher == "sampled", model, predictions)
        self.world.start([t.detach() for t in (*model.parameters(), *model.buffers())])
        self.gradients.begin_early(cells)
        self.engine.arm(self._steps() + 1)

    def make_cell(self, found: Found, curvature: Curvature, owner: int, holders: Mapping[str, int]) -> Cell:
        """The cell of a layer that was found."""
        weight = found.layer.parameters[0]
        return Cell(
            found.name,
            found.layer,
            curvature,
            owner,
            holders,
            state=lambda: self.state[weight],
            staleness=lambda: self._staleness(weight),
            decay=self.decay,
        )

    def _staleness(self, weight: nn.Parameter) -> Staleness:
        own = self.group_of(weight).get("refresh")
        return self.staleness if own is None else Every(own)

    def group_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The param_group that a parameter is in."""
        place = self._places.get(parameter)
        if place is None:  # groups have been added or loaded since
            self._places = {p: k for k, g in enumerate(self.param_groups) for p in g["params"]}
            place = self._places[parameter]
        return self.param_groups[place]

    @property
    def narrow(self) -> torch.dtype | None:
        """The type in which owners send new weights, where it is not the weights' own."""
        return self.world.weights if self.world.size > 1 and self.gather == "weights" else None

    def fresh_state(self, cell: Cell, rank: int | None) -> dict[nn.Parameter, dict[str, Any]]:
        """What a rank holds of a cell at the start, by parameter; None: what any rank holds."""
        mine = rank in (None, cell.owner)
        kept = partial(master, narrow=self.narrow) if mine or self.gather == "directions" else lambda p: {}
        states: dict = {p: {"step": torch.tensor(0.0), **kept(p)} for p in cell.layer.parameters}
        cell.allocate(own := states[cell.layer.parameters[0]], rank)
        if mine and isinstance(cell.layer, Loose) and not takes_loose(self.rule):
            self.fallback.allocate(cell.layer, own)
        elif mine:
            self.rule.allocate(cell.layer, own)
            if isinstance(self.length, Keeps):
                self.length.allocate(cell.layer, own)
        return states

    def _steps(self) -> int:
        return int(next(iter(self.state.values()))["step"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once the optimizer stands: layers, owners and state are laid out for the parameters it began with."""
        if hasattr(self, "engine"):
            raise ValueError(
                "add_param_group after construction is not supported: build the optimizer again with params=, "
                "its state can be carried over with state_dict()"
            )
        super().add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.engine.capture.discard()  # a step that was given up leaves nothing to the next one
        self.gradients.give_up()
        super().zero_grad(set_to_none)

    def reduce(self) -> None:
        """Average gradients over ranks now, to look at them or to clip them before `step()`."""
        if self.gradients.overlap is None:  # else traffic counts from the first bucket
            self.world.sent.clear()
        self.gradients.average([p for g in self.param_groups for p in g["params"]])

    def no_sync(self) -> AbstractContextManager[None]:
        """Around every backward pass of a step but the last, with World(overlap=True): gradients add up, unsent.

        Other worlds send nothing before `step()`, so there it does nothing.
        """
        overlap = self.gradients.overlap
        return nullcontext() if overlap is None else overlap.paused()

    def sample(self, output: Tensor) -> None:
        """With fisher="sampled", before `backward()`: measure curvature on labels drawn from the prediction.

        output: the model's logits [n, classes, ...]. One more backward pass to watched layers, only where something is
        due (SP-NGD section 3.2, one Monte Carlo sample).
        """
        if not self.engine.sampled:
            raise ValueError(
                'sample(output) needs fisher="sampled"; with fisher="empirical" the data\'s labels are used'
            )
        self.engine.capture.sample(output, self.engine.predictions)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One update. With a closure, it is called once and its loss returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.gradients.reduced and self.gradients.overlap is None:  # else traffic counts from reduce()
            self.world.sent.clear()
        for group in self.param_groups:
            checks.check_group(group)
        step, scale, bad = self._steps() + 1, *loss_scale(self)
        sent_scale = hook_scale(self, scale)
        with self.engine.timed("messages"):
            present = self.gradients.agree(self.cells, bad, self.engine.capture.armed, sent_scale)
        if present is None:
            self.skipped += 1
            self.engine.capture.discard()
            return loss
        with self.engine.timed("messages"):
            gradients = self.gradients.to_owners(self.cells, present, scale)
        unseen = self.engine.refresh(step, sent_scale, self.reduction)
        self.engine.factor([self.group_of(c.layer.parameters[0])["damping"] for c in self.cells])
        update(self, present, gradients)
        look_after(self, unseen, present, step)
        for state in self.state.values():
            state["step"] += 1
        self.engine.arm(step + 1)
        return loss

    def gather_state_dict(self) -> dict[str, Any]:
        """The whole state on every rank, to be loaded by any number of ranks. All ranks must call it."""
        saved = self.state_dict()
        saved["state"] = whole_state(self)
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` or `gather_state_dict` gave; values keep their precision, this rank keeps its part."""
        fresh = exact_copies(self, state_dict)
        super().load_state_dict({**state_dict, "state": {}})  # torch's copies would only be dropped
        self.state.clear()
        self.state.update(fresh)
        self.engine.arm(self._steps() + 1)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a natgrad optimizer holds hooks on its model and cannot be copied or pickled: "
            "build it again on the copy of the model and load state_dict()"
        )
