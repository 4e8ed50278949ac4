"""What users have who have no training set: images to validate on, without labels, few, or of some classes only."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dynamize as dz
from dynamize.data import DataSpec, Splits, load_data
from dynamize.errors import DynamizeError

SHAPE = (3, 8, 8)


def load(source: str, classes: int | None = 2, **fields: object) -> Splits:
    return load_data(DataSpec(source=source, **fields), SHAPE, classes)


def sizes(splits: Splits) -> tuple[int, int, int]:
    return len(splits.train), len(splits.calibration), len(splits.test)


def flat(root: Path, part: str) -> None:
    """All images of a part in one folder, without classes."""
    for folder in sorted((root / part).iterdir()):
        for image in sorted(folder.iterdir()):
            image.rename(root / part / f"{folder.name}{image.name}")
        folder.rmdir()


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2)).eval()


@pytest.mark.parametrize("part", ["test", "val"])
def test_validation_images_alone_calibrate_and_judge(make_folder: Callable[..., Path], part: str) -> None:
    splits = load(f"imagefolder:{make_folder(**{part: 60})}")
    assert sizes(splits) == (0, 60, 60)
    assert splits.test.labels.tolist() == [0] * 30 + [1] * 30
    assert splits.spec is not None
    assert splits.spec.calibration_from == "test"
    assert "no train images" in splits.warnings[0]
    with pytest.raises(DynamizeError, match="there are no train images, and this step trains on them"):
        splits.train.training_loader(8, 0)


def test_both_validation_and_test_images_are_a_split_each(make_folder: Callable[..., Path]) -> None:
    splits = load(f"imagefolder:{make_folder(val=30, test=40)}")
    assert sizes(splits) == (0, 60, 80)


def test_all_classes_are_known_where_each_part_lacks_one(make_folder: Callable[..., Path]) -> None:
    root = make_folder(val=40, test=40)
    shutil.rmtree(root / "val" / "dog")
    shutil.rmtree(root / "test" / "cat")
    splits = load(f"imagefolder:{root}")
    assert (splits.classes, set(splits.test.labels.tolist())) == (("cat", "dog"), {1})
    assert [("none of dog" in one, "none of cat" in one) for one in splits.warnings[:2]] == [
        (True, False),
        (False, True),
    ]


def test_a_class_that_is_nowhere_needs_its_folder(make_folder: Callable[..., Path]) -> None:
    root = make_folder(test=60)
    with pytest.raises(DynamizeError, match="add an empty folder for each class without images"):
        load(f"imagefolder:{root}", classes=3)
    (root / "test" / "bird").mkdir()
    splits = load(f"imagefolder:{root}", classes=3)
    assert (splits.classes, set(splits.test.labels.tolist())) == (("bird", "cat", "dog"), {1, 2})


def test_a_hundred_and_twenty_images(make_folder: Callable[..., Path]) -> None:
    assert sizes(load(f"imagefolder:{make_folder(flat=60)}")) == (80, 20, 20)


@pytest.mark.parametrize("place", ["", "test", "val"])
def test_images_without_labels(make_folder: Callable[..., Path], place: str) -> None:
    root = make_folder(test=60)
    flat(root, "test")
    (root / "test").rename(root / (place or "images"))
    splits = load(f"imagefolder:{root if place else root / 'images'}")
    assert sizes(splits) == (0, 60, 60)
    assert splits.classes == ("0", "1")
    assert splits.test.unlabelled


def test_labelled_train_and_unlabelled_test_images(make_folder: Callable[..., Path]) -> None:
    root = make_folder(train=250, test=30)
    flat(root, "test")
    splits = load(f"imagefolder:{root}")
    assert splits.classes == ("cat", "dog")
    assert (splits.calibration.unlabelled, splits.test.unlabelled) == (False, True)


def test_arrays_without_train_or_labels(make_npz: Callable[..., Path]) -> None:
    x, y = np.random.RandomState(0).randint(0, 256, (80, 8, 8, 3), dtype=np.uint8), np.arange(80) % 2
    assert sizes(load(f"npz:{make_npz(x_test=x, y_test=y)}", classes=3)) == (0, 40, 40)
    for arrays in ({"x": x}, {"x_test": x}, {"x_val": x}):
        splits = load(f"npz:{make_npz(**arrays)}")
        assert sizes(splits) == (0, 40, 40)
        assert splits.test.unlabelled


def test_too_few_to_calibrate_says_how_many_are_needed(make_folder: Callable[..., Path]) -> None:
    with pytest.raises(DynamizeError, match="at least 20 are needed"):
        load(f"imagefolder:{make_folder(test=15)}")


def batches(labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(len(labels))
    return [(torch.randn(20, *SHAPE), one) for one in labels.split(20)]


@pytest.mark.parametrize("kind", ["folder", "loaders"])
def test_steps_do_without_labels_and_train_images(make_folder: Callable[..., Path], kind: str) -> None:
    if kind == "folder":
        root = make_folder(test=60)
        flat(root, "test")
        data = load(f"imagefolder:{root}")
    else:
        data = dz.splits(calibration=batches(torch.full((60,), -1)), test=batches(torch.full((60,), -1)))
    context = dz.Context(data=data, backend="eager")
    steps = [dz.Exits(count=1, share=1.0, head="linear"), dz.Calibrate(macs_ratio=1.2), dz.Quantize(images=20)]
    made = dz.convert(net(), steps, SHAPE, context)
    assert [step["pass"] for step in made.history] == ["exits", "calibrate", "quantize"]
    assert made.operating_points[-1].accuracy > 0.8  # agreement with the original network
    with pytest.raises(DynamizeError, match="there are no train images"):
        dz.convert(net(), [steps[0], dz.Distill(epochs=1)], SHAPE, context)
