"""The checksum of every measured layer: plain layers agree to rounding, others train without curvature and say so."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

import natgrad
from examples import CASES, NAMES
from helpers import (
    OPTIMIZERS,
    Mixed,
    Opaque,
    Two,
    backward,
    clone,
    heard,
    made,
    points,
    quiet,
    statistic,
    train,
    unwarned,
)
from natgrad.capture import EVERY, FIRST
from natgrad.checksum import Checksum, numbers_of
from natgrad.curvature.per_sample import explicit
from natgrad.layers import UncurvedParameter, layer_of
from natgrad_lab.models import CifarResNet, Mlp, PreActResNet, Transformer, Vgg16

every_layer = pytest.mark.parametrize(("build", "data"), [(b, d) for _, b, d in CASES], ids=NAMES)
every_optimizer = pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)


def both_sides(module, x, spoil=lambda dy: dy, seed=3):
    """The checksum of one pass through one module."""
    layer = layer_of(module)
    check = Checksum(layer, seed)
    out = module(x)
    looked = check.look(x.detach(), out)
    n, s = layer.count(x)

    def claim(dy):
        with torch.no_grad():
            check.claim(looked, dy, n * s)

    out.register_hook(claim)
    for place, parameter in enumerate(layer.parameters):
        parameter.register_hook(lambda g, place=place: check.deposit(place, spoil(g)))
    torch.manual_seed(2)
    (out * torch.randn_like(out)).sum().backward()
    return check


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@every_layer
def test_every_layer_agrees_to_rounding_and_notices_a_wrong_gradient(build, data, dtype):
    torch.manual_seed(1)
    module, x = build().to(dtype), data()
    x = x.to(dtype) if x.is_floating_point() else x
    check = both_sides(module, x)
    assert check.agrees(*numbers_of([check]).tolist())
    wrong = [both_sides(clone(module), x, spoil=lambda g: 1.5 * g, seed=seed) for seed in range(4)]
    noticed = [not check.agrees(*numbers_of([check]).tolist()) for check in wrong]
    assert any(noticed) if dtype == torch.bfloat16 else all(noticed)  # in bf16 a unit of rounding is near a hundredth


def test_what_cannot_be_compared_is_not_called_wrong():
    check = Checksum(layer_of(nn.Linear(3, 2)), 0)
    assert check.agrees(float("nan"), 1.0, 1.0, 1.0)
    assert check.agrees(1.0, float("inf"), 1.0, 1.0)
    assert not check.agrees(1.0, 2.0, 1.0, 1.0)


# --- whole models: agree, or trains without curvature ---

ZOO = {
    "resnet": (lambda: CifarResNet(depth=8).build((3, 8, 8), 5), lambda: torch.randn(6, 3, 8, 8)),
    "preactivation": (
        lambda: PreActResNet(depth=20, widths=(4, 6, 8)).build((3, 8, 8), 5),
        lambda: torch.randn(6, 3, 8, 8),
    ),
    "vgg": (lambda: Vgg16(width=4).build((3, 32, 32), 5), lambda: torch.randn(3, 3, 32, 32)),
    "mlp": (lambda: Mlp(hidden=(8,)).build((3, 4, 4), 5), lambda: torch.randn(6, 3, 4, 4)),
    "characters": (
        lambda: Transformer(width=16, heads=2).build((1, 1, 6), 11),
        lambda: torch.randint(11, (6, 6)),
    ),
    "encoder": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), nn.Linear(8, 5)),
        lambda: torch.randn(7, 6, 8),
    ),
    "recurrent": (lambda: Recurrent(nn.LSTM(4, 6, batch_first=True)), lambda: torch.randn(6, 5, 4)),
    "mixed": (Mixed, lambda: torch.randint(7, (6, 6))),
}


class Recurrent(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.head = inner, nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.inner(x)[0])


def verdicts(opt):
    """Every layer's name and whether its checksum agrees, of the passes since the last step."""
    seen = opt.engine.capture.collect().seen
    return {cell.name: seen[k].agrees for k, cell in enumerate(opt.cells) if k in seen and seen[k].passes}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_every_layer_of_every_model_agrees_or_is_on_the_fallback(name, dtype):
    torch.manual_seed(0)
    build, data = ZOO[name]
    model, x = build().to(dtype), data()
    x = x.to(dtype) if x.is_floating_point() else x
    opt = quiet(natgrad.SPNGD, model, lr=0.01)
    out = model(x)
    (out * torch.randn_like(out)).mean().backward()
    found = verdicts(opt)
    assert all(found.values())
    known = {cell.name for cell in opt.cells if not isinstance(cell.layer, UncurvedParameter)}
    assert known <= found.keys()


