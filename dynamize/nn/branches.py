"""A convolution with linear branches beside it: more to train, and one convolution again afterwards.

Every branch starts at zero, so a block computes at first what its convolution did, bit by bit, in both modes.
"""

from dataclasses import replace
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynamize.graph.kernels import Kernel, Pair, kernel_of, padding_of

Form = Literal["acnet", "dbb", "repvgg", "qarepvgg"]


class BranchBlock(nn.Module):
    """A k x k convolution and its batch norm with branches of one form, (N, C, H, W) -> (N, C', H', W').

    ``acnet``: 1 x k and k x 1 (Ding et al. 2019, ACNet). ``dbb``: 1 x 1, 1 x 1 - k x k and 1 x 1 - average (Ding et al.
    2021, Diverse Branch Block); for a depthwise convolution 1 x 1 - k x k and the average alone. ``repvgg``: 1 x 1 and,
    where shapes allow, a batch norm alone (Ding et al. 2021, RepVGG). In these, each branch ends in a batch norm of
    scale zero and is added behind the convolution's own. ``qarepvgg``: a 1 x 1 convolution and, where shapes allow, the
    input times a scale for each channel, both without batch norm, and the batch norm behind the sum (Chu et al. 2022,
    QARepVGG, whose k x k branch has one more inside; here the trained one stands behind the sum).

    Args:
        conv: square, of odd size above 1; it is held, not copied.
        norm: the batch norm that follows it, or None.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.Module | None, form: Form) -> None:
        super().__init__()
        self.form = form
        self.origin = conv
        self.norm = nn.Identity() if norm is None else norm
        self.branches = nn.ModuleList(_branches(conv, norm, form)).to(conv.weight)

    def forward(self, features_NCHW: Tensor) -> Tensor:
        total = self.origin(features_NCHW)
        if self.form == "qarepvgg":
            for branch in self.branches:
                total = total + branch(features_NCHW)
            return cast(Tensor, self.norm(total))
        total = self.norm(total)
        for branch in self.branches:
            total = total + branch(features_NCHW)
        return total

    def kernel(self) -> Kernel:
        """What the block computes in eval mode."""
        branches = [cast(_Branch, branch).kernel() for branch in self.branches]
        norm = kernel_of(self.norm, self.origin.out_channels)
        assert norm is not None, "the block was built around a norm that is affine"
        total = Kernel.of_conv(self.origin)
        if self.form != "qarepvgg":
            total = total.then(norm)
        for branch in branches:
            total = total.plus(branch)
        return total.then(norm) if self.form == "qarepvgg" else total

    def fuse(self) -> nn.Conv2d:
        """The one convolution that answers as the block does in eval mode."""
        conv = self.kernel().as_conv(self.origin.weight)
        conv.requires_grad_(self.origin.weight.requires_grad)
        return conv.train(self.training)


def fits(conv: nn.Conv2d) -> bool:
    """Whether a convolution can get branches: it is square, of odd size above 1."""
    height, width = conv.kernel_size
    return height == width and height % 2 == 1 and height > 1


def _branches(conv: nn.Conv2d, norm: nn.Module | None, form: Form) -> list["_Branch"]:
    side = conv.kernel_size[0]
    keeps_shape = conv.in_channels == conv.out_channels and tuple(conv.stride) == (1, 1)
    found: list[_Branch]
    if form == "acnet":
        found = [_ConvBranch(conv, norm, (1, side)), _ConvBranch(conv, norm, (side, 1))]
    elif form == "dbb":
        found = [_BottleneckBranch(conv, norm), _AverageBranch(conv, norm)]
        if not _depthwise(conv):
            found.insert(0, _ConvBranch(conv, norm, (1, 1)))
    elif form == "repvgg":
        found = [_ConvBranch(conv, norm, (1, 1))]
        if keeps_shape:
            found.append(_NormBranch(conv, norm))
    else:
        found = [_PlainBranch(conv)]
        if keeps_shape:
            found.append(_ScaleBranch(conv))
    return found


class _Branch(nn.Module):
    """Where a branch reads the map so that its pixels lie under the middle of the host's kernel.

    A branch of size 1 along an axis needs less padding there, ``pad``, or none but a map cropped by ``crop``.
    """

    def __init__(self, host: nn.Conv2d, size: Pair) -> None:
        super().__init__()
        self.mode = host.padding_mode
        middle = [step * (k - 1) // 2 for step, k in zip(host.dilation, host.kernel_size, strict=True)]
        net = [p - m if s == 1 else p for p, m, s in zip(padding_of(host), middle, size, strict=True)]
        self.pad: Pair = (max(net[0], 0), max(net[1], 0))
        self.crop: Pair = (max(-net[0], 0), max(-net[1], 0))

    def kernel(self) -> Kernel:
        raise NotImplementedError

    def cropped(self, features: Tensor) -> Tensor:
        rows, columns = self.crop
        return F.pad(features, (-columns, -columns, -rows, -rows)) if rows or columns else features


class _ConvBranch(_Branch):
    """A smaller convolution and a batch norm of scale zero."""

    def __init__(self, host: nn.Conv2d, norm: nn.Module | None, size: Pair) -> None:
        super().__init__(host, size)
        self.conv = _smaller(host, size, self.pad)
        self.norm = _zero(_norm(host.out_channels, norm))

    def forward(self, features: Tensor) -> Tensor:
        return cast(Tensor, self.norm(self.conv(self.cropped(features))))

    def kernel(self) -> Kernel:
        return Kernel.of_conv(self.conv, self.crop).then(_of(self.norm))


class _PlainBranch(_Branch):
    """A 1 x 1 convolution that starts at zero."""

    def __init__(self, host: nn.Conv2d) -> None:
        super().__init__(host, (1, 1))
        self.conv = _smaller(host, (1, 1), self.pad)
        nn.init.zeros_(self.conv.weight)

    def forward(self, features: Tensor) -> Tensor:
        return cast(Tensor, self.conv(self.cropped(features)))

    def kernel(self) -> Kernel:
        return Kernel.of_conv(self.conv, self.crop)


class _NormBranch(_Branch):
    """The input through a batch norm of scale zero."""

    def __init__(self, host: nn.Conv2d, norm: nn.Module | None) -> None:
        super().__init__(host, (1, 1))
        self.norm = _zero(_norm(host.out_channels, norm))

    def forward(self, features: Tensor) -> Tensor:
        return cast(Tensor, self.norm(_padded(self.cropped(features), self.pad, self.mode)))

    def kernel(self) -> Kernel:
        return _moved(Kernel.per_channel(torch.ones(self.norm.num_features)), self).then(_of(self.norm))


class _ScaleBranch(_Branch):
    """The input times a number for each channel, which starts at zero."""

    def __init__(self, host: nn.Conv2d) -> None:
        super().__init__(host, (1, 1))
        self.scale = nn.Parameter(torch.zeros(host.out_channels))

    def forward(self, features: Tensor) -> Tensor:
        return _padded(self.cropped(features), self.pad, self.mode) * self.scale.view(1, -1, 1, 1)

    def kernel(self) -> Kernel:
        return _moved(Kernel.per_channel(self.scale), self)


class _BottleneckBranch(_Branch):
    """1 x 1 - k x k: the 1 x 1 starts as the identity where it keeps the channels (DBB)."""

    def __init__(self, host: nn.Conv2d, norm: nn.Module | None) -> None:
        super().__init__(host, _square(host))
        width = 2 * host.in_channels if _depthwise(host) else host.in_channels
        self.point = nn.Conv2d(host.in_channels, width, 1, groups=host.groups, bias=False)
        if width == host.in_channels:
            _become_identity(self.point)
        self.inner = _norm(width, norm)
        self.conv = nn.Conv2d(
            width,
            host.out_channels,
            _square(host),
            cast(Pair, host.stride),
            0,
            cast(Pair, host.dilation),
            host.groups,
            bias=False,
        )
        self.norm = _zero(_norm(host.out_channels, norm))

    def forward(self, features: Tensor) -> Tensor:
        inner = _padded_with_shift(self.inner(self.point(features)), self.inner, self.pad, self.mode)
        return cast(Tensor, self.norm(self.conv(inner)))

    def kernel(self) -> Kernel:
        inner = Kernel.of_conv(self.point).then(_of(self.inner))
        return _moved(inner.then(Kernel.of_conv(self.conv)), self).then(_of(self.norm))


class _AverageBranch(_Branch):
    """1 x 1 - average over the host's window; for a depthwise host the average alone."""

    taps: Tensor

    def __init__(self, host: nn.Conv2d, norm: nn.Module | None) -> None:
        super().__init__(host, _square(host))
        self.point: nn.Conv2d | None = None
        self.inner: nn.BatchNorm2d | None = None
        if not _depthwise(host):
            self.point = nn.Conv2d(host.in_channels, host.out_channels, 1, groups=host.groups, bias=False)
            self.inner = _norm(host.out_channels, norm)
        self.stride, self.dilation, self.channels = tuple(host.stride), tuple(host.dilation), host.out_channels
        height, width = host.kernel_size
        taps = torch.full((host.out_channels, 1, height, width), 1 / (height * width))
        self.register_buffer("taps", taps, persistent=False)
        self.norm = _zero(_norm(host.out_channels, norm))

    def forward(self, features: Tensor) -> Tensor:
        if self.point is not None and self.inner is not None:
            inner = _padded_with_shift(self.inner(self.point(features)), self.inner, self.pad, self.mode)
        else:
            inner = _padded(features, self.pad, self.mode)
        mean = F.conv2d(inner, self.taps, None, self.stride, 0, self.dilation, self.channels)
        return cast(Tensor, self.norm(mean))

    def kernel(self) -> Kernel:
        stride, dilation = cast(Pair, self.stride), cast(Pair, self.dilation)
        size = cast(Pair, tuple(self.taps.shape[2:]))
        mean = Kernel.average(self.channels, size, stride, (0, 0), dilation)
        if self.point is not None and self.inner is not None:
            mean = Kernel.of_conv(self.point).then(_of(self.inner)).then(mean)
        return _moved(mean, self).then(_of(self.norm))


