"""What an optimizer's steps must be, computed densely in float64 from the papers' definitions. natgrad is not imported.

A layer is what is linear in its weight: the row a of a place is what the layer gives there for unit weights, one
evaluation of the module for each of them. g is the gradient of a sample's own loss in the layer's output (autograd).
With b blocks, o outputs, i inputs (the bias is the last one), n samples and s places:

    u [b, o, i]  = sum over a sample's places and calls of g a^T     its gradient
    A [b, i, i]  = mean of a a^T over the rows with a gradient       G [b, o, o] = mean over samples of sum g g^T
    F            = mean over samples of u u^T, of a unit, of a layer or of its diagonal

Every damped block is written out as one matrix and solved. Rules and lengths are those of docs/math.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

CHANNELS_SECOND = (nn.Conv1d, nn.Conv2d, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.InstanceNorm2d)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.InstanceNorm2d)
KNOWN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding, *NORMS)


class TiedHead(nn.Module):
    """Logits by the table of an embedding."""

    def __init__(self, table: nn.Embedding):
        super().__init__()
        self.weight = table.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


@dataclass
class Rows:
    """One call of a layer: rows a [n, s, b, i], gradients g [n, s, b, o] of each sample's own loss, output order."""

    a: Tensor
    g: Tensor
    dense: bool = True  # False: A counts with its diagonal alone
    counted: bool = True  # rows without a gradient leave A

    @property
    def counts(self) -> Tensor:
        """Which rows are in A [n, s]."""
        shown = (self.a if not self.dense else self.g).flatten(2)
        return shown.ne(0).any(2) if self.counted else torch.ones(shown.shape[:2], dtype=torch.bool)


