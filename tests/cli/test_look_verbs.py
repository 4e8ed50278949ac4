"""`dynamize inspect`, `report`, `transforms` and `recipes`."""

import json
import re
from pathlib import Path

import pytest
from commandline import Cli, process
from ledgers import ledger_of

import dynamize as dz
from dynamize.report import ReportData
from dynamize.transform import registered


def widest(text: str) -> int:
    return max(map(len, text.splitlines()))


def test_inspect_shows_stages_blocks_and_costs(cli: Cli) -> None:
    text = cli("inspect", "dynamize:cifar_resnet20").stdout
    assert "dynamize:cifar_resnet20  3x32x32  40.8M MACs  270k parameters  10 cut points" in text
    assert "stage 1, 4 blocks" in text
    assert "layer3_2_relu2" in text
    assert widest(text) <= 80


def test_inspect_json_adds_up(cli: Cli) -> None:
    found = json.loads(cli("inspect", "dynamize:digits_resnet", "--json").stdout)
    blocks = [block for stage in found["stages"] for block in stage["blocks"]]
    assert found["input"] == [1, 8, 8]
    assert sum(block["macs"] for block in blocks) == found["macs"] == sum(s["macs"] for s in found["stages"])
    assert sum(block["params"] for block in blocks) == found["params"]
    assert blocks[-1]["cut"] is None
    assert blocks[-1]["shape"] == [10]
    assert (found["decisions"], found["macs_to_end"]) == ([], None)


def test_inspect_says_what_gates_fit(cli: Cli) -> None:
    text = cli("inspect", "dynamize:cifar_resnet20").stdout
    rows = {line.split("  ")[0]: line.split() for line in text.split("Gates possible")[1].splitlines()}
    assert rows["layer1.0 to layer1.2"][-3:] == ["3", "yes", "16"]
    assert "shortcut runs" in " ".join(rows["layer2.0"])
    found = json.loads(cli("inspect", "dynamize:cifar_resnet20", "--json").stdout)
    assert len(found["gates"]) == 9
    first = found["gates"][0]
    assert (first["module"], first["skip"], first["identity"], first["why_not"]) == ("layer1.0", True, True, None)
    # two 3x3 convolutions of 16 channels on 32x32 pixels
    assert first["chains"] == [{"name": "layer1_0_conv1", "channels": 16, "macs": 2 * 32 * 32 * 16 * 16 * 9}]
    assert not found["gates"][3]["identity"]


@pytest.mark.slow
def test_inspect_says_why_a_block_cannot_be_skipped(cli: Cli) -> None:
    result = cli("inspect", "torchvision:densenet121", "--input", "3,64,64")
    assert widest(result.stdout) <= 80
    reason = result.stdout.split("Gates possible")[1].split()
    assert {"features_transition1_relu", "relu", "no:", "parallel", "meet", "concatenation"} <= set(reason)
    assert "12 x 128" in " ".join(result.stdout.split())


def test_inspect_takes_an_input_shape(cli: Cli) -> None:
    small = json.loads(cli("inspect", "torchvision:resnet18", "--input", "3,64,64", "--json").stdout)
    assert small["input"] == [3, 64, 64]
    assert small["stages"][-2]["shape"] == [512, 2, 2]
    assert small["disagreements"] == []


def test_inspect_shows_three_counters(cli: Cli) -> None:
    text = cli("inspect", "dynamize:cifar_resnet20", "--operators").stdout
    assert re.search(r"the network +40\.8M +41\.2M +41\.3M", text)
    assert re.search(r"matrix product +640 +640 +640", text)
    assert "fvcore has no rule for: add (9)." in text
    assert "dynamize.PadShortcut (2)" in text
    assert re.search(r"thop counts \+1\.2 %: it adds normalisation \(1\.8 %\)", text)
    assert widest(text) <= 80

    found = json.loads(cli("inspect", "dynamize:cifar_resnet20", "--json", "--operators").stdout)
    ours, fvcore, thop = found["counters"]
    assert ours["macs"] == found["macs"] == sum(ours["modules"][""].values())
    assert fvcore["modules"]["conv1"] == ours["modules"]["conv1"]
    assert thop["difference"] == pytest.approx(thop["macs"] / ours["macs"] - 1)
    assert [one.split()[0] for one in found["disagreements"]] == ["fvcore", "thop"]


