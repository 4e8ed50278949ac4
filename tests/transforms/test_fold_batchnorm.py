"""`fold_batchnorm`: no batch norm is left where one can be folded, and every answer and route stays."""

import copy
from pathlib import Path

import pytest
import torch
from gated_networks import gated_resnet, split_exits
from networks import (
    SmallResNet,
    ThreeLayer,
    close,
    set_thresholds,
    small_resnet,
    thresholds,
    torchvision_network,
    with_exits,
)
from torch import Tensor, nn

from dynamize import artifact
from dynamize.conversion import apply, convert, replay, wrap
from dynamize.errors import DynamizeError
from dynamize.graph.fold import Affine
from dynamize.nn.network import record_routing
from dynamize.transform import Context
from dynamize.transforms import ChannelGates, Exits, FoldBatchnorm, fold_batchnorm


def norms(module: nn.Module) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())


def images(count: int = 16) -> Tensor:
    return torch.randn(count, *SmallResNet.shape, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
@pytest.mark.fast("mobilenet_v3_small")
def test_torchvision_networks(name: str) -> None:
    network = torchvision_network(name)
    folded = convert(network, [FoldBatchnorm()], (3, 64, 64))
    assert norms(folded) == 0
    batch = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        assert close(folded(batch), network(batch))
    assert norms(network) > 0


@pytest.mark.parametrize("head", ["conv", "tail"])
def test_exits_and_their_heads(head: str) -> None:
    network = with_exits(head=head, size=[8, 8] if head == "conv" else [0, 0])
    wanted = [one.detach() for one in network.all_exits(images())]
    folded, notes = apply(copy.deepcopy(network), FoldBatchnorm(), Context())
    assert norms(folded) == 0
    assert notes == [f"{norms(network)} batch norms are part of the layers before them"]
    assert folded.exit_places == network.exit_places
    with torch.no_grad():
        assert all(close(*pair) for pair in zip(folded.all_exits(images()), wanted, strict=True))


def test_gates_and_routes() -> None:
    network = gated_resnet({}, keep_first=False)
    split_exits(network, images())
    folded, _ = apply(copy.deepcopy(network), FoldBatchnorm(), Context())
    set_thresholds(folded, thresholds(network))
    answers = []
    for one in (folded, network):
        with torch.no_grad(), record_routing(one) as routing:
            answers.append((one(images()), routing.exits, routing.choices))
    assert close(answers[0][0], answers[1][0])
    assert torch.equal(answers[0][1], answers[1][1])
    assert torch.equal(answers[0][2], answers[1][2])
    assert {type(m) for m in folded.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)} == {nn.BatchNorm1d}


def test_channel_gates_keep_their_norms() -> None:
    network = convert(small_resnet(), [ChannelGates(multiple=4)], SmallResNet.shape)
    wanted = network(images()).detach()
    folded, notes = apply(network, FoldBatchnorm(), Context())
    assert notes[1] == "blocks with channel gates keep theirs: each width needs its own"
    assert any(norms(unit.body) for unit in folded.changing)
    assert norms(folded.row[0]) == 0
    with torch.no_grad():
        assert close(folded(images()), wanted)


@pytest.mark.slow
def test_networks_of_timm_keep_their_activations() -> None:
    timm = pytest.importorskip("timm", reason="needs timm: BatchNormAct2d is its norm with activation")
    network = timm.create_model("efficientnet_lite0", num_classes=5).eval()
    folded, batch = convert(network, [FoldBatchnorm()], (3, 32, 32)), torch.randn(2, 3, 32, 32)
    assert norms(folded) == 0
    with torch.no_grad():
        assert close(folded(batch), network(batch))


def test_comes_back(tmp_path: Path) -> None:
    steps = [Exits(at=["layer1"], share=1.0, size=[8]), FoldBatchnorm()]
    network = convert(small_resnet(), steps, SmallResNet.shape)
    again = replay(small_resnet(seed=1), network.history, SmallResNet.shape)
    again.load_state_dict(network.state_dict())
    artifact.save(network, tmp_path)
    for one in (again, artifact.load(tmp_path, network=SmallResNet())):
        assert all(
            torch.equal(*pair) for pair in zip(one.all_exits(images()), network.all_exits(images()), strict=True)
        )


def test_frozen_layers_stay_frozen_and_modes_stay() -> None:
    network = small_resnet()
    network.stem.requires_grad_(False)
    folded = convert(network, [FoldBatchnorm()], SmallResNet.shape)
    frozen = {name for name, parameter in folded.named_parameters() if not parameter.requires_grad}
    assert frozen == {"nets.main.stem.0.weight", "nets.main.stem.0.bias"}
    assert not any(module.training for module in folded.modules())


def test_without_batch_norms() -> None:
    with pytest.raises(DynamizeError, match="no convolution or linear layer whose output only a batch norm"):
        convert(ThreeLayer(), [FoldBatchnorm()], ThreeLayer.shape)


def test_wrong_algebra_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fold_batchnorm.affine

    def wrong(norm: nn.Module) -> Affine | None:
        found = right(norm)
        return found and Affine(found.scale * (1 + 1e-4), found.shift, found.rest)

    monkeypatch.setattr(fold_batchnorm, "affine", wrong)
    with pytest.raises(DynamizeError, match=r"`stem.0` cannot be replaced: the new layer differs"):
        convert(small_resnet(), [FoldBatchnorm()], SmallResNet.shape)


def test_a_change_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers are right by themselves, but one more was put in."""
    right = fold_batchnorm.replace_layers

    def wrong(network: nn.Module, new: dict) -> None:
        right(network, new)
        with torch.no_grad():
            network.plain.linear.weight.mul_(1 + 1e-4)

    monkeypatch.setattr(fold_batchnorm, "replace_layers", wrong)
    with pytest.raises(DynamizeError, match=r"fold_batchnorm: exit 1 of 1 answers \d\.\de-05 of the spread"):
        convert(small_resnet(), [FoldBatchnorm()], SmallResNet.shape)


def test_right_folds_are_taken_whatever_the_answers_look_like() -> None:
    """Biases that the norms take away again: float32 alone would call these folds wrong."""
    network = small_resnet()
    with torch.no_grad():
        for block in (*network.layer1, *network.layer2, *network.layer3):
            block.body[1].bias += 3000
            block.body[2].running_mean += 3000
    folded, notes = apply(wrap(network, SmallResNet.shape), FoldBatchnorm(), Context())
    assert norms(folded) == 0
    assert any("of their spread, as sums round otherwise" in note for note in notes)
