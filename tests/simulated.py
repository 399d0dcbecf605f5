"""A GPU that is not there: tensors that say they are on `cuda:0` and hold their values on the CPU.

Code that mixes devices fails as it would on a GPU, and every place where the host would wait for the device is counted.
What a tensor says of its device is said to Python only: torch itself takes the tensor for one on the CPU, so autograd
works, and autocast does not.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("cuda", 0)
READS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim"}
"""Operations whose result, or its size, the host has to know."""
CHECKED = {"linalg_eigh", "_linalg_eigh", "linalg_cholesky", "linalg_solve", "linalg_inv"}
"""Operations that look themselves whether they worked."""
COPIES = {"copy_", "_to_copy", "_foreach_copy_"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
"""Operations that take places from another device, and wait for them to come."""


class Simulated(Tensor):
    """A tensor on the simulated device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner, requires_grad=False):
        own = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=inner.device,
            requires_grad=requires_grad,
        )
        own.inner = inner
        return own

    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def __deepcopy__(self, memo):
        fresh = Simulated(self.inner.detach().clone(), self.requires_grad)
        memo[id(self)] = fresh = torch.nn.Parameter(fresh, self.requires_grad) if is_parameter(self) else fresh
        return fresh

    def __repr__(self, *, tensor_contents=None):
        return f"Simulated({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} on a simulated device that is no longer there")


def is_parameter(tensor):
    return isinstance(tensor, torch.nn.Parameter)


class Generator(torch.Generator):
    """A generator that says it is on the simulated device."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")

    def __init__(self, device="cpu"):
        self.place = torch.device(device)

    device = property(lambda self: self.place)  # type: ignore[assignment]


class Operations(TorchDispatchMode):
    """Runs operations on the values, and counts where the host would wait."""

    def __init__(self):
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = function.overloadpacket.__name__
        flat = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        there = [x for x in flat if isinstance(x, Simulated)]
        asked = kwargs.get("device")
        if asked is not None and torch.device(asked).type == "cuda":
            kwargs["device"] = torch.device("cpu")
        elsewhere = [x for x in flat if not isinstance(x, Simulated) and x.device.type != "meta"]
        self.look(function, name, args, kwargs, there, elsewhere, asked)
        plain_args, plain_kwargs = tree_map(unwrapped, (args, kwargs))
        out = function(*plain_args, **plain_kwargs)
        if name == "copy_" and not isinstance(args[0], Simulated):
            return args[0]
        leaves = torch.device(asked).type == "cuda" if asked is not None else bool(there)
        if not leaves:
            return out
        out = tree_map(wrapped, out)
        return return_and_correct_aliasing(function, args, kwargs, out) if there else out

    def look(self, function, name, args, kwargs, there, elsewhere, asked):
        """Count a wait, or refuse what no GPU does."""
        if name in COPIES:
            across = bool(there) and bool(elsewhere)
            if name == "_to_copy" and asked is not None:
                across = (torch.device(asked).type == "cuda") != bool(there)
            self.waits[f"{name} between devices"] += across and not kwargs.get("non_blocking", False)
        elif there:
            others = [x for x in elsewhere if x.dim()]
            if others and name not in INDEXING:
                raise RuntimeError(f"{function}: tensors on cuda:0 and on the CPU {[tuple(x.shape) for x in others]}")
            unsized = name == "repeat_interleave" and kwargs.get("output_size") is None and len(args) < 3
            masks = name in INDEXING and any(
                x is not None and x.dtype in (torch.bool, torch.uint8) for x in tree_flatten(args[1])[0]
            )
            self.waits[name] += name in READS | CHECKED or unsized or masks or (bool(others) and name in INDEXING)


class Calls(TorchFunctionMode):
    """Calls that torch would not hand on, because it takes a simulated tensor for one on the CPU."""

    def __init__(self, operations):
        super().__init__()
        self.operations = operations

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in ("cpu", "tolist", "numpy") and isinstance(args[0], Simulated):
            self.operations.waits[name] += 1
            value = args[0].inner.detach()
            return value.clone() if name == "cpu" else getattr(value, name)()
        if name == "one_hot" and isinstance(args[0], Simulated):  # it makes a tensor where torch takes `x` to be
            return Simulated(function(args[0].inner, *args[1:], **kwargs))
        if name == "pin_memory":
            return args[0]
        if name in ("untyped_storage", "data_ptr") and isinstance(args[0], Simulated):
            return getattr(args[0].inner, name)()
        if name in ("to", "type_as") and isinstance(args[0], Tensor):
            other = next((x for x in (*args[1:], *kwargs.values()) if isinstance(x, Tensor)), None)
            if other is not None:
                rest = {k: v for k, v in kwargs.items() if not isinstance(v, Tensor)}
                return moved(args[0], other.device, other.dtype, **rest)
            if name == "to":
                device, dtype, blocking, layout = torch._C._nn._parse_to(*args[1:], **without(kwargs, "copy"))
                rest = {"copy": kwargs.get("copy", False), "memory_format": layout, "non_blocking": blocking}
                return moved(args[0], device or args[0].device, dtype or args[0].dtype, **rest)
        if name == "cuda":
            return moved(args[0], DEVICE, args[0].dtype)
        if name in ("tensor", "as_tensor", "new_tensor") and on_gpu(kwargs.get("device")):
            return moved(function(*args, **without(kwargs, "device")), DEVICE, None)
        if on_gpu(kwargs.get("device")):  # a factory: nothing is copied
            return tree_map(wrapped, function(*args, **{**kwargs, "device": torch.device("cpu")}))
        if name == "new_tensor" and isinstance(args[0], Simulated):
            return moved(torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}), DEVICE, None)
        return function(*args, **kwargs)


def without(values, *names):
    return {k: v for k, v in values.items() if k not in names}


def on_gpu(device):
    return device is not None and torch.device(device).type == "cuda"


def moved(tensor, device, dtype, copy=False, memory_format=None, non_blocking=False):
    """What `Tensor.to` gives."""
    same = tensor.device == torch.device(device) and dtype in (None, tensor.dtype)
    layout = memory_format or torch.preserve_format
    kept = layout in (torch.preserve_format,) or tensor.is_contiguous(memory_format=layout)
    if same and kept and not copy:
        return tensor
    return torch.ops.aten._to_copy(
        tensor, device=torch.device(device), dtype=dtype, memory_format=layout, non_blocking=non_blocking
    )


def unwrapped(x):
    return x.inner if isinstance(x, Simulated) else x


def wrapped(x):
    return Simulated(x) if isinstance(x, Tensor) and not isinstance(x, Simulated) else x


@contextmanager
def simulated_gpu():
    """Within, `cuda:0` is there. Gives the waits by their reason, as they add up."""
    operations, generator, backward = Operations(), torch.Generator, torch.autograd._engine_run_backward
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()

    def with_calls(*args, **kwargs):  # a mode is off while it handles a call, and hooks are called within this one
        with Calls(operations):
            return backward(*args, **kwargs)

    torch.Generator = Generator  # type: ignore[misc]
    torch.autograd._engine_run_backward = with_calls
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a Parameter cannot become a simulated one
    try:
        with operations, Calls(operations):
            yield operations.waits
    finally:
        torch.Generator = generator  # type: ignore[misc]
        torch.autograd._engine_run_backward = backward
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
