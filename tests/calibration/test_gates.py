"""Operating points of gates: the best offset within a limit, refined, and what they promise is what is executed."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gated_networks import scatter

from dynamize.calibration import collect as collecting
from dynamize.calibration.asking import EVERYONE_ASKED, Asking
from dynamize.calibration.collect import TableMaker
from dynamize.calibration.offsets import OFFSETS, OffsetTables, best_point, calibrate, curve
from dynamize.calibration.points import point_for_budget, point_for_drop
from dynamize.calibration.table import ConfidenceTable
from dynamize.conversion import apply, convert
from dynamize.data import DataSpec, Splits, load_data
from dynamize.errors import DynamizeError
from dynamize.graph.macs import count_macs
from dynamize.measure.accuracy import routed_answers, top_answers
from dynamize.measure.costs import exit_costs
from dynamize.models import create
from dynamize.nn.gates import ALL_OPEN
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting
from dynamize.runtime.profile import OptionTimes
from dynamize.transform import Context
from dynamize.transforms import Calibrate, Exits, SkipGates

CPU = torch.device("cpu")
SHAPE = (1, 8, 8)
IMAGES = 1000
STATIC = 1e6


class FakeMaker:
    """At offset o an image costs 0.6 + 0.1 o of the original network, and the hardest are answered wrongly until
    all gates are open: 5 % at offset 0, one more for each quarter below."""

    def __init__(self, units: int = 2) -> None:
        self.network: Any = SimpleNamespace(changing=[None] * units)
        self.made: list[float] = []

    def table(self, offset: float, asking: Asking = EVERYONE_ASKED) -> ConfidenceTable:
        self.made.append(offset)
        cost = min(1.02, max(0.2, 0.6 + 0.1 * offset)) * STATIC
        wrong = 0 if offset == ALL_OPEN else int(np.clip(50 - 40 * offset, 0, IMAGES))
        answers = np.zeros((1, IMAGES), dtype=np.int64)
        answers[0, :wrong] = 1
        labels = np.zeros(IMAGES, dtype=np.int64)
        costs = {"macs": np.array([cost])}
        each = {"macs": np.full((1, IMAGES), cost)}
        return ConfidenceTable(
            np.zeros((1, IMAGES)), answers, labels, labels, costs, {"macs": STATIC}, image_costs=each
        )


def within_drop(drop: float) -> Any:
    return lambda table: point_for_drop(table, 100 * drop)


def within_budget(ratio: float) -> Any:
    return lambda table: point_for_budget(table, ratio * STATIC)


def test_tables_are_made_once_at_their_offset() -> None:
    maker = FakeMaker()
    tables = OffsetTables(maker)
    assert tables.at(-1.0) is tables.at(-1.0)
    tables.at(1.0)
    assert maker.made == [-1.0, 1.0]
    assert tables.offsets() == sorted(OFFSETS)
    assert OffsetTables(FakeMaker(units=0)).offsets() == [0.0]


def test_a_table_that_fails_is_not_kept() -> None:
    maker = FakeMaker()
    tables, right = OffsetTables(maker), maker.table

    def fail(offset: float, asking: Asking = EVERYONE_ASKED) -> ConfidenceTable:
        raise DynamizeError("scores contain NaN")

    maker.table = fail  # type: ignore[method-assign]
    with pytest.raises(DynamizeError):
        tables.at(-1.0)
    maker.table = right  # type: ignore[method-assign]
    tables.at(-1.0)
    assert maker.made == [-1.0]


@pytest.mark.parametrize(
    ("drop", "offset"),
    [
        (0.06, -0.25),  # 60 wrong: a point of the grid
        (0.0583, -0.1875),  # between 0 and -0.25: halved twice towards the limit
        (0.0, 1.25),  # none wrong from 1.25 on, which two halvings of the grid find
    ],
)
def test_the_cheapest_within_a_drop_is_refined_towards_the_limit(drop: float, offset: float) -> None:
    point = best_point(OffsetTables(FakeMaker()), within_drop(drop), cheapest=True)
    assert point.offset == offset
    assert point.accuracy_drop <= drop + 1e-9
    assert point.macs == pytest.approx((0.6 + 0.1 * point.offset) * STATIC)


@pytest.mark.parametrize(("ratio", "offset"), [(0.6, 0.0), (0.57, -0.3125), (0.616, 0.125), (2.0, 1.25)])
def test_the_most_accurate_within_a_budget(ratio: float, offset: float) -> None:
    point = best_point(OffsetTables(FakeMaker()), within_budget(ratio), cheapest=False)
    assert point.offset == offset
    assert point.macs <= ratio * STATIC


def test_limits_that_no_offset_meets() -> None:
    with pytest.raises(DynamizeError, match="macs_ratio: 0.2 or more"):  # that of the cheapest
        best_point(OffsetTables(FakeMaker()), within_budget(0.1), cheapest=False)
    maker = FakeMaker()
    perfect = maker.table

    def worse(offset: float, asking: Asking = EVERYONE_ASKED) -> ConfidenceTable:
        table = perfect(offset)
        answers = table.answers.copy()
        answers[0, -100:] = 1
        return ConfidenceTable(table.scores, answers, table.labels, table.reference, table.costs, table.static_cost)

    maker.table = worse  # type: ignore[method-assign]
    with pytest.raises(
        DynamizeError, match=r"least expected drop is 10\.00 points.*max_drop: 10 or more"
    ):  # that of all gates open
        best_point(OffsetTables(maker), within_drop(0.05), cheapest=True)


def test_a_network_without_gates_has_points_of_no_offset() -> None:
    maker = FakeMaker(units=0)
    point = best_point(OffsetTables(maker), within_budget(0.7), cheapest=False)
    assert point.offset == 0.0
    assert maker.made == [0.0]
    assert all(one.offset == 0.0 for one in curve(OffsetTables(FakeMaker(units=0)), 5, seed=0))


def test_the_curve_rises_in_both_and_has_an_offset_each() -> None:
    points = curve(OffsetTables(FakeMaker()), 6, seed=0)
    assert 2 <= len(points) <= 6
    assert len({point.name for point in points}) == len(points)
    for cheaper, dearer in zip(points, list(points)[1:], strict=False):
        assert cheaper.macs < dearer.macs
        assert cheaper.accuracy < dearer.accuracy
    for point in points:
        assert point.offset in OFFSETS
        assert point.name == f"macs-{point.macs_ratio:.2f}"
    assert points[0].offset == -4.0
    assert points[len(points) - 1].accuracy == 1.0


@pytest.fixture(scope="module")
def splits() -> Splits:
    spec = DataSpec(source="digits", normalize=((0.305,), (0.376,)), calibration=200, train_limit=100, test_limit=100)
    return load_data(spec, SHAPE, 10)


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up times: each exit a millisecond more, each path of a unit as well."""

    def exits(network: DynamicNetwork, *_: object) -> tuple[np.ndarray, float]:
        return 1.0 + np.arange(network.exit_count), float(network.exit_count)

    def options(network: DynamicNetwork, *_: object) -> OptionTimes:
        return OptionTimes({unit.name: [0.0, 0.1] for unit in network.changing}, 1.0, 1.0)

    monkeypatch.setattr(collecting, "exit_latency", exits)
    monkeypatch.setattr(collecting, "option_latency", options)


