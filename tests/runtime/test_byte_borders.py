"""Bytes between parts: the same answers, and really bytes."""

import copy
from typing import Any

import pytest
import torch
from gated_networks import gated_resnet
from networks import SmallResNet, close, set_offset, set_thresholds, with_exits
from torch import nn

from dynamize.compression.quantization import assemble, observe, steps_of
from dynamize.compression.rounding import prepare
from dynamize.nn.gates import ALL_OPEN
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Static
from dynamize.nn.quantized import Quantizer
from dynamize.runtime.byte_borders import exchange_bytes
from dynamize.runtime.compiled import compile_network
from dynamize.runtime.onnxruntime import OnnxRuntime


def in_bytes(network: DynamicNetwork, keep_float: tuple[str, ...] = ()) -> DynamicNetwork:
    prepared = prepare(network)
    batches = [torch.randn(16, *SmallResNet.shape, generator=torch.Generator().manual_seed(1))]
    return assemble(prepared, steps_of(observe(prepared, batches, True).observers, "mse", 99.9), keep_float)


def statics(network: DynamicNetwork) -> list[nn.Module]:
    return [piece.module for piece in network.row if isinstance(piece, Static)]


def images() -> torch.Tensor:
    return torch.randn(8, *SmallResNet.shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("fields", [{"chain": True}, {"head": "linear"}, {"head": "tail", "size": [0, 0]}])
@pytest.mark.fast("fields0")
def test_the_same_answers(fields: dict) -> None:
    network = in_bytes(with_exits(**fields))
    exchanging = copy.deepcopy(network)
    assert exchange_bytes(exchanging) == {1, 2}
    with torch.no_grad():
        features = [statics(exchanging)[0](images())]
        features.append(statics(exchanging)[1](features[0]))
        assert [one.dtype for one in features] == [torch.uint8, torch.uint8]
        bodies = [one.leaving[0].head.body for one in (exchanging, network)]
        assert torch.allclose(bodies[0](features[0]), bodies[1](statics(network)[0](images())))
        pairs = zip(exchanging.all_exits(images()), network.all_exits(images()), strict=True)
        assert all(close(*pair) for pair in pairs)


@pytest.mark.parametrize("fields", [{"chain": True}, {"chain": False}])
@pytest.mark.fast("fields0")
def test_on_onnx_runtime(fields: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[torch.Tensor]] = []
    load = OnnxRuntime.load

    def recording(self: OnnxRuntime, *arguments: Any) -> Any:
        session = load(self, *arguments)
        return lambda inputs: (given.append(found := session(inputs)), found)[1]

    monkeypatch.setattr(OnnxRuntime, "load", recording)
    network = in_bytes(with_exits(**fields))
    compiled = compile_network(network, "onnxruntime")
    with torch.no_grad():
        set_thresholds(network, [float("inf"), float("inf")])
        given.clear()
        compiled.run(images())
        features, _, score = given[0][:3]
        assert [one[0].dtype for one in given[:2]] == [features.dtype, torch.uint8] == [torch.uint8] * 2
        set_thresholds(network, [float(score.median()), None])  # some leave, their rows are taken out
        found, wanted = compiled.run(images()), network(images())
    assert found.exits.tolist().count(0) == 5  # of eight, the median is the fourth
    assert (found.logits - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_a_border_in_float_stays() -> None:
    """The block before the first exit and the layers behind are in float: their features have no steps."""
    network = in_bytes(with_exits(head="linear", at=["layer1"], size=[0]), ("layer1", "layer2.0"))
    exchange_bytes(network)
    with torch.no_grad():
        assert statics(network)[0](images()).dtype == torch.float32


def test_sides_that_differ_are_left_alone() -> None:
    network = in_bytes(with_exits())
    first = next(one for one in statics(network)[1].modules() if isinstance(one, Quantizer))
    first.scale.mul_(2)
    exchange_bytes(network)
    with torch.no_grad():
        assert statics(network)[0](images()).dtype == torch.float32
        assert statics(network)[1](images()[:, :1].expand(-1, 8, -1, -1)).dtype == torch.uint8


@pytest.mark.slow
def test_with_gates_and_exits() -> None:
    network = in_bytes(gated_resnet({"size": [16, 16]}, keep_first=False))
    assert nn.Conv2d not in {
        type(one) for part in network.parts() if part.graph is not None for one in part.graph.modules()
    }
    set_offset(network, ALL_OPEN)
    exchanging = copy.deepcopy(network)
    exchange_bytes(exchanging)
    with torch.no_grad():
        found, wanted = exchanging(images()), network(images())
        on_onnx = compile_network(network, "onnxruntime")(images())
    assert close(found, wanted)
    assert (on_onnx - wanted).abs().max() < 0.1 * wanted.abs().max()
