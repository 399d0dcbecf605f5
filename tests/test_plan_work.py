"""What layers and curvatures state of their work is what torch counts when they do it."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from natgrad.curvature import EigenKronecker, Full, Identity, Kronecker, SampleSpace, UnitWise
from natgrad.curvature.curvature import Extent, part_of
from natgrad.layers import find_layers
from natgrad.layers.op_cost import COMPUTE
from natgrad.sampling import Sampler
from natgrad_lab.models import CifarResNet, Mlp, PreActResNet, Vgg16
from natgrad_lab.models.imagenet import ImageResNet
from natgrad_lab.plan.machines import named
from natgrad_lab.plan.trace import on_meta, trace


class Attending(nn.Module):
    """Tokens through an embedding, attention that is no known layer, and a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.norm = nn.LayerNorm(32)
        self.pack = nn.Linear(32, 96)
        self.head = nn.Linear(32, 5)

    def forward(self, tokens):
        q, k, v = self.pack(self.norm(self.embed(tokens))).chunk(3, -1)
        return self.head(((q @ k.mT).softmax(-1) @ v).mean(1))


def stated(found):
    """Operations that layers state, and those that run between them."""
    calls = [(*c.passes.forward, *(() if c.first else c.passes.inputs), *c.passes.weights) for c in found.calls]
    inside = sum(work.flops for works in calls for work in works)
    return inside, sum(work.flops for work in (*found.forward, *found.backward))


NETS = {
    "cifar": (CifarResNet(20), (3, 32, 32)),
    "preactivation": (PreActResNet(8), (3, 32, 32)),
    "mlp": (Mlp(), (1, 8, 8)),
    "vgg": (Vgg16(width=8, hidden=(32,), pooled=1), (3, 32, 32)),
    "resnet50": (ImageResNet(50), (3, 64, 64)),
    "resnet50-d": (ImageResNet(50, deep_stem=True), (3, 64, 64)),
}


@pytest.mark.parametrize("name", NETS)
def test_layers_state_the_operations_that_torch_counts(name):
    net, shape = NETS[name]
    found = trace(on_meta(lambda: net.build(shape, 10), name), shape, 4)
    inside, between = stated(found)
    assert inside == pytest.approx(found.counted, rel=1e-9)
    assert between == 0
    assert found.saved > 0


def test_what_no_layer_knows_is_counted_between_them():
    model = on_meta(Attending, "attending")
    found = trace(model, (12,), 3, tokens=50)
    inside, between = stated(found)
    products = 2 * 2 * 3 * 12 * 12 * 32  # two forward
    assert between == pytest.approx(3 * products)
    assert inside + between == pytest.approx(found.counted)
    assert {call.name for call in found.calls} == {"embed", "norm", "pack", "head"}


def test_a_trace_leaves_no_hooks_and_no_gradients():
    model = on_meta(lambda: CifarResNet(8).build((3, 32, 32), 10), "net")
    trace(model, (3, 32, 32), 2)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(p.is_meta for p in model.parameters())


LAYERS = {
    "linear": (nn.Linear(20, 12), (64, 20)),
    "linear at places": (nn.Linear(20, 12, bias=False), (16, 9, 20)),
    "strided": (nn.Conv2d(6, 10, 3, stride=2, padding=1), (8, 6, 16, 16)),
    "few channels": (nn.Conv2d(3, 8, 3, padding=1), (8, 3, 16, 16)),
    "grouped": (nn.Conv2d(8, 8, 3, groups=2), (8, 8, 10, 10)),
}


def layer_and_gradient(name):
    module, shape = LAYERS[name]
    [found] = find_layers(module)
    x = torch.randn(shape)
    return found.layer, x, torch.randn_like(module(x))


