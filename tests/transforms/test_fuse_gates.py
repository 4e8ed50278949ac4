"""`fuse_gates`: which gates go and why, what the network answers without them, what comes back, what is refused."""

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from bare_environment import driver_of
from digits import digit_splits
from gated_digits import UNITS, gated_digits
from gated_networks import gated_resnet, masked, scatter, split_exits
from networks import SmallResNet, close, force, set_offset, set_thresholds, small_resnet, split_at, thresholds
from pydantic import ValidationError
from torch import Tensor

from dynamize import artifact
from dynamize.conversion import apply, convert, replay, wrap
from dynamize.data import Splits
from dynamize.data.given import splits as splits_of
from dynamize.errors import DynamizeError
from dynamize.graph.macs import count_macs
from dynamize.measure.costs import exit_costs
from dynamize.nn.network import DynamicNetwork, record_routing
from dynamize.nn.piece import Setting
from dynamize.runtime.compiled import compile_network
from dynamize.runtime.export import export
from dynamize.runtime.profile import OptionTimes, option_latency
from dynamize.training.objectives import exit_logits
from dynamize.transform import Context, check_order
from dynamize.transforms import Calibrate, ChannelGates, Distill, Exits, FuseGates, Recalibrate, SkipGates, fuse_gates

FIVE = ["layer1.1", "layer2.0", "layer2.1", "layer3.0", "layer3.1"]
SIX = ["layer1.0", *FIVE]


def images(count: int) -> Tensor:
    return torch.randn(count, *SmallResNet.shape, generator=torch.Generator().manual_seed(count))


