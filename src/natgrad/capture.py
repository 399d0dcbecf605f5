"""Watches the forward and backward passes of an unmodified model, and only while something is to be measured.

A forward hook looks at a layer's input and hangs a hook on its output; that one fires once when the output's
gradient is known, and only then does the call count. So a forward pass without a backward pass (evaluation, the first
of activation checkpointing's two) leaves nothing behind, and an in-place activation after the layer changes nothing.

Everything is kept as sums over this rank; turning sums into means needs all samples of the step, known in `collect`.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from natgrad.curvature.base import Moment
from natgrad.layers import Layer, Loose
from natgrad.layers.base import promote
from natgrad.sampling import Sampler

Key = tuple[int, str]  # a layer's place in the list of watched layers, and one of its statistics


class Watch(NamedTuple):
    """A layer and the statistics that are to be measured of it."""

    layer: Layer
    moments: tuple[Moment, ...]


class Measured(NamedTuple):
    """What one step's passes left on this rank: sums, the samples behind each, and all samples of the step."""

    sums: dict[Key, Tensor]
    weights: dict[Key, int]
    samples: int


@dataclass
class _Pass:
    """One backward pass: the parts that its calls handed in, and the number of samples each layer saw."""

    parts: dict[Key, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    weights: dict[Key, list[int]] = field(default_factory=lambda: defaultdict(list))
    counts: dict[int, int] = field(default_factory=dict)


class Capture:
    """Hooks on the layers of a model, attached by `arm`, gone after `disarm`."""

    def __init__(self, layers: Sequence[Layer]):
        self.layers = list(layers)
        self.watches: dict[int, Watch] = {}
        self.sampler = Sampler(0, 0, 0, 1.0)
        self.calls: Counter[int] = Counter()
        self.seconds = 0.0
        self.edges: list[Any] | None = None  # with sampled labels: where watched outputs enter the graph
        self.inside = False  # the backward pass of sampled labels is running
        self.seen: dict[int, int] = {}  # samples of each layer in the forward pass
        self._handles: list[Any] = []
        self._finalizer = weakref.finalize(self, _remove, self._handles)
        self._passes: dict[int, _Pass] = {}
        self._closed = Measured({}, {}, 0)

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
            self._handles.append(layer.module.register_forward_hook(_Hook(self, index), with_kwargs=True))
        _eager(+1)  # a compiled graph has no place for these hooks

    def disarm(self) -> None:
        """Remove every hook."""
        _remove(self._handles)

    def discard(self) -> None:
        """Forget what has been measured."""
        self._passes.clear()
        if self.edges is not None:
            self.edges.clear()
        self._closed = Measured({}, {}, 0)

    def sample(self, output: Tensor) -> None:
        """Run a backward pass of labels drawn from the model's own prediction, towards the watched outputs only.

        output: logits [n, classes, ...]. A sample's loss is the mean over its places, as in the training loss; parts
        come out with weight 1 a sample.
        """
        if not self.armed or not self.edges:
            return
        with torch.enable_grad():
            rows = promote(output).movedim(1, -1).flatten(0, -2)
            seed = self.sampler.mix(-1, len(self._passes) + self._closed.samples)
            noise = torch.rand(rows.shape, generator=torch.Generator(rows.device).manual_seed(seed), device=rows.device)
            labels = (rows.detach() - noise.log().neg().log()).argmax(-1)  # Gumbel's way of drawing from a softmax
            loss = torch.nn.functional.cross_entropy(rows, labels, reduction="sum")
            loss = loss * (samples_of(reversed(self.seen.values())) / len(rows))
            self.inside = True
            try:
                torch.autograd.grad(loss, self.edges, retain_graph=True, allow_unused=True)
            finally:
                self.inside = False
        self.edges.clear()

    def saw(self, index: int, samples: int, parts: Mapping[str, Tensor], task: int) -> None:
        """One call's gradient has arrived, in backward pass `task`."""
        if task not in self._passes:
            self._close()
            self._passes[task] = _Pass()
        now = self._passes[task]
        now.counts[index] = max(samples, now.counts.get(index, 0))
        for key, part in parts.items():
            now.parts[index, key].append(part)
            now.weights[index, key].append(samples)

    def _close(self) -> None:
        """Turn finished backward passes into sums."""
        sums, weights, samples = self._closed
        for done in self._passes.values():
            for (index, key), parts in done.parts.items():
                moment = next(m for m in self.watches[index].moments if m.key == key)
                value = moment.close(parts)
                previous = sums.get((index, key))
                sums[index, key] = value if previous is None else previous + value
                weights[index, key] = weights.get((index, key), 0) + sum(done.weights[index, key])
            samples += samples_of(done.counts.values())
        self._passes.clear()
        self._closed = Measured(sums, weights, samples)

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


class _Hook:
    """The forward hook of one layer. In a copy of the model (deepcopy, pickle, an average) it does nothing."""

    def __init__(self, capture: Capture, index: int):
        self.capture = weakref.ref(capture)
        self.index = index

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        capture, index = self.capture(), self.index
        if capture is None or not isinstance(output, Tensor) or not output.requires_grad:
            return
        start = time.perf_counter()
        layer, watch = capture.layers[index], capture.watches.get(index)
        x = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        samples, _ = layer.count(x)
        draw = capture.sampler.draw(index, capture.calls[index], x.device)
        capture.calls[index] += 1
        kept = []
        if watch:
            with torch.no_grad():
                x = x.detach()
                kept = [(m, m.before(layer, x, draw, output)) for m in watch.moments]
        capture.seconds += time.perf_counter() - start

        def arrived(dy: Tensor) -> None:
            if capture.edges is not None and not capture.inside:
                return
            start = time.perf_counter()
            parts = {}
            if kept:
                with torch.no_grad():
                    dy = dy.detach()
                    parts = {m.key: m.after(layer, k, dy, draw) for m, k in kept}
            capture.saw(index, samples, parts, outer if outer >= 0 else torch._C._current_graph_task_id())
            capture.seconds += time.perf_counter() - start

        outer = torch._C._current_graph_task_id()  # not -1: recomputed within a backward pass, as part of it
        output.register_hook(arrived)
        if capture.edges is not None:
            capture.edges.append(torch.autograd.graph.get_gradient_edge(output))
            capture.seen[index] = samples

    def __deepcopy__(self, memo: dict) -> Inert:
        return Inert()

    def __reduce__(self) -> tuple:
        return Inert, ()


class Inert:
    """The hook in a copy of a watched model."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        return None


_lock = threading.Lock()
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
