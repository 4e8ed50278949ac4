"""Steps as data, their order, and from a network to a dynamic one and back."""

import pytest
import torch
from networks import SmallResNet, ThreeLayer, small_resnet
from pydantic import ValidationError

from dynamize.conversion import apply, convert, replay, wrap
from dynamize.errors import DynamizeError
from dynamize.transform import Context, check_order, parse_step, quiet, registered
from dynamize.transforms import Calibrate, Distill, Exits


class TestSteps:
    def test_every_transform_is_registered_under_its_pass(self) -> None:
        assert {"exits": Exits, "distill": Distill, "calibrate": Calibrate}.items() <= registered().items()

    @pytest.mark.parametrize("step", [Exits(count=3, head="tail"), Distill(epochs=2), Calibrate(macs_ratio=0.5)])
    def test_plain_data_and_back(self, step: Exits | Distill | Calibrate) -> None:
        data = step.describe()
        assert data["pass"] == step.pass_name
        assert "pass_name" not in data
        assert parse_step(data) == step

    def test_a_step_of_an_artifact_has_a_version_and_needs_none(self) -> None:
        assert list(Exits().describe())[:2] == ["pass", "version"]
        assert parse_step({"pass": "exits", "count": 3}) == parse_step({"pass": "exits", "version": 1, "count": 3})
        assert "version" not in Exits().model_dump(by_alias=True)

    def test_an_older_step_is_upgraded_when_it_is_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def upgrade(cls: type, step: dict, version: int) -> dict:
            seen.append((dict(step), version))
            return {"pass": step["pass"], "count": step["number"]}

        seen: list[tuple[dict, int]] = []
        monkeypatch.setattr(Exits, "upgrade", classmethod(upgrade))
        monkeypatch.setattr(Exits, "version", 3)
        assert parse_step({"pass": "exits", "number": 4}) == Exits(count=4)
        assert parse_step({"pass": "exits", "version": 2, "number": 5}) == Exits(count=5)
        assert seen == [({"pass": "exits", "number": 4}, 1), ({"pass": "exits", "number": 5}, 2)]
        assert parse_step(Exits(count=6).describe()) == Exits(count=6)
        assert len(seen) == 2

    @pytest.mark.parametrize(
        ("version", "message"),
        [
            (3, "`exits`: the step is of version 3, and this installation knows `exits` up to version 2: install"),
            ("1", "version '1' is none"),
            (0, "version 0 is none"),
            (True, "version True is none"),
            (None, "version None is none"),
        ],
    )
    def test_versions_that_cannot_be_read(self, version: object, message: str) -> None:
        with pytest.raises(DynamizeError, match=message):
            parse_step({"pass": "exits", "version": version})

    def test_steps_cannot_be_changed(self) -> None:
        with pytest.raises(ValidationError, match="frozen"):
            Exits().count = 5

    @pytest.mark.parametrize(
        ("step", "message"),
        [
            ({"pass": "exit"}, "Did you mean exits.*Known: calibrate, cascade, channel_gates, distill, exits"),
            ({"count": 2}, "'None' is no transform"),
        ],
    )
    def test_unknown_passes(self, step: dict, message: str) -> None:
        with pytest.raises(DynamizeError, match=message):
            parse_step(step)

    def test_unknown_fields(self) -> None:
        with pytest.raises(ValidationError, match="cuont"):
            parse_step({"pass": "exits", "cuont": 2})


class TestOrder:
    @pytest.mark.parametrize(
        ("steps", "message"),
        [
            (
                [Calibrate()],
                "step 1 `calibrate` needs `cascade` or `exits` or .*`skip_gates` or .*`channel_gates` before",
            ),
            (
                [Exits(), Calibrate(), Distill()],
                "step 3 `distill` comes after step 2 `calibrate`, which it would undo: move `distill` above",
            ),
            ([Distill(), Exits()], "step 2 `exits` comes after step 1 `distill`"),
            ([Exits(), Distill(), Exits()], "step 3 `exits` comes after step 2 `distill`"),
            ([Exits(), Exits()], "step 2 is a second `exits`: merge it into step 1"),
        ],
    )
    def test_orders_that_cannot_work(self, steps: list, message: str) -> None:
        with pytest.raises(DynamizeError, match=message):
            check_order(steps)

    def test_orders_that_work(self) -> None:
        check_order([])
        check_order([Distill()])
        check_order([Exits(), Distill(), Distill(), Calibrate()])

    def test_it_is_checked_before_anything_runs(self) -> None:
        with pytest.raises(DynamizeError, match="needs `cascade` or `exits`"):
            convert(torch.nn.Identity(), [Calibrate()], (3, 8, 8))