def test_a_step_is_shown_with_what_was_decided(tmp_path: Path, cli: Cli) -> None:
    net = dz.source("dynamize:digits_resnet", pretrained=True)
    small = {"name": "small", "source": "dynamize:digits_resnet_small", "kwargs": {"pretrained": True}}
    dz.save(dz.convert(net, [dz.Cascade.model_validate({"first": [small]})], (1, 8, 8)), tmp_path / "out")
    text = " ".join(cli("inspect", tmp_path / "out").stdout.split())
    assert "Members after" in text
    assert "cascade first: [{name: small, source: dynamize:digits_resnet_small}], confidence: top_probability" in text


def test_inspect_artifact_shows_exits_and_points(finished_run: Path, cli: Cli) -> None:
    result = cli("inspect", finished_run)
    for part in ("Steps", "Exits", "layer1_1_relu2", "Operating points", "It stands at chosen-0."):
        assert part in result.stdout
    assert widest(result.stdout) <= 80
    found = json.loads(cli("inspect", finished_run, "--json").stdout)
    exits = found["decisions"]
    assert [(one["name"], one["effect"]) for one in exits] == [("exit.1", "leaves"), ("exit.2", "leaves")]
    assert [one["after"] for one in exits] == [one["upto"] for one in exits] == ["layer1_1_relu2", "layer2_1_relu2"]
    assert all(one["always"] > 0 for one in exits)
    assert 0 < exits[0]["macs_to_leave"] < exits[1]["macs_to_leave"] < found["macs_to_end"]
    (stands,) = (point for point in found["operating_points"] if point["name"] == found["operating_point"])
    assert {one["name"]: one["threshold"] for one in exits} == stands["thresholds"]
    assert found["operating_point"] in {point["name"] for point in found["operating_points"]}
    assert [step["pass"] for step in found["history"]] == ["exits", "distill", "calibrate"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["resnet50"], "torchvision:resnet50"),
        (["torchvision:resnet500"], "resnet50"),
        (["torchvision:resnet18", "--input", "224"], "3,224,224"),
        (["dynamize:digits_resnet", "--input", "3,8,8"], "does not run"),
        (["dynamize:digits_resnet", "--checkpoint", "/nowhere.pt"], "/nowhere.pt"),
        (["tests"], "holds no artifact"),
    ],
)
def test_inspect_refuses(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    (tmp_path / "tests").mkdir()
    monkeypatch.chdir(tmp_path)
    result = cli("inspect", *arguments)
    assert result.exit_code == 2
    assert told in result.stderr


def test_report_prints_the_ledger_again(finished_run: Path, cli: Cli) -> None:
    text = cli("report", finished_run).stdout
    assert text.startswith("Early exits for a digits classifier")
    assert "Operating points" in text
    assert widest(text) <= 80


def test_report_faces(finished_run: Path, tmp_path: Path, cli: Cli) -> None:
    markdown = cli("report", finished_run, "--markdown").stdout
    assert markdown == (finished_run / "report.md").read_text()
    page = tmp_path / "page.html"
    assert cli("report", finished_run, "--html", page).exit_code == 0
    assert page.read_text() == (finished_run / "report.html").read_text()
    found = json.loads(cli("report", finished_run, "--json").stdout)
    assert [row["transform"] for row in found["ledger"]["rows"]] == [r["transform"] for r in ledger_of(finished_run)]
    selected = ReportData.model_validate(found).selected
    assert selected is not None
    assert selected.startswith("chosen-0.")
    assert cli("report", finished_run, "--json", "--markdown").exit_code == 2


def test_report_of_a_run_that_was_stopped(artifact: Path, cli: Cli) -> None:
    for name in ("ledger.json", "manifest.json", "report.json"):
        (artifact / name).unlink()
    (artifact / "steps" / "3" / "state.json").unlink()
    text = " ".join(cli("report", artifact).stdout.split())
    assert "2 distill" in text
    assert "3 calibrate" not in text
    assert "not finished: 2 steps are done" in text


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("manifest.json", "{", "damaged"),
        ("manifest.json", '{"about": 3}', "do not fit together"),
        ("manifest.json", '{"about": {"ledger": {"colour": 1}}}', "do not fit together"),
        ("ledger.json", "[{}]", "not a ledger"),
        ("report.json", "[]", "damaged"),
    ],
)
def test_report_names_the_damaged_file(artifact: Path, file: str, content: str, told: str, cli: Cli) -> None:
    (artifact / file).write_text(content)
    result = cli("report", artifact)
    assert result.exit_code == 2
    assert told in result.stderr
    assert str(artifact) in result.stderr


