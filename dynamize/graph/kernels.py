"""The algebra of re-parameterisation: linear layers as kernels in float64 that can be chained and added.

Ding et al. 2021 (Diverse Branch Block, Transforms I to VI), for any stride, padding, dilation and groups.
"""

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from dynamize.errors import DynamizeError
from dynamize.graph.fold import affine, has_hooks

Pair = tuple[int, int]


class NotOneConvolution(DynamizeError):
    """Layers that no single convolution computes; the message is a clause that says why."""


@dataclass(frozen=True)
class Kernel:
    """A linear layer: ``y[o, i] = bias[o] + sum over t of weight[o, :, t] . x[:, stride i + start + dilation t]``.

    Attributes:
        weight: (O, I / groups, height, width), float64.
        bias: (O,), float64.
        start: where the first tap of the first output lies; negative by the padding.
        mode: padding mode of what lies outside of the map, or None where no tap reaches there.
        biased: whether the bias can be other than zero.
    """

    weight: Tensor
    bias: Tensor
    groups: int = 1
    stride: Pair = (1, 1)
    start: Pair = (0, 0)
    dilation: Pair = (1, 1)
    mode: str | None = None
    biased: bool = True

    @classmethod
    def of_conv(cls, conv: nn.Conv2d, crop: Pair = (0, 0)) -> "Kernel":
        """A convolution, of an input from which ``crop`` rows and columns were cut off at each side."""
        weight = _double(conv.weight)
        bias = weight.new_zeros(len(weight)) if conv.bias is None else _double(conv.bias)
        padding = padding_of(conv)
        start = (crop[0] - padding[0], crop[1] - padding[1])
        mode = conv.padding_mode if any(padding) else None
        stride, dilation = _pair(conv.stride), _pair(conv.dilation)
        return cls(weight, bias, conv.groups, stride, start, dilation, mode, conv.bias is not None)

    @classmethod
    def per_channel(cls, scale: Tensor, shift: Tensor | None = None) -> "Kernel":
        """Each channel by itself, times ``scale`` (C,) plus ``shift`` (C,): a batch norm, or an identity."""
        scale = _double(scale)
        bias = torch.zeros_like(scale) if shift is None else _double(shift)
        return cls(scale.view(-1, 1, 1, 1), bias, len(scale), biased=shift is not None)

    @classmethod
    def average(cls, channels: int, size: Pair, stride: Pair, padding: Pair, dilation: Pair = (1, 1)) -> "Kernel":
        """An average pool that counts its zero padding (Transform V)."""
        weight = torch.full((channels, 1, *size), 1 / (size[0] * size[1]), dtype=torch.float64)
        start, mode = (-padding[0], -padding[1]), "zeros" if any(padding) else None
        return cls(weight, weight.new_zeros(channels), channels, stride, start, dilation, mode, biased=False)

    @property
    def outputs(self) -> int:
        return len(self.weight)

    @property
    def inputs(self) -> int:
        return self.weight.shape[1] * self.groups

    @property
    def size(self) -> Pair:
        """Height and width of the kernel."""
        return _pair(self.weight.shape[2:])

    @property
    def pointwise(self) -> bool:
        """Whether each output pixel sees the input pixel at its own place only."""
        return self.size == (1, 1) and self.stride == (1, 1) and self.start == (0, 0)

    def then(self, second: "Kernel") -> "Kernel":
        """This layer and another after it (Transforms I and III).

        Raises:
            NotOneConvolution: both look at neighbours, or the second pads what the first gave a bias with zeros.
        """
        place = self if second.pointwise else second
        if not second.pointwise:
            if not self.pointwise:
                raise NotOneConvolution("of two layers that follow each other, neither looks at single pixels only")
            if self.biased and second.mode == "zeros":
                raise NotOneConvolution("a layer with bias is followed by one that pads with zeros")
        if second.groups == second.inputs == second.outputs:
            groups, weight = self.groups, self.weight * second.weight
            bias = self.bias * second.weight.sum((1, 2, 3))
        else:
            groups = gcd(self.groups, second.groups)
            before = _regrouped(self.weight, self.groups, groups).unflatten(0, (groups, -1))
            after = _regrouped(second.weight, second.groups, groups).unflatten(0, (groups, -1))
            weight = torch.einsum("gomhw,gmiyx->goihwyx", after, before)  # one of the two sizes is 1 x 1
            weight = weight.reshape(second.outputs, self.inputs // groups, *place.size)
            bias = torch.einsum("gomhw,gm->go", after, self.bias.unflatten(0, (groups, -1))).flatten()
        biased = self.biased or second.biased
        return Kernel(weight, bias + second.bias, groups, place.stride, place.start, place.dilation, place.mode, biased)

    def plus(self, other: "Kernel") -> "Kernel":
        """The sum of both layers' outputs (Transforms II and VI).

        Raises:
            NotOneConvolution: their strides, channels or padding modes differ.
        """
        if (self.stride, self.inputs, self.outputs) != (other.stride, other.inputs, other.outputs):
            raise NotOneConvolution("the branches differ in stride or channels")
        if self.mode and other.mode and self.mode != other.mode:
            raise NotOneConvolution("the branches continue the map beyond its border in different ways")
        groups = gcd(self.groups, other.groups)
        (top, down, height), (left, across, width) = (_lattice(self, other, axis) for axis in (0, 1))
        start, dilation, size = (top, left), (down, across), (height, width)
        weight = self._placed(groups, start, dilation, size) + other._placed(groups, start, dilation, size)
        return Kernel(
            weight,
            self.bias + other.bias,
            groups,
            self.stride,
            start,
            dilation,
            self.mode or other.mode,
            self.biased or other.biased,
        )

    def as_conv(self, like: Tensor) -> nn.Conv2d:
        """The convolution with bias on the device and of the type of ``like``.

        Raises:
            NotOneConvolution: its taps begin inside the map.
        """
        if min(-self.start[0], -self.start[1]) < 0:
            raise NotOneConvolution("all branches leave the border of the map out")
        conv = skip_init(
            nn.Conv2d,
            self.inputs,
            self.outputs,
            self.size,
            self.stride,
            (-self.start[0], -self.start[1]),
            self.dilation,
            self.groups,
            padding_mode=self.mode or "zeros",
        )
        conv.weight, conv.bias = nn.Parameter(self.weight.to(like)), nn.Parameter(self.bias.to(like))
        assert isinstance(conv, nn.Conv2d)
        return conv

    def _placed(self, groups: int, start: Pair, dilation: Pair, size: Pair) -> Tensor:
        """The weight among zeros on a larger lattice of taps, for fewer groups."""
        weight = _regrouped(self.weight, self.groups, groups)
        wide = weight.new_zeros(*weight.shape[:2], *size)
        rows, columns = (
            slice(first, first + step * (count - 1) + 1, step)
            for first, step, count in (
                ((self.start[i] - start[i]) // dilation[i], max(1, self.dilation[i] // dilation[i]), self.size[i])
                for i in (0, 1)
            )
        )
        wide[:, :, rows, columns] = weight
        return wide


def kernel_of(module: nn.Module, channels: int) -> Kernel | None:
    """A linear layer on maps of this many channels: convolution, batch norm in eval mode, average pool, identity.

    None for every other module, and for a subclass that computes something else.
    """
    if isinstance(module, nn.Identity) or (isinstance(module, nn.modules.dropout._DropoutNd) and module.p == 0):
        return Kernel.per_channel(torch.ones(channels))
    if type(module) is nn.Conv2d and not has_hooks(module):
        try:
            return Kernel.of_conv(module)
        except NotOneConvolution:
            return None
    if type(module) is nn.AvgPool2d and not module.ceil_mode and module.divisor_override is None:
        padding = _pair(module.padding)
        if module.count_include_pad or not any(padding):
            return Kernel.average(channels, _pair(module.kernel_size), _pair(module.stride), padding)
    norm = affine(module)
    return None if norm is None or norm.rest is not None else Kernel.per_channel(norm.scale, norm.shift)


def padding_of(conv: nn.Conv2d) -> Pair:
    """Rows and columns that a convolution adds at each side.

    Raises:
        NotOneConvolution: more at one side than at the other.
    """
    if not isinstance(conv.padding, str):
        return _pair(conv.padding)
    if conv.padding == "valid":
        return (0, 0)
    total = [step * (size - 1) for step, size in zip(conv.dilation, conv.kernel_size, strict=True)]
    if total[0] % 2 or total[1] % 2:
        raise NotOneConvolution("padding 'same' adds more at one side than at the other")
    return (total[0] // 2, total[1] // 2)


def _lattice(first: Kernel, second: Kernel, axis: int) -> tuple[int, int, int]:
    """Start, step and number of taps along one axis that hold the taps of both."""
    ends = []
    steps = [abs(first.start[axis] - second.start[axis])]
    for one in (first, second):
        if one.size[axis] > 1:
            steps.append(one.dilation[axis])
        ends.append(one.start[axis] + one.dilation[axis] * (one.size[axis] - 1))
    start, step = min(first.start[axis], second.start[axis]), gcd(*steps) or 1
    return start, step, (max(ends) - start) // step + 1


def _regrouped(weight: Tensor, old: int, new: int) -> Tensor:
    """(O, I / old, h, w) -> (O, I / new, h, w) with zeros between groups (Transform IV); ``new`` divides ``old``."""
    if old == new:
        return weight
    joined = old // new
    blocks = weight.reshape(new, joined, -1, *weight.shape[1:])
    wide = blocks.new_zeros(new, joined, blocks.shape[2], joined, *weight.shape[1:])
    for i in range(joined):
        wide[:, i, :, i] = blocks[:, i]
    return wide.flatten(3, 4).flatten(0, 2)


def _pair(value: object) -> Pair:
    height, width = (value, value) if isinstance(value, int) else tuple(value)  # type: ignore[arg-type]
    return int(height), int(width)


def _double(values: Tensor) -> Tensor:
    return values.detach().cpu().double()
