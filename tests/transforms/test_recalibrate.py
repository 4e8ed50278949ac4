"""`recalibrate`: what is kept and why, what comes back from an artifact, what is refused."""

from pathlib import Path

import pytest
import torch
from built import built_once
from digits import SHAPE
from gated_networks import scatter
from networks import SmallResNet, small_resnet
from pydantic import ValidationError
from torch import Tensor

from dynamize import artifact
from dynamize.conversion import apply, convert, replay, wrap
from dynamize.data import DataSpec, Splits, load_data
from dynamize.data.given import splits as splits_of
from dynamize.errors import DynamizeError
from dynamize.measure.accuracy import exit_accuracies
from dynamize.models import create
from dynamize.nn.network import DynamicNetwork, record_routing
from dynamize.transform import Context, check_order
from dynamize.transforms import Calibrate, ChannelGates, Distill, Recalibrate, SkipGates, recalibrate

CPU = torch.device("cpu")


@built_once
def gated() -> DynamicNetwork:
    gates = ChannelGates(groups=2, multiple=4, keep_first=False)
    return scatter(convert(small_resnet(), [gates], SmallResNet.shape), images(64))


def images(count: int) -> Tensor:
    return torch.randn(count, *SmallResNet.shape, generator=torch.Generator().manual_seed(count))


def splits() -> Splits:
    sizes = {"train": 200, "calibration": 50, "test": 51}
    return splits_of(**{name: [(images(count), torch.arange(count) % 7)] for name, count in sizes.items()})


def judged(monkeypatch: pytest.MonkeyPatch, *accuracies: float) -> None:
    """The accuracies as they were, recalibrated, and for each width."""
    left = [recalibrate._Judgement(accuracy, 0.5) for accuracy in accuracies]
    monkeypatch.setattr(recalibrate, "_judge", lambda *_: left.pop(0))


def copied(network: DynamicNetwork) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def equal(network: DynamicNetwork, state: dict[str, Tensor]) -> bool:
    found = network.state_dict()
    return found.keys() == state.keys() and all(torch.equal(tensor, state[name]) for name, tensor in found.items())


