"""A device and ranks that are not there: what a step on meta tensors reads from them, and how many operations it takes.

Meta tensors have shapes and no numbers. `Device` answers where the host reads one, and counts the operations that the
host would launch. `SimulatedTransport` is one rank of many; the others answer like it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from natgrad.parallel.transport import Pending, Transport
from natgrad.refresh import NextInterval

READ = 0.75
"""What the host reads of a number of a device: finite, above zero, and no whole number."""
READS = ("_local_scalar_dense", "equal")
NOTHING = ("detach", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "promote_types")
"""Operations for which nothing is launched."""
META = torch.device("meta")
MEASURED = NextInterval(1).packed()
"""What a rank tells of a measurement: to be measured again in the next step, as it has changed."""
FEW = 2**14
"""Numbers of a tensor that may be known."""


class Device(TorchDispatchMode):
    """Inside, meta tensors are those of a device.

    `operations` counts what the host has launched so far, `reads` how often it has waited for numbers of the device.

    Numbers that the host has sent there are known, and so is what is made of known numbers alone; of all others the
    host reads READ, counts of 1 and conditions that are true. What a read decides is then what happens in training in
    nearly all steps: gradients are finite, factors are positive definite, statistics have changed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.reads = 0
        self._counts = True
        self._known: Any = WeakTensorKeyDictionary()  # few numbers, as tensors of the host

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Inside, operations do not count."""
        before, self._counts = self._counts, False
        try:
            yield
        finally:
            self._counts = before

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if self._counts and name not in NOTHING and not is_view(function):
            self.operations += 1
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if not any(value.is_meta for value in tensors):
            found = function(*args, **kwargs)
            if name == "_to_copy" and isinstance(found, Tensor) and found.is_meta and found.numel() <= FEW:
                self._known[found] = args[0].to(found.dtype, copy=True)
            return found
        copied = name == "copy_" and not args[0].is_meta
        away = name == "_to_copy" and torch.device(kwargs.get("device") or META).type != "meta"
        self.reads += name in READS or copied or away
        if name in READS:
            return False if name == "equal" else self._value(args[0]).item()
        if away:
            return self._value(args[0]).to(kwargs.get("dtype") or args[0].dtype, copy=True)
        if copied:
            return args[0].copy_(self._value(args[1]))
        found = self._run(function, name, args, kwargs, tensors)
        self._learn(function, name, args, kwargs, tensors, found)
        return found

    def _run(self, function: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """What an operation gives on the device."""
        if name == "_unique2":  # as if all were different
            flat = args[0].flatten()
            return flat, torch.empty(args[0].shape, dtype=torch.long, device=META), flat.new_empty(0)
        if name == "bincount":  # of whole numbers below a length that the caller knows
            return torch.empty(args[2] if len(args) > 2 else kwargs["minlength"], dtype=torch.long, device=META)
        if name == "index":
            args = (args[0], [all_of(index) for index in args[1]], *args[2:])
        elif name not in ("copy_", "_to_copy") and not all(value.is_meta for value in tensors):
            args, kwargs = tree_map(on_device, (args, kwargs))
        return function(*args, **kwargs)

    def _value(self, tensor: Tensor) -> Tensor:
        """What the host reads of a tensor."""
        known = self._known.get(tensor)
        return torch.full(tensor.shape, answer(tensor.dtype), dtype=tensor.dtype) if known is None else known

    def _learn(self, function: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor], found: Any) -> None:
        """Keep what is known after an operation."""
        here = [value for value in tensors if value.is_meta]
        if here[0].numel() <= FEW and is_finiteness(name, args):
            self._known[found] = torch.ones(found.shape, dtype=torch.bool)
            return
        known = [value in self._known for value in here]
        if not any(known):
            return
        small = all(value.numel() <= FEW for value in here)
        if small and (all(known) or name in ("cat", "stack", "copy_", "_foreach_copy_")):
            given = tree_map(self._on_host, (args, kwargs))
            made = function(*given[0], **given[1])  # views of what is known, and changes in place, act on it too
            for mine, value in zip(tree_leaves(found), tree_leaves(made)):
                if isinstance(mine, Tensor) and mine.is_meta and mine.numel() <= FEW and mine not in self._known:
                    self._known[mine] = value
        elif function._schema.is_mutable:
            for target in tree_leaves(args[0]):
                if isinstance(target, Tensor) and target in self._known:
                    self._known[target].fill_(answer(target.dtype))

    def _on_host(self, value: Any) -> Any:
        """The known tensor, and the host, in place of the device's."""
        if isinstance(value, Tensor) and value.is_meta:
            return self._value(value)
        return torch.device("cpu") if isinstance(value, torch.device) else value


