"""Which samples are in which batch, on which rank: a pure function of the seed, the epoch and the rank.

Every epoch is a new permutation of all samples, cut into batches; each batch is cut into one share a rank, as
equal as possible. So all ranks together see each sample once an epoch, and nothing needs to be sent to agree
on that. The size of a batch may change from epoch to epoch, never within one.

The last batch: `drop_last` says whether a batch that is not full is left out. Even if not, it is left out
where it has less than one sample a rank, since a rank without samples has no gradient.

A run is at one number, its batches so far. From it follow the epoch and the place in it, so a run goes on in the
middle of an epoch without passing through what came before.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, count

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One rank's share of one batch."""

    index: Tensor
    """Places in the data set, [n]."""
    total: int
    """Samples in the whole batch, over all ranks."""
    most: int
    """Samples in the largest share of any rank."""
    epoch: int
    position: int
    """Batches of the same epoch before this one."""


def alike(share: Tensor, size: int, most: int) -> tuple[Tensor, ...]:
    """Cut a rank's share into parts of at most `size`, on every rank into equally many, since ranks may wait for each
    other in every pass. Shares differ by one, so the last part may be empty where `size` is 1.

    most: the largest share of any rank.
    """
    parts = list(share.split(size))
    if len(parts) < -(-most // size):
        parts += parts.pop().tensor_split(2)
    return tuple(parts)


@dataclass(frozen=True)
class Sampler:
    """Batches of `batch` samples out of `size`, as one of `ranks` sees them."""

    size: int
    batch: int | tuple[int, ...]
    """Samples in a batch, over all ranks; several: in the first epoch, the second, ..., the last in all that follow."""
    seed: int = 0
    rank: int = 0
    ranks: int = 1
    drop_last: bool = False

    def __post_init__(self) -> None:
        if not self.batches:
            raise ValueError("batch=() names no size of a batch; give one, or one for each epoch")
        for batch in self.batches:
            if not 1 <= batch <= self.size:
                raise ValueError(f"batch={batch} must be between 1 and the {self.size} training samples")
            if batch < self.ranks:
                raise ValueError(f"batch={batch} leaves some of {self.ranks} ranks without a sample; raise the batch")

    @property
    def batches(self) -> tuple[int, ...]:
        """The size of a batch in each epoch; the last stands for all epochs that follow."""
        return self.batch if isinstance(self.batch, tuple) else (self.batch,)

    def batch_in(self, epoch: int) -> int:
        """Return the size of a batch in an epoch."""
        return self.batches[min(epoch, len(self.batches) - 1)]

    def length(self, epoch: int) -> int:
        """Return the number of batches in an epoch."""
        full, rest = divmod(self.size, self.batch_in(epoch))
        return full if self.drop_last or rest < self.ranks else full + 1

    def total_steps(self, epochs: float) -> int:
        """Return the number of batches in so many epochs, the last of which may be a part of one."""
        if len(self.batches) == 1:
            return round(epochs * self.length(0))
        whole = int(epochs)
        return self._begin(whole) + round((epochs - whole) * self.length(whole))

    def epochs_at(self, step: int) -> float:
        """Return how many epochs the first so many batches are."""
        if len(self.batches) == 1:
            return step / self.length(0)
        epoch, position = self.locate(step)
        return epoch + position / self.length(epoch)

    def locate(self, step: int) -> tuple[int, int]:
        """Return the epoch in which the batch that follows on so many is, and that batch's place in it."""
        begins = self._begins
        epoch = bisect_right(begins, step) - 1
        if epoch < len(begins) - 1:
            return epoch, step - begins[epoch]
        more, position = divmod(step - begins[-1], self.length(epoch))
        return epoch + more, position

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield this rank's shares of an epoch's batches, from one on."""
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
        wholes = order.split(self.batch_in(epoch))
        for position in range(start, self.length(epoch)):
            whole = wholes[position]
            share = whole.tensor_split(self.ranks)[self.rank]
            yield Batch(share, len(whole), -(-len(whole) // self.ranks), epoch, position)

    def stream(self, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch after the other, without end, leaving out the first so many."""
        if start < 0:
            raise ValueError(f"start={start} must not be negative: it counts the batches that are done")
        first, position = self.locate(start)
        for epoch in count(first):
            yield from self.epoch(epoch, position if epoch == first else 0)

    @cached_property
    def _begins(self) -> list[int]:
        """Batches before each epoch, until batches have their last size."""
        return list(accumulate((self.length(epoch) for epoch in range(len(self.batches) - 1)), initial=0))

    def _begin(self, epoch: int) -> int:
        known = min(epoch, len(self._begins) - 1)
        return self._begins[known] + (epoch - known) * self.length(known)