def gated_digits(splits: Splits, exits: bool) -> DynamicNetwork:
    steps: list[Any] = [Exits(at=["layer1", "layer2"], head="linear")] if exits else []
    network = convert(create("digits_resnet", pretrained=True).eval(), [*steps, SkipGates(group=1)], SHAPE)
    batch, _ = next(iter(splits.calibration.batches(200)))
    return scatter(network, batch)


TEACHER = create("digits_resnet", pretrained=True).eval()


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("exits", [False, True])
@pytest.mark.fast("True")
def test_what_a_table_says_is_executed(splits: Splits, exits: bool) -> None:
    network = gated_digits(splits, exits)
    maker = TableMaker(network, splits.calibration, TEACHER, CPU, "eager")
    costs = exit_costs(network)
    for offset in (-1.0, 0.0, 1.5, ALL_OPEN):
        table = OffsetTables(maker).at(offset)
        thresholds = [float(np.median(scores)) for scores in table.scores[:-1]]
        network.setting = Setting(dict(zip(table.names, thresholds, strict=True)), offset)
        found, labels, _, routing = routed_answers(network, splits.calibration, CPU)
        taken = table.route(thresholds)
        assert routing.exits.tolist() == taken.tolist()
        executed = costs.executed(routing.taken, routing.images)
        assert np.allclose(executed, table.spent("macs", thresholds, taken), rtol=1e-12)
        expected = table.evaluate(thresholds)
        assert expected.cost == pytest.approx(executed.mean(), rel=1e-12)
        assert expected.accuracy == pytest.approx(float((found == labels).double().mean()))
        batch, _ = next(iter(splits.calibration.batches(200)))
        assert count_macs(network, batch) == pytest.approx(executed.sum(), rel=1e-12)
        skipped = (routing.choices == 0).sum(1).numpy()
        if not exits:
            assert np.allclose(table.spent("ms", thresholds, taken), 1.0 - 0.1 * skipped)


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("exits", [False, True])
@pytest.mark.fast("False")
def test_calibrating_moves_the_network_to_a_point_that_keeps_its_promise(splits: Splits, exits: bool) -> None:
    network = gated_digits(splits, exits)
    step, context = Calibrate(macs_ratio=0.6, points=5), Context(data=splits, teacher=TEACHER)
    calibrated, _ = apply(network, step, context)
    point = calibrated.operating_point
    assert point is not None
    assert point.macs_ratio <= 0.6 + 1e-9
    assert calibrated.setting == Setting(point.thresholds, point.offset)
    assert list(point.thresholds) == [piece.name for piece in calibrated.leaving]
    points = calibrated.operating_points
    assert points is not None
    assert points["chosen"] == point
    assert len({one.offset for one in points}) > 1
    assert [one.macs for one in points] == sorted(one.macs for one in points)
    _, _, _, routing = routed_answers(calibrated, splits.calibration, CPU)
    costs = exit_costs(calibrated)
    executed = costs.executed(routing.taken, routing.images).mean()
    assert point.macs_ci[0] <= executed <= point.macs_ci[1] or executed == pytest.approx(point.macs, rel=0.05)
    again, _ = apply(calibrated, Calibrate(macs_ratio=0.8, points=2), context)
    assert again.operating_point is not None
    assert point.macs_ratio < again.operating_point.macs_ratio <= 0.8 + 1e-9


