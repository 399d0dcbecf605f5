"""What holds a step on many ranks, and what would bring it nearer to SGD's: each change planned, alone and together.

Changes are settings that the optimizer has, and ways to run a step that it does not have yet (stages.Ways). All of them
are planned in the same way; what is said follows from what they come to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from natgrad_lab.plan.advice import every, line, worse
from natgrad_lab.plan.links import seconds
from natgrad_lab.plan.scaling import Planner, afforded, share_of
from natgrad_lab.plan.stages import STAGES, Account, Ways
from natgrad_lab.train.optimizers import Settings, Sgd

TARGET = 1.10
"""A step of so many times SGD's is near enough."""
LEAST = 2e-3
"""A gain below this share of SGD's step is none."""
LONGEST = 1000
"""Steps between measurements beyond which nothing is proposed."""


@dataclass(frozen=True)
class Change:
    """Something that could be done: settings of the optimizer, or a way to run its step."""

    words: str
    settings: dict[str, Any] = field(default_factory=dict)
    ways: dict[str, bool] = field(default_factory=dict)


LEVELS = "messages go inside of hosts first, then between them"
SETTINGS = (
    Change("gradients leave during the backward pass", {"overlap": True}),
    Change("statistics travel in half precision", {"wire": "bfloat16"}),
    Change("weights travel in half precision", {"weights_wire": "bfloat16"}),
    Change("8 rows are measured for each dimension", {"rows_per_dim": 8}),
    Change("directions and updates are one CUDA graph", {"graph": True}),
    Change("every rank owns all layers", {"replicated": True}),
)
WAYS = (
    Change("weights are gathered while the next forward pass runs", ways={"weights_late": True}),
    Change("statistics leave during the backward pass", ways={"statistics_early": True}),
    Change("inverses are one step late", ways={"inverses_late": True}),
)


@dataclass(frozen=True)
class Candidate:
    """Settings with a way to run the step, and what an average step takes."""

    settings: Settings
    account: Account
    share: float

    def seconds(self, share: float | None = None) -> float:
        """Of an average step. share: of the statistics that it measures."""
        stale, fresh = (sum(self.account.stages(kind)[0].values()) for kind in (False, True))
        return stale + (self.share if share is None else share) * (fresh - stale)

    def by_cause(self) -> dict[tuple[str, str], float]:
        """Seconds of an average step by stage and by what the stage waits for."""
        stale, fresh = (self.account.spent(kind)[0] for kind in (False, True))
        found = {}
        for stage in STAGES:
            few, many = stale[stage].parts, fresh[stage].parts
            for part in few:
                found[stage, part] = few[part] + self.share * (many[part] - few[part])
        return found


