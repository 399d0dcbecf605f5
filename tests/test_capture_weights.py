"""A layer is what is done with its weight: exact for whoever uses a weight himself, whatever his modules are called."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import natgrad
from helpers import backward, heard, statistic, unwarned
from natgrad import weight_calls
from natgrad.curvature.per_sample import explicit

N = 5


def seeded(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


TEXT = torch.randint(0, 9, (N, 4), generator=torch.Generator().manual_seed(2))
LABELS = torch.arange(N) % 3


class Attention(nn.Module):
    """torch's attention on x, or on other keys and values. `kind`: what queries, keys and values have in common."""

    def __init__(self, kind="self", first=True):
        super().__init__()
        self.kind, self.first = kind, first
        self.attention = nn.MultiheadAttention(8, 2, batch_first=first)
        self.keys, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.tanh(self.keys(x))
        keys = torch.cat([x, x * x], 1)
        x, keys = (x, keys) if self.first else (x.transpose(0, 1), keys.transpose(0, 1))
        others = {"self": (x, x), "keys": (keys, keys), "all": (keys, 2 * keys)}[self.kind]
        out = self.attention(x, *others)[0]
        return self.head(torch.tanh(out if self.first else out.transpose(0, 1)).mean(1))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.inner(x).mean(1))


class Across(nn.Module):
    """A weight [in, out], as GPT-2 has it."""

    def __init__(self, inner, out):
        super().__init__()
        self.weight, self.bias = nn.Parameter(seeded(inner, out)), nn.Parameter(seeded(out))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


class Gpt(nn.Module):
    """The square one is of the type of another that shows which side is which."""

    def __init__(self):
        super().__init__()
        self.wide, self.square, self.head = Across(8, 12), Across(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.square(torch.tanh(self.wide(x)))).mean(1))


class Matrices(nn.Module):
    """Parameters of its own, used from the right and from the left, and places that are added."""

    def __init__(self):
        super().__init__()
        self.right, self.left = nn.Parameter(seeded(8, 6)), nn.Parameter(seeded(7, 4))
        self.places = nn.Parameter(seeded(1, 4, 8))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.left @ torch.tanh((x + self.places) @ self.right)).mean(1))


class Bias(nn.Linear):
    """A linear layer that adds its bias by itself."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Apart(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = Bias(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x)).mean(1))


class Tied(nn.Module):
    """One weight looks tokens up and scores them."""

    def __init__(self, bias=False):
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=bias)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.inner(self.table(tokens))))


class Placed(nn.Module):
    """Places are looked up once for all samples."""

    def __init__(self, deep=False):
        super().__init__()
        self.table, self.places, self.deep = nn.Embedding(9, 8), nn.Embedding(6, 8), deep
        self.head = nn.Linear(8, 9)

    def forward(self, tokens):
        places = torch.arange(1, 5)
        return self.head(torch.tanh(self.table(tokens) + self.places(places[None] if self.deep else places)))


class Root(nn.Module):
    """A root mean square norm, written out. `plus`: added to its weight (Gemma)."""

    def __init__(self, plus=0.0):
        super().__init__()
        self.weight, self.plus = nn.Parameter(torch.rand(8, dtype=torch.float64) + 0.5), plus

    def forward(self, x):
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return x * (self.plus + self.weight) if self.plus else self.weight * x


class Rooted(nn.Module):
    def __init__(self, plus=0.0):
        super().__init__()
        self.inner, self.norm, self.head = nn.Linear(8, 8), Root(plus), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.inner(x))).mean(1))


class Windows(nn.Module):
    """Windows of places in the place of samples, as in Swin."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.norm, self.root = nn.Conv2d(3, 8, 1), nn.Linear(8, 8), nn.LayerNorm(8), Root()
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        n = len(x)
        x = self.embed(x).permute(0, 2, 3, 1).reshape(n * 9, 4, 8)
        return self.head(torch.tanh(self.root(self.norm(torch.tanh(self.inner(x))))).view(n, 36, 8).mean(1))


