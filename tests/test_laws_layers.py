"""What must hold for every layer: its rows explain autograd's gradients, and its shortcuts equal its rows."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.testing import assert_close

from examples import CASES, EXAMPLES, NAMES, REFUSED, looks_across_samples
from natgrad.layers import Layer, layer_of
from natgrad.layers.norm import Norm

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def examples(chosen=lambda module: True):
    picked = [(name, b, d) for name, (_, b, d) in zip(NAMES, CASES) if chosen(b())]
    return pytest.mark.parametrize(("build", "data"), [(b, d) for _, b, d in picked], ids=[n for n, _, _ in picked])


every_example = examples()


def pull(module, x):
    """A layer, its input, the gradient of a random projection of its output, and the parameters' gradients."""
    torch.manual_seed(1)
    module = module.double()
    layer = layer_of(module)
    out = module(x)
    dy = torch.randn_like(out)
    gradients = torch.autograd.grad(out, layer.parameters, dy)
    return layer, dy, gradients


def test_every_registered_type_has_an_example():
    known = {*EXAMPLES, *REFUSED, object}
    missing = [
        t.__name__ for t in layer_of.registry if t not in known and t.__module__.startswith(("torch", "natgrad"))
    ]
    assert not missing, f"add {missing} to tests/examples.py"
    for kind, rows in EXAMPLES.items():
        assert kind in layer_of.registry
        for _, build, _ in rows:
            assert isinstance(layer_of(build()), Layer)
            assert isinstance(build(), kind)


@pytest.mark.parametrize("kind", REFUSED, ids=lambda t: t.__name__)
def test_what_has_no_layer_says_why(kind):
    build, reason = REFUSED[kind]
    assert reason in layer_of(build())


def test_a_subclass_is_its_base_and_users_register_their_own():
    class Mine(nn.Linear):
        pass

    class Other(nn.Linear):
        pass

    layer_of.register(Other, lambda module: "mine to say")
    assert layer_of(Mine(2, 3)).kind == "linear"
    assert layer_of(Other(2, 3)) == "mine to say"


@every_example
def test_rows_reproduce_the_gradient(build, data):
    x = data()
    layer, dy, gradients = pull(build(), x)
    product = torch.einsum("mbo,mbi->boi", layer.output_rows(dy), layer.rows(x))
    assert product.shape == layer.shape
    for mine, theirs in zip(layer.unpack(product), gradients):
        assert_close(mine, theirs, **EXACT)
    assert_close(layer.pack(gradients), product, **EXACT)


@examples(lambda module: not looks_across_samples(module))
def test_sample_gradients_are_those_of_the_samples_alone(build, data):
    x, module = data(), build()
    layer, dy, _ = pull(module, x)
    parameters = {k: p.detach() for k, p in module.named_parameters()}
    buffers = dict(module.named_buffers())

    def projected(parameters, x, dy):
        return (functional_call(module, (parameters, buffers), (x.unsqueeze(0),)) * dy).sum()

    expected = vmap(grad(projected), (None, 0, 0))(parameters, x, dy)
    n, s = layer.count(x)
    mine = layer.sample_gradients(layer.rows(x), layer.output_rows(dy), n)
    assert (n, n * s) == (len(x), len(layer.rows(x)))
    names = {id(p): k for k, p in module.named_parameters()}
    for k in range(n):
        for part, parameter in zip(layer.unpack(mine[k]), layer.parameters):
            assert_close(part, expected[names[id(parameter)]][k], **EXACT)


@every_example
def test_shortcuts_equal_products_of_rows(build, data):
    x = data()
    layer, dy, _ = pull(build(), x)
    a, g = layer.rows(x), layer.output_rows(dy)
    second = torch.einsum("mbi,mbj->bij", a, a) / len(a)
    assert_close(layer.second_moment(x), second, **EXACT)
    assert_close(layer.mean_square(x), second.diagonal(dim1=1, dim2=2), **EXACT)
    assert_close(layer.output_moment(dy), torch.einsum("mbo,mbp->bop", g, g), **EXACT)
    assert layer.second_moment_cost(x) > 0
    if layer.diagonal_inputs:
        assert_close(second, torch.diag_embed(second.diagonal(dim1=1, dim2=2)), **EXACT)


@every_example
def test_unpack_undoes_pack(build, data):
    layer = layer_of(build().double())
    matrix = torch.randn(layer.shape, dtype=torch.float64)
    tensors = layer.unpack(matrix)
    assert [t.shape for t in tensors] == [p.shape for p in layer.parameters]
    assert torch.equal(layer.pack(tensors), matrix)
    assert layer.shape.numel == sum(p.numel() for p in layer.parameters)


@every_example
def test_an_index_selects_rows(build, data):
    x = data()
    layer, dy, _ = pull(build(), x)
    total = len(layer.rows(x))
    index = torch.tensor([0, total - 1, total // 2, total // 2])
    assert_close(layer.rows(x, index), layer.rows(x)[index], **EXACT)
    assert_close(layer.output_rows(dy, index), layer.output_rows(dy)[index], **EXACT)


@every_example
def test_half_precision_is_promoted(build, data):
    x = data()
    module = build().bfloat16()
    x = x.bfloat16() if x.is_floating_point() else x
    layer = layer_of(module)
    dy = torch.randn_like(module(x))
    assert layer.rows(x).dtype == torch.float32
    assert layer.output_rows(dy).dtype == torch.float32
    assert layer.second_moment(x).dtype == layer.output_moment(dy).dtype == torch.float32


@examples(lambda module: isinstance(layer_of(module), Norm))
def test_norms_normalise_chosen_samples_in_the_statistics_of_all(build, data):
    x, module = data(), build().double()
    layer = layer_of(module)
    everything = layer.normalized(x)
    chosen = torch.tensor([3, 1])
    assert_close(layer.normalized(x, chosen), everything[chosen], **EXACT)
    assert_close(layer.normalized(x, chosen, module(x)), everything[chosen], **EXACT)  # from the graph


@every_example
def test_a_scale_is_that_of_a_healthy_weight(build, data):
    layer = layer_of(build())
    assert 0.01 < layer.scale < 2
