"""`prune`: targets met, the right channels gone, recovery in rounds, and the same network back from its artifact."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import digit_network, digit_splits
from networks import SmallResNet, ThreeLayer, close, randomise_norms, small_resnet, torchvision_network
from pruned_networks import SqueezeNet, made
from pydantic import ValidationError
from random_networks import random_network
from torch import Tensor, nn

from dynamize import artifact
from dynamize.compression.comparison import whole_macs
from dynamize.compression.layers import sizes
from dynamize.conversion import apply, convert, replay, wrap
from dynamize.errors import DynamizeError, InfeasibleError
from dynamize.measure.accuracy import exit_accuracies
from dynamize.measure.costs import exit_costs
from dynamize.models import create
from dynamize.nn.network import DynamicNetwork
from dynamize.sources import SourceSpec, load_source
from dynamize.training.objectives import exit_logits
from dynamize.training.statistics import Estimated
from dynamize.transform import Context, check_order
from dynamize.transforms import ChannelGates, Exits, Prune, SkipGates, prune

CPU = torch.device("cpu")


def pruned(network: nn.Module, shape: tuple[int, ...], *before: Any, **fields: Any) -> DynamicNetwork:
    return convert(network, [*before, Prune.model_validate({"round_to": 2} | fields)], shape).eval()


def test_ratio_by_hand() -> None:
    module = made(ThreeLayer)
    with torch.no_grad():  # of conv1 the channels 1 and 2 are large, of conv2 the first four
        module.conv1.weight.mul_(torch.tensor([0.1, 9, 9, 0.1])[:, None, None, None])
        module.conv2.weight.mul_(torch.tensor([9.0] * 4 + [0.01] * 4)[:, None, None, None])
        module.linear.weight.mul_(torch.tensor([9.0] * 4 + [0.01] * 4))
    network = pruned(module, ThreeLayer.shape, ratio=0.5)
    assert sizes(network) == {"conv1": [2, 3], "conv2": [4, 2], "linear": [5, 4]}
    assert torch.equal(network.plain.conv1.weight, module.conv1.weight[[1, 2]])
    assert torch.equal(network.plain.conv2.weight, module.conv2.weight[:4][:, [1, 2]])
    # 8*8 * 2 * 27, 4*4 * 4 * 2 * 9, 4 * 5
    assert whole_macs(network) == 3456 + 1152 + 20
    step = network.history[-1]
    assert step["widths"] == {"conv1": [2, 3], "conv2": [4, 2], "linear": [5, 4]}
    assert step["ratio"] == 0.5


def test_macs_ratio_is_met_and_hardly_more() -> None:
    network = pruned(small_resnet(), SmallResNet.shape, macs_ratio=0.5, round_to=1)
    share = whole_macs(network) / whole_macs(wrap(small_resnet(), SmallResNet.shape))
    assert 0.4 < share <= 0.5
    halved = pruned(small_resnet(), SmallResNet.shape, round_to=1)  # what is taken if nothing is said
    assert sizes(halved) == sizes(network)


@pytest.mark.parametrize("target", [0.6, 0.8])
@pytest.mark.slow
def test_no_more_groups_of_one_width_are_narrowed_than_it_takes(target: float) -> None:
    """All blocks of a stage would go from 16 to 8 channels together, and the MACs to half of what is asked."""
    torch.manual_seed(0)
    source = randomise_norms(create("cifar_resnet20")).eval()
    network = pruned(source, (3, 32, 32), macs_ratio=target, round_to=8)
    share = whole_macs(network) / whole_macs(wrap(source, (3, 32, 32)))
    assert target - 0.05 < share <= target


def test_impossible_macs_name_the_least() -> None:
    with pytest.raises(InfeasibleError, match="macs_ratio 0.01 cannot be reached") as refused:
        pruned(small_resnet(), SmallResNet.shape, macs_ratio=0.01, round_to=4)
    assert 0.01 < refused.value.nearest < 0.3


def test_latency_ratio_follows_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that counts conv2's output channels only."""

    class Clock:
        def __init__(self, network: DynamicNetwork, backend: str, device: torch.device) -> None:
            assert backend == "eager"

        def ratio(self, changed: DynamicNetwork) -> float:
            return float(changed.plain.conv2.out_channels) / 8

    monkeypatch.setattr(prune, "Stopwatch", Clock)
    step = Prune(latency_ratio=0.7, round_to=1)
    network, notes = apply(wrap(made(ThreeLayer), ThreeLayer.shape), step, Context(backend="eager"))
    assert network.plain.conv2.out_channels == 5
    assert "on eager at batch 1 it takes 0.62 of the time before" in notes