@cache
def is_view(function: Any) -> bool:
    """Whether an operation only looks at memory that is there: nothing is launched for it."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)


def is_finiteness(name: str, args: Any) -> bool:
    """Whether an operation is one of the two of torch.isfinite: x == x and |x| != infinity."""
    return (name == "eq" and args[0] is args[1]) or (
        name == "ne" and isinstance(args[1], float) and args[1] == math.inf
    )


def on_device(value: Any) -> Any:
    """A tensor of the host that meets tensors of the device; numbers without dimensions may stay."""
    if isinstance(value, Tensor) and value.dim() and not value.is_meta:
        return torch.empty(value.shape, dtype=value.dtype, device=META)
    return value


def all_of(index: Tensor | None) -> Tensor | None:
    """An index by conditions, all of which hold."""
    if index is None or index.dtype != torch.bool:
        return index if index is None else on_device(index)
    return torch.empty(index.numel(), dtype=torch.long, device=META)


def answer(dtype: torch.dtype) -> Any:
    """What the host reads of a number of this type."""
    return True if dtype == torch.bool else READ if dtype.is_floating_point else 1


class SimulatedTransport:
    """One rank of `size`. The others did what this one did, with numbers of their own.

    Sums are `size` times this rank's. Of maxima, integers (what holders tell of measurements) that are 0 here are those
    of a measurement, as the others have measured what this rank has not. Whole numbers in floating point (flags,
    counts) are this rank's. Other numbers are larger elsewhere, so that gradients differ from rank to rank, as those of
    unlike samples do.
    """

    def __init__(self, size: int, rank: int = 0):
        self.size, self.rank = size, rank
        self.rows: Callable[[], list[list[int]]] | None = None
        """How many rows of each layer every rank has measured, where statistics are rows."""

    def all_reduce(self, buffer: Tensor, op: str = "sum") -> Tensor:
        if op == "max" and not buffer.is_floating_point():
            return torch.where(buffer == 0, MEASURED, buffer)
        if op == "max":
            return torch.where(buffer == buffer.round(), buffer, buffer + 1 / 8)
        if self.rows is not None and not buffer.is_floating_point():
            return torch.tensor(self.rows(), dtype=buffer.dtype).flatten()
        return buffer.mul_(self.size)

    def reduce_scatter(self, chunks: Sequence[Tensor]) -> Pending:
        return lambda: chunks[self.rank]

    def all_gather(self, chunk: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        nothing = chunk.new_empty(0)
        others = (chunk.new_empty(n) if n else nothing for n in lengths)
        return [chunk if rank == self.rank else other for rank, other in enumerate(others)]

    def split(self, per_host: int) -> tuple[Transport, Transport]:
        host, place = divmod(self.rank, per_host)
        return SimulatedTransport(per_host, place), SimulatedTransport(self.size // per_host, host)

    def exchange(self, out: Mapping[int, Tensor], into: Mapping[int, Tensor]) -> None:
        return None

    def all_to_all(self, buffer: Tensor, out: Sequence[int], into: Sequence[int]) -> Tensor:
        return buffer.new_empty(sum(into))
