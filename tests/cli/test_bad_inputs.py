"""What users get wrong: each is one line that says so, exit code 2, no traceback, no training, and nothing on disk."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commandline import Cli
from PIL import Image
from quick import only

import dynamize as dz
from dynamize.data import DataSpec

QUICK = ("--set=data.test_limit=100", "--set=data.train_limit=100", "--set=backends=[eager]", "--quiet")
VERBS = ["run", pytest.param("check", marks=pytest.mark.slow)]  # both begin alike
BUDGET = ("--set=steps.2.max_drop=null",)
RECIPES = {
    "list.yaml": "- 1\n",
    "empty.yaml": "",
    "broken.yaml": "a: [1",
    "twice.yaml": "version: 1\nseed: 1\nsteps: []\nseed: 2\n",
    "binary.yaml": "\x00",
    "own_code.yaml": "version: 1\nmodel: {source: 'own.py:make', input: [1, 8, 8]}\n"
    "data: {source: digits}\nsteps: []\n",
    "own_steps.yaml": "version: 1\ncode: [own.py]\nmodel: {source: 'dynamize:digits_resnet', input: [1, 8, 8]}\n"
    "data: {source: digits}\nsteps: []\n",
    "no_code.yaml": "version: 1\ncode: [nothere.py]\nmodel: {source: 'dynamize:digits_resnet', input: [1, 8, 8]}\n"
    "data: {source: digits}\nsteps: []\n",
}


def step(text: str) -> str:
    return f"--set=steps=[{text}]"


RECIPE_FAULTS: dict[str, tuple[list[str], str]] = {
    "no such recipe": (["nothere.yaml"], "neither a file nor a built-in one"),
    "a misspelt built-in recipe": (["quickstrat"], "Did you mean quickstart"),
    "a recipe that is a list": (["list.yaml"], "holds no recipe"),
    "an empty recipe": (["empty.yaml"], "holds no recipe"),
    "YAML cut short": (["broken.yaml"], "line 1"),
    "a key twice": (["twice.yaml"], "the key seed stands twice"),
    "no text": (["binary.yaml"], "cannot be read as YAML"),
    "a folder as recipe": (["."], "neither a file nor a built-in one"),
    "untrusted source": (["own_code.yaml"], "--trust-code"),
    "untrusted steps": (["own_steps.yaml"], "--trust-code"),
    "code that is not there": (["no_code.yaml"], "no file nothere.py beside the recipe"),
    "an unknown section": (["--set=modle={}"], "Did you mean model"),
    "an unknown field": (["--set=data.augmnet=none"], "Did you mean augment"),
    "a field of another section": (["--set=steps.0.epochs=3"], "steps.0.exits.epochs: no such field"),
    "an unknown transform": (["--set=steps.0.pass=exit"], "Did you mean exits"),
    "no transform": (["--set=steps.0={at: [layer1]}"], "`pass` is missing"),
    "a step as a word": (["--set=steps.0=exits"], "is no step"),
    "a newer format": (["--set=version=2"], "version"),
    "no input": (["--set=model.input=null"], "model.input"),
    "an input of two numbers": (["--input", "8,8"], "write channels, height and width"),
    "an input of words": (["--input", "big"], "write channels, height and width"),
    "an override without a value": (["--set", "steps.1.epochs"], "path=value"),
    "an override of a step that is not there": (["--set", "steps.9.epochs=1"], "no place steps.9.epochs"),
    "negative epochs": (["--set=steps.1.epochs=-3"], "greater than 0 (given: -3)"),
    "epochs in words": (["--set=steps.1.epochs=many"], "steps.1.distill.epochs: a number is expected"),
    "percent for a share of MACs": ([*BUDGET, "--set=steps.2.macs_ratio=50"], "write 0.5 for 50 %"),
    "a drop above 100 points": (["--set=steps.2.max_drop=200"], "steps.2.calibrate.max_drop"),
    "two budgets": (["--set=steps.2.macs_ratio=0.5"], "max_drop and macs_ratio are budgets both"),
    "percent for a share of heads": (["--set=steps.0.share=15"], "less than or equal to 1 (given: 15)"),
    "steps in the wrong order": ([step("{pass: calibrate}")], "step 1 `calibrate` needs"),
    "exits twice": ([step("{pass: exits}, {pass: exits}")], "a second `exits`"),
    "bounds upside down": (["--set=expect.speedup={min: 2, max: 1}"], "exchange them"),
    "a fraction for percent": (["--set=expect.accuracy={min: 0.9}"], "percent are meant"),
    "percent for a ratio": (["--set=expect.macs_ratio={max: 60}"], "write 0.6 for 60 %"),
    "an unknown backend": (["--set=backends=[tensorrt]"], "no backend"),
    "a batch of none": (["--set=batches=[0]"], "greater than 0"),
    "no time for timing": (["--set=timing_seconds=0"], "timing_seconds"),
    "timing without end": (["--set=timing_seconds=1e300"], "less than or equal to 86400"),
    "a batch that no memory holds": (["--set=batches=[100000000000]"], "give batches of at most"),
    "a negative seed": (["--seed", "-1"], "seed"),
    "a seed too large": (["--seed", "99999999999999999999"], "seed"),
    "a folder in itself": (["--data", "imagefolder:looped"], "is a link to a folder that it lies in"),
    "a seed in words": (["--seed", "x"], "--seed"),
    "an unknown option": (["--epochs", "3"], "No such option"),
    "an unknown device": (["--device", "gpu"], "'gpu' is no device"),
    "an unknown library": (["--model", "keras:resnet50"], "no module 'keras'"),
    "a misspelt network": (["--model", "dynamize:digits_resnt"], "Did you mean digits_resnet"),
    "a file of code that is not there": (["--model", "nothere.py:make"], "nothere.py"),
    "an argument that the network does not take": (["--set=model.kwargs={depth: 3}"], "Change or omit arguments"),
    "a checkpoint that is not there": (["--checkpoint", "nothere.pt", "--set=model.kwargs={}"], "nothere.pt"),
    "a checkpoint that is text": (["--checkpoint", "list.yaml", "--set=model.kwargs={}"], "list.yaml"),
    "a checkpoint of another network": (["--checkpoint", "other.pt", "--set=model.kwargs={}"], "other.pt"),
    "a checkpoint and other weights": (["--checkpoint", "other.pt"], "keep one of them"),
    "images of another size of input": (["--input", "3,8,8"], "channels"),
    "a folder of images that is not there": (["--data", "imagefolder:nothere"], "nothere does not exist"),
    "a folder of images that is a file": (["--data", "imagefolder:list.yaml"], "is a file, not a folder"),
    "images of another kind": (["--data", "flickr:cats"], "unknown data source"),
    "a class without images": (["--data", "imagefolder:hollow"], "hold no image"),
    "another number of classes": (["--data", "imagefolder:two"], "has 2 classes"),
    "an archive that is not there": (["--data", "npz:nothere.npz"], "nothere.npz does not exist"),
    "an archive that is none": (["--data", "npz:list.yaml"], "cannot read"),
    "too few calibration images": (["--set=data.calibration=5"], "at least 20 are needed"),
    "more calibration images than there are": (["--set=data.calibration=90000"], "it can give"),
    "pixels in 0..255": (["--set=data.normalize=[[127], [60]]"], "divide values meant for 0..255 by 255"),
    "three means for one channel": (["--set=data.normalize=[[.5,.5,.5],[.2,.2,.2]]"], "normalize has 3 channels"),
    "an exit where none can be": (["--set=steps.0.at=[layer9]"], "'layer9' is no cut point"),
    "an exit twice": (["--set=steps.0.at=[layer1.2, layer1]"], "the same cut point"),
    "more exits than places": ([step("{pass: exits, count: 99}")], "use count:"),
    "heads over their share": (["--set=steps.0.share=0.00001"], "Raise share"),
    "sizes for other exits": (["--set=steps.0.size=[16]"], "give one for each"),
    "a budget below the cheapest path": ([*BUDGET, "--set=steps.2.macs_ratio=0.01"], "Ask for macs_ratio: 0."),
    "a share for MACs": ([*BUDGET, "--set=steps.2.macs=0.5"], "write macs_ratio: 0.5"),
    "MACs below the cheapest path": ([*BUDGET, "--set=steps.2.macs=10"], "--set steps.2.macs="),
    "a budget for gates that are not there": (["--set=steps.1.gate_budget=0.5"], "the network has no gates"),
    "a budget that gates cannot reach": (
        [step("{pass: skip_gates, group: 1}, {pass: distill, gate_budget: 0.01}")],
        "gate_budget 0.01 cannot be reached",
    ),
    "a gate on a block that is not there": ([step("{pass: skip_gates, blocks: [[layer9]]}")], "is no residual block"),
    "unlabelled images that are not there": (["--set=steps.1.unlabelled=nothere"], "nothere does not exist"),
    "weights for other exits": (["--set=steps.1.exit_weights=[1]"], "exit_weights has 1 entries"),
    "an unknown tracker": (["--set=steps.1.trackers=[notebook]"], "trackers: notebook"),
    "going on with a run and replacing it": (["--resume", "--overwrite"], "give one of them"),
}


LIKE_OTHERS = {  # and take longer, for images are read and steps tried
    "a folder of images that is a file",
    "an archive that is none",
    "another number of classes",
    "more calibration images than there are",
    "three means for one channel",
    "an exit twice",
    "more exits than places",
    "sizes for other exits",
    "MACs below the cheapest path",
    "a budget for gates that are not there",
    "a gate on a block that is not there",
    "weights for other exits",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with files that are not what they are named as."""
    here = tmp_path_factory.mktemp("bad")
    for name, text in RECIPES.items():
        (here / name).write_text(text)
    (here / "own.py").write_text("raise SystemExit('run without being trusted')\n")
    torch.save({"weight": torch.zeros(3)}, here / "other.pt")
    (here / "hollow" / "a").mkdir(parents=True)
    (here / "looped" / "a").mkdir(parents=True)
    (here / "looped" / "a" / "again").symlink_to("..")
    for name in ("a", "b"):
        (here / "two" / name).mkdir(parents=True)
        for number in range(60):
            Image.new("L", (8, 8), number).save(here / "two" / name / f"{number}.png")
    return here


