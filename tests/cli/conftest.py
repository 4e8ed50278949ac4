"""One small run of the recipe `digits_exits` that all verbs are tried on, and the command line as a user types it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from commandline import Cli, call
from ledgers import TINY
from PIL import Image
from sklearn.datasets import load_digits


@pytest.fixture
def cli() -> Cli:
    return call


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "digits_exits"
    result = call("run", "digits_exits", "--out", out, *TINY)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def artifact(finished_run: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(finished_run, tmp_path / "artifact"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five digits as PNG files, in a folder of a folder."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "more").mkdir()
    pixels, labels = load_digits(return_X_y=True)
    for i in range(5):
        image = Image.fromarray(np.rint(pixels[i].reshape(8, 8) * 255 / 16).astype(np.uint8))
        image.save(folder / ("more" if i == 4 else "") / f"{i}-is-{labels[i]}.png")
    return folder
