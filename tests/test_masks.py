"""What a language model's loss counts: masked labels, padded places, shifted tokens, micro-batches of several lengths.

The references know nothing of natgrad: torch's forward hooks and autograd give every layer's rows, in double precision.
"""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import natgrad
from helpers import clone, made, row, said_by, statistic, weights
from natgrad.capture import Sampler
from natgrad.curvature import kronecker
from natgrad.curvature.curvature import RowSum
from natgrad.curvature.kronecker import InputMoment, OutputMoment, among
from natgrad.layers import layer_of
from natgrad.layers.layer import all_counted
from natgrad.layers.layer import counted as counted_rows
from natgrad.parallel import World, run_threads

IGNORED, PADDING, TOKENS = -100, 0, 9
DAMPING = 0.05


class Reader(nn.Module):
    """A causal language model that is given a mask of its valid tokens. `recompute`: under activation checkpointing."""

    def __init__(self, recompute=False):
        super().__init__()
        self.embed = nn.Embedding(TOKENS, 6)
        self.norm = nn.LayerNorm(6)
        self.pack = nn.Linear(6, 18, bias=False)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, TOKENS)
        self.recompute = recompute

    def forward(self, tokens, valid):
        hidden = self.embed(tokens)
        if self.recompute:
            return self.head(checkpoint(self.attend, hidden, valid, use_reentrant=False))
        return self.head(self.attend(hidden, valid))

    def attend(self, hidden, valid):
        q, k, v = self.pack(self.norm(hidden)).chunk(3, -1)
        places = valid.shape[1]
        seen = torch.ones(places, places, dtype=torch.bool).tril() & valid.unsqueeze(1)
        seen = seen | torch.eye(places, dtype=torch.bool)  # a padded place sees itself
        scores = (q @ k.mT).masked_fill(~seen, -math.inf)
        return torch.tanh(self.mix(scores.softmax(-1) @ v)) + hidden


class TiedReader(Reader):
    """Its head is its table."""

    def __init__(self):
        super().__init__()
        del self.head

    def forward(self, tokens, valid):
        return self.attend(self.embed(tokens), valid) @ self.embed.weight.T


