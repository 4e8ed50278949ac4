"""Backends answer and route as the module does, and compiling leaves it alone."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backends import FLOAT32
from image_networks import ON_IMAGES, on_images, settings_of
from networks import (
    SmallResNet,
    close,
    dense,
    set_thresholds,
    small_resnet,
    split_at,
    thresholds,
    torchvision_network,
    with_exits,
)

from dynamize.conversion import convert, wrap
from dynamize.errors import DynamizeError
from dynamize.graph.macs import counting_macs
from dynamize.runtime.compiled import compile_network
from dynamize.runtime.engine import default_backend
from dynamize.runtime.onnxruntime import OnnxRuntime
from dynamize.transforms import Exits

HEADS = [
    {"head": "linear", "confidence": "margin"},
    {"head": "conv", "confidence": "entropy"},
    {"head": "tail", "size": [1, 0]},
    {"head": "conv", "chain": True},
]


def images(count: int) -> torch.Tensor:
    return torch.randn(count, *SmallResNet.shape, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("backend", FLOAT32)
@pytest.mark.parametrize("fields", HEADS)
@pytest.mark.fast("fields0-eager", "fields2-onnxruntime")
def test_same_answers_and_routing_for_any_batch_size(backend: str, fields: dict) -> None:
    dynamic = with_exits(**fields)
    compiled = compile_network(dynamic, backend)
    for count in (1, 2, 7, 64):
        split_at(dynamic, images(count), [0.4, 0.5])
        wanted = dense(dynamic, images(count))
        found = compiled.run(images(count))
        logits, exits = found.logits, found.exits
        on = torch.tensor(thresholds(dynamic))[:, None]
        clear = ((wanted.scores_KN - on).abs() > 1e-5 * wanted.scores_KN.abs().amax(1, keepdim=True)).all(0)
        assert clear.float().mean() > 0.9
        assert torch.equal(exits[clear], wanted.exits_N[clear])
        assert close(logits[clear], wanted.answers_NC[clear])
        assert torch.equal(compiled(images(count)), logits)


@pytest.mark.parametrize("backend", FLOAT32)
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
@pytest.mark.slow
def test_torchvision_networks_with_exits_on_and_off(backend: str, name: str) -> None:
    network, batch = torchvision_network(name), torch.randn(5, 3, 64, 64)
    dynamic = convert(network, [Exits(count=2)], (3, 64, 64))
    compiled = compile_network(dynamic, backend)
    with torch.no_grad():
        assert close(compiled(batch), network(batch))
        for k in range(2):
            set_thresholds(dynamic, [float("-inf") if j == k else float("inf") for j in range(2)])
            found = compiled.run(batch)
            assert found.exits.tolist() == [k] * 5
            assert close(found.logits, dynamic.all_exits(batch)[k], 2e-5)


@pytest.mark.parametrize("backend", FLOAT32)
@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.fast("False-eager", "True-onnxruntime")
def test_an_exit_that_is_off(backend: str, chain: bool) -> None:
    dynamic = with_exits(chain=chain)
    compiled = compile_network(dynamic, backend)
    split_at(dynamic, images(16), [0.4, 0.5])
    first, second = thresholds(dynamic)
    for values in ([None, second], [first, None], [None, None]):
        set_thresholds(dynamic, values)
        wanted = dense(dynamic, images(16))
        found = compiled.run(images(16))
        assert torch.equal(found.exits, wanted.exits_N)
        assert close(found.logits, wanted.answers_NC)


def test_eager_runs_no_head_that_is_off() -> None:
    dynamic = with_exits()
    compiled = compile_network(dynamic, "eager")
    static = compile_network(wrap(small_resnet(), SmallResNet.shape), "eager")
    executed = []
    for network in (compiled, static):
        with counting_macs() as counted:
            network(images(3))
        executed.append(counted())
    assert executed[0] == executed[1]


def test_onnxruntime_runs_no_head_that_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path and the head behind it are one session, which gives features, logits and score; with the exit off another
    one that gives features alone is run in its place."""
    ran: list[int] = []
    load = OnnxRuntime.load

    def counting(self: OnnxRuntime, *given: Any) -> Any:
        session = load(self, *given)
        return lambda inputs: (found := session(inputs), ran.append(len(found)))[0]

    monkeypatch.setattr(OnnxRuntime, "load", counting)
    dynamic = with_exits()
    compiled = compile_network(dynamic, "onnxruntime")
    ran.clear()
    set_thresholds(dynamic, [float("inf"), float("inf")])
    compiled(images(2))
    assert ran == [3, 3, 1]
    ran.clear()
    set_thresholds(dynamic, [None, None])
    compiled(images(2))
    ran.clear()  # other parts are compiled for it, and tried
    compiled(images(2))
    assert ran == [1, 1, 1]


