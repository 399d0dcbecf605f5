"""Sees the functions of torch that are given a watched weight, while a forward pass is measured.

A weight is known by itself, wherever it is used: in a module of any type, in a function, by a view of it. So a layer is
what is done with its weight, not what its module is called.
"""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from natgrad.functions import (
    CHOICES,
    MINUS,
    PLUS,
    READERS,
    SAME_NUMBERS,
    TIMES,
    ZEROED,
    Found,
    KnownWeight,
    constants,
)
from natgrad.hooks import anchor
from natgrad.layers import Layer
from natgrad.layers.use import Part, contiguous
from natgrad.recurrent import weights_of, written_out
from natgrad.slots import Slot

ATTENTION = F.multi_head_attention_forward


def _opened(function: Any) -> Any:
    """A function of torch.nn.functional whose body runs even where a mode would be asked instead of it."""
    never = dict.fromkeys(("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"))
    names = {**function.__globals__, **{name: lambda *_: False for name in never}}
    opened = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened


ATTENTION_OPENED = _opened(ATTENTION)


class Flat(NamedTuple):
    """Inside of an attention that has time first: rows [time * samples] of its last product."""

    time: int
    samples: int


class Functions(TorchFunctionMode):
    """Shows the functions that a thread calls to everybody who watches in it.

    There is one of it in a thread, however many watch: modes within modes would ask each other at every function.
    """

    def __init__(self) -> None:
        super().__init__()
        self.watching: list[WeightCalls] = []
        self.holders: dict[int, object] = {}  # of those who watch: collected as garbage, nobody would take them out
        self.flat: Flat | None = None

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is ATTENTION:
            return self._attention(args, kwargs)
        if any(one.wants(weight) for weight in weights_of(func, args, kwargs) for one in self.watching):
            with self:
                return written_out(func, args)
        for one in self.watching:
            args, kwargs = one.meet(func, args, kwargs)
        out = func(*args, **kwargs)
        for one in self.watching:
            one.note(func, args, kwargs, out)
        if isinstance(out, Tensor) and out.requires_grad and getattr(func, "__name__", "") != "__get__":
            for one in self.watching:
                one.look(func, args, kwargs, out, self.flat)
        return out

    def _attention(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Attention as torch writes it, whose products are seen; time is first in it."""
        query = args[0] if args else kwargs["query"]
        before, self.flat = self.flat, Flat(*query.shape[:2]) if query.dim() == 3 else None
        try:
            with self:
                return ATTENTION_OPENED(*args, **kwargs)
        finally:
            self.flat = before

    @property
    def there(self) -> bool:
        """Whether it is on this thread's stack of modes."""
        stack = range(torch._C._len_torch_function_stack())
        return any(torch._C._get_function_stack_at(k) is self for k in stack)

    def remove(self) -> None:
        """Leave the stack of modes, from wherever it is in it."""
        above: list[Any] = []
        while torch._C._len_torch_function_stack():
            mode = torch._C._pop_torch_function_stack()
            if mode is self:
                break
            above.append(mode)
        for mode in reversed(above):
            torch._C._push_on_torch_function_stack(mode)


_here = threading.local()


class WeightCalls:
    """Tells `used` of every use of a parameter of `layers`, and `strange` of every layer whose weight is changed.

    used(found, output, flat): a function has given `output`; it returns whether that is a call of the layer.
    stands_for(parameter): the layer's parameter in whose place another one stands in a module.
    measured(layer): whether something is measured of a layer. met(shared, calls, expanded): a tensor that these calls
    gave for all samples alike meets the samples, as a copy for each of them (or for each of their windows).
    fixed: tensors that no sample has a say in, the model's parameters and buffers.
    """

    def __init__(
        self,
        layers: Mapping[int, Layer],
        used: Callable[[Found, Tensor, Flat | None], bool],
        strange: Callable[[int], None],
        stands_for: Callable[[nn.Parameter], Slot | None],
        measured: Callable[[int], bool],
        met: Callable[[Tensor, Sequence[SharedCall], Tensor], None],
        fixed: Iterable[Tensor],
    ):
        self.layers, self.used, self.strange, self.stands_for = layers, used, strange, stands_for
        self.measured, self.met, self.fixed = measured, met, {id(tensor) for tensor in fixed}
        self.own = {id(p): (k, place) for k, layer in layers.items() for place, p in enumerate(layer.parameters)}
        self.begin()

    def enter(self, holder: object) -> None:
        """Watch in this thread, on behalf of `holder`."""
        mode = getattr(_here, "mode", None)
        if mode is None:
            mode = _here.mode = Functions()
        if not mode.there:  # what watched when an interrupt or a backward pass ended does so no more
            mode.watching.clear()
            mode.holders.clear()
            mode.__enter__()
        mode.watching.append(self)
        mode.holders[id(self)] = holder

    def leave(self) -> None:
        """Watch no more, wherever an interrupt has left the mode."""
        mode = getattr(_here, "mode", None)
        if mode is not None and self in mode.watching:
            mode.watching.remove(self)
            mode.holders.pop(id(self), None)
            if not mode.watching:
                mode.remove()

    def begin(self, given: int = 0) -> None:
        """A forward pass of `given` samples begins; 0: of a number that is not known."""
        self.others: dict[int, tuple[Tensor, KnownWeight | None]] = {}
        self.given, self.shares = given, False
        self.constants: dict[int, tuple[weakref.ref[Tensor], tuple[SharedCall, ...]]] = {}

    def wants(self, weight: Tensor) -> bool:
        """Whether something is measured of the layer of a weight."""
        known = self.find(weight)
        return known is not None and self.measured(known.layer)

    def find(self, x: Any) -> KnownWeight | None:
        """The weight, or the part of one, that a tensor is."""
        if not isinstance(x, Tensor):
            return None
        root = x._base if x._is_view() and x._base is not None else x
        if root is not x and any(s == 0 and n > 1 for s, n in zip(x.stride(), x.shape)):
            return None  # copies for all samples, which were told of when they were made
        known = self._root(root)
        if known is None or root is x:
            return known
        if not known.part.full or root.stride() != contiguous(root.shape):
            return None
        part = known.part._replace(
            size=tuple(x.shape), stride=tuple(x.stride()), offset=x.storage_offset() - root.storage_offset()
        )
        return KnownWeight(known.layer, part)

    def _root(self, root: Tensor) -> KnownWeight | None:
        own = self.own.get(id(root))
        if own is not None:
            return self._known(own)
        other = self.others.get(id(root))
        if other is not None and other[0] is root:
            return other[1]
        if isinstance(root, nn.Parameter):  # what a sharded parameter is gathered into stands in its module
            found = self._known(self.stands_for(root))
            self.others[id(root)] = root, found
            return found
        return None

    def _known(self, slot: Slot | None) -> KnownWeight | None:
        """The whole parameter of a slot."""
        if slot is None or slot[0] not in self.layers:
            return None
        index, place = slot
        parameter = self.layers[index].parameters[place]
        return KnownWeight(index, Part(parameter, place, tuple(parameter.shape), contiguous(parameter.shape), 0))

    def look(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor, flat: Flat | None = None
    ) -> None:
        """A function was called."""
        given = [(x, known) for x in _tensors((*args, *kwargs.values())) if (known := self.find(x)) is not None]
        if func in ZEROED and given and self._zeroed(*given[0]):
            return
        if not given or (out._is_view() and self.find(out) is not None and func not in READERS):
            return
        x, known = given[0]
        if func in SAME_NUMBERS:
            if out.numel() == x.numel() and known.part.full and out is not x:
                self.others[id(out)] = out, known._replace(part=_same(known.part, out))
            return
        if known.part.full and out is not x and not kwargs:
            with torch.no_grad():
                factor = constants(func, args, x, out)
            if factor is not None and ((isinstance(factor, float) and factor == 1) or self._chains(known)):
                self.others[id(out)] = out, known._replace(part=_same(_multiplied(known.part, factor), out))
                return
        reader = READERS.get(func)
        read = list(reader(self.find, args, kwargs, out)) if reader is not None else []
        told = {one.layer for one in read if self.used(one, out, flat)}
        if out._is_view() and self.find(out) is not None:
            return  # a view that may be used later
        for _, known in given:
            if known.layer not in told:
                self.strange(known.layer)

    def _chains(self, known: KnownWeight) -> bool:
        return self.layers[known.layer].chains(known.part.place)

    def _zeroed(self, x: Tensor, known: KnownWeight) -> bool:
        """A part of a copy of a weight is set to zero; whether the layer knows what that makes of it."""
        root = x._base if x._base is not None else x
        _, whole = self.others.get(id(root), (None, None))
        if whole is None or not self._chains(whole):
            return False
        entries = torch.ones(whole.part.parameter.numel(), dtype=root.dtype, device=root.device)
        entries.as_strided(known.part.size, known.part.stride, known.part.offset).zero_()
        self.others[id(root)] = root, whole._replace(part=_multiplied(whole.part, entries))
        return True

    # --- tensors in which no sample has a say ---

    def constant(self, x: Tensor) -> tuple[SharedCall, ...] | None:
        """The calls of layers of which a tensor is made, where no sample has a say in it; None where one may have."""
        if id(x) in self.fixed:
            return ()
        reference, calls = self.constants.get(id(x), (None, ()))
        return calls if reference is not None and reference() is x else None

    def share(self, out: Tensor, call: Any) -> None:
        """A call has given `out` for all samples alike."""
        own = SharedCall(call, torch.autograd.graph.get_gradient_edge(anchor(out)), out.shape)
        self.constants[id(out)] = weakref.ref(out), (*(self.constant(out) or ()), own)
        self.shares = True

    def note(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """What a function makes of constants is constant."""
        if self.given < 2:
            return
        calls: dict[SharedCall, None] = {}
        for x in _tensors((*args, *kwargs.values())):
            known = self.constant(x)
            if known is None:
                self._taint(func, args, kwargs)
                return
            calls |= dict.fromkeys(known if x.requires_grad else ())
        for made in _tensors(out if isinstance(out, (tuple, list)) else (out,)):
            self.constants[id(made)] = weakref.ref(made), tuple(calls)

    def _taint(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """What is written to is constant no more."""
        name = getattr(func, "__name__", "")
        into = kwargs.get("out")
        if args and (name.startswith(("__i", "__set")) or (name.endswith("_") and not name.endswith("__"))):
            into = args[0]
        if isinstance(into, Tensor):
            self.free([into] if into._base is None else [into, into._base])

    def free(self, tensors: Iterable[Tensor]) -> None:
        """These are not constant: a model's inputs, or what was written to."""
        for x in tensors:
            self.constants.pop(id(x), None)

    def meet(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """The arguments of a function, a copy for each sample of what all have alike: its gradient tells them apart."""
        if not self.shares or func not in MEETING:
            return args, kwargs
        given = list(_tensors((*args, *kwargs.values())))
        if func is SCALED_DOT_PRODUCT:
            size = given[0].shape[:1]
        elif len(given) > 1:
            size = torch.broadcast_shapes(*(x.shape for x in given))
        else:
            return args, kwargs
        alone = all(self.constant(x) is not None for x in given)  # as a mask may be that is the same for all
        fresh = {id(x): self._met(x, size, alone) for x in given if self.constant(x)}
        if not any(x is not None for x in fresh.values()):
            return args, kwargs
        replaced = [fresh.get(id(x)) if isinstance(x, Tensor) else None for x in args]
        args = [x if new is None else new for x, new in zip(args, replaced)]
        named = {k: new for k, x in kwargs.items() if isinstance(x, Tensor) and (new := fresh.get(id(x))) is not None}
        return args, {**kwargs, **named}

    def _met(self, shared: Tensor, size: Sequence[int], alone: bool) -> Tensor | None:
        """A copy of a shared tensor for each of the first dimension of what comes of it, if that has the samples.

        alone: no sample has a say in the result either. Then only a dimension of one is a place for samples.
        """
        calls, first = self.constant(shared), size[0] if size else 0
        missing = max(0, len(size) - shared.dim())
        if not calls or not shared.requires_grad or first < 2 or first % self.given:
            return None
        if (missing and alone) or (not missing and len(shared) != 1):
            return None
        whole = shared[(None,) * max(missing, 0)] if missing else shared
        expanded = whole.expand(first, *whole.shape[1:])
        self.met(shared, calls, expanded)
        return expanded


@dataclass(eq=False, frozen=True)
class SharedCall:
    """A call that all samples have in common, the edge of the graph at which its output enters, and its shape."""

    call: Any
    edge: Any
    shape: torch.Size


SCALED_DOT_PRODUCT = F.scaled_dot_product_attention
MEETING = PLUS | MINUS | TIMES | CHOICES | {SCALED_DOT_PRODUCT}
"""Functions in which what all samples have alike meets what each has."""


def _multiplied(part: Part, factor: Tensor | float) -> Part:
    """The part times constants."""
    factor = factor.reshape(-1) if isinstance(factor, Tensor) else factor
    return part if isinstance(factor, float) and factor == 1 else part._replace(times=part.times * factor)


def _same(part: Part, out: Tensor) -> Part:
    """The part in another type; its dimensions are those of `out`."""
    through = out.dtype if part.through is None else min(part.through, out.dtype, key=lambda t: torch.finfo(t).bits)
    return part._replace(size=tuple(out.shape), stride=contiguous(out.shape), offset=0, through=through)


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from (one for one in value if isinstance(one, Tensor))
