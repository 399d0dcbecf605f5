"""A network's passes without its numbers: run once on the meta device, watched by hooks and operation by operation.

Layers that natgrad knows state their own passes. What runs between them (activations, poolings, sums, attention, the
layers that it does not know) is taken from the operations themselves: arithmetic as torch's own counter has it, and
the bytes of all operands and results, since eager operations read and write memory each on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from natgrad.hooks import logits_of
from natgrad.layers import Layer, UncurvedParameter, find_layers
from natgrad.layers.op_cost import OpCost, Passes

OF_LAYERS = ("convolution_backward", "batch_norm", "layer_norm", "group_norm", "embedding_dense_backward")
"""Operations of a backward pass that layers have stated already."""

CHANNELS = 64.0
"""The size at which convolutions of unknown layers count."""
NOTHING = ("detach", "empty", "empty_like", "new_empty")
"""Operations that touch no memory."""


class Call(NamedTuple):
    """One call of a layer: its name, itself, what it was given, what it gave, its passes."""

    name: str
    layer: Layer
    x: Tensor
    y: Tensor
    passes: Passes
    first: bool
    """Whether nobody wants the gradient of x."""


@dataclass
class Trace:
    """One forward and one backward pass of `samples` samples."""

    samples: int
    calls: list[Call] = field(default_factory=list)
    forward: list[OpCost] = field(default_factory=list)
    """Between layers."""
    backward: list[OpCost] = field(default_factory=list)
    saved: int = 0
    """Bytes that the forward pass leaves for the backward pass."""
    parameters: int = 0
    """Bytes of parameters, and of buffers."""
    counted: float = 0.0
    """Operations of both passes as torch's counter has them."""


class Operation(NamedTuple):
    """One operation: its arithmetic, its bytes, the short side of its matrices, and whether a known layer runs it."""

    name: str
    flops: float
    bytes: float
    size: float
    inside: bool


class Watch(TorchDispatchMode):
    """Takes down every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = 0
        self.taken: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        if not func.is_view and name not in NOTHING:
            count = flop_registry.get(func._overloadpacket)
            flops = float(count(*args, **(kwargs or {}), out_val=out)) if count is not None else 0.0
            tensors = [t for t in (*tree_leaves(args), *tree_leaves(out)) if isinstance(t, Tensor)]
            sides = [side for t in tree_leaves(args) if isinstance(t, Tensor) and t.dim() > 1 for side in t.shape[-2:]]
            short = float(min(sides, default=1)) if flops and "conv" not in name else CHANNELS
            moves = float(sum(size_of(t) for t in tensors))
            self.taken.append(Operation(name, flops, moves, short, self.inside > 0))
        return out

    def take(self) -> list[Operation]:
        """What was taken down since the last time."""
        taken, self.taken = self.taken, []
        return taken


def size_of(tensor: Tensor) -> int:
    """Bytes of a tensor's numbers."""
    return tensor.numel() * tensor.element_size()


def on_meta(build: Callable[[], nn.Module], name: str) -> nn.Module:
    """A network whose weights are never allocated."""
    try:
        with torch.device("meta"):
            model = build()
    except Exception as error:
        raise ValueError(f"{name} cannot be built on meta tensors: {first_line(error)}; {WAY_OUT}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} gave {type(model).__name__} where a model belongs: name a function that returns one")
    return model.to("meta").train()


WAY_OUT = "it must not read numbers out of tensors while it is built or called"


def first_line(error: BaseException) -> str:
    """What went wrong, on one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def trace(model: nn.Module, shape: Sequence[int], samples: int, name: str = "the model", tokens: int = 0) -> Trace:
    """One pass of `samples` inputs of this shape forward and backward. tokens: how many there are, of whole numbers."""
    found = Trace(samples)
    known = {f.layer.module: f for f in find_layers(model) if states(f.layer)}
    watch, stores = Watch(), {}
    handles = [handle for module, f in known.items() for handle in attach(module, f.name, f.layer, watch, found)]
    own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}

    def keep(tensor: Tensor) -> Tensor:
        store = tensor.untyped_storage()
        if store._cdata not in own:
            stores[store._cdata] = (store, size_of(tensor))  # held, so that no other takes its place
        return tensor

    x = torch.zeros(samples, *shape, device="meta", dtype=torch.long if tokens else torch.get_default_dtype())
    try:
        with watch, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = logits_of(model(x))
            forward = watch.take()
            if logits is None:
                raise ValueError("it returns no tensor that needs a gradient")
            logits.backward(torch.empty_like(logits))
            backward = watch.take()
    except Exception as error:
        shown = "x".join(map(str, (samples, *shape)))
        said = f"{name} cannot be traced on meta tensors of {shown}: {first_line(error)}; {WAY_OUT}"
        raise ValueError(said) from error
    finally:
        for handle in handles:
            handle.remove()
    model.zero_grad()
    found.saved = sum(size for _, size in stores.values())
    found.parameters = sum(size_of(t) for t in (*model.parameters(), *model.buffers()))
    found.counted = sum(one.flops for one in (*forward, *backward))
    between(found, forward, backward)
    return found


def states(layer: Layer) -> bool:
    """Whether a layer states the passes of its module: it has curvature, and its module is of a known type."""
    return not isinstance(layer, UncurvedParameter) and not layer.guess


def attach(module: nn.Module, name: str, layer: Layer, watch: Watch, found: Trace) -> list[Any]:
    """Hooks that know when a layer runs, and what it was given."""

    def enter(*_: Any) -> None:
        watch.inside += 1

    def leave(_: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        watch.inside -= 1
        if isinstance(output, Tensor) and output.requires_grad:
            x = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            plain = torch.empty_like(x), torch.empty_like(output)
            with torch.no_grad():
                passes = layer.passes(*plain)
            found.calls.append(Call(name, layer, *plain, passes, not x.requires_grad))

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, with_kwargs=True)]


def between(found: Trace, forward: list[Operation], backward: list[Operation]) -> None:
    """Fill in what runs between layers: what nobody has stated."""
    found.forward += [work_of(one) for one in forward if not one.inside and one.bytes]
    stated = sum(
        work.flops
        for call in found.calls
        for work in ((() if call.first else call.passes.inputs) + call.passes.weights)
    )
    dense = [one for one in backward if one.flops]
    more = sum(one.flops for one in dense) - stated
    for one in backward:
        if one.bytes and not one.flops and not any(part in one.name for part in OF_LAYERS):
            found.backward.append(work_of(one))
    if more > 1e-3 * stated:  # which of these operations are layers' cannot be seen: they count with their mean side
        side = sum(one.size * one.flops for one in dense) / sum(one.flops for one in dense)
        found.backward.append(OpCost("gemm", more, 0.0, side, 2))


def work_of(one: Operation) -> OpCost:
    """An operation as work: products by their arithmetic, all else by its bytes."""
    if one.flops:
        return OpCost("conv" if "conv" in one.name else "gemm", one.flops, one.bytes, one.size)
    return OpCost("elementwise", 0.0, one.bytes)