# --- ways of changing a weight before its use, or of using it otherwise ---


class Masked(Two):
    def forward(self, x):
        mask = (torch.arange(16).view(4, 4) % 2 == 0).to(x)
        return self.head(torch.tanh(functional_call(self.body, {"weight": self.body.weight * mask}, (x,))))


class Standardised(Two):
    def forward(self, x):
        w = self.body.weight
        w = (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True)
        return self.head(torch.tanh(functional_call(self.body, {"weight": w}, (x,))))


class Reused(Two):
    def forward(self, x):
        return self.head(torch.tanh(F.linear(torch.tanh(self.body(x)), self.body.weight)))


class Hidden(Two):
    def forward(self, x):
        return self.head(torch.tanh(Opaque.apply(torch.tanh(self.body(x)), self.body.weight)))


class Transposed(Two):
    def forward(self, x):
        return self.head(torch.tanh(self.body(x)) @ self.body.weight)


class Functional(Two):
    """The module runs, but its output is thrown away."""

    def forward(self, x):
        self.body(x)
        return self.head(torch.tanh(F.linear(2 * x, self.body.weight, self.body.bias)))


class Active(nn.Linear):
    def forward(self, x):
        return torch.relu(super().forward(x))


class Adapted(Two):
    """A low-rank adapter that is added to the weight inside."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 4))

    def forward(self, x):
        weight = self.body.weight * (1 + self.a @ self.b)
        return self.head(torch.tanh(functional_call(self.body, {"weight": weight}, (x,))))


def swapped(change):
    """Two whose body is changed from outside."""

    def build():
        model = Two()
        change(model)
        return model

    return build


def hooked(model):
    model.body.register_forward_hook(lambda module, args, out: torch.relu(out) * 3)


def hooked_in_place(model):
    model.body.register_forward_hook(lambda module, args, out: out.mul_(3))


class Halved(nn.Module):
    def forward(self, w):
        return w / 2


CHANGES = {
    "mask": Masked,
    "standardisation": Standardised,
    "weight_norm": swapped(lambda m: parametrizations.weight_norm(m.body)),
    "weight_norm of old": swapped(lambda m: weight_norm(m.body)),
    "spectral_norm": swapped(lambda m: parametrizations.spectral_norm(m.body)),
    "spectral_norm of old": swapped(lambda m: spectral_norm(m.body)),
    "parametrisation": swapped(lambda m: parametrize.register_parametrization(m.body, "weight", Halved())),
    "pruning": swapped(lambda m: prune.l1_unstructured(m.body, "weight", 0.5)),
    "functional reuse": Reused,
    "in a kernel of its own": Hidden,
    "transposed": Transposed,
    "functional alone": Functional,
    "activation inside": swapped(lambda m: setattr(m, "body", Active(4, 4))),
    "adapter": Adapted,
    "hook on the output": swapped(hooked),
    "hook in place": swapped(hooked_in_place),
    "forward of its own": swapped(lambda m: setattr(m.body, "forward", lambda x: F.linear(x, m.body.weight) ** 2)),
}


def exact(opt, model, batch):
    """Whether SENG's rows of `body`, with all samples, are the gradients of single samples."""
    names = {id(p): n for n, p in model.named_parameters()}
    cell = next((c for c in opt.cells if c.name == "body"), None)
    if cell is None:
        return False
    x, y = batch
    rows = explicit(cell.kept(), cell.layer.shape) * len(x) ** 0.5
    for k, row in enumerate(rows):
        loss = F.cross_entropy(model(x[k : k + 1]), y[k : k + 1])
        for parameter, part in zip(cell.layer.parameters, cell.layer.unpack(row)):
            (g,) = torch.autograd.grad(loss, parameter, retain_graph=True, allow_unused=True)
            g = torch.zeros_like(parameter) if g is None else g
            if not torch.allclose(part, g, rtol=1e-6, atol=1e-10):
                assert names[id(parameter)].startswith("body")
                return False
    return True


@pytest.mark.parametrize("name", CHANGES)
def test_a_weight_that_is_used_otherwise_is_never_silent(name, double):
    """Either the rows of the layer are exact all the same, or it has none and coverage() says why."""
    torch.manual_seed(0)
    model, batch = CHANGES[name](), points(8, 1, torch.float64)
    with pytest.warns(natgrad.NatgradWarning) if name in SAID else unwarned():
        opt = natgrad.SENG(model, lr=1e-30, samples=None, sketch=None, refresh=1, momentum=0.0)
        backward(model, batch)
        opt.step()
    why = {row.layer: row.why for row in opt.coverage()}
    assert exact(opt, model, batch) == (name in EXACT)
    if name not in EXACT:
        own = [reason for layer, reason in why.items() if layer.startswith("body")]
        assert own
        assert all(reason != "known layer" for reason in own)


