"""AnyNet and RegNet (Radosavovic et al. 2020, "Designing Network Design Spaces", sections 3.2 and 3.3).

A stem, stages of bottleneck blocks with grouped convolutions, the first block of each stage at half the resolution, the
mean over what is left and one linear layer. Parameters are called as in torchvision's RegNets, whose checkpoints load
wherever the widths are the same.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynamize.errors import DynamizeError

STAGES = 4
STEM = 32  # channels
_QUANTUM = 8  # what widths of the paper's quantised line are multiples of
Sizes = str | int | float


@dataclass(frozen=True)
class Stage:
    """Neighbouring blocks of one resolution.

    Attributes:
        depth: how many blocks.
        width: channels of what they give.
        group_width: channels of each group of the 3x3 convolution.
        bottleneck: width over the channels of the 3x3 convolution.
    """

    depth: int
    width: int
    group_width: int
    bottleneck: float = 1.0

    @property
    def inner(self) -> int:
        """Channels of the 3x3 convolution."""
        return round(self.width / self.bottleneck)


class SqueezeExcitation(nn.Module):
    """(N, C, H, W) -> the same, each channel times what two layers make of all channels' means (Hu et al. 2018)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.activation = nn.ReLU()
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.scale_activation = nn.Sigmoid()

    def forward(self, features_NCHW: Tensor) -> Tensor:
        scale = self.fc2(self.activation(self.fc1(self.avgpool(features_NCHW))))
        return self.scale_activation(scale) * features_NCHW


class Block(nn.Module):
    """The X block: 1x1, grouped 3x3 and 1x1 convolution with batch norms, beside a shortcut; with ``squeeze`` the Y
    block, whose squeeze-and-excitation has that share of the channels that come in."""

    def __init__(self, in_channels: int, stage: Stage, stride: int, squeeze: float) -> None:
        super().__init__()
        inner, groups = stage.inner, stage.inner // stage.group_width
        changes = stride != 1 or in_channels != stage.width
        self.proj = _conv(in_channels, stage.width, 1, stride, relu=False) if changes else None
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["a"] = _conv(in_channels, inner, 1)
        layers["b"] = _conv(inner, inner, 3, stride, groups)
        if squeeze:
            layers["se"] = SqueezeExcitation(inner, max(1, round(squeeze * in_channels)))
        layers["c"] = _conv(inner, stage.width, 1, relu=False)
        self.f = nn.Sequential(layers)
        self.activation = nn.ReLU()

    def forward(self, features_NCHW: Tensor) -> Tensor:
        shortcut = features_NCHW if self.proj is None else self.proj(features_NCHW)
        return self.activation(shortcut + self.f(features_NCHW))


class AnyNet(nn.Module):
    """``(N, in_channels, H, W) -> (N, num_classes)`` logits.

    Args:
        stages: one or more.
        squeeze: share of a block's channels in its squeeze-and-excitation; 0 for none.
        stem_stride: 2 as published, 1 for images of some 32 pixels.

    Raises:
        DynamizeError: sizes that are not positive, or groups that do not divide the channels.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        squeeze: float = 0.0,
        num_classes: int = 1000,
        in_channels: int = 3,
        stem_stride: int = 2,
    ) -> None:
        super().__init__()
        _check(stages, squeeze, num_classes, in_channels, stem_stride)
        self.stages = tuple(stages)
        self.stem = _conv(in_channels, STEM, 3, stem_stride)
        trunk: OrderedDict[str, nn.Module] = OrderedDict()
        channels = STEM
        for number, stage in enumerate(stages, start=1):
            blocks: OrderedDict[str, nn.Module] = OrderedDict()
            for k in range(stage.depth):
                blocks[f"block{number}-{k}"] = Block(channels, stage, 1 if k else 2, squeeze)
                channels = stage.width
            trunk[f"block{number}"] = nn.Sequential(blocks)
        self.trunk_output = nn.Sequential(trunk)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        self.apply(_initialise)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        features = self.trunk_output(self.stem(images_NCHW))
        return self.fc(torch.flatten(self.avgpool(features), 1))


def quantised_line(d: int, w0: int, wa: float, wm: float) -> tuple[list[int], list[int]]:
    """Depths and widths of the stages of a RegNet (section 3.3, equations 2 to 4).

    Args:
        d: blocks in all.
        w0: width of the first one.
        wa: by how much the line of widths rises from block to block.
        wm: by what factor widths of neighbouring stages differ, about.

    Raises:
        DynamizeError: no such line.
    """
    if not (d >= 1 and d == int(d) and w0 > 0 and w0 % _QUANTUM == 0 and wa >= 0 and wm > 1):
        raise DynamizeError(
            f"regnet: d={d}, w0={w0}, wa={wa:g}, wm={wm:g} describe no network: give at least one block, a width w0 "
            f"that is a multiple of {_QUANTUM}, a slope wa of 0 or more, and a factor wm above 1"
        )
    line = [w0 + wa * j for j in range(d)]
    powers = [round(math.log(u / w0) / math.log(wm)) for u in line]
    widths = [round(w0 * wm**power / _QUANTUM) * _QUANTUM for power in powers]
    distinct = sorted(set(widths))
    return [widths.count(width) for width in distinct], distinct


def snapped(depth: int, width: int, group_width: int, bottleneck: float = 1.0) -> Stage:
    """A stage whose channels are made to fit its groups, as the published networks' are."""
    inner = round(width / bottleneck)
    group = min(group_width, inner)
    inner = max(group, round(inner / group) * group)
    return Stage(depth, round(inner * bottleneck), group, bottleneck)