class Channels(nn.Module):
    """A layer norm over the channels of images, written out."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.rand(6, dtype=torch.float64) + 0.5) for _ in range(2))

    def forward(self, x):
        x = x - x.mean(1, keepdim=True)
        x = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class Same(nn.Conv2d):
    """Pads by itself."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Active(nn.BatchNorm2d):
    def forward(self, x):
        return torch.relu(super().forward(x))


class Pictures(nn.Module):
    def __init__(self):
        super().__init__()
        self.same, self.channels, self.active = Same(3, 6, 3, stride=2), Channels(), Active(6)
        self.up, self.head = nn.ConvTranspose2d(6, 4, 3, 2, 1), nn.Linear(4, 3)

    def forward(self, x):
        x = self.active(torch.tanh(self.channels(self.same(x))))
        return self.head(torch.tanh(self.up(x)).mean((2, 3)))


class Recurrent(nn.Module):
    """A head over what recurrent layers give. `packed`: sequences end where there are only zeros."""

    def __init__(self, inner, packed=False):
        super().__init__()
        self.inner, self.packed = inner, packed
        self.head = nn.Linear((inner.proj_size or inner.hidden_size) * (1 + inner.bidirectional), 3)

    def forward(self, x):
        first = self.inner.batch_first
        if self.packed:
            lengths = (x != 0).any(2).sum(1)
            x = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
            return self.head(nn.utils.rnn.pad_packed_sequence(self.inner(x)[0], batch_first=True)[0].sum(1))
        out = self.inner(x if first else x.transpose(0, 1))[0]
        return self.head(out.mean(1 if first else 0))


class Cells(nn.Module):
    """A loop over cells."""

    def __init__(self):
        super().__init__()
        self.lstm, self.gru, self.head = nn.LSTMCell(8, 5), nn.GRUCell(5, 4, bias=False), nn.Linear(4, 3)

    def forward(self, x):
        state = h = None
        for step in x.unbind(1):
            state = self.lstm(step, state)
            h = self.gru(state[0], h)
        return self.head(h)


class Scaled(nn.Module):
    """Vectors in a dictionary, as adapters keep them, times one (IA3), and a magnitude over a norm (DoRA)."""

    def __init__(self):
        super().__init__()
        self.inner, self.down, self.up = nn.Linear(8, 8), nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)
        self.vectors = nn.ParameterDict({"one": seeded(8, 1), "other": seeded(2)})
        self.weight, self.head = nn.Parameter(seeded(8)), nn.Linear(8, 3)

    def forward(self, x):
        with torch.no_grad():
            norm = (self.inner.weight + 2).norm(dim=1)
        whole = self.up(self.down(torch.eye(8, dtype=x.dtype))).detach()  # calls that no gradient reaches
        scale = 1
        scale *= self.vectors["one"].flatten()
        share = (self.weight / (norm + whole.diagonal().abs())).view(1, -1)
        low = self.up(self.vectors["other"] * self.down(x))
        return self.head(torch.tanh((share - 1) * self.inner(x) * scale + share * low * 0.5).mean(1))


