"""A space is data: named knobs, the values of each, and which combinations count.

Who samples networks, walks from one to the next or states how many there are reads the same knobs.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from dynamize.errors import DynamizeError

Choice = Mapping[str, Any]
_TRIES = 100_000
_COSTED = 10_000


@dataclass(frozen=True)
class Knob:
    """Values in order; ``log``: small ones are as likely as large ones that lie as far apart in per cent."""

    values: Sequence[Any]
    log: bool = False

    def sample(self, generator: Random) -> Any:
        """One of the values."""
        if not self.log:
            return generator.choice(self.values)
        return generator.choices(self.values, [1 / value for value in self.values])[0]


class Space(ABC):
    """Named choices.

    Attributes:
        knobs: by name.
        rising: names of knobs with the same values each, which may not fall from one to the next.

    Example:
        >>> from random import Random
        >>> from dynamize.search.regnets import AnyNetSpace
        >>> space = AnyNetSpace("E")
        >>> choice = space.sample(Random(0))
        >>> choice["d1"] <= choice["d2"] <= choice["d3"] <= choice["d4"]
        True
    """

    knobs: Mapping[str, Knob]
    rising: Sequence[Sequence[str]] = ()

    @abstractmethod
    def describe(self, choice: Choice) -> str:
        """What was chosen, as one types it."""

    def allowed(self, choice: Choice) -> bool:
        """Whether a combination counts."""
        rows = [[choice[name] for name in names] for names in self.rising]
        return all(row == sorted(row) for row in rows)

    @property
    def size(self) -> int:
        """How many combinations there are; where a space overrides :meth:`allowed`, at most."""
        tied = {name for names in self.rising for name in names}
        free = math.prod(len(knob.values) for name, knob in self.knobs.items() if name not in tied)
        steps = [(len(self.knobs[names[0]].values), len(names)) for names in self.rising]
        return free * math.prod(math.comb(values + many - 1, many) for values, many in steps)

    def sample(self, generator: Random) -> dict[str, Any]:
        """A combination that counts: each knob by itself, drawn again as a whole until they do.

        Raises:
            DynamizeError: none was found.
        """
        for _ in range(_TRIES):
            choice = {name: knob.sample(generator) for name, knob in self.knobs.items()}
            if self.allowed(choice):
                return choice
        raise DynamizeError(f"none of {_TRIES} combinations drawn at random counts: widen the space")

    def neighbours(self, choice: Choice) -> list[dict[str, Any]]:
        """Those that count in which one knob stands one value further on or back."""
        found: list[dict[str, Any]] = []
        for name, knob in self.knobs.items():
            place = knob.values.index(choice[name])
            for other in (place - 1, place + 1):
                if 0 <= other < len(knob.values):
                    found.append({**choice, name: knob.values[other]})
        return [one for one in found if self.allowed(one)]


def sample_within(
    space: Space, cost: Callable[[Choice], float], low: float, high: float, generator: Random
) -> dict[str, Any]:
    """A combination whose cost lies between two: error distributions of networks of mixed costs say nothing
    (Radosavovic et al. 2019, "On Network Design Spaces", section 3).

    Raises:
        DynamizeError: none was found.
    """
    for _ in range(_COSTED):
        choice = space.sample(generator)
        if low <= cost(choice) <= high:
            return choice
    raise DynamizeError(f"none of {_COSTED} networks drawn at random costs {low:g} to {high:g}: allow a wider range")