def regnet(
    d: int = 13,
    w0: int = 24,
    wa: float = 36.44,
    wm: float = 2.49,
    g: int = 8,
    b: float = 1.0,
    se: float = 0.0,
    num_classes: int = 1000,
    in_channels: int = 3,
    stem_stride: int = 2,
) -> AnyNet:
    """A RegNet, by default RegNetX-200MF; with ``se=0.25`` the blocks are those of RegNetY.

    Args:
        d, w0, wa, wm: see :func:`quantised_line`.
        g: group width.
        b: bottleneck ratio.
        se: share of a block's channels in its squeeze-and-excitation; 0 for none.
    """
    depths, widths = quantised_line(d, w0, wa, wm)
    stages = [snapped(depth, width, g, b) for depth, width in zip(depths, widths, strict=True)]
    return AnyNet(stages, se, num_classes, in_channels, stem_stride)


def anynet(
    depths: Sizes = "1-1-4-7",
    widths: Sizes = "24-56-152-368",
    g: Sizes = 8,
    b: Sizes = 1,
    se: float = 0.0,
    num_classes: int = 1000,
    in_channels: int = 3,
    stem_stride: int = 2,
) -> AnyNet:
    """Any stages, by default RegNetX-200MF's.

    Args:
        depths: blocks of each stage.
        widths: channels of each stage.
        g: group width, one for all stages or one for each.
        b: bottleneck ratio, the same.
        se: share of a block's channels in its squeeze-and-excitation; 0 for none.
    """
    blocks, channels = numbers(depths, "depths"), numbers(widths, "widths")
    groups, ratios = (_for_each(given, len(blocks), name) for given, name in ((g, "g"), (b, "b")))
    if len(channels) != len(blocks):
        raise DynamizeError(
            f"anynet: {len(blocks)} depths and {len(channels)} widths: give one of each for every stage"
        )
    stages = [
        Stage(_whole(depth, "depths"), _whole(width, "widths"), _whole(group, "g"), ratio)
        for depth, width, group, ratio in zip(blocks, channels, groups, ratios, strict=True)
    ]
    return AnyNet(stages, se, num_classes, in_channels, stem_stride)


def numbers(given: Sizes, name: str) -> list[float]:
    """``"1-2-7"`` as numbers."""
    try:
        return [float(one) for one in str(given).split("-")]
    except ValueError:
        raise DynamizeError(f"anynet: {name}={given!r}: write numbers with - between them, as in 1-2-7-12") from None


def _for_each(given: Sizes, stages: int, name: str) -> list[float]:
    found = numbers(given, name)
    if len(found) not in (1, stages):
        raise DynamizeError(f"anynet: {name}={given}: give one for all {stages} stages, or one for each")
    return found * stages if len(found) == 1 else found


def _whole(number: float, name: str) -> int:
    if number != int(number):
        raise DynamizeError(f"anynet: {name} has {number:g}: give whole numbers")
    return int(number)


def _check(stages: Sequence[Stage], squeeze: float, num_classes: int, in_channels: int, stem_stride: int) -> None:
    if not stages or min(num_classes, in_channels, stem_stride) < 1 or not 0 <= squeeze <= 1:
        raise DynamizeError(
            f"anynet: {len(stages)} stages, num_classes={num_classes}, in_channels={in_channels}, "
            f"stem_stride={stem_stride}, se={squeeze:g}: give at least one of each, and se from 0 to 1"
        )
    for stage in stages:
        if min(stage.depth, stage.width, stage.group_width, stage.inner) < 1 or stage.bottleneck <= 0:
            raise DynamizeError(f"anynet: {stage}: give depths, widths, g and b above 0")
        if stage.inner % stage.group_width:
            raise DynamizeError(
                f"anynet: width {stage.width} over b={stage.bottleneck:g} is {stage.inner} channels, which groups of "
                f"{stage.group_width} do not divide: give another width or g"
            )


def _conv(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1, *, relu: bool = True
) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), *([nn.ReLU()] if relu else []))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)
