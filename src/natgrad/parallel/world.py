"""The ranks in a few calls: reduce to owners, gather from owners, send, and mean, sum and maximum of small things.

What travels: `reduce` is one reduce-scatter (each rank receives the sums of what it owns; `begin` starts it and goes
on), `gather` one all-gather (each rank sends what it owns), `send` one message from rank to rank. All are one message
a data type, tensors one behind the other, symmetric matrices as triangles. A world of one sends nothing and takes the
same path.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from natgrad.parallel import uneven
from natgrad.parallel.levels import TwoLevels
from natgrad.parallel.message import Message
from natgrad.parallel.packing import flattened, pack, packed_numel, unpack
from natgrad.parallel.transport import Alone, Processes, Transport

NO_GROUP = (
    "{}, so every rank would train a model of its own. Write, in this order:\n"
    '    torch.distributed.init_process_group("nccl")  # "gloo" on CPUs\n'
    "    optimizer = natgrad.SPNGD(model, lr=0.1)\n"
    "For a model of its own on every rank pass world=natgrad.World.alone()"
)

Gradients = Literal["auto", "local", "averaged"]


class OwnedTensor(NamedTuple):
    """A tensor (the same shape on every rank), the rank that owns it, and whether it is a symmetric matrix."""

    tensor: Tensor
    owner: int
    symmetric: bool = False


class World:
    """The ranks that train together.

    Args:
        group: a process group, a Transport, or None for torch.distributed's default group (alone if there is none).
        gradients: whether `.grad` holds this rank's gradient ("local") or already the mean over ranks ("averaged", as
            DistributedDataParallel leaves it). "auto" looks: averaged gradients are equal to the last bit on all ranks.
        wire: type in which statistics travel: torch.bfloat16 or torch.float16 halves their bytes; None sends them as
            they are.
        weights: type in which owners send new weights or directions; owners keep weights in float32 beside (on several
            ranks). None: their own.
        overlap: send gradients of a plain model in buckets during the backward pass (see SecondOrder.no_sync).
        owners: True gives every layer to one rank, which keeps the layer's state and makes its step. False makes every
            rank the owner of everything: sums go to all, and nothing needs to be sent back. Memory and work are then
            those of one rank, and equal weights rest on equal machines. None is True while ranks hold their own
            gradients, and False from the step on in which somebody else has averaged them: whoever does so (a trainer)
            writes rank 0's `state_dict()`, which is whole then. `weights=` keeps the owners.
        per_host: ranks of a host, which have consecutive numbers: reductions to owners and gatherings go inside of
            hosts first, then between them, so that a thousand ranks wait for hundreds of latencies less. None: all in
            one ring.
        timeout: seconds after which a message that a rank does not take part in is given up, with an error that names
            the rank; None: the process group's own (init_process_group: 30 minutes with gloo, 10 with NCCL).
        check: after every so many steps, an optimizer compares weights, clocks and shared numbers over ranks and raises
            a RanksDifferError that names the first that differs, and the ranks. One message of 32 bytes, and a pass
            over the weights; for finding errors. None: never.

    """

    def __init__(
        self,
        group: dist.ProcessGroup | Transport | None = None,
        gradients: Gradients = "auto",
        wire: torch.dtype | None = None,
        weights: torch.dtype | None = None,
        overlap: bool = False,
        owners: bool | None = None,
        per_host: int | None = None,
        timeout: float | None = None,
        check: int | None = None,
    ):
        if gradients not in ("auto", "local", "averaged"):
            raise ValueError(f'World(gradients={gradients!r}): give "auto", "local" or "averaged"')
        for name, dtype in (("wire", wire), ("weights", weights)):
            if dtype not in (None, torch.bfloat16, torch.float16):
                raise ValueError(f"World({name}={dtype!r}): give torch.bfloat16, torch.float16 or None")
        if overlap and gradients == "averaged":
            raise ValueError(
                'World(overlap=True, gradients="averaged"): a wrapper that averages gradients overlaps them itself; '
                "leave overlap off"
            )
        if weights is not None and owners is False:
            raise ValueError(f"World(weights={weights}, owners=False): nothing is sent back then; leave weights out")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"World(timeout={timeout!r}): give seconds above 0, or None for the process group's own")
        if check is not None and (isinstance(check, bool) or check < 1 or check != int(check)):
            raise ValueError(
                f"World(check={check!r}): give the steps from one check to the next, or None for no checks"
            )
        self.check = check
        self.gradients: Gradients = "local" if overlap else gradients
        self.wire, self.weights, self.overlap = wire, weights, overlap
        self.replicates = owners is None and weights is None
        """Whether every rank becomes the owner of everything where gradients are averaged by somebody else."""
        self.owners = not (self.replicates and gradients == "averaged") if owners is None else owners
        self._default = group is None
        if group is None:
            opened = dist.is_available() and dist.is_initialized()
            if not opened and "RANK" in os.environ and int(os.environ.get("WORLD_SIZE") or 1) > 1:
                raise ValueError(
                    NO_GROUP.format(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but no process group is open")
                )
            group = Processes(None, timeout) if opened else Alone()
        elif isinstance(group, dist.ProcessGroup):
            group = Processes(group, timeout)
        elif timeout is not None:
            raise ValueError(f"World({type(group).__name__}, timeout={timeout:g}): a transport has a limit of its own")
        self.rank, self.size, self.per_host = group.rank, group.size, per_host
        if per_host is not None and (per_host < 1 or (self.size > per_host and self.size % per_host)):
            raise ValueError(f"World(per_host={per_host}): {self.size} ranks are no hosts of so many; give 1 or more")
        self.transport: Transport = group
        if self.two_levels:
            self.transport = TwoLevels(group, *group.split(per_host or 1))
        self.sent: dict[str, int] = defaultdict(int)  # bytes of payload by kind, until somebody clears it
        self.sends: Callable[[Callable[[], None]], None] | None = None
        """Who is given a message to all ranks, to send it now and in every repetition of what is being recorded."""
        self.listener: Callable[[Message], None] | None = None  # is told of every message before it is sent

    @classmethod
    def alone(cls) -> World:
        """A world of this process, whatever the launcher says of others."""
        return cls(Alone())

    @property
    def two_levels(self) -> bool:
        """Whether messages go inside of hosts and between them."""
        return self.per_host is not None and 1 < self.per_host < self.size

    def refuse_alone(self) -> None:
        """Refuse to go on alone where a process group has been opened since."""
        alone = self._default and isinstance(self.transport, Alone) and dist.is_available()
        if alone and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(NO_GROUP.format("the process group was opened after the optimizer was built"))

    @property
    def join_group(self) -> Any:
        """The process group, for torch's Join."""
        return uneven.group_of(getattr(self.transport, "group", None))

    @property
    def join_device(self) -> torch.device:
        """Where torch's Join keeps its counts."""
        return uneven.device_of(getattr(self.transport, "group", None))

    @property
    def global_ranks(self) -> list[int]:
        """The ranks of this world by their numbers in the default process group."""
        group = getattr(self.transport, "group", None)
        if group is None:
            return list(range(self.size))
        return [dist.get_global_rank(group, rank) for rank in range(self.size)]

    @property
    def copies(self) -> int:
        """On how many ranks each number lies that a rule works on."""
        return 1 if self.owners else self.size

    def count(self, kind: str, parcels: Sequence[OwnedTensor]) -> None:
        """Add the bytes of a message to what was sent."""
        if self.size > 1:
            self.sent[kind] += sum(self._numel(p) * p.tensor.element_size() for p in parcels)

    def report(self, how: str, kind: str, chunks: Sequence[int]) -> None:
        """Say to the listener, if there is one, what is about to be sent. An empty message is none."""
        if self.listener is not None and sum(chunks):
            self.listener(Message(how, kind, tuple(chunks)))

    def reduce(self, parcels: Sequence[OwnedTensor], kind: str = "other") -> list[Tensor | None]:
        """The sum over ranks of every parcel at its owner, None elsewhere."""
        return self.begin(parcels, kind)()

    def begin(self, parcels: Sequence[OwnedTensor], kind: str = "other") -> Callable[[], list[Tensor | None]]:
        """`reduce`, under way while the caller goes on; what is returned waits for the sums."""
        if self.size == 1:
            return lambda: [p.tensor for p in parcels]
        if not self.owners:
            flat = flattened([p.tensor for p in parcels], [p.symmetric for p in parcels])
            copies = [part.clone() for part in flat]
            self._everyone(copies, "sum", kind)
            return lambda: [unpack(c, [p.tensor.shape], [p.symmetric])[0] for c, p in zip(copies, parcels)]
        self.count(kind, parcels)
        under_way = []
        flat = flattened([p.tensor for p in parcels], [p.symmetric for p in parcels])
        for chunks in self._by_owner(parcels):
            nothing = self._pack(parcels, [], chunks)
            buffers = [torch.cat([flat[k] for k in chunk]) if chunk else nothing for chunk in chunks]
            self.report("reduce_scatter", kind, [b.numel() * b.element_size() for b in buffers])
            under_way.append((chunks[self.rank], self.transport.reduce_scatter(buffers)))

        def wait() -> list[Tensor | None]:
            results: list[Tensor | None] = [None] * len(parcels)
            for mine, received in under_way:
                for k, tensor in zip(mine, self._unpack(parcels, mine, received())):
                    results[k] = tensor
            return results

        return wait

    def reduce_narrow(self, parcels: Sequence[OwnedTensor], kind: str = "other") -> list[Tensor | None]:
        """`reduce` in the `wire` type, if there is one.

        float16 has little range, so each tensor is scaled such that the sum over ranks stays below its largest number:
        by 65000 over the sum of all ranks' largest entries, which is one small message.
        """
        if self.size == 1 or self.wire is None or not parcels:
            return self.reduce(parcels, kind)
        tensors, each = [p.tensor for p in parcels], list[Any]([1.0] * len(parcels))
        if self.wire == torch.float16:
            largest = [n.double().to(tensors[0].device) for n in torch._foreach_norm(tensors, torch.inf)]
            sums = torch.stack(largest)
            self.sum([sums], "scalars")
            scales = torch.where(sums > 0, 65_000 / sums.clamp_min(1e-30), 1.0)
            each = [s.to(t.device) for s, t in zip(scales.unbind(), tensors)]
            tensors = list(torch._foreach_mul(tensors, each))
        narrow = [p._replace(tensor=t) for p, t in zip(parcels, rounded(tensors, self.wire))]
        received = self.reduce(narrow, kind)
        return [
            None if value is None else value.to(parcel.tensor.dtype) / scale
            for parcel, value, scale in zip(parcels, received, each)
        ]

    def gather(self, parcels: Sequence[OwnedTensor], kind: str = "other") -> None:
        """Every parcel's tensor takes its owner's value on all ranks, in place."""
        if self.size > 1 and self.owners:
            self._gather(parcels, kind)

    def start(self, tensors: Sequence[Tensor]) -> None:
        """Every tensor takes rank 0's value on all ranks, in place."""
        if self.size > 1:
            self._gather([OwnedTensor(t, 0) for t in tensors], "start")

    def _gather(self, parcels: Sequence[OwnedTensor], kind: str) -> None:
        self.count(kind, parcels)
        for chunks in self._by_owner(parcels):
            lengths = [sum(self._numel(parcels[k]) for k in chunk) for chunk in chunks]
            mine = self._pack(parcels, chunks[self.rank], chunks)
            self.report("all_gather", kind, [n * mine.element_size() for n in lengths])
            received = self.transport.all_gather(mine, lengths)
            targets, values = list[Tensor](), list[Tensor]()
            for owner, chunk in enumerate(chunks):
                if owner != self.rank and chunk:
                    targets += [parcels[k].tensor for k in chunk]
                    values += self._unpack(parcels, chunk, received[owner])
            if targets:
                torch._foreach_copy_(targets, values)

    def gather_narrow(self, parcels: Sequence[OwnedTensor], kind: str = "other") -> None:
        """`gather` in the `weights` type, if there is one. Owners' tensors are rounded too, so all ranks stay equal."""
        narrow = parcels = list(parcels)
        if self.size > 1 and self.weights is not None and parcels:
            limit = torch.finfo(self.weights).max
            bounded = torch._foreach_clamp_max(torch._foreach_clamp_min([p.tensor for p in parcels], -limit), limit)
            narrow = [p._replace(tensor=t) for p, t in zip(parcels, rounded(bounded, self.weights))]
        self.gather(narrow, kind)
        if narrow and narrow[0] is not parcels[0]:
            torch._foreach_copy_([p.tensor for p in parcels], [p.tensor for p in narrow])

    def send(self, parcels: Sequence[OwnedTensor], sources: Sequence[int], kind: str = "other") -> None:
        """Every parcel's tensor at its owner takes the value that it has on its source, in place."""
        if self.size == 1 or not parcels:
            return
        self.count(kind, [p for p, source in zip(parcels, sources) if source != p.owner])
        for dtype in dict.fromkeys(p.tensor.dtype for p in parcels):
            routes: dict[tuple[int, int], list[int]] = defaultdict(list)
            for k, (parcel, source) in enumerate(zip(parcels, sources)):
                if parcel.tensor.dtype == dtype and source != parcel.owner:
                    routes[source, parcel.owner].append(k)
            out = {to: self._pack(parcels, chunk, [chunk]) for (by, to), chunk in routes.items() if by == self.rank}
            lists = {by: chunk for (by, to), chunk in routes.items() if to == self.rank}
            into = {by: self._pack(parcels, chunk, [chunk]) for by, chunk in lists.items()}
            received = [0] * self.size
            for (_, to), chunk in routes.items():
                received[to] += sum(self._numel(parcels[k]) * parcels[k].tensor.element_size() for k in chunk)
            self.report("exchange", kind, received)
            self.transport.exchange(out, into)
            for by, chunk in lists.items():
                for k, value in zip(chunk, self._unpack(parcels, chunk, into[by])):
                    parcels[k].tensor.copy_(value)

    def _by_owner(self, parcels: Sequence[OwnedTensor]) -> list[list[list[int]]]:
        """For each dtype: the parcels of each owner."""
        kinds: dict[torch.dtype, list[list[int]]] = {}
        for k, parcel in enumerate(parcels):
            if parcel.tensor.dtype not in kinds:  # once a type: there may be thousands of ranks
                kinds[parcel.tensor.dtype] = [[] for _ in range(self.size)]
            kinds[parcel.tensor.dtype][parcel.owner].append(k)
        return list(kinds.values())

    @staticmethod
    def _numel(parcel: OwnedTensor) -> int:
        return packed_numel(parcel.tensor.shape, parcel.symmetric)

    @staticmethod
    def _pack(parcels: Sequence[OwnedTensor], chunk: list[int], chunks: list[list[int]]) -> Tensor:
        if chunk:
            return pack([parcels[k].tensor for k in chunk], [parcels[k].symmetric for k in chunk])
        return next(parcels[k].tensor for other in chunks for k in other).new_zeros(0)

    @staticmethod
    def _unpack(parcels: Sequence[OwnedTensor], chunk: list[int], buffer: Tensor) -> list[Tensor]:
        return unpack(buffer, [parcels[k].tensor.shape for k in chunk], [parcels[k].symmetric for k in chunk])

    def mean(self, tensors: Sequence[Tensor], kind: str = "other") -> None:
        """Every tensor becomes its mean over ranks, in place on all ranks."""
        self.sum(tensors, kind)
        if self.size > 1:
            torch._foreach_div_(list(tensors), self.size)

    def sum(self, tensors: Sequence[Tensor], kind: str = "other") -> None:
        """Every tensor becomes its sum over ranks, in place on all ranks."""
        self._everyone(tensors, "sum", kind)

    def sum_over_owners(self, tensors: Sequence[Tensor], kind: str = "other", shares: Sequence[Tensor] = ()) -> None:
        """Sums over what each rank owns become sums over everything, in place on all ranks.

        shares: tensors of which every rank has a share, whoever owns layers. They are summed by the same message.
        """
        if self.owners:
            self.sum([*tensors, *shares], kind)
        elif shares:
            self.sum(shares, kind)

    def sum_over_parts(self, tensors: Sequence[Tensor], kind: str = "other") -> None:
        """Sums over the numbers that each rank works on become sums over everything, in place on all ranks."""
        self.sum_over_owners(tensors, kind)

    def all_to_all(
        self, buffer: Tensor, out: Sequence[int], into: Sequence[int], kind: str, received: Sequence[int] = ()
    ) -> Tensor:
        """Every rank gets its part of everybody's flat buffer; returns what came, in the order of the ranks.

        out, into: numbers to and from each rank. received: numbers that each rank receives from others, for traffic.
        """
        if self.size == 1:
            return buffer
        chunks = [n * buffer.element_size() for n in received]
        self.sent[kind] += sum(chunks)
        self.report("all_to_all", kind, chunks)
        return self.transport.all_to_all(buffer, out, into)

    def max(self, tensors: Sequence[Tensor], kind: str = "other") -> None:
        """Every tensor becomes its maximum over ranks, in place on all ranks."""
        self._everyone(tensors, "max", kind)

    def _everyone(self, tensors: Sequence[Tensor], op: str, kind: str) -> None:
        if self.size == 1 or not tensors:
            return
        send = partial(self._send_to_everyone, list(tensors), op, kind)
        if self.sends is None:
            send()
        else:
            self.sends(send)

    def _send_to_everyone(self, tensors: Sequence[Tensor], op: str, kind: str) -> None:
        self.count(kind, [OwnedTensor(t, 0) for t in tensors])
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            same = [t for t in tensors if t.dtype == dtype]
            packed = pack(same, [False] * len(same))
            self.report("all_reduce", kind, [packed.numel() * packed.element_size()])
            buffer = self.transport.all_reduce(packed, op)
            torch._foreach_copy_(same, unpack(buffer, [t.shape for t in same], [False] * len(same)))


def rounded(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies of these tensors in another type."""
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies
