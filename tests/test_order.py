"""Which orders of steps can work: stated by kinds of steps, told by their names, the same as when names stated them."""

import re
from itertools import product

import pytest

import dynamize as dz
from dynamize.transform import Kind, check_order, of_kind, parse_step

# The rules as the first edition stated them, name by name.
GATES = {"skip_gates", "channel_gates", "spatial_sampling"}
NEEDED = {
    "calibrate": {"exits", *GATES},
    "fuse_gates": GATES,
    "hybrid_gates": GATES,
    "q_gates": GATES,
}
TO_BYTES, SOLVED = "quantize", "calibrate"
OF_GATES = {"distill", "hybrid_gates", "q_gates", "fuse_gates", TO_BYTES, SOLVED}
TOO_LATE_AFTER = {
    "calibrate": set[str](),
    "channel_gates": OF_GATES,
    "distill": {"recalibrate", TO_BYTES, SOLVED},
    "exits": {"distill", "hybrid_gates", "q_gates", TO_BYTES, SOLVED},
    "expand_branches": {
        *("channel_gates", "fuse_branches", "factorize", "prune", "hybrid_gates", "q_gates", TO_BYTES, SOLVED)
    },
    "factorize": {"channel_gates", TO_BYTES, SOLVED},
    "fold_batchnorm": {TO_BYTES, SOLVED},
    "fuse_branches": {"factorize", "prune", TO_BYTES, SOLVED},
    "fuse_gates": {TO_BYTES, SOLVED},
    "hybrid_gates": {"recalibrate", TO_BYTES, SOLVED},
    "prune": {"channel_gates", TO_BYTES, SOLVED},
    "q_gates": {"recalibrate", TO_BYTES, SOLVED},
    "quantize": set[str](),
    "recalibrate": {TO_BYTES, SOLVED},
    "skip_gates": OF_GATES,
    "spatial_sampling": OF_GATES,
}
ONCE = {"channel_gates", "exits", "quantize", "skip_gates", "spatial_sampling"}

STEPS = {name: parse_step({"pass": name}) for name in TOO_LATE_AFTER}


def refused_at(names: tuple[str, ...]) -> tuple[int, str] | None:
    """The number of the first step that was refused, and why; None for an order that was accepted."""
    for i, name in enumerate(names):
        earlier = set(names[:i])
        if name in NEEDED and not NEEDED[name] & earlier:
            return i + 1, "needs"
        if TOO_LATE_AFTER[name] & earlier:
            return i + 1, "comes after"
        if name in ONCE and name in earlier:
            return i + 1, "is a second"
    return None


def refused_now(names: tuple[str, ...]) -> tuple[int, str] | None:
    try:
        check_order([STEPS[name] for name in names])
    except dz.DynamizeError as error:
        [(number, why)] = re.findall(r"^step (\d+) (?:`\w+` )?(needs|comes after|is a second)", str(error))
        return int(number), why
    return None


@pytest.mark.parametrize("first", STEPS)
def test_three_steps_in_any_order(first: str) -> None:
    different = [
        names
        for length in range(3)
        for rest in product(STEPS, repeat=length)
        if refused_now(names := (first, *rest)) != refused_at(names)
    ]
    assert not different


@pytest.mark.parametrize(("first", "second"), product(STEPS, repeat=2))
def test_two_steps_behind_what_they_need(first: str, second: str) -> None:
    """Where nothing is missing, so that only their own order decides."""
    for gate in ("skip_gates", "channel_gates"):
        names = tuple(dict.fromkeys((gate, first))) + (second,)
        assert refused_now(names) == refused_at(names), names


def test_calibrate_may_follow_exits_of_an_earlier_conversion() -> None:
    check_order([dz.Calibrate()], done=["exits", "distill"])
    with pytest.raises(
        dz.DynamizeError, match="needs `cascade` or `exits` or `glance_focus` or `skip_gates` or `spatial_sampling` or"
    ):
        check_order([dz.Calibrate()])


def test_both_steps_are_named_by_their_places() -> None:
    with pytest.raises(dz.DynamizeError) as refused:
        check_order([dz.Distill()], done=["exits", "calibrate"])
    told = "step 3 `distill` comes after step 2 `calibrate`, which it would undo: move `distill` above `calibrate`"
    assert str(refused.value) == told


def test_steps_of_a_kind_come_with_the_gentlest_first() -> None:
    assert of_kind(Kind.ADDS_EXITS | Kind.ADDS_GATES) == [
        "cascade",
        "exits",
        "glance_focus",
        "skip_gates",
        "spatial_sampling",
        "channel_gates",
    ]
    assert of_kind(Kind.SOLVES) == ["calibrate"]
    assert of_kind(Kind(0)) == []
