"""SecondOrder: the torch.optim.Optimizer of which every method here is a choice on five axes.

One step:  hooks have measured what is stale -> gradients and moments go to their owners (`Gradients`,
`CurvatureEngine.refresh`) -> owners average and factor (`factor`), precondition and follow the rule (`Aim`), update
their weights -> new weights go to everyone (`Update`).
Everything moves one way. With nothing stale, nothing but gradients and weights travel.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from statistics import fmean
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from natgrad.budget import Purse
from natgrad.capture import calm, is_taken, take
from natgrad.curvature import Curvature, Identity
from natgrad.curvature.by_rows import ByRows
from natgrad.curvature_engine import TWICE, Assumed, Clocks, CurvatureEngine, Step, shortened
from natgrad.layer_state import LayerState
from natgrad.layers import FoundLayer, Layer, UncurvedParameter, find_layers
from natgrad.layers.layer import UNREGISTERED, at_least_single, real
from natgrad.optim import gradient_noise, validation
from natgrad.optim.aim import Aim
from natgrad.optim.arguments import keywords, signature_of
from natgrad.optim.blocks import Blocks
from natgrad.optim.census import SHARDED_SINCE, Census
from natgrad.optim.coverage import CoverageTable, Preconditioned, count_preconditioned, coverage
from natgrad.optim.directions import Rule, keeps_numbers, leaves_weights, takes_loose
from natgrad.optim.fallback import Fallback, adam
from natgrad.optim.gradients import Gradients
from natgrad.optim.graphs import CudaRecorder, Graphs
from natgrad.optim.kl_clip import LastStep
from natgrad.optim.likelihoods import Likelihood, draw_labels
from natgrad.optim.loss_scale import LossScale, known_scale
from natgrad.optim.method import Method
from natgrad.optim.owners import place_layers
from natgrad.optim.param_groups import plain_numbers
from natgrad.optim.rescale import Rescale
from natgrad.optim.segments import Outlines
from natgrad.optim.sharded import AtOwners, Shards, ShardStorage
from natgrad.optim.state_dict import DistributedState, asked_by_checkpoint, carried
from natgrad.optim.step_size import Remembers, StepSize, hears_loss, remembers
from natgrad.optim.update import Update, begin, master
from natgrad.parallel import World, compare, is_sharded, local_of, sharding_of, spread_to_replicas, uneven
from natgrad.readings import Inputs, Readings, to_device
from natgrad.refresh import Budget, Every, Staleness
from natgrad.stacks import Storage

PLACEMENT_ROWS = 4096  # rows for which placement weighs layers
SETTINGS = ("lr", "momentum", "weight_decay", "damping")  # numbers of a group that schedules change
WARNED = 2  # measurements of a layer in a row that cannot be used are said
LOOSENED = 5  # so many, and the layer trains by the fallback
MENDED_SAID = 3  # refreshes in which a layer's curvature needed more damping are said
SKIPPED_SAID = 10  # steps in a row that were skipped are said; a GradScaler has found its scale by then
HELD = 0.1  # a step that the loss shortens to less than this is one that it holds back
SAYS_NOTHING = 1 / 30  # of lr is left in the mean of many steps: which lr it is makes no difference
NEVER_CALLED = "its module is never called in a pass that adds to its gradient, though its weight gets one"
UNKNOWN_SAMPLES = "which of its rows are of which sample cannot be seen"
NOT_SAMPLED = "its output does not enter the prediction that sample() was given, so its curvature is not known"
PARTED = (
    "gradients were the same on all ranks in earlier steps, as a wrapper leaves them, and are each rank's own in this "
    'one: they are averaged here from now on. World(gradients="local") for a plain model, World(gradients="averaged") '
    "for a wrapped one, says how it is; in a wrapped one every step's last backward() must average"
)
TAKEN = (
    "the gradients of this step have been in a step before: step() was called twice after one backward() (by a "
    "GradScaler or a trainer too, perhaps), or another optimizer of natgrad trains the same parameters. Weights move "
    "twice; call it once"
)
UNCLEARED = (
    "a backward pass has added to gradients that an earlier step has taken: call optimizer.zero_grad() after every "
    "step, or each step goes along the sum of all gradients so far"
)
HALF_FROZEN = "some of its parameters were frozen after the optimizer was built"


class SecondOrder(Optimizer):
    """Trains every trainable parameter of `model`. See SPNGD and KFAC for what the arguments mean."""

    preconditioned = Preconditioned(0, 0, 0, 0)
    """How many layers and weights the last step preconditioned by their own curvature."""

    repeats_loss: ClassVar[bool] = False
    """Whether losses are compared with each other alone: one that leaves out a step's earlier passes will do then."""

    elsewhere: ClassVar[Mapping[str, str]] = {}
    """What to do instead of giving an argument that this optimizer does not have."""

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        curvature: Blocks,
        rule: Rule,
        length: StepSize | Remembers,
        refresh: int | Staleness,
        momentum: float,
        damping: float,
        weight_decay: float,
        ema_decay: float = 0.0,
        rows_per_dim: int | None = 8,
        rescale: Rescale | None = None,
        fisher: Literal["empirical", "sampled"] = "empirical",
        gather: Literal["weights", "directions"] = "weights",
        params: Iterable | None = None,
        reduction: Literal["mean", "sum"] | None = None,
        predictions: float | None = None,
        batch_dim: int | Mapping[str, int] | None = None,
        max_norm: float | None = None,
        scaler: Any = None,
        fallback: Fallback = adam,
        max_size: int = 8192,
        strict: bool = False,
        seed: int = 0,
        world: Any = None,
        graph: bool = False,
    ):
        model = validation.plain_model(model)
        params = None if params is None else list(params)
        groups = validation.groups_of(model, params)
        validation.check_start(lr, model, groups)
        validation.one_of("reduction", reduction, ("mean", "sum", None))
        validation.one_of("rescale", rescale, ("always", "shrink", None))
        validation.one_of("fisher", fisher, ("empirical", "sampled"))
        validation.one_of("gather", gather, ("weights", "directions"))
        validation.whole("rows_per_dim", rows_per_dim, 1, none=True)
        validation.whole("max_size", max_size, 1)
        validation.between("ema_decay", ema_decay, 0, 1)
        validation.batch_dims(batch_dim)
        for name, value in (("predictions", predictions), ("max_norm", max_norm)):
            validation.above(name, 1 if value is None else value, 0)
        defaults = {"lr": lr, "momentum": momentum, "damping": damping, "weight_decay": weight_decay, "batch": 0}
        defaults |= gradient_noise.NUMBERS
        defaults |= {"debt": 0.0} if isinstance(refresh, Budget) else {}
        defaults |= dict(length.numbers) if isinstance(length, Remembers) else {}
        super().__init__(groups, defaults)
        for group in self.param_groups:
            validation.check_group(group)
            plain_numbers(group, list(group))
            begin(group)
        self._places: dict[nn.Parameter, int] = {}
        self.purse: Purse | None = None
        if isinstance(refresh, Budget):
            self.purse = Purse(refresh, lambda: self.param_groups, fisher == "sampled")
            refresh = refresh.rule
        self.staleness = refresh if isinstance(refresh, Staleness) else Every(refresh)
        self.method = Method(rule, length, fallback, gather, rescale, reduction or "mean")
        self.scaler, self.ema_decay = scaler, ema_decay
        self.skipped = self._skipped_in_a_row = 0  # steps given up because a gradient was not finite
        self.strict, self.seed, self.rows_per_dim, self.max_size = strict, seed, rows_per_dim, max_size
        self.curvature, self.sampled, self.batch_dim = curvature, fisher == "sampled", batch_dim
        self._step_supports_amp_scaling = True  # GradScaler calls step() even where it found an overflow
        self.world = world if isinstance(world, World) else World(world)
        self.graphs: Graphs | None = None
        self.shards = self._shards(model)
        sharding = None if self.shards is None else self.shards.sharding
        self.gradients = Gradients(self.world, max_norm, lambda: known_scale(self.scaler), sharding)
        self.said: set[str] = set()  # warnings that were given
        self.readings = Readings()
        self.factors: deque[float] = deque(maxlen=100)  # by which the last steps were shortened
        self.at_floor = 0  # steps in a row whose bound was the least one
        self.held = 0  # steps in a row that the loss has held back
        self._loss: Tensor | float | None = None  # of this rank, as it was told
        self._cleared = False  # gradients were cleared in a closure
        self._share: Tensor | None = None  # of the mean loss over ranks, see Aim
        self._counted: tuple[Clocks, tuple[bool, ...], Preconditioned] | None = None
        self._join_config = uneven.nobody()
        self._scope = None if params is None else validation.scope_of(params)
        self._model = model
        with calm():
            cells = self._lay_out()
            self.engine = self._engine(cells, predictions)
            self.state.update(self.fresh_states())  # type: ignore[arg-type]
            self._store()
            self._start()
        if graph:
            self.graphs = self._graphs()
            if self.shards is not None:
                self.refuse_shards()
            self._store()  # with vectors that stay where they are
        self.gradients.begin_early(cells)
        self._say_coverage()
        self.engine.arm(self.steps_made + 1)

    def __init_subclass__(
        cls, shared: type | None = None, defaults: Mapping[str, Any] | None = None, **more: Any
    ) -> None:
        """Complete the signature.

        shared: what `**shared` of the constructor takes; None: all that the base class takes. defaults: of these
        arguments, where they are not those of SecondOrder.
        """
        super().__init_subclass__(**more)
        ours = {name: p.default for name, p in inspect.signature(SecondOrder.__init__).parameters.items()}
        base = super(cls, cls).__init__  # type: ignore[misc]
        own = inspect.signature(next(k for k in cls.__mro__[1:] if k.__init__ is base)).parameters.values()
        taken = list(own) if shared is None else keywords(shared, {**ours, **(defaults or {})})
        cls.__signature__ = signature_of(cls, taken)  # type: ignore[attr-defined]

    def __new__(cls, *args: Any, **options: Any) -> SecondOrder:
        """Refuse unknown arguments by the name of the class that was called."""
        renamed = getattr(cls.__init__, "renamed", {})
        validation.known(cls.__name__, options, {*inspect.signature(cls).parameters, *renamed}, cls.elsewhere)
        return super().__new__(cls)

    def _shards(self, model: nn.Module) -> Shards | None:
        """The parts that this rank has of a model that fully_shard has cut; None where every rank has all."""
        sharding = sharding_of(model, self.world)
        validation.same_model(model, self.world)
        if sharding is None:
            return None
        self.world.owners |= self.world.replicates  # parts of gradients are averaged, and layers need owners
        self.refuse_shards()
        return Shards(sharding)

    def refuse_shards(self) -> None:
        """Refuse choices that do not work on a model that fully_shard has cut."""
        validation.of_shards(self.method.uncuttable(), self.world)
        if self.graphs is not None:
            raise ValueError("graph=True cannot record a step on a model that fully_shard has cut; leave it out")

    def _start(self) -> None:
        """Every rank begins with the same weights and buffers."""
        model, shards = self._model, self.shards
        parameters = [] if shards is not None else list(model.parameters())
        self.world.start([real(t.detach()) for t in (*parameters, *model.buffers())])
        if shards is not None:
            spread_to_replicas(shards.sharding, self.world, model.parameters())

    def _store(self) -> None:
        """Make the state's tensors views of few large ones (stacks.py)."""
        self.settle()
        self._places = {p: k for k, g in enumerate(self.param_groups) for p in g["params"]}
        place = self._places.__getitem__
        fixed = self.graphs is not None
        owners = self.storage = Storage(self.cells, self.state, place, self.world.rank, self.readings, fixed)
        at_owners: AtOwners | None = None
        if self.shards is not None:
            self.storage = ShardStorage(self.shards, owners, self.state, place, self.world, self.readings)
            outlines = Outlines(owners, place, lambda: self.param_groups, takes_loose=False)
            at_owners = AtOwners(self.storage, outlines, self.world)
            self._places |= {part: place(whole) for part, whole in self.shards.whole_of.items()}
        if self.graphs is not None:
            self.refuse_graphs()
            self.graphs.forget()
        self.engine.storage = owners
        rule = self.method.rule
        apart = keeps_numbers(rule, [cell.layer for cell in self.cells])
        self.outlines = Outlines(self.storage, place, lambda: self.param_groups, takes_loose(rule), apart)
        aim = Aim(self.method, self.engine, self.outlines, Inputs(), self._hear_length, lambda: self._share, at_owners)
        storage = self.storage
        state = (lambda: self.state) if not isinstance(storage, ShardStorage) else (lambda: storage.parts)
        self.update = Update(aim, state, self.graphs, self.narrow)
        self._groups = [place(cell.layer.parameters[0]) for cell in self.cells]

    def _graphs(self) -> Graphs:
        """What records this optimizer's steps."""
        devices = {layout.kind[1].type for layout in self.storage.layouts}
        if devices != {"cuda"}:
            raise ValueError(
                f"graph=True: the parameters are on {', '.join(sorted(devices))}, and CUDA graphs need a GPU; leave it "
                "out, or move the model first"
            )
        return Graphs(CudaRecorder(), self.readings, self.world)

    def refuse_graphs(self) -> None:
        """Refuse choices with which a step is not the same launches from step to step."""
        reasons = self.method.unrecordable() | {
            "parameters in half precision, or World(weights=)": self.storage.masters,
            "curvature in the space of samples": any(cell.by_rows for cell in self.cells),
        }
        for reason, holds in reasons.items():
            if holds:
                raise ValueError(f"graph=True cannot record a step with {reason}; leave one of the two out")

    def settle(self) -> None:
        """Bring `state` and `param_groups` up to date with all steps that were made. The host waits."""
        self.readings.read()
        if hasattr(self, "storage"):
            self.storage.write()

    def _engine(self, cells: Sequence[LayerState], predictions: float | None) -> CurvatureEngine:
        """What measures and inverts the curvature of these cells."""
        return CurvatureEngine(
            cells, self.world, self.seed, self.sampled, self._model, predictions, self.purse, self.shards is not None
        )

    def _lay_out(self) -> list[LayerState]:
        """Cells for the layers of the model as it is now, with their owners."""
        if self.shards is None and any(map(is_sharded, self._model.parameters())):
            raise ValueError(SHARDED_SINCE)
        self._divided = self.world.size > 1 and self.world.owners  # layers have owners, which alone keep their state
        found = find_layers(self._model, [p for group in self.param_groups for p in group["params"]], self.batch_dim)
        blocks = [self.curvature(f.layer, self.rows_per_dim, self.max_size) for f in found]
        for k, (layer, curvature) in enumerate(zip(found, blocks)):
            if isinstance(curvature, ByRows) and not layer.layer.per_sample:
                loose = UncurvedParameter(layer.layer.module, layer.layer.parameters[0])
                found[k] = layer._replace(layer=loose, why=UNKNOWN_SAMPLES)
                blocks[k] = self.curvature(loose, self.rows_per_dim, self.max_size)
        validation.no_loose(found, self.strict)
        owners = place_layers([c.cost(f.layer, PLACEMENT_ROWS) for f, c in zip(found, blocks)], self.world)
        self.whys = [f.why for f in found]
        self.census = self._take_census()
        return [self.make_cell(f, c, *where) for f, c, where in zip(found, blocks, owners)]

    def _take_census(self) -> Census:
        """The model's parameters as they are now."""
        return Census(self._model, [p for group in self.param_groups for p in group["params"]], self._scope)

    def make_cell(self, found: FoundLayer, curvature: Curvature, owner: int, holders: Mapping[str, int]) -> LayerState:
        """The cell of a layer that was found."""
        weight = found.layer.parameters[0]
        return LayerState(
            found.name,
            found.layer,
            curvature,
            owner,
            holders,
            state=lambda: self.state[weight],
            staleness=lambda: self._staleness(weight),
            ema_decay=self.ema_decay,
            dim=found.dim,
            budgeted=self.purse is not None,
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
        return self.world.weights if self.world.size > 1 and self.method.gather == "weights" else None

    @property
    def step_world(self) -> World:
        """The ranks as rules and lengths see them."""
        return self.storage.world if isinstance(self.storage, ShardStorage) else self.world

    def fresh_state(self, cell: LayerState, rank: int | None) -> dict[nn.Parameter, dict[str, Any]]:
        """What a rank holds of a cell at the start, by parameter; None: what any rank holds."""
        if rank is not None and self.shards is not None:
            return self._fresh_shard(self.shards, cell, rank)
        mine = rank in (None, cell.owner)
        moves = (mine or self.method.gather == "directions") and not leaves_weights(self.method.rule)
        kept = partial(master, narrow=self.narrow) if moves else lambda p: {}
        states: dict = {p: {"step": torch.tensor(0.0), **kept(p)} for p in cell.layer.parameters}
        cell.allocate(own := states[cell.layer.parameters[0]], rank)
        if mine:
            self.method.allocate(cell.layer, own)
        return states

    def fresh_states(self, before: Mapping[Any, Mapping[str, Any]] | None = None) -> dict[nn.Parameter, dict]:
        """What this rank holds of all cells, by parameter: at the start, or with the values `before` where they fit."""
        fresh: dict[nn.Parameter, dict[str, Any]] = {}
        for cell in self.cells:
            for parameter, state in self.fresh_state(cell, self.world.rank).items():
                fresh[parameter] = state if before is None else carried(state, before.get(parameter, {}))
            weight = cell.layer.parameters[0]
            if before and cell.by_rows and cell.owner == self.world.rank:
                rows = {k: v for k, v in before.get(weight, {}).items() if k in cell.row_names}
                kind = at_least_single(weight.dtype)
                fresh[weight] |= {
                    k: v.to(weight.device, kind if v.is_floating_point() else v.dtype) for k, v in rows.items()
                }
        return fresh

    def _fresh_shard(self, shards: Shards, cell: LayerState, rank: int) -> dict[nn.Parameter, dict[str, Any]]:
        """`fresh_state` where every rank has parts of all vectors. Curvature is at its owner as ever."""
        mine = rank == self.world.rank or rank not in shards.sharding.place_of
        part = shards.of(cell.layer) if mine else shards.elsewhere(cell.layer, rank)
        kept = cell.layer.parameters if mine else part.parameters
        states: dict = {p: {"step": torch.tensor(0.0), **master(k, None)} for p, k in zip(cell.layer.parameters, kept)}
        cell.allocate(states[cell.layer.parameters[0]], rank)
        own = dict[str, Any]()
        self.method.allocate(part, own)
        if mine:
            own = {key: shards.wrapped(part, v) if v.shape == part.shape else v for key, v in own.items()}
        states[cell.layer.parameters[0]] |= own
        return states

    @property
    def distributed_state(self) -> DistributedState:
        """The state, up to date, of which this rank holds a part."""
        self.settle()
        return DistributedState(
            self.cells,
            self.state,
            self.param_groups,
            self.world,
            self.fresh_state,
            self.engine.local,
            None if self.shards is None else self.shards.sharding,
        )

    @property
    def cells(self) -> list[LayerState]:
        """The layers in the model's order."""
        return self.engine.cells

    @property
    def assumed(self) -> Assumed | None:
        """What was assumed about the last step that measured: its samples, and the predictions of each. None before."""
        return self.engine.assumed

    def coverage(self) -> CoverageTable:
        """A row for every layer: its curvature, why, its size and cost. Printed, it is a table."""
        return coverage(self.cells, self.whys, self.method.fallback.name, *self.method.vectors())

    def intervals(self) -> dict[str, int]:
        """The present refresh interval of every statistic, by layer and statistic."""
        return {f"{c.name}.{m.key}": c.clock(m.key)[1] for c in self.cells for m in c.statistics}

    def traffic(self) -> dict[str, int]:
        """Bytes of payload in the last step by kind: gradients, statistics, weights, scalars."""
        return dict(self.world.sent)

    @property
    def refreshed(self) -> float:
        """The share of all statistics that was measured in the last step."""
        return self.engine.share

    @property
    def spent(self) -> float | None:
        """What measuring and factoring took in the last step as a share of its passes, counted in operations.

        First measurements do not count. None without a Budget.
        """
        return None if self.purse is None else self.purse.spent

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds on this rank's clock by stage, over all steps."""
        return self.engine.seconds

    @property
    def noise_scale(self) -> float | None:
        """The batch in samples at which the gradient's noise equals its signal, from steps that measured.

        Far below it, twice the batch takes nearly half of the steps; far above it, a larger batch changes little. It is
        known on several ranks that hold their own gradients, or on one with several forward passes a step; else None.
        """
        self.readings.read()
        return gradient_noise.scale_of({name: self.param_groups[0].get(name, 0.0) for name in gradient_noise.NUMBERS})

    @property
    def last_step(self) -> LastStep | None:
        """How long the last step was and why; None before the first one, and for lengths that bound nothing."""
        self.readings.read()
        group = self.param_groups[0]
        if not self.steps_made or "bound" not in group:
            return None
        return LastStep(*(group.get(name, default) for name, default in LastStep._field_defaults.items()))

    @property
    def steps_made(self) -> int:
        """Steps that were made, skipped ones not counted."""
        return int(self.storage.table("step").rows[0])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters of the model, with settings of their own: those that were unfrozen or added.

        All ranks must call it. A parameter that trains already (unfreezing is noticed) moves to the new group.
        """
        if not hasattr(self, "engine"):
            return super().add_param_group(param_group)
        checked = validation.groups_of(self._model, [param_group])
        if not checked:
            raise ValueError("add_param_group: none of its parameters requires a gradient; unfreeze them first")
        validation.check_group({**self.defaults, **checked[0]})
        before = self.distributed_state.whole()
        own = set(checked[0]["params"])
        for group in self.param_groups:
            group["params"] = [p for p in group["params"] if p not in own]
        super().add_param_group(checked[0])
        plain_numbers(self.param_groups[-1], list(self.param_groups[-1]))
        begin(self.param_groups[-1])
        if self._scope is not None:
            self._scope |= dict.fromkeys(own, len(self.param_groups) - 1)
        return self._rebuild(before)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.engine.capture.clear()  # a step that was given up leaves nothing to the next one
        self.gradients.give_up()
        self._loss, self._cleared = None, True
        super().zero_grad(set_to_none)

    def average_gradients(self) -> None:
        """Average gradients over ranks now, to look at them or to clip them before `step()`."""
        if self.gradients.overlap is None:  # else traffic counts from the first bucket
            self.world.sent.clear()
        self.gradients.average([p for g in self.param_groups for p in g["params"]])

    def reduce(self) -> None:
        """Do what `average_gradients()` does, under the name of the version before."""
        warnings.warn("reduce() is now average_gradients()", DeprecationWarning, stacklevel=2)
        self.average_gradients()

    def no_sync(self) -> AbstractContextManager[None]:
        """Around every backward pass of a step but the last, with World(overlap=True): gradients add up, unsent.

        Other worlds send nothing before `step()`, so there it does nothing.
        """
        overlap = self.gradients.overlap
        return nullcontext() if overlap is None else overlap.paused()

    @property
    def predictions(self) -> float | None:
        """How many predictions of a sample the mean loss is a mean of; None: counted from gradients.

        It may be set before any step: a mean over valid tokens has `valid / samples` of them.
        """
        return self.engine.predictions

    @predictions.setter
    def predictions(self, value: float | None) -> None:
        validation.above("predictions", 1 if value is None else value, 0)
        self.engine.predictions = value

    def sample(self, output: Any, likelihood: Likelihood | str | Callable[[Any], Tensor] | None = None) -> None:
        """With fisher="sampled", before `backward()`: measure curvature on labels drawn from the prediction.

        One more backward pass to watched layers, only where something is due (SP-NGD section 3.2, one Monte Carlo
        sample).

        output: what the model predicts. likelihood: of labels given the output. "categorical" (None) is for logits
        [n, classes, ...] of two classes or more, "bernoulli" for one logit [n] or [n, 1] or several independent ones,
        "normal" or Normal(variance) for regression. For several heads, or anything else, it is a function of the output
        that draws labels (detached) and gives each sample's loss [n].
        """
        if not self.engine.sampled:
            raise ValueError(
                'sample(output) needs fisher="sampled"; with fisher="empirical" the data\'s labels are used'
            )
        draw_labels(self.engine.capture, output, likelihood)

    @property
    def hears_loss(self) -> bool:
        """Whether a loss that is told matters to the length of steps."""
        return hears_loss(self.method.length)

    def report(self, loss: Tensor | float) -> None:
        """Tell this rank's loss before `step()`. Those of micro-batches add up, as their gradients do.

        Raises:
            ValueError: nobody listens to the loss.

        """
        if not self.hears_loss:
            raise ValueError(f"report(loss): {self._deaf()} does not listen to the loss; leave it out")
        loss = loss.detach() if isinstance(loss, Tensor) else loss
        self._loss = loss if self._loss is None else self._loss + loss

    def _deaf(self) -> str:
        """What would listen to the loss, and does not."""
        length = self.method.length
        return f"length={getattr(length, '__name__', length)}"

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Tensor] | None = None, *, loss: Tensor | float | None = None
    ) -> Tensor | None:
        """One update.

        closure: called once; its loss is told and returned. It is not told where gradients of earlier passes are there,
        of whose losses it says nothing. loss: this rank's loss, the mean over its samples (their sum with
        reduction="sum"), unscaled. A step never asks for more than a share of a loss that was told (MeasuredChange).
        """
        validation.function("closure", closure)
        if loss is not None:
            if closure is not None:
                raise ValueError("step(closure, loss=...): the closure gives the loss; leave one of them out")
            self.report(loss)
        value = None if closure is None else self._evaluate(closure)
        uneven.begin(self)
        try:
            with calm(*{p.device for p in self._first_parameters()}):
                self._make_step()
        finally:
            self._loss = self._share = None
        return value

    def _evaluate(self, closure: Callable[[], Tensor]) -> Tensor:
        """Call the closure; tell its loss, if gradients are of this loss alone."""
        parts = any(p.grad is not None for group in self.param_groups for p in group["params"])
        self._cleared = not parts or self.repeats_loss
        with torch.enable_grad():
            value = closure()
        if self.hears_loss and value is not None and self._cleared:
            self._loss = None  # a closure may clear gradients, and with them what was told
            self.report(value)
        return value

    def join_hook(self, **_: Any) -> Any:
        """For torch's Join: what this rank does in the others' steps when it has run out of batches."""
        return uneven.hook(self._step_of_nothing)

    @property
    def join_device(self) -> torch.device:
        """For torch's Join."""
        return self.world.join_device

    @property
    def join_process_group(self) -> Any:
        """For torch's Join."""
        return self.world.join_group

    @torch.no_grad()
    def _step_of_nothing(self) -> None:
        """Take part in a step of the ranks that still have batches, with the settings of theirs."""
        self.zero_grad()
        with calm(*{p.device for p in self._first_parameters()}):
            self._make_step(away=True)

    def _agree_with_joined(self, away: bool) -> None:
        """In a Join context: how many ranks still have batches, and what they have set."""
        numbers = [float(group[key]) for group in self.param_groups for key in SETTINGS]
        told = torch.tensor([-math.inf] * len(numbers) if away else numbers, dtype=torch.float64)
        active = torch.tensor([float(not away)], dtype=torch.float64)
        self.world.max([told], "scalars")
        self.world.sum([active], "scalars")
        values = iter(told.tolist())
        for group in self.param_groups:
            group.update({key: next(values) for key in SETTINGS})
        self.gradients.active = round(active.item())

    def _first_parameters(self) -> list[nn.Parameter]:
        """One parameter of each group, for their devices."""
        return [group["params"][0] for group in self.param_groups]

    def _make_step(self, away: bool = False) -> None:
        """The step itself, from gradients to new weights. `away`: this rank has run out of batches (Join)."""
        with self.readings.whole(), self.engine.whole_step():
            self._stages(away)

    def _stages(self, away: bool) -> None:
        self.world.refuse_alone()
        if self.census.moved():
            self._follow()
        self.storage.sync(self.state)
        if self.shards is not None:
            self._look_at_shards(self.shards)
        for message in self.census.changes():
            self.say(message)
        if uneven.enabled(self):
            self._agree_with_joined(away)
        if not self.gradients.reduced and self.gradients.overlap is None:  # else traffic counts from reduce()
            self.world.sent.clear()
        for group in self.param_groups:
            validation.check_group(group)
            plain_numbers(group, SETTINGS)
        step, watched = self.steps_made + 1, self.engine.capture.armed
        left, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        scale = LossScale(left, found, self.scaler, watched, self.gradients.sent_local, self.readings)
        self.engine.settle(self.readings)
        self._ask()
        with self.engine.timed("messages"):
            told = self._loss is not None
            agreed = self.gradients.agree(self.cells, self.storage, watched, scale, told, self.readings)
        if agreed is None:
            self.skipped += 1
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row == SKIPPED_SAID:
                self.say(self._why_skipped(), "skipped")
            self.engine.capture.discard()
            return
        self._skipped_in_a_row = 0
        self._say_taken()
        if self.gradients.parted:
            self.say(PARTED, "parted")
        averaged = self.world.replicates and self.gradients.mode == "averaged"
        if self._divided and self.shards is None and (averaged or not self.world.owners):
            self._own_everything()
        found = self.engine.refresh(step, scale.seen, self.method.reduction, self.gradients.active, self.readings)
        self.engine.factor([self.param_groups[place]["damping"] for place in self._groups], self.readings)
        if self.engine.unfinished:
            self.readings.read()
            self.engine.conclude()
            self._say_mended()
        present = self._look_after(found, agreed.present, agreed.halves, step)
        self._share = self._own_loss() / self.gradients.active if agreed.told else None
        with self.engine.timed("messages"):
            gradients = self.gradients.to_owners(self.storage, present, scale.now)
        self.preconditioned = self._count(present)
        self._hear_noise(gradients, present, scale.seen)
        self.update(present, gradients)
        self.storage.release()
        if self.census.unfrozen():
            self._take_in(scale.now)
        self.storage.count_step()
        self.storage.write()
        self.engine.arm(step + 1)
        if self.world.check and step % self.world.check == 0:
            self.compare_ranks()

    def compare_ranks(self) -> None:
        """Compare weights, clocks and shared numbers over ranks to the last bit, as World(check=) does every so often.

        Of a model that fully_shard has cut, weights are compared between replicas. All ranks must call it.

        Raises:
            RanksDifferError: names the first that differs, and the ranks.

        """
        self.settle()
        names = {p: name for name, p in self._model.named_parameters()}
        numbers: dict[str, Any] = {"the number of skipped steps": self.skipped}
        for place, group in enumerate(self.param_groups):
            plain = {key: value for key, value in group.items() if isinstance(value, bool | int | float | str | tuple)}
            numbers |= {f"param_groups[{place}][{key!r}]": value for key, value in plain.items()}
        for cell in self.cells:
            for parameter in cell.layer.parameters:
                shared = self.storage.shared_numbers(parameter)
                numbers |= {f"{key} of {names[parameter]}": value for key, value in shared.items()}
        trained = [p for group in self.param_groups for p in group["params"]]
        cut = None if self.shards is None else self.shards.sharding
        weights = {} if cut and cut.replicas == 1 else {names[p]: local_of(p) for p in trained}
        part, parts = (cut.shard, cut.shards) if cut else (0, 1)
        compare(self.world, f"after step {self.steps_made}", numbers, weights, part, parts)

    def _look_at_shards(self, shards: Shards) -> None:
        """Take parameters and gradients as FSDP has left them."""
        if uneven.enabled(self):
            raise ValueError(
                "Join does not work on a model that fully_shard has cut: give all ranks equally many batches"
            )
        if not self.world.owners:
            raise ValueError(
                "another optimizer keeps everything on every rank of this World, and a model that fully_shard has cut "
                "needs owners: give each optimizer a World of its own"
            )
        shards.look()

    def _own_loss(self) -> Tensor:
        """Return this rank's loss, 0 if it was not told, and whether it was [2]."""
        told = to_device([0.0, float(self._loss is not None)], self.storage.device)
        if self._loss is not None:
            told[0] = torch.as_tensor(self._loss).sum()
        return told

    def _ask(self) -> None:
        """Ask for what the step needs to know before it goes on, beside what gradients are."""

    def _count(self, present: Sequence[bool]) -> Preconditioned:
        """How much this step preconditions; counted anew where layers or clocks are others than in the last one."""
        now = self.engine.clocks, tuple(present)
        if self._counted is None or self._counted[0] is not now[0] or self._counted[1] != now[1]:
            self._counted = *now, count_preconditioned(self.cells, present)
        return self._counted[2]

    def _hear_noise(self, gradients: Sequence[Tensor | None], present: Sequence[bool], scale: float) -> None:
        """In steps that measure, learn how noisy the gradient is from shares of it that are there anyway."""
        if not self.engine.share:
            return
        half, samples = self.engine.half, self.engine.samples
        half = half and (half[0] / scale**2, half[1])
        mine, device = self.storage.present(gradients, present), self.storage.device
        self.gradients.squares(mine, device, half, samples, self.readings, partial(self._learn_noise, samples))

    def _learn_noise(self, samples: float, found: gradient_noise.Squares) -> None:
        numbers = {name: self.param_groups[0].get(name, value) for name, value in gradient_noise.NUMBERS.items()}
        for group in self.param_groups:
            group.update(gradient_noise.learn(numbers, found, samples))

    def _hear_length(self, values: Tensor) -> None:
        """What the length has learned by the last step. Warn once if steps have long been shortened so much that the
        learning rate says nothing.
        """
        assert remembers(self.method.length)
        for group in self.param_groups:
            group.update(zip(self.method.length.numbers, values.tolist()))
        own = self.param_groups[0]
        self.factors.append(max(own["factor"], 1e-30))
        floor = getattr(self.method.length, "least", 0.0)
        self.at_floor = self.at_floor + 1 if own["bound"] <= floor and own["factor"] < 1 else 0
        if self.at_floor == self.factors.maxlen:
            self.say(
                f"the last {self.at_floor} steps were all shortened to a predicted change of {floor:g}, the least that "
                f"is allowed: gradients change {own['ratio']:.2g} times as fast along the steps as the curvature "
                "predicts. So does the noise of a small batch: a larger batch or more damping gives longer steps, or "
                "length=MeasuredChange(least=...)",
                "floor",
            )
        self.held = self.held + 1 if own.get("held", 1.0) < HELD else 0
        if self.held == self.factors.maxlen:
            self.say(
                f"the last {self.held} steps were all shortened to less than {HELD:g} of their length, because they "
                "asked for more than a share of the loss that was told. That is right where a training set is learnt "
                "by heart; a loss that can fall below 0 needs length=MeasuredChange(share_of_loss=None)",
                "held",
            )
        if len(self.factors) == self.factors.maxlen:
            share = math.exp(fmean(map(math.log, self.factors)))
            if share < SAYS_NOTHING:
                lr = own["lr_last"]
                self.say(
                    f"lr={lr:g} says nothing yet: the last {len(self.factors)} steps were shortened to {share:.2g} of "
                    f"it by the bound on how much a step may change the outputs (see last_step); a schedule acts once "
                    f"it has brought lr to {lr * share:.2g}",
                    "lr says nothing",
                )

    def _take_in(self, scale: float) -> None:
        """Lay out anew for parameters that were unfrozen. In this step, not measured, they follow their gradients."""
        trained = {p for group in self.param_groups for p in group["params"]}
        self._rebuild(self.distributed_state.whole())
        fresh = {k for k, cell in enumerate(self.cells) if trained.isdisjoint(cell.layer.parameters)}
        here = torch.tensor(
            [
                float(k in fresh and any(p.grad is not None for p in c.layer.parameters))
                for k, c in enumerate(self.cells)
            ]
        )
        self.world.max([here], "scalars")
        present = [bool(h) for h in here]
        self.update(present, self.gradients.to_owners(self.storage, present, scale), fresh)

    def _look_after(self, found: Step, present: list[bool], halves: Sequence[bool], step: int) -> list[bool]:
        """Layers that cannot go on with their curvature become loose; those not in use wait. Returns `present` anew."""
        engine = self.engine
        for k in found.unseen:
            if not present[k]:
                engine.sleep(k)
            elif engine.cells[k].ready:
                engine.wait(k, step)
        for k, asleep in enumerate(engine.clocks.asleep):
            if asleep and present[k] and k not in found.unseen:
                engine.wake(k)
        whys = {k: HALF_FROZEN for k, half in enumerate(halves) if half} | found.astray
        for k, called in found.unseen.items():
            if present[k] and not called and not self.cells[k].ready and found.astray.get(k) != TWICE:
                whys[k] = NOT_SAMPLED if self.sampled else NEVER_CALLED
        for k, cell in enumerate(self.cells if engine.drops else ()):
            times, why = engine.drops.get(cell.name, (0, ""))
            if k in whys or times < WARNED:
                continue
            if times >= LOOSENED:
                whys[k] = f"{why}, {times} times in a row"
            else:
                self.say(
                    f"{cell.name}: {why}; after {LOOSENED} measurements in a row it will train by the fallback",
                    f"dropped {cell.name}",
                )
        for message in engine.doubts():
            self.say(message, message[:12])
        if not whys:
            return present
        curved = [k for k, cell in enumerate(self.cells) if cell.statistics]
        if curved and all(found.astray.get(k) == TWICE for k in curved):
            raise ValueError(
                f"{TWICE}, and no layer would keep its curvature: the hooks see only the first pass. Take an optimizer "
                "without curvature for this loss, such as NLCG(model) or AdamW, or a loss without derivatives of the "
                "network"
            )
        origins = self.loosen(whys)
        trains = [any(p.requires_grad for p in cell.layer.parameters) for cell in self.cells]
        return [present[k] and some for k, some in zip(origins, trains)]

    def loosen(self, whys: Mapping[int, str]) -> list[int]:
        """Turn cells into loose parameters at the same owner, each with the fallback's state and the reason.

        Returns for every cell from now on which cell it was.
        """
        reasons: dict[str, list[str]] = {}
        whys = {k: self._of_guess(self.cells[k].layer, why) for k, why in whys.items()}
        for k, why in whys.items():
            if self.strict or not self.cells[k].layer.guess:
                reasons.setdefault(why, []).append(self.cells[k].name or "the model itself")
        told = "; ".join(f"{', '.join(names)}: {why}" for why, names in reasons.items())
        if self.strict:
            raise ValueError(f"strict=True, but {told}")
        if told:
            validation.warn(f"{told}; so without curvature ({self.method.fallback.name})")
        self.settle()
        cells: list[LayerState] = []
        kept: list[str] = []
        origins: list[int] = []
        for k, (cell, why) in enumerate(zip(self.cells, self.whys)):
            if k not in whys:
                cells.append(cell)
                kept.append(why)
                origins.append(k)
                continue
            for parameter in cell.layer.parameters:
                key = next(n for n, p in cell.layer.module.named_parameters() if p is parameter)
                name = cell.name if cell.name.rpartition(".")[2] == key else f"{cell.name}.{key}".lstrip(".")
                found = FoundLayer(name, UncurvedParameter(cell.layer.module, parameter), whys[k])
                loose = self.make_cell(found, Identity(), cell.owner, {})
                step = self.state[parameter]["step"]
                self.state[parameter] = self.fresh_state(loose, self.world.rank)[parameter]
                self.state[parameter]["step"] = step
                cells.append(loose)
                kept.append(whys[k])
                origins.append(k)
        self.whys = kept
        self.engine.replace(cells, origins)
        self._store()
        return origins

    @staticmethod
    def _of_guess(layer: Layer, why: str) -> str:
        """Why a layer has no curvature: a guess that did not hold says so."""
        kind = type(layer.module).__name__
        return f"{UNREGISTERED} {kind}, which does not use it as its shape suggests" if layer.guess else why

    def _say_mended(self) -> None:
        """Warn of layers that are held here whose factorisations keep failing."""
        for name, times in self.engine.mended.items():
            if times >= MENDED_SAID:
                self.say(
                    f"{name or 'the model'}: its curvature could not be inverted with the damping that was asked for, "
                    f"{times} times so far, and got more: inputs or gradients of very unlike sizes make a nearly "
                    "singular matrix; look at its inputs, or raise the damping",
                    f"mended {name}",
                )

    def _why_skipped(self) -> str:
        """What to do about steps that are skipped one after the other. The host waits."""
        own = [(name, p) for name, p in self._model.named_parameters() if p in self._places]
        lost = [name for name, p in own if not bool(torch.isfinite(local_of(p.detach())).all())]
        bad = [name for name, p in own if p.grad is not None and not bool(torch.isfinite(local_of(p.grad)).all())]
        told = f"the last {SKIPPED_SAID} steps were skipped, because gradients were not finite; "
        if lost:
            return f"{told}{shortened(lost)}: the weights are not finite, so no later step can be: load a checkpoint"
        where = f"now those of {shortened(bad)}" if bad else "now on another rank"
        return f"{told}{where}: look at the loss and the samples, or take a lower learning rate"

    def say(self, message: str, about: str | None = None) -> None:
        """A warning, once for what it is about."""
        if (about or message) not in self.said:
            self.said.add(about or message)
            validation.warn(message)

    def _say_taken(self) -> None:
        """Warn if gradients were in an earlier step, of this optimizer or another, or lie on top of such ones."""
        watched = (cell.layer.parameters[0] for cell in self.cells if not isinstance(cell.layer, UncurvedParameter))
        every = (p for group in self.param_groups for p in group["params"])
        first = next((g for p in chain(watched, every) if type(g := p.grad) is Tensor), None)
        if first is None:
            return
        if is_taken(first):
            self.say(TAKEN, "taken")
        if self.engine.capture.uncleared:
            self.say(UNCLEARED, "uncleared")
        take(first)

    def _say_coverage(self) -> None:
        """Warn if more than half of the weights have no curvature."""
        rows = self.coverage()
        if rows.share < 0.5 and not self.fallback_is_all:
            self.say(f"{1 - rows.share:.0%} of the weights have no curvature: {rows.reasons()}; see coverage()")

    @property
    def fallback_is_all(self) -> bool:
        """Whether no layer is meant to have curvature."""
        return all(not c.statistics for c in self.cells if not isinstance(c.layer, UncurvedParameter))

    def rebuild(self) -> None:
        """Look at the model again, after parameters were added, replaced or moved, or a half frozen layer was unfrozen.

        Parameters that were trained before keep their state; new ones join the first group (or, with `params=`, the
        group in which they were given). All ranks must call it. A parameter that was unfrozen is taken in by itself.
        """
        self._rebuild(self.distributed_state.whole())

    @torch.no_grad()
    def _rebuild(self, before: Mapping[nn.Parameter, Mapping[str, Any]]) -> None:
        """Lay out anew; parameters that have a state `before` keep what fits."""
        with calm(*{p.device for p in self._model.parameters()}):
            steps, predictions = self.steps_made, self.engine.predictions
            self.engine.capture.disarm()
            validation.regroup(self._model, self.param_groups, self._scope)
            self._places = {}
            cells = self._lay_out()
            old = self.engine
            self.engine = self._engine(cells, predictions)
            for name in ("judged", "local", "seconds", "retries", "mended", "dropped", "samples", "assumed"):
                setattr(self.engine, name, getattr(old, name))
            self.engine.replace(cells)
            self._replace_state(before, steps)
            self._start()
        self.gradients.begin_early(cells)
        self.engine.arm(steps + 1)

    def _replace_state(self, before: Mapping[Any, Mapping[str, Any]], steps: int) -> None:
        """Give the cells, as they are now, a new state with the values `before` where they fit."""
        fresh = self.fresh_states(before)
        for own in fresh.values():
            own["step"] = torch.tensor(float(steps))
        self.state.clear()
        self.state.update(fresh)  # type: ignore[arg-type]
        self._store()
        self.method.forget()

    def _own_everything(self) -> None:
        """Somebody else averages gradients: this rank keeps the whole state and makes all of every step from now on.

        One gathering brings what other ranks have kept so far; none where no step has been made.
        """
        steps = self.steps_made
        self.world.owners = True  # another optimizer in this world may have come to it before
        before = self.distributed_state.whole() if steps else dict(self.state)
        self.world.owners = False
        self._divided = False
        for cell in self.cells:
            cell.belong_to(self.world.rank)
        self._replace_state(before, steps)
        self.engine.stored_anew()

    def _follow(self) -> None:
        """The model was moved to another device or type after the optimizer was built: the state goes along."""
        self.settle()
        if self.shards is not None:
            self.shards = Shards(self.shards.sharding)
        self._replace_state(dict(self.state), self.steps_made)
        self.engine.stored_anew()
        self.census = self._take_census()

    def gather_state_dict(self) -> dict[str, Any]:
        """The whole state on every rank, to be loaded by any number of ranks. All ranks must call it."""
        saved = self.state_dict()
        saved["state"] = self.distributed_state.numbered()
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` or `gather_state_dict` gave; values keep their precision, this rank keeps its part."""
        self.readings.read()
        saved = self.distributed_state.saved(state_dict)
        never = self.distributed_state.loosened(saved)
        if never:
            self.loosen(dict.fromkeys(never, "in the run that was saved it had been found to have no curvature"))
        fresh, parts = self.distributed_state.copies(saved)
        super().load_state_dict({**state_dict, "state": {}})  # torch's copies would only be dropped
        self.state.clear()
        self.state.update(fresh)
        self.storage.sync(self.state)
        self.method.forget()
        self.gradients.loaded = True
        lost = [
            cell.name
            for cell in self.cells
            if cell.layer.parameters[0] in parts or (not cell.by_rows and cell.lost(self.world.rank))
        ]
        if lost:
            self.say(
                f"the state that was loaded has nothing of what the owner of {shortened(lost)} keeps, which this rank "
                "is now (a checkpoint of one rank's part): curvature is measured again, and momentum begins anew. "
                "Save gather_state_dict(), or a torch.distributed.checkpoint of shards",
                "lost",
            )
        self.engine.arm(self.steps_made + 1)

    def state_dict(self) -> dict[str, Any]:
        """The state that this rank holds.

        It is whole on one rank, and under a wrapper or trainer that averages gradients (World(owners=None)). Where
        layers have owners it is a part, which a warning says: `gather_state_dict()` is whole.
        torch.distributed.checkpoint writes the parts of all ranks, which are whole together.
        """
        self.settle()
        divided = self.world.size > 1 and self.world.owners and self.steps_made
        if divided and not asked_by_checkpoint():
            self.say(
                "state_dict() holds this rank's part of the state: save gather_state_dict(), which all ranks call, or "
                "a torch.distributed.checkpoint of all ranks without full_state_dict=True, or let every rank keep "
                "everything with world=World(owners=False)",
                "state_dict",
            )
        for group in self.param_groups:  # a schedule may have set them since the last step
            plain_numbers(group, SETTINGS)
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a natgrad optimizer holds hooks on its model and cannot be copied or pickled: "
            "build it again on the copy of the model and load state_dict()"
        )