@dataclass
class Part:
    """A layer or a parameter that trains, and what is remembered of it."""

    parameters: list[nn.Parameter]
    module: nn.Module
    kind: str  # kron, unit, full, diag, identity, rows or loose
    rows: list[Rows] = field(default_factory=list)
    statistics: dict[str, Tensor] = field(default_factory=dict)
    measured: int = 0
    due: int = 1  # the step in which it is measured next
    used: float = 0.0  # the damping of the inverses
    matrix: Tensor | None = None  # the damped Fisher block [numel, numel]
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def norm(self) -> bool:
        return isinstance(self.module, NORMS)

    @property
    def shape(self) -> tuple[int, int, int]:
        weight = self.parameters[0]
        inner = weight.numel() // len(weight) + len(self.parameters) - 1 if weight.dim() else 1
        if self.kind == "loose":
            return 1, 1, weight.numel()
        if isinstance(self.module, nn.Embedding):
            return 1, weight.shape[1], weight.shape[0]
        if self.norm:
            return weight.numel(), 1, len(self.parameters)
        groups = getattr(self.module, "groups", 1)
        return groups, len(weight) // groups, inner

    @property
    def healthy(self) -> float:
        """The root mean square of a healthy weight."""
        inner = self.shape[2]
        if self.kind == "loose" or isinstance(self.module, nn.Embedding):
            return 0.02
        if isinstance(self.module, (nn.Conv1d, nn.Conv2d)):
            inner -= len(self.parameters) - 1
        return 1.0 if self.norm else math.sqrt(2 / inner)

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors like the parameters as one W[b, o, i]."""
        b, o, _ = self.shape
        if self.kind == "loose":
            return tensors[0].reshape(self.shape)
        if isinstance(self.module, nn.Embedding):
            return tensors[0].T[None]
        return torch.cat([t.reshape(b, o, -1) for t in tensors], 2)

    def spread(self, numbers: Sequence[float]) -> Tensor:
        """A number for each parameter as one for each of its entries, in W's form."""
        return self.pack([torch.full_like(p, number) for p, number in zip(self.parameters, numbers)])

    def unpack(self, matrix: Tensor) -> list[Tensor]:
        """The inverse of `pack`."""
        if self.kind != "loose" and isinstance(self.module, nn.Embedding):
            return [matrix[0].T]
        sizes = [p.numel() // (self.shape[0] * self.shape[1]) for p in self.parameters]
        return [m.reshape(p.shape) for m, p in zip(matrix.split(sizes, 2), self.parameters)]


def places(module: nn.Module, y: Tensor) -> Tensor:
    """An output as [n, s, channels]."""
    if isinstance(module, CHANNELS_SECOND):
        return y.flatten(2).movedim(1, -1) if y.dim() > 2 else y[:, None]
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return y.reshape(len(y), -1, math.prod(module.normalized_shape))
    return y.reshape(len(y), -1, y.shape[-1])


def unit_rows(part: Part, x: Tensor) -> Tensor:
    """Rows [n, s, b, i] of a call on x: what the module gives where one weight of each block's first output is 1."""
    module, (b, o, i) = part.module, part.shape
    names = [n for n, p in module.named_parameters() if any(p is own for own in part.parameters)]
    zeros = {n: torch.zeros_like(p) for n, p in module.named_parameters()}
    buffers = {n: value.clone() for n, value in module.named_buffers()}
    found = []
    for k in range(i):
        weights = {n: value.clone() for n, value in zeros.items()}
        if isinstance(module, nn.Embedding):
            weights["weight"][k, 0] = 1
        else:
            unit = torch.zeros(b, o, i, dtype=torch.float64)
            unit[:, 0, k] = 1
            weights |= dict(zip(names, (t.clone() for t in part.unpack(unit))))
        y = places(module, functional_call(module, {**weights, **buffers}, (x,)).detach())
        found.append(y[..., ::o])
    rows = torch.stack(found, -1)
    if isinstance(module, nn.Embedding):
        rows = rows[:, :, :1]
        if module.padding_idx is not None:
            rows[..., module.padding_idx] = 0  # it gets no gradient
    return rows


class Reference:
    """An optimizer on `model`, a float64 copy. settings: the Program's, by name (benchmarks/fuzz_programs.py)."""

    def __init__(self, model: nn.Module, settings: Mapping[str, Any], blocks: Mapping[str, str]):
        self.model, self.settings, self.numbers = model, settings, dict[str, float]()
        self.parts: list[Part] = []
        self.step_number, self.calls = 0, list[tuple[Part, nn.Module, Tensor, Tensor]]()
        self.last_lr = self.first_lr = 0.0
        self.shake: Callable[[Tensor], Tensor] = lambda x: x  # a matrix that is to be inverted
        self._find(blocks)

    def _find(self, blocks: Mapping[str, str]) -> None:
        seen: set[nn.Parameter] = set()
        tables = {m.weight: m for m in self.model.modules() if isinstance(m, nn.Embedding)}
        homes = dict[nn.Module, Part]()
        for module in self.model.modules():
            own = [p for p in module._parameters.values() if p is not None]
            trained = [p for p in own if p.requires_grad and p not in seen]
            if isinstance(module, TiedHead):
                continue
            seen.update(trained)
            if isinstance(module, KNOWN) and len(trained) == len(own) and own:
                kind = blocks["norm" if isinstance(module, NORMS) else "matrix"]
                part = homes[module] = Part(own, module, kind)
                if kind == "full" and blocks["matrix"] == "kron" and math.prod(part.shape) > self.settings["max_size"]:
                    part.kind = "unit"
                self.parts.append(part)
            else:
                self.parts += [Part([p], module, "loose") for p in trained]
        for module in self.model.modules():
            if isinstance(module, TiedHead):
                homes |= {module: homes[tables[module.weight]]} if tables[module.weight] in homes else {}
        for module, part in homes.items():
            module.register_forward_hook(
                lambda m, args, y, part=part: self.calls.append((part, m, args[0].detach(), y))
            )

    def step(self, chunks: Sequence[tuple[Tensor, Tensor]], loss: Any, lr: float, damping: float, ranks: int) -> None:
        """One update by the mean over chunks of the loss. `loss(model, x, y)` gives (loss, output, predictions)."""
        self.step_number += 1
        s, samples = self.settings, sum(len(x) for x, _ in chunks)
        gradients, predictions, sharp = self._passes(chunks, loss, samples)
        p = predictions / samples if s["reduction"] == "mean" and s.get("columns") != "improved" else 1.0
        gradients = {k: g / ranks for k, g in gradients.items()} if s["reduction"] == "sum" else gradients
        if s["max_norm"] is not None:
            total = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
            gradients = {k: g * min(1.0, s["max_norm"] / (total + 1e-6)) for k, g in gradients.items()}
        for part in self.parts:
            if part.rows and part.kind != "identity" and part.due <= self.step_number:
                self._measure(part, p, sharp)
        gradients = {k: g for k, g in gradients.items() if self._ready(self.parts[k])}
        with torch.no_grad():
            if s["optimizer"] == "NLCG":
                self._conjugate(gradients, lr, damping)
            else:
                self._natural(gradients, lr, damping, samples / ranks if s["reduction"] == "sum" else 1.0)
        self.last_lr = lr
        self.first_lr = self.first_lr or lr

    def _passes(self, chunks: Sequence[tuple[Tensor, Tensor]], loss: Any, samples: int) -> Any:
        """Mean gradients by part, predictions with a gradient, and the norms of the samples' own logit gradients."""
        totals: dict[int, Tensor] = {}
        predictions, sharp = 0, []
        for part in self.parts:
            part.rows = []
        for x, y in chunks:
            self.calls.clear()
            value, output, counted = loss(self.model, x, y)
            if self.settings["reduction"] == "mean":
                value = value / len(chunks)
            own = [p for part in self.parts for p in part.parameters]
            wanted = [*own, output, *(out for *_, out in self.calls)]
            found = torch.autograd.grad(value, wanted, allow_unused=True)
            found = [torch.zeros_like(w) if f is None else f for f, w in zip(found, wanted)]
            by_parameter = dict(zip(own, found))
            for k, part in enumerate(self.parts):
                packed = part.pack([by_parameter[p] for p in part.parameters])
                totals[k] = totals.get(k, 0) + packed
            weigh = samples if self.settings["reduction"] == "mean" else 1  # to each sample's own loss
            sharp.append(found[len(own)].flatten(1).norm(dim=1) * weigh)
            predictions += counted
            for (part, module, given, _), dy in zip(self.calls, found[len(own) + 1 :]):
                part.rows.append(self._call(part, module, given, dy * weigh))
        return totals, predictions, torch.cat(sharp)

    def _call(self, part: Part, module: nn.Module, x: Tensor, dy: Tensor) -> Rows:
        if isinstance(module, TiedHead):  # dy and x change places, with the loss's scale on x (docs/math.md)
            return Rows(dy.reshape(len(x), -1, 1, dy.shape[-1]), x.reshape(len(x), -1, 1, x.shape[-1]), False)
        b, o, _ = part.shape
        rows, own = unit_rows(part, x), places(part.module, dy).unflatten(-1, (b, o))
        return Rows(rows, own, counted=not isinstance(part.module, nn.Conv2d))

    @staticmethod
    def _ready(part: Part) -> bool:
        """Whether a layer takes part in steps: once it has been measured, if it is to be."""
        return part.kind in ("identity", "loose") or part.measured > 0

    def _measure(self, part: Part, p: float, sharp: Tensor) -> None:
        if part.kind == "kron" and not any(bool(row.counts.any()) for row in part.rows):
            part.due = self.step_number + (self.settings["refresh"] if part.measured else 1)
            return
        part.due = self.step_number + self.settings["refresh"]
        fresh = self._fresh(part, p, sharp)
        share = min(self.settings["ema_decay"], part.measured / (part.measured + 1)) if part.measured else 0.0
        if part.kind == "rows":
            share = 0.0
        for key, value in fresh.items():
            part.statistics[key] = share * part.statistics[key] + (1 - share) * value if part.measured else value
        part.measured += 1
        part.used = 0.0

    def _fresh(self, part: Part, p: float, sharp: Tensor) -> dict[str, Tensor]:
        """The statistics of a step by their definitions."""
        chunks = self._by_chunk(part)
        samples = sum(len(calls[0].a) for calls in chunks)
        if part.kind == "kron":
            for one in (row for row in part.rows if not row.dense):
                r = one.a[one.counts].square().sum(-1).mean().sqrt()
                one.a, one.g = one.a / r, one.g * r
            flat = [(row.a[row.counts], row.g[row.counts]) for row in part.rows]
            count = sum(len(a) for a, _ in flat)
            return {
                "A": sum(torch.einsum("mbi,mbj->bij", a, a) for a, _ in flat) / count,
                "G": p * sum(torch.einsum("mbo,mbp->bop", g, g) for _, g in flat) / samples,
            }
        u = torch.cat([sum(torch.einsum("nsbo,nsbi->nboi", c.g, c.a) for c in calls) for calls in chunks])
        u = u / sharp[:, None, None, None] if self.settings.get("columns") == "improved" else u * p**0.5
        if part.kind == "unit":
            u = u.flatten(1, 2)
            return {"F": torch.einsum("nui,nuj->uij", u, u) / samples}
        u = u.flatten(1)
        return {"F": u.T @ u / samples} if part.kind == "full" else {"U": u / samples**0.5}

    def _by_chunk(self, part: Part) -> list[list[Rows]]:
        """A layer's calls, those of one pass together."""
        calls = len(part.rows) // self.settings["chunks"]
        return [part.rows[k : k + calls] for k in range(0, len(part.rows), calls)]

    def _dense(self, part: Part, damping: float) -> Tensor:
        """The damped Fisher block [numel, numel]."""
        known, (b, o, i) = part.statistics, part.shape
        if part.kind == "kron":
            limit, blocks = self.settings["max_size"], []
            for a, g in zip(known["A"], known["G"]):
                if i > limit or isinstance(part.module, nn.Embedding):
                    a = a.diagonal().diag()
                if o > limit:
                    g = g.diagonal().diag()
                ratio = (a.trace() / i) / (g.trace() / o)
                pi = ratio.sqrt() if a.trace() > 0 and g.trace() > 0 else torch.ones((), dtype=torch.float64)
                a = a + pi * damping**0.5 * eye(i)
                blocks.append(torch.kron(g + damping**0.5 / pi * eye(o), a))
            return torch.block_diag(*blocks)
        if part.kind == "unit":
            return torch.block_diag(*(known["F"] + damping * eye(i)))
        fisher = known["F"] if part.kind == "full" else known["U"].T @ known["U"]
        return fisher + damping * eye(b * o * i)

    def _solve(self, values: Mapping[int, Tensor], damping: float) -> dict[int, Tensor]:
        """Damped natural gradients by part."""
        if self.settings.get("block") == "network":
            return self._solve_network(values, damping)
        found = {}
        for k, part in enumerate(self.parts):
            if k not in values:
                continue
            if part.kind in ("identity", "loose"):
                found[k] = values[k].clone()
                continue
            at_once = self.settings["damps_at_once"] or part.kind in ("rows",)
            if not part.used or at_once or abs(damping / part.used - 1) > 0.1:
                part.matrix, part.used = self.shake(self._dense(part, damping)), damping
            assert part.matrix is not None
            found[k] = torch.linalg.solve(part.matrix, values[k].flatten()).view(part.shape)
        return found

    def _solve_network(self, values: Mapping[int, Tensor], damping: float) -> dict[int, Tensor]:
        """One block of all layers with curvature."""
        curved = [k for k in values if self.parts[k].kind == "rows"]
        if not curved:
            return {k: v.clone() for k, v in values.items()}
        u = torch.cat([self.parts[k].statistics["U"] for k in curved], 1)
        right = torch.cat([values[k].flatten() for k in curved])
        joined = torch.linalg.solve(self.shake(u.T @ u + damping * eye(len(right))), right)
        parts = joined.split([values[k].numel() for k in curved])
        return {k: part.view(self.parts[k].shape) for k, part in zip(curved, parts)}

    def _natural(self, gradients: dict[int, Tensor], lr: float, damping: float, terms: float) -> None:
        """Momentum, lengths and the fallback."""
        s, parts = self.settings, self.parts
        curved = [k for k in gradients if parts[k].kind != "loose"]
        keep, decays = self._keep(lr), [self._decays(part) for part in parts]
        weights = {k: part.pack([p.detach() for p in part.parameters]) for k, part in enumerate(parts)}
        past = {k: part.memory.get("direction") for k, part in enumerate(parts)}
        kept = {k: keep * parts[k].memory.get("momentum", 0) for k in curved}
        if s["before"]:
            kept = {k: v + gradients[k] for k, v in kept.items()}
        natural = self._solve(kept if s["before"] else {k: gradients[k] for k in curved}, damping)
        directions = {}
        for k in curved:
            turned = natural[k] + (0 if s["decoupled"] else decays[k] * weights[k])
            directions[k] = turned if s["before"] else kept[k] + turned
            parts[k].memory["momentum"] = kept[k] if s["before"] else directions[k]
        for k, part in enumerate(parts):
            if part.kind == "loose" and k in gradients:
                d = self._adam(part, gradients[k]) + (0 if s["decoupled"] else decays[k] * weights[k])
                directions[k] = d * self._ratio(part, weights[k], d)
        factors = self._factors(gradients, directions, past, weights, lr, keep, terms)
        for k, part in enumerate(parts):
            if k not in gradients:
                part.memory["went"] = None  # it stands still
                continue
            part.memory["direction"] = directions[k]
            rates = lr * part.spread([self._rate(p) for p in part.parameters])
            held = weights[k] * (1 - rates * decays[k]) if s["decoupled"] else weights[k]
            self._write(part, held - rates * factors[k] * directions[k])

    def _rate(self, parameter: Tensor) -> float:
        """By this the learning rate of a parameter's group is that of matrices."""
        return self.settings["vectors"] if parameter.dim() < 2 else 1.0

    def _decays(self, part: Part) -> Tensor:
        """The weight decay of every entry; vectors in a group of their own have none."""
        alike, decay = self.settings["vectors"] == 1, self.settings["weight_decay"]
        return part.spread([decay if alike or p.dim() > 1 else 0.0 for p in part.parameters])

    def _keep(self, lr: float) -> float:
        m, last = self.settings["momentum"], self.last_lr or lr
        how = self.settings["coefficient"]
        if how == "tied":
            return m * min(1.0, last / (self.first_lr or lr))
        return m * last / lr if how == "heavy_ball" else m

    def _adam(self, part: Part, g: Tensor) -> Tensor:
        m, memory = self.settings["momentum"], part.memory
        memory["count"] = memory.get("count", 0) + 1
        memory["first"] = m * memory.get("first", 0) + (1 - m) * g
        memory["second"] = 0.99 * memory.get("second", 0) + 0.01 * g.square()
        first = memory["first"] / (1 - m ** memory["count"])
        return first / ((memory["second"] / (1 - 0.99 ** memory["count"])).sqrt() + 1e-8)

    def _ratio(self, part: Part, weight: Tensor, direction: Tensor) -> float:
        """|w| / |d|, the weight taken for a tenth of a healthy one at least."""
        size, least = float(direction.norm()), 0.1 * part.healthy * weight.numel() ** 0.5
        return max(float(weight.norm()), least) / size if size > 0 else 0.0

    def _factors(
        self,
        gradients: Mapping[int, Tensor],
        directions: Mapping[int, Tensor],
        past: Mapping[int, Tensor | None],
        weights: Mapping[int, Tensor],
        lr: float,
        keep: float,
        terms: float,
    ) -> dict[int, float]:
        """The factor on the direction of each part."""
        s, length = self.settings, self.settings["length"]
        ones = dict.fromkeys(directions, 1.0)
        if length == "plain":
            return ones
        curved = [k for k in gradients if self.parts[k].kind != "loose"]
        if length == "trust":
            return ones | {k: self._ratio(self.parts[k], weights[k], directions[k]) for k in curved}
        for k in curved:
            self.parts[k].memory["sum"] = keep * self.parts[k].memory.get("sum", 0) + gradients[k]
        own = {k: lr * self._rate(part.parameters[0]) for k, part in enumerate(self.parts)}
        foreseen = {k: own[k] ** 2 * float((directions[k] * self.parts[k].memory["sum"]).sum()) for k in curved}
        if length == "kl_clip":
            factor = shortened(sum(foreseen.values()), s["limit"])
            return ones | dict.fromkeys(curved, factor)
        return self._measured(gradients, directions, past, foreseen, own, terms)

    def _measured(
        self,
        gradients: Mapping[int, Tensor],
        directions: Mapping[int, Tensor],
        past: Mapping[int, Tensor | None],
        foreseen: Mapping[int, float],
        rates: Mapping[int, float],
        terms: float,
    ) -> dict[int, float]:
        """The change that gradients have shown along the last step, over what had been foreseen."""
        numbers, memory, limit = self.numbers, 0.8, 0.25
        shown, said = {True: 0.0, False: 0.0}, {True: 0.0, False: 0.0}
        ahead = {k: foreseen.get(k, rates[k] ** 2) for k in directions}
        for k, part in enumerate(self.parts):
            went = part.memory.get("went")
            if went is not None and k in gradients:
                length, predicted, slope = went
                last = past[k]
                assert last is not None
                shown[k in foreseen] += -length * float((last * gradients[k]).sum()) / terms - slope
                said[k in foreseen] += predicted
        for curved in (True, False):
            if said[curved] > 0:
                for name, told in (("shown", shown), ("said", said)):
                    numbers[f"{name}{curved}"] = memory * numbers.get(f"{name}{curved}", 0.0) + 0.2 * told[curved]
        numbers["heard"] = numbers.get("heard", 0) + (said[True] > 0)
        left = memory ** numbers["heard"] * limit
        ratio = max((numbers.get("shownTrue", 0.0) + left) / (numbers.get("saidTrue", 0.0) + left / 50), 1e-300)
        factor = shortened(sum(foreseen.values()), min(max(limit / ratio, 0.005), 0.1))
        bend = max(numbers.get("shownFalse", 0.0) / max(numbers.get("saidFalse", 0.0), 1e-300), 0.0)
        loose = shortened(sum(v for k, v in ahead.items() if k not in foreseen) * bend, limit)
        factors = {k: factor if k in foreseen else loose for k in directions}
        for k in gradients:
            part = self.parts[k]
            slope = float((directions[k] * gradients[k]).sum())
            length = rates[k] * factors[k]
            part.memory["went"] = length, ahead[k] * factors[k] ** 2, -length * slope / terms
        return factors

    def _write(self, part: Part, matrix: Tensor) -> None:
        for parameter, value in zip(part.parameters, part.unpack(matrix)):
            parameter.copy_(value)
        if self.settings["rescale"] is None or part.norm or part.kind == "loose":
            return
        if not isinstance(part.module, nn.Embedding):
            weight = part.parameters[0]
            factor = math.sqrt(2 * len(weight)) / (float(weight.norm()) + 1e-9)
            weight.mul_(factor if self.settings["rescale"] == "always" else min(factor, 1.0))

    def _conjugate(self, gradients: dict[int, Tensor], lr: float, damping: float) -> None:
        """d = -q(g) + beta d' over all parameters, with the decay in the gradient; beta within [0, 1]."""
        s, parts = self.settings, self.parts
        for k in gradients:
            part = parts[k]
            gradients[k] = gradients[k] + self._decays(part) * part.pack([p.detach() for p in part.parameters])
        z = self._solve(gradients, damping)
        delta = total(z, gradients)
        last = {k: parts[k].memory.get("nlcg", torch.zeros_like(z[k])) for k in gradients}
        beta = 0.0
        if self.step_number > 1:
            natural = {k: parts[k].memory.get("natural", torch.zeros_like(z[k])) for k in gradients}
            over = total(natural, gradients) if s["beta"] == "polak_ribiere" else 0.0
            beta = min(max((delta - over) / max(self.numbers["delta"], 1e-30), 0.0), 1.0)
            if delta + beta * total(last, gradients) < 1e-3 * delta:
                beta = 0.0
        self.numbers["delta"] = delta
        for k in gradients:
            part, d = parts[k], z[k] + beta * last[k]
            part.memory |= {"nlcg": d, "natural": z[k]}
            rates = lr * part.spread([self._rate(p) for p in part.parameters])
            self._write(part, part.pack([p.detach() for p in part.parameters]) - rates * d)


def eye(n: int) -> Tensor:
    """The identity [n, n]."""
    return torch.eye(n, dtype=torch.float64)


def shortened(change: float, bound: float) -> float:
    """The factor, at most 1, that brings a quadratic change to the bound."""
    return min(1.0, math.sqrt(bound / max(abs(change), 1e-300)))


def total(ones: Mapping[int, Tensor], others: Mapping[int, Tensor]) -> float:
    """The inner product over all parts."""
    return sum(float((ones[k] * others[k]).sum()) for k in ones)
