"""Numbers that change as training goes: each schedule is a frozen function of progress, and nothing else.

Progress t is a fraction of the run (0 at the first step, 1 after the last one), or any other unit as long as
a schedule's own fields use the same. A schedule gives a multiplier: the value is (start value) x schedule(t).
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """A multiplier that depends on progress alone."""

    def __call__(self, t: float) -> float:
        raise NotImplementedError(f"{type(self).__name__} has no rule")


@dataclass(frozen=True)
class Constant(Schedule):
    """One all the way."""

    def __call__(self, t: float) -> float:
        return 1.0


@dataclass(frozen=True)
class Polynomial(Schedule):
    """(1 - (t - begin) / (end - begin))^power: 1 before begin, 0 after end (SP-NGD, equation 21).

    The papers stop before `end`: 35 of 53 epochs is end=53/35 in fractions of the run.
    """

    power: float = 2.0
    """Exponent p of the decay."""
    begin: float = 0.0
    """Progress at which the decay starts."""
    end: float = 1.0
    """Progress at which the value is zero; may lie behind the end of the run."""

    def __post_init__(self) -> None:
        _ordered(self.begin, self.end)
        if self.power <= 0:
            raise ValueError(f"power={self.power:g} must be positive; 1 is a straight line")

    def __call__(self, t: float) -> float:
        return (1.0 - _share(t, self.begin, self.end)) ** self.power


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from 1 down to `final`: flat at both ends."""

    begin: float = 0.0
    """Progress at which the decay starts."""
    end: float = 1.0
    """Progress at which `final` is reached."""
    final: float = 0.0
    """The multiplier at the end."""

    def __post_init__(self) -> None:
        _ordered(self.begin, self.end)

    def __call__(self, t: float) -> float:
        height = 0.5 * (1.0 + math.cos(math.pi * _share(t, self.begin, self.end)))
        return self.final + (1.0 - self.final) * height


@dataclass(frozen=True)
class Piecewise(Schedule):
    """Constant between the boundaries: `values` has one entry more than `boundaries`."""

    boundaries: tuple[float, ...] = (0.5, 0.75)
    """Progress at which the next value begins, rising."""
    values: tuple[float, ...] = (1.0, 0.1, 0.01)
    """The multiplier before, between and after the boundaries."""

    def __post_init__(self) -> None:
        if len(self.values) != len(self.boundaries) + 1:
            raise ValueError(f"{len(self.values)} values for {len(self.boundaries)} boundaries; give one value more")
        if list(self.boundaries) != sorted(self.boundaries):
            raise ValueError(f"boundaries={self.boundaries} must rise")

    def __call__(self, t: float) -> float:
        return self.values[sum(t >= boundary for boundary in self.boundaries)]


@dataclass(frozen=True)
class Exponential(Schedule):
    """ratio^(t / length): SENG's damping falls to nine tenths in every ten epochs."""

    ratio: float = 0.9
    """The multiplier after each `length`."""
    length: float = 0.1
    """Progress in which the value changes by `ratio`."""

    def __post_init__(self) -> None:
        _ordered(0.0, self.length)
        if not 0 < self.ratio < math.inf:
            raise ValueError(f"ratio={self.ratio:g} must be positive; 0.9 takes a tenth off in every length")

    def __call__(self, t: float) -> float:
        return self.ratio ** (t / self.length)


@dataclass(frozen=True)
class Product(Schedule):
    """One schedule times another."""

    one: Schedule = Constant()
    """The first factor."""
    other: Schedule = Constant()
    """The second factor."""

    def __call__(self, t: float) -> float:
        return self.one(t) * self.other(t)


@dataclass(frozen=True)
class WarmUp(Schedule):
    """A straight line from `start` up to 1 over `length`, times another schedule from t = 0 on."""

    then: Schedule = Constant()
    """The schedule that the warm-up multiplies."""
    length: float = 0.05
    """Progress at which the warm-up is over."""
    start: float = 0.0
    """The multiplier at t = 0."""

    def __post_init__(self) -> None:
        _ordered(0.0, self.length)

    def __call__(self, t: float) -> float:
        return (self.start + (1.0 - self.start) * _share(t, 0.0, self.length)) * self.then(t)


@dataclass(frozen=True)
class RootWarmUp(Schedule):
    """1 - (1 - start) sqrt(1 - t / length), times another schedule: slow at first, then steep (NLCG's release)."""

    then: Schedule = Constant()
    """The schedule that the warm-up multiplies."""
    length: float = 0.125
    """Progress at which the warm-up is over."""
    start: float = 0.0
    """The multiplier at t = 0."""

    def __post_init__(self) -> None:
        _ordered(0.0, self.length)

    def __call__(self, t: float) -> float:
        return (1.0 - (1.0 - self.start) * math.sqrt(1.0 - _share(t, 0.0, self.length))) * self.then(t)


@dataclass(frozen=True)
class DampingWarmUp(Schedule):
    """From `ratio` down towards 1: the damping warm-up of distributed K-FAC (attributed to Osawa et al. 2019).

        lambda(n) = (1 - c) lambda(n - 1) + c lambda_target,   c = 2 log10(lambda_0 / lambda_target) / steps

    after n updates, here in closed form: lambda(n) / lambda_target = 1 + (ratio - 1) (1 - c)^n. It goes on beyond
    the warm-up's steps, after which it is near (ratio - 1) / ratio^0.87 above 1.
    """

    ratio: float = 100.0
    """Damping at the start over the damping that is aimed at, lambda_0 / lambda_target."""
    length: float = 0.1
    """Progress at which the warm-up's steps are done."""
    steps: int = 100
    """Updates within that length, T_warmup."""

    def __post_init__(self) -> None:
        _ordered(0.0, self.length)
        if not 1 <= self.ratio < math.inf:
            raise ValueError(f"ratio={self.ratio:g} must be at least 1: the damping at the start over its target")
        if self.steps < 1 or self.rate >= 1:
            raise ValueError(
                f"steps={self.steps} are too few to come down from {self.ratio:g} times the damping; "
                f"give more than {2 * math.log10(self.ratio):g}"
            )

    @property
    def rate(self) -> float:
        """c, the share of the way that an update goes."""
        return 2 * math.log10(self.ratio) / self.steps

    def __call__(self, t: float) -> float:
        return 1 + (self.ratio - 1) * (1 - self.rate) ** (t / self.length * self.steps)


def _share(t: float, begin: float, end: float) -> float:
    """How much of [begin, end] lies behind t, from 0 to 1."""
    return min(1.0, max(0.0, (t - begin) / (end - begin)))


def _ordered(begin: float, end: float) -> None:
    if not begin < end:
        raise ValueError(f"a schedule from {begin:g} to {end:g} has no length; its end must come after its begin")


SCHEDULES: dict[str, type[Schedule]] = {
    "Constant": Constant,
    "Cosine": Cosine,
    "DampingWarmUp": DampingWarmUp,
    "Exponential": Exponential,
    "Piecewise": Piecewise,
    "Polynomial": Polynomial,
    "Product": Product,
    "RootWarmUp": RootWarmUp,
    "WarmUp": WarmUp,
}
"""What --schedule takes."""
