"""Parameters of which every rank holds a part: FSDP2's and HSDP's DTensors, cut along their first dimension.

With S shards and R replicas, rank (r, s) of R x S holds shard s of every parameter and of its gradient, which FSDP has
averaged over all ranks. Dimension 0 is cut as `torch.chunk` cuts it: all but the last parts have ceil(n / S) rows, and
where n is small there are parts without any. So all ranks know all lengths, and no message has to tell them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from natgrad.parallel.world import OwnedTensor, World

OFFLOADED = (
    "CPU offload is not supported, because owners apply curvature on the device where gradients are; leave "
    "offload_policy out"
)
REFUSED = "which natgrad does not support (FSDP2 and HSDP are: fully_shard(model) with every parameter cut along dim 0)"


class Sharding:
    """Who holds which shard.

    shards, replicas: S and R. shard, replica: this rank's. ranks: those of each replica, in the order of the shards.
    """

    def __init__(self, mesh: Any, world: World):
        self.mesh = mesh
        places = mesh.mesh.reshape(-1, mesh.mesh.shape[-1]).tolist()
        numbers = {rank: k for k, rank in enumerate(world.global_ranks)}
        self.ranks = [[numbers[rank] for rank in row] for row in places]
        self.replicas, self.shards = len(self.ranks), len(self.ranks[0])
        self.place_of = {rank: (r, s) for r, row in enumerate(self.ranks) for s, rank in enumerate(row)}
        self.replica, self.shard = self.place_of[world.rank]

    def bounds(self, n: int) -> list[tuple[int, int]]:
        """The rows [start, stop) of n that each shard has."""
        most = -(-n // self.shards)
        return [(min(s * most, n), min((s + 1) * most, n)) for s in range(self.shards)]

    def whole(self, local: Tensor, shape: Sequence[int], dim: int) -> Tensor:
        """The tensor of this shape, cut along `dim`, of which `local` is this rank's part; they share memory."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        placements = [*[Replicate()] * (self.mesh.ndim - 1), Shard(dim)]
        stride = torch.empty(tuple(shape), device="meta").stride()
        return DTensor.from_local(local, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)

    def parts(self, sharded: Tensor, shape: Sequence[int]) -> tuple[Tensor, list[OwnedTensor]]:
        """Room for the whole of a sharded tensor in this shape, with our part filled in, and its parts as views of it,
        each at a rank that has it.
        """
        dim, local = dim_of(sharded), local_of(sharded)
        whole = torch.zeros(tuple(shape), dtype=local.dtype, device=local.device)
        shaped, bounds = whole.view(sharded.shape), self.bounds(sharded.shape[dim])
        views = [shaped.narrow(dim, start, stop - start) for start, stop in bounds]
        views[self.shard].copy_(local)
        return whole, [OwnedTensor(view, rank) for view, rank in zip(views, self.ranks[0])]


def is_sharded(tensor: Any) -> bool:
    """Whether ranks hold parts of a tensor."""
    if "torch.distributed.tensor" not in sys.modules:  # nobody has made one
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local_of(tensor: Tensor) -> Tensor:
    """The part that this rank has of a tensor, which shares its memory; a plain tensor as it is."""
    return cast(Any, tensor.detach()).to_local() if is_sharded(tensor) else tensor


