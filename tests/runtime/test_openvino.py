"""What is OpenVINO's own: precisions, outputs that stay, integers, and what is said where it cannot be had."""

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from backends import needs_openvino
from gated_networks import gated_resnet, masked, split_exits
from networks import SmallResNet, close, dense, set_thresholds, split_at, with_exits
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from dynamize.errors import DynamizeError
from dynamize.runtime import openvino
from dynamize.runtime.compiled import compile_network

pytestmark = needs_openvino


def images(count: int) -> Tensor:
    return torch.randn(count, *SmallResNet.shape, generator=torch.Generator().manual_seed(count))


def session(model: onnx.ModelProto, **options: Any) -> Any:
    return openvino._compiled(model.SerializeToString(), **({"precision": "f32", "threads": 1, "size": None} | options))


@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.fast("False")
def test_an_answer_stays_when_the_next_batch_is_answered(gates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[Tensor]] = []
    kept: list[list[Tensor]] = []
    load = openvino.OpenVino.load

    def recording(self: openvino.OpenVino, *arguments: Any) -> Any:
        session = load(self, *arguments)

        def run(inputs: list[Tensor]) -> list[Tensor]:
            found = session(inputs)
            if len(given) < sessions:  # features too: a caller may keep what a part hands on
                given.append(found)
                kept.append([one.clone() for one in found])
                session([one.flip(0) * 2 for one in inputs])
                assert all(map(torch.equal, kept[-1], found))
            return found

        return run

    sessions = 0
    monkeypatch.setattr(openvino.OpenVino, "load", recording)
    network = gated_resnet({}) if gates else with_exits()
    compiled = compile_network(network, "openvino")
    set_thresholds(network, [float("inf"), float("inf")])
    sessions = 100
    compiled(images(4))
    assert len(given) > 2
    set_thresholds(network, [None, None])
    sessions = 0
    first = compiled(images(4))
    kept_logits = first.clone()
    compiled(images(4) + 1)
    compiled(images(9))
    assert torch.equal(first, kept_logits)


def test_strided_images_are_read_in_their_order() -> None:
    compiled, batch = compile_network(with_exits(), "openvino"), images(6)
    wanted = compiled(batch)
    assert torch.equal(compiled(batch.contiguous(memory_format=torch.channels_last)), wanted)
    assert torch.equal(compiled(torch.stack([batch, batch + 1], 1)[:, 0]), wanted)


def test_bfloat16_is_nearly_the_same_and_never_meant_by_float32() -> None:
    """Eight bits of mantissa are lost over a dozen layers: a few per cent of the largest logit."""
    if not openvino.computes_bfloat16():
        pytest.skip("this CPU does not compute in bfloat16")
    network, batch = with_exits(), images(64)
    split_at(network, batch, [0.4, 0.5])
    wanted, found = dense(network, batch), compile_network(network, "openvino-bf16").run(batch)
    same = found.exits == wanted.exits_N
    assert same.float().mean() > 0.9
    assert close(found.logits[same], wanted.answers_NC[same], 0.05)
    assert not close(found.logits[same], wanted.answers_NC[same], 1e-4)
    exact = compile_network(network, "openvino").run(batch)
    assert close(exact.logits, wanted.answers_NC)


def quantised_convolution() -> onnx.ModelProto:
    """uint8 features of scale 0.5 and zero point 3, int8 weights of scales 0.25 and 0.5, in QDQ form."""
    weight = np.array([[1, -3], [3, 4]], np.int8).reshape(2, 2, 1, 1)
    tensors = {
        "scale": np.array(0.5, np.float32),
        "zero": np.array(3, np.uint8),
        "weight": weight,
        "weight_scale": np.array([0.25, 0.5], np.float32),
        "weight_zero": np.zeros(2, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["features", "scale", "zero"], ["quantised"]),
        helper.make_node("DequantizeLinear", ["quantised", "scale", "zero"], ["taken"]),
        helper.make_node("DequantizeLinear", ["weight", "weight_scale", "weight_zero"], ["weights"], axis=0),
        helper.make_node("Conv", ["taken", "weights"], ["computed"]),
        helper.make_node("QuantizeLinear", ["computed", "scale", "zero"], ["rounded"]),
        helper.make_node("DequantizeLinear", ["rounded", "scale", "zero"], ["next_features"]),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2, 1, 1])
        for name in ("features", "next_features")
    ]
    initial = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    graph = helper.make_graph(nodes, "quantised", ends[:1], ends[1:], initial)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_integers_by_hand(precision: str) -> None:
    """2.2 -> 4.4 steps -> 4 and -1.6 -> -3.2 -> -3, so 2.0 and -1.5 are taken: 0.25 (2 + 4.5) = 1.625, 3.25 steps, of
    which 3 are left; 0.5 (6 - 6) = 0. Of 200, 255 - 3 = 252 steps are left, 126.0: 31.5 and 189, of which 126."""
    if precision == "bf16" and not openvino.computes_bfloat16():
        pytest.skip("this CPU does not compute in bfloat16")
    given = torch.tensor([[2.2, -1.6], [200.0, 0.0]]).reshape(2, 2, 1, 1)
    (found,) = session(quantised_convolution(), precision=precision)([given])
    assert found.flatten(1).tolist() == [[1.5, 0.0], [31.5, 126.0]]


