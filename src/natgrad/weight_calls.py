"""Sees the functions of torch that are given a watched weight, while a forward pass is measured.

A weight is known by itself, wherever it is used: in a module of any type, in a function, by a view of it. So a layer is
what is done with its weight, not what its module is called.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from natgrad.functions import PLUS, READERS, SAME_NUMBERS, Found, KnownWeight, constants
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
        out = func(*args, **kwargs)
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
    measured(layer): whether something is measured of a layer.
    """

    def __init__(
        self,
        layers: Mapping[int, Layer],
        used: Callable[[Found, Tensor, Flat | None], bool],
        strange: Callable[[int], None],
        stands_for: Callable[[nn.Parameter], Slot | None],
        measured: Callable[[int], bool],
    ):
        self.layers, self.used, self.strange, self.stands_for = layers, used, strange, stands_for
        self.measured = measured
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

    def begin(self) -> list[tuple[Tensor, Found]]:
        """A forward pass begins or ends. Returns lookups for all samples that were not added to anything."""
        left = list(self.once.values()) if hasattr(self, "once") else []
        self.others: dict[int, tuple[Tensor, KnownWeight | None]] = {}
        self.once: dict[int, tuple[Tensor, Found]] = {}
        return left

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
        if self.once and func in PLUS:
            self._spread(_tensors((*args, *kwargs.values())), out, flat)
        given = [(x, known) for x in _tensors((*args, *kwargs.values())) if (known := self.find(x)) is not None]
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
            if factor is not None and (isinstance(factor, float) and factor == 1 or self.layers[known.layer].scales):
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

    def _spread(self, added: Iterable[Tensor], out: Tensor, flat: Flat | None) -> None:
        """Rows that were looked up once are added to those of every sample: a lookup for each of them."""
        for x in added:
            rows, found = self.once.get(id(x), (None, None))
            fits = out.dim() == 3 and len(out) > 1 and out.shape[1:] == x.shape[-2:] and x.dim() in (2, 3)
            if found is not None and rows is x and fits and (x.dim() == 2 or len(x) == 1):
                del self.once[id(x)]
                tokens = found.use.x.reshape(1, -1).expand(len(out), -1)
                self.used(found._replace(use=replace(found.use, x=tokens)), out, flat)


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
