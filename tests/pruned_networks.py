"""Networks whose channels are coupled in the ways that pruning has to understand, and what masking them gives."""

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from networks import conv_block, randomise_norms
from torch import Tensor, nn
from torch.nn import functional as F

from dynamize.compression.layers import layers
from dynamize.compression.removal import ChannelGroup, Member
from dynamize.nn.gates import ALL_OPEN
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting


class SqueezeNet(nn.Module):
    """An inverted residual block: 1x1, depthwise 3x3, squeeze and excitation, 1x1, shortcut. (3, 8, 8) -> 5."""

    shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_block(3, 8)
        self.expand, self.norm1 = nn.Conv2d(8, 24, 1), nn.BatchNorm2d(24)
        self.depth, self.norm2 = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), nn.BatchNorm2d(24)
        self.squeeze, self.excite = nn.Conv2d(24, 6, 1), nn.Conv2d(6, 24, 1)
        self.project, self.norm3 = nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.hardswish(self.norm2(self.depth(F.relu(self.norm1(self.expand(x))))))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        x = x + self.norm3(self.project(y))
        return self.linear(x.mean((2, 3)))


class ConcatNet(nn.Module):
    """Two branches side by side, flattened into a linear layer. (3, 8, 8) -> 5."""

    shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1)
        self.c = nn.Conv2d(10, 8, 3, padding=1)
        self.linear = nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.c(F.relu(torch.cat([self.a(x), self.b(x)], 1))))
        return self.linear(F.max_pool2d(x, 2).flatten(1))


class NormedNet(nn.Module):
    """A group norm mixes its channels, so those before it cannot go unnoticed. (3, 8, 8) -> 5."""

    shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(1, 8)
        self.b = nn.Conv2d(8, 6, 3, padding=1)
        self.linear = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.relu(self.b(F.relu(self.norm(self.a(x))))).mean((2, 3)))


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomise_norms(kind()).eval()


def masked_answers(
    network: DynamicNetwork,
    groups: Sequence[ChannelGroup],
    removed: Mapping[str, Sequence[int]],
    images: Tensor,
) -> list[Tensor]:
    """Logits of all exits where whatever reads a channel that goes is handed zeros: by hooks, at full size."""
    network = copy.deepcopy(network).eval()
    known = layers(network)
    for group in groups:
        for member in group.members:
            if member.side == "in" and member.dim is None:
                known[member.layer].register_forward_pre_hook(_zeroing(member, removed[group.name]))
    with torch.no_grad():
        return network.all_exits(images, Setting(offset=ALL_OPEN))


def _zeroing(member: Member, channels: Sequence[int]) -> Callable[..., tuple[Tensor, ...]]:
    places = member.index[torch.as_tensor(list(channels), dtype=torch.int64)].flatten()

    def zero(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        handed = inputs[0].clone()
        handed[:, places] = 0
        return (handed, *inputs[1:])

    return zero