def texts(lengths, prompt=2, seed=0):
    """Tokens padded to the longest text, which are valid, and the next tokens, ignored in prompts and padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, TOKENS, (len(lengths), max(lengths)), generator=generator)
    valid = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    tokens = torch.where(valid, tokens, PADDING)
    labels = torch.where(valid, tokens, IGNORED)
    labels[:, :prompt] = IGNORED
    return tokens, valid, labels


BATCHES = [texts([7, 4, 3, 9], seed=1), texts([3, 5, 4, 3], seed=2)]  # padded to 9 and to 5
FULL = [texts([6, 6, 6, 6], prompt=0, seed=3), BATCHES[0]]  # in the first one all rows but the last ones count


def counted(batches):
    """The predictions of a step: labels, but for the first place, which nothing predicts."""
    return sum(int((labels[:, 1:] != IGNORED).sum()) for *_, labels in batches)


def summed(model, batch):
    tokens, valid, labels = batch
    logits = model(tokens, valid)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")


def reader(kind=Reader, **options):
    torch.manual_seed(0)
    return kind(**options).double()


def rows_of(model, batches):
    """For every layer the pairs of inputs and output gradients of each forward pass, of the mean over all labels."""
    found, handles = {}, []
    for name, module in model.named_children():
        found[name] = []
        keep = found[name].append
        handles.append(module.register_forward_hook(lambda _, x, y, keep=keep: keep((x[0].detach(), y))))
    loss = sum(summed(model, batch) for batch in batches) / counted(batches)
    for handle in handles:
        handle.remove()
    outputs = [y for calls in found.values() for _, y in calls]
    gradients = iter(torch.autograd.grad(loss, outputs))
    return {name: [(x, next(gradients)) for x, _ in calls] for name, calls in found.items()}


def factors(module, calls, predictions):
    """A over the rows that have a gradient, and G: of one layer of the reader."""
    rows = torch.cat([x.flatten(0, 1) if x.dim() > 2 else F.one_hot(x.flatten(), TOKENS).double() for x, _ in calls])
    if getattr(module, "bias", None) is not None:
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], 1)
    gradients = torch.cat([g.flatten(0, 1) for _, g in calls])
    live = gradients.abs().amax(1) > 0
    a = rows[live].T @ rows[live] / live.sum()
    return (torch.diag(a.diagonal()) if rows.shape[1] == TOKENS else a), predictions * gradients.T @ gradients


def unit_blocks(module, calls, predictions):
    """The 2 x 2 blocks of a layer normalisation."""
    total = torch.zeros(6, 2, 2, dtype=torch.float64)
    for x, g in calls:
        hat = F.layer_norm(x, (6,), eps=module.eps)
        u = torch.stack([(g * hat).sum(1), g.sum(1)], -1)
        total += torch.einsum("nui,nuj->uij", u, u)
    return predictions * total


def expected(model, batches, norms):
    """Statistics by layer, and the displacement of one step with lr = 1."""
    predictions = counted(batches)
    calls = rows_of(model, batches)
    loss = sum(summed(model, batch) for batch in batches) / predictions
    gradients = dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters()))))
    found, moved = {}, {}
    for name, module in model.named_children():
        g = {key: gradients[f"{name}.{key}"] for key in module._parameters if module._parameters[key] is not None}
        if name == "norm":
            found[name] = {"F": unit_blocks(module, calls[name], predictions)}
            pair = torch.stack([g["weight"], g["bias"]], -1)
            damped = found[name]["F"] + DAMPING * torch.eye(2, dtype=torch.float64)
            pair = torch.linalg.solve(damped, pair) if norms else pair
            moved |= {"norm.weight": pair[:, 0], "norm.bias": pair[:, 1]}
            continue
        a, s = factors(module, calls[name], predictions)
        found[name] = {"A": a, "G": s}
        matrix = g["weight"].T if name == "embed" else g["weight"]
        matrix = torch.cat([matrix, g["bias"].unsqueeze(1)], 1) if "bias" in g else matrix
        pi = (a.diagonal().mean() / s.diagonal().mean()).sqrt()
        left = s + DAMPING**0.5 / pi * torch.eye(len(s), dtype=torch.float64)
        right = a + DAMPING**0.5 * pi * torch.eye(len(a), dtype=torch.float64)
        direction = torch.linalg.solve(left, matrix) @ torch.linalg.inv(right)
        weight = direction[:, :-1] if "bias" in g else direction
        moved[f"{name}.weight"] = weight.T if name == "embed" else weight
        moved |= {f"{name}.bias": direction[:, -1]} if "bias" in g else {}
    return found, torch.cat([moved[name].flatten() for name, _ in model.named_parameters()])


def stepped(kind, model, batches, world=None, **options):
    """The displacement of one step of a mean over all labels of all ranks, with lr = 1."""
    options = {
        "lr": 1.0,
        "momentum": 0.0,
        "damping": DAMPING,
        "rows_per_dim": None,
        "refresh": 1,
        "world": world,
    } | options
    options |= {"length": natgrad.plain} if kind is not natgrad.NLCG else {}
    opt = made(kind, model, **options)
    before, ranks = weights(model), 1 if world is None else world.size
    total = counted(batches)
    for tokens, valid, labels in batches:
        own = [part.chunk(ranks)[0 if world is None else world.rank] for part in (tokens, valid, labels)]
        (summed(model, own) / total * ranks).backward()
    opt.step()
    return before - weights(model), opt


@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("batches", [BATCHES[:1], BATCHES, FULL], ids=["one", "two lengths", "one without padding"])
@pytest.mark.parametrize("kind", [natgrad.SPNGD, natgrad.KFAC, natgrad.NLCG], ids=lambda kind: kind.__name__)
def test_factors_and_steps_are_those_of_what_the_loss_counts(kind, batches, recompute):
    statistics, moved = expected(reader(), batches, norms=kind is not natgrad.KFAC)
    options = {"ema_decay": 0.0} if kind is natgrad.KFAC else {}
    found, opt = stepped(kind, reader(recompute=recompute), batches, **options)
    for name, own in statistics.items():
        for key, value in own.items():
            if row(opt, name).curvature.startswith(("kron", "unit")):
                kept = statistic(opt, name, key)
                kept = torch.diag_embed(kept) if kept.dim() == 2 and value.dim() == 2 else kept
                assert_close(kept.view_as(value), value, rtol=1e-10, atol=1e-14, msg=f"{name}.{key}")
    assert_close(found, moved, rtol=1e-9, atol=1e-12)
    assert opt.assumed.predictions * opt.assumed.samples == pytest.approx(counted(batches))


@pytest.mark.parametrize(
    "kind", [natgrad.SPNGD, natgrad.KFAC, natgrad.SENG, natgrad.NLCG], ids=lambda kind: kind.__name__
)
def test_two_ranks_are_one(kind):
    """Half of the texts of every micro-batch on each: of unlike numbers of labels."""
    model = reader()
    expect, _ = stepped(kind, clone(model), BATCHES, World())
    for found in run_threads(2, lambda world: stepped(kind, clone(model), BATCHES, world)[0], gradients="local"):
        assert_close(found, expect, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batches", [BATCHES[:1], BATCHES], ids=["one", "two lengths"])
def test_rows_of_samples_are_those_of_what_the_loss_counts(batches):
    """SENG: F = 1/n sum u u^T of texts, scaled so that it is that of the mean over all labels."""
    model, predictions = reader(), counted(batches)
    alone = []
    for batch in batches:
        for k in range(4):
            loss = summed(model, [part[k : k + 1] for part in batch]) / predictions
            alone.append(torch.autograd.grad(loss, list(model.parameters())))
    found, _ = stepped(natgrad.SENG, model, batches, sketch=None)
    for place, names in enumerate([["embed.weight"], ["norm.weight", "norm.bias"], ["pack.weight"]]):
        first = [0, 1, 3][place]
        u = torch.stack([torch.cat([g.flatten() for g in own[first : first + len(names)]]) for own in alone])
        fisher = predictions * u.T @ u  # n texts' own gradients are n u, over n
        mean = u.sum(0)
        direction = torch.linalg.solve(fisher + DAMPING * torch.eye(len(mean), dtype=torch.float64), mean)
        start = sum(p.numel() for p in list(model.parameters())[:first])
        assert_close(found[start : start + len(mean)], direction, rtol=1e-8, atol=1e-12, msg=str(names))


def test_more_padding_changes_nothing():
    """The same texts, padded further."""
    tokens, valid, labels = BATCHES[0]
    longer = [
        F.pad(part, (0, 6), value=value) for part, value in zip((tokens, valid, labels), (PADDING, False, IGNORED))
    ]
    for kind in (natgrad.SPNGD, natgrad.SENG, natgrad.NLCG):
        expect, _ = stepped(kind, reader(), [BATCHES[0]])
        assert_close(stepped(kind, reader(), [longer])[0], expect, rtol=1e-9, atol=1e-12)


def test_a_tied_table_counts_no_padding():
    """Where the head is the table, what it is given at places without a label is no row of either side."""
    (expect, one), (found, other) = (stepped(natgrad.SPNGD, reader(TiedReader), [b]) for b in padded_twice())
    for key in ("A", "G"):
        assert_close(statistic(other, "embed", key), statistic(one, "embed", key), rtol=1e-10, atol=1e-14)
    assert_close(found, expect, rtol=1e-9, atol=1e-12)
    calls = rows_of_tied()
    live = calls[1].abs().amax(1) > 0
    root = (calls[1].square().sum() / live.sum()).sqrt()
    heads = calls[0][live] * root  # rows g of the head's use; dy over the root are its rows a
    assert_close(
        calls[2] + counted([BATCHES[0]]) * heads.T @ heads, statistic(one, "embed", "G")[0], rtol=1e-9, atol=1e-12
    )


def padded_twice():
    tokens, valid, labels = BATCHES[0]
    values = (PADDING, False, IGNORED)
    return BATCHES[0], [F.pad(part, (0, 5), value=v) for part, v in zip((tokens, valid, labels), values)]


def rows_of_tied():
    """Inputs and output gradients of the tied head [rows, d], and G of the table's own use."""
    model, predictions = reader(TiedReader), counted([BATCHES[0]])
    tokens, valid, labels = BATCHES[0]
    looked = model.embed(tokens)
    hidden = model.attend(looked, valid)
    logits = hidden @ model.embed.weight.T
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    dy, own = torch.autograd.grad(losses / predictions, (logits, looked))
    own = own.flatten(0, 1)
    return hidden.detach().flatten(0, 1), dy.flatten(0, 1), predictions * own.T @ own


