"""Texts: windows, what follows what, no leaks between splits; the transformer; losses over places."""

import math

import pytest
import torch
from torch.nn import functional as F

import natgrad
from natgrad.parallel import World
from natgrad_lab.data import hold_out
from natgrad_lab.data.text import Charlm, Stdlib, Texts, frequent, sources, windows
from natgrad_lab.models import Transformer
from natgrad_lab.train.evaluate import evaluate
from natgrad_lab.train.loop import loss_of, prepare, steps
from natgrad_lab.train.optimizers import Nlcg, SpNgd
from natgrad_lab.train.recipe import Recipe

SMALL = Transformer(blocks=1, width=16, heads=2)


@pytest.fixture(scope="module")
def splits():
    return Charlm(places=16).load()


def test_windows_follow_each_other_and_share_one_character():
    order = frequent("abcabca", 3)
    assert order == {"a": 0, "b": 1}
    assert windows("abcabcab", order, 3).tolist() == [[0, 1, 2, 0], [0, 1, 2, 0]]


def test_characters_that_are_rare_or_beyond_ascii_are_the_last_number():
    assert windows("ab\u00e9\U0001f40d", {"b": 0, "\u00e9": 1}, 3).tolist() == [[2, 0, 1, 2]]


@pytest.fixture
def library(tmp_path):
    """A folder like python's library: twelve modules, and folders that are left out."""
    for place in range(12):
        (tmp_path / f"{place:02}.py").write_text(f"module {place}")
    for name in ("test", "idlelib", "pydoc_data", "site-packages", "pkg/tests"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.py").write_text("left out")
    (tmp_path / "pkg" / "z.txt").write_text("no module")
    (tmp_path / "pkg" / "latin.py").write_bytes(b"caf\xe9")
    return tmp_path


def test_modules_come_in_the_order_of_their_paths_and_every_tenth_is_for_the_test(library):
    train, test = sources(library)
    assert test == "module 0\nmodule 10"
    assert train == "\n".join([*(f"module {n}" for n in range(12) if n % 10), "caf\ufffd"])


def test_a_library_without_modules_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds 0 modules .*installed as files"):
        sources(tmp_path / "none")


def test_pythons_own_library_is_a_text_of_millions_of_characters():
    splits, source = Stdlib().load(), Stdlib()
    assert splits.train.images.shape[1] == source.shape()[2] + 1 == 129
    assert splits.train.images.numel() > 5e6
    assert len(splits.test) > 1024
    assert int(splits.train.images.max()) <= source.classes() - 1 == 127
    assert (splits.train.images == 127).double().mean() < 1e-3


def test_a_tied_head_is_the_embedding_and_begins_like_an_untied_one():
    tied, untied = (
        (torch.manual_seed(0), Transformer(1, 16, 2, tied).build((1, 1, 8), 9))[1] for tied in (True, False)
    )
    assert tied.head.weight is tied.letters.weight
    sizes = [sum(p.numel() for p in model.parameters()) for model in (tied, untied)]
    assert sizes[1] - sizes[0] == 9 * 16
    others = dict(untied.named_parameters())
    assert all(torch.equal(p, others[name]) for name, p in tied.named_parameters())


def test_a_target_is_the_character_after(splits):
    inputs, targets = splits.train.batch(torch.tensor([3, 0]))
    assert inputs.shape == targets.shape == (2, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(splits.train.batch(torch.tensor([1]))[0][0, 0], targets[1, -1])
    assert inputs.max() < 96


def test_what_is_held_out_is_not_learned_from(splits):
    kept = hold_out(splits, 0.1, seed=0)
    assert len(kept.train) + len(kept.test) == len(splits.train)
    assert len(kept.test) == round(0.1 * len(splits.train))
    assert len(splits.test) > 100
    together = torch.cat((kept.train.images, kept.test.images)).flatten().sort().values
    assert torch.equal(together, splits.train.images.flatten().sort().values)


def test_impossible_windows_are_refused():
    with pytest.raises(ValueError, match="places=1"):
        Charlm(places=1)
    with pytest.raises(ValueError, match="alphabet=1000"):
        Charlm(alphabet=1000)
    with pytest.raises(ValueError, match=r"width=10 .*heads=4"):
        Transformer(width=10)


def test_no_place_sees_what_comes_after():
    model = SMALL.build((1, 1, 8), 9)
    one = torch.randint(9, (2, 8))
    other = one.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 9
    same, changed = model(one), model(other)
    torch.testing.assert_close(same[:, :5], changed[:, :5])
    assert not torch.allclose(same[:, 5:], changed[:, 5:])


def test_a_samples_loss_is_the_mean_over_its_places():
    logits, targets = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    per_place = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(3, 5)
    torch.testing.assert_close(loss_of(logits, targets, 0.0), per_place.mean(dim=1).sum())
    torch.testing.assert_close(loss_of(logits[:, 0], targets[:, 0], 0.0), per_place[:, 0].sum())


def test_a_text_is_judged_place_by_place():
    texts = Texts(torch.randint(7, (5, 9), dtype=torch.uint8), 7)

    class Sure(torch.nn.Module):
        def forward(self, x):
            return 100.0 * F.one_hot(torch.zeros_like(x), 7).float()

    score = evaluate(Sure(), texts, World(), chunk=2)  # type: ignore[arg-type]
    assert score.accuracy == pytest.approx(float((texts.images[:, 1:] == 0).double().mean()))
    assert score.loss == pytest.approx(100 * (1 - score.accuracy), rel=1e-4)


def test_all_of_the_transformer_has_curvature():
    model = SMALL.build((1, 1, 16), 96)
    assert all(row.curvature != "fallback" for row in natgrad.SPNGD(model, lr=0.1).coverage())


MINIMUM = Nlcg(lr=1.0, preconditioner="kronecker", beta="polak_ribiere", step="curvature", fisher="sampled")


@pytest.mark.parametrize("optimizer", [SpNgd(lr=0.1), SpNgd(lr=0.1, fisher="sampled"), MINIMUM], ids=str)
def test_it_learns_with_the_defaults_that_are_for_images(splits, optimizer):
    """Steps are as long as a mean over places wants them, also with labels that are drawn."""
    job = prepare(Recipe(Charlm(places=16), SMALL, optimizer, batch=256, steps=40), World(), splits)
    assert job.score().loss == pytest.approx(math.log(96), rel=0.05)
    losses = [step.loss for step in steps(job)]
    assert losses[-1] < 3.4, losses
    assert job.score().loss < 3.5