class Relative(nn.Module):
    """Attention to which what places have to do with each other is added: from a table or a network of coordinates.

    kind: how it is added. `table`: by whole numbers that the model makes of places (as many as there are samples).
    """

    def __init__(self, kind="plus", table=True, places=N):
        super().__init__()
        self.kind, self.places = kind, places
        self.pack, self.head = nn.Linear(8, 24), nn.Linear(8, 3)
        if table:
            self.bias = nn.Embedding(2 * places - 1, 2)
        else:
            self.bias = nn.Sequential(nn.Linear(1, 6), nn.ReLU(inplace=True), nn.Linear(6, 2, bias=False))
            self.register_buffer("coordinates", torch.linspace(-1, 1, 2 * places - 1).view(1, -1, 1))
            self.register_buffer("index", torch.arange(places)[:, None] - torch.arange(places) + places - 1)

    def relative(self):
        if isinstance(self.bias, nn.Embedding):
            places = torch.arange(self.places)
            return self.bias(places[:, None] - places + self.places - 1).permute(2, 0, 1).unsqueeze(0)
        table = self.bias(self.coordinates).view(-1, 2)
        return 4 * torch.sigmoid(table[self.index.view(-1)].view(self.places, self.places, 2).permute(2, 0, 1))

    def forward(self, x):
        x = x.reshape(-1, self.places, 8)  # windows of places
        q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in self.pack(x).chunk(3, 2))
        bias = self.relative()
        if self.kind == "mask":
            bias = bias if bias.dim() == 4 else bias.unsqueeze(0)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            if self.kind == "where":
                bias = torch.where(x[:, None, :1, :1] + torch.eye(self.places) > 0, bias, -1e9)
            seen = torch.zeros(len(x), 1, self.places, self.places, dtype=x.dtype)
            seen[:, :, 0, -1] = -1e9
            scores = q @ k.mT
            scores += bias + seen if self.kind == "twice" else bias
            out = scores.softmax(3) @ v
            out = out + (q @ k.mT + bias).softmax(3) @ v if self.kind == "twice" else out
        return self.head(out.transpose(1, 2).flatten(2).reshape(-1, 10, 8).mean(1))


class ZeroedBias(nn.Module):
    """Keys have no bias, as in Swin V2: a part of a copy is set to zero."""

    def __init__(self):
        super().__init__()
        self.pack, self.head = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x):
        bias = self.pack.bias.clone()
        bias[8:16].zero_()
        q, k, v = F.linear(x, self.pack.weight, bias).chunk(3, 2)
        return self.head(((q @ k.mT).softmax(2) @ v).mean(1))


