"""Means held while a simulated machine slows down and simulated images become harder."""

from typing import Any

import numpy as np
import pytest

from dynamize.calibration.controller import Controller
from dynamize.calibration.operating import OperatingPoint
from dynamize.errors import DynamizeError

EARLY, LATE = 1.0, 6.0  # cost of leaving at the first exit, and at the last
THRESHOLDS = (0.0, 0.15, 0.3, 0.5, 0.75, 1.0)


def difficulty(random: np.random.Generator, images: int, hardness: float) -> np.ndarray:
    """Uniform as calibration saw it; above 0 more of them are hard. An image leaves early below 1 - threshold."""
    return random.random(images) ** (1 / (1 + hardness))


def point(threshold: float, **fields: Any) -> OperatingPoint:
    cost = EARLY + (LATE - EARLY) * threshold
    given = {
        "name": f"macs-{threshold:.2f}",
        "thresholds": {"exit.1": threshold},
        "accuracy": 0.5 + threshold / 3,
        "accuracy_ci": (0.4, 0.9),
        "accuracy_drop": 0.0,
        "accuracy_drop_ci": (-0.1, 0.1),
        "macs": cost,
        "macs_ci": (cost, cost),
        "macs_ratio": cost / LATE,
        "latency_ms": cost,
        "exits": [1 - threshold, threshold],
        "images": 2000,
    }
    return OperatingPoint(**(given | fields))


POINTS = [point(one) for one in THRESHOLDS]


class World:
    """Runs batches at the controller's points, and remembers what each image cost."""

    def __init__(self, hold: Controller, batch: int, seed: int = 0) -> None:
        self.hold, self.batch, self.random = hold, batch, np.random.default_rng(seed)
        self.costs: list[float] = []

    def run(self, images: int, slowness: float = 1.0, hardness: float = 0.0) -> float:
        """Mean of what is held over these images."""
        before = len(self.costs)
        for _ in range(images // self.batch):
            threshold = self.hold.point.thresholds["exit.1"]
            hard = difficulty(self.random, self.batch, hardness)
            exits = (hard >= 1 - threshold).astype(np.int64)
            cost = slowness * np.where(exits, LATE, EARLY)
            if self.hold.held == "macs_ratio":
                cost = cost / LATE
            if self.hold.held == "last_share":
                cost = exits.astype(float)
            self.costs += cost.tolist()
            self.hold.saw(None if self.hold.held == "last_share" else float(cost.mean()), exits)
        return float(np.mean(self.costs[before:]))


@pytest.mark.parametrize("batch", [1, 8, 64, 700])
@pytest.mark.parametrize("wanted", [{"latency_ms": 2.9}, {"macs_ratio": 0.4}, {"last_share": 0.2}])
@pytest.mark.fast("wanted0-64", "wanted1-8", "wanted2-700", "wanted0-1")
def test_held_within_five_percent_while_images_become_harder(wanted: dict[str, float], batch: int) -> None:
    hold = Controller(POINTS, **wanted)
    world = World(hold, batch)
    (aim,) = wanted.values()
    settling, held = max(1500, 10 * batch), max(8000, 40 * batch)
    assert world.run(held) == pytest.approx(aim, rel=0.05)
    world.run(settling, hardness=1.5)
    assert world.run(held, hardness=1.5) == pytest.approx(aim, rel=0.05)
    world.run(settling)
    assert world.run(held) == pytest.approx(aim, rel=0.05)
    assert np.mean(world.costs) == pytest.approx(aim, rel=0.05)  # what the changes cost was paid back


@pytest.mark.parametrize("batch", [1, 32])
def test_held_within_five_percent_while_the_machine_slows_down(batch: int) -> None:
    hold = Controller(POINTS, latency_ms=2.9)
    world = World(hold, batch)
    for slowness in np.linspace(1.0, 2.0, 40):  # a battery that gets low
        world.run(320, slowness=slowness)
    assert np.mean(world.costs) == pytest.approx(2.9, rel=0.05)
    assert np.mean(world.costs[-3200:]) == pytest.approx(2.9, rel=0.05)
    assert hold.dearer == pytest.approx(2.0, rel=0.1)
    assert hold.notes == []


def test_any_mean_between_two_points_by_alternating() -> None:
    hold = Controller([point(0.0), point(1.0)], macs_ratio=0.5)
    world = World(hold, 8)
    assert world.run(16000) == pytest.approx(0.5, rel=0.02)


def test_time_of_points_that_state_none() -> None:
    hold = Controller([point(one, latency_ms=None) for one in THRESHOLDS], latency_ms=30.0)
    assert hold.point.name == "macs-0.00"
    world = World(hold, 16)
    world.run(1000, slowness=10.0)
    assert world.run(8000, slowness=10.0) == pytest.approx(30.0, rel=0.05)


def test_what_cannot_be_held_is_said_and_leaves_no_debt() -> None:
    hold = Controller(POINTS, latency_ms=2.9)
    world = World(hold, 16)
    assert world.run(4000, slowness=4.0) == pytest.approx(4.0, rel=0.05)
    assert "latency_ms=2.9 cannot be held: even at 'macs-0.00'" in hold.notes[-1]
    world.run(2500)
    assert world.run(4000) == pytest.approx(2.9, rel=0.05)
    assert hold.notes == []


def test_images_that_leave_elsewhere_are_noticed() -> None:
    hold = Controller(POINTS, macs_ratio=0.4)
    world = World(hold, 16)
    world.run(4000)
    assert hold.notes == []
    world.run(2000, hardness=1.5)
    assert "at the end, where calibration expects" in hold.notes[0] or "at 'exit.1', where" in hold.notes[0]
    world.run(2000)
    assert hold.notes == []


def test_images_like_those_of_calibration_raise_no_alarm() -> None:
    """The shares stated are themselves those of a sample; of 100 such, a twentieth may raise one in 20 windows."""
    alarms = 0
    for seed in range(100):
        random = np.random.default_rng(1000 + seed)
        stated = [(difficulty(random, 300, 0) >= 1 - one).mean() for one in THRESHOLDS]
        points = [point(one, exits=[1 - s, s], images=300) for one, s in zip(THRESHOLDS, stated, strict=True)]
        world = World(Controller(points, macs_ratio=0.4), 100, seed)
        noted = []
        for _ in range(20):
            world.run(500)
            noted += world.hold.notes
        alarms += bool(noted)
    assert alarms <= 10


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "0 wanted means"),
        ({"latency_ms": 1.0, "macs_ratio": 0.5}, "2 wanted means"),
        ({"latency_ms": 0}, "positive number"),
        ({"macs_ratio": -1.0}, "positive number"),
        ({"last_share": float("nan")}, "positive number"),
        ({"latency_ms": "5"}, "positive number"),
        ({"latency_ms": 1.0, "horizon": 0}, "no number of images"),
    ],
)
def test_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(DynamizeError, match=told):
        Controller(POINTS, **given)


@pytest.mark.parametrize("points", [None, [], POINTS[:1]])
def test_nothing_to_choose_from(points: Any) -> None:
    with pytest.raises(DynamizeError, match="leave nothing to choose from"):
        Controller(points, macs_ratio=0.5)


@pytest.mark.parametrize("mean", [None, 0, -1.0, float("nan"), "1"])
def test_no_mean_of_a_batch(mean: Any) -> None:
    with pytest.raises(DynamizeError, match="mean per image"):
        Controller(POINTS, latency_ms=2.0).saw(mean, [0])