def like(value: Tensor, mine: Tensor) -> Tensor:
    """A copy of a value, whole or cut as `mine` is, in the type and on the device of `mine`, cut over ranks like it."""
    from torch.distributed.tensor import DTensor

    sharded: Any = mine
    dim, mesh = dim_of(mine), sharded.device_mesh
    if is_sharded(value):
        if value.shape != mine.shape or cast(Any, value).placements != sharded.placements:
            raise ValueError(
                f"a saved state of shape {tuple(value.shape)} is cut over ranks in another way than this optimizer's, "
                f"{tuple(mine.shape)}: load it with torch.distributed.checkpoint, or from gather_state_dict()"
            )
        part = local_of(value)
    else:
        most = -(-mine.shape[dim] // mesh.size(-1))
        start, rows = mesh.get_local_rank(mesh.ndim - 1) * most, local_of(mine).shape[dim]
        part = value.reshape(mine.shape).narrow(dim, min(start, mine.shape[dim]), rows)
    own = torch.empty_like(local_of(mine)).copy_(part)
    return DTensor.from_local(own, mesh, sharded.placements, run_check=False, shape=mine.shape, stride=sharded.stride())


def dim_of(tensor: Any) -> int:
    """The dimension along which a tensor is cut."""
    return tensor.placements[-1].dim


def fsdp_modules(model: nn.Module) -> dict[str, Any]:
    """The modules to which fully_shard was applied, by name."""
    if "torch.distributed.fsdp" not in sys.modules:
        return {}
    from torch.distributed.fsdp import FSDPModule

    return {name: module for name, module in model.named_modules() if isinstance(module, FSDPModule)}


def writes(tensor: Any) -> bool:
    """Whether this rank writes a part of a tensor that is cut over ranks: the first replica does, if it has some."""
    if not is_sharded(tensor) or not local_of(tensor).numel():
        return False
    return all(place == 0 for place in tensor.device_mesh.get_coordinate()[:-1])


def reshard(model: nn.Module) -> None:
    """Give back what FSDP has gathered for a forward pass, so that the model's parameters are those of the ranks."""
    for module in fsdp_modules(model).values():
        module.reshard()


def sharded_names(model: nn.Module) -> list[str]:
    """The parameters of which ranks hold parts."""
    return [name for name, parameter in model.named_parameters() if is_sharded(parameter)]


def sharding_of(model: nn.Module, world: World) -> Sharding | None:
    """How the parameters of a model are cut over the ranks of a world; None where every rank has all of them.

    Raises:
        ValueError: for a layout other than that of FSDP2 or HSDP over exactly these ranks, by name.

    """
    names = sharded_names(model)
    if not names:
        return None
    parameters = dict(model.named_parameters())
    first = cast(Any, parameters[names[0]])
    inside = list(fsdp_modules(model))
    for name in names:
        _check(name, cast(Any, parameters[name]), any(_is_inside(name, path) for path in inside))
        if cast(Any, parameters[name]).device_mesh != first.device_mesh:
            raise ValueError(f"{name} and {names[0]} are on two device meshes; call fully_shard with one mesh for all")
    if offloaded := [name or "the model" for name, module in fsdp_modules(model).items() if _is_offloaded(module)]:
        raise ValueError(f"{offloaded[0]} was given a CPUOffloadPolicy: {OFFLOADED}")
    plain = [name for name, p in parameters.items() if p.requires_grad and not is_sharded(p)]
    if plain:
        raise ValueError(
            f"{plain[0]} is not sharded and {names[0]} is: call fully_shard(model) on the root module too, and leave "
            "trainable parameters out of ignored_params"
        )
    mesh = first.device_mesh
    here = sorted(world.global_ranks)
    if sorted(mesh.mesh.flatten().tolist()) != here:
        raise ValueError(
            f"the model is sharded over ranks {sorted(mesh.mesh.flatten().tolist())} and the optimizer's world is "
            f"ranks {here}: pass world=World(a process group of the mesh's ranks)"
        )
    return Sharding(mesh, world)


def _is_offloaded(module: Any) -> bool:
    """Whether FSDP keeps a module's parameters on the host. It tells nobody, so its own notes are read."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    return any(isinstance(getattr(group, "offload_policy", None), CPUOffloadPolicy) for group in groups)


def _is_inside(name: str, path: str) -> bool:
    return not path or name.startswith(f"{path}.")


def _check(name: str, parameter: Any, by_fsdp: bool) -> None:
    """Refuse what is not FSDP2's layout."""
    from torch.distributed.tensor import Replicate, Shard

    placements, mesh = tuple(parameter.placements), parameter.device_mesh
    said = f"{name} is a DTensor {placements} on a mesh {tuple(mesh.mesh.shape)} of {mesh.mesh_dim_names or 'ranks'}"
    if not by_fsdp:
        raise ValueError(f"{said}, as tensor parallelism makes it, {REFUSED}")
    fits = placements in ((Shard(0),), (Replicate(), Shard(0))) and type(placements[-1]) is Shard
    if not fits:
        raise ValueError(f"{said}, {REFUSED}; leave tensor parallelism and shard_placement_fn out")
    if parameter.device.type not in (mesh.device_type, "meta"):
        raise ValueError(f"{name} is on {parameter.device} and its mesh is of {mesh.device_type}: {OFFLOADED}")


class ShardedWorld(World):
    """The ranks as rules and lengths of a sharded model see them: each works on its part of every layer.

    Sums over a layer's numbers are whole on every rank (see ShardSegment), so there is nothing to add up over owners.
    """

    def __init__(self, world: World, replicas: int):
        super().__init__(world.transport, owners=False)
        self.world, self.replicas, self.sent = world, replicas, world.sent

    @property
    def copies(self) -> int:
        return self.replicas

    def report(self, how: str, kind: str, chunks: Sequence[int]) -> None:
        self.world.report(how, kind, chunks)

    def sum_over_parts(self, tensors: Sequence[Tensor], kind: str = "other") -> None:
        self.sum(tensors, kind)
        if self.replicas > 1:
            torch._foreach_div_(list(tensors), self.replicas)


def spread_to_replicas(sharding: Sharding, world: World, tensors: Iterable[Tensor]) -> None:
    """The first replica's parts of sharded tensors to all replicas, in place: FSDP does not make them equal."""
    locals_ = [local_of(tensor) for tensor in tensors]
    if sharding.replicas == 1:
        return
    for dtype in dict.fromkeys(t.dtype for t in locals_):
        own = [t for t in locals_ if t.dtype == dtype]
        numel = sum(t.numel() for t in own)
        mine = [row[sharding.shard] for row in sharding.ranks]
        flat = torch.cat([t.reshape(-1) for t in own])
        out = [numel if sharding.replica == 0 and rank in mine[1:] else 0 for rank in range(world.size)]
        into = [numel if sharding.replica > 0 and rank == mine[0] else 0 for rank in range(world.size)]
        repeated = flat.repeat(sharding.replicas - 1) if sharding.replica == 0 else flat[:0]
        received = world.all_to_all(repeated, out, into, "start")
        if sharding.replica > 0:
            torch._foreach_copy_(own, [p.view_as(t) for t, p in zip(own, received.split([t.numel() for t in own]))])
