"""Layers of bytes: numbers worked out by hand, integer arithmetic, and what ONNX Runtime makes of them."""

import pytest
import torch
from torch import Tensor, nn

from dynamize.nn.quantized import QuantizedConv2d, QuantizedLinear, Quantizer, is_quantized
from dynamize.runtime.engine import Border
from dynamize.runtime.onnx import export_onnx


def steps(values: Tensor, quantizer: Quantizer) -> Tensor:
    """Bytes as whole numbers, by the definition."""
    rounded = torch.round(values.double() / quantizer.scale.double()) + int(quantizer.zero_point)
    return rounded.clamp(0, 255).long()


def test_rounding_by_hand() -> None:
    quantizer = Quantizer(0.5, 10)
    values = torch.tensor([0.0, 0.5, 0.6, 0.8, -0.5, -5.0, -7.0, 122.5, 200.0])
    wanted = [0.0, 0.5, 0.5, 1.0, -0.5, -5.0, -5.0, 122.5, 122.5]  # from (0 - 10) / 2 to (255 - 10) / 2
    assert quantizer(values).tolist() == wanted
    assert torch.equal(quantizer(quantizer(values)), quantizer(values))


def test_weights_by_hand() -> None:
    layer = nn.Linear(2, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.27, -0.5], [0.0, 0.0], [-2.54, 2.0]]))
        layer.bias.copy_(torch.tensor([0.1, 3.0, -0.2]))
    quantized = QuantizedLinear(layer, 0.5)
    assert quantized.weight.tolist() == [[127, -50], [0, 0], [-127, 100]]
    assert quantized.weight_scale[[0, 2]].tolist() == pytest.approx([0.01, 0.02])
    assert quantized.bias is not None
    assert quantized.bias[[0, 2]].tolist() == [20, -20]  # 0.1 / (0.5 * 0.01), -0.2 / (0.5 * 0.02)
    assert float(quantized(torch.zeros(1, 2))[0, 1]) == pytest.approx(3.0)  # all weights zero, the bias not
    assert (quantized.weight.dtype, quantized.bias.dtype) == (torch.int8, torch.int32)


@pytest.mark.parametrize(("groups", "bias", "stride"), [(1, True, 1), (2, False, 2), (4, True, 1)])
def test_is_integer_arithmetic(groups: int, bias: bool, stride: int) -> None:
    before, after = Quantizer(0.03, 120), Quantizer(0.05, 100)
    conv = nn.Conv2d(4, 4, 3, stride=stride, padding=1, groups=groups, bias=bias)
    layer = QuantizedConv2d(conv, float(before.scale))
    x = torch.randn(2, 4, 6, 6)
    whole = (steps(x, before) - 120).double()
    sums = nn.functional.conv2d(whole, layer.weight.double(), None, stride, 1, 1, groups)
    if layer.bias is not None:
        sums += layer.bias.double()[:, None, None]
    wanted = (sums * layer.bias_scale.double()[:, None, None] / after.scale.double()).round() + 100
    found = steps(after(layer(before(x))), after)
    assert (found - wanted.clamp(0, 255).long()).abs().max() <= 1  # a tie may fall either way
    assert (found == wanted.clamp(0, 255).long()).double().mean() > 0.99
    assert torch.allclose(layer(x), conv(x), atol=0.05)


def test_onnx_holds_bytes() -> None:
    onnx = pytest.importorskip("onnx")
    network = nn.Sequential(Quantizer(0.03, 128), QuantizedConv2d(nn.Conv2d(3, 5, 3), 0.03), Quantizer(0.02, 100))
    assert is_quantized(network)
    assert not is_quantized(nn.Conv2d(3, 5, 3))
    model = onnx.load_from_string(export_onnx(network, Border((3, 6, 6)), outputs=["y"]))
    kinds = {tuple(tensor.dims): tensor.data_type for tensor in model.graph.initializer}
    assert kinds[5, 3, 3, 3] == onnx.TensorProto.INT8
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph.node) == 2
    assert not any(node.op_type == "MaxPool" for node in model.graph.node)
