"""The CIFAR ResNets of He et al. 2016, section 4.2: three stages of basic blocks, parameter-free shortcuts.

Parameter names are those of the widespread checkpoints (``conv1, bn1, layer{1,2,3}.{i}.*, linear``).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynamize.errors import DynamizeError

CIFAR_WIDTHS = (16, 32, 64)


class PadShortcut(nn.Module):
    """Option-A shortcut: takes every ``stride``-th pixel and adds all-zero channels on both sides.

    ``(N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride))``.
    """

    copies: Tensor

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        before = (out_channels - in_channels) // 2
        # a convolution that copies channels: backends run it in their own layout, a pad sends them out of it
        copies = torch.eye(in_channels)[:, :, None, None]
        copies = F.pad(copies, (0, 0, 0, 0, 0, 0, before, out_channels - in_channels - before))
        self.register_buffer("copies", copies, persistent=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return F.conv2d(x_NCHW, self.copies, stride=self.stride)

    def extra_repr(self) -> str:
        out_channels, in_channels = self.copies.shape[:2]
        return f"{in_channels} -> {out_channels} channels, stride={self.stride}"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm; the shortcut is added before the last ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        keeps_shape = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if keeps_shape else PadShortcut(in_channels, out_channels, stride)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        features = self.relu1(self.bn1(self.conv1(x_NCHW)))
        features = self.bn2(self.conv2(features))
        return self.relu2(features + self.shortcut(x_NCHW))


class CifarResNet(nn.Module):
    """``(N, in_channels, H, W) -> (N, num_classes)`` logits; stages 2 and 3 halve the resolution.

    Source: He et al. 2016, "Deep Residual Learning", section 4.2, option A; initialised as He et al. 2015.

    Raises:
        DynamizeError: not three blocks and three widths, widths that shrink, or a size that is not positive.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int] = CIFAR_WIDTHS,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        _check_sizes(blocks, widths, num_classes, in_channels)
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.layer1 = _stage(blocks[0], widths[0], widths[0], stride=1)
        self.layer2 = _stage(blocks[1], widths[0], widths[1], stride=2)
        self.layer3 = _stage(blocks[2], widths[1], widths[2], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(widths[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        features = self.relu(self.bn1(self.conv1(images_NCHW)))
        features = self.layer3(self.layer2(self.layer1(features)))
        return self.linear(self.avgpool(features).flatten(1))


def _stage(blocks: int, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


def _check_sizes(blocks: Sequence[int], widths: Sequence[int], num_classes: int, in_channels: int) -> None:
    sizes = (*blocks, *widths, num_classes, in_channels)
    whole = all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes)
    if not whole or len(blocks) != 3 or len(widths) != 3:
        raise DynamizeError(
            f"A CIFAR ResNet needs positive whole sizes, got blocks={tuple(blocks)}, widths={tuple(widths)}, "
            f"num_classes={num_classes!r}, in_channels={in_channels!r}: give three blocks and three widths."
        )
    if sorted(widths) != list(widths):
        raise DynamizeError(f"Option-A shortcuts only add channels, got widths={tuple(widths)}: sort them.")


def cifar_resnet20(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """ResNet-20: 0.27 M parameters, 41 MMACs at 32x32."""
    return CifarResNet((3, 3, 3), num_classes=num_classes, in_channels=in_channels)


def cifar_resnet32(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """ResNet-32: 0.46 M parameters, 69 MMACs at 32x32."""
    return CifarResNet((5, 5, 5), num_classes=num_classes, in_channels=in_channels)


def cifar_resnet44(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """ResNet-44: 0.66 M parameters, 97 MMACs at 32x32."""
    return CifarResNet((7, 7, 7), num_classes=num_classes, in_channels=in_channels)


def cifar_resnet56(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """ResNet-56: 0.85 M parameters, 126 MMACs at 32x32."""
    return CifarResNet((9, 9, 9), num_classes=num_classes, in_channels=in_channels)


def cifar_resnet110(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """ResNet-110: 1.7 M parameters, 253 MMACs at 32x32."""
    return CifarResNet((18, 18, 18), num_classes=num_classes, in_channels=in_channels)