@pytest.mark.parametrize(("backend", "multiple"), [("eager", 8), ("onnxruntime", 16)])
def test_widths_are_what_the_backend_likes(backend: str, multiple: int) -> None:
    torch.manual_seed(0)
    network = wrap(randomise_norms(create("cifar_resnet20")).eval(), (3, 32, 32))
    network, _ = apply(network, Prune(ratio=0.5), Context(backend=backend))
    found = [module.out_channels for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert set(found) == ({8, 16, 32} if multiple == 8 else {16, 32})
    assert network.history[-1]["round_to"] == multiple


@pytest.mark.parametrize("target", [{"macs_ratio": 0.6}, {"ratio": 0.5}])
@pytest.mark.fast("target1")
def test_a_narrow_network_gets_smaller_multiples_and_says_so(target: dict[str, float]) -> None:
    network = wrap(small_resnet(), SmallResNet.shape)
    macs = whole_macs(network)
    network, notes = apply(network, Prune.model_validate(target), Context(backend="onnxruntime"))
    assert whole_macs(network) <= 0.6 * macs
    multiple = network.history[-1]["round_to"]
    assert multiple < 16
    assert any(note.startswith(f"widths are multiples of {multiple}: in steps of 16") for note in notes)
    with pytest.raises(InfeasibleError, match="cannot be reached"):
        pruned(small_resnet(), SmallResNet.shape, macs_ratio=0.0001, round_to="auto")


@pytest.mark.parametrize("seed", [25, 29])  # norms called as functions, standardised weights
@pytest.mark.fast("29")
def test_channels_behind_computed_weights_go(seed: int) -> None:
    drawn = random_network(seed)
    network = wrap(drawn.network, drawn.input_shape)
    macs = whole_macs(network)
    network, notes = apply(network, Prune(macs_ratio=0.7), Context())
    assert whole_macs(network) <= 0.7 * macs
    assert any("layers hold their tensors themselves now" in note for note in notes)
    fresh = replay(random_network(seed).network, network.history, drawn.input_shape).eval()
    fresh.load_state_dict(network.state_dict())
    images = torch.randn(2, *drawn.input_shape)
    assert torch.equal(fresh(images), network.eval()(images))


def test_option_a_shortcuts_stay_right() -> None:
    """A channel that both stages keep is still handed on, and the others are still zero."""
    torch.manual_seed(0)
    source = randomise_norms(create("digits_resnet")).eval()
    network = pruned(source, (1, 8, 8), ratio=0.5)
    copies = network.plain.get_submodule("layer2.0.shortcut").copies
    assert copies.shape == (12, 8, 1, 1)
    assert set(copies.unique().tolist()) == {0, 1}
    assert copies.sum(0).max() <= 1
    assert 0 < copies.sum() <= 8
    assert whole_macs(network) < 0.3 * whole_macs(wrap(source, (1, 8, 8)))


STEPS = {
    "exits": [Exits(at=["layer1", "layer2"], share=1.0, size=[16, 16])],
    "chained exits": [Exits(at=["layer1", "layer2"], share=1.0, size=[16, 16], chain=True)],
    "tails": [Exits(at=["layer1", "layer2"], head="tail", share=1.0)],
    "skip gates": [SkipGates(group=1, keep_first=False)],
    "recurrent gates": [Exits(at=["layer1"], share=1.0, size=[16]), SkipGates(group=1, gate="recurrent")],
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.fast("chained exits", "recurrent gates")
def test_composes_and_comes_back(name: str, tmp_path: Path) -> None:
    network = pruned(small_resnet(), SmallResNet.shape, *STEPS[name], ratio=0.5)
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
    assert [unit.macs for unit in loaded.changing] == [unit.macs for unit in network.changing]
    exit_logits(network.train()(images))[0].sum().backward()


@pytest.mark.slow
def test_gates_after_pruning() -> None:
    network = convert(
        small_resnet(), [Prune(ratio=0.5, round_to=4), SkipGates(group=1), Exits(at=["layer2"], share=1.0)], (3, 16, 16)
    )
    fresh = replay(SmallResNet(), network.history, SmallResNet.shape)
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {k: v.shape for k, v in network.state_dict().items()}
    narrow = convert(small_resnet(), [Prune(ratio=0.3, round_to=4), ChannelGates(multiple=2)], (3, 16, 16))
    assert narrow.changing


@pytest.mark.slow
def test_fresh_process_without_torch_pruning(tmp_path: Path) -> None:
    source = randomise_norms(create("digits_resnet")).eval()
    network = pruned(source, (1, 8, 8), Exits(at=["layer1"], share=1.0), ratio=0.5)
    artifact.save(network, tmp_path, source=SourceSpec(source="dynamize:digits_resnet"))
    images = torch.randn(4, 1, 8, 8)
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys, torch\n"
        "sys.modules['torch_pruning'] = None\n"
        "import dynamize as dz\n"
        "torch.set_num_threads(1)\n"
        "network = dz.load('.')\n"
        "with torch.no_grad():\n"
        "    logits = network.all_exits(torch.load('images.pt'))\n"
        "torch.save((logits, [piece.macs for piece in network.row]), 'found.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    logits, macs = torch.load(tmp_path / "found.pt")
    with torch.no_grad():
        assert all(torch.equal(*pair) for pair in zip(logits, network.all_exits(images), strict=True))
    assert macs == [piece.macs for piece in network.row]


def test_depthwise_and_squeeze() -> None:
    network = pruned(made(SqueezeNet), SqueezeNet.shape, ratio=0.5)
    depth = network.plain.depth
    assert (depth.in_channels, depth.out_channels, depth.groups, len(depth.weight)) == (12, 12, 12, 12)
    assert sizes(network)["squeeze"] == [4, 12]  # of 6, half is 3, which is rounded up to 4
    assert network(torch.randn(2, *SqueezeNet.shape)).shape == (2, 5)


def test_recovery_in_rounds_keeps_metrics_and_goes_on(tmp_path: Path) -> None:
    splits = digit_splits(160)
    step = Prune(ratio=0.5, round_to=2, steps=2, recovery_epochs=1, criterion="taylor", sensitivity=True,
                 sensitivity_images=64, statistics_images=64)  # fmt: skip
    context = Context(data=splits, teacher=digit_network().plain, work=tmp_path)
    network, notes = apply(digit_network(), step, context)
    assert [note[:8] for note in notes if note.startswith("round")] == ["round 1:", "round 2:"]
    assert any("points of accuracy that single layers lose" in note for note in notes)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 1]
    again, _ = apply(digit_network(), step, replace(context, teacher=digit_network().plain, resume=True))
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in network.state_dict().items())


