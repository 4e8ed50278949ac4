"""Cluttered canvases: the same for everybody, with boxes that hold the image, and nothing of another split on them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dynamize.data import DataSpec, load_data
from dynamize.data.canvas_spec import CanvasSpec
from dynamize.data.splits import Splits
from dynamize.errors import DynamizeError
from dynamize.paths import from_here, located

PLAIN = {"normalize": [[0.0], [1.0]], "memory_gb": 0.0, "augment": "none"}


def load(source: str, shape: tuple[int, int, int] = (1, 32, 32), **options: object) -> Splits:
    return load_data(DataSpec(source=source, **{**PLAIN, **options}), shape, 10)


@pytest.fixture(scope="module")
def splits() -> Splits:
    return load("canvas:digits,size=32,object=8")


def parts(splits: Splits) -> list:
    return [splits.train, splits.calibration, splits.test]


def test_the_image_lies_in_its_box(splits: Splits) -> None:
    plain = load("digits", (1, 8, 8))
    for images, originals in zip(parts(splits), parts(plain), strict=True):
        assert images.shape == (1, 32, 32)
        assert torch.equal(images.labels, originals.labels)
        assert images.boxes.shape == (len(images), 4)
        canvases, _ = images.__getitems__(range(20))
        for canvas, box, original in zip(canvases, images.boxes.int().tolist(), originals, strict=False):
            left, top, right, bottom = box
            assert torch.equal(canvas[:, top:bottom, left:right], original[0])
    assert len(splits.train.boxes.unique(dim=0)) > 300


def test_sides_are_drawn_between_the_limits_and_fit() -> None:
    boxes = load("canvas:digits,size=40,object=10-20", (1, 40, 40)).train.boxes
    sides = boxes[:, 2:] - boxes[:, :2]
    assert torch.equal(sides[:, 0], sides[:, 1])
    assert sorted(set(sides[:, 0].tolist())) == list(range(10, 21))
    assert boxes.min() == 0
    assert boxes.max() == 40


def test_canvases_depend_on_seed_and_number_alone(splits: Splits) -> None:
    test = splits.test
    whole, _ = test.__getitems__(range(len(test)))
    assert torch.equal(test.__getitems__([7])[0][0], whole[7])
    again = load("canvas:digits,size=32,object=8", memory_gb=1.0).test
    assert again.in_memory
    assert torch.equal(again.__getitems__(range(len(test)))[0], whole)
    assert torch.equal(again.boxes, test.boxes)
    other = load("canvas:digits,size=32,object=8,seed=1").test
    assert not torch.equal(other.boxes, test.boxes)


def test_fragments_are_of_the_same_split(tmp_path: Path) -> None:
    grey = {"train": 50, "test": 200}
    arrays = {f"x_{part}": np.full((60, 8, 8), level, np.uint8) for part, level in grey.items()}
    labels = {f"y_{part}": np.arange(60) % 10 for part in grey}
    np.savez(tmp_path / "two.npz", **arrays, **labels)
    splits = load(f"canvas:npz:{tmp_path / 'two.npz'},size=32,clutter=40", calibration=20)
    for images, level in ((splits.train, 50), (splits.calibration, 50), (splits.test, 200)):
        seen, _ = images.__getitems__(range(len(images)))
        assert set(seen.unique().tolist()) == {0, level}
        assert (seen == level).float().mean() > 0.3


def test_without_clutter_there_is_the_image_alone() -> None:
    images = load("canvas:digits,size=32,object=8,clutter=0").test
    canvas, box = images[0][0], images.boxes[0].int().tolist()
    canvas[:, box[1] : box[3], box[0] : box[2]] = 0
    assert not canvas.any()


def test_boxes_follow_the_images_to_another_size() -> None:
    source = "canvas:digits,size=64,clutter=0"
    whole, small, cropped = load(source, (1, 64, 64)).test, load(source).test, load(source, resize=64).test
    assert small.shape == cropped.shape == (1, 32, 32)
    assert torch.allclose(small.boxes, whole.boxes / 2)
    assert torch.allclose(cropped.boxes, (whole.boxes - 16).clamp(0, 32))


def test_files_of_any_shape_are_placed_whole(tmp_path: Path, make_folder) -> None:
    root = make_folder(size=(12, 20), train=30, test=30)
    spec = DataSpec(source=f"canvas:imagefolder:{root},size=96,object=24-40", normalize=[[0.0] * 3, [1.0] * 3])
    images = load_data(spec, (3, 96, 96), 2).test
    assert images.shape == (3, 96, 96)
    assert images[0][0].shape == (3, 96, 96)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("canvas:", "incomplete: write canvas:SOURCE,size=128"),
        ("canvas:digits,sise=64", "no option 'sise': Did you mean size"),
        ("canvas:digits,size=64,size=32", "size is given twice"),
        ("canvas:digits,size=wide", "size=wide is no whole number from 16 to 1024"),
        ("canvas:digits,size=32,object=40", "object=40 is no whole number from 4 to 32"),
        ("canvas:digits,object=40-24", "as in object=24-40"),
        ("canvas:digits,clutter=-1", "clutter=-1 is no whole number"),
        ("canvas:canvas:digits", "a canvas on canvases"),
        ("canvas:folder:x,size=96", "unknown data source 'folder:x'"),
        ("canvas:imagefolder:,size=96", "write imagefolder:PATH"),
    ],
)
def test_what_is_refused(source: str, said: str) -> None:
    with pytest.raises(DynamizeError, match=said):
        DataSpec(source=source)


def test_options_are_told_from_paths() -> None:
    inner, spec = CanvasSpec.read("npz:a,b.npz,size=96,object=24-40,clutter=5,seed=3")
    assert inner == "npz:a,b.npz"
    assert spec == CanvasSpec(96, (24, 40), 5, 3)
    found = located({"source": "canvas:imagefolder:~/x,size=96"}, DataSpec, from_here)
    assert found["source"] == f"canvas:imagefolder:{Path.home() / 'x'},size=96"
