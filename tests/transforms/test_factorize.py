"""`factorize`: which layers become products, that the rest stays, and the same network back from its artifact."""

from pathlib import Path
from typing import Any

import pytest
import torch
from digits import digit_splits
from networks import SmallResNet, ThreeLayer, close, small_resnet
from pruned_networks import SqueezeNet, made
from pydantic import ValidationError
from torch import nn

from dynamize import artifact
from dynamize.compression.comparison import whole_macs
from dynamize.compression.factors import Ranks
from dynamize.conversion import apply, convert, replay, wrap
from dynamize.errors import DynamizeError, InfeasibleError
from dynamize.measure.costs import exit_costs
from dynamize.nn.network import DynamicNetwork
from dynamize.runtime.compiled import compile_network
from dynamize.sources import SourceSpec, load_source
from dynamize.training.objectives import exit_logits
from dynamize.transform import Context
from dynamize.transforms import ChannelGates, Exits, Factorize, SkipGates, factorize


def untimed(network: nn.Module, shape: tuple[int, ...], *before: Any, **fields: Any) -> DynamicNetwork:
    step = Factorize.model_validate({"timed": False, "round_to": 2} | fields)
    return convert(network, [*before, step], shape).eval()


def low_rank(module: nn.Module, name: str, ranks: Ranks) -> None:
    """Give a convolution this Tucker rank."""
    weight = module.get_parameter(f"{name}.weight")
    core = torch.randn(*ranks, *weight.shape[2:])
    with torch.no_grad():
        left, right = torch.randn(len(weight), ranks[0]), torch.randn(weight.shape[1], ranks[1])
        weight.copy_(torch.einsum("or,rshw,is->oihw", left, core, right))


def test_by_hand() -> None:
    module = made(ThreeLayer)
    low_rank(module, "conv2", (2, 2))
    network = untimed(module, ThreeLayer.shape, layers=["conv2"], energy=0.999)
    assert [type(one) for one in network.plain.conv2] == [nn.Conv2d] * 3
    # conv2 was 4*4 * 8 * 4 * 9 = 4608; now 8*8 * 4 * 2, 4*4 * 2 * 2 * 9 and 4*4 * 2 * 8
    assert whole_macs(network) == 11560 - 4608 + 512 + 576 + 256
    assert sum(node.meta["macs"] for node in network.plain.graph.nodes) == whole_macs(network)
    images = torch.randn(3, *ThreeLayer.shape)
    assert close(network(images), module(images), 1e-4)
    assert network.history[-1]["layers"] == {"conv2": [2, 2]}


def test_layers_that_would_cost_more_stay() -> None:
    module = made(ThreeLayer)
    low_rank(module, "conv2", (2, 2))
    network = untimed(module, ThreeLayer.shape, energy=0.999, round_to=1)
    assert list(network.history[-1]["layers"]) == ["conv2"]
    assert type(network.plain.conv1) is nn.Conv2d
    with pytest.raises(DynamizeError, match="no layer gains by it"):
        untimed(made(ThreeLayer), ThreeLayer.shape, energy=0.999)


def test_macs_ratio_is_met_and_hardly_more() -> None:
    network = untimed(small_resnet(), SmallResNet.shape, macs_ratio=0.6, round_to=1)
    share = whole_macs(network) / whole_macs(wrap(small_resnet(), SmallResNet.shape))
    assert 0.5 < share <= 0.6
    with pytest.raises(InfeasibleError, match="macs_ratio 0.01 cannot be reached"):
        untimed(small_resnet(), SmallResNet.shape, macs_ratio=0.01)


