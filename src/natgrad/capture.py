"""Watches the forward and backward passes of an unmodified model, and only while something is to be measured.

A forward hook looks at a layer's input and hangs a hook on its output; that one fires once when the output's
gradient is known, and only then does the call count. So a forward pass without a backward pass (evaluation, the first
of activation checkpointing's two) leaves nothing behind, and an in-place activation after the layer changes nothing.

Everything is kept as sums over this rank; turning sums into means needs all samples of the step, known in `collect`.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from natgrad.curvature.base import Moment, Statistic
from natgrad.curvature.rows import Rows, Sample, count, places_of, stacked, thinned
from natgrad.hooks import TOGETHER, Judge, LayerHook, LogitsHook
from natgrad.layers import Layer, Loose
from natgrad.layers.base import promote
from natgrad.sampling import Sampler

Key = tuple[int, str]  # a layer's place in the list of watched layers, and one of its statistics


class Watch(NamedTuple):
    """A layer and the statistics that are to be measured of it."""

    layer: Layer
    moments: tuple[Statistic, ...]


class Measured(NamedTuple):
    """What one step's passes left on this rank: sums and rows, the samples behind each, and all samples of the step."""

    sums: dict[Key, Tensor]
    weights: dict[Key, int]
    samples: int
    rows: dict[Key, Sample]
    predictions: float  # of all these samples


@dataclass
class _Pass:
    """One backward pass: the parts that its calls handed in, and the number of samples each layer saw."""

    parts: dict[Key, list[Any]] = field(default_factory=lambda: defaultdict(list))
    weights: dict[Key, list[int]] = field(default_factory=lambda: defaultdict(list))
    counts: dict[int, int] = field(default_factory=dict)
    sharpness: Tensor | None = None  # squared norms of the logits' gradients [n]
    predictions: float | None = None  # rows of logits: what a mean loss is a mean over


