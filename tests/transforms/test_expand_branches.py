"""`expand_branches`: nothing changes until training, which layers get branches, what comes back, what is refused."""

import copy
from typing import get_args

import pytest
import torch
from gated_networks import gated_resnet
from networks import SmallResNet, small_resnet, torchvision_network, with_exits
from torch import Tensor, nn

from dynamize.conversion import apply, convert, replay, wrap
from dynamize.errors import DynamizeError
from dynamize.graph.macs import count_macs
from dynamize.nn.branches import BranchBlock, Form
from dynamize.nn.network import DynamicNetwork
from dynamize.transform import Context, check_order
from dynamize.transforms import ChannelGates, Distill, ExpandBranches, FuseBranches

FORMS = get_args(Form)


def images(count: int = 4) -> Tensor:
    return torch.randn(count, *SmallResNet.shape, generator=torch.Generator().manual_seed(count))


def blocks(network: nn.Module) -> dict[str, BranchBlock]:
    return {name: module for name, module in network.named_modules() if isinstance(module, BranchBlock)}


def assert_same_in_both_modes(found: nn.Module, wanted: nn.Module, batch: Tensor) -> None:
    found, wanted = copy.deepcopy(found), copy.deepcopy(wanted)
    with torch.no_grad():
        for training in (False, True, False):
            answers = []
            for one in (found, wanted):
                torch.manual_seed(0)  # dropout
                answers.append(one.train(training)(batch))
            assert torch.equal(*answers)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.fast("acnet", "dbb")
def test_the_small_resnet_answers_and_trains_as_before(form: Form) -> None:
    network = small_resnet()
    expanded = convert(network, [ExpandBranches(form=form)], SmallResNet.shape)
    assert len(blocks(expanded)) == 13
    assert sum(isinstance(block.norm, nn.BatchNorm2d) for block in blocks(expanded).values()) == 13
    assert_same_in_both_modes(expanded, network, images())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.fast("repvgg")
def test_torchvision_networks_answer_and_train_as_before(form: Form) -> None:
    network = torchvision_network("mobilenet_v3_small")
    expanded = convert(network, [ExpandBranches(form=form)], (3, 64, 64))
    assert len(blocks(expanded)) == 12
    assert_same_in_both_modes(expanded, network, torch.randn(3, 3, 64, 64))


def test_networks_of_timm_whose_norm_has_an_activation() -> None:
    """The branches are then added before the norm."""
    timm = pytest.importorskip("timm", reason="needs timm: BatchNormAct2d is its norm with activation")
    network = timm.create_model("efficientnet_lite0", num_classes=5).eval()
    expanded = convert(network, [ExpandBranches(form="acnet")], (3, 32, 32))
    assert {type(block.norm) for block in blocks(expanded).values()} == {nn.Identity}
    assert_same_in_both_modes(expanded, network, torch.randn(2, 3, 32, 32))


def test_named_layers_only() -> None:
    expanded = convert(small_resnet(), [ExpandBranches(layers=["stem.0", "layer2.0.body.1"])], SmallResNet.shape)
    assert list(blocks(expanded)) == ["nets.main.stem.0", "nets.main.layer2.0.body.1"]
    assert expanded.history[0]["layers"] == ["stem.0", "layer2.0.body.1"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stem.1", "'stem.1' is no square convolution of odd size above 1 that is called once"),
        ("layer2.0.shortcut", "'layer2.0.shortcut' is no square convolution"),
        ("stem.O", r"'stem.O' is no layer of this network. Did you mean stem\.0"),
    ],
)
def test_layers_that_cannot_have_branches(name: str, message: str) -> None:
    with pytest.raises(DynamizeError, match=message):
        convert(small_resnet(), [ExpandBranches(layers=[name])], SmallResNet.shape)


def test_refusals() -> None:
    with pytest.raises(DynamizeError, match="a layer is named twice"):
        convert(small_resnet(), [ExpandBranches(layers=["stem.0", "stem.0"])], SmallResNet.shape)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2))
    with pytest.raises(DynamizeError, match="no square convolution of odd size above 1"):
        convert(network, [ExpandBranches()], (3, 8, 8))


def test_order() -> None:
    check_order([ExpandBranches(), Distill(), FuseBranches()])
    with pytest.raises(DynamizeError, match="`expand_branches` comes after step 1 `fuse_branches`"):
        check_order([FuseBranches(), ExpandBranches()])


def test_macs_are_counted_anew() -> None:
    network = wrap(small_resnet(), SmallResNet.shape)
    expanded, notes = apply(network, ExpandBranches(form="acnet", layers=["layer3.1.body.1"]), Context())
    nodes = expanded.plain.graph.nodes
    assert sum(node.meta["macs"] for node in nodes) == count_macs(expanded, torch.zeros(1, *SmallResNet.shape))
    added = 2 * 3 * 24 * 24 * 4 * 4  # two kernels of three taps, 24 -> 24 channels on 4 x 4 pixels
    before = count_macs(small_resnet(), torch.zeros(1, *SmallResNet.shape))
    assert sum(node.meta["macs"] for node in nodes) == before + added
    assert "1 convolutions with acnet branches" in notes[0]


class TestConvertedNetworks:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.fast("dbb")
    def test_exits_stay_where_they_are(self, form: Form) -> None:
        network = with_exits()
        expanded, _ = apply(copy.deepcopy(network), ExpandBranches(form=form), Context())
        assert expanded.exit_places == network.exit_places
        with torch.no_grad():
            pairs = zip(expanded.all_exits(images()), network.all_exits(images()), strict=True)
            assert all(torch.equal(*pair) for pair in pairs)

    def test_gates_send_every_image_its_way(self) -> None:
        network = gated_resnet(keep_first=False)
        expanded, _ = apply(copy.deepcopy(network), ExpandBranches(), Context())
        with torch.no_grad():
            assert torch.equal(expanded(images(16)), network(images(16)))
        assert [unit.label for unit in expanded.changing] == [unit.label for unit in network.changing]
        for unit, old in zip(expanded.changing, network.changing, strict=True):
            assert unit.path_macs[-1] > 2 * old.path_macs[-1]
            assert unit.path_macs[0] == old.path_macs[0]
            assert float(unit.path_costs[-1]) == 1

    def test_channel_gates_keep_their_layers(self) -> None:
        gated = convert(small_resnet(), [ChannelGates(multiple=4, keep_first=False)], SmallResNet.shape)
        expanded = ExpandBranches().apply(gated, Context()).network
        assert 0 < len(blocks(expanded)) < 13
        with pytest.raises(DynamizeError, match="is in a block with channel gates"):
            ExpandBranches(layers=["layer3.1.body.0.0"]).apply(gated, Context())


def test_history_rebuilds_the_structure() -> None:
    network = convert(small_resnet(), [ExpandBranches(form="repvgg")], SmallResNet.shape)
    again = replay(small_resnet(seed=1), network.history, SmallResNet.shape)
    again.load_state_dict(network.state_dict())
    assert isinstance(again, DynamicNetwork)
    assert torch.equal(again(images()), network(images()))