class Overwritten(nn.Module):
    """What a product of three dimensions gives is a view, and is overwritten."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.inner(x).relu_().mean(1))


SEQUENCES = {
    "overwritten": Overwritten,
    "relative places": Relative,
    "relative places, twice": lambda: Relative("twice"),
    "relative places, as a mask": lambda: Relative("mask"),
    "relative places, where they are seen": lambda: Relative("where"),
    "relative places, of windows": lambda: Relative(places=2),
    "relative coordinates": lambda: Relative(table=False),
    "relative coordinates, as a mask": lambda: Relative("mask", table=False, places=2),
    "no bias of keys": ZeroedBias,
    "adapters": Scaled,
    "lstm": lambda: Recurrent(nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True)),
    "lstm, smaller states": lambda: Recurrent(nn.LSTM(8, 6, batch_first=True, proj_size=4)),
    "gru, time first": lambda: Recurrent(nn.GRU(8, 6, 2)),
    "rnn": lambda: Recurrent(nn.RNN(8, 6, bias=False, batch_first=True, nonlinearity="relu")),
    "lstm, packed": lambda: Recurrent(nn.LSTM(8, 6, batch_first=True, bidirectional=True), packed=True),
    "cells": Cells,
    "attention": Attention,
    "attention, time first": lambda: Attention(first=False),
    "attention, other keys": lambda: Attention("keys"),
    "attention, other values": lambda: Attention("all"),
    "attention, other values, time first": lambda: Attention("all", False),
    "encoder": Encoder,
    "gpt": Gpt,
    "matrices": Matrices,
    "bias apart": Apart,
    "root mean square norm": Rooted,
    "root mean square norm, one added": lambda: Rooted(1.0),
}
IMAGES = {"windows": Windows, "pictures": lambda: Pictures().eval()}
TOKENS = {
    "places": Placed,
    "places of one sample": lambda: Placed(True),
    "tied": Tied,
    "tied, with a bias": lambda: Tied(True),
}


def case(name):
    """A model, and its mean loss over the samples of an index."""
    torch.manual_seed(0)
    if name in TOKENS:
        return TOKENS[name]().double(), lambda m, k: F.cross_entropy(m(TEXT[k]).flatten(0, 1), TEXT[k].flatten())
    x = seeded(N, 10 if "relative" in name else 4, 8) if name in SEQUENCES else seeded(N, 3, 6, 6)
    if "packed" in name:
        x = x * (torch.arange(4) < torch.tensor([4, 3, 3, 2, 1]).unsqueeze(1)).unsqueeze(2)
    build = SEQUENCES.get(name) or IMAGES[name]
    return build().double(), lambda m, k: F.cross_entropy(m(x[k]), LABELS[k])


@pytest.mark.parametrize("name", [*SEQUENCES, *IMAGES, *TOKENS])
def test_rows_are_the_gradients_of_single_samples(name):
    model, loss = case(name)
    with nullcontext() if "time first" in name else unwarned():  # layers outside have samples first
        opt = natgrad.SENG(model, lr=1e-30, samples=None, sketch=None, refresh=1, momentum=0.0)
        loss(model, slice(None)).backward()
        opt.step()
    opt.engine.capture.disarm()
    assert all(row.covered for row in opt.coverage())
    assert opt.engine.samples == N
    predictions = opt.assumed.predictions
    for k in range(N):
        alone = torch.autograd.grad(loss(model, slice(k, k + 1)), list(model.parameters()))
        known = dict(zip(model.parameters(), alone))
        for cell in opt.cells:
            own = explicit(cell.kept(), cell.layer.shape)[k] * (N / predictions) ** 0.5
            for parameter, part in zip(cell.layer.parameters, cell.layer.unpack(own)):
                assert_close(part.reshape(parameter.shape), known[parameter], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", [*SEQUENCES, *IMAGES, *TOKENS])
def test_a_weight_in_several_places_is_counted_and_placed_once(name):
    model, _ = case(name)
    opt = natgrad.SPNGD(model, lr=0.01)
    assert sum(row.parameters for row in opt.coverage()) == sum(p.numel() for p in model.parameters())
    placed = [id(p) for cell in opt.cells for p in cell.layer.parameters]
    assert len(placed) == len(set(placed)) == len(list(model.parameters()))


@pytest.mark.parametrize("kind", [natgrad.SPNGD, natgrad.SENG], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", ["lstm", "gru, time first", "lstm, packed", "cells"])
def test_recurrent_layers_run_as_torch_has_them_where_nothing_is_measured(name, kind, monkeypatch):
    """Written out in the steps that measure, to rounding; else in torch's own function, to the last bit."""
    model, loss = case(name)
    opt, written = kind(model, lr=0.1, refresh=2), []
    whole = weight_calls.written_out
    monkeypatch.setattr(weight_calls, "written_out", lambda func, args: written.append(func) or whole(func, args))
    with unwarned():
        for step in range(4):
            written.clear()
            value = loss(model, slice(None))
            with torch.no_grad():
                plain = loss(model, slice(None))
            assert bool(written) == (step % 2 == 0)
            assert_close(value.detach(), plain, rtol=1e-12 if step % 2 == 0 else 0, atol=0)
            value.backward()
            opt.step()
            opt.zero_grad()
    assert opt.coverage().share == 1
    assert not opt.engine.drops


def test_the_factors_of_attention_are_those_of_its_product():
    """Queries, keys and values are one product of 24 outputs: A the mean of its inputs, G the sum of its gradients."""
    model, loss = case("attention")
    opt = natgrad.SPNGD(model, lr=1e-30, rows_per_dim=None)
    attention = model.attention
    loss(model, slice(None)).backward()
    opt.step()
    opt.engine.capture.disarm()
    x = torch.tanh(model.keys(seeded(N, 4, 8))).detach()
    product = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    product.retain_grad()
    q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in product.chunk(3, 2))
    out = attention.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    F.cross_entropy(model.head(torch.tanh(out).mean(1)), LABELS).backward()
    a, g = torch.cat([x, torch.ones(N, 4, 1, dtype=x.dtype)], 2).flatten(0, 1), N * product.grad.flatten(0, 1)
    assert_close(statistic(opt, "attention.in_proj", "A")[0], a.T @ a / len(a))
    assert_close(statistic(opt, "attention.in_proj", "G")[0], g.T @ g / N)


