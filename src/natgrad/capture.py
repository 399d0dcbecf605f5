"""Watches the forward and backward passes of an unmodified model, and only while something is to be measured.

A mode sees the functions of torch that are given a layer's weight (weight_calls.py): it looks at the input and hangs a
hook on the output; that one fires when the output's gradient is known, and only then does the call count. So a forward
pass without a backward pass (evaluation, the first of activation checkpointing's two) leaves nothing behind, and an
in-place activation after the layer changes nothing. The mode is at work inside of the model and of modules that have
watched weights. Only layers of users' own classes are watched by the calls of their modules: what those compute may be
no function of torch.

Samples belong to forward passes. An `Episode` is one call of the whole model: its layers' calls see the same samples.
Several episodes before a step (micro-batches, the steps of a rollout, real and generated images) are a larger batch.
Several backward passes through one episode (several losses, `retain_graph`) add up as their gradients do: while a graph
is kept, a call waits for more.

A backward pass counts for a layer only if it adds to the gradient of the layer's weight. If a gradient is cleared
before the step, what had been measured of it goes too.

Everything is kept as sums over this rank; turning sums into means needs all samples of the step, known in `collect`.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from natgrad.checksum import Checksum, numbers_of
from natgrad.curvature.curvature import Draw, Moment, RowSum, Statistic
from natgrad.curvature.per_sample import Rows, Sample, count, longer, places_of, stacked, thinned
from natgrad.eager import Eager
from natgrad.functions import Found
from natgrad.hooks import (
    Apart,
    Arrival,
    Begin,
    Deposit,
    End,
    Enter,
    Handed,
    LayerHook,
    Leave,
    LogitGradientScaling,
    anchor,
    deposits,
    transformed,
)
from natgrad.layers import Layer, UncurvedParameter
from natgrad.layers.layer import at_least_single, promote
from natgrad.layers.use import Form
from natgrad.parallel import local_of
from natgrad.readings import Readings, is_finite, to_device, together
from natgrad.sampling import Aligned, Sampler, Window
from natgrad.slots import Slot, Slots
from natgrad.weight_calls import Flat, SharedCall, WeightCalls

Key = tuple[int, str]  # a layer's place in the list of watched layers, and one of its statistics

FIRST, EVERY = 8, 8  # a layer's first measurements have a checksum, and after them one of so many
TOGETHER = -2  # the "layer" by which all layers draw the same samples
MOST_APART = 2**27  # numbers of the gradients of all samples of an output that they have in common
LOGITS = -1  # the "layer" whose output is the model's
TOLD = ("predictions", "steepness")  # what devices count of an episode
THREADS = (
    "two threads pass through the model at the same time, and a measurement cannot tell them apart: let one pass end "
    "before the next begins (a lock around forward and backward), or join both batches"
)


class OutputForm(NamedTuple):
    """What a measured call looked like: the sizes of its input, samples first, and of its output.

    first: nobody wants the gradient of the input.
    """

    x: torch.Size
    y: torch.Size
    first: bool


class Watch(NamedTuple):
    """A layer and the statistics that are to be measured of it."""

    layer: Layer
    moments: tuple[Statistic, ...]


@dataclass
class LayerSeen:
    """What the passes of a step showed of one layer on this rank."""

    calls: int = 0  # that a backward pass has reached (with drawn labels: theirs)
    passes: int = 0  # deposits in the gradient of the weight
    agrees: bool = True  # the checksum
    twice: bool = False  # a pass that can be differentiated again went through it
    samples: int = 0  # the leading dimensions of its calls, added up over episodes
    once: bool = False  # it was called with one row in an episode of many samples, or with places for tokens
    grown: bool = False  # its calls saw ever more samples, of which some are to be chosen
    missed: bool = False  # a backward pass went through it and did not reach its weight
    deep: bool = False  # its input has more than one dimension that could be that of samples
    again: bool = False  # it was called more than once outside of the model
    finite: bool = True  # all that was measured of it
    swapped: bool = False  # its module had another weight or another forward method than it had been found with
    forms: list[OutputForm] = field(default_factory=list)  # of its measured calls


class Measured(NamedTuple):
    """What one step's passes left on this rank: sums and rows, the weight of each, and all samples of the step."""

    sums: dict[Key, Tensor]
    weights: dict[Key, float]  # rows of a moment, samples of rows
    blocks: dict[Key, Tensor]  # rows of each block [b], where layers are uneven
    samples: int
    rows: dict[Key, Sample]
    predictions: float  # of all these samples
    by: int | None  # who told the predictions: a layer, the model's output (LOGITS), or nobody
    steepness: float  # the largest sum of absolute gradients of one prediction's logits, of a softmax; 0 of others
    seen: dict[int, LayerSeen]
    half: tuple[float, int] | None = (
        None  # the squared norm of what the first passes left in the gradients, their samples
    )
    uneven: tuple[float, float] | None = None  # the least and the most predictions of passes that weigh alike


@dataclass(eq=False)
class Episode:
    """One forward pass: what its layers' calls handed in, and how many samples each layer saw."""

    number: int
    outside: bool = False  # of layers that are called on their own
    given: int = 0  # the first dimension of the model's input
    first: int = 0  # samples of the first call
    whole: bool = False  # a call has seen as many samples as the model was given
    strange: set[int] = field(default_factory=set)  # layers with whose weights something else was done
    rows: int = 0  # of the model's output
    sampled: bool = False  # labels were drawn for it
    aligned: dict[int, dict[str, Aligned]] = field(default_factory=dict)  # draws of each layer's calls
    made: Counter[int] = field(default_factory=Counter)  # calls
    counts: dict[int, int] = field(default_factory=dict)  # samples of the calls that were reached, last layer first
    parts: dict[Key, list[Any]] = field(default_factory=lambda: defaultdict(list))
    nearest: Call | None = None  # the first call that a backward pass reached
    predictions: Any = None  # rows of logits with a gradient: what a mean loss is a mean over
    steepness: Any = 0.0
    sharpness: Tensor | None = None  # squared norms of the logits' gradients [n]

    def forget(self) -> None:
        """Nothing of it counts any more."""
        self.counts.clear()
        self.parts.clear()
        self.nearest = self.predictions = self.sharpness = None
        self.steepness = 0.0


class Arrangement(NamedTuple):
    """How samples come first in a call's input and in the gradient of its output.

    dim: the dimension of the samples. time, fold: the first dimension holds so many places of each sample, one after
    the other (time first), or that many samples with their places behind one another.
    """

    dim: int = 0
    time: int = 0
    fold: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        if self.time:
            return x.unflatten(0, (self.time, -1)).transpose(0, 1)
        if self.fold:
            return x.unflatten(0, (self.fold, -1))
        return x.movedim(self.dim, 0) if self.dim else x


