"""What the tests of plans share: real steps on ranks that are threads, and the same steps planned."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from helpers import clone, quiet
from in_parts import on_threads
from natgrad.parallel import Listener, local_of, mesh_of, run_threads, shard
from natgrad_lab.models import CifarResNet
from natgrad_lab.plan.machines import named
from natgrad_lab.plan.scaling import Network, Planner
from natgrad_lab.train.optimizers import AdamW, KFac, Nlcg, Seng, Sgd, SpNgd

NET, SHAPE, CLASSES, BATCH = CifarResNet(8, (8, 16, 16)), (3, 16, 16), 10, 64
STRONG = Nlcg(lr=1.0, preconditioner="kronecker", beta="polak_ribiere", step="curvature", refresh=1)
SETTINGS = {
    "sgd": Sgd(),
    "adamw": AdamW(),
    "spngd": SpNgd(refresh=1),
    "spngd adaptive": SpNgd(refresh=None),
    "spngd under a budget": SpNgd(refresh=1, refresh_share=1e6),
    "spngd narrow": SpNgd(refresh=1, norms="full", wire="bfloat16", weights_wire="bfloat16", inverse="eigen"),
    "spngd float16, clipped": SpNgd(refresh=1, max_norm=1.0, wire="float16", length="plain"),
    "spngd overlapped": SpNgd(refresh=1, overlap=True),
    "kfac": KFac(refresh=1),
    "kfac directions": KFac(refresh=1, gather="directions"),
    "seng": Seng(refresh=1),
    "seng network": Seng(refresh=1, block="network", samples=32, sketch="uniform", sketch_size=50),
    "seng of few samples": Seng(refresh=1, samples=2),
    "seng replicated": Seng(refresh=1, replicated=True, sketch=None),
    "seng narrow": Seng(refresh=1, wire="bfloat16", sketch="uniform", samples=48),
    "nlcg": Nlcg(),
    "nlcg strong": STRONG,
}


def state_bytes(optimizer):
    """Bytes of all tensors that an optimizer holds."""
    tensors = [local_of(v) for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def passed(model, batch):
    """The loss after both passes."""
    loss = cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    return loss.detach()


def real(settings, ranks, steps=2, replicas=None):
    """(bytes by kind and all messages of the last step, bytes of state, owners) of every rank that is there.

    replicas: of a model that is cut over ranks (FSDP's own messages are left out); None: every rank has all of it.
    """
    torch.manual_seed(0)
    start = NET.build(SHAPE, CLASSES)
    images, labels = torch.randn(BATCH, *SHAPE), torch.randint(0, CLASSES, (BATCH,))

    def work(world):
        model = clone(start) if replicas is None else shard(clone(start), mesh_of(ranks, "cpu", replicas))
        optimizer = quiet(settings.build, model, world)
        mine = images.chunk(ranks)[world.rank], labels.chunk(ranks)[world.rank]
        ranks_of = getattr(optimizer, "world", world)
        sent, messages = ranks_of.sent, []
        ranks_of.listener = messages.append
        for _ in range(steps):
            sent.clear()
            messages.clear()
            settings.take(optimizer, passed(model, mine), lambda: model(mine[0]))
            told = {kind: count for kind, count in sent.items() if count}, list(messages)
            optimizer.zero_grad()
        cells = getattr(optimizer, "cells", [])
        return told, state_bytes(optimizer), [(c.name, c.owner, dict(c.holders)) for c in cells]

    return (run_threads if replicas is None else on_threads)(ranks, work)


def sent_by_fsdp(rank, ranks, replicas):
    """What FSDP sends in the passes of a step, heard on processes."""
    model = shard(NET.build(SHAPE, CLASSES), mesh_of(ranks, "cpu", replicas))
    batch = torch.zeros(4, *SHAPE), torch.zeros(4, dtype=torch.long)
    passed(model, batch)
    with Listener() as listener:
        passed(model, batch)
    return listener.heard


def planner(net=NET, shape=SHAPE, classes=CLASSES, machine="cpu", micro_batch=None, replicas=None):
    """A planner of a network."""
    one = Network("a network", lambda: net.build(shape, classes), shape)
    return Planner(one, named(machine), micro_batch, replicas)
