"""Blocks that random networks are made of: what people write, in the many ways in which they write it."""

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth

T = TypeVar("T")


class Draw:
    """Seeded choices of one network, and the names of what was chosen."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.families: set[str] = set()

    def pick(self, options: Sequence[T]) -> T:
        found = self.random.choice(options)
        name = getattr(found, "__name__", None)
        self.families |= {name.strip("_")} if name else set()
        return found

    def chance(self, share: float, family: str = "") -> bool:
        happens = self.random.random() < share
        self.families |= {family} if happens and family else set()
        return happens


class Style:
    """The convolution, norm and activation of one network: some mix them from layer to layer."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.make_norm = draw.pick(NORMS)
        self.make_act = draw.pick(ACTIVATIONS)
        self.make_conv = draw.pick(CONVOLUTIONS)
        self.mixed = draw.chance(0.25, "mixed")

    def conv(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Module:
        return self.make_conv(inputs, outputs, kernel, stride, groups)

    def norm(self, channels: int) -> nn.Module:
        return (self.draw.pick(NORMS) if self.mixed else self.make_norm)(channels)

    def act(self, channels: int) -> nn.Module:
        return (self.draw.pick(ACTIVATIONS) if self.mixed else self.make_act)(channels)

    def unit(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
        """Convolution, norm, activation."""
        return nn.Sequential(self.conv(inputs, outputs, kernel, stride, groups), self.norm(outputs), self.act(outputs))


# --- convolutions


class SamePadding(nn.Conv2d):
    """TensorFlow's: as much padding as keeps ceil(size / stride), more of it behind."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.size()[-2:]
        down = max((-(-height // self.stride[0]) - 1) * self.stride[0] + self.kernel_size[0] - height, 0)
        across = max((-(-width // self.stride[1]) - 1) * self.stride[1] + self.kernel_size[1] - width, 0)
        x = F.pad(x, [across // 2, across - across // 2, down // 2, down - down // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardised(nn.Conv2d):
    """Weights of mean 0 and variance 1 (Qiao et al. 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.view(self.weight.size(0), -1)
        weight = (flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + 1e-5)
        weight = weight.view_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Named(nn.Conv2d):
    """A subclass that changes nothing."""


class Functional(nn.Module):
    """``F.conv2d`` with a parameter of its own."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.kernel, self.options = layer.weight, (layer.stride, layer.padding, layer.dilation, layer.groups)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, None, *self.options)


def plain_conv(i: int, o: int, k: int, s: int, g: int) -> nn.Module:
    return nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False)


def biased_conv(i: int, o: int, k: int, s: int, g: int) -> nn.Module:
    return nn.Conv2d(i, o, k, s, k // 2, groups=g)


def same_padding(i: int, o: int, k: int, s: int, g: int) -> nn.Module:
    return SamePadding(i, o, k, s, groups=g, bias=False)


def standardised_conv(i: int, o: int, k: int, s: int, g: int) -> nn.Module:
    return Standardised(i, o, k, s, k // 2, groups=g)


def named_conv(i: int, o: int, k: int, s: int, g: int) -> nn.Module:
    return Named(i, o, k, s, k // 2, groups=g)


def functional_conv(i: int, o: int, k: int, s: int, g: int) -> nn.Module:
    return Functional(nn.Conv2d(i, o, k, s, k // 2, groups=g))


def weight_norm(i: int, o: int, k: int, s: int, g: int) -> nn.Module:
    return parametrizations.weight_norm(nn.Conv2d(i, o, k, s, k // 2, groups=g))


def old_weight_norm(i: int, o: int, k: int, s: int, g: int) -> nn.Module:
    return nn.utils.weight_norm(nn.Conv2d(i, o, k, s, k // 2, groups=g))


def reflect_padding(i: int, o: int, k: int, s: int, g: int) -> nn.Module:
    return nn.Conv2d(i, o, k, s, k // 2, groups=g, padding_mode="reflect" if k == 3 else "zeros")


CONVOLUTIONS: list[Callable[[int, int, int, int, int], nn.Module]] = [
    *[plain_conv] * 6,
    *[biased_conv] * 2,
    same_padding,
    standardised_conv,
    named_conv,
    functional_conv,
    weight_norm,
    old_weight_norm,
    reflect_padding,
]


# --- norms


class ChannelNorm(nn.LayerNorm):
    """Layer norm over channels, as ConvNeXt has it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FunctionalNorm(nn.Module):
    """Batch norm with ``training=self.training``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(channels) + 0.5), nn.Parameter(torch.randn(channels) * 0.1)
        self.register_buffer("mean", torch.randn(channels) * 0.1)
        self.register_buffer("var", torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, self.scale, self.shift, self.training, 0.1, 1e-5)


class OwnTrain(nn.BatchNorm2d):
    """Frozen for good: an own ``train()``, as fine-tuning code has it."""

    def train(self, mode: bool = True) -> "OwnTrain":
        return super().train(False)


class Affine(nn.Module):
    """No statistics: a scale and a shift, as ResMLP has them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.ones(channels, 1, 1)), nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.alpha + self.beta


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(4, channels)


def instance_norm(channels: int) -> nn.Module:
    return nn.InstanceNorm2d(channels, affine=True)


def running_instance_norm(channels: int) -> nn.Module:
    return nn.InstanceNorm2d(channels, affine=True, track_running_stats=True)


def plain_batch_norm(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels)


def bare_batch_norm(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels, affine=False)


def no_norm(channels: int) -> nn.Module:
    return nn.Identity()


NORMS: list[Callable[[int], nn.Module]] = [
    *[plain_batch_norm] * 7,
    bare_batch_norm,
    group_norm,
    ChannelNorm,
    instance_norm,
    running_instance_norm,
    FunctionalNorm,
    FrozenBatchNorm2d,
    OwnTrain,
    Affine,
    no_norm,
]


# --- activations


class Call(nn.Module):
    """A function as an activation."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Clamped(nn.Module):
    """A method of the tensor, with a bound."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=0, max=6)


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


def inplace_relu(channels: int) -> nn.Module:
    return nn.ReLU(inplace=True)


def functional_relu(channels: int) -> nn.Module:
    return Call(F.relu)


def functional_gelu(channels: int) -> nn.Module:
    return Call(F.gelu)


def channel_prelu(channels: int) -> nn.Module:
    return nn.PReLU(channels)


def single_prelu(channels: int) -> nn.Module:
    return nn.PReLU()


def _bare(kind: type[nn.Module]) -> Callable[[int], nn.Module]:
    def make(channels: int) -> nn.Module:
        return kind()

    make.__name__ = kind.__name__
    return make


ACTIVATIONS: list[Callable[[int], nn.Module]] = [
    *[inplace_relu, functional_relu] * 3,
    *map(_bare, (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU, nn.LeakyReLU, nn.ELU, nn.Mish, nn.Softplus)),
    *map(_bare, (nn.Tanh, nn.Softsign, nn.CELU, nn.SELU, nn.RReLU, Swish, Clamped)),
    channel_prelu,
    single_prelu,
    functional_gelu,
]


# --- what a training step does and an evaluation does not


class FunctionalDropout(nn.Module):
    """Dropout that is no module."""

    def __init__(self, function: Callable[..., Tensor], share: float) -> None:
        super().__init__()
        self.function, self.share = function, share

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, p=self.share, training=self.training)


class Conditional(nn.Module):
    """Dropout behind a question."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = F.dropout(x, 0.2)
        return x


class DropConnect(nn.Module):
    """Stochastic depth as EfficientNet's ports write it."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.share == 0:
            return x
        keep = 1 - self.share
        mask = torch.floor(keep + torch.rand([x.shape[0], 1, 1, 1], dtype=x.dtype, device=x.device))
        return x / keep * mask


def functional_dropout() -> nn.Module:
    return FunctionalDropout(F.dropout, 0.3)


def functional_dropout2d() -> nn.Module:
    return FunctionalDropout(F.dropout2d, 0.2)


def alpha_dropout() -> nn.Module:
    return FunctionalDropout(F.alpha_dropout, 0.2)


def module_dropout() -> nn.Module:
    return nn.Dropout(0.3)


def module_dropout2d() -> nn.Module:
    return nn.Dropout2d(0.2)


def conditional_dropout() -> nn.Module:
    return Conditional()


def drop_connect() -> nn.Module:
    return DropConnect(0.3)


def stochastic_depth() -> nn.Module:
    return StochasticDepth(0.3, "row")


DROPOUTS: list[Callable[[], nn.Module]] = [
    functional_dropout,
    functional_dropout2d,
    alpha_dropout,
    module_dropout,
    module_dropout2d,
    conditional_dropout,
    drop_connect,
    stochastic_depth,
]