STRAIGHT = Arrangement()


@dataclass(eq=False)
class Call:
    """One call of one layer on the `own` samples of `samples` that begin at `offset`.

    `task` is the backward pass within which it was made, -1 for none.
    """

    index: int
    episode: Episode
    own: int
    places: int
    samples: int = 0
    offset: int = 0
    layer: Any = None  # as the call uses it
    arrange: Arrangement = STRAIGHT
    turned: bool = False  # features are in the last dimension but one of the output
    late: Tensor | None = None  # the input, where it is a row only together with the output's gradient
    form: str = ""  # of the model's output: predictions are its "rows", all but the "last" dimension, or "elements"
    task: int = -1
    kept: list[tuple[Statistic, Any, Draw]] = field(default_factory=list)
    sizes: OutputForm | None = None
    looked: Any = None
    deep: bool = False  # its input has more than one dimension that could be that of samples
    swapped: bool = False  # the module was not as it had been found
    positions: Any = False  # its input counts 0, 1, 2, ..., as places do and samples do not
    common: Tensor | None = None  # the input that all samples have alike, one for each of them
    leads: bool = False  # its output has a dimension of one in the place of samples
    apart: Tensor | None = None  # the gradients of such an output by samples, as far as they are known
    dy: Tensor | None = None


class Capture:
    """Hooks on the layers of a model, attached by `arm`, gone after `disarm`.

    dims: for each layer the dimension of its samples, where its input has more than one that is not features.
    sharded: ranks hold parts of the parameters. Passes then compute with others, which FSDP gathers.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        model: nn.Module | None = None,
        dims: Sequence[int] | None = None,
        seed: int = 0,
        sharded: bool = False,
    ):
        self.layers = list(layers)
        self.dims = [0] * len(self.layers) if dims is None else list(dims)
        # weakly: an output that a model keeps holds its graph, that our hooks, and these the capture
        self.model = (lambda: None) if model is None else weakref.ref(model)  # whose outputs are logits
        self.watches: dict[int, Watch] = {}
        self.sampler = Sampler(0, 0, 0, 1.0)
        self.seed = seed
        self.clock: Callable[[], float] = time.perf_counter
        self.seconds = 0.0  # in hooks, without
        self.checking = 0.0  # the checksum
        self.edges: list[Any] | None = None  # with sampled labels: where watched outputs enter the graph
        self.inside = False  # the backward pass of sampled labels is running
        self.nested = False  # a gradient is being told apart by samples, within a backward pass
        self.drawn = 0.0  # the predictions for which labels were drawn
        self.drew = False  # labels were drawn, and no gradient has come since
        self._twice = False  # for a forward pass for which labels had been drawn before
        self.halves = False  # look at the gradients once between the passes of a step
        self.judged: LogitGradientScaling | None = None  # where rows are weighed by the gradients of the logits
        self.uncleared = False  # a pass has added to a gradient that a step has taken
        self.sharded = sharded
        self.slots = Slots({k: own for k, own in enumerate(self.layers) if not isinstance(own, UncurvedParameter)})
        self._sent: set[int] = set()  # layers whose gradient FSDP has handed over since it was last cleared
        self._checks: dict[int, Checksum] = {}
        self._checked: set[int] = set()  # layers that have a checksum in this step
        self._measured: Counter[int] = Counter()  # how often each layer was measured
        self._handles: list[Any] = []
        self.calls: WeightCalls | None = None  # what sees the functions
        self.depth = threading.local()  # of modules within each other that are being watched, in each thread
        self._hooked: dict[Slot, nn.Parameter] = {}  # parameters with a hook
        self._finalizer = weakref.finalize(self, _remove, self._handles)
        self._depth, self._thread = 0, 0  # calls of the model within each other, and the thread in which they are
        self._inner: Episode | None = None  # of the model's call that is under way
        self._outer: Episode | None = None  # of layers that are called outside of the model
        self._task, self._turned = -1, 0  # the last backward pass that counted, and the thread in which it began
        self._episodes: list[Episode] = []  # reached by a backward pass
        self._waiting: dict[Call, None] = {}  # reached by a pass that keeps its graph, so more may come
        self._told: dict[Episode, tuple[int, Call, Tensor]] = {}  # gradients of outputs, by the pass they came with
        self._last: Episode | None = None  # that was reached
        self._counted: set[int] = set()  # backward passes that count
        self._within: dict[int, int] = {}  # backward passes that run within others (reentrant checkpointing)
        self.discard()

    @property
    def armed(self) -> bool:
        return bool(self._handles)

    def arm(self, watches: Mapping[int, Watch], sampler: Sampler) -> None:
        """Watch until `disarm`. All layers count samples; those in `watches` are measured."""
        self.watches, self.sampler = dict(watches), sampler
        self._depth, self._inner = 0, None  # an interrupt may have ended a forward pass unseen
        self._abandon()
        if self.edges:
            self.edges.clear()  # of passes for which no labels were drawn; they hold their graphs
        self._checked = {k for k in watches if (n := self._measured[k]) < FIRST or (n + k) % EVERY == 0}
        armed = self.armed
        for index, layer in enumerate(self.layers):
            if isinstance(layer, UncurvedParameter):
                continue  # nothing to read, and its module may take what it likes
            if self.sharded and not armed:
                handed = layer.parameters[0].register_post_accumulate_grad_hook(Handed(self, index))
                self._handles.append(handed)
            for place, parameter in enumerate(() if self.sharded else layer.parameters):
                self._hook((index, place), parameter)
            if not armed and not layer.by_weight:
                hook = LayerHook(self, index)  # before the user's own, which may change the output
                self._handles.append(layer.module.register_forward_hook(hook, with_kwargs=True, prepend=True))
        if armed:
            return
        seen = {k: layer for k, layer in enumerate(self.layers) if layer.by_weight}
        me = weakref.ref(self)
        self.calls = WeightCalls(
            seen,
            lambda found, output, flat: (own := me()) is None or own.used(found, output, flat),
            lambda index: None if (own := me()) is None else own.strange(index),
            lambda parameter: None if (own := me()) is None else own._stands_for(parameter),
            lambda index: (own := me()) is not None and index in own.watches,
            lambda shared, calls, expanded: None if (own := me()) is None else own.met(shared, calls, expanded),
            [] if (model := self.model()) is None else [*model.parameters(), *model.buffers()],
        )
        for module in dict.fromkeys(layer.module for layer in seen.values()):
            self._handles.append(module.register_forward_pre_hook(Enter(self), prepend=True))
            self._handles.append(module.register_forward_hook(Leave(self), always_call=True))
        if (model := self.model()) is not None:
            self._handles.append(model.register_forward_pre_hook(Begin(self), prepend=True, with_kwargs=True))
            self._handles.append(model.register_forward_hook(End(self), always_call=True))
        _eager(self._handles)  # a compiled graph has no place for these hooks

    def disarm(self) -> None:
        """Remove every hook."""
        _remove(self._handles)
        self._hooked.clear()
        self.slots.forget()
        self._depth, self._inner = 0, None
        self._abandon()

    def discard(self, task: int | None = None) -> None:
        """Forget what has been measured, save what the backward pass `task` has just told of outputs."""
        told = {e: t for e, t in self._told.items() if t[0] == task}
        within = {} if task is None else self._within
        for call in self._waiting:
            call.dy = None
        for episode in self._episodes:
            episode.forget()
        self._episodes, self._waiting, self._told, self._within, self._counted = [], {}, told, within, set()
        self._sums: dict[Key, Tensor] = {}
        self._weights: dict[Key, float] = {}
        self._live: dict[Key, Tensor] = {}  # rows that have a gradient, [1] or of each block [b], not read yet
        self._rows: dict[Key, Sample] = {}
        self._blocks: dict[Key, Tensor] = {}
        self._seen: dict[int, LayerSeen] = defaultdict(LayerSeen)
        for check in self._checks.values():
            check.reset()
        self._task = -1
        self._half: tuple[Sequence[Tensor], int] | None = None
        self._half_square = 0.0
        self._settled = False  # the step's passes have ended
        self._off: list[tuple[int, Tensor]] = []  # layers, and whether what samples have of a shared call is not all
        self._outer = self._last = None
        self._sent.clear()
        self.drew, self.drawn = False, 0.0
        self._claimed: dict[int, int] = {}  # the last backward pass that went through each layer's calls
        self._added: dict[int, int] = {}  # the last one that added to its weight's gradient
        self._noting: set[int] = set()  # the passes at whose end the gradients' norms are noted
        self._noted = -1  # the last one after which they were
        self._sizes: dict[int, Tensor] = {}  # these norms

    def clear(self) -> None:
        """The gradients are cleared: forget what was measured of them, but not of labels drawn for the next ones."""
        if not self.drew:
            return self.discard()
        for index, check in self._checks.items():
            check.reset()
            self._seen[index].passes = 0
        self._claimed.clear()
        self._added.clear()
        self._sizes.clear()
        self._task = -1
        return None

    # --- forward ---

    def enter(self) -> None:
        """A module with watched weights, or the model, is called."""
        depth = getattr(self.depth, "value", 0)
        self.depth.value = depth + 1
        if depth == 0 and self.calls is not None:
            self.calls.enter(self)

    def leave(self) -> None:
        """It returns, or fails."""
        depth = getattr(self.depth, "value", 0)
        if depth == 1 and self.calls is not None:
            self.calls.leave()
        self.depth.value = max(0, depth - 1)

    def _abandon(self) -> None:
        """Leave what an interrupt has left open."""
        if getattr(self.depth, "value", 0) and self.calls is not None:
            self.calls.leave()
        self.depth.value = 0

    def begin(self, given: int = 0, inputs: Sequence[Tensor] = ()) -> None:
        """The model is called on inputs, the first of which has the first dimension `given`."""
        if self._depth and self._thread != threading.get_ident():
            raise ValueError(THREADS)
        self._thread = threading.get_ident()
        if self._depth == 0:
            self._inner = Episode(len(self._episodes), given=given)
            if self.calls is not None:
                self.calls.begin(given)
            if self.halves and self._half is None and self._added and torch._C._current_graph_task_id() == -1:
                self._half = gradient_norms(self.layers), len(self._episodes)
        if self.calls is not None:
            self.calls.free(inputs)
        self._depth += 1

    def end(self, logits: Tensor | None) -> Call | None:
        """The model returns. Its output is taken for a layer's call that is nearest to the loss."""
        self._depth = max(0, self._depth - 1)
        if self._depth:
            return None
        if self.calls is not None:
            self.calls.begin()
        episode, self._inner = self._inner, None
        if episode is None or logits is None:
            return None
        episode.rows = len(logits) if logits.dim() else 0
        return Call(LOGITS, episode, episode.rows, 1, episode.rows)

    def used(self, found: Found, output: Tensor, flat: Flat | None) -> bool:
        """A function was given a layer's weight. Whether it is a call of the layer."""
        if transformed():
            return True
        start = self.clock()
        form = self.layers[found.layer].form(found.use)
        if form is not None:
            if found.use.part.through is not None and found.layer in self._checked:
                self._checksum(found.layer).round(found.use.part.through)
            common = self._for_all_samples(found, form, output)
            call = self.called(found.layer, form, output, flat, common)
            anchor(output).register_hook(Arrival(self, call, output.shape))
            if common and self.calls is not None:
                self.calls.share(output, call)
        self.seconds += self.clock() - start
        return form is not None

    def _for_all_samples(self, found: Found, form: Form, output: Tensor) -> bool:
        """Whether a call is made once for all samples, as of places: no sample has a say in its input."""
        given = 0 if self._inner is None else self._inner.given
        x = form.x
        if self.calls is None or given < 2 or form.late or form.turned or not x.dim() or not form.layer.per_sample:
            return False
        if self._pass() >= 0 or given * output.numel() > MOST_APART:
            return False
        looked_up = found.use.does == "embedding"
        if looked_up and x.dim() == 2 and len(x) == 1:
            return True
        if self.calls.constant(x) is None:
            return False
        return len(x) != given or (looked_up and not bool((x == x[:1]).all()))  # places, not one number for all samples

    def met(self, shared: Tensor, calls: Sequence[SharedCall], expanded: Tensor) -> None:
        """What calls gave for all samples meets them: a copy of it for each."""
        expanded.register_hook(Apart(self, shared, calls))

    def told_apart(self, shared: Tensor, calls: Sequence[SharedCall], dy: Tensor) -> None:
        """The gradient of the copies of a shared tensor is known: that of each sample's goes back to the calls."""
        if not self.inside and self.edges is not None:
            return
        due = [one for one in calls if one.call.kept and (self.inside or deposits(self.weight(one.call.index)))]
        if not due:
            return
        n = due[0].call.own
        if len(dy) % n:
            return
        each = (dy if len(dy) == n else dy.unflatten(0, (n, -1)).sum(1)).reshape(n, *shared.shape)
        self.nested = True
        try:
            edges = [one.edge for one in due]
            found = torch.autograd.grad(shared, edges, each, True, allow_unused=True, is_grads_batched=True)
        finally:
            self.nested = False
        for one, gradient in zip(due, found):
            if gradient is not None:
                gradient = gradient.reshape(n, *one.shape)
                one.call.apart = gradient if one.call.apart is None else one.call.apart + gradient

    def strange(self, index: int) -> None:
        """Something else is done with a layer's weight."""
        self._episode().strange.add(index)

    def called(self, index: int, form: Form, output: Tensor, flat: Flat | None = None, common: bool = False) -> Call:
        """A layer is called. `common`: once for all samples."""
        layer, x = form.layer, form.x
        if self.sharded and not layer.by_weight:
            self._look_up()
        watch, task = self.watches.get(index), self._pass()
        episode = self._episode() if task < 0 else self._through(task)
        arrange = STRAIGHT if common else self._arrangement(index, layer, x, flat, episode)
        leads = common and len(x) == 1 and x.dim() > (layer.free or 0)
        whole = x.detach().expand(episode.given, *x.shape[leads:]) if common else x
        own, places = layer.count(arrange(whole)) if x.numel() else (0, 1)
        if not common:
            episode.first = own if own == episode.given else episode.first or own
            episode.whole |= own == episode.given
        straight = arrange == STRAIGHT and own < episode.first
        offset, samples = part_of_batch(x, own, episode.first) if straight else (0, own)
        call = Call(index, episode, own, places, samples, offset, layer, arrange, form.turned, task=task)
        call.deep = layer.free is not None and x.dim() - layer.free > 1
        call.common, call.leads = whole if common and watch else None, leads
        if watch and own:
            first = not x.requires_grad
            with calm(x.device):
                x = x.detach()
                call.late = x if form.late else None
                call.positions = not common and layer.kind == "embedding" and x.dim() == 1 and counts_up(x)
                call.swapped = not layer.by_weight and swapped(layer, self._computing(index))
                if index in self._checked:
                    with self._timed():
                        call.looked = self._checksum(index).look(x, output, layer, form.late)
                draws = self._draws(index, episode, call, x.device)
                moved = whole if common else arrange(x)
                size = torch.Size((own, *output.shape[leads:])) if common else output.shape
                call.sizes = OutputForm(moved.shape, size, first)
                kept = output if arrange == STRAIGHT else None
                call.kept = [
                    (m, None if form.late or common else m.before(layer, moved, draws[m.draws], kept), draws[m.draws])
                    for m in watch.moments
                ]
        if self.edges is not None:
            self.edges.append(torch.autograd.graph.get_gradient_edge(anchor(output)))
        return call

    def _arrangement(self, index: int, layer: Layer, x: Tensor, flat: Flat | None, episode: Episode) -> Arrangement:
        """Where a call's samples are."""
        if layer.free is None or x.dim() <= layer.free:
            return STRAIGHT
        between = x.dim() - layer.free
        if flat is not None:
            if between == 1 and len(x) == flat.time * flat.samples:
                return Arrangement(time=flat.time)
            return Arrangement(dim=1 if between > 1 else 0)
        if between > self.dims[index] > 0:
            return Arrangement(dim=self.dims[index])
        given = episode.given
        if self.dims[index] == 0 and len(x) > given > 0 and len(x) % given == 0:
            base = x._base if x._is_view() else None
            if episode.whole or (base is not None and base.dim() > 0 and len(base) == given):
                return Arrangement(fold=given)  # windows, or places in one line: more places of each sample
        return STRAIGHT

    def weight(self, index: int, place: int = 0) -> nn.Parameter:
        """The parameter that passes compute a layer with."""
        own = self.layers[index].parameters[place]
        return self.slots.standing.get((index, place), own) if self.sharded else own

    def _computing(self, index: int) -> list[nn.Parameter]:
        return [self.weight(index, place) for place in range(len(self.layers[index].parameters))]

    def _stands_for(self, parameter: nn.Parameter) -> Slot | None:
        """The layer's parameter in whose slot another one stands."""
        if self.slots.find(parameter) is None:
            self._look_up()
        return self.slots.find(parameter)

    def _look_up(self) -> None:
        """Take the parameters that stand in the slots now, and watch those that FSDP has gathered."""
        self.slots.look()
        if self.sharded:
            for slot, parameter in self.slots.standing.items():
                self._hook(slot, parameter)

    def _hook(self, slot: Slot, parameter: nn.Parameter) -> None:
        """Watch a parameter, once; it may have been frozen before."""
        if parameter.requires_grad and self._hooked.get(slot) is not parameter:
            self._handles.append(parameter.register_hook(Deposit(self, *slot)))
            self._hooked[slot] = parameter

    def handed(self, index: int) -> None:
        """FSDP has handed over a layer's gradient."""
        self._sent.add(index)

    def _episode(self) -> Episode:
        """The one that a call belongs to: the model's, or that of layers called on their own."""
        if self._inner is not None:
            return self._inner
        if self._outer is None or self._outer.counts:
            self._outer = Episode(len(self._episodes), outside=True)
        return self._outer

    def _through(self, task: int) -> Episode:
        """The one that a backward pass is going through, in which something is computed again (checkpointing)."""
        if self._inner is not None:  # the model itself is computed again
            return self._inner
        told = [episode for episode, (when, _, _) in self._told.items() if when == task]
        if told:
            return told[-1]
        return self._last if self._last is not None and task == self._task else self._episode()

    def _draws(self, index: int, episode: Episode, call: Call, device: torch.device) -> dict[str, Draw]:
        """The draws of one call: of its own, of the layer in this episode, and of all layers in this episode."""
        number = episode.made[index]
        episode.made[index] += 1

        if index not in episode.aligned:
            common = self.sampler.draw(TOGETHER, episode.number, device)
            layers = self.sampler.draw(index, episode.number << 20, device)
            episode.aligned[index] = {"layer": Aligned(layers, episode.given), "all": Aligned(common, episode.given)}
        own = self.sampler.draw(index, (episode.number << 20) + number, device)
        windows = {kind: draw.at(call.offset, call.samples) for kind, draw in episode.aligned[index].items()}
        return {"call": own, **windows}

    # --- backward ---

    def arrived(self, call: Call, dy: Tensor) -> None:
        """The gradient of a call's output is known."""
        if self.nested:
            return
        counts = self.inside or self.edges is None
        if call.index == LOGITS:
            if counts:  # whether the pass counts is known at the first layer; those before it did not
                task = self._pass()
                self._told = {e: t for e, t in self._told.items() if t[0] == task or t[0] in self._counted}
                self._told[call.episode] = task, call, dy.detach()
            return
        if not self.inside:
            if not deposits(self.weight(call.index)):
                # with create_graph a loss of these gradients may follow
                self._seen[call.index].twice |= torch.is_grad_enabled()
                return
            if call.task >= 0 and call.task != (inner := torch._C._current_graph_task_id()):
                self._within[inner] = call.task
            self._turn(self._pass(), call.episode)
            if call.index in self.watches:
                self._claimed[call.index] = self._pass()
                strange = call.index in call.episode.strange and call.looked is None  # else the checksum says
                self._seen[call.index].swapped |= call.swapped or strange
            if call.looked is None:
                self._checked.discard(call.index)  # of a step that had no checksum of it
            elif call.index in self._checked:
                with self._timed(), calm(dy.device):
                    rows, seen = call.own * call.places, turned(call, dy.detach())
                    self._checks[call.index].claim(call.looked, seen, rows, call.layer, call.late)
        if counts:
            self._twice |= call.episode.sampled
            seen = self._seen[call.index]
            seen.calls += 1
            seen.deep |= call.deep and call.arrange == STRAIGHT
            seen.again |= call.episode.outside and call.episode.made[call.index] > 1
            self._counted.add(self._pass())
            if self._told:
                self._hear(call.episode, call)
            if call.sizes is not None:
                seen.forms.append(call.sizes)
            if call.kept:
                seen.grown |= any(draw.strayed for *_, draw in call.kept if isinstance(draw, Window))
            self._reach(call, dy.detach())

    def _hear(self, episode: Episode, near: Call | None = None) -> None:
        """Take in the gradient of an episode's output, if it came with a pass that counts. `near` is the layer's call
        that the pass reaches next.
        """
        told = self._told.get(episode)
        if told is None or told[0] not in self._counted:
            return
        del self._told[episode]
        _, call, dy = told
        call.form = call.form or self._form(dy, near)
        self._reach(call, dy)

    def _form(self, dy: Tensor, near: Call | None) -> str:
        """What the predictions in the model's output are, by its gradient and the layer that is next to it."""
        if dy.dim() in (1, 2) and near is None:
            return "rows"
        if dy.dim() == 0 or near is None:
            return "none"
        layer = near.layer
        wide = layer.shape.inner if near.late is not None else layer.shape.blocks * layer.shape.out
        if dy.dim() == 2 and near.places > 1 and dy.shape[1] == near.places != wide:
            return "elements"  # a number for each place, such as the logarithm of a token's probability
        if dy.dim() < 3:
            return "rows"
        return "last" if layer.free is not None and dy.shape[-1] == wide else "none"

    def _pass(self) -> int:
        """The backward pass that runs now, the outermost one."""
        task = torch._C._current_graph_task_id()
        while task in self._within:
            task = self._within[task]
        return task

    def deposited(self, index: int, place: int, gradient: Tensor) -> None:
        """Autograd is about to add to a parameter's gradient."""
        if self.inside or self.nested or not deposits(own := self.weight(index, place)):
            return
        self.uncleared = self.uncleared or (own.grad is not None and is_taken(own.grad) and bool(own.grad.any()))
        if index not in self.watches:
            return
        self.drew = False
        self._turn(self._pass(), None)
        self._seen[index].passes += place == 0
        self._added[index] = self._pass()
        self._note_sizes_at_end(gradient.device)
        if index in self._checked:
            with self._timed(), calm(gradient.device):
                self._checksum(index).deposit(place, gradient.detach())

    def _note_sizes_at_end(self, device: torch.device) -> None:
        """Have the gradients' norms noted when the backward pass that runs now has ended."""
        task = torch._C._current_graph_task_id()
        if not self.sharded and task not in self._noting:
            self._noting.add(task)
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._note_sizes, self._task, device))

    def _note_sizes(self, task: int, device: torch.device) -> None:
        """Note how large gradients are after a backward pass: zeros that are found later were cleared."""
        if task != self._task:
            return  # it was discarded in between
        with self._timed(), calm(device):
            there = {k: g for k in self._added if (g := self.weight(k).grad) is not None and not g.is_sparse}
            self._sizes = dict(zip(there, torch._foreach_norm(list(there.values())))) if there else {}
            self._noted = task

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """What is spent inside is the checksum's."""
        start = self.clock()
        yield
        spent = self.clock() - start
        self.checking += spent
        self.seconds -= spent

    def _checksum(self, index: int) -> Checksum:
        check, layer = self._checks.get(index), self.layers[index]
        if check is None or not check.fits():
            check = self._checks[index] = Checksum(layer, Sampler(self.seed, 0, 0, 1.0).mix(index))
        check.weight = self.weight(index)
        return check

    def _turn(self, task: int, episode: Episode | None) -> None:
        """If another backward pass begins: what was cleared since the last goes, what is complete is summed up."""
        if task == self._task:
            return
        if 0 <= task < self._task and self._turned != threading.get_ident():  # later passes have greater numbers
            raise ValueError(THREADS)
        self._turned = threading.get_ident()
        if self._task >= 0:
            self._drop_cleared(task)
            waiting = {call.episode for call in self._waiting}
            for done in self._episodes:
                if done is not episode and done not in waiting:
                    self._close(done)
        self._task = task

    def _drop_cleared(self, task: int) -> None:
        """Forget everything if a gradient that had been added to is gone, or if the last pass has not come to its end.

        `task` is the backward pass that begins.
        """
        if any(self._added.get(index) != last for index, last in self._claimed.items() if last == self._task):
            return self.discard(task)  # an error ended it between a layer's output and its weight
        if self.sharded:
            return self.discard(task) if self._cleared() else None
        if self._added and self._noted != self._task:
            return self.discard(task)  # an error ended it
        grads = {k: self.weight(k).grad for k in self._added}
        if any(g is None and self._seen[k].passes for k, g in grads.items()):
            return self.discard(task)
        there = {k: g for k, g in grads.items() if g is not None and k in self._sizes}
        if there:
            now, before = torch._foreach_norm(list(there.values())), [self._sizes[k] for k in there]
            if bool(((together(now) == 0) & (together(before) > 0)).any()):
                self.discard(task)
        return None

    def _cleared(self) -> bool:
        """Whether gradients of a sharded model that FSDP has handed over are gone, or all are zero.

        Until it hands them over, FSDP keeps what it was told not to send yet (set_requires_gradient_sync).
        """
        there = [self.layers[k].parameters[0].grad for k in self._added if k in self._sent and self._seen[k].passes]
        if any(gradient is None for gradient in there):
            return True
        parts = [part for g in there if g is not None and (part := local_of(g)).numel()]
        return bool(parts) and not any(bool(part.any()) for part in parts)

    def _reach(self, call: Call, dy: Tensor) -> None:
        """A pass with a call's gradient. While the graph is kept, another one may bring more of it."""
        episode = self._last = call.episode
        if episode not in self._episodes:
            self._episodes.append(episode)
        if episode.nearest is None and call.form != "none":
            episode.nearest = call
        if call.dy is not None:
            dy = call.dy + dy
        if keeps_graph() and not self.inside:
            call.dy = dy
            self._waiting[call] = None
            return
        call.dy = None
        self._waiting.pop(call, None)
        self._finish(call, dy)

    def _finish(self, call: Call, dy: Tensor) -> None:
        """A call's gradient is complete."""
        episode = call.episode
        if not call.kept and episode.nearest is not call and call.index != LOGITS:  # it is counted alone
            episode.counts[call.index] = max(call.samples, episode.counts.get(call.index, 0))
            return
        with calm(dy.device):
            if episode.nearest is call and episode.predictions is None and not self.inside:
                episode.predictions = self._predictions(call, dy)
            if call.index == LOGITS:
                if self.judged is not None and dy.dim() > 1:
                    episode.sharpness = promote(dy).flatten(1).square().sum(1)
                return
            index, layer = call.index, call.layer
            self._seen[index].once |= bool(call.positions)
            episode.counts[index] = max(call.samples, episode.counts.get(index, 0))
            due = self.watches[index].moments if index in self.watches and call.own * call.places else ()
            dy, x = turned(call, dy), call.late
            if call.common is not None:
                apart = self._apart(call, dy)
                if apart is None:
                    call.kept = []
                    return
                dy, x = apart, call.common
            elif x is not None:
                x, dy = layer.exchanged(x, dy)
                x = call.arrange(x)
                if not self.inside:  # else the pass that counts is still to come, and its checksum reads the input
                    call.late = None
            dy = call.arrange(dy)
            for moment, kept, draw in call.kept:
                if moment not in due:
                    continue  # of an earlier step
                before = kept if x is None else moment.before(layer, x, draw, None)
                key, found = (index, moment.key), moment.after(layer, before, dy, draw)
                if isinstance(found, RowSum):
                    self._live[key] = self._live[key] + found.rows if key in self._live else found.rows
                elif isinstance(moment, Moment):
                    self._weights[key] = self._weights.get(key, 0) + call.own * call.places
                part = precise(found.total if isinstance(found, RowSum) else found, layer)
                if isinstance(moment, Moment) and moment.additive:
                    self._sums[key] = self._sums[key].add_(part) if key in self._sums else part
                else:
                    before = draw.before if isinstance(draw, Window) else 0
                    episode.parts[key].append(moment.shifted(part, before) if before else part)
            call.kept = []

    def _apart(self, call: Call, dy: Tensor) -> Tensor | None:
        """The gradient of a shared output by samples; None where they were not seen. They add up to dy, or the output
        was used otherwise too.
        """
        apart, call.apart = call.apart, None
        if apart is None:
            self._seen[call.index].once = True
            return None
        off = (apart.sum(0) - dy).abs().amax() > torch.finfo(dy.dtype).eps ** 0.5 * dy.abs().amax()
        self._off.append((call.index, off))
        return apart.squeeze(1) if call.leads else apart

    def _predictions(self, call: Call, dy: Tensor) -> Any:
        """How many of the rows of logits have a gradient. Places that all have the same gradient are one prediction, as
        where a mean over places follows.
        """
        if call.index == LOGITS:
            if not dy.numel():
                return 0.0
            rows = {"rows": lambda: dy.reshape(len(dy), -1), "last": lambda: dy.flatten(0, -2)}
            rows = rows.get(call.form, lambda: dy.reshape(-1, 1))()
            call.episode.steepness = steepness(rows)
            return (torch.linalg.vector_norm(rows, torch.inf, 1) > 0).sum(dtype=torch.float64)
        if call.own * call.places == 0:
            return 0.0
        dy = call.arrange(turned(call, dy))
        rows = dy.flatten(0, -2) if call.late is not None else call.layer.output_rows(dy).flatten(1)
        call.episode.steepness = steepness(rows)
        there = torch.linalg.vector_norm(rows, torch.inf, 1) > 0
        every = there.sum(dtype=torch.float64)
        if call.places == 1:
            return every
        rows = rows.unflatten(0, (call.own, -1))
        alike = (rows == rows[:, :1]).all()
        return torch.where(alike, there.unflatten(0, (call.own, -1))[:, 0].sum(dtype=torch.float64), every)

    # --- sampled labels ---

    def sample(self, loss: Tensor, predictions: float) -> None:
        """Run a backward pass of labels drawn from the model's own prediction, towards the watched outputs only.

        loss: the sum over `predictions` of their losses.

        Raises:
            ValueError: where no layer is behind the loss, or labels were drawn for its forward pass before.

        """
        if not self.wants_labels:
            return
        assert self.edges is not None
        before = {episode for episode in self._episodes if episode.sampled}
        calls = {k: seen.calls for k, seen in self._seen.items()}
        self.inside = True
        try:
            found = torch.autograd.grad(loss, self.edges, retain_graph=True, allow_unused=True)
        finally:
            self.inside = False
        reached = any(seen.calls > calls.get(k, 0) for k, seen in self._seen.items())  # those that are due may rest
        if self._twice or not reached:
            self._twice = False
            raise ValueError(
                "sample(output) was called before for this forward pass: give all outputs at once, with a function as "
                "likelihood="
                if reached or before
                else "sample(output): the output does not come from the model that is trained here"
            )
        for episode in self._episodes:
            episode.sampled = True
        self.drew = True
        self.drawn += predictions
        self.edges = [edge for edge, g in zip(self.edges, found) if g is None]

    @property
    def wants_labels(self) -> bool:
        """Whether something is to be measured on sampled labels."""
        return self.armed and bool(self.edges)

    def seed_of_labels(self) -> int:
        """A seed for drawing labels, another one for every draw of a step."""
        return self.sampler.mix(-1, len(self._episodes))

    # --- the step ---

    def _close(self, episode: Episode) -> None:
        """Turn an episode's parts into sums and rows."""
        self._hear(episode)
        parts, episode.parts = episode.parts, defaultdict(list)
        if not parts:
            return
        with calm(self.layers[next(iter(parts))[0]].parameters[0].device):
            alike: dict[Moment, list[Key]] = defaultdict(list)  # statistics of one kind, which are closed together
            for (index, key), found in parts.items():
                if index not in self.watches:
                    continue
                moment = next((m for m in self.watches[index].moments if m.key == key), None)
                if isinstance(moment, Rows):
                    own = self._stacked(index, moment, found, episode)
                    self._rows[index, key] = own
                    self._weights[index, key] = self._weights.get((index, key), 0) + episode.counts[index]
                elif isinstance(moment, Moment):
                    alike[moment].append((index, key))
            for moment, keys in alike.items():
                for one, value in zip(keys, moment.close_all([parts[one] for one in keys])):
                    before = self._sums.get(one)
                    self._sums[one] = value if before is None else before + value

    def _stacked(self, index: int, moment: Rows, parts: list[Sample], episode: Episode) -> Sample:
        """A layer's rows of this step so far, after one more episode."""
        layer, before = self.watches[index].layer, self._rows.get((index, moment.key))
        fresh = moment.close(parts, layer.shape)
        aligned = episode.aligned[index]["all"]
        if aligned.chosen is None:
            fresh = longer(fresh, max(aligned.total, count(fresh)))
            fresh["chosen"] = torch.arange(count(fresh), device=layer.parameters[0].device)
        elif count(fresh) < len(aligned.chosen):
            fresh = {**longer(fresh, len(aligned.chosen)), "chosen": aligned.chosen}
        generator = torch.Generator().manual_seed(self.sampler.mix(TOGETHER, self._episodes.index(episode)))
        most = max(episode.counts.values())
        keys = torch.rand(most, generator=generator)  # alike in all layers
        fresh["order"] = to_device(keys, fresh["chosen"].device, keys.dtype)[fresh["chosen"]]
        if self.judged is not None:
            fresh = self.judged.weigh(fresh, episode.sharpness, episode.counts[index])
        rows = stacked([fresh] if before is None else [before, fresh], layer.shape)
        limit = moment.most(layer, places_of(rows))
        return thinned(rows, None if limit is None else self.sampler.quota(limit))

    def settle(self, readings: Readings) -> None:
        """The step's passes have ended. Ask for the numbers that `collect` decides by."""
        for episode in list(self._told):
            self._hear(episode)
        for call in list(self._waiting):
            dy, call.dy = call.dy, None
            assert dy is not None
            self._finish(call, dy)
        self._waiting.clear()
        for episode in self._episodes:
            self._close(episode)
        self._settled = True
        if not self._episodes:
            return
        asked = [(e, name, n) for e in self._episodes for name in TOLD if isinstance(n := getattr(e, name), Tensor)]
        if asked:
            readings.ask(together([n for *_, n in asked]), lambda numbers: hear_episodes(asked, numbers))
        if self._half is not None and self._half[0]:
            readings.ask(together(self._half[0]).square().sum(), self._hear_half)
        self._ask_live(readings)
        self._ask_off(readings)
        self._ask_finite(readings)
        began = self.clock()
        self._check(readings)
        self.checking += self.clock() - began

    def _ask_live(self, readings: Readings) -> None:
        """Ask how many rows count. A layer in which no row does has shown nothing."""
        if not self._live:
            return
        keys, counts = list(self._live), list(self._live.values())
        device = counts[0].device
        joined = torch.cat([own.to(device) for own in counts])

        def hear(numbers: Tensor) -> None:
            for key, rows in zip(keys, numbers.split([len(own) for own in counts])):
                if self.layers[key[0]].uneven:
                    self._blocks[key] = rows
                self._weights[key] = self._weights.get(key, 0) + float(rows.sum())
            for index in {index for index, _ in keys if not self._weights[index, _]}:
                self._weights |= {key: 0.0 for key in self._weights if key[0] == index}

        readings.ask(joined, hear)

    def _ask_off(self, readings: Readings) -> None:
        """Ask which layers that were called for all samples have more of a gradient than samples account for."""
        layers, flags = [index for index, _ in self._off], [flag for _, flag in self._off]

        def hear(numbers: Tensor) -> None:
            for index, off in zip(layers, numbers.tolist()):
                self._seen[index].once |= bool(off)

        if flags:
            readings.ask(together(flags), hear)

    def _ask_finite(self, readings: Readings) -> None:
        """Ask which layers' sums and rows are finite."""
        own = [(index, value) for (index, _), value in self._sums.items()]
        own += [(k, v) for (k, _), rows in self._rows.items() for v in rows.values() if v.is_floating_point()]
        own = [(index, value) for index, value in own if value.numel()]  # a rank may have none of the rows
        if not own:
            return

        def hear(sizes: Tensor) -> None:
            for (index, value), size in zip(own, sizes.tolist()):
                self._seen[index].finite &= is_finite(size, value)

        readings.ask(together(torch._foreach_norm([value for _, value in own])), hear)

    def _hear_half(self, square: Tensor) -> None:
        self._half_square = float(square)

    def collect(self) -> Measured:
        """What was measured since the last `collect` or `discard`, after `settle` and a read."""
        if not self._settled:
            readings = Readings()
            self.settle(readings)
            readings.read()
        samples, predictions, steepest, by, counts = 0, 0.0, 0.0, None, list[int]()
        for episode in self._episodes:
            n = samples_of(episode.counts.values(), {episode.first} & {episode.rows})
            samples += n
            counts.append(n)
            predictions += float(episode.predictions or 0.0)
            steepest = max(steepest, float(episode.steepness))
            by = by if episode.nearest is None else episode.nearest.index
            for index, own in episode.counts.items():
                seen = self._seen[index]
                seen.samples += own
                strange = self.layers[index].kind == "embedding" and n and own % n and n % own
                seen.once = seen.once or (own == 1 and n > 1) or bool(strange)
        predictions = self.drawn if self.edges is not None else predictions
        half = None
        if self._half is not None and self._half[0]:
            half = self._half_square, sum(counts[: self._half[1]])
        seen = dict(self._seen)
        sums, weights, blocks, rows = self._sums, self._weights, self._blocks, self._rows
        uneven = weighed_alike([(float(e.predictions or 0.0), float(e.steepness)) for e in self._episodes])
        measured = Measured(sums, weights, blocks, samples, rows, predictions, by, steepest, seen, half, uneven)
        self.discard()
        return measured

    def _check(self, readings: Readings) -> None:
        """Compare the two sides of every layer's checksum."""
        self._measured.update(self.watches.keys())
        for index in self._claimed.keys() & self.watches.keys():
            self._seen[index].missed = not self._seen[index].passes
        checks = {k: c for k, c in self._checks.items() if k in self._checked and self._seen[k].passes}
        if not checks:
            return

        def hear(numbers: Tensor) -> None:
            for (index, check), sides in zip(checks.items(), numbers.view(-1, 4).tolist()):
                self._seen[index].agrees = check.agrees(*sides)

        readings.ask(numbers_of(list(checks.values())), hear)


