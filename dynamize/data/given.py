"""Images that a script has: loaders, datasets or tensors, as three disjoint splits."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, SubsetRandomSampler, TensorDataset
from torch.utils.data import RandomSampler as Shuffled
from torch.utils.data import SequentialSampler as InOrder

from dynamize.data.loaders import DatasetSet, LoaderSet, checked_batch
from dynamize.data.splits import Splits, check_disjoint
from dynamize.errors import DynamizeError


def splits(*, train: Any = (), calibration: Any, test: Any, class_names: Sequence[str] | None = None) -> Splits:
    """Images of your own as three splits, for :func:`dynamize.run_steps` and :class:`dynamize.Context`.

    Each is a DataLoader, or what else gives batches of (images, labels) and can be read again and again; a map-style
    dataset of (image, label); or a pair (images, labels). Images are floating-point (N, C, H, W), normalised as the
    network's were in training, labels are class numbers (N,), -1 where there is none. Datasets and pairs are read in
    batches of the size that a step asks for; a loader's size, shuffling and augmentation are its own.

    Args:
        train: what steps train on; not needed where none does.
        calibration: what thresholds are solved on, which the network was not trained on.
        test: what everything is judged on.
        class_names: for reports.

    Raises:
        DynamizeError: one gives something else, can be read only once, is shuffled (calibration, test), or has images
            of another size; or two share images, as far as that can be seen.

    Example:
        >>> import torch
        >>> images, labels = torch.randn(300, 1, 8, 8), torch.randint(10, (300,))
        >>> data = dz.splits(calibration=(images[:200], labels[:200]), test=(images[200:], labels[200:]))
        >>> len(data.test)
        100
    """
    classes = tuple(class_names or ())
    given = {"train": train, "calibration": calibration, "test": test}
    sets = {name: given_images(name, one, classes) for name, one in given.items()}
    check_disjoint({name: set() if one.empty else set(_keys(one.loader)) for name, one in sets.items()})
    shapes = {name: one.shape for name, one in sets.items() if name != "train" or not one.empty}
    for name, shape in shapes.items():
        if shape != shapes["test"]:
            raise DynamizeError(
                f"{name} images are {_sized(shape)} and test images {_sized(shapes['test'])}: give all in one size"
            )
    return Splits(sets["train"], sets["calibration"], sets["test"], classes)


def given_images(name: str, given: Any, classes: tuple[str, ...] = ()) -> LoaderSet:
    """What stands for one split, ``name``: a loader, a dataset, or images and labels.

    Raises:
        DynamizeError: it is nothing of these.
    """
    if (
        isinstance(given, list | tuple)
        and len(given) == 2
        and all(isinstance(one, Tensor | np.ndarray) for one in given)
    ):
        images, labels = map(torch.as_tensor, given)
        checked_batch((images, labels), name)
        return DatasetSet(name, TensorDataset(images, labels), classes)
    if isinstance(given, Dataset) and not isinstance(given, IterableDataset):
        return DatasetSet(name, given, classes)
    if given is None or isinstance(given, str) or not hasattr(given, "__iter__"):
        folder = " (a folder is read by dynamize.data.load_data)" if isinstance(given, str) else ""
        raise DynamizeError(
            f"{name}={given!r} gives no images: give a DataLoader, a dataset, or a pair of tensors (images, labels)"
            f"{folder}"
        )
    return LoaderSet(name, given, classes)


def _keys(loader: Any) -> Iterator[Hashable]:
    """What tells the images of a dataset or DataLoader from all others; of any other loader, itself."""
    dataset, index = _numbered(loader)
    if index is None:
        yield (id(loader), 0)
        return
    while isinstance(dataset, Subset):
        index = [int(dataset.indices[i]) for i in index]
        dataset = dataset.dataset
    files = getattr(dataset, "samples", None)  # as torchvision's folders have them
    for i in index:
        if isinstance(dataset, TensorDataset):
            yield (0, dataset.tensors[0][i].data_ptr())
        elif isinstance(files, list):
            yield str(files[i][0])
        else:
            yield (id(dataset), i)


def _numbered(loader: Any) -> tuple[Any, Sequence[int] | None]:
    """The dataset that a loader, or one that is itself a dataset, reads, and at which places, where that is known."""
    if isinstance(loader, Dataset):
        return loader, range(len(loader))  # type: ignore[arg-type]
    dataset, sampler = getattr(loader, "dataset", None), getattr(loader, "sampler", None)
    if isinstance(sampler, SubsetRandomSampler):
        return dataset, [int(i) for i in sampler.indices]
    if isinstance(sampler, InOrder | Shuffled) and hasattr(dataset, "__len__"):
        return dataset, range(len(dataset))  # type: ignore[arg-type]
    return loader, None


def _sized(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