def test_a_unit_at_rest_is_no_row():
    """Whatever makes a row's gradient zero, the row adds nothing to F = sum g g^T (x) a a^T, so A is of the others.

    Where g is the same in all others, F is G (x) A, to rounding; with A of all rows it is not.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 1), nn.ReLU(), nn.Linear(1, 1, bias=False)).double()
    x = torch.randn(40, 3, dtype=torch.float64)
    a = torch.cat([x, torch.ones(40, 1, dtype=torch.float64)], 1)
    live = model[0](x)[:, 0] > 0
    assert 5 < live.sum() < 35
    opt = natgrad.SPNGD(model, lr=1e-9, rows_per_dim=None, refresh=1, predictions=1)
    model(x).mean().backward()
    opt.step()
    fisher = model[2].weight.item() ** 2 * a[live].T @ a[live] / 40
    product = statistic(opt, "0", "G")[0, 0, 0] * statistic(opt, "0", "A")[0]
    assert_close(product, fisher, rtol=1e-7, atol=0)
    assert not torch.allclose(statistic(opt, "0", "G")[0, 0, 0] * a.T @ a / 40, fisher, rtol=0.05)


def test_a_layer_that_is_at_rest_is_measured_when_it_moves():
    """LoRA's way: the second factor begins at zero, so nothing reaches the first one in the first step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 3, bias=False)).double()
    nn.init.zeros_(model[1].weight)
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 3
    opt, before = natgrad.SPNGD(model, lr=0.1, rows_per_dim=None, refresh=100), weights(model)
    for step in range(3):
        F.cross_entropy(model(x), y).backward()
        opt.step()
        opt.zero_grad()
        assert opt.cells[0].ready == (step > 0)
        assert torch.equal(weights(model)[:12], before[:12]) == (step == 0)
    assert bool(statistic(opt, "0", "G").any())
    assert opt.coverage().share == 1