class Routed(nn.Module):
    """Each token goes to one of three experts by its number; the last expert sees none."""

    def __init__(self, across=False, grouped=False, width=6):
        super().__init__()
        shape = (4, 8, width) if across else (4, width, 8)
        self.across, self.grouped = across, grouped
        self.table, self.experts, self.head = nn.Embedding(9, 8), nn.Parameter(seeded(*shape)), nn.Linear(width, 3)

    def forward(self, tokens):
        x, which = torch.tanh(self.table(tokens)).flatten(0, 1), tokens.flatten() % 3
        order = which.argsort()
        counts = which.bincount(minlength=4)
        if self.grouped:
            weight = self.experts if self.across else self.experts.transpose(1, 2)
            y = F.grouped_mm(x[order], weight, offs=counts.cumsum(0).int())
        else:
            parts = x[order].split(counts.tolist())
            y = torch.cat([p @ w if self.across else F.linear(p, w) for p, w in zip(parts, self.experts)])
        y = torch.zeros_like(y).index_copy(0, order, y)
        return self.head(torch.tanh(y).unflatten(0, tokens.shape).mean(1))


@pytest.mark.parametrize("across", [False, True])
def test_experts_are_blocks_of_the_rows_that_each_has_seen(across):
    torch.manual_seed(0)
    model = Routed(across).double()
    parts = torch.nn.ModuleList(nn.Linear(8, 6, bias=False) for _ in range(4)).double()
    opt = natgrad.SPNGD(model, lr=1e-30, rows_per_dim=None)
    tokens = TEXT
    with torch.no_grad():
        rows = torch.tanh(model.table(tokens)).flatten(0, 1)
    # the same network with a module for every expert, whose inputs and gradients are looked at
    for expert, part in enumerate(parts):
        part.weight.data.copy_(model.experts[expert].T if across else model.experts[expert])
    which = tokens.flatten() % 3
    outputs = [part(rows[which == k]) for k, part in enumerate(parts)]
    for out in outputs:
        out.retain_grad()
    y = torch.zeros(len(rows), 6, dtype=torch.float64)
    for k, out in enumerate(outputs):
        y = y.index_put((torch.where(which == k)[0],), out)
    F.cross_entropy(model.head(torch.tanh(y).unflatten(0, tokens.shape).mean(1)), LABELS).backward()
    model.zero_grad()
    F.cross_entropy(model(tokens), LABELS).backward()
    opt.step()
    a, g = statistic(opt, "experts", "A"), statistic(opt, "experts", "G")
    for k in range(3):
        own, grads = rows[which == k], N * outputs[k].grad
        inputs, gradients = own.T @ own / len(own), grads.T @ grads / N
        expected = torch.kron(gradients, inputs)
        mine = torch.kron(a[k], g[k]) if across else torch.kron(g[k], a[k])
        if across:  # inputs and outputs have changed sides: the product is the same
            sides = g[k] / g[k].trace() * inputs.trace(), a[k] / a[k].trace() * gradients.trace()
            assert_close(sides[0], inputs)
            assert_close(sides[1], gradients)
            assert_close(mine.trace(), expected.trace())
        else:
            assert_close(mine, expected)
    assert a[3].abs().sum() == g[3].abs().sum() == 0


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this version of torch has no grouped product")
@pytest.mark.parametrize("across", [False, True])
def test_a_grouped_product_is_that_of_the_experts_one_after_the_other(across):
    found = []
    for grouped in (False, True):
        torch.manual_seed(0)
        model = Routed(across, grouped, width=8).float()
        opt = natgrad.SPNGD(model, lr=1e-30, rows_per_dim=None)
        F.cross_entropy(model(TEXT), LABELS).backward()
        opt.step()
        assert all(row.covered for row in opt.coverage())
        a, g = statistic(opt, "experts", "A"), statistic(opt, "experts", "G")
        of_a, of_g = (m.diagonal(dim1=1, dim2=2).sum(1).view(-1, 1, 1) for m in (a, g))
        found.append((a * of_g, g * of_a))  # a call that has changed sides has a scale of its own
    for one, other in zip(*found):
        assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_experts_have_no_rows_of_samples():
    model = Routed().double()
    opt = natgrad.SENG(model, lr=0.1)
    why = {row.layer: row.why for row in opt.coverage()}
    assert why["experts"] == "which of its rows are of which sample cannot be seen"


