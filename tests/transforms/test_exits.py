"""`exits`: where they go, what they cost, what is refused, and that the resolved step needs no data."""

import functools

import pytest
import torch
import torchvision
from networks import LongSkipNet, SmallResNet, ThreeLayer, randomise_norms, set_thresholds, small_resnet
from pydantic import ValidationError

from dynamize.conversion import apply, convert, replay, wrap
from dynamize.data import LoaderSet, Splits
from dynamize.errors import DynamizeError
from dynamize.graph.cuts import CutPoint, cut_points
from dynamize.graph.trace import trace
from dynamize.measure.costs import exit_costs
from dynamize.nn.network import DynamicNetwork
from dynamize.transform import Context, parse_step
from dynamize.transforms import Exits


def exits(**fields: object) -> DynamicNetwork:
    return convert(small_resnet(), [Exits.model_validate({"share": 1.0} | fields)], SmallResNet.shape)


def head_macs(network: DynamicNetwork) -> list[float]:
    return [decision.always for decision in exit_costs(network).leaving]


def resolved(**fields: object) -> dict:
    return exits(**fields).history[-1]


@functools.cache
def cuts() -> dict[str, CutPoint]:
    return {cut.module: cut for cut in cut_points(trace(small_resnet(), SmallResNet.shape))}


@functools.cache
def total() -> float:
    return float(exit_costs(wrap(small_resnet(), SmallResNet.shape)).cumulative()[-1])


class TestPlaces:
    def test_by_module_path_and_by_node_name(self) -> None:
        wanted = [cuts()["layer1.1"].name, cuts()["layer2.0"].name]
        assert resolved(at=["layer1", "layer2.0"])["at"] == wanted
        assert resolved(at=wanted)["at"] == wanted
        assert resolved(at=["layer2.0", "layer1"])["at"] == wanted  # execution order, whatever was written

    def test_auto_without_data_spreads_over_the_macs(self) -> None:
        found = resolved(count=2, head="linear", share=0.15)
        assert found["count"] == 2
        chosen = [cut.macs / total() for cut in cuts().values() if cut.name in found["at"]]
        for goal, share in zip((1 / 3, 2 / 3), chosen, strict=True):
            assert abs(share - goal) == min(abs(cut.macs / total() - goal) for cut in cuts().values())

    def test_auto_with_data_takes_where_a_probe_can_already_answer(self) -> None:
        images, labels = torch.randn(60, *SmallResNet.shape) * 0.1, torch.arange(60) % 3
        images[torch.arange(60), labels] += 1.0  # the class is the channel that is bright: easy from the stem on
        calibration = LoaderSet("calibration", [(images[:32], labels[:32]), (images[32:], labels[32:])])
        data = Splits(calibration, calibration, calibration, ("red", "green", "blue"))
        step = Exits(count=1, head="linear")
        blind, _ = apply(wrap(small_resnet(), SmallResNet.shape), step, Context())
        seeing, _ = apply(wrap(small_resnet(), SmallResNet.shape), step, Context(data=data))
        assert blind.history[0]["at"] != [cuts()["stem"].name]
        assert seeing.history[0]["at"] == [cuts()["stem"].name]

    def test_same_cut_point_by_two_names(self) -> None:
        with pytest.raises(DynamizeError, match="two of these are the same cut point; name each once"):
            exits(at=["layer1", "layer1.1"])

    def test_unknown_cut_point_names_near_ones(self) -> None:
        name = cuts()["layer1.1"].name
        with pytest.raises(DynamizeError, match=rf"'{name}9' is no cut point .*Did you mean .*{name}"):
            exits(at=[name + "9"])

    def test_more_exits_than_places(self) -> None:
        with pytest.raises(DynamizeError, match="count 9, but only . cut points lie early enough .*use count: .$") as e:
            exits(count=9, head="linear", share=0.15)
        fits = int(str(e.value)[-1])
        assert resolved(count=fits, head="linear", share=0.15)["count"] == fits

    def test_no_place_at_all(self) -> None:
        with pytest.raises(DynamizeError, match="no cut point before its last layers"):
            convert(LongSkipNet(), [Exits()], LongSkipNet.shape)

    def test_a_second_step_is_refused(self) -> None:
        with pytest.raises(DynamizeError, match="step 2 is a second `exits`: merge it into step 1"):
            convert(small_resnet(), [Exits(), Exits()], SmallResNet.shape)
        with pytest.raises(DynamizeError, match="second `exits`"):
            convert(exits(at=["stem"]), [Exits()], SmallResNet.shape)