@pytest.mark.usefixtures("untimed")
def test_a_budget_below_all_gates_closed(splits: Splits) -> None:
    network = gated_digits(splits, exits=False)
    with pytest.raises(DynamizeError, match="macs_ratio: 0"):
        apply(network, Calibrate(macs_ratio=0.01), Context(data=splits, teacher=TEACHER))
    assert network.setting == Setting()


@pytest.mark.usefixtures("untimed")
def test_from_python_with_the_users_own_loader(splits: Splits) -> None:
    network = gated_digits(splits, exits=False)
    network.setting = stands = Setting(offset=-0.5)
    points = calibrate(network, list(splits.calibration.batches(50)), TEACHER, count=4)
    assert network.operating_points == points
    assert network.setting is stands
    assert stands == Setting(offset=-0.5)
    assert len({point.offset for point in points}) > 1
    network.set_operating_point(points[0])
    assert network.setting.offset == points[0].offset


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize(("exits", "judging"), [(False, 1.0), (True, 0.6)])
@pytest.mark.fast("False-1.0")
@pytest.mark.slow
def test_limits_of_gated_networks_are_certified(splits: Splits, exits: bool, judging: float) -> None:
    network = gated_digits(splits, exits)
    context = Context(data=splits, teacher=TEACHER)
    calibrated, notes = apply(network, Calibrate(max_drop=60, certain=0.9, points=3), context)
    point = calibrated.operating_point
    assert point is not None
    assert point.certified is not None
    assert point.certified.max_drop == 0.6
    assert point.certified.images == pytest.approx(judging * len(splits.calibration), abs=1)
    assert calibrated.setting == Setting(point.thresholds, point.offset)
    assert point.accuracy_drop < 0.6
    assert any(note.startswith("certified: a drop of 60.00 points at most, with 90%") for note in notes)
    assert any(note.startswith("`exits` may have chosen") for note in notes) == exits
    assert calibrated.operating_points is not None
    assert [one.certified is not None for one in calibrated.operating_points].count(True) == 1
    cheaper, _ = apply(calibrated, Calibrate(macs_ratio=0.8, certain=0.9, points=2), context)
    assert cheaper.operating_point is not None
    assert cheaper.operating_point.certified is not None
    assert cheaper.operating_point.certified.macs is not None
    assert cheaper.operating_point.macs < cheaper.operating_point.certified.macs


@pytest.mark.usefixtures("untimed")
def test_without_labels_the_original_network_is_what_answers_are_held_to(splits: Splits) -> None:
    network = gated_digits(splits, exits=True)
    calibrated, notes = apply(network, Calibrate(max_drop=30, labels="none", points=3), Context(splits, TEACHER))
    point = calibrated.operating_point
    assert point is not None
    assert point.labels == "none"
    found, *_ = routed_answers(calibrated, splits.calibration, CPU)
    original, _ = top_answers(TEACHER, splits.calibration, CPU)
    assert float((found != original).double().mean()) == pytest.approx(point.accuracy_drop, abs=0.05)
    assert any("differs from the original network's" in note for note in notes)
