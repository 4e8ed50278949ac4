"""Functions that the ONNX exporter refuses or gets wrong, written as others that it gets right.

Sizes that are known when a part is exported are numbers there, not something to compute for each batch; the number of
images alone stays free.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_EXACT = 15.0  # from here on softplus(x) is x, up to rounding


class Exportable(TorchFunctionMode):
    """While it is entered, what a module calls is written so that it can be exported.

    Args:
        in_bytes: whether the module rounds to bytes. OpenVINO pads bytes with the wrong value where it pools, so means
            over borders are products there.
    """

    def __init__(self, in_bytes: bool = False) -> None:
        super().__init__()
        self.written = _WRITTEN | _IN_BYTES if in_bytes else _WRITTEN

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.written.get(func, func)(*args, **(kwargs or {}))


def _size(features: Tensor, dim: int | None = None) -> Any:
    if dim is None:
        return _shape(features)
    found = features.size(dim)
    return found if dim % features.dim() == 0 else int(found)


def _shape(features: Tensor) -> Any:
    if not features.dim():
        return features.shape
    images, *others = features.shape
    return torch.Size([images, *map(int, others)])


def _sizes(features: Tensor, dims: int) -> list[int]:
    """Of the last dimensions."""
    return [int(size) for size in features.shape[-dims:]]


def _each(value: Any, dims: int) -> list[Any]:
    return list(value) if isinstance(value, Sequence | torch.Size) else [value] * dims


def _pad(input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    """With the value written out: without, ONNX Runtime leaves zeros in front of a convolution a pass of their own."""
    return functional.pad(input, pad, mode, 0.0 if mode == "constant" and value is None else value)


def _conv(dims: int, conv: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """With the padding in numbers."""

    def run(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        if padding == "same":
            whole = [step * (size - 1) for step, size in zip(_each(dilation, dims), _sizes(weight, dims), strict=True)]
            padding = [pad // 2 for pad in whole]
            if any(pad % 2 for pad in whole):
                input = _pad(input, [end for pad in whole[::-1] for end in (pad // 2, pad - pad // 2)])
                padding = 0
        return conv(input, weight, bias, stride, 0 if padding == "valid" else padding, dilation, groups)

    return run


def _adaptive(dims: int, features: Tensor, wanted: Any) -> tuple[list[int], list[int]]:
    """Sizes before and after."""
    sizes = _sizes(features, dims)
    return sizes, [size if one is None else int(one) for size, one in zip(sizes, _each(wanted, dims), strict=True)]


def _adaptive_avg(dims: int, plain: Callable[..., Tensor], pool: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A pool where sizes divide, else a product with the shares of all values in each mean."""

    def run(input: Tensor, output_size: Any) -> Tensor:
        sizes, wanted = _adaptive(dims, input, output_size)
        if set(wanted) == {1}:
            return plain(input, 1)
        if not any(size % one for size, one in zip(sizes, wanted, strict=True)):
            return pool(input, [size // one for size, one in zip(sizes, wanted, strict=True)])
        shares = [
            functional.adaptive_avg_pool1d(torch.eye(size).to(input)[None], one)[0]
            for size, one in zip(sizes, wanted, strict=True)
        ]
        return _mapped(input, shares)

    return run


def _mapped(features: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """The last dimensions, each mapped by a matrix (size before, size after)."""
    for back, matrix in enumerate(reversed(matrices), start=1):
        if back == 1:
            features = features @ matrix
        elif back == 2:
            features = matrix.T @ features
        else:
            features = (features.transpose(-back, -1) @ matrix).transpose(-back, -1)
    return features


def _adaptive_max(dims: int, plain: Callable[..., Any], pool: Callable[..., Tensor]) -> Callable[..., Any]:
    """A pool where sizes divide, else the largest value of each window, dimension by dimension."""

    def run(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
        if return_indices:
            return plain(input, output_size, return_indices)
        sizes, wanted = _adaptive(dims, input, output_size)
        if not any(size % one for size, one in zip(sizes, wanted, strict=True)):
            return pool(input, [size // one for size, one in zip(sizes, wanted, strict=True)])
        for dim, (size, count) in enumerate(zip(sizes, wanted, strict=True), start=-dims):
            windows = [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]
            found = [input.narrow(dim, start, end - start).amax(dim, keepdim=True) for start, end in windows]
            input = torch.cat(found, dim)
        return input

    return run


def _window(dims: int, given: dict[str, Any]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Kernel, stride, padding and dilation of a pool."""
    kernel = _each(given["kernel_size"], dims)
    stride = _each(given.get("stride") or kernel, dims)
    padding, dilation = (_each(given.get(name, default), dims) for name, default in (("padding", 0), ("dilation", 1)))
    return tuple([int(one) for one in numbers] for numbers in (kernel, stride, padding, dilation))  # type: ignore


def _beyond(sizes: list[int], kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]) -> list:
    """With ``ceil_mode``, how far the last windows reach over the padded end; 0 where it adds no window."""
    found = []
    for size, length, step, pad, spread in zip(sizes, kernel, stride, padding, dilation, strict=True):
        reach = spread * (length - 1) + 1
        windows = math.ceil((size + 2 * pad - reach) / step) + 1
        windows -= (windows - 1) * step >= size + pad  # the last one must start inside
        found.append(max(0, (windows - 1) * step + reach - size - 2 * pad))
    return found


def _padded(features: Tensor, padding: list[int], beyond: list[int], value: float) -> Tensor:
    ends = zip(reversed(padding), reversed(beyond), strict=True)
    return functional.pad(features, [end for pad, more in ends for end in (pad, pad + more)], value=value)


def _avg_pool(dims: int, pool: Callable[..., Tensor], by_products: bool = False) -> Callable[..., Tensor]:
    """Where a border or a divisor makes means of other numbers of values, plain means times what that changes."""
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")

    def run(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        kernel, stride, padding, dilation = _window(dims, given)
        sizes = _sizes(input, dims)
        beyond = _beyond(sizes, kernel, stride, padding, dilation) if given.get("ceil_mode") else [0] * dims
        bordered = any(beyond) or (by_products and any(padding))
        if given.get("divisor_override") is None and not bordered:
            return pool(input, **{**given, "ceil_mode": False} if "ceil_mode" in given else given)
        ones = torch.ones(1, 1, *sizes, dtype=input.dtype, device=input.device)
        if by_products:
            windows = [
                functional.avg_pool1d(functional.pad(torch.eye(size).to(input)[None], (pad, pad + more)), length, step)[
                    0
                ]
                for size, pad, more, length, step in zip(sizes, padding, beyond, kernel, stride, strict=True)
            ]
            return _mapped(input, windows) * (pool(ones, **given) / _mapped(ones, windows))
        counted = pool(_padded(ones, padding, beyond, 0.0), kernel, stride)
        means: Tensor = pool(_padded(input, padding, beyond, 0.0), kernel, stride)
        return means * (pool(ones, **given) / counted)

    return run


def _max_pool(dims: int, pool: Callable[..., Any]) -> Callable[..., Any]:
    """Without a ceiling where that adds no window, and with its windows padded where three dimensions have them."""
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")

    def run(input: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if given.get("return_indices") or not given.get("ceil_mode"):
            return pool(input, **given)
        window = _window(dims, given)
        beyond = _beyond(_sizes(input, dims), *window)
        if not any(beyond):
            return pool(input, **{**given, "ceil_mode": False})
        if dims < 3:
            return pool(input, **given)
        kernel, stride, padding, dilation = window
        return pool(_padded(input, padding, beyond, -math.inf), kernel, stride, 0, dilation)

    return run


def _softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    found = functional.softplus(input, beta)
    return found if threshold >= _EXACT else torch.where(input * beta > threshold, input, found)


def _threshold(input: Tensor, threshold: float, value: float, inplace: bool = False) -> Tensor:
    return torch.where(input > threshold, input, torch.full_like(input, value))


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    channels = int(input.shape[1])
    if not use_input_stats:
        return functional.batch_norm(input, running_mean, running_var, weight, bias, eps=eps)
    weight = torch.ones(channels).to(input) if weight is None else weight
    bias = torch.zeros(channels).to(input) if bias is None else bias
    return functional.instance_norm(input, weight=weight, bias=bias, eps=eps)


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    dims = list(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    found = input * (input.square().mean(dims, keepdim=True) + eps).rsqrt()
    return found if weight is None else found * weight


def _channel_shuffle(input: Tensor, groups: int) -> Tensor:
    _, channels, *sizes = _shape(input)
    parted = input.reshape(-1, groups, channels // groups, *sizes)
    return parted.transpose(1, 2).reshape(-1, channels, *sizes)


def _interpolate(
    input: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    """By products with what the function makes of single values, where the exporter does not know it."""
    options = {"recompute_scale_factor": recompute_scale_factor, "antialias": antialias}
    dims = input.dim() - 2
    if not antialias and mode not in ("area", "nearest-exact"):
        return functional.interpolate(input, size, scale_factor, mode, align_corners, **options)  # type: ignore
    sizes = _sizes(input, dims)
    wanted = [None] * dims if size is None else _each(size, dims)
    factors = [None] * dims if scale_factor is None else _each(scale_factor, dims)

    def values(one: int, other: Any, factor: Any) -> Tensor:
        """What each of so many values becomes, the rest being 0: (size before, size after)."""
        eye = torch.eye(one).to(input)[None, None]
        to = None if other is None else (one, int(other))
        by = None if factor is None else (1.0, float(factor))
        if mode == "area":
            other = int(math.floor(one * float(factor))) if other is None else int(other)
            return functional.adaptive_avg_pool1d(eye[0], other)[0]
        return functional.interpolate(eye, to, by, mode, align_corners, **options)[0, 0]  # type: ignore

    return _mapped(input, [values(*one) for one in zip(sizes, wanted, factors, strict=True)])


def _pools(name: str) -> list[Callable[..., Any]]:
    return [getattr(functional, f"{name}{dims}d") for dims in (1, 2, 3)]


_WRITTEN: dict[Any, Callable[..., Any]] = {
    Tensor.size: _size,
    Tensor.shape.__get__: _shape,  # type: ignore[attr-defined]
    functional.pad: _pad,
    functional.softplus: _softplus,
    functional.threshold: _threshold,
    functional.instance_norm: _instance_norm,
    functional.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    functional.interpolate: _interpolate,
    torch.channel_shuffle: _channel_shuffle,
    torch.native_channel_shuffle: _channel_shuffle,
}
_IN_BYTES: dict[Any, Callable[..., Any]] = {}
for _dims, (_convolve, _avg, _max, _by_avg, _by_max) in enumerate(
    zip(*map(_pools, ("conv", "avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool")), strict=True), start=1
):
    _WRITTEN[_convolve] = _conv(_dims, _convolve)
    _WRITTEN[_avg] = _avg_pool(_dims, _avg)
    _WRITTEN[_max] = _max_pool(_dims, _max)
    _WRITTEN[_by_avg] = _adaptive_avg(_dims, _by_avg, _avg)
    _WRITTEN[_by_max] = _adaptive_max(_dims, _by_max, _max)
    _IN_BYTES[_avg] = _avg_pool(_dims, _avg, by_products=True)
