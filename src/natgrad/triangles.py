"""Symmetric matrices in little more than half of the numbers of their squares.

A matrix [b, n, n] becomes [b, numel] by one of two forms. Each is a few rectangles of the lower triangle, so that
squares are packed and unpacked by strided copies, without an index:

    halves   the squares of n/2, n/4, n/8, ... rows below the diagonal, then small blocks on it: what is kept to be
             averaged, compared and inverted. 3,072 rows take 50.4 % of their square.
    slabs    rows from the first column to the diagonal's block, a few hundred at a time: what gradients are multiplied
             by as it is. 3,072 rows take 56.3 % of their square.

A product with slabs has the arithmetic of one with the square. It is 2 p - 1 products instead of one for p slabs, and
so only large matrices have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

LEAST = 128
"""Matrices of fewer rows stay squares: they are most of the operations and few of the bytes."""
BLOCK = 24
"""The blocks on the diagonal, which halves keep whole, have from so many rows to twice as many."""
SLABBED = 768
"""Matrices of fewer rows are multiplied by as squares."""
ROWS, MOST = 192, 8
"""The least rows of a slab, and the most slabs of a matrix."""


class Piece(NamedTuple):
    """`many` rectangles [rows, columns] of a square, the first at (row, column), the others `step` further each.

    `left`: how many of the columns lie left of the blocks on the diagonal. Their mirror image is not kept.
    """

    many: int
    rows: int
    columns: int
    row: int
    column: int
    step: int
    left: int

    @property
    def numel(self) -> int:
        return self.many * self.rows * self.columns


class PackedForm:
    """How symmetric [b, n, n] lie in [b, numel]: piece by piece, those below the diagonal first."""

    def __init__(self, n: int, pieces: Sequence[Piece]):
        self.n = n
        self.pieces = [piece for piece in pieces if piece.numel]
        self.starts = [0, *accumulate(piece.numel for piece in self.pieces)]
        self.numel = self.starts[-1]
        self.below = sum(piece.numel for piece in self.pieces if piece.left == piece.columns)
        """How many numbers, the first ones, belong to pieces that lie below the diagonal as a whole."""

    def parts(self, packed: Tensor) -> list[Tensor]:
        """The pieces [b, many, rows, columns] of packed matrices, which share their memory."""
        b, stride, begin = len(packed), packed.stride(0), packed.storage_offset()
        return [
            packed.as_strided((b, *piece[:3]), (stride, piece.rows * piece.columns, piece.columns, 1), begin + start)
            for piece, start in zip(self.pieces, self.starts)
        ]

    def places(self, square: Tensor) -> list[Tensor]:
        """Where the pieces are in squares of any strides; views of the same shapes as those of `parts`."""
        (stride, down, right), begin = square.stride(), square.storage_offset()
        return [
            square.as_strided(
                (len(square), *piece[:3]),
                (stride, piece.step * (down + right), down, right),
                begin + piece.row * down + piece.column * right,
            )
            for piece in self.pieces
        ]

    def pack(self, square: Tensor) -> Tensor:
        """The lower triangles of [b, n, n] as [b, numel]."""
        packed = square.new_empty(len(square), self.numel)
        torch._foreach_copy_(self.parts(packed), self.places(square))
        return packed

    def unpack(self, packed: Tensor) -> Tensor:
        """The squares [b, n, n] of packed matrices."""
        square, parts = packed.new_empty(len(packed), self.n, self.n), self.parts(packed)
        places, mirrored = self.places(square), self.places(square.mT)
        left = [(image, part, piece.left) for image, part, piece in zip(mirrored, parts, self.pieces) if piece.left]
        places += [image[..., :columns] for image, _, columns in left]
        torch._foreach_copy_(places, parts + [part[..., :columns] for _, part, columns in left])
        return square

    def by_weight(self, packed: Tensor) -> list[Tensor]:
        """Of halves, the numbers that stand in a square twice and those that stand there once: for sums of squares."""
        return [packed[:, : self.below], packed[:, self.below :]]

    def mean_eigenvalue(self, packed: Tensor) -> Tensor:
        """The trace over the dimension [b]."""
        sums = [
            part[..., piece.left :].diagonal(dim1=-2, dim2=-1).sum((1, 2))
            for part, piece in zip(self.parts(packed), self.pieces)
            if piece.left < piece.columns
        ]
        return (sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)) / self.n


def halves(n: int) -> PackedForm | None:
    """The form in which a matrix is kept that is not multiplied by; None: as a square."""
    if n < LEAST:
        return None
    levels = max(1, (n // BLOCK).bit_length() - 1)
    block = n >> levels
    even = block << levels
    rest = n - even  # the last rows
    below = [Piece(1 << k, half := even >> (k + 1), half, half, 0, 2 * half, half) for k in range(levels)]
    below.append(Piece(1, rest, even, even, 0, 0, even))
    return PackedForm(
        n, [*below, Piece(1 << levels, block, block, 0, 0, block, 0), Piece(1, rest, rest, even, even, 0, 0)]
    )


def slabs(n: int) -> PackedForm | None:
    """The form in which a matrix is kept that gradients are multiplied by; None: as a square."""
    count = min(MOST, n // ROWS)
    if n < SLABBED or count < 2:
        return None
    ends = [n * (k + 1) // count for k in range(count)]
    return PackedForm(n, [Piece(1, end - begin, end, begin, 0, 0, begin) for begin, end in zip([0, *ends], ends)])


class SymmetricSlabs:
    """Symmetric matrices [b, n, n] kept as slabs: what has `@` with tensors from both sides, and nothing else."""

    def __init__(self, form: PackedForm, packed: Tensor):
        self.shape = torch.Size((len(packed), form.n, form.n))
        self.slabs = [
            (piece.row, piece.row + piece.rows, part.squeeze(1)) for piece, part in zip(form.pieces, form.parts(packed))
        ]

    def dim(self) -> int:
        return 3

    def __len__(self) -> int:
        return self.shape[0]

    def __matmul__(self, x: Tensor) -> Tensor:
        """The product with [b, n, m]."""
        y = x.new_empty(x.shape)
        for begin, end, slab in self.slabs:
            y[:, begin:end].baddbmm_(slab, x[:, :end], beta=0)
        for begin, end, slab in self.slabs[1:]:
            y[:, :begin].baddbmm_(slab[..., :begin].mT, x[:, begin:end])
        return y

    def __rmatmul__(self, x: Tensor) -> Tensor:
        """The product of [b, m, n] with them."""
        y = x.new_empty(x.shape)
        for begin, end, slab in self.slabs:
            y[..., begin:end].baddbmm_(x[..., :end], slab.mT, beta=0)
        for begin, end, slab in self.slabs[1:]:
            y[..., :begin].baddbmm_(x[..., begin:end], slab[..., :begin])
        return y


def times(one: Tensor | SymmetricSlabs, other: Tensor | SymmetricSlabs) -> Tensor:
    """The products [b, n, k] of [b, n, m] and [b, m, k], at least one of which is a tensor."""
    if isinstance(other, SymmetricSlabs):
        assert isinstance(one, Tensor)
        return one @ other
    return torch.bmm(one, other) if isinstance(one, Tensor) else one @ other
