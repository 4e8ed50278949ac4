"""Modules of torch.nn with arguments that are not the defaults, by what they are: (N, 8, 9, 11) -> anything."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CHANNELS, HEIGHT, WIDTH = 8, 9, 11


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.function, self.args, self.kwargs = function, args, kwargs

    def forward(self, features: Tensor) -> Tensor:
        return self.function(features, *self.args, **self.kwargs)


def rows(module: nn.Module) -> nn.Module:
    """A module for (N, C, L), on the rows of the map one behind the other."""
    return nn.Sequential(nn.Flatten(2), module)


def volumes(module: nn.Module) -> nn.Module:
    """A module for (N, C, D, H, W), on channels in pairs."""
    return nn.Sequential(nn.Unflatten(1, (CHANNELS // 2, 2)), module)


def _convolutions() -> dict[str, nn.Module]:
    return {
        "conv stride padding": nn.Conv2d(8, 6, 3, stride=2, padding=1),
        "conv one-sided": nn.Conv2d(8, 6, (3, 5), stride=(2, 1), padding=(0, 2), dilation=(2, 1)),
        "conv groups no bias": nn.Conv2d(8, 12, 3, groups=4, bias=False),
        "conv depthwise dilated": nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8),
        "conv same": nn.Conv2d(8, 6, 3, padding="same"),
        "conv same even kernel": nn.Conv2d(8, 6, (2, 4), padding="same"),
        "conv same dilated": nn.Conv2d(8, 6, 3, padding="same", dilation=2),
        "conv same dilated even kernel": nn.Conv2d(8, 6, 4, padding="same", dilation=(1, 3)),
        "conv valid": nn.Conv2d(8, 6, 3, padding="valid"),
        **{
            f"conv {mode}": nn.Conv2d(8, 6, 3, stride=2, padding=(1, 2), padding_mode=mode)
            for mode in ("reflect", "replicate", "circular")
        },
        "conv same reflect": nn.Conv2d(8, 6, 3, padding="same", dilation=2, padding_mode="reflect"),
        "conv transposed": nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1),
        "conv transposed groups": nn.ConvTranspose2d(8, 8, 3, (2, 3), 1, dilation=2, groups=4, bias=False),
        "conv 1d": rows(nn.Conv1d(8, 6, 5, stride=2, padding=3, dilation=2, groups=2)),
        "conv 1d same": rows(nn.Conv1d(8, 6, 4, padding="same", dilation=2)),
        "conv 1d circular": rows(nn.Conv1d(8, 6, 3, padding=2, padding_mode="circular")),
        "conv transposed 1d": rows(nn.ConvTranspose1d(8, 6, 4, stride=3, padding=1, output_padding=2)),
        "conv 3d": volumes(nn.Conv3d(4, 6, (1, 3, 3), padding=(0, 1, 2), stride=(1, 2, 1))),
        "conv 3d same": volumes(nn.Conv3d(4, 6, (2, 3, 3), padding="same", dilation=(1, 2, 1))),
        "conv transposed 3d": volumes(nn.ConvTranspose3d(4, 6, 3, stride=2, padding=1, output_padding=(0, 1, 1))),
        "linear no bias": nn.Linear(11, 5, bias=False),
    }  # fmt: skip


def _pools() -> dict[str, nn.Module]:
    return {
        "max padding": nn.MaxPool2d(3, 2, padding=1),
        "max ceil": nn.MaxPool2d(2, 2, ceil_mode=True),
        "max ceil padding": nn.MaxPool2d(3, 2, padding=1, ceil_mode=True),
        "max dilated": nn.MaxPool2d(3, 1, dilation=2),
        "max dilated ceil": nn.MaxPool2d((3, 2), (2, 3), padding=1, dilation=(2, 3), ceil_mode=True),
        "max 1d": rows(nn.MaxPool1d(4, 3, padding=2, dilation=2, ceil_mode=True)),
        "max 3d": volumes(nn.MaxPool3d((1, 3, 2), 2, padding=(0, 1, 1), ceil_mode=True)),
        **{
            f"avg pad {padding} ceil {ceil} include {include}": nn.AvgPool2d(
                (3, 4), (2, 3), padding, ceil_mode=ceil, count_include_pad=include
            )
            for padding in (0, (1, 2))
            for ceil in (False, True)
            for include in (False, True)
        },
        "avg 2 ceil": nn.AvgPool2d(2, ceil_mode=True),
        "avg 2 ceil include": nn.AvgPool2d(2, 2, 1, ceil_mode=True, count_include_pad=True),
        "avg divisor": nn.AvgPool2d(3, 2, divisor_override=5),
        "avg divisor padding": nn.AvgPool2d(3, 2, padding=1, ceil_mode=True, divisor_override=4),
        "avg 1d": rows(nn.AvgPool1d(4, 3, padding=2, ceil_mode=True, count_include_pad=False)),
        "avg 1d include": rows(nn.AvgPool1d(4, 3, padding=2, ceil_mode=True)),
        "avg 3d": volumes(nn.AvgPool3d((2, 3, 3), 2, (0, 1, 1), ceil_mode=True, count_include_pad=False)),
        "avg 3d divisor": volumes(nn.AvgPool3d((1, 3, 3), 2, divisor_override=3)),
        "lp 1": nn.LPPool2d(1, 3, 2),
        "lp 2 ceil": nn.LPPool2d(2, 3, 2, ceil_mode=True),
        "lp 3": nn.Sequential(nn.Sigmoid(), nn.LPPool2d(3, (2, 3))),
        "lp 1d": rows(nn.LPPool1d(2, 3, 2, ceil_mode=True)),
        "lp 3d": volumes(nn.LPPool3d(2, (1, 2, 2))),
        **{f"adaptive avg {size}": nn.AdaptiveAvgPool2d(size) for size in (1, 2, 3, 5, (4, 11), (None, 3), (12, 13))},
        **{f"adaptive max {size}": nn.AdaptiveMaxPool2d(size) for size in (1, 2, 3, 5, (4, 11), (None, 3), (12, 13))},
        "adaptive avg 1d": rows(nn.AdaptiveAvgPool1d(7)),
        "adaptive max 1d": rows(nn.AdaptiveMaxPool1d(7)),
        "adaptive avg 3d": volumes(nn.AdaptiveAvgPool3d((1, 4, 3))),
        "adaptive max 3d": volumes(nn.AdaptiveMaxPool3d((2, 4, 3))),
        "unpool": _Unpool(),
    }


class _Unpool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

    def forward(self, features: Tensor) -> Tensor:
        pooled, indices = self.pool(features)
        return self.unpool(pooled, indices, output_size=features.shape[2:])


def _trained(norm: nn.Module) -> nn.Module:
    """With statistics and weights that are not 0 and 1."""
    with torch.no_grad():
        for name, value in (*norm.named_parameters(), *norm.named_buffers()):
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.5 if "mean" not in name else torch.randn_like(value))
    return norm


def _norms() -> dict[str, nn.Module]:
    found = {
        "batch": nn.BatchNorm2d(8, eps=0.1),
        "batch no affine": nn.BatchNorm2d(8, affine=False),
        "batch 1d": rows(nn.BatchNorm1d(8)),
        "batch 3d": volumes(nn.BatchNorm3d(4)),
        "sync batch": nn.SyncBatchNorm(8, eps=0.01),
        "instance": nn.InstanceNorm2d(8, eps=0.1),
        "instance affine": nn.InstanceNorm2d(8, affine=True),
        "instance running": nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
        "instance 1d": rows(nn.InstanceNorm1d(8)),
        "instance 3d": volumes(nn.InstanceNorm3d(4, affine=True)),
        "group": nn.GroupNorm(4, 8, eps=0.1),
        "group no affine": nn.GroupNorm(2, 8, affine=False),
        "group 1": nn.GroupNorm(1, 8),
        "layer": nn.LayerNorm(11, eps=0.1),
        "layer whole": nn.LayerNorm((8, 9, 11)),
        "layer no affine": nn.LayerNorm((9, 11), elementwise_affine=False),
        "layer no bias": nn.LayerNorm(11, bias=False),
        "rms": nn.RMSNorm(11, eps=0.1),
        "rms no affine": nn.RMSNorm((9, 11), elementwise_affine=False),
        "local response": nn.LocalResponseNorm(3, alpha=0.5, beta=0.6, k=2.0),
        "local response even": nn.LocalResponseNorm(4, alpha=0.5),
        "cross map": nn.CrossMapLRN2d(3, alpha=0.5, beta=0.6, k=2),
    }
    return {f"{name} norm": _trained(norm) for name, norm in found.items()}


def _activations() -> dict[str, nn.Module]:
    return {
        "celu": nn.CELU(0.7),
        "elu": nn.ELU(1.7),
        "elu in place": nn.ELU(0.5, inplace=True),
        "gelu": nn.GELU(),
        "gelu tanh": nn.GELU("tanh"),
        "glu": nn.GLU(1),
        "glu last": nn.Sequential(nn.ZeroPad2d((0, 1, 0, 0)), nn.GLU()),
        "hardshrink": nn.Hardshrink(0.8),
        "hardsigmoid": nn.Hardsigmoid(),
        "hardswish": nn.Hardswish(),
        "hardtanh": nn.Hardtanh(-0.3, 1.7),
        "leaky": nn.LeakyReLU(0.3),
        "log sigmoid": nn.LogSigmoid(),
        "log softmax": nn.LogSoftmax(1),
        "mish": nn.Mish(),
        "prelu": nn.PReLU(8),
        "prelu one": nn.PReLU(init=0.4),
        "relu": nn.ReLU(inplace=True),
        "relu6": nn.ReLU6(),
        "rrelu": nn.RReLU(0.1, 0.6),
        "selu": nn.SELU(),
        "sigmoid": nn.Sigmoid(),
        "silu": nn.SiLU(),
        "softmax": nn.Softmax(2),
        "softmax 2d": nn.Softmax2d(),
        "softmin": nn.Softmin(1),
        "softplus": nn.Softplus(),
        "softplus beta": nn.Softplus(3.0),
        "softplus threshold": nn.Softplus(threshold=0.5),
        "softplus both": nn.Softplus(0.5, 1.0),
        "softshrink": nn.Softshrink(0.8),
        "softsign": nn.Softsign(),
        "tanh": nn.Tanh(),
        "tanhshrink": nn.Tanhshrink(),
        "threshold": nn.Threshold(0.3, -2.0),
    }


def _paddings() -> dict[str, nn.Module]:
    return {
        "zero": nn.ZeroPad2d((1, 0, 2, 3)),
        "zero cut": nn.ZeroPad2d((-1, 2, 0, -3)),
        "constant": nn.ConstantPad2d((1, 2, 0, 3), -1.5),
        "constant cut": nn.ConstantPad2d((1, -2, -1, 3), 2.5),
        "constant 1d": rows(nn.ConstantPad1d((3, 1), 0.7)),
        "constant 3d": volumes(nn.ConstantPad3d((1, 0, 2, 1, 0, 1), 0.7)),
        "reflect": nn.ReflectionPad2d((1, 2, 3, 0)),
        "reflect 1d": rows(nn.ReflectionPad1d((3, 1))),
        "reflect 3d": volumes(nn.ReflectionPad3d((1, 2, 3, 0, 1, 0))),
        "replicate": nn.ReplicationPad2d((1, 2, 0, 4)),
        "replicate cut": nn.ReplicationPad2d((-1, 2, 0, -2)),
        "replicate 3d": volumes(nn.ReplicationPad3d((1, 2, 3, 0, 1, 0))),
        "circular": nn.CircularPad2d((1, 2, 3, 0)),
        "circular 1d": rows(nn.CircularPad1d((3, 1))),
        "circular 3d": volumes(nn.CircularPad3d((1, 2, 3, 0, 1, 0))),
    }


def _resampling() -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {
        "nearest 2": nn.Upsample(scale_factor=2),
        "nearest 1.5": nn.Upsample(scale_factor=1.5),
        "nearest size": nn.Upsample(size=(13, 7)),
        "nearest down": nn.Upsample(size=(4, 5)),
        "nearest-exact size": nn.Upsample(size=(13, 7), mode="nearest-exact"),
        "upsampling nearest": nn.UpsamplingNearest2d(scale_factor=3),
        "upsampling bilinear": nn.UpsamplingBilinear2d(size=(12, 15)),
        "linear 1d": rows(nn.Upsample(size=40, mode="linear", align_corners=True)),
        "trilinear": volumes(nn.Upsample(size=(3, 12, 12), mode="trilinear")),
        "area": Apply(functional.interpolate, size=(4, 5), mode="area"),
        "area divides": Apply(functional.interpolate, size=(3, 11), mode="area"),
        "fold": nn.Sequential(nn.Unfold(3, stride=2, padding=1), nn.Fold((9, 11), 3, stride=2, padding=1)),
        "unfold": nn.Unfold((2, 3), dilation=2, padding=1, stride=(1, 2)),
        "grid": _Grid(),
    }
    for mode in ("bilinear", "bicubic"):
        for align in (False, True):
            found[f"{mode} scale corners {align}"] = nn.Upsample(scale_factor=1.7, mode=mode, align_corners=align)
            found[f"{mode} size corners {align}"] = nn.Upsample(size=(5, 17), mode=mode, align_corners=align)
        found[f"{mode} own scale"] = nn.Upsample(scale_factor=1.7, mode=mode, recompute_scale_factor=True)
        found[f"{mode} smooth"] = Apply(functional.interpolate, size=(5, 7), mode=mode, antialias=True)
    return found


class _Grid(nn.Module):
    """Turns the map."""

    def __init__(self) -> None:
        super().__init__()
        turn = torch.tensor([[[0.8, -0.5, 0.1], [0.4, 0.9, -0.2]]])
        self.register_buffer("grid", functional.affine_grid(turn, [1, 8, 6, 7], align_corners=False))

    def forward(self, features: Tensor) -> Tensor:
        grid = self.grid + 0 * features[:, 0, :6, :7, None]  # one for each image
        return functional.grid_sample(features, grid, padding_mode="border", align_corners=True)


class _Bilinear(nn.Module):
    """A product of a map with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.product = nn.Bilinear(WIDTH, WIDTH, 3)

    def forward(self, features: Tensor) -> Tensor:
        return self.product(features, features)


def _shuffles() -> dict[str, nn.Module]:
    return {
        "pixel shuffle": nn.PixelShuffle(2),
        "pixel unshuffle": nn.Sequential(nn.ZeroPad2d((0, 1, 1, 0)), nn.PixelUnshuffle(2)),
        "pixel unshuffle, pool": nn.Sequential(
            nn.ZeroPad2d((0, 1, 1, 0)), nn.PixelUnshuffle(2), nn.AdaptiveAvgPool2d((5, 2))
        ),
        "channel shuffle": nn.ChannelShuffle(4),
        "flatten": nn.Flatten(1, 2),
        "unflatten": nn.Unflatten(1, (2, 4)),
        "dropout": nn.Dropout2d(0.4),
        "alpha dropout": nn.FeatureAlphaDropout(0.4),
        "bilinear layer": _Bilinear(),
    }


KINDS = {
    "convolutions": _convolutions,
    "pools": _pools,
    "norms": _norms,
    "activations": _activations,
    "paddings": _paddings,
    "resampling": _resampling,
    "shuffles": _shuffles,
}
