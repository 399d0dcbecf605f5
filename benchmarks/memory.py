"""How much state each rank holds: MiB of every optimizer's tensors on ResNet-20, by ranks.

python benchmarks/memory.py                 (a minute; ranks are threads)
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import natgrad
from natgrad.models import CifarResNet
from natgrad.parallel import World, run_threads

BATCH = 128
KINDS = {
    "SP-NGD": natgrad.SPNGD,
    "K-FAC": natgrad.KFAC,
    "SENG": partial(natgrad.SENG, damping=1.0),
    "NLCG": natgrad.NLCG,
}


def held(kind, start: torch.nn.Module, images: Tensor, labels: Tensor, world: World) -> float:
    """MiB that this rank holds after one step."""
    model = CifarResNet(depth=20).build((3, 32, 32), 100)
    model.load_state_dict(start.state_dict())
    optimizer = kind(model, lr=0.01, world=world)
    loss = cross_entropy(model(images.chunk(world.size)[world.rank]), labels.chunk(world.size)[world.rank])
    loss.backward()
    optimizer.step(lambda: loss)
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors) / 2**20


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = CifarResNet(depth=20).build((3, 32, 32), 100)
    images, labels = torch.randn(BATCH, 3, 32, 32), torch.randint(0, 100, (BATCH,))
    for name, kind in KINDS.items():
        for ranks, owners in ((1, True), (2, True), (4, True), (4, False)):
            found = run_threads(ranks, partial(held, kind, start, images, labels), owners=owners)
            print(f"{name:8}{ranks} ranks{'' if owners else ', owners=False':16}", *(f"{mib:8.1f}" for mib in found))


if __name__ == "__main__":
    main()
