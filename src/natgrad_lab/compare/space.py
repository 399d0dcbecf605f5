"""What a contender's tuning may choose from: a range or a list for each number, and seeded points of all of them.

Points are a Latin hypercube: of n points, one lies in each n-th of every range, and lists are gone through evenly. With
a dozen trials that covers a space better than independent draws do.
"""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OUTER = 0.1
"""Share of a range, in logarithms, that counts as its edge."""


@dataclass(frozen=True)
class LogUniform:
    """Numbers from `low` to `high`, each factor as likely as any other."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < math.inf:
            raise ValueError(f"a range from {self.low:g} to {self.high:g} has no logarithm; give 0 < low < high")

    def spread(self, count: int, draw: random.Random) -> list[float]:
        """One number in each of `count` equal parts of the range, shuffled, to three digits."""
        shares = [(part + draw.random()) / count for part in range(count)]
        draw.shuffle(shares)
        return [float(f"{self.low * (self.high / self.low) ** share:.3g}") for share in shares]

    def at_edge(self, value: float) -> bool:
        """Whether a value lies in the outer tenth: a wider range might hold a better one."""
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return not OUTER <= share <= 1 - OUTER

    def words(self) -> str:
        return f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[Any, ...]

    def spread(self, count: int, draw: random.Random) -> list[Any]:
        """Every value as often as any other, shuffled."""
        found = [self.values[place % len(self.values)] for place in range(count)]
        draw.shuffle(found)
        return found

    def at_edge(self, value: Any) -> bool:
        """Whether a number ends a list of more than two; zero switches something off and is no edge."""
        numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in self.values)
        return numbers and len(self.values) > 2 and value != 0 and value in (min(self.values), max(self.values))

    def words(self) -> str:
        return ", ".join(str(value) for value in self.values)


Space = Mapping[str, LogUniform | Choice]


def points(space: Space, first: Mapping[str, Any], count: int, seed: str) -> list[dict[str, Any]]:
    """Return `count` points, the first of them given, the others spread over the space as the seed says."""
    draw = random.Random(seed)
    columns = {name: one.spread(count - 1, draw) for name, one in space.items()} if count > 1 else {}
    others = [{name: column[place] for name, column in columns.items()} for place in range(count - 1)]
    return [{name: first[name] for name in space}, *others]


def edges(space: Space, values: Mapping[str, Any]) -> list[str]:
    """Return the names whose value lies on the edge of what was declared."""
    return [name for name, one in space.items() if one.at_edge(values[name])]
