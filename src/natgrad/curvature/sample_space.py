"""Curvature in the space of samples: the empirical Fisher by its columns (SENG: Yang et al. 2022).

U [D, n] has the per-sample gradients over sqrt(n) as columns, F = U U^T, and (Sherman, Morrison and Woodbury)

    (lambda I + U U^T)^-1 g = (g - U b) / lambda,    b = (lambda I + K)^-1 U^T g,    K = U^T U  [n, n].

Where g = U c is known to be the mean of the very columns, it is U (lambda I + K)^-1 c: no difference of large numbers,
so single precision serves every damping. With a sketch S [q, D], K = (S U)^T (S U) and U^T g becomes (S U)^T (S g);
U b stays exact. Columns may be those of the improved Fisher (arXiv 2406.06420): u_n over the norm of the gradient with
respect to the sample's own logits. K is kept; its factor is made anew with every change of the damping.

Kept of a layer beside K and its factor: U's rows, `short_left` and `short_right` where they were cut for K and U^T g,
`sketched` [n, q] = S U and the map `drawn`, `mean` [n] = c.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from natgrad.curvature import per_sample_cost
from natgrad.curvature.by_rows import ByRows
from natgrad.curvature.curvature import Cost, Extent
from natgrad.curvature.legacy import Legacy, mean_field
from natgrad.curvature.per_sample import (
    Sample,
    SampleGradients,
    combine,
    count,
    explicit,
    gram,
    in_portions,
    places_of,
    project,
    scaled,
    times,
)
from natgrad.curvature.sketch import Sketch
from natgrad.layers.layer import Layer, Shape
from natgrad.layers.op_cost import OpCost
from natgrad.linalg import damped_cholesky, first_cholesky

STORED = ("columns", "left", "right", "tokens", "short_left", "short_right", "sketched", "drawn", "mean")


@dataclass(frozen=True)
class SampleSpace(ByRows):
    """The Fisher of `samples` samples by their gradients. See the optimizer SENG for the arguments."""

    samples: int | None = None
    sketch: Sketch | None = None
    rank: int | None = None
    columns: Literal["empirical", "improved"] = "empirical"
    budget: int = 2**30
    legacy: Legacy | None = None
    block: Literal["layer", "network"] = "layer"
    name: str = field(default="per-sample", init=False)
    damping_tolerance = 0.0
    stored = STORED

    @property
    def statistics(self) -> tuple[SampleGradients, ...]:  # type: ignore[override]
        return (SampleGradients(self.samples, self.budget),)

    def digest(self, rows: Sample, shape: Shape, generator: torch.Generator) -> tuple[Tensor, Sample]:
        """K [1, n, n] and what else is kept, from all rows, whose `mean` [n] says how they make up the gradient."""
        n = max(count(rows), 1)
        kept = scaled({k: v for k, v in rows.items() if k in STORED}, n**-0.5)
        kept["mean"] = rows["mean"] * n**-0.5
        kept |= shortened(kept, self.rank)
        used, sketch = short(kept), self.sketch
        size = shape.numel if sketch is None else sketch.wanted(n)
        if sketch is None or size >= shape.numel or (places_of(used) == 1 and "right" in used):
            product = gram(used, shape)
        else:
            drawn = sketch.draw(shape.numel, size, generator)
            kept["drawn"] = drawn
            kept["sketched"] = in_portions(used, shape, lambda columns: sketch.apply(drawn, columns, size))
            product = kept["sketched"] @ kept["sketched"].T
        return (self._boost(shape) * product).unsqueeze(0), kept

    @property
    def joint(self) -> bool:  # type: ignore[override]
        return self.block == "network"

    def _boost(self, shape: Shape) -> float:
        return 1.0 if self.legacy is None else self.legacy.boost(shape)

    def split(self, traces: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]:
        return {"U": torch.full_like(traces["U"], damping)}

    def factor(self, key: str, statistic: Tensor, damping: Tensor) -> tuple[Tensor, Tensor | None]:
        return first_cholesky(statistic, damping)

    def mend(self, key: str, statistic: Tensor, damping: Tensor) -> tuple[Tensor, int]:
        return damped_cholesky(statistic, damping)

    def against(self, kept: Sample, gradient: Tensor) -> Tensor:
        """U^T g [..., n], as the sketch sees both, of some layers that are alike or of one: g is [..., b, o, i]."""
        shape = Shape(*gradient.shape[-3:])
        if "sketched" in kept:
            assert self.sketch is not None
            sketched = kept["sketched"]
            apply = self.sketch.apply if sketched.dim() == 2 else self.sketch.apply_each
            seen = apply(kept["drawn"], gradient.flatten(-3), sketched.shape[-1])
            inner = times(sketched, seen.unsqueeze(-1)).squeeze(-1)
        else:
            inner = project(short(kept), gradient)
        boost = self._boost(shape)
        return inner if boost == 1 else boost * inner

    def without(self, kept: Sample, gradient: Tensor, weights: Tensor, damping: float) -> Tensor:
        """(g - U b) / lambda with b = `weights`."""
        return (gradient - self._subtracted(kept, gradient, weights)) / damping

    def _subtracted(self, kept: Sample, gradient: Tensor, weights: Tensor) -> Tensor:
        """U b with b = `weights` [..., n], as the release has it where asked for."""
        shape = Shape(*gradient.shape[-3:])
        if self.legacy is not None and self.legacy.blurs(kept, shape):
            return mean_field(kept, weights)
        return combine(kept, weights, shape)

    def makes_up(self, kept: Sample, gradient: Tensor) -> Tensor:
        """Whether the gradient is U c to rounding, c being `mean` [...]; then U b is the whole direction."""
        rest = gradient - combine(kept, kept["mean"], Shape(*gradient.shape[-3:]))
        limit, each = torch.finfo(gradient.dtype).eps ** 0.5, (-3, -2, -1)
        return torch.linalg.vector_norm(rest, dim=each) <= limit * torch.linalg.vector_norm(gradient, dim=each)

    def precondition(self, inverses: Mapping[str, Tensor], gradient: Tensor, damping: float) -> Tensor:
        one = {name: value.unsqueeze(0) for name, value in inverses.items() if name != "fresh"}
        return self.precondition_all([one], [gradient.unsqueeze(0)], damping, [["fresh" in inverses]])[0][0]

    def precondition_all(
        self,
        kept: Sequence[Mapping[str, Tensor]],
        gradients: Sequence[Tensor],
        damping: float,
        fresh: Sequence[Sequence[bool]],
    ) -> list[Tensor]:
        own, made = [dict(one) for one in kept], dict[int, Tensor]()  # which layers of a group have g = U c
        for k, told in enumerate(fresh):
            if any(told) and self.legacy is None:
                is_sum = self.makes_up(own[k], gradients[k])
                mask = is_sum if all(told) else is_sum & torch.tensor(told, device=is_sum.device)
                made[k] = mask.unsqueeze(1)
        right = [self.against(k, g) for k, g in zip(own, gradients)]
        for k, is_sum in made.items():
            right[k] = torch.where(is_sum, own[k]["mean"], right[k])
        weights = solved_all([k["U"][:, 0] for k in own], right)
        found = [self._subtracted(k, g, w) for k, g, w in zip(own, gradients, weights)]
        away = list(torch._foreach_sub(list(gradients), found))  # (g - U b) / lambda, as in `without`
        torch._foreach_div_(away, damping)
        for k, is_sum in made.items():
            away[k] = torch.where(is_sum[..., None, None], found[k], away[k])
        return away

    def dense(self, statistics: Mapping[str, Tensor], shape: Shape, damping: float) -> Tensor:
        columns = explicit(dict(statistics), shape).flatten(1)
        fisher = self._boost(shape) * columns.T @ columns
        return fisher + damping * torch.eye(shape.numel, dtype=columns.dtype)

    def form(self, layer: Layer, seen: Extent) -> per_sample_cost.RowForm:
        """The rows of all ranks."""
        return per_sample_cost.form_of(self.statistics[0], layer, seen)

    def sketched_to(self, layer: Layer, form: per_sample_cost.RowForm, places: int) -> int | None:
        """To how many numbers the columns are mapped; None where their products are exact."""
        size = None if self.sketch is None else self.sketch.wanted(form.samples)
        short = not form.columns and not form.token_bytes and places == 1
        return None if size is None or size >= layer.shape.numel or short else size

    def measure_work(self, layer: Layer, key: str, x: Tensor, y: Tensor, ranks: int) -> tuple[OpCost, ...]:
        return per_sample_cost.measure_work(self.statistics[0], layer, x, ranks)

    def factor_work(self, layer: Layer, key: str, seen: Extent) -> tuple[OpCost, ...]:
        """The products of all rows, and the factor of them."""
        form = self.form(layer, seen)
        gram = per_sample_cost.gram_work(layer, form, seen.places, self.sketched_to(layer, form, seen.places))
        return (*gram, *per_sample_cost.factor_work(form.samples))

    def precondition_work(self, layer: Layer, seen: Extent) -> tuple[OpCost, ...]:
        form = self.form(layer, seen)
        return per_sample_cost.direction_work(layer, form, self.sketched_to(layer, form, seen.places))

    def rows_held(self, layer: Layer, seen: Extent) -> int:
        form = self.form(layer, seen)
        size = self.sketched_to(layer, form, seen.places)
        drawn = 0 if size is None or self.sketch is None else self.sketch.held(layer.shape.numel, size)
        cut = self.rank is not None and not form.columns and not form.token_bytes and seen.places > self.rank
        more = self.rank * (layer.shape.out + layer.shape.inner) if cut and self.rank and layer.shape.blocks == 1 else 0
        return per_sample_cost.bytes_held(form, drawn, size) + 4 * form.samples * more

    def cost(self, layer: Layer, rows: int) -> Cost:
        d, n = layer.shape.numel, rows if self.samples is None else min(rows, self.samples)
        return Cost(float(n * n * d), {"U": float(n**3)}, 2.0 * n * d, n * (d + n))


def solved(root: Tensor, right: Tensor) -> Tensor:
    """(L L^T)^-1 right [n]."""
    return torch.cholesky_solve(right.unsqueeze(1), root)[:, 0]


def solved_all(roots: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    """(L L^T)^-1 right [m, n] for several groups of roots [m, n, n]; those behind one another in memory are one."""
    found: list[Tensor] = []
    while len(found) < len(roots):
        begin = len(found)
        end = begin + 1
        while end < len(roots) and behind(roots[end - 1], roots[end]):
            end += 1
        first, counts = roots[begin], [len(root) for root in roots[begin:end]]
        size = (sum(counts), *first.shape[1:])
        joined = first.as_strided(size, first.stride(), first.storage_offset())
        some = torch.cat(list(right[begin:end])) if end > begin + 1 else right[begin]
        found += torch.cholesky_solve(some.unsqueeze(2), joined)[..., 0].split(counts)
    return found


def behind(one: Tensor, other: Tensor) -> bool:
    """Whether matrices [m, n, n] begin in memory where others of their size end."""
    alike = one.shape[1:] == other.shape[1:] and one.stride() == other.stride() and one.dtype == other.dtype
    return (
        alike
        and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        and other.storage_offset() == one.storage_offset() + one.numel()
    )


def shortened(rows: Sample, rank: int | None) -> Sample:
    """Factors cut to `rank` places by the singular vectors of each sample's left one, under names of their own.

    left = P S Q^T over (outputs, places): P S and right Q, cut, have the best rank-k approximation of left.
    """
    if rank is None or "right" not in rows or places_of(rows) <= rank or rows["left"].shape[2] > 1:
        return {}
    left, right = rows["left"][:, :, 0], rows["right"][:, :, 0]  # [n, s, o], [n, s, i]
    q, values, p = torch.linalg.svd(left, full_matrices=False)
    q, values, p = q[..., :rank], values[:, :rank], p[:, :rank]
    return {
        "short_left": (values.unsqueeze(2) * p).unsqueeze(2),
        "short_right": (q.transpose(1, 2) @ right).unsqueeze(2),
    }


def short(rows: Sample) -> Sample:
    """The rows that K and U^T g are made of: those that were cut short, if any were."""
    if "short_left" not in rows:
        return {k: rows[k] for k in ("columns", "left", "right", "tokens") if k in rows}
    return {"left": rows["short_left"], "right": rows["short_right"]}
