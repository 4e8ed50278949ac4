"""The recipes for gates from end to end on digits, and what the verbs say about networks with gates."""

import json
from pathlib import Path
from typing import Any

import pytest
from commandline import FEW_EPOCHS, ON_DIGITS, Cli, call
from ledgers import ledger_of

GATES = list(FEW_EPOCHS)


@pytest.fixture(scope="module")
def gated_runs(tmp_path_factory: pytest.TempPathFactory, short_timing: object) -> dict[str, Path]:
    runs = {}
    for name in GATES:
        runs[name] = tmp_path_factory.mktemp("gates") / name
        result = call("run", name, "--out", runs[name], *ON_DIGITS, *FEW_EPOCHS[name])
        assert result.exit_code == 0, result.output
    return runs


def inspected(path: Path, cli: Cli) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(cli("inspect", path, "--json").stdout)
    return found


@pytest.mark.parametrize("name", GATES)
def test_recipe_runs_and_is_reported(name: str, gated_runs: dict[str, Path], cli: Cli) -> None:
    rows = ledger_of(gated_runs[name])
    trained = ["distill", "recalibrate"] if name == "channel_gates" else ["distill"]
    assert [row["transform"] for row in rows[-1 - len(trained) :]] == [*trained, "calibrate"]
    assert rows[-1]["macs_ratio"] < 1
    assert bool(rows[-1]["exits"]) is (name == "gates_and_exits")
    text = cli("report", gated_runs[name], "--markdown").stdout
    assert "## Gates" in text
    assert "The 100 test images took " in text
    assert "way through the network." in " ".join(cli("report", gated_runs[name]).stdout.split()).replace("ways", "way")
    units = json.loads((gated_runs[name] / "report.json").read_text())["gates"]["units"]
    assert [unit["label"] for unit in units] == [unit["label"] for unit in inspected(gated_runs[name], cli)["units"]]


def test_inspect_shows_the_gates_of_an_artifact(gated_runs: dict[str, Path], cli: Cli) -> None:
    for name, path in (("skip_gates", "skipped 0, whole"), ("channel_gates", "50 % wide")):
        text = cli("inspect", gated_runs[name]).stdout
        assert "MACs on each path" in text
        assert path in " ".join(text.split())
        assert max(map(len, text.splitlines())) <= 80
    skips, channels = (inspected(gated_runs[name], cli)["units"] for name in GATES[:2])
    assert skips[0]["kind"] == "skip"
    assert [path["width"] for path in skips[0]["paths"]] == [0, 1]
    assert skips[0]["paths"][0]["macs"] == 0
    assert skips[0]["gate_macs"] > 0
    assert channels[0]["kind"] == "channels"
    widths = [path["width"] for path in channels[0]["paths"]]
    assert widths == sorted(widths)
    assert widths[-1] == 1
    assert "with all gates open" in cli("inspect", gated_runs["gates_and_exits"]).stdout


def test_predict_tells_the_paths_taken(gated_runs: dict[str, Path], pictures: Path, cli: Cli) -> None:
    for name in GATES:
        units = inspected(gated_runs[name], cli)["units"]
        found = json.loads(cli("predict", gated_runs[name], pictures, "--json").stdout)
        for one in found:
            assert len(one["paths"]) <= len(units)
            assert all(0 <= path < len(unit["paths"]) for path, unit in zip(one["paths"], units, strict=False))
            if name != "gates_and_exits":
                assert len(one["paths"]) == len(units)


def test_predict_of_one_image_that_leaves_before_the_last_gate(
    gated_runs: dict[str, Path], pictures: Path, cli: Cli
) -> None:
    out = gated_runs["gates_and_exits"]
    points = json.loads((out / "manifest.json").read_text())["operating_points"]
    early = max(points, key=lambda point: point["exits"][0])
    result = cli("predict", out, pictures / "0-is-0.png", "--point", early["name"], "--json")
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)) == 1