class Shapes(nn.Module):
    """A parameter that looks like a matrix and is none."""

    def __init__(self):
        super().__init__()
        self.rates, self.head = nn.Parameter(seeded(3, 4)), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(x.mean(1)) * torch.exp(self.rates).sum()


def test_a_guess_that_does_not_hold_is_said_in_the_table_alone():
    model = Shapes().double()
    opt = natgrad.SPNGD(model, lr=0.01)
    with heard() as said:
        F.cross_entropy(model(seeded(N, 4, 8)), LABELS).backward()
        opt.step()
    assert not said
    why = {row.layer: row.why for row in opt.coverage()}
    assert why["rates"] == "no layer is registered for Shapes, which does not use it as its shape suggests"
    model = Shapes().double()
    opt = natgrad.SPNGD(model, lr=0.01, strict=True)
    backward(model, (seeded(N, 4, 8), LABELS))
    with pytest.raises(ValueError, match="strict=True, but rates: no layer is registered for Shapes"):
        opt.step()


def test_plain_steps_see_no_functions():
    """Where nothing is measured there is no mode, and no hook on a module."""
    model, loss = case("encoder")
    opt = natgrad.SPNGD(model, lr=0.01, refresh=3)
    seen = []
    model.head.register_forward_pre_hook(lambda *_: seen.append(torch._C._len_torch_function_stack()))
    for measures in (True, False, False, True):
        assert opt.engine.capture.armed == measures
        loss(model, slice(None)).backward()
        opt.step()
        opt.zero_grad()
        assert seen.pop() == int(measures)
        assert torch._C._len_torch_function_stack() == 0


def test_an_interrupted_pass_leaves_no_mode():
    model, loss = case("encoder")
    opt = natgrad.SPNGD(model, lr=0.01, refresh=1)
    handle = model.inner.layers[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        loss(model, slice(None))
    handle.remove()
    loss(model, slice(None)).backward()
    opt.step()
    assert torch._C._len_torch_function_stack() == 0
    assert all(row.covered for row in opt.coverage())


def test_an_evaluation_stays_compiled_while_a_step_is_to_be_measured():
    torch._dynamo.reset()
    runs = []

    def backend(graph, inputs):
        return lambda *args: runs.append(1) or graph(*args)

    model = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))
    other = torch.compile(nn.Linear(8, 3), backend=backend)
    opt = natgrad.SPNGD(model, lr=0.01, refresh=1)
    compiled = torch.compile(model, backend=backend)
    x, y = seeded(N, 8).float(), LABELS
    for _ in range(2):
        backward(compiled, (x, y))
        opt.step()
    assert opt.engine.capture.armed
    assert not runs
    with torch.no_grad():
        compiled(x), other(x)
    assert len(runs) == 2
    torch._dynamo.reset()


def test_an_optimizer_that_is_collected_in_the_middle_of_a_pass_leaves_no_mode():
    """A forgotten optimizer watches until it is collected, and that may be while its model computes."""
    model, loss = case("encoder")
    opt = natgrad.SPNGD(model, lr=0.01)
    capture = weakref.ref(opt.engine.capture)
    model.head.register_forward_pre_hook(lambda *_: (gc.collect(), None)[1])
    del opt
    loss(model, slice(None))
    assert torch._C._len_torch_function_stack() == 0
    gc.collect()
    assert capture() is None