class FakeModels:
    """Makes models that echo what they are given and keep what they are called with: (threads, size, images)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float] | None = None) -> None:
        self.now, self.calls, self.made = 0.0, list[tuple[int, int | None, int]](), list[int | None]()
        self.seconds = seconds or {}
        monkeypatch.setattr(openvino.time, "perf_counter", lambda: self.now)

    def __call__(self, threads: int, size: int | None) -> Any:
        self.made.append(size)

        def run(inputs: list[Tensor]) -> list[Tensor]:
            self.now += self.seconds.get(threads, 1.0)
            self.calls.append((threads, size, len(inputs[0])))
            return inputs

        return run

    def last(self, session: Any, images: int, bytes_each: int = 4) -> tuple[int, int | None, int]:
        """How a batch was called."""
        session([torch.zeros(images, bytes_each, dtype=torch.uint8)])
        return self.calls[-1]


@pytest.mark.parametrize(("seconds", "fastest"), [({1: 1.0, 8: 2.0}, 1), ({1: 3.0, 8: 2.0}, 8)])
def test_single_images_go_where_they_are_faster(
    seconds: dict[int, float], fastest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = FakeModels(monkeypatch, seconds)
    shaped = openvino._Shaped(models, threads=8, small=False, limit=1e-3)
    assert models.last(shaped, 2) == (8, None, 2)
    assert models.made == [None]  # no other model is made for them
    assert models.last(shaped, 1) == (fastest, 1, 1)
    assert models.last(shaped, 4) == (8, None, 4)
    assert models.last(shaped, 1) == (fastest, 1, 1)
    assert models.made == [None, 1, 1]


def test_a_size_that_comes_often_has_a_model_up_to_which_batches_are_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    models = FakeModels(monkeypatch)
    monkeypatch.setattr(openvino, "_MOST_SHAPES", 19)
    shaped = openvino._Shaped(models, threads=2, small=True, limit=1e-3)
    for images in [38, 39] * (openvino._OFTEN // 2 - 1) + [40]:
        assert models.last(shaped, images) == (2, None, images)
    assert models.last(shaped, 37) == (2, 40, 37)
    assert models.last(shaped, 41) == (2, None, 41)
    assert models.last(shaped, 0) == (2, None, 0)
    for images in range(1, 65):
        for _ in range(openvino._OFTEN + 1):
            last = models.last(shaped, images)
        filled = openvino._filled_up(images)[0]
        assert images <= filled < 1.25 * images
        assert last == (1 if images == 1 else 2, filled if filled < 64 else None, images)


def test_a_few_images_are_filled_up_to_a_power_of_two_until_their_own_size_comes_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = FakeModels(monkeypatch)
    shaped = openvino._Shaped(models, threads=2, small=True, limit=1e-3)
    for _ in range(openvino._OFTEN // 2):
        models.last(shaped, 5)
        models.last(shaped, 7)
    assert models.last(shaped, 6) == (2, 8, 6)
    for _ in range(openvino._OFTEN):
        last = models.last(shaped, 7)
    assert last == (2, 7, 7)
    assert models.last(shaped, 5) == (2, 8, 5)
    assert models.last(shaped, 17) == (2, None, 17)


def test_a_model_of_one_shape_that_answers_otherwise_is_not_used() -> None:
    def make(threads: int, size: int | None) -> Any:
        return lambda inputs: [inputs[0] * (1.0 if size is None else 1.01)]

    shaped, values = openvino._Shaped(make, threads=1, small=True, limit=1e-3), torch.randn(1, 8)
    assert torch.equal(shaped([values])[0], values)


def test_what_is_large_has_one_model_for_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    models = FakeModels(monkeypatch)
    for small, bytes_each in ((False, 1), (True, openvino._SMALL_FEATURES // 4 + 1)):
        shaped = openvino._Shaped(models, threads=2, small=small, limit=1e-3)
        for _ in range(openvino._OFTEN + 1):
            assert models.last(shaped, 4, bytes_each) == (2, None, 4)


@pytest.mark.slow
def test_batches_filled_up_are_answered_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates and exits leave batches of all sizes; 35 images after 64 leave rows of theirs in the model for 36."""
    monkeypatch.setattr(openvino, "_OFTEN", 1)  # every size has a model
    network = gated_resnet({})
    split_exits(network, images(64))
    compiled = compile_network(network, "openvino")
    for count in (64, 36, 35, 18, 17, 36):
        wanted, found = masked(network, images(count)), compiled.run(images(count))
        clear = wanted.clear
        assert clear.float().mean() > 0.9
        assert torch.equal(found.exits[clear], wanted.exits_N[clear])
        assert torch.equal(found.choices[clear], wanted.choices_NU[clear])
        assert close(found.logits[clear], wanted.answers_NC[clear], 2e-5)


def test_single_images_are_answered_as_in_a_batch() -> None:
    compiled, batch = compile_network(with_exits(), "openvino"), images(6)
    wanted = compiled(batch)
    assert all(close(compiled(one), answer[None]) for one, answer in zip(batch.split(1), wanted, strict=True))


def test_what_cannot_be_had_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    network = with_exits()
    with pytest.raises(DynamizeError, match="openvino-bf16 runs on the CPU here, not on cuda: use --backend eager"):
        compile_network(network, "openvino-bf16", "cuda")
    with pytest.raises(DynamizeError, match="OpenVINO refuses it: "):
        openvino._compiled(b"no model", precision="f32", threads=1, size=None)
    monkeypatch.setattr(openvino, "_CAPABILITY", "NO SUCH")
    with pytest.raises(DynamizeError, match="does not compute in bfloat16. Use --backend openvino"):
        compile_network(network, "openvino-bf16")

    def missing(name: str) -> Any:
        raise ImportError(f"No module named '{name}'")

    openvino._core.cache_clear()
    monkeypatch.setattr(openvino.importlib, "import_module", missing)
    with pytest.raises(DynamizeError, match=r"pip install 'dynamize\[openvino\]'"):
        compile_network(network, "openvino")
