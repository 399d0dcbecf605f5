"""Which samples are in which batch, on which rank: a pure function of the seed, the epoch and the rank.

Every epoch is a new permutation of all samples, cut into batches; each batch is cut into one share a rank, as
equal as possible. So all ranks together see each sample once an epoch, and nothing needs to be sent to agree
on that.

The last batch: `drop_last` says whether a batch that is not full is left out. Even if not, it is left out
where it has less than one sample a rank, since a rank without samples has no gradient.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One rank's share of one batch."""

    index: Tensor
    """Places in the data set, [n]."""
    total: int
    """Samples in the whole batch, over all ranks."""
    epoch: int


@dataclass(frozen=True)
class Sampler:
    """Batches of `batch` samples out of `size`, as one of `ranks` sees them."""

    size: int
    batch: int
    seed: int = 0
    rank: int = 0
    ranks: int = 1
    drop_last: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.batch <= self.size:
            raise ValueError(f"batch={self.batch} must be between 1 and the {self.size} training samples")
        if self.batch < self.ranks:
            raise ValueError(f"batch={self.batch} leaves some of {self.ranks} ranks without a sample; raise the batch")

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        full, rest = divmod(self.size, self.batch)
        return full if self.drop_last or rest < self.ranks else full + 1

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield this rank's shares of an epoch's batches."""
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
        for whole in order.split(self.batch)[: len(self)]:
            yield Batch(whole.tensor_split(self.ranks)[self.rank], len(whole), epoch)

    def stream(self) -> Iterator[Batch]:
        """Yield the batches of one epoch after the other, without end."""
        epoch = 0
        while True:
            yield from self.epoch(epoch)
            epoch += 1
