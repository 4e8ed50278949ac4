"""Recording which way each image takes, batch after batch."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dynamize.nn.executor import Routed, Taken


@dataclass
class Routing(Taken):
    """The options that the images of all batches took in each decision."""

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
        none = torch.zeros(0, dtype=torch.int64)
        return {
            name: torch.cat([none, *(batch[name] for batch in self._batches)])
            for name in (*self.leaving, *self.changing)
        }

    def shares(self, count: int) -> list[float]:
        """Share of the images that left at each of ``count`` exits."""
        seen = torch.bincount(self.exits, minlength=count)
        return (seen / max(1, int(seen.sum()))).tolist()
