"""`distill`: from fields to training, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from digits import SHAPE, DigitNet, digit_network, digit_splits
from PIL import Image
from pydantic import ValidationError

from dynamize.conversion import apply, convert, wrap
from dynamize.data import DataSpec, Splits, load_data
from dynamize.data.image_files import with_unlabelled
from dynamize.errors import DynamizeError
from dynamize.transform import Context
from dynamize.transforms import Distill, Exits

SHORT = {"epochs": 1, "batch_size": 64, "precision": "float32"}


def test_without_data_it_says_what_to_give() -> None:
    with pytest.raises(DynamizeError, match="`distill` needs images: give the recipe a `data:` section"):
        convert(DigitNet(), [Exits(at=["a"], head="linear"), Distill()], SHAPE)


@pytest.mark.parametrize(
    ("step", "early", "message"),
    [
        (Distill(exit_weights=[1.0, 1.0]), True, "exit_weights has 2 entries, the network 3 exits"),
        (Distill(train="heads"), False, "train: heads, but the network has no exit heads: put an `exits` step"),
    ],
)
def test_fields_that_do_not_fit_the_network(step: Distill, early: bool, message: str) -> None:
    network = digit_network() if early else wrap(DigitNet(), SHAPE)
    with pytest.raises(DynamizeError, match=message):
        apply(network, step, Context(data=digit_splits()))


@pytest.mark.parametrize("fields", [{"epochs": 0}, {"alpha": 1.5}, {"lr": 0}, {"exit_weights": [0.0]}, {"epoch": 1}])
def test_values_that_no_network_allows(fields: dict) -> None:
    with pytest.raises(ValidationError):
        Distill.model_validate(fields)


def test_training_heads_towards_the_teacher_alone(tmp_path: Path) -> None:
    """With alpha 1 and one teacher for all, labels do not matter: shuffled ones give the same bits."""
    splits = digit_splits()
    found = []
    for shuffled in (False, True):
        if shuffled:
            splits.train.labels[:] = splits.train.labels.flip(0)
        network = digit_network()
        context = Context(data=splits, teacher=DigitNet().eval() if not found else found[0][1], work=tmp_path)
        step = Distill(**SHORT, alpha=1.0, train="heads", gradient_equilibrium=True)
        tuned, notes = apply(network, step, context)
        assert not tuned.choose.equilibrium
        assert "accuracy of each exit on the calibration images: " in notes[0]
        found.append((tuned.state_dict(), context.teacher))
    assert all(torch.equal(found[0][0][name], found[1][0][name]) for name in found[0][0])
    assert (tmp_path / "metrics.jsonl").exists()


def test_auto_precision_is_resolved_in_the_history() -> None:
    context = Context(data=digit_splits(), teacher=DigitNet())
    tuned, _ = apply(digit_network(), Distill(epochs=1, batch_size=128), context)
    assert tuned.history[-1]["pass"] == "distill"
    assert tuned.history[-1]["precision"] in ("float32", "bfloat16")
    assert [step["pass"] for step in tuned.history] == ["exits", "distill"]


def unlabelled_folder(folder: Path, splits: Splits) -> Path:
    """Pictures of digits that no split holds, in a folder of a folder."""
    (folder / "more").mkdir(parents=True)
    for i in range(6):
        pixels = splits.train.__getitems__([i])[0][0, 0]
        Image.fromarray(255 - pixels.numpy()).save(folder / "more" / f"{i}.png")
    return folder


def test_images_without_labels_are_added_to_the_train_images(tmp_path: Path) -> None:
    splits = digit_splits(100)
    more = with_unlabelled(splits, unlabelled_folder(tmp_path, splits))
    assert len(more.train) == 106
    assert more.train.labels[100:].tolist() == [-1] * 6
    assert torch.equal(more.train.labels[:100], splits.train.labels)
    pixels, labels = more.train.__getitems__([105, 3, 100])
    assert labels.tolist() == [-1, int(splits.train.labels[3]), -1]
    old = splits.train.__getitems__([0, 3, 5])[0]
    assert torch.equal(pixels, torch.stack([255 - old[2], old[1], 255 - old[0]]))
    assert len(splits.train) == 100


def test_training_sees_them(tmp_path: Path) -> None:
    splits = digit_splits(100)
    folder = unlabelled_folder(tmp_path, splits)
    found = []
    for given in (None, str(folder)):
        context = Context(data=splits, teacher=DigitNet().eval())
        step = Distill(epochs=1, batch_size=106, precision="float32", unlabelled=given)
        found.append(apply(digit_network(), step, context)[0].state_dict())
    assert any(not torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": 0.0, "unlabelled": "x"}, "unlabelled, but alpha: 0"),
        ({"unlabelled": "nowhere"}, "the folder .*nowhere does not exist"),
        ({"features": 1.0, "train": "heads"}, "features, but train: heads"),
    ],
)
def test_what_cannot_be_learnt_from_the_teacher(fields: dict, message: str) -> None:
    with pytest.raises(DynamizeError, match=message):
        apply(digit_network(), Distill(**fields), Context(data=digit_splits(100), teacher=DigitNet()))


def test_images_that_are_judged_on_are_not_trained_on(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for label in range(2):
            (tmp_path / part / str(label)).mkdir(parents=True)
            for i in range(15):
                pixels = np.full((8, 8), 16 * i + label, np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / str(label) / f"{i}.png")
    spec = DataSpec(source=f"imagefolder:{tmp_path}", calibration=20, normalize=((0.3,), (0.4,)))
    splits = load_data(spec, SHAPE, 2)
    with pytest.raises(DynamizeError, match=r"is one of the (calibration|test) images"):
        with_unlabelled(splits, tmp_path)
    with pytest.raises(DynamizeError, match="is one of the test images"):
        with_unlabelled(splits, tmp_path / "test" / "1")