def test_the_clock_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock on which no layer with fewer than 16 outputs gains."""
    asked: list[tuple[int, ...]] = []

    def clock(layer: nn.Module, other: nn.Module, shape: tuple[int, ...], backend: str, device: torch.device) -> float:
        asked.append(tuple(shape))
        assert isinstance(other, nn.Sequential)
        return 0.5 if len(layer.get_parameter("weight")) >= 16 else 1.2

    monkeypatch.setattr(factorize, "layer_ratio", clock)
    step = Factorize(energy=0.3, round_to=1)
    network, notes = apply(wrap(small_resnet(), SmallResNet.shape), step, Context(backend="eager"))
    layers = network.history[-1]["layers"]
    assert layers
    assert all(name.startswith(("layer2", "layer3")) for name in layers)
    told = next(note for note in notes if "not faster on eager" in note)
    assert "layer1.0.body.0.0 (1.20 of its time)" in told
    assert (1, 3, 16, 16) in asked


@pytest.mark.parametrize("ratio", [0.8, 1.0])
def test_what_nobody_asked_for_is_taken_back_where_it_saves_no_time(
    monkeypatch: pytest.MonkeyPatch, ratio: float
) -> None:
    class Clock:
        def __init__(self, *_: object) -> None:
            pass

        def ratio(self, changed: DynamicNetwork) -> float:
            return ratio

    monkeypatch.setattr(factorize, "layer_ratio", lambda *_: 0.5)
    monkeypatch.setattr(factorize, "Stopwatch", Clock)
    module = made(ThreeLayer)
    low_rank(module, "conv2", (2, 2))
    step = Factorize(round_to=2)
    network, notes = apply(wrap(module, ThreeLayer.shape), step, Context(backend="eager"))
    layers = network.history[-1]["layers"]
    assert bool(layers) == (ratio < 1)
    assert notes[0].startswith("taken back: 1 layers as products save ") == (ratio == 1)
    again = replay(made(ThreeLayer), network.history, ThreeLayer.shape)
    assert again.state_dict().keys() == network.state_dict().keys()
    asked, _ = apply(wrap(module, ThreeLayer.shape), step.model_copy(update={"energy": 0.9}), Context(backend="eager"))
    assert asked.history[-1]["layers"]


def test_what_it_costs_is_said() -> None:
    splits = digit_splits(160)
    network = wrap(
        load_source(SourceSpec(source="dynamize:digits_resnet", kwargs={"pretrained": True}), False).eval(), (1, 8, 8)
    )
    _, notes = apply(network, Factorize(energy=0.5, timed=False, round_to=1), Context(data=splits))
    assert any(note.startswith("calibration accuracy ") and "points lost by this step" in note for note in notes)


def test_latency_ratio_follows_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = whole_macs(wrap(small_resnet(), SmallResNet.shape))

    class Clock:
        def __init__(self, *_: object) -> None:
            pass

        def ratio(self, changed: DynamicNetwork) -> float:
            return 0.2 + 0.8 * whole_macs(changed) / whole

    monkeypatch.setattr(factorize, "Stopwatch", Clock)
    step = Factorize(latency_ratio=0.7, timed=False, round_to=1)
    network, notes = apply(wrap(small_resnet(), SmallResNet.shape), step, Context())
    assert 0.5 < whole_macs(network) / whole <= 0.5 / 0.8
    assert "at batch 1 it takes" in notes[1]


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
@pytest.mark.fast("onnxruntime")
def test_backends_compute_products(backend: str) -> None:
    network = untimed(small_resnet(), SmallResNet.shape, energy=0.3)
    images = torch.randn(2, *SmallResNet.shape)
    with torch.no_grad():
        assert close(compile_network(network, backend)(images), network(images), 1e-4)


STEPS = {
    "alone": [],
    "exits": [Exits(at=["layer1", "layer2"], share=1.0, size=[16, 16], chain=True)],
    "skip gates": [SkipGates(group=1, keep_first=False)],
    "exits and gates": [Exits(at=["layer1"], share=1.0, size=[16]), SkipGates(group=1, gate="recurrent")],
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.fast("exits and gates")
def test_composes_and_comes_back(name: str, tmp_path: Path) -> None:
    network = untimed(small_resnet(), SmallResNet.shape, *STEPS[name], energy=0.5)
    for target, ranks in network.history[-1]["layers"].items():
        assert len(network.plain.get_submodule(target)) == len(ranks) + 1 or len(ranks) == 2
    costs = exit_costs(network)
    answers = sum(piece.macs for piece in network.row if piece.answers)
    assert costs.cumulative()[-1] - answers == sum(node.meta["macs"] for node in network.plain.graph.nodes) + sum(
        unit.macs for unit in network.changing
    )
    artifact.save(network, tmp_path)
    loaded = artifact.load(tmp_path, network=SmallResNet())
    images = torch.randn(5, *SmallResNet.shape)
    for ours, theirs in zip(loaded.all_exits(images), network.all_exits(images), strict=True):
        assert torch.equal(ours, theirs)
    assert exit_costs(loaded) == costs
    assert [unit.path_macs for unit in loaded.changing] == [unit.path_macs for unit in network.changing]
    exit_logits(network.train()(images))[-1].sum().backward()
    held = {id(parameter) for parameter in network.parameters()}
    assert all(id(parameter) in held for parameter in network.plain.parameters())


def test_gates_after_factors() -> None:
    network = untimed(small_resnet(), SmallResNet.shape, energy=0.5)
    gated = convert(network, [SkipGates(group=1)], SmallResNet.shape).eval()
    images = torch.randn(3, *SmallResNet.shape)
    assert gated.changing
    assert torch.equal(gated(images), network(images))


def test_pointwise_and_linear_layers() -> None:
    network = untimed(made(SqueezeNet), SqueezeNet.shape, energy=0.2, round_to=1)
    assert len(network.history[-1]["layers"]["project"]) == 1
    assert "depth" not in network.history[-1]["layers"]


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        (["conv9"], r"'conv9' is no linear layer.*Did you mean conv.*Known: conv1, conv2, linear"),
        ({"conv2": [9, 4]}, r"cannot have the ranks \[9, 4\]: give at most \[8, 4\], of its outputs and its inputs"),
        ({"conv2": [2]}, r"give at most \[8, 4\]"),
        ({"linear": [6]}, r"give at most \[5\]$"),
    ],
)
def test_layers_that_cannot_be(layers: Any, told: str) -> None:
    with pytest.raises(DynamizeError, match=told):
        untimed(made(ThreeLayer), ThreeLayer.shape, layers=layers)


@pytest.mark.parametrize("fields", [{"energy": 0.5, "macs_ratio": 0.5}, {"energy": 1.5}, {"layers": []}, {"rank": 3}])
def test_fields_that_cannot_be(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Factorize.model_validate(fields)


def test_channel_gates_come_after() -> None:
    gated = convert(small_resnet(), [ChannelGates(multiple=2)], SmallResNet.shape)
    with pytest.raises(DynamizeError, match="put `factorize` before `channel_gates`"):
        Factorize().apply(gated, Context())
