"""Which channels go together, and that a network without them answers like one that is handed zeros for them."""

import copy
import sys

import pytest
import torch
from networks import SmallResNet, ThreeLayer, close, randomise_norms, small_resnet
from pruned_networks import ConcatNet, NormedNet, SqueezeNet, made, masked_answers
from torch import nn

from dynamize.compression.comparison import whole_macs
from dynamize.compression.coupling import channel_groups
from dynamize.compression.layers import layers, resize, sizes
from dynamize.compression.removal import ChannelGroup, faithful, remove, silenced
from dynamize.conversion import convert, wrap
from dynamize.errors import DynamizeError
from dynamize.models import create
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting
from dynamize.rewrite.exchange import count_again
from dynamize.transforms import Exits, SkipGates


def with_exits() -> DynamicNetwork:
    step = Exits(at=["layer1", "layer2"], share=1.0, size=[16, 16], chain=True)
    network = convert(small_resnet(), [step], SmallResNet.shape).eval()
    for fusion in (network.leaving[1].head.fusion, network.row[-1].linear):
        nn.init.normal_(fusion.weight, 0, 0.1)
    return network


def with_gates(gate: str) -> DynamicNetwork:
    return convert(small_resnet(), [SkipGates(group=1, gate=gate)], SmallResNet.shape).eval()


def digits() -> DynamicNetwork:
    torch.manual_seed(0)
    return wrap(randomise_norms(create("digits_resnet")).eval(), (1, 8, 8))


NETWORKS = {
    "three": lambda: wrap(made(ThreeLayer), ThreeLayer.shape),
    "squeeze": lambda: wrap(made(SqueezeNet), SqueezeNet.shape),
    "concat": lambda: wrap(made(ConcatNet), ConcatNet.shape),
    "exits": with_exits,
    "linear gates": lambda: with_gates("linear"),
    "recurrent gates": lambda: with_gates("recurrent"),
    "conv gates": lambda: with_gates("conv"),
    "option A": digits,
}


def members(group: ChannelGroup, side: str) -> set[str]:
    return {member.layer for member in group.members if member.side == side}


def by_name(network: DynamicNetwork, keep: tuple[str, ...] = ()) -> dict[str, ChannelGroup]:
    return {group.name: group for group in channel_groups(network, keep)[0]}


def odd(groups: list[ChannelGroup]) -> dict[str, list[int]]:
    """Every second channel of each group."""
    return {group.name: list(range(1, group.channels, 2)) for group in groups}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.fast("three", "squeeze", "concat", "recurrent gates", "option A")
def test_removed_is_masked(name: str) -> None:
    network = NETWORKS[name]()
    if name == "option A":
        # the hooks of `masked_answers` do not see the shortcut's tensor: zero its readers' weights instead
        groups, _ = channel_groups(network)
        images = torch.randn(5, *network.input_shape)
        with silenced(network, groups, odd(groups)), torch.no_grad():
            wanted = [network(images)]
    else:
        groups, _ = channel_groups(network)
        images = torch.randn(5, *network.input_shape)
        wanted = masked_answers(network, groups, odd(groups), images)
    with torch.no_grad():
        before = network(images)
    remove(network, groups, odd(groups))
    count_again(network)
    with torch.no_grad():
        found = network.all_exits(images, Setting(offset=1e4))
    assert all(close(ours, theirs, 1e-5) for ours, theirs in zip(found, wanted, strict=True))
    assert not close(found[-1], before, 1e-3)


def test_three_layers_by_hand() -> None:
    network = NETWORKS["three"]()
    groups, lost = channel_groups(network)
    assert [(group.name, group.channels) for group in groups] == [("conv1", 4), ("conv2", 8)]
    assert lost == []
    remove(network, groups, {"conv1": [0, 2], "conv2": [1, 2, 3, 5, 7]})
    count_again(network)
    assert sizes(network) == {"conv1": [2, 3], "conv2": [3, 2], "linear": [5, 3]}
    # 8*8 pixels * 2 channels * 27, 4*4 * 3 * 2 * 9, 3 * 5
    assert whole_macs(network) == 8 * 8 * 2 * 27 + 4 * 4 * 3 * 2 * 9 + 15
    assert sum(node.meta["macs"] for node in network.plain.graph.nodes) == whole_macs(network)
    conv = layers(network)["conv2"]
    assert isinstance(conv, nn.Conv2d)
    assert (conv.in_channels, conv.out_channels) == (2, 3)
    original = made(ThreeLayer).conv2
    assert torch.equal(conv.weight, original.weight[[0, 4, 6]][:, [1, 3]])
    assert torch.equal(conv.bias, original.bias[[0, 4, 6]])


