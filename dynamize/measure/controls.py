"""Is a network with gates input-adaptive? What it answers if its decisions are dealt to other images, or fixed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynamize.data import Images
from dynamize.measure.accuracy import everything
from dynamize.nn.network import DynamicNetwork

ADAPTIVE = 0.005  # accuracy that decisions must be worth against permuted ones
_BATCH = 256


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
    logits, labels, choices = everything(network, images, device)
    saved = [unit.path_macs[-1] - np.array(unit.path_macs) for unit in network.units]
    order = torch.randperm(len(choices), generator=torch.Generator().manual_seed(seed))
    wanted = float(sum(one[choices[:, u].numpy()].mean() for u, one in enumerate(saved)))
    fixed = [
        (float(sum(one[path] for one, path in zip(saved, paths, strict=True))), paths)
        for paths in static_paths(choices.numpy(), saved)
    ]
    return Adaptivity(
        decided=_accuracy(logits[-1], labels),
        permuted=_forced_accuracy(network, images, device, choices[order]),
        fixed=_interpolated(network, images, device, fixed, wanted),
        routings=len(torch.unique(choices, dim=0)),
        images=len(labels),
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
    network: DynamicNetwork,
    images: Images,
    device: torch.device,
    fixed: Sequence[tuple[float, list[int]]],
    wanted: float,
) -> float:
    """Accuracy of a static sub-network that saves ``wanted`` MACs, from its two neighbours."""
    dearer = next((i for i, (saving, _) in enumerate(fixed) if saving <= wanted), len(fixed) - 1)
    pair = [fixed[max(0, dearer - 1)], fixed[dearer]]
    count = sum(len(labels) for _, labels in images.batches(_BATCH))
    found = [_forced_accuracy(network, images, device, torch.tensor(paths).expand(count, -1)) for _, paths in pair]
    (more, _), (less, _) = pair
    share = (wanted - less) / (more - less) if more > less else 0.0
    return found[0] * share + found[1] * (1 - share)


def _forced_accuracy(network: DynamicNetwork, images: Images, device: torch.device, choices_NU: Tensor) -> float:
    """Top-1 of the last exit where each image takes these paths."""
    right, start = 0, 0
    try:
        with torch.no_grad():
            for batch, labels in images.batches(_BATCH, device):
                network.force_paths(choices_NU[start : start + len(batch)])
                answers = network.all_exits(batch)[-1].argmax(1)
                right, start = right + int((answers == labels).sum()), start + len(batch)
    finally:
        network.force_paths(None)
    return right / max(1, start)


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())
