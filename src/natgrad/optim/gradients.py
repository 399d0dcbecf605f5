"""Gradients on their way to the owners: who has one, are they finite, are they averaged already, how long are they."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from natgrad.layer_state import LayerState
from natgrad.layers.layer import real
from natgrad.optim.gradient_noise import Squares, square
from natgrad.optim.loss_scale import LossScale
from natgrad.optim.overlap import Overlap
from natgrad.parallel import OwnedTensor, World
from natgrad.readings import Readings, on_host, to_device, together
from natgrad.stacks import Storage, adjacent


class Agreed(NamedTuple):
    """What all ranks know of a step's gradients, cell by cell."""

    present: list[bool]
    halves: list[bool]  # cells of which some parameters, not all, are frozen


class GradientReading(NamedTuple):
    """What was read of a step's gradients."""

    flags: Tensor
    square: Tensor
    early: Tensor  # norms of gradients that left early, when they left and now


class Gradients:
    """Knows how this model's gradients relate to the world: every rank its own, or averaged by a wrapper."""

    def __init__(self, world: World, max_norm: float | None, scale: Callable[[], float] = lambda: 1.0):
        self.world = world
        self.scale = scale  # on this rank's loss, as far as it is known before step()
        self.max_norm = max_norm
        self.mode = world.gradients if world.size > 1 else "averaged"
        self.reduced = False
        self.active = world.size  # ranks that have a batch
        self.square = 0.0  # of this rank's gradients of the last step, the loss's scale taken out
        self.local = False  # they were this rank's own, of its own samples
        self.clipped = torch.ones((), dtype=torch.float64)  # by this the mean was multiplied
        self.loaded = False  # a state was loaded: some of it may be missing
        self.overlap: Overlap | None = None

    def begin_early(self, cells: Sequence[LayerState]) -> None:
        """Send gradients during the backward pass from now on, if the world asks for it."""
        if self.world.overlap and self.world.size > 1:
            pairs = [(p, c.owner) for c in cells for p in c.layer.parameters]
            self.overlap = Overlap(self.world, [p for p, _ in pairs], [owner for _, owner in pairs], self.scale)

    @property
    def sent_local(self) -> bool:
        """Whether this rank's own gradients left it before `step()`."""
        return self.world.size > 1 and self.mode == "local" and (self.reduced or self.overlap is not None)

    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average `.grad` over ranks in place, unless a wrapper has done so."""
        if self.reduced:
            return
        self.reduced = True
        if self.overlap is not None:
            self.overlap.flush()
        present = torch.tensor([float(grad_of(p) is not None) for p in parameters])
        self.world.max([present], "scalars")
        chosen = [p for p, here in zip(parameters, present.tolist()) if here]
        if not self._are_local([p.grad for p in chosen if p.grad is not None]):
            return
        for parameter in chosen:  # ranks may have used unlike parts of the model
            parameter.grad = _gradient(parameter)
        gradients, scale = [_gradient(p) for p in chosen], self.scale()
        if self.overlap is None:
            unscale(gradients, scale)
            self.world.mean([real(g) for g in gradients], "gradients")
        else:
            sums, owners = self.overlap.collect(), self.overlap.owners
            for parameter in chosen:
                if parameter in sums:
                    real(_gradient(parameter)).copy_(sums[parameter] / self.world.size)
            self.world.gather([OwnedTensor(real(_gradient(p)), owners[p]) for p in chosen], "gradients")
        unscale(gradients, 1 / scale)  # whoever looks next expects them as the backward pass left them

    def agree(self, cells: Sequence[LayerState], look: bool, scale: LossScale, readings: Readings) -> Agreed | None:
        """Which cells have a gradient on any rank, and which are half frozen; None if a gradient is not finite on any.

        All that was asked of `readings` is heard now: this is the step's one wait for the device.

        With `look`, "auto" is decided again: whoever averages gradients does it in every step.
        """
        early = self.overlap if not self.reduced else None
        if early is not None:
            early.flush()
        found = [[grad_of(p) for p in c.layer.parameters] for c in cells]
        gradients = [g for own in found for g in own if g is not None]
        here = [any(g is not None for g in own) for own in found]
        frozen = [[not p.requires_grad for p in c.layer.parameters] for c in cells]
        halves = [any(own) and not all(own) for own in frozen]
        lost = [(c.by_rows or self.loaded) and c.lost(self.world.rank) for c in cells]
        self.loaded = False
        flags = [False, *here, *halves, *lost]
        told = self._look(gradients, scale.found, flags, early, readings)
        self.square = float(told.square) / scale.seen**2
        flags = [bool(told.flags[0]), *(told.flags[1:].tolist() if len(told.flags) > 1 else flags[1:])]
        if flags[0]:
            self.give_up()
            return None
        if early is not None:
            early.check(told.early, scale.seen)
        if (look or self.mode == "auto") and not self.reduced and self.active == self.world.size:
            self._are_local(gradients)
        count, flags = len(cells), [flag > 0 for flag in flags[1:]]
        for cell, gone in zip(cells, flags[2 * count :]):
            if gone:
                cell.forget()
        return Agreed(flags[:count], flags[count : 2 * count])

    def _look(
        self,
        gradients: Sequence[Tensor],
        bad: Tensor | None,
        flags: Sequence[bool],
        early: Overlap | None,
        readings: Readings,
    ) -> GradientReading:
        """Read what there is to be known of this rank's gradients, and the maxima over ranks of `flags`.

        The first flag becomes whether a gradient is not finite; alone, a rank has no need to send the others.
        """
        norms = together(torch._foreach_norm(list(gradients))) if gradients else torch.zeros(1, dtype=torch.float64)
        finite = torch.isfinite(norms).all()
        own = to_device([float(flag) for flag in (flags if self.world.size > 1 else flags[:1])], norms.device)
        own[0] = ~finite if bad is None else ~finite | (bad.to(norms.device) != 0).any()
        self.world.max([own], "scalars")
        answers = [own, norms.square().sum(), own[:0] if early is None else early.norms_then_and_now()]
        told = list[Tensor]()
        for numbers in answers:
            readings.ask(numbers, told.append)
        readings.read()
        return GradientReading(*told)

    def give_up(self) -> None:
        """Forget the gradients of this step."""
        self.reduced = False
        if self.overlap is not None:
            self.overlap.drop()

    def _are_local(self, gradients: Sequence[Tensor]) -> bool:
        """Whether ranks still hold their own gradients. Bit-equal ones were averaged before we saw them."""
        if self.world.size == 1 or self.world.gradients != "auto":
            return self.mode == "local"
        marks = _marks(gradients)
        high = torch.cat([marks, torch.tensor([float(len(marks))], dtype=torch.float64)])
        ends = _ends(self.world, high)
        mode = "averaged" if ends is not None and bool((ends[0] == -ends[1]).all()) else "local"
        if self.mode not in ("auto", mode):
            raise ValueError(
                f"gradients were {self.mode} in earlier steps and look {mode} now: say which they are with "
                f'world=World(gradients="local") for a plain model or World(gradients="averaged") for a wrapped one'
            )
        self.mode = mode
        return mode == "local"

    def to_owners(self, storage: Storage, present: Sequence[bool], scale: float) -> list[Tensor | None]:
        """The mean gradients of the layers that this rank owns, divided by `scale` and clipped.

        For every layout of the storage a flat vector that begins at this rank's first layer; None where it has none.
        What belongs to layers that are not present is not defined. Ranks may have unlike scales, so each divides its
        own gradients before they are summed.
        """
        local = self.mode == "local" and not self.reduced
        self.local = local and self.active == self.world.size > 1
        if local and self.overlap is not None:
            sums, divisor = self.overlap.collect(), float(self.world.size)
            found = [self._own(storage, k, present, sums.__getitem__) for k in range(len(storage.layouts))]
        elif local or self.active < self.world.size:
            divisor = float(self.world.size if local else self.active)  # averaged ones are those of the active ranks
            found = self._sums(storage, present, scale)
        else:
            found = [self._own(storage, k, present, _gradient) for k in range(len(storage.layouts))]
            divisor = scale
        self.reduced = False
        if divisor != 1:
            for vector in found:
                if vector is not None:
                    vector.div_(divisor)
        self._clip(storage, present, found)
        return found

    def _own(
        self, storage: Storage, k: int, present: Sequence[bool], values: Callable[[nn.Parameter], Tensor]
    ) -> Tensor | None:
        """A vector of this rank's layers, filled parameter by parameter."""
        layout, mine = storage.layouts[k], storage.mine[k]
        if not mine:
            return None
        vector = storage.empty(k)
        layout.fill(vector, layout.start[mine[0]], (storage.cells[c] for c in mine if present[c]), values)
        return vector

    def _sums(self, storage: Storage, present: Sequence[bool], scale: float) -> list[Tensor | None]:
        """Every layer's gradients of all ranks, added up at its owner."""
        parcels, targets = [], list[tuple[int, int, int]]()
        for k, layout in enumerate(storage.layouts):
            chosen = [c for c in layout.order if present[c]]
            vector = torch.empty(layout.numel, dtype=layout.kind[2], device=layout.kind[1])
            layout.fill(vector, 0, (storage.cells[c] for c in chosen), _gradient)
            for row in adjacent(layout.order, chosen):
                for owner, some in groupby(row, key=lambda c: storage.cells[c].owner):
                    own = list(some)
                    start = layout.start[own[0]]
                    stop = layout.start[own[-1]] + storage.cells[own[-1]].layer.shape.numel
                    part = vector[start:stop]
                    parcels.append(OwnedTensor(part if scale == 1 else part / scale, owner))
                    targets.append((k, start, stop))
        received = self.world.reduce(parcels, "gradients")
        found: list[Tensor | None] = [storage.empty(k) if mine else None for k, mine in enumerate(storage.mine)]
        for (k, start, stop), value in zip(targets, received):
            vector, mine = found[k], storage.mine[k]
            if value is not None and vector is not None:
                begin = storage.layouts[k].start[mine[0]]
                vector[start - begin : stop - begin].copy_(value)
        return found

    def squares(
        self,
        mine: Sequence[Tensor],
        half: tuple[float, int] | None,
        samples: float,
        readings: Readings,
        hear: Callable[[Squares], None],
    ) -> None:
        """Ask for the squared norms of a share of the step's gradient and of all of it, if both are there.

        mine: the mean gradients of the cells that this rank owns. half: of the step's first passes on the only rank.
        All ranks call it.
        """
        if not self.local and (half is None or not 0 < half[1] < samples):
            return
        own, size = square(mine, self.clipped) / self.clipped.square(), self.world.size
        if self.local:
            sums = torch.stack([torch.full_like(own, self.square / size), own / (1 if self.world.owners else size)])
            self.world.sum([sums], "scalars")
            readings.ask(sums, lambda told: hear(Squares(float(told[0]) / size**2, float(told[1]), 1 / size)))
        elif half is not None:
            part, share = half[0], half[1] / samples
            readings.ask(own, lambda told: hear(Squares(part, float(told), share)))

    def _clip(self, storage: Storage, present: Sequence[bool], vectors: Sequence[Tensor | None]) -> None:
        self.clipped = torch.ones((), dtype=torch.float64, device=storage.device)
        if self.max_norm is None:
            return
        total = square(storage.present(vectors, present), self.clipped)
        self.world.sum_over_owners([total], "scalars")
        self.clipped = (self.max_norm / (total.sqrt() + 1e-6)).clamp_max(1)
        for vector in vectors:
            if vector is not None:
                vector.mul_(self.clipped.to(vector.device))


