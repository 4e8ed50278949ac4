"""Where pieces may stand: all that cannot are named at once, and nothing is changed."""

import pytest
import torch
from networks import SmallResNet, close, small_resnet
from torch import nn

from dynamize.conversion import wrap
from dynamize.errors import DynamizeError
from dynamize.nn.exits import Exit
from dynamize.nn.gates import LinearGate
from dynamize.nn.heads import ExitHead, linear_classifier
from dynamize.nn.piece import Setting
from dynamize.nn.units import SkipUnit


def exit_at(number: int, channels: int) -> Exit:
    return Exit(f"exit.{number}", ExitHead(nn.Identity(), linear_classifier(channels, 7)))


def unit(name: str) -> SkipUnit:
    return SkipUnit(name, LinearGate(8, 2), nn.Conv2d(8, 8, 1))


def test_all_that_cannot_stand_where_they_are_put_are_named() -> None:
    network = wrap(small_resnet(), SmallResNet.shape)
    nodes = [node.name for node in network.plain.graph.nodes]
    first, middle, last = nodes[3], nodes[8], nodes[13]
    with pytest.raises(DynamizeError) as refused:
        network.insert(
            {"nowhere": exit_at(1, 8), (first, last): unit("a"), middle: exit_at(2, 8), (last, first): unit("b")}
        )
    message = str(refused.value)
    assert "'exit.1' is put at 'nowhere', which is no node" in message
    assert "'a' and 'exit.2' overlap" in message
    assert "'b' ends before it starts" in message
    assert not network.decisions()
    assert len(network.row) == 1


def test_pieces_may_touch() -> None:
    network = wrap(small_resnet(), SmallResNet.shape)
    images = torch.randn(3, *SmallResNet.shape)
    block = unit("block")
    network.insert({"relu": exit_at(1, 8), ("relu", "relu_1"): block, "relu_1": exit_at(2, 8)})
    assert [piece.name for piece in network.row if piece.effect] == ["exit.1", "block", "exit.2"]
    with torch.no_grad():
        skipped = network.run(images, Setting(forced={"block": torch.zeros(3, dtype=torch.int64)})).logits
    whole = small_resnet()
    whole.layer1[1] = nn.Identity()
    assert close(skipped, whole(images).detach())
