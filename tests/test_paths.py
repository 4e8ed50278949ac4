"""A path in a recipe is one beside it, or else in the working folder; one on the command line is in the latter."""

from pathlib import Path

import pytest
import yaml

from dynamize.recipe import load_recipe


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Where the recipe lies, and where the user stands."""
    beside, here = tmp_path / "recipes", tmp_path / "here"
    for folder in (beside, here):
        folder.mkdir()
    monkeypatch.chdir(here)
    return beside, here


def load(folder: Path, *overrides: str, **sections: object) -> dict[str, object]:
    plain: dict[str, object] = {
        "version": 1,
        "model": {"source": "own.py:factory,width=2", "checkpoint": "a.pt", "input": [3, 32, 32]},
        "data": {"source": "imagefolder:images"},
        "steps": [{"pass": "distill", "unlabelled": "more"}],
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(plain | sections))
    found = load_recipe(folder / "mine.yaml", overrides)
    return {
        "source": found.model.source,
        "checkpoint": found.model.checkpoint,
        "data": found.data.source,
        "unlabelled": getattr(found.steps[0], "unlabelled", None),
    }


def test_beside_the_recipe(folders: tuple[Path, Path]) -> None:
    beside, here = folders
    (here / "images").mkdir()
    (beside / "images").mkdir()
    assert load(beside) == {
        "source": f"{beside / 'own.py'}:factory",
        "checkpoint": beside / "a.pt",
        "data": f"imagefolder:{beside / 'images'}",
        "unlabelled": beside / "more",
    }


def test_in_the_working_folder_where_there_is_nothing_beside(folders: tuple[Path, Path]) -> None:
    beside, here = folders
    for name in ("images", "more"):
        (here / name).mkdir()
    for name in ("a.pt", "own.py"):
        (here / name).touch()
    assert load(beside) == {
        "source": "own.py:factory",
        "checkpoint": Path("a.pt"),
        "data": "imagefolder:images",
        "unlabelled": Path("more"),
    }


def test_overrides_are_of_the_working_folder(folders: tuple[Path, Path]) -> None:
    beside, _ = folders
    (beside / "other").mkdir()
    found = load(beside, "data.source=imagefolder:other", "model.checkpoint=b.pt", "steps.0.unlabelled=~/pictures")
    assert found["data"] == "imagefolder:other"
    assert found["checkpoint"] == Path("b.pt")
    assert found["unlabelled"] == Path.home() / "pictures"


def test_a_checkpoint_of_which_a_part_is_named(folders: tuple[Path, Path]) -> None:
    beside, _ = folders
    model = {"source": "torchvision:resnet18", "checkpoint": {"file": "a.pt", "weights": "ema"}, "input": [3, 32, 32]}
    assert load(beside, model=model)["checkpoint"].file == beside / "a.pt"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("npz:a/b.npz", "npz:{}/a/b.npz"),
        ("torchvision:CIFAR10@data", "torchvision:CIFAR10@{}/data"),
        ("imagefolder:/data/images", "imagefolder:/data/images"),
        ("digits", "digits"),
    ],
)
def test_every_source_of_images(source: str, found: str, folders: tuple[Path, Path]) -> None:
    beside, _ = folders
    assert load(beside, data={"source": source})["data"] == found.format(beside)


def test_libraries_are_no_paths(folders: tuple[Path, Path]) -> None:
    beside, _ = folders
    model = {"source": "torchvision:resnet18", "input": [3, 32, 32]}
    assert load(beside, model=model)["source"] == "torchvision:resnet18"


def test_a_builtin_recipe_means_the_working_folder() -> None:
    assert load_recipe("early_exit").data.source == "imagefolder:images"
