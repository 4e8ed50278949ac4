"""Recording which way each image takes, batch after batch."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dynamize.nn.executor import Routed, exits_of, side_by_side


@dataclass
class Routing:
    """The options that each image took in each decision.

    Attributes:
        leaving: names of the decisions at which images may leave, in order.
        changing: names of the others.
        images: how many were seen.
    """

    leaving: tuple[str, ...] = ()
    changing: tuple[str, ...] = ()
    images: int = 0
    _batches: list[dict[str, Tensor]] = field(default_factory=list)

    def add(self, routed: Routed) -> None:
        """Keep the routing of a batch."""
        self._batches.append(routed.taken)
        self.images += routed.images

    @property
    def taken(self) -> dict[str, Tensor]:
        """By decision, the option of every image seen, in order, (N,), int64; -1 where it was not reached."""
        none = torch.zeros(0, dtype=torch.int64)
        return {
            name: torch.cat([none, *(batch[name] for batch in self._batches)])
            for name in (*self.leaving, *self.changing)
        }

    @property
    def exits(self) -> Tensor:
        """Number of the place at which every image left, (N,), int64; the last is the network's own classifier."""
        return exits_of(self.taken, self.leaving, self.images)

    @property
    def choices(self) -> Tensor:
        """Options of all gated units side by side, (N, U), int64; -1 where the image left before."""
        return side_by_side(self.taken, self.changing, self.images)

    def shares(self, count: int) -> list[float]:
        """Share of the images that left at each of ``count`` exits."""
        seen = torch.bincount(self.exits, minlength=count)
        return (seen / max(1, int(seen.sum()))).tolist()