class TestSizes:
    @pytest.mark.parametrize(("head", "share"), [("linear", 0.1), ("conv", 0.3), ("conv", 1.0), ("tail", 0.7)])
    def test_the_heads_stay_within_the_share(self, head: str, share: float) -> None:
        dynamic = exits(head=head, share=share, at=["layer1", "layer2"])
        spent = sum(head_macs(dynamic)) / total()
        assert 0 < spent <= share

    def test_auto_widths_are_the_widest_that_fit(self) -> None:
        found = resolved(head="conv", share=0.5, at=["layer1", "layer2"])
        assert all(width % 16 == 0 for width in found["size"])
        for k in range(2):  # each head has an equal part: 16 channels more do not fit into it
            wider = [width + 16 * (j == k) for j, width in enumerate(found["size"])]
            heads = head_macs(exits(head="conv", at=found["at"], size=wider))
            assert heads[k] / total() > 0.25

    def test_auto_tails_are_the_deepest_that_fit(self) -> None:
        found = resolved(head="tail", share=0.9, at=["layer1", "layer2"])
        assert found["size"][0] == found["size"][1] > 0
        with pytest.raises(DynamizeError, match=r"heads cost .* more than share: 0\.45"):
            exits(head="tail", share=0.45, at=found["at"], size=[1, 1])

    def test_widths_that_are_given_are_taken(self) -> None:
        dynamic = exits(head="conv", at=["layer1", "layer2"], size=[24, 8])
        assert [piece.head.classifier[2].in_features for piece in dynamic.leaving] == [24, 8]

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (
                {"share": 1e-5},
                r"only 0 cut points take a conv head within share: 1e-05\. Raise share, use head: linear",
            ),
            ({"share": 1e-6, "head": "linear"}, "only 0 cut points take a linear head within share: 1e-06"),
            (
                {"share": 1e-5, "at": ["stem"]},
                r"the conv heads cost .*%.* more than share: 1e-05\. Raise share, .*linear",
            ),
            ({"at": ["layer1"], "pool": [2, 2]}, "pool has 2 entries for 1 exits; give one for each"),
            ({"at": ["layer1"], "size": [16, 16]}, "size has 2 entries for 1 exits; give one for each"),
            ({"at": ["layer1"], "size": [0]}, "a conv head needs a size of at least 1 channel"),
            ({"at": ["layer2", "layer1"], "size": [16, 8]}, "in the order of execution, which is"),
        ],
    )
    def test_refusals(self, fields: dict, message: str) -> None:
        with pytest.raises(DynamizeError, match=message):
            exits(**fields)

    @pytest.mark.parametrize(
        "fields", [{"at": []}, {"size": [-1]}, {"count": 0}, {"share": 0}, {"share": 1.5}, {"heads": "conv"}]
    )
    def test_values_that_no_network_allows(self, fields: dict) -> None:
        with pytest.raises(ValidationError):
            Exits.model_validate(fields)


class TestNarrowShares:
    """Convolutional heads fit their part wherever they are put."""

    @pytest.mark.parametrize("share", [0.3, 0.1, 0.03])
    @pytest.mark.parametrize("at", [["stem"], ["stem", "layer1.0", "layer2"]])
    @pytest.mark.parametrize("chain", [False, True])
    @pytest.mark.fast("False-at0-0.1", "False-at1-0.03", "True-at0-0.03", "True-at1-0.1")
    def test_by_hand(self, share: float, at: list[str], chain: bool) -> None:
        dynamic = exits(at=at, share=share, chain=chain)
        assert sum(head_macs(dynamic)) <= share * total() * 1.0001
        assert replay(small_resnet(), dynamic.history, SmallResNet.shape).history == dynamic.history

    @pytest.mark.parametrize("head", ["linear", "conv"])
    @pytest.mark.fast("linear")
    def test_auto_leaves_out_places_whose_heads_do_not_fit(self, head: str) -> None:
        network = torchvision.models.mobilenet_v3_small(num_classes=10)
        dynamic = convert(network, [Exits(head=head, count=2)], (3, 224, 224))
        total = exit_costs(wrap(network, (3, 224, 224))).cumulative()[-1]
        assert sum(head_macs(dynamic)) <= 0.15 * total * 1.0001

    def test_a_head_of_16_channels_or_more_where_averaging_makes_room(self) -> None:
        found = resolved(at=["stem"], share=0.02)
        assert found["pool"][0] > 1
        assert found["size"][0] >= 16

    def test_pooling_that_is_given_is_taken(self) -> None:
        dynamic = exits(at=["stem"], size=[8], pool=[4])
        assert dynamic.leaving[0].head.body[0].kernel_size == 4


