"""The recipes that end in bytes, from end to end on digits."""

import json
from pathlib import Path

import pytest
from commandline import ON_DIGITS, call
from ledgers import ledger_of

FEW_IMAGES = [*ON_DIGITS, "--set=data.train_limit=300", "--set=steps.1.epochs=1"]
STEPS = {
    "compress_static": ["prune", "distill", "quantize"],
    "dynamic_int8": ["exits", "distill", "calibrate", "quantize"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp("bytes") / name for name in STEPS}
    budgets = {
        "compress_static": ["--set=steps.0.recovery_epochs=1"],
        "dynamic_int8": ["--set=steps.2.max_drop=null", "--set=steps.2.macs_ratio=0.9"],
    }
    for name, out in made.items():
        result = call("run", name, "--out", out, *FEW_IMAGES, *budgets[name])
        assert result.exit_code == 0, result.output
    return made


@pytest.mark.parametrize("name", STEPS)
def test_weights_shrink_and_answers_stay(name: str, runs: dict[str, Path]) -> None:
    rows = ledger_of(runs[name])
    assert [row["transform"] for row in rows] == ["static", *STEPS[name]]
    assert rows[-1]["size"] < 0.7 * rows[-2]["size"]  # so small a network is a third names and scales
    assert abs(rows[-1]["accuracy"] - rows[-2]["accuracy"]) <= 0.05
    assert rows[-1]["macs_ratio"] < 1


def test_pruned_macs_stay_and_exits_are_solved_again(runs: dict[str, Path]) -> None:
    static, dynamic = (ledger_of(runs[name]) for name in STEPS)
    assert static[1]["macs_ratio"] <= 0.6
    assert static[1]["macs"] == static[2]["macs"] == static[3]["macs"]
    assert "calibrated again, as `calibrate` was before" in dynamic[-1]["notes"]
    assert json.loads((runs["dynamic_int8"] / "manifest.json").read_text())["operating_point"]["name"].startswith(
        "chosen-"
    )


def test_no_training_checkpoint_is_left(runs: dict[str, Path]) -> None:
    for out in runs.values():
        assert not list(out.rglob("checkpoint.pt"))
    assert (runs["compress_static"] / "steps" / "1" / "round-1" / "metrics.jsonl").exists()
