"""The recipes that end in bytes, from end to end on digits."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from commandline import ON_DIGITS, call
from ledgers import ledger_of

FEW_IMAGES = [*ON_DIGITS, "--set=data.train_limit=300", "--set=steps.1.epochs=1"]
STEPS = {
    "compress_static": ["prune", "distill", "quantize"],
    "dynamic_int8": ["exits", "distill", "calibrate", "quantize"],
}


BUDGETS = {
    "compress_static": ["--set=steps.0.recovery_epochs=1"],
    "dynamic_int8": [f"--set=steps.2.{field}" for field in ("max_drop=null", "macs_ratio=0.9", "points=3")],
}


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The finished run of a recipe."""

    @functools.cache
    def made(name: str) -> Path:
        out = tmp_path_factory.mktemp("bytes") / name
        result = call("run", name, "--out", out, *FEW_IMAGES, *BUDGETS[name])
        assert result.exit_code == 0, result.output
        return out

    return made


@pytest.mark.parametrize("name", STEPS)
def test_weights_shrink_and_answers_stay(name: str, run: Callable[[str], Path]) -> None:
    rows = ledger_of(run(name))
    assert [row["transform"] for row in rows] == ["static", *STEPS[name]]
    assert rows[-1]["size"] < 0.7 * rows[-2]["size"]  # so small a network is a third names and scales
    assert abs(rows[-1]["accuracy"] - rows[-2]["accuracy"]) <= 0.05
    assert rows[-1]["macs_ratio"] < 1
    assert not list(run(name).rglob("checkpoint.pt"))


def test_pruned_macs_stay(run: Callable[[str], Path]) -> None:
    rows = ledger_of(run("compress_static"))
    assert rows[1]["macs_ratio"] <= 0.6
    assert rows[1]["macs"] == rows[2]["macs"] == rows[3]["macs"]
    assert (run("compress_static") / "steps" / "1" / "round-1" / "metrics.jsonl").exists()


def test_exits_are_solved_again(run: Callable[[str], Path]) -> None:
    out = run("dynamic_int8")
    assert "calibrated again, as `calibrate` was before" in ledger_of(out)[-1]["notes"]
    assert json.loads((out / "manifest.json").read_text())["operating_point"]["name"].startswith("chosen-")