def drawn_at(places):
    """A of the head with labels drawn at some places, and what it must be."""
    model = reader()
    tokens, valid, labels = BATCHES[0]
    opt = natgrad.SPNGD(model, lr=1e-9, rows_per_dim=None, refresh=1, fisher="sampled")
    logits = model(tokens, valid)
    opt.sample(logits[places])
    shifted = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    shifted.backward()
    opt.step()
    inputs = model.attend(model.embed(tokens), valid)[places].detach()
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], 1)
    return opt, statistic(opt, "head", "A")[0], inputs.T @ inputs / len(inputs)


def test_drawn_labels_say_which_rows_count():
    """With a sampled Fisher a row counts that has a gradient of the drawn labels, whatever the data's labels say."""
    labelled = F.pad(BATCHES[0][2][:, 1:] != IGNORED, (0, 1))
    for places in (labelled, torch.ones_like(labelled)):
        opt, found, expect = drawn_at(places)
        assert_close(found, expect, rtol=1e-6, atol=1e-9)
        assert opt.assumed.predictions * opt.assumed.samples == pytest.approx(int(places.sum()))


def test_images_count_all_of_their_places():
    """A of a convolution in two dimensions is the papers' mean over all places, those of units at rest as well."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(9, 2)).double()
    x = torch.randn(8, 2, 3, 3, dtype=torch.float64)
    opt = natgrad.SPNGD(model, lr=1e-9, rows_per_dim=None, refresh=1)
    F.cross_entropy(model(x), torch.arange(8) % 2).backward()
    opt.step()
    rows = torch.cat([x.movedim(1, -1).reshape(-1, 2), torch.ones(72, 1, dtype=torch.float64)], 1)
    assert bool((model[0](x) < 0).any())
    assert_close(statistic(opt, "0", "A")[0], rows.T @ rows / 72)


def test_sequences_of_a_convolution_count_what_has_a_gradient():
    torch.manual_seed(0)
    model = nn.Conv1d(2, 3, 3, padding=1).double()
    x = torch.randn(4, 2, 7, dtype=torch.float64)
    valid = torch.arange(7) < torch.tensor([7, 3, 5, 1]).unsqueeze(1)
    opt = natgrad.SPNGD(model, lr=1e-9, rows_per_dim=None, refresh=1, predictions=4)
    model(x).square().sum(1)[valid].mean().backward()
    opt.step()
    patches = F.pad(x, (1, 1)).unfold(2, 3, 1).permute(0, 2, 3, 1).flatten(2)[valid]  # taps, then channels
    rows = torch.cat([patches, torch.ones(len(patches), 1, dtype=torch.float64)], 1)
    assert_close(statistic(opt, "", "A")[0], rows.T @ rows / len(rows))


@pytest.mark.parametrize("share", [1.0, 0.6, 0.15, 0.01])
def test_draws_among_live_rows_are_right_on_average(share, monkeypatch):
    """Bounded, rows are drawn among those that count: as many as asked for, each as likely as the others."""
    monkeypatch.setattr(kronecker, "EXACT_ROWS", 100)
    monkeypatch.setattr(kronecker, "LEAST_ROWS", 50)
    torch.manual_seed(1)
    layer = layer_of(nn.Linear(5, 4, bias=False).double())
    x, dy = torch.randn(30, 25, 5, dtype=torch.float64), torch.randn(30, 25, 4, dtype=torch.float64)
    x = x * torch.linspace(0.2, 3, 750, dtype=torch.float64).view(30, 25, 1)
    live = torch.rand(30, 25) < share
    live[0, 0] = True
    dy = dy * live.unsqueeze(-1)
    a, g = x[live].T @ x[live] / live.sum(), dy.flatten(0, 1).T @ dy.flatten(0, 1)
    means, sums = [], []
    for seed in range(200):
        draw = Sampler(seed, 1, 0, 1.0).draw(0, 0, torch.device("cpu"))
        moment = InputMoment(8)
        part = moment.after(layer, moment.before(layer, x, draw), dy, draw)
        if share == 1:  # nothing is asked of the device
            part = RowSum(part, torch.tensor([750.0], dtype=torch.float64))
        assert part.rows.item() == pytest.approx(int(live.sum()), rel=0.4)
        means.append(part.total[0] / part.rows)
        moment = OutputMoment(8)
        sums.append(moment.after(layer, moment.before(layer, x, draw), dy, draw)[0])
    errors = {}
    for name, own, true in (("A", means, a), ("G", sums, g)):
        own = torch.stack(own)
        one = (own - true).flatten(1).norm(dim=1).mean() / true.norm()
        errors[name] = one
        assert (own.mean(0) - true).norm() / true.norm() < 3 * one / 200**0.5 + 1e-12
    assert errors["A"] < 0.5  # of 40 rows, whatever the share


@pytest.mark.parametrize(("dtype", "noise"), [(torch.float64, 1e-15), (torch.float32, 1e-6), (torch.bfloat16, 0.0)])
def test_the_rounding_of_nothing_is_nothing(dtype, noise):
    """A place that attends to itself alone has a gradient of zero in exact arithmetic, and of some roundings else."""
    sizes = torch.tensor([1.0, noise, 1e-3, 0.0], dtype=dtype)
    assert counted_rows(sizes).tolist() == [True, False, True, False]
    assert not all_counted(sizes)
    assert all_counted(sizes[::2])
    assert counted_rows(sizes[:0]).tolist() == []
    assert counted_rows(sizes[3:]).tolist() == [False]
    assert counted_rows(torch.tensor([1.0, math.nan], dtype=dtype)).tolist() == [True, True]  # the statistic tells


def test_draws_move_nowhere_where_all_rows_count():
    index = torch.tensor([0, 3, 4, 11, 19])
    places, weighed = among(index, torch.ones(20, dtype=torch.bool))
    assert torch.equal(places, index)
    assert torch.equal(weighed, torch.ones(5))
    assert not among(index, torch.zeros(20, dtype=torch.bool))[1].any()


def mixed(batches, scale):
    """What is said of a step whose micro-batches are divided so."""
    model = reader()
    opt = natgrad.SPNGD(model, lr=1e-6)
    for batch in batches:
        (summed(model, batch) / scale(batch)).backward()
    return " ".join(said_by(opt.step))


def test_means_of_means_are_said():
    """Micro-batches whose losses are means of their own weigh the labels of short ones more: it is said, once."""
    long, short = texts([20, 19, 20, 18], seed=3), texts([5, 4, 5, 5], seed=4)
    batches = [long, short]
    assert "means of means" in mixed(batches, lambda batch: 2 * counted([batch]))
    assert "means of means" not in mixed(batches, lambda batch: counted(batches))
    assert "means of means" not in mixed([long, long], lambda batch: 2 * counted([batch]))