EXACT = {
    *("hook on the output", "hook in place"),  # the hooks of natgrad come first
    *("functional reuse", "functional alone", "transposed"),  # a weight is known by itself
    *("activation inside", "forward of its own"),
}
SAID = set(CHANGES) - EXACT
"""In a network of two layers, one is more than half of the weights or found out at the first step."""


@every_optimizer
def test_a_change_in_mid_training_is_noticed_at_the_next_measurement(kind):
    """A mask that comes after some steps, with every optimizer."""
    torch.manual_seed(0)
    model = Masked()
    on = [False]
    model.forward = lambda x: Masked.forward(model, x) if on[0] else Two.forward(model, x)
    opt = made(kind, model, lr=0.01, refresh=1)
    train(opt, model, [points(12, k) for k in range(3)])
    assert all(row.covered for row in opt.coverage())
    on[0] = True
    with pytest.warns(natgrad.NatgradWarning, match="body: its module's calls do not account for its gradient"):
        train(opt, model, [points(12, 3)])
    uncovered = {row.layer for row in opt.coverage() if not row.covered}
    assert uncovered == {"body.weight", "body.bias"}
    before = model.body.weight.detach().clone()
    train(opt, model, [points(12, 4)])
    assert not torch.equal(model.body.weight, before)


def test_strict_refuses_what_the_checksum_finds_and_nothing_is_changed():
    model = Masked()
    opt = natgrad.SPNGD(model, lr=0.1, strict=True)
    start = [p.detach().clone() for p in model.parameters()]
    backward(model, points(12, 0))
    with pytest.raises(ValueError, match="strict=True, but body: its module's calls do not account"):
        opt.step()
    assert all(torch.equal(p, s) for p, s in zip(model.parameters(), start))


def test_the_first_measurements_have_a_checksum_and_then_one_of_so_many():
    """A use of the weight elsewhere is found by the checksum alone; what the module shows is looked at every time."""
    torch.manual_seed(0)
    model = Two()
    opt = natgrad.SPNGD(model, lr=0.001, refresh=1)
    compared = []
    for k in range(40):
        compared.append(set(opt.engine.capture._checked))
        train(opt, model, [points(12, k)])
    assert compared[:FIRST] == [{0, 1}] * FIRST
    assert [k % EVERY for k in range(FIRST, 40) if 0 in compared[k]] == [0] * (32 // EVERY)
    assert [(k + 1) % EVERY for k in range(FIRST, 40) if 1 in compared[k]] == [0] * (32 // EVERY)
    model.forward = lambda x: Hidden.forward(model, x)
    said = []
    for k in range(EVERY):
        with heard() as found:
            train(opt, model, [points(12, k)])
        said += [str(w.message) for w in found]
    assert sum("body: its module's calls do not account" in text for text in said) == 1


def test_what_the_module_shows_is_noticed_between_checksums():
    torch.manual_seed(0)
    model = Masked()
    on = [False]
    model.forward = lambda x: Masked.forward(model, x) if on[0] else Two.forward(model, x)
    opt = natgrad.SPNGD(model, lr=0.001, refresh=1)
    train(opt, model, [points(12, k) for k in range(FIRST + 3)])
    assert 0 not in opt.engine.capture._checked
    on[0] = True
    with pytest.warns(natgrad.NatgradWarning, match="body: its module's calls do not account"):
        train(opt, model, [points(12, 0)])


@pytest.mark.parametrize("set_to_none", [True, False])
def test_cleared_gradients_are_noticed_between_checksums(set_to_none):
    ends = []
    for leaky in (False, True):
        torch.manual_seed(0)
        model = Two()
        opt = natgrad.SPNGD(model, lr=0.01, refresh=1)
        for k in range(FIRST + 4):
            if leaky:
                backward(model, points(5, 50 + k))
                model.zero_grad(set_to_none=set_to_none)
            backward(model, points(12, k))
            opt.step()
            opt.zero_grad()
            assert opt.engine.samples == 12
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends))


# --- the checksum where gradients are added up, scaled and sent ---


