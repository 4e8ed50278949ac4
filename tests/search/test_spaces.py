"""Spaces: how many networks there are, what is drawn, and that all of it may be built."""

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
import torch

from dynamize.errors import DynamizeError
from dynamize.graph.macs import count_macs
from dynamize.models.regnet import AnyNet, Stage
from dynamize.search.regnets import AnyNetSpace, RegNetSpace, macs, network
from dynamize.search.spaces import Knob, Space, sample_within
from dynamize.sources import source

RUNGS = "ABCDE"


class Stairs(Space):
    """Three steps of four heights, none lower than the one before, and a colour."""

    knobs = {**{name: Knob([1, 2, 4, 8], log=True) for name in "abc"}, "colour": Knob(["red", "green"])}
    rising = ["abc"]

    def describe(self, choice: Any) -> str:
        return "-".join(str(choice[name]) for name in "abc") + choice["colour"]


def every(space: Space) -> list[dict[str, Any]]:
    """All that count, found by walking from one."""
    first = space.sample(Random(0))
    known, waiting = {space.describe(first): first}, [first]
    while waiting:
        for other in space.neighbours(waiting.pop()):
            if space.describe(other) not in known:
                known[space.describe(other)] = other
                waiting.append(other)
    return list(known.values())


def test_size_is_how_many_there_are() -> None:
    found = every(Stairs())
    assert len(found) == Stairs().size == 20 * 2
    assert all(one["a"] <= one["b"] <= one["c"] for one in found)


def test_published_sizes() -> None:
    sizes = [AnyNetSpace(rung).size for rung in RUNGS]
    assert sizes[0] == (16 * 128 * 3 * 6) ** 4
    assert [f"{size:.1e}" for size in sizes] == ["1.8e+18", "6.8e+16", "3.2e+14", "1.4e+13", "8.2e+11"]


def test_small_values_are_drawn_as_often_as_large_ones() -> None:
    knob, generator = Knob(range(1, 65), log=True), Random(0)
    drawn = [knob.sample(generator) for _ in range(4000)]
    assert 0.4 < sum(value < 8 for value in drawn) / len(drawn) < 0.6  # a half: 1 to 8 is three doublings of six


@pytest.mark.parametrize("rung", RUNGS)
def test_stages_are_tied_as_the_rung_says(rung: Any) -> None:
    space, generator = AnyNetSpace(rung, most_depth=4, most_width=64), Random(3)
    for choice in (space.sample(generator) for _ in range(20)):
        stages = space.stages(choice)
        assert all(stage.inner % stage.group_width == 0 for stage in stages)
        assert rung < "B" or len({stage.bottleneck for stage in stages}) == 1
        assert rung < "C" or "g" in choice
        assert rung < "D" or _rises([choice[f"w{k}"] for k in range(1, 5)])
        assert rung < "E" or _rises([stage.depth for stage in stages])


@pytest.mark.parametrize("space", [AnyNetSpace("A", most_depth=2, most_width=32), RegNetSpace()])
def test_what_is_described_is_what_is_built(space: Any) -> None:
    generator = Random(1)
    for _ in range(2):
        choice = space.sample(generator)
        with torch.device("meta"):
            built = network(space, choice, num_classes=1000)
            told = source(space.describe(choice))
        assert built.stages == told.stages
        assert len(built.stages) == 4


@pytest.mark.parametrize("squares", [(32, 1), (64, 2)])
def test_macs_are_those_of_the_network(squares: tuple[int, int]) -> None:
    side, stride = squares
    space, generator = AnyNetSpace("A", most_depth=3, most_width=64), Random(7)
    for _ in range(3):
        stages = space.stages(space.sample(generator))
        with torch.device("meta"):
            counted = count_macs(AnyNet(stages, stem_stride=stride), torch.zeros(1, 3, side, side))
        assert macs(stages, side, stem_stride=stride) == counted


def test_costs_within_a_range() -> None:
    space, generator = AnyNetSpace("E", most_depth=3, most_width=64), Random(0)

    def cost(choice: Any) -> float:
        return macs(space.stages(choice), 32, stem_stride=1)

    found = [sample_within(space, cost, 4e6, 6e6, generator) for _ in range(3)]
    assert all(4e6 <= cost(one) <= 6e6 for one in found)
    with pytest.raises(DynamizeError, match="allow a wider range"):
        sample_within(Stairs(), lambda _: 1.0, 2.0, 3.0, generator)


def test_an_unknown_rung_is_refused() -> None:
    with pytest.raises(DynamizeError, match="'F' is no rung"):
        AnyNetSpace("F")  # type: ignore[arg-type]


def _rises(values: Sequence[Any]) -> bool:
    return list(values) == sorted(values)


def test_neighbours_differ_in_one_knob() -> None:
    space = AnyNetSpace("C", most_depth=4, most_width=64)
    choice = space.sample(Random(5))
    found = space.neighbours(choice)
    assert found
    assert all(sum(one[name] != choice[name] for name in choice) == 1 for one in found)
    assert all(isinstance(stage, Stage) for one in found for stage in space.stages(one))
