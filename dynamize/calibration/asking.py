"""Which of the networks in a row are asked at all, and how their answers are joined: another table for each.

All are arithmetic on what each network answers alone, which one pass over the images gives.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dynamize.calibration.operating import OperatingPoint
from dynamize.measure.accuracy import Seen
from dynamize.nn.cascade import numbers
from dynamize.nn.joining import Joining
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting
from dynamize.nn.scoring import join, weigh

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Asking:
    """What is the same for all images at an operating point of several networks.

    Attributes:
        off: names of the networks that are not asked.
        combine: how the answers of the others are joined.
    """

    off: tuple[str, ...] = ()
    combine: Joining = "last"

    @classmethod
    def at(cls, network: DynamicNetwork, setting: Setting) -> "Asking":
        """As a network runs at a setting."""
        off = tuple(piece.name for piece in network.leaving if piece.links and piece.idle(setting))
        return cls(off, setting.combine)

    def leaves_out(self, name: str) -> bool:
        """Whether a decision, or a place where images may leave, is in a network that is not asked."""
        return name.partition("/")[0] in self.off

    def kept(self, names: Sequence[str]) -> list[int]:
        """Which of K - 1 places where images may leave there are, and the end."""
        return [*(k for k, name in enumerate(names) if not self.leaves_out(name)), len(names)]

    def costs(self, network: DynamicNetwork, cumulative_K: Floats) -> Floats:
        """What leaving at each place (K,) costs without the networks that are not asked."""
        found, start = cumulative_K.copy(), 0.0
        for k, piece in enumerate(network.leaving):
            if piece.links:
                if piece.name in self.off:
                    found[k:] -= cumulative_K[k] - start
                start = float(cumulative_K[k])
        return found

    def savings(self, saved: Mapping[str, Floats]) -> dict[str, Floats]:
        """By decision, what each image saves there: nothing in a network that is not asked."""
        return {name: 0 * each if self.leaves_out(name) else each for name, each in saved.items()}

    def seen(self, network: DynamicNetwork, seen: Seen) -> Seen:
        """What the networks answer together, and how sure they are."""
        if self.combine == "last" and all(piece.alone for piece in network.leaving):
            return seen
        logits, scores = list(seen.logits), list(seen.scores)
        before: NDArray[np.floating[Any]] | None = None
        votes: list[NDArray[np.int64]] = []
        for k, piece in enumerate(network.scored):
            if not piece.links or piece.name in self.off:
                continue
            own = numbers(seen.logits[k])
            answer = weigh(self.combine, own, piece.temperature.item())
            if before is not None:
                answer = join(self.combine, before, answer)
            votes.append(own.argmax(axis=1))
            if self.combine != "last":
                before, logits[k] = answer, torch.from_numpy(answer)
            if k < len(scores):
                scores[k] = torch.from_numpy(piece.rated(answer, None if piece.alone else np.stack(votes, axis=1)))
        return replace(seen, logits=logits, scores=scores)

    def put(self, network: DynamicNetwork, point: OperatingPoint) -> OperatingPoint:
        """A point that was found on the table, for the whole network: the networks that are not asked are off, and
        no image leaves there."""
        if not network.members:
            return point
        names = [piece.name for piece in network.leaving]
        shares = dict(zip(point.thresholds, point.exits, strict=False))  # the last share is the end's
        exits = [*(shares.get(name, 0.0) for name in names), point.exits[-1]]
        thresholds = {name: point.thresholds.get(name) for name in names}
        return point.model_copy(update={"thresholds": thresholds, "exits": exits, "combine": self.combine})


EVERYONE_ASKED = Asking()


def askings(network: DynamicNetwork, labelled: bool) -> Iterator[Asking]:
    """All that may be tried: each choice of the networks in front, joined in each way that is allowed; one where there
    are no others."""
    names = network.members
    joinings = network.combining if labelled else ("last",)
    always = {piece.name for piece in network.leaving if piece.links and piece.chained}
    yield Asking(tuple(name for name in names if name not in always))
    needs = {piece.name: piece.needs for piece in network.leaving if piece.needs}
    for count, combine in product(range(1, len(names) + 1), joinings):
        for asked in combinations(names, count):
            if not always.issubset(asked) or (always.issuperset(asked) and combine == "last"):
                continue  # they run in any case; and that they alone are asked was the first
            if any(one in needs and needs[one] not in asked for one in asked):
                continue  # what it would answer without what it needs is not known
            yield Asking(tuple(name for name in names if name not in asked), combine)