def hear_episodes(asked: Iterable[tuple[Episode, str, Tensor]], numbers: Tensor) -> None:
    """What devices have counted of forward passes."""
    for (episode, name, _), value in zip(asked, numbers.tolist()):
        setattr(episode, name, value)


def gradient_norms(layers: Iterable[Layer]) -> Sequence[Tensor]:
    """The norms of the gradients that these layers' parameters have by now; none where some are sparse."""
    found = [g for layer in layers for p in layer.parameters if (g := p.grad) is not None]
    return [] if not found or any(g.layout != torch.strided for g in found) else torch._foreach_norm(found)


def part_of_batch(x: Tensor, own: int, batch: int) -> tuple[int, int]:
    """Which of how many samples an input has: (the first one, all of them).

    A slice of a tensor of the whole batch, as experts and packed sequences get it, is a view that tells.
    """
    base = x._base if x._is_view() else None
    if base is None or own >= batch or base.dim() < 1 or len(base) != batch or x.dim() < 1:
        return 0, own
    stride = int(base.stride(0))
    if x.stride(0) != stride or stride != max(base.stride()) or base.storage_offset() > x.storage_offset():
        return 0, own
    offset = int(x.storage_offset() - base.storage_offset()) // max(stride, 1)
    return (offset, batch) if offset + own <= batch else (0, own)


