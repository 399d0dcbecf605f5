"""Models that FSDP has cut over ranks that are not there: what it sends in a pass, and what every rank holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from natgrad.hooks import logits_of
from natgrad.parallel import Listener, Message, Sharding, is_sharded, local_of, mesh_of, pretended, shard


class PassMessages(NamedTuple):
    """What FSDP sends in a forward and in a backward pass, in order."""

    forward: list[Message]
    backward: list[Message]


NOTHING = PassMessages([], [])


def pass_messages(
    build: Callable[[], nn.Module], inputs: Callable[[], Tensor], ranks: int, replicas: int
) -> PassMessages:
    """What FSDP sends while a model passes forward and backward once: FSDP itself, on tensors without numbers.

    build, inputs: make the model, and what it is given.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with pretended(ranks):
        mesh = mesh_of(ranks, "cpu", replicas)
        with FakeTensorMode():
            model, given = shard(build().train(), mesh), inputs()
            with Listener() as forward:
                output = logits_of(model(given))
            if output is None:
                raise ValueError("the model returns no tensor that needs a gradient")
            with Listener() as backward:
                output.backward(torch.empty_like(output))
    return PassMessages(forward.heard, backward.heard)


def shard_on_meta(model: nn.Module, ranks: int, replicas: int) -> nn.Module:
    """Cut a model on the meta device within `pretended`. FSDP does nothing in its passes, since it cannot gather what
    has no numbers: `gathered` stands in for it.
    """
    tables = ("_forward_pre_hooks", "_forward_hooks")
    before = [(hooks, set(hooks)) for module in model.modules() for hooks in (getattr(module, name) for name in tables)]
    shard(model, mesh_of(ranks, "cpu", replicas))
    for hooks, own in before:
        for key in [key for key in hooks if key not in own]:
            del hooks[key]
    return model


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, whole parameters stand in the modules of a cut model, as FSDP puts them there for a pass. Afterwards the
    parts are back, with gradients where the whole ones have some. Whole models are left as they are.
    """
    standing: dict[nn.Parameter, nn.Parameter] = {}
    slots = [(module, key, p) for module in model.modules() for key, p in module._parameters.items() if is_sharded(p)]
    for module, key, part in slots:
        assert part is not None
        if part not in standing:
            whole = torch.empty(part.shape, dtype=part.dtype, device=part.device)
            standing[part] = nn.Parameter(whole, part.requires_grad)
        module._parameters[key] = standing[part]
    try:
        yield
    finally:
        for module, key, part in slots:
            module._parameters[key] = part
        for part, whole in standing.items():
            if whole.grad is not None:
                part.grad = torch.empty_like(part)
                for hook in (getattr(part, "_post_accumulate_grad_hooks", None) or {}).values():
                    hook(part)


def held(tensors: Sequence[Tensor], sharding: Sharding | None, rank: int) -> int:
    """Bytes that a rank holds of these tensors, some of which may be cut over ranks."""
    return sum(numel_at(tensor, sharding, rank) * tensor.element_size() for tensor in tensors)


def numel_at(tensor: Tensor, sharding: Sharding | None, rank: int) -> int:
    """Numbers that a rank holds of a tensor."""
    if sharding is None or not is_sharded(tensor):
        return tensor.numel()
    rows = tensor.shape[dim := tensor.placements[-1].dim]  # type: ignore[attr-defined]
    start, stop = sharding.bounds(rows)[sharding.place_of[rank][1]]
    return local_of(tensor).numel() // max(1, local_of(tensor).shape[dim]) * (stop - start)
