"""Convolutions of every geometry explain autograd's gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from natgrad.layers import layer_of

EXACT = {"rtol": 1e-9, "atol": 1e-11}


@st.composite
def convolutions(draw):
    """A convolution and the shape of an input that it takes."""
    dims = draw(st.integers(1, 3))
    top = 3 if dims == 3 else 4

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, dilation = each(1, 3), each(1, 2)
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "circular", "replicate"]))
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    c_in = groups * draw(st.sampled_from([1, 2] if groups > 1 else [1, 3, 8]))
    c_out = groups * draw(st.integers(1, 2))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel)]
    size = tuple(draw(st.integers(max(4, r + 1), top + 5)) for r in reach)
    stride = draw(st.sampled_from([(1,) * dims, each(1, 3)]))
    padding = draw(st.sampled_from(["valid", "same", "numbers", "numbers"]))
    if padding == "same":
        stride = (1,) * dims
    if padding == "numbers":
        padding = each(0, 2)
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    bias = draw(st.booleans())
    module = conv(c_in, c_out, kernel, stride, padding, dilation, groups, bias, mode).double()
    return module, (draw(st.integers(1, 3)), c_in, *size), draw(st.booleans())


@settings(max_examples=400, deadline=None, derandomize=True)
@given(convolutions())
def test_rows_reproduce_gradients_of_any_geometry(case):
    module, shape, last = case
    x = torch.randn(shape, dtype=torch.float64)
    if last and len(shape) > 3:
        x = x.to(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    layer = layer_of(module)
    out = module(x)
    dy = torch.randn_like(out)
    a, g = layer.rows(x), layer.output_rows(dy)
    assert layer.count(x) == (len(x), out[0, 0].numel())
    gradients = torch.autograd.grad(out, layer.parameters, dy)
    for mine, theirs in zip(layer.unpack(torch.einsum("mbo,mbi->boi", g, a)), gradients):
        assert_close(mine, theirs, **EXACT)
    second = torch.einsum("mbi,mbj->bij", a, a) / len(a)
    assert_close(layer.second_moment(x), second, **EXACT)
    assert_close(layer.mean_square(x), second.diagonal(dim1=1, dim2=2), **EXACT)
    assert_close(layer.output_moment(dy), torch.einsum("mbo,mbp->bop", g, g), **EXACT)
    index = torch.randint(len(a), (5,)).sort().values
    assert_close(layer.rows(x, index), a[index], **EXACT)
    assert_close(layer.output_rows(dy, index), g[index], **EXACT)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 3)),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 3)),
    st.tuples(st.integers(0, 4), st.integers(0, 4)),
    st.booleans(),
)
def test_offsets_equal_rows_where_they_apply(kernel, padding, dilation, more, bias):
    """The exact A of stride-1 convolutions, derived from correlations instead of patches."""
    size = [d * (k - 1) + 1 + m for k, d, m in zip(kernel, dilation, more)]
    module = nn.Conv2d(8, 2, kernel, 1, padding, dilation, bias=bias).double()
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    layer = layer_of(module)
    assert layer.offsets_apply(x)
    a = layer.rows(x)[:, 0]
    assert_close(layer.second_moment(x)[0], a.T @ a / len(a), **EXACT)


@pytest.mark.parametrize("line", [0, 2**16], ids=["shifts", "tables"])
@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=convolutions())
def test_patches_times_a_vector_are_what_the_rows_say(line, case):
    module, shape, last = case
    x = torch.randn(shape, dtype=torch.float64)
    if last and len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    layer, generator = layer_of(module), torch.Generator().manual_seed(0)
    u = layer.probe(generator=generator, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("natgrad.layers.conv.LINE", line)
        found = layer.projected(x, u).transpose(1, 2).flatten(0, 1)
    expected = torch.einsum("mbi,bi->mb", layer.rows(x), layer.written_out(u))
    assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(
    ("shape", "kernel", "padding", "dilation"),
    [
        ((4, 8, 6, 7), 3, 1, 1),
        ((3, 16, 1, 5), 3, 1, 1),
        ((3, 8, 9, 8), (3, 2), (0, 1), (2, 3)),
        ((2, 8, 9, 9), 5, 2, 1),
        ((2, 8, 6, 6), 3, 2, 1),
    ],
    ids=str,
)
def test_offsets_equal_unfolded_patches(shape, kernel, padding, dilation, last, monkeypatch):
    x = torch.randn(shape, dtype=torch.float64)
    x = x.to(memory_format=torch.channels_last) if last else x
    layer = layer_of(nn.Conv2d(shape[1], 2, kernel, 1, padding, dilation, bias=False).double())
    patches = F.unfold(x, kernel, dilation, padding).transpose(1, 2).flatten(0, 1)  # columns (channel, tap)
    patches = patches.unflatten(1, (shape[1], -1)).transpose(1, 2).flatten(1)
    expected = patches.T @ patches / len(patches)
    assert layer.offsets_apply(x) == (shape[2] > 2)
    assert_close(layer.second_moment(x)[0], expected, **EXACT)
    monkeypatch.setattr("natgrad.layers.conv_moment.CHUNK", x[0].numel())  # one image at a time
    assert_close(layer.second_moment(x)[0], expected, **EXACT)


def test_an_image_without_a_batch_is_a_batch_of_one():
    module = nn.Conv2d(2, 3, 3).double()
    x = torch.randn(2, 5, 5, dtype=torch.float64)
    layer = layer_of(module)
    assert layer.count(x) == (1, 9)
    assert torch.equal(layer.rows(x), layer.rows(x.unsqueeze(0)))
    assert torch.equal(layer.output_rows(module(x)), layer.output_rows(module(x.unsqueeze(0))))


@pytest.mark.parametrize("channels", [3, 8])
def test_large_batches_are_cut_into_chunks(channels, monkeypatch):
    monkeypatch.setattr("natgrad.layers.conv.CHUNK", 500)
    module = nn.Conv2d(channels, 2, 3, stride=2, padding=1).double()
    x = torch.randn(9, channels, 6, 6, dtype=torch.float64)
    layer = layer_of(module)
    a = layer.rows(x)[:, 0]
    assert_close(layer.second_moment(x)[0], a.T @ a / len(a), **EXACT)