def _moved(kernel: Kernel, branch: _Branch) -> Kernel:
    """The kernel on a map that was padded and cropped as the branch does it."""
    start = (branch.crop[0] - branch.pad[0], branch.crop[1] - branch.pad[1])
    return replace(kernel, start=start, mode=branch.mode if any(branch.pad) else None)


def _smaller(host: nn.Conv2d, size: Pair, padding: Pair) -> nn.Conv2d:
    return nn.Conv2d(
        host.in_channels,
        host.out_channels,
        size,
        cast(Pair, host.stride),
        padding,
        cast(Pair, host.dilation),
        host.groups,
        bias=False,
        padding_mode=host.padding_mode,
    )


def _become_identity(point: nn.Conv2d) -> None:
    width = point.in_channels // point.groups
    rows = torch.arange(point.out_channels)
    nn.init.zeros_(point.weight)
    with torch.no_grad():
        point.weight[rows, rows % width] = 1


def _norm(channels: int, like: nn.Module | None) -> nn.BatchNorm2d:
    """A new batch norm with the numerical constants of the host's."""
    if isinstance(like, nn.modules.batchnorm._BatchNorm):
        return nn.BatchNorm2d(channels, like.eps, like.momentum)
    return nn.BatchNorm2d(channels)


def _zero(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    nn.init.zeros_(norm.weight)
    return norm


def _of(norm: nn.BatchNorm2d) -> Kernel:
    kernel = kernel_of(norm, norm.num_features)
    assert kernel is not None
    return kernel


def _padded(features: Tensor, padding: Pair, mode: str) -> Tensor:
    rows, columns = padding
    if not rows and not columns:
        return features
    return F.pad(features, (columns, columns, rows, rows), "constant" if mode == "zeros" else mode)


def _padded_with_shift(features: Tensor, norm: nn.BatchNorm2d, padding: Pair, mode: str) -> Tensor:
    """Padded with what the layers up to ``norm`` make of zeros, so that they commute with padding (DBB, Transform III).

    The running statistics are taken in both modes.
    """
    if mode != "zeros" or not any(padding):
        return _padded(features, padding, mode)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    shift = norm.bias - norm.running_mean * norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = shift.view(1, -1, 1, 1)
    return _padded(features - shift, padding, mode) + shift


def _square(host: nn.Conv2d) -> Pair:
    return cast(Pair, tuple(host.kernel_size))


def _depthwise(host: nn.Conv2d) -> bool:
    return host.groups == host.in_channels == host.out_channels