def routed(network: DynamicNetwork, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Answers and choices."""
    with torch.no_grad(), record_routing(network) as routing:
        return network(batch), routing.choices


def own_answers(network: DynamicNetwork, batch: Tensor) -> Context:
    """Calibration images whose labels are what the network answers, so that its accuracy is 1."""
    labels = routed(network, batch)[0].argmax(1)
    splits: Splits = splits_of(**{name: [(batch, labels)] for name in ("train", "calibration", "test")})
    return Context(data=splits, backend="eager")


def set_prices(monkeypatch: pytest.MonkeyPatch, paths_us: Sequence[Sequence[float]], gate_us: float) -> None:
    def priced(network: DynamicNetwork, *_: object, ungated: bool) -> OptionTimes:
        assert ungated
        options = {
            unit.name: [one / 1e3 for one in each] for unit, each in zip(network.changing, paths_us, strict=True)
        }
        return OptionTimes(options, 2.0 + len(options) * gate_us / 1e3, 2.0)

    monkeypatch.setattr(fuse_gates, "option_latency", priced)


def always(network: DynamicNetwork, paths: dict[str, int]) -> DynamicNetwork:
    """Gates of these units pick these paths whatever they see."""
    for unit in network.changing:
        if unit.label in paths:
            with torch.no_grad():
                unit.gate.linear.weight.zero_()
                unit.gate.linear.bias.zero_()[paths[unit.label]] = 1e3
    return network


def fused(network: DynamicNetwork, paths: dict[str, int]) -> DynamicNetwork:
    return apply(network, FuseGates(paths=paths), Context())[0]


def channels(groups: int = 2) -> DynamicNetwork:
    gates = ChannelGates(groups=groups, multiple=4, keep_first=False)
    return scatter(convert(small_resnet(), [gates], SmallResNet.shape), images(64))


class TestWhichGates:
    def test_each_for_its_own_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """layer1.1 always runs, layer2.0 never; layer2.1 saves a little more than a gate takes, the others do not."""
        network, batch = always(gated_resnet(), {"layer1.1": 1, "layer2.0": 0}), images(50)
        ran = routed(network, batch)[1].double().mean(0).tolist()
        assert ran[:2] == [1, 0]
        assert all(0.02 < one < 0.98 for one in ran[2:])
        gate = 100 * (1 - ran[2]) - 0.4
        set_prices(monkeypatch, [[0, 100], [20, 120], [0, 100], [5, 10], [0, 5]], gate)
        tuned, notes = apply(network, FuseGates(), own_answers(network, batch))
        assert [unit.label for unit in tuned.changing] == ["layer2.1"]
        ends = {unit.label: unit.place[1] for unit in gated_resnet().changing}
        wanted = {"layer1.1": 1, "layer2.0": 0, "layer3.0": 1, "layer3.1": 1}
        assert tuned.history[-1]["paths"] == {ends[label]: path for label, path in wanted.items()}
        takes = f"of the images take this path, the gate takes {gate:.0f} us and saves"
        assert notes[0].startswith("4 of 5 gates fused; calibration accuracy 100.00% before, ")
        assert notes[1:] == [
            f"layer1.1 is always whole: 100% {takes} 0 us",
            f"layer2.0 is always skipped: 100% {takes} 100 us",
            f"layer3.0 is always whole: {ran[3]:.0%} {takes} {5 * (1 - ran[3]):.0f} us",
            f"layer3.1 is always whole: {ran[4]:.0%} {takes} {5 * (1 - ran[4]):.0f} us",
        ]

    def test_time_may_be_left_out_of_account(self, monkeypatch: pytest.MonkeyPatch) -> None:
        network, batch = gated_resnet(), images(50)
        set_prices(monkeypatch, [[0, 1]] * 5, 100)
        wanted = routed(network, batch)[0]
        tuned, notes = apply(network, FuseGates(time=False), own_answers(network, batch))
        assert notes == ["0 of 5 gates fused; calibration accuracy 100.00% before, 100.00% after"]
        assert torch.equal(routed(tuned, batch)[0], wanted)
        assert tuned.history[-1]["paths"] == {}

    @pytest.mark.parametrize(
        ("tolerance", "time", "gate_us", "path"),
        [(100, True, 1, 0), (100, True, 999, 0), (0.1, True, 1, None), (0.1, True, 999, 1), (0.1, False, 999, None)],
    )
    @pytest.mark.fast("100-True-1-0", "0.1-True-1-None", "0.1-True-999-1")
    def test_a_cheaper_path_for_all_must_not_cost_accuracy(
        self, tolerance: float, time: bool, gate_us: float, path: int | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """About four of five images skip the block; some of the others are answered otherwise without it."""
        network, batch = gated_resnet(blocks=[["layer2.1"]]), images(60)
        with torch.no_grad():
            network.changing[0].gate.linear.bias[0] += 6
        given = own_answers(network, batch)
        skipped = float((routed(network, batch)[1] == 0).double().mean())
        assert 0.7 < skipped < 0.95
        set_prices(monkeypatch, [[0, 100]], gate_us)
        labels = next(iter(given.data.calibration.batches(60)))[1]
        without = masked(network, batch, torch.zeros(60, 1, dtype=torch.int64)).answers_NC.argmax(1)
        fall = 100 * float((without != labels).double().mean())
        assert fall > 1
        tuned, notes = apply(network, FuseGates(tolerance=tolerance, time=time, share=0.7), given)
        assert [
            tuned.history[-1]["paths"].get(unit.place[1]) for unit in gated_resnet(blocks=[["layer2.1"]]).changing
        ] == [path]
        assert len(tuned.changing) == (path is None)
        if path is None:
            assert notes[1] == f"layer2.1 stays: skipped for all would cost {fall:.2f} points"
        else:
            assert f"layer2.1 is always {['skipped', 'whole'][path]}: " in notes[1]
            assert notes[2] == "no gate is left, so the network is static"
        if path == 0:
            assert notes[0].endswith(f"100.00% before, {100 - fall:.2f}% after")

    def test_widths(self, monkeypatch: pytest.MonkeyPatch) -> None:
        network, batch = always(channels(), {"layer2.1": 0}), images(50)
        set_prices(monkeypatch, [[1, 1000]] * 6, 1)
        tuned, notes = apply(network, FuseGates(), own_answers(network, batch))
        assert [unit.label for unit in tuned.changing] == [label for label in SIX if label != "layer2.1"]
        assert notes[1].startswith(
            "layer2.1 is always 50 % wide: 100% of the images take this path, the gate takes 1 us"
        )

    def test_recurrent_gates_stay(self, monkeypatch: pytest.MonkeyPatch) -> None:
        network, batch = gated_resnet(gate="recurrent"), images(20)
        set_prices(monkeypatch, [[0, 1]] * 5, 1000)
        tuned, notes = apply(network, FuseGates(), own_answers(network, batch))
        assert len(tuned.changing) == 5
        assert notes[1:] == ["5 recurrent gates stay, since each hands its state to the next"]
        assert len({id(unit.gate.memory) for unit in tuned.changing}) == 1
        assert tuned.changing[0].gate.memory is not None

    def test_times_are_those_of_the_backend(self, monkeypatch: pytest.MonkeyPatch) -> None:
        network, batch = gated_resnet(blocks=[["layer1.1"], ["layer3.1"]]), images(20)
        asked: list[tuple[str, str]] = []

        def briefly(network: DynamicNetwork, backend: str, device: torch.device, ungated: bool) -> OptionTimes:
            asked.append((backend, str(device)))
            assert ungated
            return option_latency(network, backend, device, seconds=0.0, ungated=ungated)

        monkeypatch.setattr(fuse_gates, "option_latency", briefly)
        uses = fuse_gates._uses(network, own_answers(network, batch))
        assert asked == [("eager", "cpu")]
        assert [use.name for use in uses] == ["layer1.1", "layer3.1"]
        assert all(use.saved_us > 1 for use in uses)
        assert uses[0].gate_us == uses[1].gate_us


PATHS = [
    {"layer1.1": 0},
    {"layer2.0": 0, "layer2.1": 0, "layer3.1": 1},
    {"layer1.1": 1, "layer2.1": 1},
    dict.fromkeys(FIVE, 0),
    dict.fromkeys(FIVE, 1),
]


class TestAnswers:
    @pytest.mark.parametrize("paths", PATHS)
    @pytest.mark.parametrize(("exits", "backend"), [(None, "eager"), ({}, "eager"), ({"chain": True}, "onnxruntime")])
    @pytest.mark.fast("None-eager-paths0", "exits1-eager-paths1", "exits1-eager-paths3", "exits2-onnxruntime-paths2")
    def test_as_if_the_gates_had_decided_so(self, exits: dict | None, backend: str, paths: dict) -> None:
        network, batch = always(gated_resnet(exits), paths), images(16)
        split_exits(network, images(64))
        wanted = masked(network, batch)
        assert wanted.clear.float().mean() > 0.8
        one = fused(always(gated_resnet(exits), paths), paths)
        set_thresholds(one, thresholds(network))
        found = compile_network(one, backend).run(batch)
        assert close(found.logits[wanted.clear], wanted.answers_NC[wanted.clear])
        assert torch.equal(found.exits[wanted.clear], wanted.exits_N[wanted.clear])
        left = [u for u, label in enumerate(FIVE) if label not in paths]
        assert torch.equal(found.choices[wanted.clear], wanted.choices_NU[wanted.clear][:, left])
        assert [piece.name for piece in one.leaving] == [piece.name for piece in network.leaving]
        assert len(one.leaving) == (0 if exits is None else 2)

    @pytest.mark.parametrize("path", [0, 1, 2])
    @pytest.mark.fast("0", "2")
    def test_widths(self, path: int) -> None:
        network, batch = channels(4), images(16)
        paths = {unit.label: min(path, len(unit.path_macs) - 1) for unit in network.changing[::2]}
        wanted = masked(always(network, paths), batch)
        with torch.no_grad():
            found, choices = routed(fused(network, paths), batch)
        assert close(found[wanted.clear], wanted.answers_NC[wanted.clear])
        assert torch.equal(choices[wanted.clear], wanted.choices_NU[wanted.clear][:, 1::2])

    def test_widths_with_statistics_of_their_own(self) -> None:
        network, batch = channels(), images(16)
        for unit in network.changing:
            unit.own_statistics()
            with torch.no_grad():
                unit.statistics_0 += 0.3
        paths = {"layer2.0": 0, "layer3.1": 0}
        wanted = masked(always(network, paths), batch)
        assert close(routed(fused(network, paths), batch)[0][wanted.clear], wanted.answers_NC[wanted.clear])

    def test_all_original_is_the_original_network(self) -> None:
        network, batch = gated_resnet(), images(5)
        static = fused(network, dict.fromkeys(FIVE, 1))
        assert static.changing == []
        assert [piece.decision for piece in static.row] == [None]
        assert set(static.state_dict()) == {f"nets.main.{name}" for name in small_resnet().state_dict()}
        with torch.no_grad():
            assert torch.equal(static(batch), small_resnet()(batch))

    @pytest.mark.parametrize("training", [False, True])
    def test_modes_gradients_and_the_offset_stay(self, training: bool) -> None:
        network = gated_resnet().train(training)
        set_offset(network, 0.7)
        network = fused(network, {"layer2.0": 0, "layer3.0": 1})
        assert all(module.training == training for module in network.modules())
        assert network.setting.offset == 0.7
        exit_logits(network.train()(images(8)))[0].square().sum().backward()
        assert all(parameter.grad is not None for parameter in network.parameters())

    def test_costs_by_hand(self) -> None:
        """layer1.1: two convolutions of 16*16 * 8*8 * 9 MACs and a gate of 8*2; layer2.0 skipped leaves 8*8 * 8*16."""
        network = gated_resnet(blocks=[["layer1.1"], ["layer2.0"]])
        block, projected = 2 * 256 * 64 * 9, 64 * 9 * (8 * 16 + 16 * 16) + 64 * 8 * 16
        static = count_macs(small_resnet(), images(1))
        first = fused(network, {"layer1.1": 0})
        assert exit_costs(first).cumulative().tolist() == [static - block + 16]
        forced = Setting(forced=force(first, torch.tensor([[0]])))
        assert count_macs(lambda: first.run(images(1), forced)) == static - block - (projected - 64 * 8 * 16) + 16
        assert count_macs(fused(first, {"layer2.0": 0}), images(1)) == static - block - (projected - 64 * 8 * 16)

    def test_an_exit_at_the_end_of_a_block_that_is_gone(self) -> None:
        exits = {"at": ["layer1.0", "layer1.1"]}
        paths = {"layer1.1": 0}
        network, batch = always(gated_resnet(exits), paths), images(16)
        split_exits(network, images(64))
        wanted = masked(network, batch)
        split = thresholds(network)
        network = fused(network, paths)
        set_thresholds(network, split)
        for run in (network, compile_network(network, "onnxruntime")):
            with torch.no_grad():
                assert close(run(batch)[wanted.clear], wanted.answers_NC[wanted.clear])

    def test_export_where_nothing_is_left_between_two_exits(self, tmp_path: Path) -> None:
        paths = {"layer1.1": 0} | dict.fromkeys(FIVE[1:], 1)
        network, batch = fused(always(gated_resnet({"at": ["layer1.0", "layer1.1"]}), paths), paths), images(16)
        split_at(network, batch, [0.3, 0.5])
        assert [piece.effect for piece in network.row] == [None, "leaves", "leaves", None]
        export(network, tmp_path / "deploy")
        found = driver_of(tmp_path / "deploy").Network().run(batch.numpy())
        with torch.no_grad(), record_routing(network) as routing:
            assert close(torch.from_numpy(found.logits), network(batch))
        assert [["exit.1", "exit.2", "end"].index(place) for place in found.places] == routing.exits.tolist()
        assert len(routing.exits.unique()) == 3


class TestComesBack:
    @pytest.mark.parametrize("paths", PATHS)
    @pytest.mark.fast("paths0", "paths3")
    def test_an_artifact(self, paths: dict, tmp_path: Path) -> None:
        network, batch = fused(gated_resnet({"chain": True}), paths), images(9)
        split_exits(network, images(32)) if network.changing else None
        artifact.save(network, tmp_path)
        again = artifact.load(tmp_path, network=SmallResNet())
        set_thresholds(again, thresholds(network))
        for found, wanted in zip(routed(again, batch), routed(network, batch), strict=True):
            assert torch.equal(found, wanted)
        assert again.state_dict().keys() == network.state_dict().keys()

    def test_widths_and_statistics(self, tmp_path: Path) -> None:
        network, batch = channels(4), images(9)
        data = own_answers(network, images(80))
        network, _ = apply(network, Recalibrate(statistics="widths"), data)
        network = fused(network, {"layer1.0": 1, "layer2.1": 0, "layer3.0": 0})
        artifact.save(network, tmp_path)
        again = artifact.load(tmp_path, network=SmallResNet())
        for found, wanted in zip(routed(again, batch), routed(network, batch), strict=True):
            assert torch.equal(found, wanted)
        assert exit_costs(again) == exit_costs(network)

    def test_steps_that_follow(self) -> None:
        """Statistics, exits and another fusion, on the network without its blocks."""
        network, batch = fused(gated_resnet(), {"layer2.0": 0, "layer2.1": 1}), images(12)
        wanted = routed(network, batch)
        later = convert(network, [Exits(at=["layer1.1", "layer2.1"], share=1.0)], SmallResNet.shape)
        found = routed(later, batch)
        assert close(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])
        later = fused(later, {"layer3.1": 0})
        history = replay(SmallResNet(), later.history, SmallResNet.shape)
        assert history.state_dict().keys() == later.state_dict().keys()
        assert [unit.label for unit in history.changing] == ["layer1.1", "layer3.0"]


def test_refusals() -> None:
    with pytest.raises(DynamizeError, match=r"'layer1\.2' is no gated block\. Did you mean .*Known: layer1\.1, layer2"):
        fused(gated_resnet(), {"layer1.2": 0})
    with pytest.raises(DynamizeError, match=r"'layer1\.1' has no path 2: give 0 \(the cheapest\) to 1"):
        fused(gated_resnet(), {"layer1.1": 2})
    with pytest.raises(DynamizeError, match="has a recurrent gate, which hands its state to the next one"):
        fused(gated_resnet(gate="recurrent"), {"layer1.1": 1})
    with pytest.raises(DynamizeError, match="has no gates: put `skip_gates` or `channel_gates` before"):
        apply(wrap(small_resnet(), SmallResNet.shape), FuseGates(), Context())
    with pytest.raises(DynamizeError, match="`fuse_gates` needs images"):
        apply(gated_resnet(), FuseGates(), Context())
    with pytest.raises(DynamizeError, match="needs `skip_gates` or `spatial_sampling` or `channel_gates` before it"):
        check_order([FuseGates()])
    with pytest.raises(DynamizeError, match="move `fuse_gates` above `calibrate`"):
        check_order([SkipGates(), Calibrate(), FuseGates()])
    for fields in ({"paths": {"a": -1}}, {"share": 1.5}, {"tolerance": -1}, {"gate": 1}):
        with pytest.raises(ValidationError):
            FuseGates.model_validate(fields)


def test_where_no_gate_is_left_nothing_is_done_again() -> None:
    static = fused(gated_resnet(), dict.fromkeys(FIVE, 1))
    again, notes = apply(copy.deepcopy(static), FuseGates(), Context())
    assert notes == ["nothing to do: an earlier `fuse_gates` left no gates"]
    rebuilt = replay(small_resnet(), again.history, SmallResNet.shape)
    assert rebuilt.state_dict().keys() == static.state_dict().keys()


def test_a_budget_of_gates_that_are_gone_is_told_not_refused() -> None:
    static = fused(gated_digits(), dict.fromkeys(UNITS, 1))
    training = Distill(epochs=1, alpha=0.0, gate_budget=0.5, precision="float32")
    _, notes = apply(static, training, Context(data=digit_splits(64)))
    assert notes[-1] == "gate_budget did nothing: `fuse_gates` left no gates"


def test_calibration_has_nothing_to_solve_where_no_gate_is_left() -> None:
    fused, _ = apply(gated_resnet(), FuseGates(paths=dict.fromkeys(FIVE, 1)), Context())
    assert not fused.changing
    calibrated, notes = apply(fused, Calibrate(), Context())
    assert notes == ["nothing to solve: `fuse_gates` left a static network"]
    assert calibrated.operating_points is None