def counted(work):
    """What torch counts while `work` runs."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def flops(works):
    return sum(w.flops for w in works if w.kind in COMPUTE)


@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("key", ["A", "G"])
def test_measuring_takes_what_is_stated(name, samples, key):
    layer, x, dy = layer_and_gradient(name)
    curvature, ranks = Kronecker(samples), 2
    statistic = next(s for s in curvature.statistics if s.key == key)
    draw = Sampler(0, 0, 0, 1 / ranks).draw(0, 0, torch.device("cpu"))
    real = counted(lambda: statistic.after(layer, statistic.before(layer, x, draw), dy, draw))
    work = curvature.measure_work(layer, key, x.to("meta"), dy.to("meta"), ranks)
    assert flops(work) == pytest.approx(real, rel=1e-9)


def test_a_correlation_is_counted_as_the_one_convolution_that_it_is():
    """The strips at the border are on top: less than a tenth here."""
    module = nn.Conv2d(16, 16, 3, padding=1, bias=False)
    [found] = find_layers(module)
    x = torch.randn(8, 16, 32, 32)
    real = counted(lambda: found.layer.second_moment(x))
    work = flops(found.layer.second_moment_work(x.to("meta")))
    assert work == pytest.approx(real, rel=0.15)
    assert work <= real


@pytest.mark.parametrize("kind", [Kronecker, EigenKronecker])
@pytest.mark.parametrize("name", LAYERS)
def test_directions_take_what_is_stated(kind, name):
    layer, _, _ = layer_and_gradient(name)
    curvature, (b, o, i) = kind(), layer.shape
    identities = {"A": torch.eye(i).repeat(b, 1, 1), "G": torch.eye(o).repeat(b, 1, 1)}
    inverses = {k: curvature.factor(k, v, torch.ones(b))[0] for k, v in identities.items()}
    real = counted(lambda: curvature.precondition(inverses, torch.ones(layer.shape), 1.0))
    assert flops(curvature.precondition_work(layer, Extent(8, 1))) == real


@pytest.mark.parametrize("curvature", [Kronecker(), Full(), UnitWise(), Identity(), SampleSpace(4)], ids=str)
def test_every_curvature_states_all_of_its_work(curvature):
    layer, x, dy = layer_and_gradient("linear")
    seen = Extent(64, 1)
    for statistic in curvature.statistics:
        work = curvature.measure_work(layer, statistic.key, x.to("meta"), dy.to("meta"), 2)
        more = curvature.factor_work(layer, statistic.key, seen)
        assert all(w.flops >= 0 and w.bytes >= 0 for w in (*work, *more))
        assert sum(w.flops + w.bytes for w in work) > 0
        assert sum(w.flops + w.bytes for w in more) > 0
    assert sum(w.flops + w.bytes for w in curvature.precondition_work(layer, seen)) > 0
    assert curvature.rows_held(layer, seen) >= 0


def test_fewer_rows_on_more_ranks():
    """A bounded measurement is shared: each rank's part falls with their number, until it is a row."""
    layer, x, dy = layer_and_gradient("linear at places")
    parts = [flops(Kronecker(2).measure_work(layer, "A", x.to("meta"), dy.to("meta"), r)) for r in (1, 2, 4, 40, 80)]
    assert parts[0] == 2 * parts[1] == 4 * parts[2]
    assert parts[3] == parts[4] == 2 * 20**2
    assert part_of(3, 100) == 1


class Unknown(nn.Module):
    """A linear layer that makes its weight of a vector, so that no layer describes it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.vector, self.shape = nn.Parameter(torch.zeros(outputs * inputs)), (outputs, inputs)

    def forward(self, x):
        return nn.functional.linear(x, self.vector.view(self.shape))


def test_an_unknown_layer_costs_about_what_a_known_one_does():
    """Its arithmetic comes from the operations themselves, forward and backward, and meets the same rates."""
    seconds = []
    for kind in (nn.Linear, Unknown):
        model = on_meta(lambda kind=kind: nn.Sequential(kind(512, 2048), nn.ReLU(), nn.Linear(2048, 512)), "both")
        found = trace(model, (512,), 4096)
        inside, between = stated(found)
        assert inside + between == pytest.approx(found.counted, rel=1e-3)
        assert (between > 0) == (kind is Unknown)
        works = [w for c in found.calls for w in (*c.passes.forward, *c.passes.weights)]
        works += [w for c in found.calls if not c.first for w in c.passes.inputs]
        machine = named("v100-ib")
        seconds.append(sum(machine.device_seconds(w) for w in (*works, *found.forward, *found.backward)))
    assert seconds[1] == pytest.approx(seconds[0], rel=0.15)