def test_residual_trunks_projections_and_heads_go_together() -> None:
    groups = by_name(with_exits())
    trunk = groups["stem.0"]
    assert members(trunk, "out") == {"stem.0", "layer1.0.body.1", "layer1.1.body.1"}
    assert members(trunk, "in") == {
        "layer1.0.body.0.0", "layer1.1.body.0.0", "layer2.0.body.0.0", "layer2.0.shortcut",
        "pieces.exit__1.head.body.0",
    }  # fmt: skip
    assert members(groups["layer2.0.body.1"], "out") == {"layer2.0.shortcut", "layer2.0.body.1", "layer2.1.body.1"}
    assert members(groups["pieces.exit__1.head.body.3"], "in") == {
        "pieces.exit__1.head.classifier.2", "pieces.exit__2.head.fusion", "pieces.fusion.linear",
    }  # fmt: skip
    assert not any("classifier" in layer for group in groups.values() for layer in members(group, "out"))
    assert "linear" not in groups


def test_depthwise_and_squeeze_follow_the_expansion() -> None:
    group = by_name(NETWORKS["squeeze"]())["expand"]
    assert members(group, "each") == {"norm1", "depth", "norm2"}
    assert members(group, "out") == {"expand", "excite"}
    assert members(group, "in") == {"squeeze", "project"}


def test_concatenated_and_flattened_channels_have_their_places() -> None:
    groups = by_name(NETWORKS["concat"]())
    reads = next(member for member in groups["b"].members if member.layer == "c" and member.side == "in")
    assert reads.index.tolist() == [[4], [5], [6], [7], [8], [9]]
    flat = next(member for member in groups["c"].members if member.layer == "linear")
    assert flat.index.tolist() == [list(range(16 * c, 16 * c + 16)) for c in range(8)]


def test_gates_read_the_trunk() -> None:
    network = with_gates("recurrent")
    trunk = by_name(network)["layer2.0.body.1"]
    third, fourth = (f"pieces.{name}.gate" for name in ("layer2__1", "layer3__0"))
    assert [unit.name for unit in network.changing[2:4]] == ["layer2.1", "layer3.0"]
    assert {f"{third}.project", f"{fourth}.project"} <= members(trunk, "in")
    assert {f"{third}.norm", f"{fourth}.norm"} <= members(trunk, "each")
    costs = [unit.path_macs for unit in network.changing]
    gates = [unit.macs for unit in network.changing]
    remove(network, [trunk], {trunk.name: range(8)})
    count_again(network)
    # layer2.1 (unit 2): 8*8 pixels * (16 hidden * 16 trunk + 16 trunk * 16 hidden) * 9, of which half of the trunk goes
    assert costs[2][1] == 8 * 8 * 2 * 16 * 16 * 9
    assert network.changing[2].path_macs[1] == costs[2][1] / 2
    assert network.changing[2].macs < gates[2]
    assert network.changing[2].path_costs.tolist() == [0, 1]


def test_group_norm_keeps_its_channels() -> None:
    groups, lost = channel_groups(wrap(made(NormedNet), NormedNet.shape))
    assert [group.name for group in groups] == ["b"]
    assert "a" not in lost  # refused at sight: a group norm has no channels that could be cut out


def test_mixed_up_places_are_noticed() -> None:
    network = NETWORKS["three"]()
    groups = by_name(network)
    before = copy.deepcopy(network.state_dict())
    assert faithful(network, list(groups.values()), {"conv1": [1], "conv2": [0, 3]})
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    wrong = [
        ChannelGroup(m.name, m.channels, tuple(type(o)(o.layer, o.side, o.index.flip(0)) if o.side == "out" else o
                     for o in m.members))
        for m in groups.values()
    ]  # fmt: skip
    assert not faithful(network, wrong, {"conv1": [1], "conv2": [0, 3]})


def test_keep_leaves_layers_whole() -> None:
    network = with_exits()
    kept = by_name(network, ("layer1", "stem"))
    assert not any(name.startswith(("layer1", "stem")) for name in kept)
    assert set(kept) < set(by_name(network))
    with pytest.raises(DynamizeError, match=r"'layr1'.*Did you mean"):
        channel_groups(network, ["layr1"])


def test_sizes_come_back_without_torch_pruning(monkeypatch: pytest.MonkeyPatch) -> None:
    network, fresh = with_exits(), with_exits()
    groups, _ = channel_groups(network)
    remove(network, groups, odd(groups))
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    resize(fresh, sizes(network))
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {k: v.shape for k, v in network.state_dict().items()}
    fresh.load_state_dict(network.state_dict())
    images = torch.randn(3, *SmallResNet.shape)
    with torch.no_grad():
        assert torch.equal(fresh(images), network(images))


@pytest.mark.parametrize("wanted", [{"stem.0": [9, 3]}, {"stem.0": [0, 3]}, {"stem.0": [4]}, {"stom.0": [4, 3]}])
def test_sizes_of_another_network_are_refused(wanted: dict[str, list[int]]) -> None:
    network = with_exits()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(DynamizeError, match="another network"):
        resize(network, wanted)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