def clean(opt, model, passes, **options):
    """No layer loses its curvature in three steps of these passes."""
    for step in range(3):
        passes(step)
        opt.step()
        opt.zero_grad()
    assert all(row.covered for row in opt.coverage())


@pytest.mark.parametrize("set_to_none", [True, False])
@every_optimizer
def test_it_holds_under_accumulation_and_clipping(kind, set_to_none):
    torch.manual_seed(0)
    model = Two()
    opt = made(kind, model, lr=0.01, refresh=1)

    def passes(step):
        for k in range(3):
            (backward(model, points(8, 3 * step + k)) / 3).detach()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)

    with unwarned():
        for step in range(3):
            passes(step)
            opt.step()
            model.zero_grad(set_to_none=set_to_none)
    assert all(row.covered for row in opt.coverage())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_optimizer
def test_it_holds_in_half_precision(kind, dtype):
    """Ten measuring steps of a network with convolutions and norms, at 512 samples."""
    torch.manual_seed(0)
    model = CifarResNet(depth=8, widths=(4, 6, 8)).build((3, 8, 8), 5)
    opt = made(kind, model, lr=0.01, refresh=1)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, init_scale=2.0**10)
    x, y = torch.randn(512, 3, 8, 8), torch.randint(5, (512,))
    with unwarned():
        for _ in range(10):
            with torch.autocast("cpu", dtype):
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
    own = [row for row in opt.coverage() if row.kind != "norm"]
    assert all(row.covered for row in own)


@pytest.mark.parametrize("reentrant", [True, False])
def test_it_holds_under_activation_checkpointing(reentrant):
    class Checkpointed(Two):
        def forward(self, x):
            x = x.clone().requires_grad_()
            return self.head(checkpoint(lambda h: torch.tanh(self.body(h)), x, use_reentrant=reentrant))

    model = Checkpointed()
    opt = natgrad.SPNGD(model, lr=0.01, refresh=1)
    with unwarned():
        clean(opt, model, lambda step: backward(model, points(8, step)))


def test_a_gradient_that_a_hook_of_the_user_changes_is_noticed():
    model = Two()
    model.body.weight.register_hook(lambda g: g * (torch.rand(4, 4) > 0.5))
    opt = natgrad.SPNGD(model, lr=0.01)
    backward(model, points(8, 0))
    with pytest.warns(natgrad.NatgradWarning, match="body: its module's calls"):
        opt.step()


def test_what_a_subclass_is():
    """What is done with its weight; watched by its module's calls, its base if it has the same forward."""

    class Shifted(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x + 1, weight, bias)

    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return torch.relu(super().forward(x))

    class Kernel(nn.Linear):
        def forward(self, x):
            return Opaque.apply(x, self.weight) + self.bias

    class Scaled(Kernel):
        def forward(self, x):
            return 2 * super().forward(x)

    class Read(type(layer_of(nn.Linear(1, 1)))):
        """Watched by its module's calls, as it comes from outside."""

    layer_of.register(Kernel, lambda module: Read(module))
    for name, module in {"conv": Shifted(2, 2, 1), "norm": Own(2), "kernel": Kernel(3, 2)}.items():
        opt = quiet(natgrad.SPNGD, nn.Sequential(module), lr=0.1)
        assert opt.coverage()[0].why == "known layer", name
    why = quiet(natgrad.SPNGD, nn.Sequential(Scaled(3, 2)), lr=0.1).coverage()[0].why
    assert "Scaled has a forward of its own; natgrad knows that of Kernel" in why
    replaced = Two()
    replaced.body = Kernel(4, 4)
    replaced.body.forward = lambda x: F.linear(x, replaced.body.weight)
    assert "was replaced on the module" in quiet(natgrad.SPNGD, replaced, lr=0.1).coverage()[0].why
    model, batch = Two(), points(8, 1)
    model.body = Kernel(4, 4)
    with unwarned():
        opt = natgrad.SENG(model, lr=1e-30, samples=None, sketch=None, refresh=1, momentum=0.0)
        backward(model, batch)
        opt.step()
    assert all(row.covered for row in opt.coverage())


def test_the_statistics_of_what_is_left_are_those_without_the_others():
    """A layer that goes astray takes nothing from its neighbours."""
    torch.manual_seed(0)
    model = Masked()
    opt = natgrad.SPNGD(model, lr=1e-30, rows_per_dim=None)
    x, y = points(8, 0)
    out = model(x)
    out.retain_grad()
    F.cross_entropy(out, y).backward()
    quiet(opt.step)
    g = out.grad * 8
    torch.testing.assert_close(statistic(opt, "head", "G")[0], g.T @ g / 8)
