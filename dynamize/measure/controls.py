"""Is a network with gates input-adaptive? What it answers if its decisions are dealt to other images, or fixed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynamize.data import Images
from dynamize.measure.accuracy import accuracy, everything
from dynamize.measure.costs import exit_costs
from dynamize.nn.network import DynamicNetwork

ADAPTIVE = 0.005  # accuracy that decisions must be worth against permuted ones


@dataclass(frozen=True)
class Adaptivity:
    """Top-1 of the last exit, as a fraction, with gates deciding and with the two controls at the same mean MACs.

    Attributes:
        decided: each image with its own decisions.
        permuted: each image with those of another one, drawn at random.
        fixed: the best static sub-network that the decisions suggest: the paths taken most often, as many as the mean
            MACs pay for; between the two nearest of them by linear interpolation. Not trained further.
        routings: distinct rows of decisions.
        images: how many were judged.
    """

    decided: float
    permuted: float
    fixed: float
    routings: int
    images: int

    @property
    def adaptive(self) -> bool:
        """Whether deciding for each image is worth it."""
        return self.decided - self.permuted >= ADAPTIVE and self.decided > self.fixed

    def verdict(self) -> str:
        """One plain sentence."""
        facts = (
            f"{self.routings} different routings for {self.images} images; decisions of other images lose "
            f"{100 * (self.decided - self.permuted):.2f} points, the best static sub-network at the same MACs loses "
            f"{100 * (self.decided - self.fixed):.2f}"
        )
        if self.adaptive:
            return facts
        return f"not input-adaptive: {facts}. A static network of these blocks, trained further, would do as well"


def adaptivity(network: DynamicNetwork, images: Images, device: torch.device, seed: int = 0) -> Adaptivity:
    """Run ``network``, exits off, on a split with its own decisions and with those of the controls."""
    seen = everything(network, images, device)
    decisions = exit_costs(network).changing
    saved = [max(one.macs) - np.array(one.macs) for one in decisions]
    choices = torch.stack([seen.taken[one.name] for one in decisions], 1)
    order = torch.randperm(len(choices), generator=torch.Generator().manual_seed(seed))
    wanted = float(sum(one[choices[:, u].numpy()].mean() for u, one in enumerate(saved)))
    fixed = [
        (float(sum(one[path] for one, path in zip(saved, paths, strict=True))), paths)
        for paths in static_paths(choices.numpy(), saved)
    ]

    def forced(choices_NU: Tensor) -> float:
        """Top-1 of the last exit where each image takes these options."""
        options = {one.name: choices_NU[:, u] for u, one in enumerate(decisions)}
        setting = replace(network.setting, forced=options)
        return accuracy(everything(network, images, device, setting).logits[-1], seen.labels)

    return Adaptivity(
        decided=accuracy(seen.logits[-1], seen.labels),
        permuted=forced(choices[order]),
        fixed=_interpolated(lambda paths: forced(torch.tensor(paths).expand(len(choices), -1)), fixed, wanted),
        routings=len(torch.unique(choices, dim=0)),
        images=len(seen.labels),
    )


def static_paths(choices_NU: NDArray[np.int64], saved: Sequence[NDArray[np.float64]]) -> list[list[int]]:
    """Static sub-networks from the cheapest to the whole one, each one step of one unit dearer than the one before: the
    step that most images take comes first."""
    steps = [
        (-float((choices_NU[:, u] >= path).mean()), path, u)
        for u, one in enumerate(saved)
        for path in range(1, len(one))
    ]
    paths = [0] * len(saved)
    found = [list(paths)]
    for _, path, unit in sorted(steps):
        paths[unit] = max(paths[unit], path)
        found.append(list(paths))
    return found


def _interpolated(
    judge: Callable[[list[int]], float], fixed: Sequence[tuple[float, list[int]]], wanted: float
) -> float:
    """Accuracy of a static sub-network that saves ``wanted`` MACs, from its two neighbours."""
    dearer = next((i for i, (saving, _) in enumerate(fixed) if saving <= wanted), len(fixed) - 1)
    (more, cheap), (less, dear) = fixed[max(0, dearer - 1)], fixed[dearer]
    share = (wanted - less) / (more - less) if more > less else 0.0
    return judge(cheap) * share + judge(dear) * (1 - share)
