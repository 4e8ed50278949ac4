"""Images that a script brings: loaders, datasets and tensors, in three splits that share none."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor

from dynamize.data import Splits
from dynamize.data.given import splits
from dynamize.data.images import set_epoch
from dynamize.errors import DynamizeError

SHAPE = (3, 4, 4)


def pair(count: int = 40) -> tuple[Tensor, Tensor]:
    return torch.randn(count, *SHAPE), torch.arange(count) % 2


def dataset(count: int = 40) -> TensorDataset:
    return TensorDataset(*pair(count))


class Items(Dataset[Any]):
    """Whatever a user's dataset may give."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from zip(*pair(), strict=True)


def test_loaders_keep_their_batches_and_order() -> None:
    parts = {name: DataLoader(dataset(), batch_size=8) for name in ("train", "calibration", "test")}
    data = splits(**parts, class_names=["a", "b"])
    assert data.classes == ("a", "b")
    assert len(data.test) == 40
    assert data.test.labels.tolist() == [0, 1] * 20
    images, labels = next(data.test.batches(99))
    assert torch.equal(images, parts["test"].dataset.tensors[0][:8])
    assert labels.dtype == torch.int64
    assert data.train.training_loader(4, seed=0) is parts["train"]
    assert data.train.prepare(images, torch.Generator()) is images
    assert data.test.shape == SHAPE


def test_loaders_may_share_a_dataset_but_no_image() -> None:
    whole = dataset()
    a, b, c, overlapping = (DataLoader(Subset(whole, range(i, i + 10)), batch_size=4) for i in (0, 10, 20, 15))
    assert len(splits(train=a, calibration=b, test=c).train) == 10
    with pytest.raises(DynamizeError, match="calibration and test share 5 images"):
        splits(train=a, calibration=b, test=overlapping)
    batches = [pair(2)]
    with pytest.raises(DynamizeError, match="train and test share"):
        splits(train=batches, calibration=b, test=batches)


def test_datasets_and_tensors_are_read_as_a_step_asks_for() -> None:
    images, labels = pair(50)
    data = splits(
        train=TensorDataset(images, labels), calibration=pair(), test=(np.zeros((7, *SHAPE), "f"), np.ones(7, int))
    )
    assert [len(part) for part in (data.train, data.calibration, data.test)] == [50, 40, 7]
    assert [len(batch) for batch, _ in data.calibration.batches(16)] == [16, 16, 8]
    assert torch.equal(torch.cat([batch for batch, _ in data.train.batches(16)]), images)
    assert data.test.labels.tolist() == [1] * 7
    loader = data.train.training_loader(16, seed=3)
    first, again = ([labels for _, labels in loader] for _ in range(2))
    assert [len(one) for one in first] == [16, 16, 16]
    assert torch.equal(torch.cat(first), torch.cat(again))
    set_epoch(loader, 1)
    assert not torch.equal(torch.cat(first), torch.cat([labels for _, labels in loader]))


def test_pieces_of_one_tensor_may_not_overlap() -> None:
    images, labels = pair(60)
    parts = {"train": slice(0, 20), "calibration": slice(20, 40), "test": slice(40, 60)}
    assert len(splits(**{name: (images[part], labels[part]) for name, part in parts.items()}).test) == 20
    with pytest.raises(DynamizeError, match="train and calibration share 5 images"):
        splits(train=(images[:25], labels[:25]), calibration=(images[20:40], labels[20:40]), test=pair())


def test_folders_read_twice_are_compared_by_file(tmp_path: Path) -> None:
    for index in range(8):
        file = tmp_path / str(index % 2) / f"{index}.png"
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(file)
    train, judged = ImageFolder(tmp_path, ToTensor()), ImageFolder(tmp_path, ToTensor())
    fine = splits(train=Subset(train, [0, 1]), calibration=Subset(judged, [2, 3]), test=Subset(judged, [4, 5]))
    assert fine.test.shape == SHAPE
    with pytest.raises(DynamizeError, match=r"train and test share 1 images, such as .*2\.png"):
        splits(train=Subset(train, [0, 1]), calibration=Subset(judged, [2, 3]), test=Subset(judged, [1, 5]))