def test_heads_of_artifacts_of_version_1_average_nothing() -> None:
    step = resolved(at=["layer1"], size=[8])
    old = {name: value for name, value in step.items() if name not in ("pool", "budgets", "version")}
    assert parse_step(old).describe() == step


STEPS = [
    {"head": "linear", "count": 2, "share": 0.15},
    {"head": "conv", "count": 3, "share": 0.4, "chain": True, "confidence": "entropy"},
    {"head": "tail", "at": ["layer1", "layer2.0"], "share": 1.0, "chain": True},
]


@pytest.mark.parametrize("fields", STEPS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.fast("False-fields0", "True-fields1")
def test_history_and_state_rebuild_the_network_without_data(fields: dict, training: bool) -> None:
    first = exits(**fields)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    fresh = SmallResNet().train(training)  # another initialisation, and the mode a factory leaves it in
    second = replay(fresh, first.history, SmallResNet.shape)
    assert second.training == training
    second.load_state_dict(first.state_dict())
    assert second.history == first.history
    for one in (first, second):
        set_thresholds(one, [0.3] * len(first.leaving))
    images = torch.randn(9, *SmallResNet.shape)
    assert torch.equal(second.eval()(images), first(images))
    assert [piece.confidence for piece in second.leaving] == [piece.confidence for piece in first.leaving]


@pytest.mark.parametrize("fields", STEPS)
@pytest.mark.fast("fields0", "fields1")
def test_resolving_is_stable(fields: dict) -> None:
    once = resolved(**fields)
    assert "auto" not in (once["at"], once["size"])
    again = convert(small_resnet(), [parse_step(once)], SmallResNet.shape)
    assert again.history == [once]


def test_the_note_says_where_and_what_it_costs() -> None:
    step = Exits(at=["layer1", "layer2"], head="linear")
    note = step.apply(wrap(small_resnet(), SmallResNet.shape), Context()).notes[0]
    spent = sum(head_macs(exits(at=["layer1", "layer2"], head="linear"))) / total()
    assert f"layer1.1 ({cuts()['layer1.1'].macs / total():.0%} of MACs)" in note
    assert f"{spent:.1%} of the network" in note


def test_a_network_in_training_mode_keeps_its_statistics() -> None:
    network = randomise_norms(SmallResNet()).train()
    dynamic = convert(network, [Exits(at=["layer1"], head="tail", share=1.0)], SmallResNet.shape)
    found, original = dynamic.state_dict(), network.state_dict()
    own = {name.removeprefix("nets.main."): one for name, one in found.items() if name.startswith("nets.main.")}
    assert own.keys() == original.keys()
    for name, value in own.items():
        assert torch.equal(value, original[name]), name


def test_a_head_copied_from_the_network_is_not_shared_with_it() -> None:
    dynamic = exits(head="tail", at=["layer1"])
    pointers = [parameter.data_ptr() for parameter in dynamic.parameters()]
    assert len(set(pointers)) == len(pointers)


def test_classes_and_shape_come_from_the_network() -> None:
    dynamic = convert(ThreeLayer(), [Exits(at=["relu"], head="linear")], ThreeLayer.shape)
    assert [one.shape for one in dynamic.all_exits(torch.zeros(2, 3, 8, 8))] == [(2, 5), (2, 5)]
    assert dynamic.input_shape == (3, 8, 8)
