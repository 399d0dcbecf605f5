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
from natgrad.parallel import OwnedTensor, ShardedWorld, Sharding, World
from natgrad.readings import Readings, on_host, to_device, together
from natgrad.stacks import StepVector, Storage, adjacent


class Agreed(NamedTuple):
    """What all ranks know of a step's gradients, cell by cell."""

    present: list[bool]
    halves: list[bool]  # cells of which some parameters, not all, are frozen
    told: bool  # some rank has told its loss


class GradientReading(NamedTuple):
    """What was read of a step's gradients."""

    flags: Tensor
    ends: Tensor  # the maxima over ranks of their least and largest numbers, and of minus these; empty if not asked
    square: Tensor  # of their norm; empty on the only rank, which does not need it
    early: Tensor  # norms of gradients that left early, when they left and now


class Gradients:
    """Knows how this model's gradients relate to the world: every rank its own, or averaged by a wrapper."""

    def __init__(
        self,
        world: World,
        max_norm: float | None,
        scale: Callable[[], float] = lambda: 1.0,
        sharding: Sharding | None = None,
    ):
        self.world, self.sharded = world, sharding is not None  # sharded gradients were averaged by FSDP
        self.parts = world if sharding is None else ShardedWorld(world, sharding.replicas)
        self.scale = scale  # on this rank's loss, as far as it is known before step()
        self.max_norm = max_norm
        self.mode = world.gradients if world.size > 1 and sharding is None else "averaged"
        self.reduced = False
        self.active = world.size  # ranks that have a batch
        self.square = 0.0  # of this rank's gradients of the last step, the loss's scale taken out
        self.local = False  # they were this rank's own, of its own samples
        self.clipped: Tensor | None = None  # by this the mean was multiplied, where it may be clipped
        self.loaded = False  # a state was loaded: some of it may be missing
        self.parted = False  # gradients looked averaged until they did not
        self.overlap: Overlap | None = None
        self._filled: Sequence[StepVector] | None = None  # vectors that hold this step's gradients as they are

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
        if self.reduced or self.sharded:
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

    def agree(
        self,
        cells: Sequence[LayerState],
        storage: Storage,
        look: bool,
        scale: LossScale,
        told_loss: bool,
        readings: Readings,
    ) -> Agreed | None:
        """Which cells have a gradient on any rank, and which are half frozen; None if a gradient is not finite on any.

        cells: where curvature is. storage: where this rank's gradients go, for as many cells.

        All that was asked of `readings` is heard now: this is the step's one wait for the device.

        look: the step measures. "auto" is decided again, as whoever averages gradients does it in every step; and no
        memory is held until `to_owners`, because measurements need theirs. told_loss: this rank was told its loss.
        """
        early = self.overlap if not self.reduced else None
        if early is not None:
            early.flush()
        found = [grad_of(p) for p in storage.parameters]
        here, halves = [True] * len(cells), [False] * len(cells)
        whole = not any(g is None for g in found)
        if not whole:
            here = [any(g is not None for g in own) for own in storage.by_cell(found)]
            trains = storage.by_cell([p.requires_grad for p in storage.parameters])
            halves = [any(own) and not all(own) for own in trains]
        lost = [(c.by_rows or self.loaded) and c.lost(self.world.rank) for c in cells]
        self.loaded = False
        flags = [False, told_loss, *here, *halves, *lost]
        vectors = [] if early is not None else self._fill(storage, found, whole)
        told = self._look(vectors, storage.device, scale.found, flags, early, readings)
        self.square = float(told.square.sum()) / scale.seen**2
        flags = [bool(told.flags[0]), *(told.flags[1:].tolist() if len(told.flags) > 1 else flags[1:])]
        if flags[0]:
            self.give_up()
            storage.release()
            return None
        high, low = told.ends.view(2, -1)
        if not torch.equal(high, -low):
            self._part()
        if early is not None:
            early.check(told.early, scale.seen)
        if (look or self.mode == "auto") and not self.reduced and self.active == self.world.size:
            self._are_local([g for g in found if g is not None])
        if look:
            self._filled = None
            storage.release()
        count, (told_loss, *flags) = len(cells), [flag > 0 for flag in flags[1:]]
        for cell, gone in zip(cells, flags[2 * count :]):
            if gone:
                cell.forget()
        return Agreed(flags[:count], flags[count : 2 * count], told_loss)

    def _fill(self, storage: Storage, found: Sequence[Tensor | None], whole: bool) -> list[Tensor]:
        """Write the gradients that there are into vectors: those of all layers where they are sent, or compared over
        ranks, else those of the layers that this rank owns. They are the vectors that `to_owners` will need, as a rule.
        """
        local = self.mode != "averaged" and not self.reduced
        everything = local or self.active < self.world.size or (self.world.owners and self._may_part)
        self._filled = storage.outgoing if everything else storage.gradients
        return [vector.fill(found, whole) for vector in self._filled if vector.numel]

    def _look(
        self,
        vectors: Sequence[Tensor],
        device: torch.device,
        bad: Tensor | None,
        flags: Sequence[bool],
        early: Overlap | None,
        readings: Readings,
    ) -> GradientReading:
        """Read what there is to be known of this rank's gradients, and the maxima over ranks of `flags`.

        The first flag becomes whether a gradient is not finite; alone, a rank has no need to send the others.
        """
        if early is not None:
            norms = early.norms_then_and_now().to(device)
            ends = norms[1]
            square = ends.square().sum()
        else:  # torch takes 60 times as long for the largest absolute number as for the least and the largest one
            found = [end for vector in vectors for end in torch.aminmax(vector)]
            ends = together(found).to(device) if found else torch.zeros(1, dtype=torch.float64, device=device)
            norms = square = ends[:0]
            if self.world.size > 1 and vectors:
                square = together([torch.linalg.vector_norm(vector) for vector in vectors]).square().sum()
        if self.world.size > 1 and vectors:  # the sum over ranks must be finite too, in the gradients' own type
            most = min(torch.finfo(vector.dtype).max for vector in vectors)
            ends = ends * (torch.finfo(ends.dtype).max / most * self.world.size)
        finite = torch.isfinite(ends).all()
        own = to_device([float(flag) for flag in (flags if self.world.size > 1 else flags[:1])], device)
        own[0] = ~finite if bad is None else ~finite | (bad.to(device) != 0).any()
        count = len(own)
        if self._may_part:
            own = torch.cat([own, ends, -ends])
        self.world.max([own], "scalars")
        told = list[Tensor]()
        for numbers in (own[:count], own[count:], square, norms):
            readings.ask(numbers, told.append)
        readings.read()
        return GradientReading(*told)

    @property
    def _may_part(self) -> bool:
        """Whether gradients are averaged as far as is known: every step then looks whether all ranks have the same."""
        guessed = self.mode == "averaged" and self.world.gradients == "auto" and not self.sharded
        return guessed and self.world.size > 1 and not self.reduced and self.active == self.world.size

    def give_up(self) -> None:
        """Forget the gradients of this step."""
        self.reduced = False
        if self.overlap is not None:
            self.overlap.drop()

    def _are_local(self, gradients: Sequence[Tensor]) -> bool:
        """Whether ranks still hold their own gradients. Bit-equal ones were averaged before we saw them.

        Gradients that are zero on all ranks say nothing. Ranks that had gradients of their own may happen to have equal
        ones (samples that are alike, few bits): the mean of those is the same, so they count as the ranks' own.
        """
        if self.world.size == 1 or self.world.gradients != "auto" or self.sharded:
            return self.mode == "local"
        marks = _marks(gradients)
        high = torch.cat([marks, torch.tensor([float(len(marks))], dtype=torch.float64)])
        ends = _ends(self.world, high)
        if ends is not None and not bool(ends[:, :-1].any()):
            return self.mode == "local"
        equal = ends is not None and bool((ends[0] == -ends[1]).all())
        if self.mode == "auto":
            self.mode = "averaged" if equal else "local"
        elif not equal:
            self._part()
        return self.mode == "local"

    def _part(self) -> None:
        """Gradients that were the same on all ranks are the ranks' own in this step, and from now on averaged here."""
        self.parted |= self.mode == "averaged"
        self.mode = "local"

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
            self._write(storage.gradients, [sums.get(p) for p in storage.parameters])
        elif local or self.active < self.world.size:
            divisor = float(self.world.size if local else self.active)  # averaged ones are those of the active ranks
            self._sum(storage, present, scale)
        else:
            self._write(storage.gradients, None if self._filled is storage.gradients else _gradients(storage))
            divisor = scale
        found = [vector.flat() if vector.parameters else None for vector in storage.gradients]
        self._filled, self.reduced = None, False
        if divisor != 1:
            for vector in found:
                if vector is not None:
                    vector.div_(divisor)
        self._clip(storage, present, found)
        return found

    def _write(self, vectors: Sequence[StepVector], values: Sequence[Tensor | None] | None) -> None:
        """Fill vectors, parameter by parameter; None: they have been filled by `agree`."""
        if values is not None:
            for vector in vectors:
                vector.fill(values, not any(value is None for value in values))

    def _sum(self, storage: Storage, present: Sequence[bool], scale: float) -> None:
        """Add up every layer's gradients of all ranks at its owner."""
        self._write(storage.outgoing, None if self._filled is storage.outgoing else _gradients(storage))
        parcels, targets = [], list[tuple[int, int, int]]()
        for k, layout in enumerate(storage.layouts):
            vector = storage.outgoing[k].flat()
            for row in adjacent(layout.order, [c for c in layout.order if present[c]]):
                for owner, some in groupby(row, key=lambda c: storage.cells[c].owner):
                    own = list(some)
                    start = layout.start[own[0]]
                    stop = layout.start[own[-1]] + storage.cells[own[-1]].layer.shape.numel
                    part = vector[start:stop]
                    parcels.append(OwnedTensor(part if scale == 1 else part / scale, owner))
                    targets.append((k, start, stop))
        received = self.world.reduce(parcels, "gradients")
        for (k, start, stop), value in zip(targets, received):
            own = storage.gradients[k]
            if value is not None and own.numel:
                own.flat()[start - own.begin : stop - own.begin].copy_(value)

    def squares(
        self,
        mine: Sequence[Tensor],
        device: torch.device,
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
        own, size = square(mine, device), self.world.size
        if self.clipped is not None:
            own = own / self.clipped.square()
        if self.local:
            sums = torch.stack([torch.full_like(own, self.square / size), own / (1 if self.world.owners else size)])
            self.world.sum([sums], "scalars")
            readings.ask(sums, lambda told: hear(Squares(float(told[0]) / size**2, float(told[1]), 1 / size)))
        elif half is not None:
            part, share = half[0], half[1] / samples
            readings.ask(own, lambda told: hear(Squares(part, float(told), share)))

    def _clip(self, storage: Storage, present: Sequence[bool], vectors: Sequence[Tensor | None]) -> None:
        if self.max_norm is None:
            return
        total = square(storage.present(vectors, present), storage.device)
        self.parts.sum_over_parts([total], "scalars")
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


def _gradients(storage: Storage) -> list[Tensor | None]:
    """The gradients that there are of all parameters."""
    return [grad_of(p) for p in storage.parameters]


def _gradient(parameter: nn.Parameter) -> Tensor:
    gradient = grad_of(parameter)
    return torch.zeros_like(parameter) if gradient is None else gradient
