"""Which blocks gates fit on: hand-read for a small network, and as the transforms see it for real ones."""

import pytest
from networks import LongSkipNet, SmallResNet, conv_block, small_resnet, torchvision_network
from torch import nn

from dynamize.conversion import convert
from dynamize.graph.cuts import cut_points
from dynamize.graph.gateable import gateable_blocks
from dynamize.graph.residual import residual_blocks, why_not
from dynamize.graph.trace import trace
from dynamize.nn.channels import ChannelUnit
from dynamize.transforms import ChannelGates

PLAIN = [
    *(conv_block(inputs, outputs) for inputs, outputs in ((3, 8), (8, 12), (12, 16), (16, 16), (16, 8))),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(8, 5),
]


def test_small_resnet_by_hand() -> None:
    found = gateable_blocks(trace(small_resnet(), SmallResNet.shape))
    assert [block.module for block in found] == [f"layer{stage}.{i}" for stage in (1, 2, 3) for i in (0, 1)]
    assert all(block.skip and block.why_not is None for block in found)
    assert [block.identity for block in found] == [True, True, False, True, False, True]
    assert [[chain.channels for chain in block.chains] for block in found] == [[8], [8], [16], [16], [24], [24]]
    # layer2.0: shortcut 8*8 pixels * 16 channels * 8, body the same 3x3 and then 16 -> 16
    assert found[2].bypass_macs == 8 * 8 * 16 * 8
    assert found[2].macs == 8 * 8 * 16 * (8 + 8 * 9 + 16 * 9)


def test_network_without_cut_points_has_no_blocks() -> None:
    assert gateable_blocks(trace(LongSkipNet().eval(), LongSkipNet.shape)) == []


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "efficientnet_b0"])
def test_skips_as_skip_gates_sees_them(name: str) -> None:
    traced = trace(torchvision_network(name), (3, 32, 32))
    found = {block.block: block for block in gateable_blocks(traced)}
    residual = {block.upto: block for block in residual_blocks(traced)}
    assert list(found) == [cut.name for cut in cut_points(traced)[1:]]
    assert {name for name, block in found.items() if block.skip} == set(residual)
    assert {block.why_not for block in found.values()} - {None} == set(why_not(traced).values())
    for cut, block in residual.items():
        assert (found[cut].identity, found[cut].bypass_macs) == (block.identity, block.bypass_macs)


@pytest.mark.parametrize(
    ("network", "shape", "gates"),
    [(small_resnet(), SmallResNet.shape, 6), (nn.Sequential(*PLAIN), (3, 8, 8), 2)],
    ids=["residual", "plain"],
)
def test_channels_as_channel_gates_sees_them(network: nn.Module, shape: tuple[int, ...], gates: int) -> None:
    found = {block.block: block for block in gateable_blocks(trace(network.eval(), shape))}
    units = convert(network, [ChannelGates(multiple=1, keep_first=False)], shape).changing
    assert len(units) == gates
    for unit in units:
        assert isinstance(unit, ChannelUnit)
        assert set(unit.widths) <= {chain.name for chain in found[unit.place[1]].chains}