def test_report_of_another_folder(tmp_path: Path, cli: Cli) -> None:
    result = cli("report", tmp_path)
    assert result.exit_code == 2
    assert "holds no run" in result.stderr


def test_transforms(cli: Cli) -> None:
    text = cli("transforms").stdout
    assert [name in text for name in ("exits", "distill", "calibrate")] == [True] * 3
    one = cli("transforms", "exits").stdout
    assert "number of early exits" in " ".join(one.split())
    assert widest(one) <= 80
    schemas = json.loads(cli("transforms", "--json").stdout)
    assert schemas["exits"] == json.loads(cli("transforms", "exits", "--json").stdout)
    assert schemas["exits"]["properties"]["pass"]["const"] == "exits"
    unknown = cli("transforms", "exitz")
    assert unknown.exit_code == 2
    assert "Did you mean exits?" in unknown.stderr


def test_every_transform_is_listed_with_a_whole_sentence(cli: Cli) -> None:
    listed = cli("transforms").stdout.splitlines()[2:]
    starts = [number for number, line in enumerate(listed) if not line.startswith(" ")]
    assert len(starts) == len(registered())
    for start, end in zip(starts, [*starts[1:], len(listed)], strict=True):
        assert " ".join(listed[start:end]).rstrip().endswith("."), listed[start]


def test_fields_inside_fields_are_told(cli: Cli) -> None:
    told = " ".join(cli("transforms", "cascade").stdout.split())
    assert "Member: A network in front of the recipe's own." in told
    assert "first list of Member required" in told
    assert "null" not in told


@pytest.mark.parametrize("name", sorted(registered()))
def test_a_transform_is_told_in_prose_without_its_python_example(name: str, cli: Cli) -> None:
    told = cli("transforms", name).stdout
    assert (registered()[name].__doc__ or "").split()[:3] == told.split()[:3]
    assert [mark in told for mark in (">>>", "Example:", ":class:", "``")] == [False] * 4
    assert widest(told) <= 80


def test_recipes(cli: Cli, tmp_path: Path) -> None:
    assert "Early exits for a digits classifier" in cli("recipes", "list").stdout
    assert "quickstart" in json.loads(cli("recipes", "list", "--json").stdout)
    plain = json.loads(cli("recipes", "show", "quickstart", "--json").stdout)
    assert [step["pass"] for step in plain["steps"]] == ["cascade", "calibrate"]
    mine = tmp_path / "mine.yaml"
    mine.write_text(cli("recipes", "show", "quickstart").stdout)
    assert json.loads(cli("recipes", "show", mine, "--json").stdout) == plain
    assert cli("recipes", "show", "nothing").exit_code == 2


def test_pipe_gets_plain_text() -> None:
    done = process("recipes", "list")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
