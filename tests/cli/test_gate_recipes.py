"""The recipes for gates from end to end on digits, and what the verbs say about networks with gates."""

import json
from pathlib import Path
from typing import Any

import pytest
from commandline import FEW_EPOCHS, ON_DIGITS, Cli, call
from ledgers import ledger_of

GATES = list(FEW_EPOCHS)


@pytest.fixture(scope="module")
def gated_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    runs = {}
    for name in GATES:
        runs[name] = tmp_path_factory.mktemp("gates") / name
        result = call("run", name, "--out", runs[name], *ON_DIGITS, *FEW_EPOCHS[name])
        assert result.exit_code == 0, result.output
    return runs


def inspected(path: Path, cli: Cli) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(cli("inspect", path, "--json").stdout)
    return found


def gates(path: Path, cli: Cli) -> list[dict[str, Any]]:
    """The decisions that change what comes after."""
    return [one for one in inspected(path, cli)["decisions"] if one["effect"] == "changes"]


@pytest.mark.parametrize("name", GATES)
def test_recipe_runs_and_is_reported(name: str, gated_runs: dict[str, Path], cli: Cli) -> None:
    rows = ledger_of(gated_runs[name])
    trained = ["distill", "recalibrate"] if name == "channel_gates" else ["distill"]
    assert [row["transform"] for row in rows[-1 - len(trained) :]] == [*trained, "calibrate"]
    assert rows[-1]["macs_ratio"] < 1
    assert bool(rows[-1]["leaving"]) is (name == "gates_and_exits")
    text = cli("report", gated_runs[name], "--markdown").stdout
    assert "## Gates" in text
    assert "The 100 test images took " in text
    assert "way through the network." in " ".join(cli("report", gated_runs[name]).stdout.split()).replace("ways", "way")
    told = json.loads((gated_runs[name] / "report.json").read_text())
    used = [section["place"] for section in told["sections"] if section["place"]]
    known = inspected(gated_runs[name], cli)["decisions"]
    assert [one["name"] for one in used] == [one["name"] for one in known] == list(rows[-1]["decisions"])
    assert rows[-1]["decisions"] in [stand["decisions"] for stand in told["standings"]]


def test_inspect_shows_the_gates_of_an_artifact(gated_runs: dict[str, Path], cli: Cli) -> None:
    for name, path in (("skip_gates", "skipped 0, whole"), ("channel_gates", "50 % wide")):
        text = cli("inspect", gated_runs[name]).stdout
        assert "MACs on each path" in text
        assert path in " ".join(text.split())
        assert max(map(len, text.splitlines())) <= 80
    skips, channels = (gates(gated_runs[name], cli) for name in GATES[:2])
    assert skips[0]["kind"] == "skip"
    assert [option["label"] for option in skips[0]["options"]] == ["skipped", "whole"]
    assert skips[0]["options"][0]["macs"] == 0
    assert skips[0]["always"] > 0
    assert (skips[0]["macs_to_leave"], skips[0]["threshold"]) == (None, None)
    assert channels[0]["kind"] == "channels"
    macs = [option["macs"] for option in channels[0]["options"]]
    assert macs == sorted(macs)
    assert channels[0]["options"][-1]["label"] == "whole"
    assert "with all gates open" in cli("inspect", gated_runs["gates_and_exits"]).stdout


def test_predict_tells_the_paths_taken(gated_runs: dict[str, Path], pictures: Path, cli: Cli) -> None:
    for name in GATES:
        units = gates(gated_runs[name], cli)
        found = json.loads(cli("predict", gated_runs[name], pictures, "--json").stdout)
        for one in found:
            assert len(one["paths"]) <= len(units)
            assert all(0 <= path < len(unit["options"]) for path, unit in zip(one["paths"], units, strict=False))
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