class Capture:
    """Hooks on the layers of a model, attached by `arm`, gone after `disarm`."""

    def __init__(self, layers: Sequence[Layer], model: nn.Module | None = None):
        self.layers = list(layers)
        # weakly: an output that a model keeps holds its graph, that our hooks, and these the capture
        self.model = (lambda: None) if model is None else weakref.ref(model)  # whose outputs are logits
        self.watches: dict[int, Watch] = {}
        self.sampler = Sampler(0, 0, 0, 1.0)
        self.calls: Counter[int] = Counter()
        self.seconds = 0.0
        self.edges: list[Any] | None = None  # with sampled labels: where watched outputs enter the graph
        self.inside = False  # the backward pass of sampled labels is running
        self.drawn: float | None = None  # the predictions in it
        self.seen: dict[int, int] = {}  # samples of each layer in the forward pass
        self._handles: list[Any] = []
        self._finalizer = weakref.finalize(self, _remove, self._handles)
        self._passes: dict[int, _Pass] = {}
        self._ended = 0  # backward passes of this step that are over
        self._closed = self._nothing()
        self.judged: Judge | None = None  # where rows are weighed by the gradients of the logits

    @staticmethod
    def _nothing() -> Measured:
        return Measured({}, {}, 0, {}, 0.0)

    @property
    def armed(self) -> bool:
        return bool(self._handles)

    def arm(self, watches: Mapping[int, Watch], sampler: Sampler) -> None:
        """Watch until `disarm`. All layers count samples; those in `watches` are measured."""
        self.watches, self.sampler = dict(watches), sampler
        self.calls.clear()
        if self.armed:
            return
        for index, layer in enumerate(self.layers):
            if isinstance(layer, Loose):
                continue  # nothing to read, and its module may take what it likes
            self._handles.append(layer.module.register_forward_hook(LayerHook(self, index), with_kwargs=True))
        if (model := self.model()) is not None:
            self._handles.append(model.register_forward_hook(LogitsHook(self)))
        _eager(+1)  # a compiled graph has no place for these hooks

    def disarm(self) -> None:
        """Remove every hook."""
        _remove(self._handles)

    def discard(self) -> None:
        """Forget what has been measured."""
        self._passes.clear()
        if self.edges is not None:
            self.edges.clear()
        self._closed = self._nothing()
        self._ended = 0

    def sample(self, output: Tensor, predictions: float | None = None) -> None:
        """Run a backward pass of labels drawn from the model's own prediction, towards the watched outputs only.

        output: logits [n, classes, ...]. A sample's loss is the sum over its places over `predictions` (None: their
        number, so it is the mean); parts come out with weight 1 a sample.
        """
        if not self.armed or not self.edges:
            return
        with torch.enable_grad():
            rows = promote(output).movedim(1, -1).flatten(0, -2)
            seed = self.sampler.mix(-1, len(self._passes) + self._closed.samples)
            noise = torch.rand(rows.shape, generator=torch.Generator(rows.device).manual_seed(seed), device=rows.device)
            labels = (rows.detach() - noise.log().neg().log()).argmax(-1)  # Gumbel's way of drawing from a softmax
            loss = torch.nn.functional.cross_entropy(rows, labels, reduction="sum")
            samples = samples_of(reversed(self.seen.values()))
            self.drawn = len(rows) if predictions is None else predictions * samples
            loss = loss * (samples / self.drawn)
            self.inside = True
            try:
                torch.autograd.grad(loss, self.edges, retain_graph=True, allow_unused=True)
            finally:
                self.inside = False
        self.edges.clear()

    def saw(self, index: int, samples: int, parts: Mapping[str, Tensor], task: int) -> None:
        """One call's gradient has arrived, in backward pass `task`."""
        now = self._pass(task)
        now.counts[index] = max(samples, now.counts.get(index, 0))
        for key, part in parts.items():
            now.parts[index, key].append(part)
            now.weights[index, key].append(samples)

    def predicted(self, rows: int, task: int) -> None:
        """So many rows have a gradient in backward pass `task`. The first to say so are nearest to the loss: the logits
        of the model, where they are a vector or a matrix, or the outputs of its last layer.
        """
        now = self._pass(task)
        if now.predictions is None:
            now.predictions = self.drawn if self.inside else float(rows)

    def sharp(self, squares: Tensor, task: int) -> None:
        """The squared norms [n] of the gradients with respect to each sample's logits, in backward pass `task`."""
        self._pass(task).sharpness = squares

    def _pass(self, task: int) -> _Pass:
        if task not in self._passes:
            self._close()
            self._passes[task] = _Pass()
        return self._passes[task]

    def _close(self) -> None:
        """Turn finished backward passes into sums."""
        sums, weights, samples, rows, predictions = self._closed
        for done in self._passes.values():
            self._ended += 1
            for (index, key), parts in done.parts.items():
                moment = next(m for m in self.watches[index].moments if m.key == key)
                if isinstance(moment, Rows):
                    own = self._rows(index, moment, parts, done, rows.get((index, key)))
                    rows[index, key] = own
                    weights[index, key] = count(own)
                    continue
                assert isinstance(moment, Moment)
                value = moment.close(parts)
                previous = sums.get((index, key))
                sums[index, key] = value if previous is None else previous + value
                weights[index, key] = weights.get((index, key), 0) + sum(done.weights[index, key])
            samples += samples_of(done.counts.values())
            predictions += done.predictions or 0.0
        self._passes.clear()
        self._closed = Measured(sums, weights, samples, rows, predictions)

    def _rows(self, index: int, moment: Rows, parts: list[Sample], done: _Pass, before: Sample | None) -> Sample:
        """A layer's rows of this step so far, after one more pass."""
        layer = self.watches[index].layer
        fresh = moment.close(parts, layer.shape)
        generator = torch.Generator().manual_seed(self.sampler.mix(TOGETHER, self._ended))
        keys = torch.rand(int(fresh["chosen"].max()) + 1, generator=generator)  # alike in all layers
        fresh["order"] = keys.to(fresh["chosen"].device)[fresh["chosen"]]
        if self.judged is not None:
            fresh = self.judged.weigh(fresh, done.sharpness, done.counts[index])
        rows = stacked([fresh] if before is None else [before, fresh], layer.shape)
        most = moment.most(layer, places_of(rows))
        return thinned(rows, None if most is None else self.sampler.quota(most))

    def collect(self) -> Measured:
        """What was measured since the last `collect` or `discard`."""
        self._close()
        measured = self._closed
        self.discard()
        return measured


def samples_of(counts: Iterable[int]) -> int:
    """How many samples a pass had: the leading dimension that most layers saw, given from the last layer to the first.

    Some layers may fold places into it (windows of attention, tokens before a head) or see a part (experts), so one
    layer cannot be asked; where two numbers are seen equally often, the one of the earlier layer counts.
    """
    order = list(counts)
    frequency = Counter(order)
    last = {n: place for place, n in enumerate(order)}
    return max(frequency, key=lambda n: (frequency[n], last[n]), default=0)


_lock = threading.RLock()  # collecting garbage inside may remove the hooks of a forgotten capture
_watching = 0


def _eager(change: int) -> None:
    """Compiled models run eagerly while anybody watches."""
    global _watching
    with _lock:
        _watching += change
        torch.compiler.set_stance("force_eager" if _watching else "default")


def _remove(handles: list[Any]) -> None:
    if handles:
        for handle in handles:
            handle.remove()
        handles.clear()
        _eager(-1)