class TestConvert:
    def test_no_step_is_the_network(self) -> None:
        network, images = small_resnet(), torch.randn(2, *SmallResNet.shape)
        dynamic = convert(network, [], SmallResNet.shape)
        assert dynamic.history == []
        assert torch.equal(dynamic(images), network(images))

    @pytest.mark.parametrize("training", [False, True])
    def test_the_training_flag_is_the_networks(self, training: bool) -> None:
        network = ThreeLayer().train(training)
        dynamic = convert(network, [Exits(at=["relu"], head="linear")], ThreeLayer.shape)
        assert dynamic.training == training
        assert network.training == training

    def test_frozen_parameters_stay_frozen(self) -> None:
        network = ThreeLayer()
        network.conv1.requires_grad_(False)
        dynamic = convert(network, [Exits(at=["relu"], head="linear")], ThreeLayer.shape)
        frozen = {name for name, parameter in dynamic.named_parameters() if not parameter.requires_grad}
        assert frozen == {"nets.main.conv1.weight", "nets.main.conv1.bias"}

    def test_the_teacher_is_a_frozen_copy_unless_another_is_named(self) -> None:
        seen = []

        class Spy(Exits):
            def apply(self, network, context):  # type: ignore[no-untyped-def]
                seen.append(context.teacher)
                return super().apply(network, context)

        network, other = ThreeLayer(), ThreeLayer()
        step = Spy(at=["relu"], head="linear")
        convert(network, [step], ThreeLayer.shape)
        convert(network, [step], ThreeLayer.shape, Context(seed=3))
        convert(network, [step], ThreeLayer.shape, Context(teacher=other))
        for copied in seen[:2]:
            assert copied is not network
            assert not copied.training
            assert not any(parameter.requires_grad for parameter in copied.parameters())
            assert torch.equal(copied.linear.weight, network.linear.weight)
        assert seen[2] is other
        assert all(parameter.requires_grad for parameter in network.parameters())

    def test_steps_are_applied_to_a_dynamic_network_too(self) -> None:
        plain = wrap(small_resnet(), SmallResNet.shape)
        dynamic = convert(plain, [Exits(share=0.4)], SmallResNet.shape)
        assert plain.exit_count == 1
        assert dynamic.exit_count == 3


def test_replay_leaves_out_what_changes_no_structure() -> None:
    first, _ = apply(wrap(ThreeLayer(), ThreeLayer.shape), Exits(at=["relu"], head="linear"), Context())
    history = [*first.history, Distill().describe(), Calibrate().describe()]
    second = replay(ThreeLayer(), history, ThreeLayer.shape)
    assert second.history == history
    assert second.state_dict().keys() == first.state_dict().keys()


def test_replay_brings_the_history_up_to_date() -> None:
    first, _ = apply(wrap(ThreeLayer(), ThreeLayer.shape), Exits(at=["relu"], head="linear"), Context())
    before = {name: value for name, value in first.history[0].items() if name != "version"}
    assert replay(ThreeLayer(), [before], ThreeLayer.shape).history == first.history


def test_replay_of_an_unknown_step() -> None:
    with pytest.raises(DynamizeError, match="'focus_gates' is no transform"):
        replay(ThreeLayer(), [{"pass": "focus_gates"}], ThreeLayer.shape)


def test_the_quiet_reporter_hands_everything_on() -> None:
    assert list(quiet([1, 2], "label", 2)) == [1, 2]