def test_looking_at_the_first_batch_does_not_move_the_random_state() -> None:
    state = torch.random.get_rng_state()
    splits(train=DataLoader(TensorDataset(torch.ones(9, *SHAPE), torch.ones(9).long()), shuffle=True), **judged())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_train_images_are_not_needed() -> None:
    data: Splits = splits(**judged())
    assert len(data.train) == 0
    with pytest.raises(DynamizeError, match="there are no train images"):
        data.train.training_loader(4, 0)


def judged() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(30, *SHAPE, generator=generator), torch.zeros(30).long()) for name in ("calibration", "test")
    }


IMAGE = torch.zeros(SHAPE)
GOOD = torch.zeros(2, *SHAPE)


@pytest.mark.parametrize("name", ["train", "calibration", "test"])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (iter([]), "read once at most"),
        (None, "=None gives no images: give a DataLoader"),
        (7, "=7 gives no images"),
        ("images/", r"='images/' gives no images.*a folder is read by dynamize\.data\.load_data"),
        ([GOOD], r"gave a Tensor; it must give \(images, labels\)"),
        ([{"pixels": GOOD, "label": torch.zeros(2)}], r"gave a dict of pixels, label; .*collate_fn"),
        (DataLoader([{"pixels": IMAGE, "label": 1}]), "gave a dict of pixels, label"),  # type: ignore[arg-type]
        ([(GOOD.byte(), torch.zeros(2).long())], "normalised floating-point"),
        ((GOOD.byte(), torch.zeros(2).long()), "images .* of torch.uint8; .*normalised floating-point"),
        ((GOOD, torch.zeros(3).long()), "2 images, labels .*one class number per image"),
        ([(GOOD, torch.zeros(2, 10))], "one class number per image"),
        (Items({"pixels": IMAGE, "label": 1}), r"gives a dict of pixels, label for an image; .*Dataset of your own"),
        (Items((Image.new("RGB", (4, 4)), 1)), r"gives images as Image; .*ToTensor\(\)"),
        (Items((IMAGE, torch.zeros(10))), r"labels \(10,\); it must give one class number"),
        (Items((IMAGE.byte(), 1)), "normalised floating-point"),
        (Items(IMAGE), "dataset gives a Tensor for an image"),
        (Items(*[(torch.zeros(3, 5, 5), 0)] * 2), "images are 3 x . x . and test images 3 x . x .: give all"),
    ],
)  # fmt: skip
def test_what_gives_no_images_with_labels_is_refused_at_once(name: str, given: Any, said: str) -> None:
    with pytest.raises(DynamizeError, match=said):
        splits(**{"train": pair(), **judged(), name: given})


@pytest.mark.parametrize("name", ["calibration", "test"])
def test_images_to_judge_on_are_there_and_in_order(name: str) -> None:
    for given, said in (([], "gave no batch"), (DataLoader(dataset(), shuffle=True), "shuffle=False")):
        with pytest.raises(DynamizeError, match=said):
            splits(**{**judged(), name: given})


def test_images_of_other_sizes_later_on_are_refused() -> None:
    data = splits(train=Items((IMAGE, 0), (torch.zeros(3, 4, 5), 1)), **judged())
    with pytest.raises(DynamizeError, match=r"train images are of different sizes, \(3, 4, 4\) and \(3, 4, 5\)"):
        next(iter(data.train.training_loader(2, 0)))


def test_a_stream_without_a_length_can_be_judged_on_and_not_trained_on() -> None:
    data = splits(train=DataLoader(Stream(), 8), calibration=DataLoader(Stream(), 8), test=pair())
    assert len(data.calibration) == 40
    with pytest.raises(DynamizeError, match="does not say how many batches"):
        data.train.training_loader(8, 0)
