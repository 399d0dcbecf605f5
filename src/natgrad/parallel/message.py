"""What a world says of a message that it sends: the collective, of what, and the bytes of each rank."""

from __future__ import annotations

from typing import NamedTuple


class Message(NamedTuple):
    """One collective.

    how: "all_reduce", "reduce_scatter", "all_gather", "all_to_all" or "exchange".
    kind: of what: "gradients", "statistics", "inverses", "weights", "directions", "scalars".
    chunks: bytes of payload: what each rank owns of a reduction to owners or a gathering from them, what each rank
        receives in an exchange or from all to all; one number of an all-reduce, of which all ranks have the whole.
    """

    how: str
    kind: str
    chunks: tuple[int, ...]

    @property
    def payload(self) -> int:
        """Bytes in all."""
        return sum(self.chunks)
