"""How many channels each group keeps: by a share of them, or by what each can spare, in whole multiples."""

import copy
from collections.abc import Mapping, Sequence

from torch import Tensor

from dynamize.compression.removal import ChannelGroup, remove
from dynamize.compression.sensitivity import Sensitivity
from dynamize.nn.network import DynamicNetwork
from dynamize.rewrite.exchange import count_again

Widths = tuple[int, ...]  # channels that stay, one for each group


def kept_width(channels: int, share: float, multiple: int) -> int:
    """The multiple nearest to ``share`` of the channels, at least one and at most all channels."""
    steps = max(1, int(share * channels / multiple + 0.5))
    return min(channels, steps * multiple)


def uniform(groups: Sequence[ChannelGroup], ratio: float, multiple: int) -> Widths:
    """Every group without this share of its channels."""
    return tuple(kept_width(group.channels, 1 - ratio, group.step(multiple)) for group in groups)


def spared(groups: Sequence[ChannelGroup], found: Sensitivity, drop: float, multiple: int) -> Widths:
    """Every group without as many channels as it loses alone for this accuracy drop."""
    return tuple(
        kept_width(group.channels, 1 - found.ratio_at(group.name, drop), group.step(multiple)) for group in groups
    )


def between(groups: Sequence[ChannelGroup], final: Widths, progress: float, multiple: int) -> Widths:
    """Widths on the way from all channels (0) to ``final`` (1), each round taking the same share of what is left."""
    return tuple(
        max(width, kept_width(group.channels, (width / group.channels) ** progress, group.step(multiple)))
        for group, width in zip(groups, final, strict=True)
    )


def least_worth(groups: Sequence[ChannelGroup], worth: Mapping[str, Tensor], widths: Widths) -> dict[str, list[int]]:
    """For each group the channels that go so that as many stay as ``widths`` says."""
    return {
        group.name: worth[group.name].argsort(stable=True)[: group.channels - width].tolist()
        for group, width in zip(groups, widths, strict=True)
    }


def by_harm(groups: Sequence[ChannelGroup], worth: Mapping[str, Tensor], wide: Widths, narrow: Widths) -> list[int]:
    """Indices of the groups that two plans differ in; first those whose channels in between are worth least in sum."""

    def harm(index: int) -> float:
        group = groups[index]
        ascending = worth[group.name].sort().values
        return float(ascending[group.channels - wide[index] : group.channels - narrow[index]].sum())

    return sorted((i for i in range(len(groups)) if wide[i] != narrow[i]), key=harm)


def partly(wide: Widths, narrow: Widths, order: Sequence[int], share: float) -> Widths:
    """The first ``share`` of the groups in ``order`` as the second plan says, the others as the first does."""
    taken = set(order[: round(share * len(order))])
    return tuple(narrow[i] if i in taken else wide[i] for i in range(len(wide)))


def narrowed(network: DynamicNetwork, groups: Sequence[ChannelGroup], widths: Widths) -> DynamicNetwork:
    """A copy of these widths, to be counted and timed: which channels stay makes no difference to that."""
    narrow = copy.deepcopy(network)
    pairs = zip(groups, widths, strict=True)
    remove(narrow, groups, {group.name: range(width, group.channels) for group, width in pairs})
    count_again(narrow)
    return narrow


def removed_share(groups: Sequence[ChannelGroup], widths: Widths) -> float:
    """The share of all groups' channels that goes."""
    channels = sum(group.channels * group.together for group in groups)
    left = sum(width * group.together for group, width in zip(groups, widths, strict=True))
    return 1 - left / max(1, channels)