@pytest.fixture(autouse=True)
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: object, **__: object) -> None:
        raise AssertionError("an image was trained on")

    monkeypatch.setattr("dynamize.transforms.distill.train", train)


def refused(result: SimpleNamespace, told: str) -> None:
    lines = result.stderr.splitlines()
    assert result.exit_code == 2, result.output
    assert lines[0].startswith("error: ")
    assert len(lines) == 1 or "does not fit" in lines[0], result.stderr  # which lists names
    assert told in lines[0]
    assert "Traceback" not in result.output


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("fault", only(RECIPE_FAULTS.keys() - LIKE_OTHERS, RECIPE_FAULTS))
def test_a_run_that_cannot_work(
    verb: str, fault: str, place: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, told = RECIPE_FAULTS[fault]
    if verb == "check" and "--resume" in arguments:
        arguments, told = ["--resume"], "No such option"
    recipe = ["digits_exits", *QUICK] if arguments[0].startswith("-") else []
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    refused(cli(verb, *recipe, *arguments, "--out", tmp_path / "out"), told)
    assert sorted(place.rglob("*")) == before
    assert not (tmp_path / "out").exists()


def _in_the_way(folder: Path) -> str:
    (folder / "out").write_text("a file")
    return "out"


def _foreign(folder: Path) -> str:
    (folder / "out").mkdir()
    (folder / "out" / "thesis.tex").write_text("years of work")
    return "out"


def _below_a_file(folder: Path) -> str:
    (folder / "file").write_text("a file")
    return "file/deeper/out"


@pytest.mark.parametrize(
    ("make", "told"),
    [(_in_the_way, "is a file"), (_foreign, "holds no run of dynamize"), (_below_a_file, "cannot lie in it")],
)
@pytest.mark.parametrize("verb", VERBS)
def test_a_folder_that_cannot_take_the_run(
    verb: str, make: Callable[[Path], str], told: str, tmp_path: Path, cli: Cli
) -> None:
    out = make(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    refused(cli(verb, "digits_exits", *QUICK, "--out", tmp_path / out), told)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("verb", VERBS)
def test_a_disk_that_is_full(verb: str, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**5))
    refused(cli(verb, "digits_exits", *QUICK, "--out", tmp_path / "out"), "free some space")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def untrained_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifacts") / "out"
    net = dz.source("dynamize:digits_resnet", pretrained=True)
    spec = DataSpec(source="digits", normalize=((0.305,), (0.376,)))
    dz.save(dz.convert(net, [dz.Exits(count=1)], (1, 8, 8)), out, data=spec, classes=[str(k) for k in range(10)])
    return out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["predict", "OUT", "nothere.png"], "nothere.png"),
        (["predict", "OUT", "two", "--budget", "0.5"], "has no operating points yet"),
        (["predict", "OUT", "two", "--budget", "0.5", "--max-drop", "1"], "give one of them"),
        (["predict", "OUT", "hollow"], "holds no image"),
        (["predict", "OUT"], "Missing argument"),
        (["predict", "nothere", "two"], "nothere"),
        (["calibrate", "OUT", "--macs-ratio", "50"], "write 0.5 for 50 %"),
        (["calibrate", "OUT", "--macs", "0.5"], "write macs_ratio: 0.5"),
        (["calibrate", "OUT", "--macs-ratio", "0.5", "--max-drop", "1"], "are budgets each"),
        (["calibrate", "OUT", "--max-drop", "-1"], "max_drop"),
        (["bench", "OUT", "--batches", "one"], "--batches one"),
        (["bench", "OUT", "--batches", "1,100000000000"], "give batches of at most"),
        (["bench", "OUT", "--batches", "1" + 5000 * "0"], "write whole numbers"),
        (["bench", "OUT", "--seconds", "1e300"], "would hardly end"),
        (["bench", "OUT", "--backends", "tensorrt"], "no backend"),
        (["bench", "two"], "two"),
        (["export", "OUT", "--to", "two"], "two"),
        (["inspect", "nothere"], "is not a source"),
        (["inspect", "OUT", "--input", "1,8,8"], "leave out --input"),
        (["inspect", "OUT", "--weights", "model_ema"], "and --weights"),
        (["report", "OUT"], "holds no run"),
        (["report", "OUT", "--json", "--markdown"], "give one of them"),
        (["transforms", "exit"], "Did you mean exits"),
        (["recipes", "show", "quikstart"], "Did you mean quickstart"),
        (["rnu", "quickstart"], "No such command"),
    ],
)
def test_other_verbs(
    arguments: list[str], told: str, place: Path, untrained_artifact: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    before = {file: file.stat().st_mtime_ns for file in (*place.rglob("*"), *untrained_artifact.rglob("*"))}
    refused(cli(*(str(untrained_artifact) if one == "OUT" else one for one in arguments)), told)
    assert {file: file.stat().st_mtime_ns for file in (*place.rglob("*"), *untrained_artifact.rglob("*"))} == before


@pytest.mark.slow
def test_what_is_checked_runs(tmp_path: Path, cli: Cli) -> None:
    result = cli("check", "digits_exits", *QUICK, "--set=steps.0.at=auto", "--json", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    assert [step["transform"] for step in plan["steps"]] == ["exits", "distill", "calibrate"]
    assert [one["name"] for one in plan["exits"]] == ["exit.1", "exit.2"]
    assert all(0.5 < one["probe"] <= 1 for one in plan["exits"])
    assert plan["cheapest_ratio"] == pytest.approx(plan["exits"][0]["macs_ratio"])
    assert plan["warnings"] == []
    assert not (tmp_path / "out").exists()
    assert "Nothing stands in the way" in cli("check", "digits_exits", *QUICK).stdout


@pytest.mark.parametrize("verb", ["check", "run"])
@pytest.mark.fast("check")
def test_a_forgotten_checkpoint_is_told(verb: str, tmp_path: Path, cli: Cli) -> None:
    steps = "--set=steps=[{pass: exits, head: linear}]"
    quick = ["--set=timing_seconds=0.01", "--set=batches=[32]", "--set=expect={}"]
    result = cli(verb, "digits_exits", *QUICK, *quick, steps, "--set=model.kwargs={}", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    told = " ".join((result.stdout + result.stderr).split())
    assert "no checkpoint was given, so its weights are random: add --checkpoint FILE" in told
