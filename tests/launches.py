"""What a CUDA graph does, on the host: launches are recorded with the memory and numbers that they were made with."""

from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

READS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique")
MADE = ("lift_fresh",)
"""Of tensors made of numbers of the host: on a GPU a copy, which a graph would make again from memory long gone."""


class HostRecorder:
    """Records operations and makes them again in the same tensors. As on a GPU, a read of a value is refused.

    Unlike there operations are made once while they are recorded, since on the host their results are looked at by the
    operations themselves. What they have written in place is put back.
    """

    def __init__(self):
        self.operations = 0

    @contextmanager
    def record(self):
        recorded = Recorded()
        with recorded:
            yield recorded.replay
        recorded.put_back()
        self.operations += len(recorded.calls)


class Recorded(TorchDispatchMode):
    """The operations of one piece."""

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if name in (*READS, *MADE):
            raise RuntimeError(f"{name} while launches are recorded")
        self._remember(function, args, kwargs)
        out = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, out))
        return out

    def _remember(self, function, args, kwargs):
        """Keep the value of what will be written to, as it is before the first time."""
        given = [*args, *(kwargs[a.name] for a in function._schema.arguments[len(args) :] if a.name in kwargs)]
        for value, said in zip(given, function._schema.arguments):
            if said.alias_info is not None and said.alias_info.is_write:
                for tensor in tree_flatten(value)[0]:
                    if isinstance(tensor, Tensor):
                        storage = tensor.untyped_storage()
                        self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))

    def put_back(self):
        for storage, value in self.before.values():
            storage.copy_(value)

    def replay(self):
        with torch.no_grad():
            for function, args, kwargs, out in self.calls:
                again = function(*args, **kwargs)
                for kept, fresh in zip(tree_flatten(out)[0], tree_flatten(again)[0]):
                    if isinstance(kept, Tensor) and kept.data_ptr() != fresh.data_ptr():
                        kept.copy_(fresh)