def trained_digits() -> DynamicNetwork:
    """The bundled network."""
    return wrap(
        load_source(SourceSpec(source="dynamize:digits_resnet", kwargs={"pretrained": True}), False).eval(), (1, 8, 8)
    )


def running_mean(network: DynamicNetwork) -> Tensor:
    return next(module.running_mean for module in network.modules() if isinstance(module, nn.BatchNorm2d))


def test_batch_norms_are_estimated_again() -> None:
    splits, found = digit_splits(160), []
    for images in (0, 64):
        step = Prune(ratio=0.5, round_to=2, statistics_images=images)
        network, _ = apply(trained_digits(), step, Context(data=splits))
        found.append(running_mean(network))
    assert not close(found[0], found[1], 1e-2)


def test_batch_norms_stay_where_new_ones_cost_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(network: DynamicNetwork, *_: Any, **__: Any) -> Estimated:
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.fill_(100)
        return Estimated(64, 0)

    monkeypatch.setattr(prune, "estimate_statistics", spoil)
    splits = digit_splits(160)
    network, notes = apply(trained_digits(), Prune(ratio=0.1, round_to=2), Context(data=splits))
    assert float(running_mean(network).abs().max()) < 100
    assert any(note.startswith("batch norms keep their statistics: anew from 64 train images") for note in notes)


