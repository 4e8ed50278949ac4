"""Training curves: one for each step and network that trained, from rows of any make."""

from typing import Any

from dynamize.report.curves import curves


def row(epoch: int, **more: Any) -> dict[str, Any]:
    return {"step": "distill", "epoch": epoch, "loss": 1 / epoch, "calibration_accuracy": [0.5, 0.6], **more}


def test_each_network_of_a_row_has_its_own() -> None:
    rows = [row(1, member="small"), row(2, member="small"), row(1, member="tiny"), row(1)]
    found = curves(rows, ["early", "end"])
    assert [one.step for one in found[::2]] == ["distill of small", "distill of tiny", "distill"]
    assert [one.epochs for one in found[::2]] == [2, 1, 1]
    assert [line.name for line in found[0].lines] == ["early", "end"]


def test_exits_of_another_number_are_counted() -> None:
    four = ["early", "middle", "late", "end"]
    assert [line.name for line in curves([row(1)], four)[0].lines] == ["exit 1", "exit 2"]


def test_exits_that_learned_without_the_last_network_keep_their_names() -> None:
    assert [line.name for line in curves([row(1)], ["glance", "focus-1", "end"])[0].lines] == ["glance", "focus-1"]


def test_one_network_without_exits_and_rows_that_say_little() -> None:
    found = curves([row(1, calibration_accuracy=[0.5]), {"loss": "much"}], [])
    assert [[line.name for line in one.lines] for one in found] == [["network"], ["loss"]]