class Remedies:
    """One optimizer on one number of ranks beside SGD."""

    def __init__(
        self,
        planner: Planner,
        settings: Settings,
        ranks: int,
        batch: int,
        adaptive: float,
        target: float = TARGET,
    ):
        self.target = target
        self.planner, self.ranks, self.batch, self.adaptive = planner, ranks, batch, adaptive
        self.sgd = Candidate(Sgd(), planner.account(Sgd(), ranks, batch), 0.0)
        self.base = self.sgd.seconds(0.0)
        self.now = self.planned(settings, Ways())

    def planned(self, settings: Settings, ways: Ways) -> Candidate:
        """What these settings come to."""
        account = self.planner.account(settings, self.ranks, self.batch, ways)
        share = afforded(account, share_of(account, self.adaptive), account.stages(True)[0])
        return Candidate(settings, account, share)

    def with_change(self, before: Candidate, change: Change) -> Candidate | None:
        """A candidate with one more change; None where it says nothing to the optimizer."""
        if change.ways:
            account = replace(before.account, ways=replace(before.account.ways, **change.ways))
            return replace(before, account=account)
        for name, value in change.settings.items():
            if not hasattr(before.settings, name) or getattr(before.settings, name) == value:
                return None
            if worse(before.settings, name, value):
                return None
        try:
            return self.planned(replace(before.settings, **change.settings), before.account.ways)
        except ValueError:  # settings that exclude each other
            return None

    def holds(self) -> list[dict[str, Any]]:
        """By how much longer than SGD's a step waits, stage by stage, the longest first."""
        theirs = self.sgd.by_cause()
        rows = [
            {"stage": stage, "waits for": part, "seconds": spent, "more": spent - theirs[stage, part]}
            for (stage, part), spent in self.now.by_cause().items()
        ]
        return sorted((row for row in rows if row["more"] > LEAST * self.base), key=lambda row: -row["more"])

    def alone(self) -> list[tuple[Change, Candidate]]:
        """Every change by itself, the best first."""
        changes = [*SETTINGS, *WAYS]
        devices = self.planner.machine.devices
        if self.ranks > devices and self.ranks % devices == 0 and not self.planner.machine.one_host:
            changes.append(Change(LEVELS, {"per_host": devices}))
        found = [(change, made) for change in changes if (made := self.with_change(self.now, change))]
        return sorted(found, key=lambda pair: pair[1].seconds())

    def together(self, start: Candidate, changes: Sequence[Change]) -> Iterator[tuple[Change, Candidate]]:
        """Changes on top of each other, in this order, as long as the target is not reached; those that help."""
        best = start
        for change in changes:
            if best.seconds() <= self.target * self.base:
                return
            made = self.with_change(best, change)
            if made is not None and made.seconds() < best.seconds() - LEAST * self.base:
                best = made
                yield change, made

    def interval(self, candidate: Candidate) -> int | None:
        """The shortest interval between measurements that reaches the target; None: none does."""
        stale, fresh = candidate.seconds(0.0), candidate.seconds(1.0)
        room = self.target * self.base - stale
        if room <= 0 or fresh <= stale:
            return None
        steps = max(1, -int(-(fresh - stale) // room))
        return steps if steps <= LONGEST else None


def remedies(planner: Planner, settings: Settings, ranks: int, batch: int, adaptive: float) -> dict[str, Any] | None:
    """All of it as plain values; None for an optimizer whose step is SGD's."""
    one = Remedies(planner, settings, ranks, batch, adaptive)
    if one.now.account.rehearsal.second is None:
        return None
    alone = one.alone()
    # also those that help only once others have been made
    by_settings = list(one.together(one.now, [change for change, _ in alone if change.settings]))
    best = by_settings[-1][1] if by_settings else one.now
    by_ways = list(one.together(best, [change for change, _ in alone if change.ways]))
    steps = one.interval(best)
    interval = None
    if steps is not None and best.seconds() > one.target * one.base and hasattr(settings, "refresh"):
        interval = {"steps": steps, "line": line(settings, every(best.settings, steps))}
    travel = seconds(one.sgd.account.rehearsal.step(False).messages, planner.machine, ranks)  # FSDP's are hidden
    backward = one.sgd.account.stages(False)[0]["backward"]
    return {
        "ranks": ranks,
        "target": one.target,
        "sgd": one.base,
        "sgd behind": one.base - min(7 / 8 * travel, backward),
        "now": one.now.seconds(),
        "holds": one.holds(),
        "alone": [said(change, made, settings) for change, made in alone],
        "settings": [said(change, made, settings) for change, made in by_settings],
        "ways": [said(change, made, settings) for change, made in by_ways],
        "interval": interval,
    }


def said(change: Change, made: Candidate, before: Settings) -> dict[str, Any]:
    """One change as plain values. line: as the command line takes it, None for what does not exist yet."""
    flags = line(before, made.settings, always=()) if change.settings else None
    return {"words": change.words, "line": flags, "seconds": made.seconds(), "stale": made.seconds(0.0)}


def in_words(found: dict[str, Any], name: str) -> list[str]:
    """What follows from it, a sentence each."""
    base, target = found["sgd"], found["target"]

    def over(seconds: float) -> str:
        return f"{seconds / base:.2f} x SGD's"

    lines = [
        f"On {found['ranks']:,} ranks an average step of {name} takes {over(found['now'])} "
        f"({1e3 * found['now']:.1f} ms; SGD {1e3 * base:.1f}, {1e3 * found['sgd behind']:.1f} if its gradients travel "
        "during its backward pass)."
    ]
    if found["holds"]:
        most = ", ".join(
            f"{row['stage']} for the {WAITS[row['waits for']]} ({1e3 * row['more']:.1f} ms)"
            for row in found["holds"][:4]
        )
        lines.append(f"It waits longer than SGD in: {most}.")
    if found["now"] <= target * base:
        return [*lines, f"That is within {target:.2f} x SGD's."]
    best = found["settings"][-1] if found["settings"] else None
    if best is None:
        lines.append("No setting shortens it.")
    else:
        reached = "reach" if best["seconds"] <= target * base else "do not reach"
        lines.append(f"Settings {reached} {target:.2f}: {over(best['seconds'])} with {best['line']}.")
    if found["interval"] is not None:
        lines.append(
            f"With these, measuring every {found['interval']['steps']} steps reaches it: {found['interval']['line']}."
        )
    if found["ways"]:
        last = found["ways"][-1]["seconds"]
        steps = "; ".join(f"{row['words']} ({over(row['seconds'])})" for row in found["ways"])
        reached = "would reach it" if last <= target * base else "would not reach it either"
        lines.append(f"What natgrad does not do yet {reached}, one on top of the other: {steps}.")
    return lines


WAITS = {"device": "device", "host": "host, which launches", "links": "links"}
