"""Layers of 8-bit integers, with quantising and dequantising written out: what a backend fuses into integer arithmetic.

PyTorch computes the same numbers in float: an exact simulation, up to the rounding of sums.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynamize.graph.tracer import Whole

LEVELS = 255  # steps of an unsigned byte, and of a signed one without -128
_LARGEST_BIAS = 2.0**30  # of what a sum of products of bytes can hold besides


class Quantizer(Whole):
    """Rounds to ``scale * (q - zero_point)`` with q from 0 to 255, for a whole tensor (Jacob et al. 2018, eq. 1).

    Args:
        scale: step between two values.
        zero_point: q that stands for 0.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: float = 1.0, zero_point: int = 0) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))
        self.register_buffer("zero_point", torch.tensor(zero_point, dtype=torch.uint8))

    def forward(self, values: Tensor) -> Tensor:
        rounded: Tensor = _Rounded.apply(values, self.scale, self.zero_point)
        return rounded

    def extra_repr(self) -> str:
        return f"scale={self.scale.item():.4g}, zero_point={self.zero_point.item()}"


class _QuantizedLayer(Whole):
    """Weights as signed bytes with a scale for each output channel, and a bias in int32.

    Args:
        layer: in float.
        input_scale: step of what the layer reads. A bias counts in steps of it times those of the weights.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    bias_scale: Tensor

    def __init__(self, layer: nn.Conv2d | nn.Linear, input_scale: float) -> None:
        super().__init__()
        weight = layer.weight.detach().float()
        bias = None if layer.bias is None else layer.bias.detach().float()
        scale = weight.flatten(1).abs().amax(1) / (LEVELS // 2)
        if bias is not None:
            scale = torch.maximum(scale, bias.abs() / (input_scale * _LARGEST_BIAS))
        scale = torch.where(scale > torch.finfo(scale.dtype).tiny, scale, 1.0)
        steps = weight / scale.view(-1, *[1] * (weight.ndim - 1))
        self.register_buffer("weight", steps.round().clamp(-(LEVELS // 2), LEVELS // 2).to(torch.int8))
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias_scale", scale * input_scale)
        self.register_buffer("bias", None if bias is None else (bias / self.bias_scale).round().to(torch.int32))

    def dequantized(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias in float."""
        weight = _Dequantized.apply(self.weight, self.weight_scale)
        return weight, None if self.bias is None else _Dequantized.apply(self.bias, self.bias_scale)


class QuantizedConv2d(_QuantizedLayer):
    """A convolution of bytes, (N, C, H, W) -> (N, C', H', W')."""

    def __init__(self, layer: nn.Conv2d, input_scale: float) -> None:
        super().__init__(layer, input_scale)
        self.stride, self.dilation, self.groups = layer.stride, layer.dilation, layer.groups
        self.padding = cast(tuple[int, int], layer.padding)

    def forward(self, features_NCHW: Tensor) -> Tensor:
        weight, bias = self.dequantized()
        return functional.conv2d(features_NCHW, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        outputs, inputs, *kernel = self.weight.shape
        return f"{inputs * self.groups}, {outputs}, kernel_size={tuple(kernel)}, stride={self.stride}"


class QuantizedLinear(_QuantizedLayer):
    """A linear layer of bytes, (N, C) -> (N, C')."""

    def forward(self, features_NC: Tensor) -> Tensor:
        return functional.linear(features_NC, *self.dequantized())

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"


def quantized_layer(layer: nn.Module, input_scale: float) -> nn.Module:
    """The layer in bytes, for an input in steps of ``input_scale``."""
    if isinstance(layer, nn.Conv2d):
        return QuantizedConv2d(layer, input_scale)
    assert isinstance(layer, nn.Linear)
    return QuantizedLinear(layer, input_scale)


def is_quantized(module: nn.Module) -> bool:
    """Whether anything in it rounds to bytes."""
    return any(isinstance(one, Quantizer) for one in module.modules())


class _Rounded(torch.autograd.Function):
    """QuantizeLinear and DequantizeLinear of ONNX, one after the other."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(values, scale, zero_point.to(torch.int32), 0, LEVELS)

    @staticmethod
    def symbolic(graph: Any, values: Any, scale: Any, zero_point: Any) -> Any:
        steps = graph.op("QuantizeLinear", values, scale, zero_point)
        return graph.op("DequantizeLinear", steps, scale, zero_point).setType(values.type())


class _Dequantized(torch.autograd.Function):
    """DequantizeLinear of ONNX, for each output channel."""

    @staticmethod
    def forward(ctx: Any, steps: Tensor, scale: Tensor) -> Tensor:
        return steps.to(scale.dtype) * scale.view(-1, *[1] * (steps.ndim - 1))

    @staticmethod
    def symbolic(graph: Any, steps: Any, scale: Any) -> Any:
        kind = steps.type()
        zeros = graph.op("Constant", value_t=torch.zeros(kind.sizes()[0], dtype=kind.dtype()))
        found = graph.op("DequantizeLinear", steps, scale, zeros, axis_i=0)
        return found.setType(kind.with_dtype(torch.float32))
