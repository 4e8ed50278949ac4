"""`dynamize suggest`."""

import json
from pathlib import Path

import pytest
import yaml
from commandline import Cli


def test_a_table_of_predictions(cli: Cli) -> None:
    result = cli("suggest", "torchvision:convnext_tiny", "--max-drop", "0.5", "--top", "2")
    assert result.exit_code == 0
    text = result.stdout
    assert text.startswith("Cheapest for 82.02 % on ImageNet-1k as convnext_tiny V1 has: efficientnet_b")
    for part in ("Cascades that end in convnext_tiny V1", "Single networks", "not measurements", "pass: cascade"):
        assert part in text
    assert "efficientnet_b1 V2 -> convnext_tiny V1" in text
    assert max(map(len, text.partition("The recipe")[0].splitlines())) <= 80
    recipe = yaml.safe_load(text.partition("writes it):")[2])
    assert recipe["model"]["source"] == "torchvision:convnext_tiny,weights=IMAGENET1K_V1"
    assert recipe["steps"][1]["max_drop"] == 0.5


def test_json_and_a_file(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "new" / "cascade.yaml"
    arguments = ("suggest", "--accuracy", 80, "--data", "imagefolder:here", "--recipe", file, "--json")
    found = json.loads(cli(*arguments).stdout)
    assert found["predicted"] is True
    assert found["wanted_accuracy"] == 80
    assert found["best"] == found["cascades"][0]
    assert len(found["networks"]) == len(found["cascades"]) == 5
    assert [one["saving"] for one in found["networks"]][0] == 1
    assert file.read_text() == found["recipe"]
    assert yaml.safe_load(found["recipe"])["data"]["source"] == "imagefolder:here"
    again = cli(*arguments)
    assert again.exit_code == 2
    assert "exists already" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--accuracy 80"),
        (["--accuracy", "99"], "No network that is known here"),
        (["resnet50"], "torchvision:resnet50"),
        (["--accuracy", "80", "--timm-results", "nowhere.csv"], "nowhere.csv"),
        (["torchvision:shufflenet_v2_x0_5", "--recipe", "x.yaml"], "no cascade for shufflenet_v2_x0_5"),
    ],
)
def test_refusals(arguments: list[str], told: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli("suggest", *arguments)
    assert result.exit_code == 2
    assert told in result.stderr
    assert result.stderr.count("error:") == 1
    assert not list(tmp_path.iterdir())
