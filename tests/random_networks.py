"""Networks that nobody here chose: families of blocks, drawn from a seed, in the many ways in which people write them.

``random_network(seed)`` gives a classifier in eval mode with the input shape, what it is made of, and how many of its
blocks may be skipped; ``random_anynet(seed)`` one of the AnyNet space. Any seed is a valid network; the same seed is
the same network.
"""

from dataclasses import dataclass
from random import Random

import torch
from networks import randomise_norms
from random_blocks import DROPOUTS, Draw, Style
from torch import Tensor, nn
from torch.nn import functional as F

from dynamize.search.regnets import AnyNetSpace, network

CLASSES = 7


@dataclass(frozen=True)
class Drawn:
    """A random network and what is known of it.

    Attributes:
        network: in eval mode, (N, C, H, W) -> (N, 7).
        input_shape: (C, H, W).
        families: names of what it is made of.
        skippable: how many blocks are a sum of a shortcut and a branch with multiply-accumulates.
    """

    network: nn.Module
    input_shape: tuple[int, int, int]
    families: frozenset[str]
    skippable: int


def random_network(seed: int) -> Drawn:
    """The network of a seed; neither its making nor its weights touch the global random generator."""
    draw = Draw(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = RandomNetwork(draw)
        randomise_norms(network, seed)
    skippable = sum(isinstance(block, Skippable) for block in network.blocks)
    return Drawn(network.eval(), network.input_shape, frozenset(draw.families), skippable)


def random_anynet(seed: int) -> Drawn:
    """A small AnyNet, each stage by itself, with and without squeeze-and-excitation, for images of any size."""
    generator = Random(seed)
    space = AnyNetSpace("A", most_depth=2, most_width=48)
    choice, squeeze, side = space.sample(generator), generator.choice([0.0, 0.25]), generator.randrange(17, 40)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = network(space, choice, squeeze=squeeze, num_classes=CLASSES, stem_stride=1)
        randomise_norms(net, seed)
    return Drawn(net.eval(), (3, side, side), frozenset({"anynet"}), sum(stage.depth for stage in net.stages))


class Skippable(nn.Module):
    """A block that adds a branch to a shortcut."""


class Basic(Skippable):
    """Two convolutions and a shortcut (ResNet), written in one of several ways."""

    def __init__(self, style: Style, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            style.unit(inputs, outputs, 3, stride), style.conv(outputs, outputs), style.norm(outputs)
        )
        self.act = style.act(outputs)
        self.downsample = _shortcut(style, inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.body(x)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.act(out)


class Bottleneck(Skippable):
    """1x1, grouped 3x3, 1x1 (ResNeXt, RegNet), perhaps with squeeze and excitation."""

    def __init__(self, style: Style, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        groups = style.draw.pick([1, 2, 4])
        style.draw.families |= {"grouped"} if groups > 1 else set()
        self.body = nn.Sequential(
            style.unit(inputs, outputs, 1),
            style.unit(outputs, outputs, 3, stride, groups),
            SqueezeExcite(style, outputs) if style.draw.chance(0.3, "se") else nn.Identity(),
            style.conv(outputs, outputs, 1),
            style.norm(outputs),
        )
        self.act = style.act(outputs)
        self.shortcut = _shortcut(style, inputs, outputs, stride) or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.body(x) + self.shortcut(x))


class Preactivated(Skippable):
    """Norm and activation first, nothing after the sum; dropout between the convolutions (WideResNet)."""

    def __init__(self, style: Style, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(style.norm(inputs), style.act(inputs))
        self.conv1, self.conv2 = style.conv(inputs, outputs, 3, stride), style.conv(outputs, outputs)
        self.second = nn.Sequential(style.norm(outputs), style.act(outputs))
        self.shortcut = None if inputs == outputs and stride == 1 else style.conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.second(self.conv1(self.first(x.clone())))
        out = self.conv2(F.dropout(out, p=0.2, training=self.training))
        return torch.add(out, x if self.shortcut is None else self.shortcut(x))


class Inverted(nn.Module):
    """Expansion, depthwise convolution, projection (MobileNet, EfficientNet); a shortcut where shapes allow."""

    def __init__(self, style: Style, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        wide = 2 * inputs
        self.expand = style.unit(inputs, wide, 1)
        self.depthwise = style.unit(wide, wide, style.draw.pick([3, 5]), stride, wide)
        self.excite = SqueezeExcite(style, wide) if style.draw.chance(0.5, "se") else nn.Identity()
        self.project = nn.Sequential(style.conv(wide, outputs, 1), style.norm(outputs))
        self.drop = style.draw.pick(DROPOUTS)()
        self.adds = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        out = self.project(self.excite(self.depthwise(self.expand(x))))
        return x + self.drop(out) if self.adds else out


class SkippableInverted(Inverted, Skippable):
    pass


class Scaled(Skippable):
    """Depthwise 7x7, two linear layers, a learnt scale (ConvNeXt)."""

    def __init__(self, style: Style, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.reduce = style.conv(inputs, outputs, 3, stride)
        self.depthwise, self.norm = nn.Conv2d(outputs, outputs, 7, padding=3, groups=outputs), nn.LayerNorm(outputs)
        self.up, self.down = nn.Linear(outputs, 2 * outputs), nn.Linear(2 * outputs, outputs)
        self.gamma = nn.Parameter(torch.full((outputs,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.reduce(x)
        out = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        out = self.gamma * self.down(F.gelu(self.up(out)))
        return x + out.permute(0, 3, 1, 2)


class Plain(nn.Sequential):
    """Convolution after convolution (VGG), perhaps with a pool."""

    def __init__(self, style: Style, inputs: int, outputs: int, stride: int) -> None:
        pooled = stride > 1 and style.draw.chance(0.5, "pooled")
        pool = style.draw.pick([nn.MaxPool2d, nn.AvgPool2d])(2, ceil_mode=True) if pooled else nn.Identity()
        super().__init__(style.unit(inputs, outputs, 3, 1 if pooled else stride), pool, style.unit(outputs, outputs))


class Dense(nn.Module):
    """Each layer reads all before it (DenseNet), then a transition."""

    def __init__(self, style: Style, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        grow = 8
        self.layers = nn.ModuleList(style.unit(inputs + i * grow, grow) for i in range(3))
        self.transition = style.unit(inputs + 3 * grow, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.transition(torch.cat(features, dim=1))


class Branching(nn.Module):
    """Parallel branches that meet in a concatenation (Inception)."""

    def __init__(self, style: Style, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        quarter = outputs // 4
        self.one = style.unit(inputs, quarter, 1, stride)
        self.three = nn.Sequential(style.unit(inputs, quarter, 1), style.unit(quarter, 2 * quarter, 3, stride))
        self.pool = nn.Sequential(nn.MaxPool2d(3, stride, 1), style.unit(inputs, quarter, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.one(x), self.three(x), self.pool(x)), 1)


class Chunked(nn.Module):
    """Chunks as a list that grows (YOLO's C2f)."""

    def __init__(self, style: Style, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        self.first = style.unit(inputs, outputs, 1, stride)
        self.layers = nn.ModuleList(style.unit(half, half) for _ in range(2))
        self.last = style.unit(4 * half, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        parts.extend(layer(parts[-1]) for layer in self.layers)
        return self.last(torch.cat(parts, 1))


class Splits(nn.Module):
    """A layer for each split of the channels, each adding the one before it (Res2Net)."""

    def __init__(self, style: Style, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = style.unit(inputs, outputs, 1, stride)
        self.layers = nn.ModuleList(style.unit(outputs // 4, outputs // 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        first, *others = torch.split(x, x.shape[1] // 4, dim=1)
        found, last = [first], first
        for layer, part in zip(self.layers, others, strict=True):
            last = layer(part + last)
            found.append(last)
        return torch.cat(found, dim=1)


class Shuffled(nn.Module):
    """Half of the channels pass by; then all are shuffled (ShuffleNetV2)."""

    def __init__(self, style: Style, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        self.first = style.unit(inputs, outputs, 1, stride)
        self.branch = nn.Sequential(style.unit(half, half, 1), style.unit(half, half, 3, 1, half))

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = self.first(x).chunk(2, dim=1)
        x = torch.cat([kept, self.branch(changed)], 1)
        n, channels, height, width = x.size()
        x = x.view(n, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        return x.view(n, -1, height, width)


class Coordinates(nn.Module):
    """Positions as two more channels (CoordConv): a buffer, expanded to the batch."""

    def __init__(self, style: Style, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.register_buffer("grid", torch.randn(1, 2, 4, 4))
        self.unit = style.unit(inputs + 2, outputs, 3, stride)

    def forward(self, x: Tensor) -> Tensor:
        grid = F.interpolate(self.grid, size=x.shape[-2:], mode="nearest").expand(x.shape[0], -1, -1, -1)
        return self.unit(torch.cat([x, grid], 1))


class Attention(Skippable):
    """A map of where to look times the features (CBAM), added to what came in."""

    def __init__(self, style: Style, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.body = style.unit(inputs, outputs, 3, stride), style.unit(outputs, outputs)
        self.where = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out = self.body(x)
        seen = torch.cat([out.mean(1, keepdim=True), out.max(dim=1, keepdim=True)[0]], 1)
        return x + out * torch.sigmoid(self.where(seen))


class SqueezeExcite(nn.Module):
    """Scales for channels from their means."""

    def __init__(self, style: Style, channels: int) -> None:
        super().__init__()
        self.linear = style.draw.chance(0.5, "linear_se")
        make = nn.Linear if self.linear else lambda i, o: nn.Conv2d(i, o, 1)
        self.down, self.up = make(channels, channels // 4), make(channels // 4, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, channels, _, _ = x.size()
        means = x.mean((2, 3)) if self.linear else F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.up(F.relu(self.down(means)))).view(n, channels, 1, 1)


def _shortcut(style: Style, inputs: int, outputs: int, stride: int) -> nn.Module | None:
    if inputs == outputs and stride == 1:
        return None
    return nn.Sequential(style.conv(inputs, outputs, 1, stride), style.norm(outputs))


BLOCKS = [
    *[Basic, Bottleneck, Inverted] * 2,
    Preactivated,
    Scaled,
    Plain,
    Dense,
    Branching,
    Chunked,
    Splits,
    Shuffled,
    Coordinates,
    Attention,
]


class GeM(nn.Module):
    """The mean to a learnt power (Radenovic et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        size = (x.size(-2), x.size(-1))
        return F.avg_pool2d(x.clamp(min=1e-6).pow(self.p), size).pow(1.0 / self.p).flatten(1)


class Head(nn.Module):
    """From a map (N, C, H, W) to (N, 7)."""

    def __init__(self, draw: Draw, channels: int, side: int) -> None:
        super().__init__()
        self.way = draw.pick(["pool", "mean", "view", "gem", "conv", "both", "batch_size"])
        draw.families.add(f"head_{self.way}")
        inputs = {"view": channels * side * side, "both": 2 * channels}.get(self.way, channels)
        self.gem = GeM() if self.way == "gem" else nn.Identity()
        self.drop = draw.pick([nn.Dropout, nn.Identity])()
        self.classify = nn.Conv2d(channels, CLASSES, 1) if self.way == "conv" else nn.Linear(inputs, CLASSES)

    def forward(self, x: Tensor, n: int) -> Tensor:
        if self.way == "conv":
            return self.classify(self.drop(x)).mean([2, 3])
        if self.way == "view":
            x = x.view(x.size(0), -1)
        elif self.way == "both":
            x = torch.cat([F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)], 1).squeeze(-1).squeeze(-1)
        elif self.way == "gem":
            x = self.gem(x)
        elif self.way == "mean":
            x = x.mean(dim=(-2, -1))
        else:
            x = F.adaptive_avg_pool2d(x, (1, 1)).view(n if self.way == "batch_size" else -1, x.shape[1])
        return self.classify(self.drop(x))


class RandomNetwork(nn.Module):
    """Stem, three to six blocks, head."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        style = Style(draw)
        side = draw.pick([16, 24, 32])
        self.input_shape = (draw.pick([1, 3]), side, side)
        widths = draw.pick([(16, 16, 32), (16, 24, 32), (8, 16, 32)])
        stem_stride = draw.pick([1, 2])
        self.stem = style.unit(self.input_shape[0], widths[0], draw.pick([3, 7]), stem_stride)
        self.upsampled, self.freezes = draw.chance(0.15, "sizes_first"), draw.chance(0.15, "own_train")
        side //= stem_stride
        blocks: list[nn.Module] = []
        inputs = widths[0]
        for stage, width in enumerate(widths):
            for i in range(draw.pick([1, 2])):
                stride = 2 if stage and i == 0 else 1
                kind = draw.pick(BLOCKS)
                if kind is Inverted and inputs == width and stride == 1:
                    kind = SkippableInverted
                blocks.append(kind(style, inputs, width, stride))
                inputs, side = width, side // stride
        self.blocks = nn.Sequential(*blocks)
        self.head = Head(draw, inputs, self.input_shape[1] if self.upsampled else side)

    def forward(self, x: Tensor) -> Tensor:
        n, size = x.size(0), x.shape[-2:]
        x = self.blocks(self.stem(x))
        if self.upsampled:  # as segmentation networks do
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        return self.head(x, n)

    def train(self, mode: bool = True) -> "RandomNetwork":
        super().train(mode)
        if self.freezes:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self
