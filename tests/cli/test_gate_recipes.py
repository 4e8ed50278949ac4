"""The recipes for gates from end to end on digits, and what the verbs say about networks with gates."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commandline import FEW_EPOCHS, ON_DIGITS, Cli, call
from ledgers import ledger_of
from quick import only


@pytest.fixture(scope="module")
def gated_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The finished run of a recipe."""

    @functools.cache
    def made(name: str) -> Path:
        out = tmp_path_factory.mktemp("gates") / name
        result = call("run", name, "--out", out, *ON_DIGITS, *FEW_EPOCHS[name])
        assert result.exit_code == 0, result.output
        return out

    return made


def inspected(path: Path, cli: Cli) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(cli("inspect", path, "--json").stdout)
    return found


def gates(path: Path, cli: Cli) -> list[dict[str, Any]]:
    """The decisions that change what comes after."""
    return [one for one in inspected(path, cli)["decisions"] if one["effect"] == "changes"]


every = pytest.mark.parametrize("name", only(["gates_and_exits"], FEW_EPOCHS))


@every
def test_recipe_runs_and_is_reported(name: str, gated_run: Callable[[str], Path], cli: Cli) -> None:
    out = gated_run(name)
    rows = ledger_of(out)
    trained = ["distill", "recalibrate"] if name == "channel_gates" else ["distill"]
    assert [row["transform"] for row in rows[-1 - len(trained) :]] == [*trained, "calibrate"]
    assert rows[-1]["macs_ratio"] < 1
    assert bool(rows[-1]["leaving"]) is (name == "gates_and_exits")
    text = cli("report", out, "--markdown").stdout
    assert "## Gates" in text
    assert "The 100 test images took " in text
    assert "way through the network." in " ".join(cli("report", out).stdout.split()).replace("ways", "way")
    told = json.loads((out / "report.json").read_text())
    used = [section["place"] for section in told["sections"] if section["place"]]
    known = inspected(out, cli)["decisions"]
    assert [one["name"] for one in used] == [one["name"] for one in known] == list(rows[-1]["decisions"])
    assert rows[-1]["decisions"] in [stand["decisions"] for stand in told["standings"]]


@pytest.mark.parametrize(
    ("name", "path"),
    only(
        ["gates_and_exits"],
        [
            ("gates_and_exits", "with all gates open"),
            ("skip_gates", "skipped 0, whole"),
            ("channel_gates", "50 % wide"),
        ],
    ),
)
def test_inspect_shows_the_gates_of_an_artifact(
    name: str, path: str, gated_run: Callable[[str], Path], cli: Cli
) -> None:
    text = cli("inspect", gated_run(name)).stdout
    assert "MACs on each path" in text
    assert path in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80
    gate = gates(gated_run(name), cli)[0]
    assert gate["kind"] == ("channels" if name == "channel_gates" else "skip")
    assert gate["options"][-1]["label"] == "whole"
    macs = [option["macs"] for option in gate["options"]]
    assert macs == sorted(macs)
    if gate["kind"] == "skip":
        assert [option["label"] for option in gate["options"]] == ["skipped", "whole"]
        assert macs[0] == 0
        assert gate["always"] > 0
        assert (gate["macs_to_leave"], gate["threshold"]) == (None, None)


@every
def test_predict_tells_the_paths_taken(name: str, gated_run: Callable[[str], Path], pictures: Path, cli: Cli) -> None:
    units = gates(gated_run(name), cli)
    found = json.loads(cli("predict", gated_run(name), pictures, "--json").stdout)
    for one in found:
        assert len(one["paths"]) <= len(units)
        assert all(0 <= path < len(unit["options"]) for path, unit in zip(one["paths"], units, strict=False))
        if name != "gates_and_exits":
            assert len(one["paths"]) == len(units)


def test_predict_of_one_image_that_leaves_before_the_last_gate(
    gated_run: Callable[[str], Path], pictures: Path, cli: Cli
) -> None:
    out = gated_run("gates_and_exits")
    points = json.loads((out / "manifest.json").read_text())["operating_points"]
    early = max(points, key=lambda point: point["exits"][0])
    result = cli("predict", out, pictures / "0-is-0.png", "--point", early["name"], "--json")
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)) == 1