def unscale(gradients: Sequence[Tensor], scale: float) -> None:
    """Divide in place."""
    if scale != 1 and gradients:
        torch._foreach_mul_(list(gradients), 1 / scale)


def _marks(gradients: Sequence[Tensor]) -> Tensor:
    """Some entries of each gradient and their norms: equal to the last bit only if the gradients are."""
    flat = [real(gradient).flatten() for gradient in gradients]
    entries = [own[:: max(1, own.numel() // 16)] for own in flat]
    return torch.cat(on_host([*entries, *torch._foreach_norm(flat)])) if flat else torch.zeros(0, dtype=torch.float64)


def _ends(world: World, marks: Tensor) -> Tensor | None:
    """The maxima over ranks of marks and of -marks [2, m]; None if ranks have unlike numbers of gradients."""
    count = torch.stack([marks[-1], -marks[-1]])
    world.max([count], "scalars")
    if count[0] != -count[1]:
        return None
    ends = torch.stack([marks, -marks])
    world.max([ends], "scalars")
    return ends


def grad_of(parameter: nn.Parameter) -> Tensor | None:
    """A parameter's gradient, a dense one. That of a frozen parameter is of the past."""
    if parameter.grad is None or not parameter.requires_grad:
        return None
    if parameter.grad.layout != torch.strided:  # all that comes after is dense: so are momenta and moments
        parameter.grad = parameter.grad.to_dense()
    return parameter.grad


def _gradient(parameter: nn.Parameter) -> Tensor:
    gradient = grad_of(parameter)
    return torch.zeros_like(parameter) if gradient is None else gradient
