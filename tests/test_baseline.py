"""A run beside an earlier one of the same steps: compared by hand-made rows, and refused before anything is done."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import DigitNet

import dynamize as dz
from dynamize.baseline import Baseline, judged
from dynamize.expect import Expect
from dynamize.report.changes import Verdict, markdown
from dynamize.report.ledger import Ledger, Row
from dynamize.run import Outcome

QUICK: dict[str, Any] = {"backends": ["eager"], "batches": [1], "timing_seconds": 0.01, "device": "cpu"}
RIGHT, WRONG = 0.9, 0.895


def ledger(accuracy: float = RIGHT, speedup: float = 1.25, macs: float = 50, static: float = 0.92) -> Ledger:
    """A converted network of 100 MACs, which loses 2 points; the second backend is never the main one."""
    same: dict[str, Any] = {"params": 1, "accuracy_ci": (0.8, 1), "seconds": 1}
    first = Row(
        step=0, transform="static", macs=100, macs_worst=100, macs_ratio=1, accuracy=static, accuracy_drop=0,
        agreement=1, **same,
    )  # fmt: skip
    last = Row(
        step=1, transform="calibrate", macs=macs, macs_worst=110, macs_ratio=macs / 100, accuracy=accuracy,
        accuracy_drop=0.02, agreement=0.95, speedup={"eager": {"1": speedup, "64": 2.0}, "onnxruntime": {"1": 0.5}},
        **same,
    )  # fmt: skip
    return Ledger(rows=[first, last], backend="eager")


def verdict(expect: dict[str, Any], now: Ledger, before: Ledger | None = None) -> Verdict:
    given = {"baseline": "then.json", **expect} if before else expect
    baseline = None if before is None else Baseline(before, Path("then.json"))
    return judged(Expect.model_validate(given), now, baseline)


@pytest.mark.parametrize(
    ("expect", "failed"),
    [
        ({"accuracy": {"min": 90}}, []),
        ({"accuracy": {"min": 90.1}}, ["accuracy"]),
        ({"accuracy_drop": {"max": 2}}, []),
        ({"accuracy_drop": {"max": 1.9}}, ["accuracy_drop"]),
        ({"macs_ratio": {"min": 0.5, "max": 0.5}}, []),
        ({"macs_ratio": {"min": 0.6, "max": 0.7}}, ["macs_ratio"]),
        ({"speedup": {"min": 1.3}}, ["speedup"]),
        ({"speedup": {"min": 1.2}, "agreement": {"min": 95}}, []),
    ],
)
def test_a_run_by_itself(expect: dict[str, Any], failed: list[str]) -> None:
    assert [one.figure for one in verdict(expect, ledger()).failures] == failed


@pytest.mark.parametrize(
    ("expect", "now", "failed"),
    [
        ({"accuracy_drop": {"max": 0.5}}, ledger(WRONG), []),  # 2 points below the original network, 0.5 below then
        ({"accuracy_drop": {"max": 0.4}}, ledger(WRONG), ["accuracy_drop"]),
        ({"accuracy_drop": {"max": 0}}, ledger(0.95), []),
        ({"slowdown": {"max": 1.25}}, ledger(speedup=1.0), []),
        ({"slowdown": {"max": 1.24}}, ledger(speedup=1.0), ["slowdown"]),  # at batch 64 nothing changed
        ({"slowdown": {"max": 1}}, ledger(speedup=5.0), []),
        ({"macs_growth": {"max": 1.1}}, ledger(macs=55), []),
        ({"macs_growth": {"max": 1.1}, "macs_ratio": {"max": 0.5}}, ledger(macs=56), ["macs_ratio", "macs_growth"]),
    ],
)
def test_a_run_beside_its_baseline(expect: dict[str, Any], now: Ledger, failed: list[str]) -> None:
    found = verdict(expect, now, ledger())
    assert [one.figure for one in found.failures] == failed
    assert {one.against for one in found.findings} <= {"baseline", "original network"}


def test_another_machine_changes_nothing_and_other_images_are_told() -> None:
    assert verdict({}, ledger(), ledger()).notes == []
    assert "other test images" in verdict({}, ledger(), ledger(static=0.93)).notes[0]


def test_markdown_says_what_was_missed_and_what_changed() -> None:
    found = verdict({"accuracy_drop": {"max": 0.4}, "slowdown": {"max": 2}}, ledger(WRONG, 1.0), ledger())
    text = markdown(found, "A | b")
    assert text.startswith("## A \\| b\n\n**Missed: 1 of 2 expectations.**\n")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert ["accuracy_drop", "baseline", "-", "0.4", "0.500", "missed"] in cells
    assert ["slowdown", "baseline", "-", "2", "1.250", "kept"] in cells
    assert ["accuracy %", "90.00", "89.50", "-0.50 points"] in cells
    assert ["speed-up, eager, batch 1", "1.25 x", "1.00 x", "0.800 x"] in cells


def images() -> Any:
    parts = {name: (torch.randn(40, 1, 8, 8), torch.arange(40) % 10) for name in ("calibration", "test")}
    return dz.splits(**parts)


def run(out: Path, *steps: Any, **options: Any) -> Outcome:
    torch.manual_seed(0)
    done = dz.run_steps(DigitNet().eval(), steps or [dz.FoldBatchnorm()], images(), out, **(QUICK | options))
    assert done is not None
    return done


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("earlier") / "out"
    run(out)
    return out


@pytest.mark.parametrize("given", ["ledger.json", "."])
def test_a_second_run_is_compared_with_the_first(given: str, earlier: Path, tmp_path: Path) -> None:
    expect = {"baseline": earlier / given, "accuracy_drop": {"max": 0}, "slowdown": {"min": 100}}
    done = run(tmp_path / "out", expect=expect)
    assert [one.figure for one in done.failures] == ["slowdown"]
    assert "Since the baseline" in (tmp_path / "out" / "expect.md").read_text()
    run(tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "expect.md").exists()


def other_rows(earlier: Path, folder: Path, **changed: Any) -> Path:
    rows = json.loads((earlier / "ledger.json").read_text())
    file = folder / "then.json"
    file.write_text(json.dumps([row | changed for row in rows]))
    return file


@pytest.mark.parametrize(
    ("expect", "told"),
    [
        ({"baseline": "nowhere.json"}, "nowhere.json: cannot be read.*The first run has none yet"),
        ({"baseline": "broken.json"}, "not valid JSON"),
        ({"baseline": "empty.json"}, "its steps are none, and here they are fold_batchnorm"),
        ({"baseline": "wide.json"}, "of another network, of 7 parameters"),
        ({"baseline": "slow.json", "slowdown": {"max": 2}}, r"timed onnxruntime \(batch 1\), and this run times eager"),
        ({"baseline": "out/ledger.json"}, "its own baseline: copy it elsewhere"),
    ],
)
def test_a_baseline_that_cannot_be_is_refused_before_the_first_image(
    expect: dict[str, Any], told: str, earlier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("[")
    (tmp_path / "empty.json").write_text("[]")
    other_rows(earlier, tmp_path, params=7).rename("wide.json")
    other_rows(earlier, tmp_path, speedup={"onnxruntime": {"1": 1.0}}).rename("slow.json")
    monkeypatch.setattr("dynamize.run.Runner._load_data", lambda self: pytest.fail("images were read"))
    with pytest.raises(dz.DynamizeError, match=told):
        run(Path("out"), expect=expect)
    assert not (tmp_path / "out").exists()


def test_a_baseline_of_other_steps_is_refused(earlier: Path, tmp_path: Path) -> None:
    with pytest.raises(dz.DynamizeError, match="of another recipe: its steps are fold_batchnorm, and here they are ex"):
        run(tmp_path / "out", dz.Exits(count=1), expect={"baseline": earlier})
