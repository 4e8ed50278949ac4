"""Where pieces may stand: all that cannot are named at once, and nothing is changed."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from networks import SmallResNet, close, small_resnet
from torch import nn

from dynamize.conversion import wrap
from dynamize.errors import DynamizeError
from dynamize.nn.exits import Exit
from dynamize.nn.gates import LinearGate
from dynamize.nn.heads import ExitHead, linear_classifier
from dynamize.nn.piece import Call, Piece, Run, Setting, Static
from dynamize.nn.units import SkipUnit
from dynamize.rewrite.fixing import fix_options
from dynamize.runtime.compiled import compile_network
from dynamize.runtime.export import export


class Twice(Static):
    """Runs by code of its own."""

    def bind(self, calls: Mapping[str, Call]) -> Run:
        once = super().bind(calls)

        def run(flow, setting):
            once(flow, setting)
            flow.features = 2 * flow.features

        return run


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


@pytest.mark.parametrize(
    "wrong",
    [
        {"relu_3": exit_at(2, 9)},
        {"relu_3": exit_at(2, 16), ("relu", "relu_1"): unit("exit.2")},
    ],
    ids=["channels", "name"],
)
def test_what_cannot_run_or_has_the_name_of_another_changes_nothing(wrong: dict[str | tuple[str, str], Piece]) -> None:
    network = wrap(small_resnet(), SmallResNet.shape)
    images = torch.randn(3, *SmallResNet.shape)
    network.insert({"relu_1": exit_at(1, 8)})
    row, answers = [piece.name for piece in network.row], network(images)
    with pytest.raises(DynamizeError, match=r"exit\.2"):
        network.insert(wrong)
    assert [piece.name for piece in network.row] == row
    assert torch.equal(network(images)[0], answers[0])


def test_a_way_that_is_one_layer_becomes_static() -> None:
    network = wrap(small_resnet(), SmallResNet.shape).eval()
    images = torch.randn(3, *SmallResNet.shape)
    network.insert({("relu", "relu_1"): SkipUnit("block", LinearGate(8, 2), nn.Identity(), nn.Conv2d(8, 8, 1))})
    with torch.no_grad():
        wanted = network.run(images, Setting(forced={"block": torch.zeros(3, dtype=torch.int64)})).logits
        fix_options(network, {"block": 0})
        assert not network.decisions()
        assert close(network(images), wanted)


def test_a_piece_with_code_of_its_own_is_run_by_it(tmp_path: Path) -> None:
    network = wrap(small_resnet(), SmallResNet.shape).eval()
    images = torch.randn(3, *SmallResNet.shape)
    network.insert({"relu_1": exit_at(1, 8)})
    own = Twice(network.row[-1].module)
    own.place = network.row[-1].place
    network._row = (*network.row[:-1], own)
    with torch.no_grad():
        wanted = network.run(images).logits
    assert not close(wanted, small_resnet().eval()(images).detach())
    for backend in ("eager", "onnxruntime"):
        assert close(compile_network(network, backend).run(images).logits, wanted, 1e-4)
    with pytest.raises(DynamizeError, match="code of its own"):
        export(network, tmp_path / "exported")
