"""What is said of each step: MACs that the clock does not show, and costs that bought nothing."""

import pytest

from dynamize.report import Ledger, Row, share_of_saving_shown, verdicts


def with_row(ledger: Ledger, **changes: object) -> Ledger:
    """The static row and one row that differs from the calibrated one by `changes`."""
    changed = ledger.rows[4].model_dump() | {"step": 1, "transform": "gates"} | changes
    return Ledger(rows=[ledger.rows[0], Row.model_validate(changed)])


@pytest.mark.parametrize(
    ("ratio", "speedup", "share"), [(0.5, 2.0, 1.0), (0.6, 1.0, 0.0), (0.5, 0.8, -0.5), (0.6, 1.25, 0.5)]
)
def test_share_of_saving_shown(ratio: float, speedup: float, share: float) -> None:
    assert share_of_saving_shown(ratio, speedup) == pytest.approx(share)


def test_no_share_where_nothing_was_saved() -> None:
    assert share_of_saving_shown(1.0, 1.3) is None


@pytest.mark.parametrize(
    ("speedup", "said"),
    [
        ({"1": 1 / 0.97}, ["3 % of the time at batch 1"]),
        ({"1": 1.0}, ["none of the time at batch 1"]),
        ({"1": 0.8}, ["is 25 % slower at batch 1"]),
        ({"64": 1 / 0.9, "1": 0.8}, ["is 25 % slower at batch 1 and 10 % of the time at batch 64"]),
        ({"1": 1.5, "64": 1.1}, ["9 % of the time at batch 64"]),
        ({"1": 1.5, "64": 1.6}, []),
    ],
)
def test_verdict_on_one_step(ledger: Ledger, speedup: dict[str, float], said: list[str]) -> None:
    changed = with_row(ledger, macs=0.6 * ledger.rows[0].macs, speedup={"onnxruntime": speedup})
    expected = [f"Step 1, gates: saves 40 % of MACs but {part} in onnxruntime." for part in said]
    assert verdicts(changed) == expected


def test_untimed_saving_is_said_to_be_untimed(ledger: Ledger) -> None:
    untimed = with_row(ledger, macs=0.6 * ledger.rows[0].macs, speedup={}, latency={})
    assert verdicts(untimed) == ["Step 1, gates: saves 40 % of MACs, but its time was not measured."]


def test_step_is_judged_by_its_own_change_and_the_run_as_a_whole(ledger: Ledger) -> None:
    assert [line.split(":")[0] for line in verdicts(ledger)] == ["Step 3, skip_gates"]
    slow = {"onnxruntime": {"1": 0.6, "64": 0.6}}
    rows = [row.model_copy(update={"speedup": slow}) if row.step in (1, 2, 3) else row for row in ledger.rows]
    rows[4] = rows[4].model_copy(update={"speedup": {"onnxruntime": {"1": 1.1, "64": 1.1}}})
    assert verdicts(Ledger(rows=rows))[-1] == (
        "All steps together: saves 43 % of MACs but 9 % of the time at batch 1 "
        "and 9 % of the time at batch 64 in onnxruntime."
    )


def after(*changes: dict[str, object]) -> list[str]:
    """Verdicts on steps 1, 2, ... that differ by ``changes`` from a static row of 10 000 test images."""
    static: dict[str, object] = {
        "step": 0,
        "transform": "static",
        "params": 100,
        "macs": 1e6,
        "macs_worst": 1e6,
        "macs_ratio": 1.0,
        "accuracy": 0.9,
        "accuracy_ci": (0.894, 0.906),
        "accuracy_drop": 0.0,
        "agreement": 1.0,
        "speedup": {},
        "seconds": 0.0,
        "size": 1000,
    }
    rows = [Row.model_validate(static)]
    for step, change in enumerate(changes, start=1):
        fields = static | {"step": step, "transform": f"t{step}", "speedup": {"eager": {"1": 1.0}}} | change
        if "accuracy" in change:
            fields["accuracy_ci"] = (float(str(change["accuracy"])) - 0.006, float(str(change["accuracy"])) + 0.006)
        rows.append(Row.model_validate(fields))
    return verdicts(Ledger(rows=rows))


def speed(ratio: float) -> dict[str, object]:
    return {"speedup": {"eager": {"1": ratio}}}


FEWER: dict[str, object] = {"macs": 5e5, "macs_ratio": 0.5} | speed(2.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"accuracy": 0.895}, []),  # inside the interval
        ({"accuracy": 0.89}, ["loses 1.00 points of accuracy, and saves neither MACs, time nor size"]),
        (speed(1 / 1.04), []),
        (speed(0.8), ["is 25 % slower at batch 1 in eager, and saves neither MACs, time nor size"]),
        ({"size": 1015}, []),
        ({"size": 1100}, ["is 10 % larger on disk, and saves neither MACs, time nor size"]),
        (
            {"accuracy": 0.88, "size": 1500} | speed(0.5),
            [
                "loses 2.00 points of accuracy and is 100 % slower at batch 1 in eager and is 50 % larger on disk, "
                "and saves neither MACs, time nor size"
            ],
        ),
        ({"accuracy": 0.89} | FEWER, []),
        ({"accuracy": 0.89, "size": 250}, []),
        ({"accuracy": 0.89} | speed(1.1), []),
        ({"accuracy": 0.89, "speedup": {}}, ["loses 1.00 points of accuracy, and saves neither MACs nor size"]),
        ({"accuracy": 0.89, "speedup": {}, "size": None}, ["loses 1.00 points of accuracy, and saves no MACs"]),
    ],
)
def test_a_cost_that_buys_nothing_is_said(change: dict[str, object], said: list[str]) -> None:
    assert after(change) == [f"Step 1, t1: {line}." for line in said]


def test_exits_are_paid_for_by_what_follows() -> None:
    exits: dict[str, object] = {"size": 1100} | speed(0.9)
    assert after(exits, FEWER | {"size": 1100}) == []
    assert after(exits, exits) == [
        "Step 1, t1: is 11 % slower at batch 1 in eager and is 10 % larger on disk, and saves neither MACs, time nor "
        "size.",
        "All steps together: is 11 % slower at batch 1 in eager and is 10 % larger on disk, and saves neither MACs, "
        "time nor size.",
    ]


def test_accuracy_that_comes_back_is_not_lost() -> None:
    assert after({"accuracy": 0.88}, FEWER | {"accuracy": 0.898}) == []
    assert after({"accuracy": 0.88}, FEWER | {"accuracy": 0.88}) == [
        "Step 1, t1: loses 2.00 points of accuracy, and saves neither MACs, time nor size by itself."
    ]


def test_small_losses_add_up_over_the_run() -> None:
    assert after({"accuracy": 0.896}, {"accuracy": 0.892}) == [
        "All steps together: loses 0.80 points of accuracy, and saves neither MACs, time nor size."
    ]


def test_time_is_judged_against_the_row_that_was_timed_last() -> None:
    steps = after(FEWER, FEWER | {"speedup": {}}, FEWER | speed(1.6))
    assert steps == ["Step 3, t3: is 25 % slower at batch 1 in eager, and saves neither MACs, time nor size."]