@pytest.mark.parametrize("backend", FLOAT32)
def test_a_static_network(backend: str) -> None:
    network = small_resnet()
    compiled = compile_network(wrap(network, SmallResNet.shape), backend)
    found = compiled.run(images(3))
    assert close(found.logits, network(images(3)).detach())
    assert found.exits.tolist() == [0, 0, 0]


@pytest.mark.parametrize("backend", FLOAT32)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.fast("True-eager", "False-onnxruntime")
def test_compiling_changes_nothing_in_the_network(backend: str, training: bool) -> None:
    dynamic = with_exits().train(training)
    before = {name: value.clone() for name, value in dynamic.state_dict().items()}
    compiled = compile_network(dynamic, backend)
    compiled(images(4))
    assert dynamic.training == training
    assert all(module.training == training for module in dynamic.modules())
    assert dynamic.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in dynamic.state_dict().items())


@pytest.mark.parametrize("backend", FLOAT32)
def test_weights_are_frozen_and_thresholds_are_not(backend: str) -> None:
    dynamic = with_exits()
    set_thresholds(dynamic, [float("-inf"), None])
    compiled = compile_network(dynamic, backend)
    first = compiled(images(3))
    with torch.no_grad():
        for parameter in dynamic.parameters():
            parameter.zero_()
    assert torch.equal(compiled(images(3)), first)
    set_thresholds(dynamic, [float("inf"), None])
    assert compiled.run(images(3)).exits.tolist() == [2, 2, 2]


@pytest.mark.parametrize("backend", FLOAT32)
def test_an_empty_batch_and_images_that_want_gradients(backend: str) -> None:
    dynamic = with_exits()
    set_thresholds(dynamic, [0.0, 0.0])
    compiled = compile_network(dynamic, backend)
    assert compiled(images(2)[:0]).shape == (0, 7)
    assert torch.equal(compiled(images(2).requires_grad_()), compiled(images(2)))


@pytest.mark.parametrize("backend", FLOAT32)
def test_the_images_are_not_overwritten(backend: str) -> None:
    dynamic, batch = with_exits(at=["stem"]), images(8)
    split_at(dynamic, batch, [0.5])
    kept = batch.clone()
    compile_network(dynamic, backend)(batch)
    assert torch.equal(batch, kept)


def test_double_precision_runs_eagerly_and_is_refused_by_onnxruntime() -> None:
    dynamic, batch = with_exits(chain=True).double(), images(9).double()
    split_at(dynamic, batch, [0.4, 0.5])
    wanted = dense(dynamic, batch)
    found = compile_network(dynamic, "eager").run(batch)
    assert torch.equal(found.exits, wanted.exits_N)
    assert close(found.logits, wanted.answers_NC)
    with pytest.raises(DynamizeError, match="this one is in float64: give it network.float.., or use --backend eager"):
        compile_network(dynamic, "onnxruntime")


@pytest.mark.parametrize("backend", FLOAT32)
@pytest.mark.parametrize("kind", ON_IMAGES)
@pytest.mark.fast(
    "relu-eager",
    "exit after relu-onnxruntime",
    "unit-eager",
    "unit crop-onnxruntime",
    "exit unit-eager",
    "exit unit crop-onnxruntime",
)
def test_the_images_are_never_written_to(backend: str, kind: str) -> None:
    network, batch = on_images(kind), images(16)
    compiled = compile_network(network, backend)
    for given in (batch, batch.contiguous(memory_format=torch.channels_last), batch.repeat(2, 1, 1, 1)[8:24]):
        kept = given.clone()
        for setting in settings_of(network, given):
            with torch.no_grad():
                wanted = network.run(given.clone(), setting)
            for compiled.cache in (1, 2**16, 2**30):
                found = compiled.run(given, setting)
                assert torch.equal(given, kept)
                assert torch.equal(found.exits, wanted.exits)
                assert close(found.logits, wanted.logits, 2e-5)


def test_switching_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points at which some exits are off run other sessions, which are there before they are asked for."""
    dynamic = with_exits()
    settings = [{"exit.1": None, "exit.2": 0.5}, {"exit.1": 0.5, "exit.2": None}, {"exit.1": None, "exit.2": None}]
    points = [
        SimpleNamespace(name=str(i), thresholds=one, offset=0.0, combine="last") for i, one in enumerate(settings)
    ]
    dynamic.operating_points = points
    compiled = compile_network(dynamic, "onnxruntime")
    loaded: list[Any] = []
    monkeypatch.setattr(OnnxRuntime, "load", lambda self, *given: loaded.append(given))
    for point in points:
        compiled.set_operating_point(point)
        found = compiled.run(images(5))
        assert close(found.logits, dynamic.run(images(5)).logits.detach())
        assert torch.equal(found.exits, dynamic.run(images(5)).exits)
    assert not loaded


def test_the_backend_is_the_fastest_where_none_is_named() -> None:
    network = wrap(small_resnet(), SmallResNet.shape)
    assert compile_network(network).engine.name == default_backend(torch.device("cpu"))
