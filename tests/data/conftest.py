"""Small image folders and arrays, written where a test asks for them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FolderMaker = Callable[..., Path]


@pytest.fixture
def make_folder(tmp_path: Path) -> FolderMaker:
    """make_folder(train=60, test=40): that many images in each of two classes, numbered from 0000."""

    def make(size: tuple[int, int] = (8, 8), mode: str = "RGB", **parts: int) -> Path:
        random = np.random.RandomState(0)
        for part, count in parts.items():
            for name in ("cat", "dog"):
                folder = tmp_path / part / name if part != "flat" else tmp_path / name
                folder.mkdir(parents=True)
                for i in range(count):
                    pixels = random.randint(0, 256, (*size, 3), dtype=np.uint8)
                    Image.fromarray(pixels).convert(mode).save(folder / f"{i:04}.png")
        return tmp_path

    return make


@pytest.fixture
def make_npz(tmp_path: Path) -> Callable[..., Path]:
    def make(**arrays: np.ndarray) -> Path:
        path = tmp_path / "data.npz"
        np.savez(path, **arrays)
        return path

    return make
