"""`skip_gates`: nothing changes until gates are trained, which blocks get one, what comes back, what is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from built import built_once
from gated_networks import gated_resnet, scatter, split_exits
from networks import (
    SmallResNet,
    ThreeLayer,
    close,
    randomise_norms,
    set_offset,
    set_thresholds,
    small_resnet,
    thresholds,
    torchvision_network,
)
from pydantic import ValidationError
from torch import Tensor, nn

from dynamize import artifact, block_gates
from dynamize.calibration.operating import OperatingPoint, OperatingPoints
from dynamize.conversion import apply, convert, replay, wrap
from dynamize.errors import DynamizeError
from dynamize.measure.costs import exit_costs
from dynamize.models import create
from dynamize.nn.network import DynamicNetwork, record_routing
from dynamize.nn.piece import Setting
from dynamize.runtime.profile import GatePrice
from dynamize.training.objectives import exit_logits
from dynamize.transform import Context, parse_step
from dynamize.transforms import ChannelGates, Exits, SkipGates

BLOCKS = ["layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3.0", "layer3.1"]


@built_once
def gated(**fields: Any) -> DynamicNetwork:
    return convert(small_resnet(), [SkipGates.model_validate({"group": 1} | fields)], SmallResNet.shape)


def labels(network: DynamicNetwork) -> list[str]:
    return [unit.label for unit in network.changing]


def images(count: int) -> Tensor:
    return torch.randn(count, *SmallResNet.shape, generator=torch.Generator().manual_seed(count))


def routed(network: DynamicNetwork, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad(), record_routing(network) as routing:
        return network(batch), routing.exits, routing.choices


def assert_nothing_changes(network: nn.Module, dynamic: DynamicNetwork, batch: Tensor) -> None:
    """Bit-equal in eval mode, and in train mode while decisions are not sampled."""
    assert dynamic.changing
    with torch.no_grad():
        assert torch.equal(dynamic(batch), network(batch))
        assert torch.equal(dynamic(batch[:1]), network(batch[:1]))
        dynamic.choose.noise = 0.0
        found = []
        for one in (dynamic.train(), copy.deepcopy(network).train()):
            torch.manual_seed(0)  # dropout
            found.append(exit_logits(one(batch)))
    assert len(found[0]) == len(found[1]) == 1
    assert torch.equal(found[0][0], found[1][0])


@pytest.mark.parametrize("gate", ["linear", "recurrent", "conv"])
@pytest.mark.parametrize(
    "fields",
    [
        {"group": 1},
        {"group": 2, "keep_first": False},
        {"group": 3, "keep_first": False},
        {"keep": ["layer2", "layer3.1"]},
        {"blocks": [["layer3.1"], ["layer1.0", "layer1.1", "layer1.2"], ["layer2.0"]]},
    ],
)
@pytest.mark.fast("fields0-linear", "fields1-recurrent", "fields2-conv", "fields3-linear")
def test_digits_resnet_answers_as_before(gate: str, fields: dict) -> None:
    torch.manual_seed(0)
    network = randomise_norms(create("digits_resnet")).eval()
    if "keep" in fields:
        fields = {"keep": ["layer2.0", "layer2.1", "layer2.2", "layer3.1"], "group": 3}
    dynamic = convert(network, [SkipGates.model_validate({"gate": gate} | fields)], (1, 8, 8))
    assert_nothing_changes(network, dynamic, torch.randn(5, 1, 8, 8))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("resnet18", {"group": 2, "keep_first": False}),
        ("mobilenet_v3_small", {"gate": "recurrent", "group": 2}),
        pytest.param("regnet_y_400mf", {"gate": "conv", "group": 3}, marks=pytest.mark.slow),
        pytest.param("convnext_tiny", {"group": 3}, marks=pytest.mark.slow),
        pytest.param("efficientnet_b0", {"group": 2}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.fast("resnet18-fields0")
def test_torchvision_networks_answer_as_before(name: str, fields: dict) -> None:
    network = torchvision_network(name)
    dynamic = convert(network, [SkipGates.model_validate(fields)], (3, 64, 64))
    assert_nothing_changes(network, dynamic, torch.randn(3, 3, 64, 64))


def test_cifar_resnet_answers_as_before() -> None:
    network = randomise_norms(create("cifar_resnet20")).eval()
    dynamic = convert(network, [SkipGates(group=3)], (3, 32, 32))
    assert labels(dynamic) == ["layer1.1 to layer1.2", "layer2.0", "layer2.1 to layer2.2", "layer3.0",
                               "layer3.1 to layer3.2"]  # fmt: skip
    assert_nothing_changes(network, dynamic, torch.randn(3, 3, 32, 32))


class TestWhichBlocks:
    def test_one_gate_each(self) -> None:
        assert labels(gated()) == BLOCKS[1:]
        assert labels(gated(keep_first=False)) == BLOCKS

    def test_groups_are_neighbours_that_return_their_input(self) -> None:
        """The last sum of a stage is at full width there; a projection stands alone."""
        assert labels(gated(group=2, keep_first=False)) == ["layer1.0 to layer1.1", *BLOCKS[2:]]
        network = convert(create("digits_resnet"), [SkipGates(group=2, keep_first=False)], (1, 8, 8))
        assert labels(network)[:2] == ["layer1.0 to layer1.1", "layer1.2"]

    def test_kept_blocks_have_no_gate_and_part_groups(self) -> None:
        assert labels(gated(keep=["layer2.0", "layer3.1"])) == ["layer1.1", "layer2.1", "layer3.0"]
        network = convert(create("digits_resnet"), [SkipGates(group=3, keep=["layer1.1"], keep_first=False)], (1, 8, 8))
        assert labels(network)[:2] == ["layer1.0", "layer1.2"]

    def test_given_blocks_run_in_the_order_of_the_network(self) -> None:
        network = gated(blocks=[["layer2.1"], ["layer1.0", "layer1.1"]])
        assert labels(network) == ["layer1.0 to layer1.1", "layer2.1"]

    @pytest.mark.parametrize(
        ("gate_ms", "wanted"),
        [(0.1, 1), (0.6, 2), (9.0, 4)],  # against 0.5 of a block of 1 ms, of which it may take four
    )
    def test_auto_groups_as_many_as_pay_for_the_gate(
        self, gate_ms: float, wanted: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        network = wrap(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *(_Plain() for _ in range(8)), _Head()), (3, 8, 8))
        trial = []

        def price(given: DynamicNetwork, insert: Any, *_: Any) -> GatePrice:
            one = copy.deepcopy(given)
            insert(one)
            trial.extend(one.changing)
            return GatePrice(gate_ms, float(len(one.changing)))

        monkeypatch.setattr(block_gates, "gate_price", price)
        applied = SkipGates(keep_first=False).apply(network, Context())
        assert len(trial) == 8
        assert applied.resolved.group == wanted
        assert len(applied.network.changing) == 8 // wanted
        assert f"a gate takes {1000 * gate_ms:.0f} us and the cheaper way of a block saves 1000 us" in applied.notes[1]
        assert f"up to {wanted} blocks" in applied.notes[1]
        assert len(applied.notes) == (3 if gate_ms > 2 else 2)


class _Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x).relu()


class _Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3)))


class TestWithExits:
    EXITS: dict[str, Any] = {"at": ["layer1", "layer2.0"], "head": "conv", "share": 1.0, "size": [8, 8]}

    @pytest.mark.parametrize("gate", ["linear", "recurrent", "conv"])
    @pytest.mark.parametrize("chain", [False, True])
    @pytest.mark.fast("False-linear", "True-recurrent")
    def test_the_order_of_the_two_steps_does_not_matter(self, gate: str, chain: bool) -> None:
        exits = Exits.model_validate(self.EXITS | {"chain": chain})
        gates = SkipGates.model_validate({"gate": gate, "group": 2, "keep_first": False})
        first = convert(small_resnet(), [exits, gates], SmallResNet.shape)
        second = convert(small_resnet(), [gates, exits], SmallResNet.shape)
        assert labels(first) == labels(second)
        assert [(type(piece), piece.name, piece.place) for piece in first.row] == [
            (type(piece), piece.name, piece.place) for piece in second.row
        ]
        assert first.state_dict().keys() == second.state_dict().keys()
        assert all(torch.equal(a, second.state_dict()[name]) for name, a in first.state_dict().items())
        batch = images(16)
        scatter(first, images(64))
        second.load_state_dict(first.state_dict())
        split_exits(first, batch)
        set_thresholds(second, thresholds(first))
        found, again = routed(first, batch), routed(second, batch)
        assert len(found[1].unique()) == 3
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))

    @pytest.mark.parametrize("training", [False, True])
    def test_gates_after_exits_leave_everything_else_as_it_was(self, training: bool) -> None:
        before = convert(small_resnet(), [Exits.model_validate(self.EXITS)], SmallResNet.shape)
        wanted = [one.clone() for one in before.all_exits(images(4))]
        network, _ = apply(before.train(training), SkipGates(group=1), Context())
        assert all(module.training == training for module in network.modules())
        assert all(torch.equal(*pair) for pair in zip(network.eval().all_exits(images(4)), wanted, strict=True))

    def test_exits_part_groups(self) -> None:
        steps = [Exits(at=["layer1.0"], share=1.0), SkipGates(group=2, keep_first=False)]
        assert labels(convert(small_resnet(), steps, SmallResNet.shape)) == BLOCKS
        with pytest.raises(DynamizeError, match="cannot share a gate: they must follow each other without an exit"):
            convert(small_resnet(), [steps[0], SkipGates(blocks=[["layer1.0", "layer1.1"]])], SmallResNet.shape)

    def test_no_exit_inside_a_group(self) -> None:
        gates = SkipGates(blocks=[["layer1.0", "layer1.1"]])
        with pytest.raises(DynamizeError, match=r"'layer1\.0' lies between blocks that share a gate.*before `skip_gat"):
            convert(small_resnet(), [gates, Exits(at=["layer1.0"], share=1.0)], SmallResNet.shape)
        network = convert(small_resnet(), [gates, Exits(count=1, head="linear")], SmallResNet.shape)
        inside = wrap(small_resnet(), SmallResNet.shape).plain
        assert network.exit_places[0] in {node.name for node in inside.graph.nodes}
        assert network.exit_places[0] != network.history[0]["blocks"][0][0]


class TestComesBack:
    @pytest.mark.parametrize("gate", ["linear", "recurrent", "conv"])
    @pytest.mark.parametrize("exits", [None, {"chain": True}])
    @pytest.mark.fast("None-conv", "exits1-linear")
    def test_history_and_state_rebuild_the_network_without_data(self, gate: str, exits: dict | None) -> None:
        first = gated_resnet(exits, gate=gate, group=2, keep_first=False)
        second = replay(SmallResNet(), first.history, SmallResNet.shape).eval()
        second.load_state_dict(first.state_dict())
        assert second.history == first.history
        split_exits(first, images(32))
        set_thresholds(second, thresholds(first))
        for found, again in zip(routed(first, images(9)), routed(second, images(9)), strict=True):
            assert torch.equal(found, again)

    def test_resolving_is_stable(self) -> None:
        once = gated(group=2, keep=["layer3.1"], keep_first=False).history[-1]
        assert once["blocks"] != "auto"
        assert once["group"] == 2
        again = convert(small_resnet(), [parse_step(once)], SmallResNet.shape)
        assert again.history == [once]

    @pytest.mark.parametrize("gate", ["linear", "recurrent"])
    @pytest.mark.parametrize("offset", [0.0, -1.5])
    @pytest.mark.fast("0.0-recurrent")
    def test_an_artifact_answers_and_routes_as_what_was_saved(self, gate: str, offset: float, tmp_path: Path) -> None:
        network, batch = gated_resnet({"chain": gate == "recurrent"}, gate=gate), images(20)
        split_exits(network, images(64))
        _stand_at(network, offset)
        wanted = routed(network, batch)
        artifact.save(network, tmp_path)
        loaded = artifact.load(tmp_path, network=SmallResNet())
        assert loaded.setting.offset == offset
        assert thresholds(loaded) == thresholds(network)
        assert loaded.operating_point == network.operating_point
        found = routed(loaded, batch)
        assert len(wanted[2].unique(dim=0)) > 2
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        set_offset(network, 2.0)
        assert not torch.equal(routed(network, batch)[2], wanted[2])

    def test_what_gates_share_is_there_once(self) -> None:
        network = gated(gate="recurrent")
        gates = [unit.gate for unit in network.changing]
        names = [name for name, _ in network.named_parameters() if "cell" in name or "memory" in name]
        memory = gates[0].memory
        assert len(gates) == 5
        assert all(gate.memory is memory for gate in gates)
        assert names == [f"pieces.layer1__1.gate.memory.{name}" for name in memory.state_dict()]
        assert sum(p.numel() for p in memory.parameters()) == 2 * 10 * 40 + 2 * 40
        alone = sum(p.numel() for gate in gates for name, p in gate.named_parameters() if "memory" not in name)
        whole = sum(p.numel() for p in network.parameters())
        assert whole == sum(p.numel() for p in network.plain.parameters()) + alone + 2 * 10 * 40 + 2 * 40

    @pytest.mark.parametrize("reverse", [False, True])
    @pytest.mark.fast("True")
    def test_recurrent_gates_of_both_kinds_share_one_memory(self, reverse: bool, tmp_path: Path) -> None:
        steps: list[Any] = [
            SkipGates(gate="recurrent", blocks=[["layer1.1"], ["layer2.1"]]),
            ChannelGates(gate="recurrent", groups=4, multiple=4, blocks=["layer3.0", "layer3.1"]),
        ]
        network, batch = convert(small_resnet(), steps[::-1] if reverse else steps, SmallResNet.shape), images(20)
        scatter(network, images(64))
        assert sorted({len(unit.path_macs) for unit in network.changing}) == [2, 4]
        assert len({id(unit.gate.memory) for unit in network.changing}) == 1
        wanted = routed(network, batch)
        artifact.save(network, tmp_path)
        found = routed(artifact.load(tmp_path, network=SmallResNet()), batch)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))

    def test_converting_draws_nothing_and_leaves_the_network_alone(self) -> None:
        network = small_resnet().train()
        before, state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
        first, second = (convert(network, [SkipGates(group=1, gate="conv")], SmallResNet.shape) for _ in range(2))
        assert torch.equal(torch.get_rng_state(), state)
        assert first.training
        assert all(torch.equal(a, second.state_dict()[name]) for name, a in first.state_dict().items())
        assert all(torch.equal(a, before[name]) for name, a in network.state_dict().items())

    def test_the_copy_of_a_trained_network(self) -> None:
        network = gated(gate="recurrent").train()
        exit_logits(network(images(4)))[0].sum().backward()
        again = copy.deepcopy(network).eval()
        assert torch.equal(again(images(3)), network.eval()(images(3)))


def _stand_at(network: DynamicNetwork, offset: float) -> None:
    split = {f"exit.{k}": one for k, one in enumerate(thresholds(network), start=1)}
    point = OperatingPoint(
        name="here", thresholds=split, accuracy=0.5, accuracy_ci=(0, 1), accuracy_drop=0.0,
        accuracy_drop_ci=(0, 0), macs=1.0, macs_ci=(1, 1), macs_ratio=0.5, exits=[0.5, 0.25, 0.25], offset=offset,
    )  # fmt: skip
    network.operating_points = OperatingPoints((point,))
    network.set_operating_point("here")


def test_operating_points_move_the_gates() -> None:
    network = gated_resnet({})
    _stand_at(network, -2.0)
    assert network.setting.offset == -2.0
    with torch.no_grad():
        moved = network(images(20))
        assert torch.equal(moved, network.run(images(20), Setting(network.setting.thresholds, -2.0)).logits)
        assert not torch.equal(moved, network.run(images(20), Setting(network.setting.thresholds, 0.0)).logits)
    network.set_operating_point(None)
    assert network.setting.offset == 0.0


def test_the_note_says_how_much_can_be_skipped() -> None:
    applied = SkipGates(group=1).apply(wrap(small_resnet(), SmallResNet.shape), Context())
    costs = exit_costs(applied.network)
    share = (
        sum(one.macs[-1] - one.macs[0] for one in costs.changing)
        / exit_costs(wrap(small_resnet(), SmallResNet.shape)).cumulative()[0]
    )
    assert applied.notes == [f"5 gates over 5 blocks, {share:.0%} of the MACs"]
    assert 0.5 < share < 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"blocks": [["layer1.9"]]},
            r"'layer1\.9' is no residual block of this network\. Did you mean .*layer1\.1.*Kn",
        ),
        ({"keep": ["layer9"]}, "'layer9' is no residual block"),
        ({"blocks": [["layer1.0"], ["layer1.0"]]}, "a block is named twice"),
        ({"blocks": [["layer1.0", "layer1.1"], ["layer1.1"]]}, "a block is named twice"),
        ({"blocks": [["layer1.0", "layer1.0"]]}, "cannot share a gate"),
        ({"blocks": [["layer1.0", "layer2.1"]]}, "cannot share a gate: they must follow each other"),
        ({"blocks": [["layer1.1", "layer2.0"]]}, "no projection. Give each one its own list"),
        ({"blocks": [["layer1.1", "layer1.0"]]}, "cannot share a gate"),
        ({"keep": BLOCKS}, "all 6 residual blocks are kept open: shorten `keep` or set keep_first: false"),
    ],
)
def test_refusals(fields: dict, message: str) -> None:
    with pytest.raises(DynamizeError, match=message):
        gated(**fields)


def test_a_network_without_residual_blocks() -> None:
    with pytest.raises(DynamizeError, match=r"no residual block, that is, no sum .* `exits` works without"):
        convert(ThreeLayer(), [SkipGates()], ThreeLayer.shape)


def test_a_second_step_is_refused() -> None:
    with pytest.raises(DynamizeError, match="step 2 is a second `skip_gates`: merge it into step 1"):
        convert(gated(), [SkipGates(group=1)], SmallResNet.shape)


@pytest.mark.parametrize("fields", [{"blocks": []}, {"blocks": [[]]}, {"group": 0}, {"gate": "square"}, {"gates": 1}])
def test_values_that_no_network_allows(fields: dict) -> None:
    with pytest.raises(ValidationError):
        SkipGates.model_validate(fields)


def test_moving_a_network_takes_its_gates_along() -> None:
    network, batch = gated_resnet({}, gate="recurrent"), images(6)
    wanted = routed(network, batch)
    found = routed(network.double(), batch.double())
    assert all(p.dtype == torch.float64 for p in network.parameters())
    assert torch.equal(found[2], wanted[2])
    assert close(found[0].float(), wanted[0])