def precise(part: Any, layer: Layer) -> Any:
    """What was measured in the type in which a layer's curvature is kept, where activations are less precise."""
    dtype = at_least_single(layer.parameters[0].dtype)
    if isinstance(part, Tensor):
        return part.to(dtype) if part.is_floating_point() else part
    if isinstance(part, dict):
        return {name: precise(value, layer) for name, value in part.items()}
    if isinstance(part, tuple) and hasattr(part, "_fields"):
        return type(part)(*(precise(value, layer) for value in part))
    return part


def turned(call: Call, dy: Tensor) -> Tensor:
    """The gradient of a call's output, features last."""
    return dy.transpose(-1, -2) if call.turned else dy


def swapped(layer: Layer, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether a module computes with other parameters than these, its layer's, or with another method than its kind."""
    own = layer.module._parameters.values()
    return "forward" in vars(layer.module) or any(all(known is not p for p in own) for known in parameters)


def counts_up(x: Tensor) -> bool:
    """Whether whole numbers are 0, 1, 2, ...: places, not what samples have."""
    return len(x) > 1 and torch.equal(x, torch.arange(len(x), device=x.device, dtype=x.dtype))


def take(gradient: Tensor) -> None:
    """Note that a step has taken a gradient as it is now."""
    _taken[gradient] = gradient._version


def is_taken(gradient: Tensor) -> bool:
    """Whether a step has taken a gradient, and nothing has changed it since."""
    return _taken.get(gradient) == gradient._version


def samples_of(counts: Iterable[int], agreed: Iterable[int] = ()) -> int:
    """How many samples a pass had: the leading dimension that most layers saw, given from the last layer to the first.

    Some layers may fold places into it (windows of attention, tokens before a head) or see a part (experts), so one
    layer cannot be asked; where two numbers are seen equally often, the one of the earlier layer counts. `agreed` is
    what the first layer and the model's output have in common: no majority of experts outvotes them.
    """
    order = list(counts)
    for n in agreed:
        if n in order:
            return n
    frequency = Counter(order)
    last = {n: place for place, n in enumerate(order)}
    return max(frequency, key=lambda n: (frequency[n], last[n]), default=0)


def steepness(rows: Tensor, most: int = 256) -> Tensor:
    """The largest sum of absolute values among some rows of gradients, if rows add up to zero, as a softmax's do."""
    some = promote(rows[:: max(1, len(rows) // most)])
    sizes = some.abs().sum(1)
    balanced = some.shape[1] > 1 and (some.sum(1).abs() <= 1e-2 * sizes).all()
    return torch.where(torch.as_tensor(balanced, device=rows.device), sizes.max(), 0)


def weighed_alike(passes: Iterable[tuple[float, float]]) -> tuple[float, float] | None:
    """The least and the most predictions of forward passes where each pass seems to weigh as much as any other, however
    many predictions it has: the steepness of its logits falls with their number. None where they are alike, or it
    does not. `passes`: the predictions and the steepness of each.
    """
    known = [(n, size) for n, size in passes if n > 0 and size > 0]
    if len(known) < 2:
        return None
    least, most = min(n for n, _ in known), max(n for n, _ in known)
    apart = math.sqrt(most / least)
    sizes, products = [size for _, size in known], [n * size for n, size in known]
    alike = max(products) / min(products) < apart < max(sizes) / min(sizes)
    return (least, most) if alike and most >= 1.5 * least else None


def keeps_graph() -> bool:
    """Whether the backward pass that runs now leaves its graph for another one."""
    found = getattr(getattr(torch._C, "_autograd", None), "_get_current_graph_task_keep_graph", None)
    return False if found is None else bool(found())


def calm(*devices: torch.device) -> AbstractContextManager[Any]:
    """Inside, torch computes as it is told: without gradients, in the precision of the tensors, on plain tensors."""
    kinds = {device.type for device in devices}
    casting = [kind for kind in kinds if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)]
    inference = torch.is_inference_mode_enabled()
    return _calm(casting, inference) if casting or inference else torch.no_grad()


@contextmanager
def _calm(casting: Iterable[str], inference: bool) -> Iterator[None]:
    """`calm` within autocast or inference mode."""
    with ExitStack() as stack:
        if inference:
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in casting:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


EAGER = Eager()
_taken: Any = WeakTensorKeyDictionary()  # gradients that were in a step, with their version then
_lock = threading.RLock()  # collecting garbage inside may remove the hooks of a forgotten capture
_armed: set[int] = set()  # lists of handles, one for each capture that watches


def _eager(handles: list[Any]) -> None:
    """Compiled models run eagerly where gradients are wanted, while anybody watches."""
    with _lock:
        if handles:
            _armed.add(id(handles))
        EAGER.set(bool(_armed))


def _remove(handles: list[Any]) -> None:
    if handles:
        for handle in handles:
            handle.remove()
        handles.clear()
        with _lock:
            _armed.discard(id(handles))
            EAGER.set(bool(_armed))