def test_what_it_costs_is_said() -> None:
    splits = digit_splits(160)
    network, notes = apply(trained_digits(), Prune(ratio=0.5, round_to=2), Context(data=splits))
    before, after = (exit_accuracies(one, splits.calibration, CPU)[0] for one in (trained_digits(), network))
    assert before - after > 0.01
    (told,) = [note for note in notes if note.startswith("calibration accuracy")]
    assert f"{before:.2%} -> {after:.2%}, {100 * (before - after):.2f} points lost by this step" in told
    assert any("nothing was trained since" in note for note in notes)


def test_a_ratio_that_is_not_reached_is_said() -> None:
    network = wrap(small_resnet(), SmallResNet.shape)
    _, notes = apply(network, Prune(ratio=0.99, round_to=4, keep=["layer3"]), Context())
    assert any(note.startswith("ratio: 0.99 was not reached") for note in notes)


@pytest.mark.parametrize(
    "fields",
    [{"ratio": 0.5, "macs_ratio": 0.5}, {"ratio": 1.0}, {"ratio": 0}, {"steps": 2}, {"criterion": "random"}, {"at": 1}],
)
def test_fields_that_cannot_be(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Prune.model_validate(fields)


def test_refusals() -> None:
    gated = convert(small_resnet(), [ChannelGates(multiple=2)], SmallResNet.shape)
    with pytest.raises(DynamizeError, match="put `prune` before `channel_gates`"):
        Prune().apply(gated, Context())
    with pytest.raises(DynamizeError, match="move `prune` above `channel_gates`"):
        check_order([ChannelGates(), Prune()])
    skipping = convert(small_resnet(), [SkipGates(group=1)], SmallResNet.shape)
    with pytest.raises(DynamizeError, match="put `prune` before `skip_gates`"):
        Prune(recovery_epochs=1).apply(skipping, Context())
    with pytest.raises(DynamizeError, match="more than 64 channels. Use a smaller round_to"):
        pruned(small_resnet(), SmallResNet.shape, round_to=64)
    with pytest.raises(DynamizeError, match="`prune` needs images"):
        pruned(small_resnet(), SmallResNet.shape, criterion="taylor")


def test_what_is_not_followed_is_refused_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune, "faithful", lambda *_: False)
    with pytest.raises(DynamizeError, match="Name the layers to leave whole in keep"):
        pruned(small_resnet(), SmallResNet.shape, ratio=0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["resnet18", "mobilenet_v3_small", "efficientnet_b0", "densenet121", "googlenet", "regnet_y_400mf", "vgg11_bn"],
)
def test_torchvision_networks(name: str) -> None:
    """Half of the channels gone from real networks, and the same shapes again from the history."""
    network = wrap(torchvision_network(name), (3, 64, 64))
    macs = whole_macs(network)
    network, notes = apply(network, Prune(ratio=0.5, round_to=8), Context())
    assert not any("left whole" in note for note in notes)
    assert whole_macs(network) < 0.6 * macs
    fresh = replay(torchvision_network(name), network.history, (3, 64, 64)).eval()
    fresh.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(fresh(images), network.eval()(images))
