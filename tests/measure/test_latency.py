"""The bookkeeping of interleaved timing, on a clock that the contenders themselves move."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from dynamize.measure import latency
from dynamize.measure.latency import Times, interleave

CPU = torch.device("cpu")


class Clock:
    def __init__(self) -> None:
        self.now, self.calls = 0.0, list[str]()

    def takes(self, name: str, *seconds: float) -> Callable[[torch.Tensor], None]:
        def contender(batch: torch.Tensor) -> None:
            done = self.calls.count(name)
            self.calls.append(name)
            self.now += seconds[min(done, len(seconds) - 1)] * len(batch)

        return contender


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(latency.time, "perf_counter", lambda: fake.now)
    return fake


def test_the_warm_up_round_is_not_counted_and_five_are(clock: Clock) -> None:
    contenders = {"static": clock.takes("static", 90.0, 2.0), "dynamic": clock.takes("dynamic", 50.0, 1.0)}
    times = interleave(contenders, [torch.zeros(1)], CPU, seconds=0)
    assert times.seconds["static"].shape == (5, 1)
    assert times.median_ms("static") == pytest.approx(2000)
    assert times.p95_ms("dynamic") == pytest.approx(1000)
    assert times.speedup("static", "dynamic") == pytest.approx(2)


def test_rounds_go_on_until_the_time_is_up(clock: Clock) -> None:
    times = interleave({"a": clock.takes("a", 1.0)}, [torch.zeros(1)], CPU, seconds=20)
    assert times.seconds["a"].shape == (9, 1)  # two calls a round, one of them to warm up


def test_a_turn_of_several_calls_begins_with_one_that_is_not_counted(clock: Clock) -> None:
    contenders = {n: clock.takes(n, 1.0) for n in ("a", "b")}
    times = interleave(contenders, [torch.zeros(1)] * 20, CPU, seconds=0)
    assert times.seconds["a"].shape == (5, 20)
    assert "".join(clock.calls).startswith("a" * 17 + "b" * 17 + "b" * 5 + "a" * 5)


def test_there_is_quiet_before_each_turn(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency.time, "sleep", lambda seconds: clock.calls.append(f"rest {seconds}"))
    interleave({n: clock.takes(n, 1.0) for n in ("a", "b")}, [torch.zeros(1)], CPU, seconds=0, rest=0.5)
    assert clock.calls[:6] == ["rest 0.5", "a", "a", "rest 0.5", "b", "b"]


def test_contenders_take_turns_in_rotating_order(clock: Clock) -> None:
    names = ["a", "b", "c"]
    interleave({n: clock.takes(n, 1.0) for n in names}, [torch.zeros(1)], CPU, seconds=0)
    calls = clock.calls[::2]  # each turn is the warm-up and one call
    turns = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert all(sorted(turn) == names for turn in turns)
    assert {turn[0] for turn in turns} == set(names)


def test_the_time_of_a_call_is_the_mean_over_inputs_and_the_median_over_rounds(clock: Clock) -> None:
    times = interleave({"a": clock.takes("a", 1.0)}, [torch.zeros(1), torch.zeros(3)], CPU, seconds=0)
    assert times.median_ms("a") == pytest.approx(2000)
    assert times.p95_ms("a") == pytest.approx(3000)


def test_one_disturbed_round_does_not_move_the_ratio() -> None:
    static, dynamic = np.full((5, 2), 2.0), np.full((5, 2), 1.0)
    dynamic[3] = 100.0
    assert Times({"s": static, "d": dynamic}, 0.0).speedup("s", "d") == 2


def test_foreign_load_is_reported() -> None:
    assert Times({}, 0.05).warnings() == []
    assert "1.3 cores" in Times({}, 1.3).warnings()[0]