@pytest.mark.parametrize(
    ("accuracies", "kept"),
    [
        ((0.5, 0.4, 0.501), "widths"),
        ((0.5, 0.502, 0.501), "recalibrated"),
        ((0.5, 0.501, 0.501), "recalibrated"),
        ((0.5, 0.5, 0.5), "shared"),
        ((0.5, 0.4, 0.3), "shared"),
    ],
)
@pytest.mark.fast("accuracies0-widths", "accuracies2-recalibrated", "accuracies3-shared")
def test_the_best_statistics_are_kept(accuracies: tuple, kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    judged(monkeypatch, *accuracies)
    network, batch = gated(), images(8)
    state = copied(network)
    tuned, notes = apply(network, Recalibrate(images=150), Context(data=splits()))
    assert tuned.history[-1] == {
        "pass": "recalibrate",
        "version": 1,
        "images": 150,
        "augment": True,
        "statistics": kept,
    }
    assert [unit.has_own for unit in tuned.changing] == [kept == "widths"] * len(tuned.changing)
    assert equal(tuned, state) == (kept == "shared")
    assert (tuned.state_dict().keys() == state.keys()) == (kept != "widths")
    assert len(set(tuned.state_dict()) - set(state)) == (2 * 2 * len(tuned.changing) if kept == "widths" else 0)
    with torch.no_grad():
        assert torch.equal(tuned(batch), gated()(batch)) == (kept == "shared")
    figures = [f"{accuracy:.2%} at 0.500 of the MACs" for accuracy in accuracies]
    name = {"shared": "as they were", "recalibrated": "recalibrated", "widths": "for each width by itself"}[kept]
    assert notes[0] == (
        f"calibration accuracy with batch-norm statistics from 150 train images: {figures[0]} as they were, "
        f"{figures[1]} recalibrated, {figures[2]} for each width by itself; kept {name}"
    )


@pytest.mark.parametrize("statistics", ["recalibrated", "widths"])
@pytest.mark.fast("recalibrated")
def test_each_is_estimated_from_where_the_network_stood(statistics: str, monkeypatch: pytest.MonkeyPatch) -> None:
    judged(monkeypatch, 0.1, 0.9 if statistics == "recalibrated" else 0.1, 0.8)
    among_others, _ = apply(gated(), Recalibrate(images=100), Context(data=splits()))
    judged(monkeypatch, 0.9, 0.1)
    alone, notes = apply(gated(), Recalibrate(images=100, statistics=statistics), Context(data=splits()))
    assert equal(alone, among_others.state_dict())
    assert notes[0].split("; kept ")[1] in notes[0].split(", ")[1]


def test_a_second_step_may_fall_back_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    judged(monkeypatch, 0.5, 0.5, 0.6, 0.6, 0.5, 0.5)
    once, _ = apply(gated(), Recalibrate(images=100), Context(data=splits()))
    state = copied(once)
    twice, _ = apply(once, Recalibrate(images=50), Context(data=splits()))
    assert equal(twice, state)
    assert all(unit.has_own for unit in twice.changing)


def test_shared_leaves_everything_as_it_is() -> None:
    network = gated()
    state = copied(network)
    same, notes = apply(network, Recalibrate(statistics="shared"), Context(data=splits()))
    assert equal(same, state)
    assert notes == []


def test_it_repairs_a_network_that_was_not_trained_for_its_widths() -> None:
    """The trained digits network with all gates at half of the channels, whose sums the shared statistics miss."""
    data = load_data(DataSpec(source="digits", normalize=((0.305,), (0.376,))), SHAPE, 10)
    gates = ChannelGates(groups=2, multiple=2)
    network = convert(create("digits_resnet", pretrained=True).eval(), [gates], SHAPE)
    with torch.no_grad():
        for unit in network.changing:
            unit.gate.linear.bias.copy_(torch.tensor([5.0, 0.0]))
    (before,) = exit_accuracies(network, data.calibration, CPU)
    tuned, notes = apply(network, Recalibrate(images=500, statistics="widths"), Context(data=data))
    (after,) = exit_accuracies(tuned, data.calibration, CPU)
    assert after > before + 0.05
    assert f"images: {before:.2%} at" in notes[0]
    assert f", {after:.2%} at" in notes[0]
    with torch.no_grad(), record_routing(tuned) as routing:
        tuned(next(iter(data.test.batches(50)))[0])
    assert (routing.choices == 0).all()


@pytest.mark.parametrize("statistics", ["shared", "recalibrated", "widths"])
@pytest.mark.fast("widths")
def test_history_and_weights_rebuild_the_network(statistics: str, tmp_path: Path) -> None:
    network, _ = apply(gated(), Recalibrate(statistics=statistics), Context(data=splits()))
    artifact.save(network, tmp_path)
    again = artifact.load(tmp_path, network=SmallResNet())
    batch = images(9)
    with torch.no_grad(), record_routing(network) as first, record_routing(again) as second:
        assert torch.equal(network(batch), again(batch))
    assert torch.equal(first.choices, second.choices)
    rebuilt = replay(SmallResNet(), network.history, SmallResNet.shape)
    assert rebuilt.state_dict().keys() == network.state_dict().keys()
    assert [unit.has_own for unit in rebuilt.changing] == [statistics == "widths"] * len(network.changing)


def test_skip_gates_have_no_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    judged(monkeypatch, 0.5, 0.6)
    network = scatter(convert(small_resnet(), [SkipGates(group=1)], SmallResNet.shape), images(64))
    before = network.state_dict()["nets.main.stem.1.running_mean"].clone()
    tuned, notes = apply(network, Recalibrate(), Context(data=splits()))
    assert not torch.equal(tuned.state_dict()["nets.main.stem.1.running_mean"], before)
    assert notes == [
        "calibration accuracy with batch-norm statistics from 200 train images: 50.00% at 0.500 of the MACs as they "
        "were, 60.00% at 0.500 of the MACs recalibrated; kept recalibrated"
    ]


def test_paths_that_few_images_take_are_counted() -> None:
    network = gated()
    with torch.no_grad():
        for unit in network.changing:
            unit.gate.linear.bias.copy_(torch.tensor([0.0, 1e6]))
    _, notes = apply(network, Recalibrate(statistics="widths"), Context(data=splits()))
    assert (
        notes[1]
        == f"{len(network.changing)} paths that few of these images take have their statistics from all of them"
    )


def test_judgements_are_means_over_exits() -> None:
    network = wrap(small_resnet(), SmallResNet.shape)
    data = splits()
    (accuracy,) = exit_accuracies(network, data.calibration, CPU)
    found = recalibrate._judge(network, data.calibration, CPU)
    assert (found.accuracy, found.macs_ratio) == (accuracy, 1.0)
    assert 0 < recalibrate._judge(gated(), data.calibration, CPU).macs_ratio < 1


def test_refusals() -> None:
    with pytest.raises(DynamizeError, match="no channel gates, so there are no widths .*statistics: recalibrated"):
        apply(
            convert(small_resnet(), [SkipGates(group=1)], SmallResNet.shape),
            Recalibrate(statistics="widths"),
            Context(),
        )
    with pytest.raises(DynamizeError, match="`recalibrate` needs images"):
        apply(gated(), Recalibrate(), Context())
    with pytest.raises(DynamizeError, match="move `recalibrate` above `calibrate`"):
        check_order([ChannelGates(), Calibrate(), Recalibrate()])
    check_order([ChannelGates(), Distill(), Recalibrate(), Calibrate()])
    with pytest.raises(ValidationError):
        Recalibrate.model_validate({"images": 0})
