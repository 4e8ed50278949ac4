"""How accuracy suffers when one group of channels after the other is narrowed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamize.compression.removal import ChannelGroup, silenced
from dynamize.nn.gates import ALL_OPEN
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting
from dynamize.transform import Progress, quiet

RATIOS = (0.25, 0.5, 0.75)  # shares of a group's channels that the scan leaves out


@dataclass(frozen=True)
class Sensitivity:
    """Accuracy that each group loses, by name, at each of ``RATIOS``: top-1 as a fraction, mean over the exits."""

    drops: Mapping[str, tuple[float, ...]]

    def ratio_at(self, name: str, drop: float) -> float:
        """The largest share of a group's channels that may go for this drop, between the points by straight lines.

        Without any channel everything is lost.
        """
        ratio, lost = 0.0, 0.0
        for next_ratio, one in zip([*RATIOS, 1.0], [*self.drops[name], 1.0], strict=True):
            next_lost = max(lost, one)
            if next_lost > drop:
                return ratio + (next_ratio - ratio) * (drop - lost) / (next_lost - lost)
            ratio, lost = next_ratio, next_lost
        return ratio


def scan(
    network: DynamicNetwork,
    groups: Sequence[ChannelGroup],
    worth: Mapping[str, Tensor],
    batches: Sequence[tuple[Tensor, Tensor]],
    progress: Progress = quiet,
) -> Sensitivity:
    """Leave the least worth channels of each group out, alone, and look at the accuracy.

    Args:
        network: as it is, and is afterwards.
        groups: of the network.
        worth: importance of each group's channels (channels,), by name.
        batches: images (N, C, H, W) and labels (N,).
    """
    whole = accuracy(network, batches)
    drops: dict[str, tuple[float, ...]] = {}
    for group in progress(groups, "sensitivity of channels", len(groups)):
        order = worth[group.name].argsort(stable=True).tolist()
        lost = []
        for ratio in RATIOS:
            count = min(group.channels - 1, round(ratio * group.channels))
            with silenced(network, [group], {group.name: order[:count]}):
                lost.append(whole - accuracy(network, batches))
        drops[group.name] = tuple(lost)
    return Sensitivity(drops)


def accuracy(network: DynamicNetwork, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Top-1 with all gates open, mean over the exits."""
    right, count = 0.0, 0
    with torch.no_grad():
        for images, labels in batches:
            exits = network.eval().all_exits(images, Setting(offset=ALL_OPEN))
            answers = [logits.argmax(1) for logits in exits]
            right += sum(float((one == labels).sum()) for one in answers) / len(answers)
            count += len(labels)
    return right / max(1, count)
