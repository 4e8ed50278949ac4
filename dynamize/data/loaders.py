"""What users have of images, as one split: a loader of theirs, or a dataset of theirs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from dynamize.data.images import Batch, EpochSampler, refuse_none
from dynamize.data.pools import UNLABELLED
from dynamize.errors import DynamizeError

_BATCH = 256  # images read at once where nobody says how many


class LoaderSet:
    """A user's own loader of (normalised float images (N, C, H, W), int64 labels (N,)) as one split.

    Its batch size, order and augmentation are the user's: `training_loader` returns it as it is.
    """

    def __init__(self, name: str, loader: Any, classes: tuple[str, ...] = ()) -> None:
        self.name = name
        self.loader = loader
        self.classes = classes
        self._instead: Tensor | None = None
        self._check()

    def _check(self) -> None:
        if not hasattr(self.loader, "__iter__") or hasattr(self.loader, "__next__"):
            raise DynamizeError(
                f"the {self.name} loader is a {type(self.loader).__name__}, which can be read once at most; "
                "pass what can be iterated again and again, such as a DataLoader or a list of batches"
            )
        if self.name != "train" and isinstance(getattr(self.loader, "sampler", None), RandomSampler):
            raise DynamizeError(
                f"the {self.name} loader is shuffled, so two passes over it could not be compared; "
                "make it with shuffle=False"
            )

    @property
    def empty(self) -> bool:
        """Whether it is known beforehand that there are no images."""
        return _batch_count(self.loader) == 0

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images in the first batch, which is read without moving torch's random state."""
        with torch.random.fork_rng(devices=[]):
            channels, height, width = next(iter(self.batches(1)))[0].shape[1:]
        return channels, height, width

    @property
    def unlabelled(self) -> bool:
        """Whether images without a label, -1, are in the first batch."""
        first = next(iter(self.batches(0)), None)
        return first is not None and bool((first[1] == UNLABELLED).any())

    def relabelled(self, labels: Tensor) -> LoaderSet:
        """The same images, with these labels (N,) where they have none."""
        other = copy.copy(self)
        other.__dict__.pop("labels", None)
        other._instead = labels.cpu()
        return other

    @cached_property
    def labels(self) -> Tensor:
        """int64 (N,); the first use reads through the loader once."""
        return torch.cat([labels for _, labels in self.batches(0)])

    def __len__(self) -> int:
        if self.empty:
            return 0
        dataset, sampler = getattr(self.loader, "dataset", None), getattr(self.loader, "sampler", None)
        if getattr(self.loader, "drop_last", False) or not hasattr(dataset, "__len__"):
            return len(self.labels)
        return len(sampler if sampler is not None and hasattr(sampler, "__len__") else dataset)  # type: ignore[arg-type]

    def batches(self, batch_size: int, device: str | torch.device = "cpu") -> Iterator[Batch]:
        """The user's batches on `device`; their size is the user's, whatever `batch_size` says."""
        start = 0
        for batch in self._read(batch_size):
            images, labels = checked_batch(batch, self.name)
            if self._instead is not None:
                labels = torch.where(labels == UNLABELLED, self._instead[start : start + len(labels)], labels)
            yield images.to(device), labels.to(device)
            start += len(labels)
        if not start:
            raise DynamizeError(f"the {self.name} loader gave no batch; pass one that holds images")

    def _read(self, batch_size: int) -> Any:
        return self.loader

    def training_loader(self, batch_size: int, seed: int) -> Any:
        """The user's loader. Raises DynamizeError if it gives nothing, or does not say how many batches it gives."""
        count = _batch_count(self.loader)
        if count is None:
            raise DynamizeError(
                f"the {self.name} loader does not say how many batches it gives, which the learning rate depends on: "
                "give one with a length, such as a list of batches or a DataLoader over a dataset with __len__"
            )
        refuse_none(count, self.name)
        return self.loader

    def prepare(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The images as they are: the user has augmented and normalised them."""
        return images


class DatasetSet(LoaderSet):
    """A user's own map-style dataset of (normalised float image (C, H, W), class number) as one split.

    Batches are as large as who reads asks for, and training shuffles them by its seed. One process reads.
    """

    def _check(self) -> None:
        if not self.empty:
            checked_item(self.loader[0], self.name)

    def __len__(self) -> int:
        return len(self.loader)

    def _read(self, batch_size: int) -> Any:
        return DataLoader(self.loader, batch_size or _BATCH, collate_fn=self._together)

    def training_loader(self, batch_size: int, seed: int) -> Any:
        """Shuffled batches; the last, smaller one is left out unless it is the only one.

        Raises DynamizeError if there are no images.
        """
        count = len(self)
        refuse_none(count, self.name)
        sampler = EpochSampler(count, seed)
        last = count >= batch_size
        return DataLoader(self.loader, batch_size, sampler=sampler, drop_last=last, collate_fn=self._together)

    def _together(self, items: Sequence[Any]) -> Batch:
        images, labels = zip(*(checked_item(item, self.name) for item in items), strict=True)
        shapes = sorted({tuple(image.shape) for image in images})
        if len(shapes) > 1:
            raise DynamizeError(
                f"the {self.name} images are of different sizes, {shapes[0]} and {shapes[1]}: resize them to one in "
                "the dataset's transform"
            )
        return torch.stack(images), torch.tensor(labels)


def checked_item(item: Any, name: str) -> tuple[Tensor, int]:
    """Image (C, H, W) and class number of what a dataset gives for one index."""
    if not isinstance(item, list | tuple) or len(item) != 2:
        raise DynamizeError(
            f"the {name} dataset gives {_described(item)} for an image; it must give (image, class number): wrap it in "
            "a Dataset of your own that does"
        )
    image, label = item
    if not hasattr(image, "shape"):
        raise DynamizeError(
            f"the {name} dataset gives images as {type(image).__name__}; it must give tensors: let its transform end "
            "with ToTensor() and the Normalize(...) that the network was trained with"
        )
    image, number = torch.as_tensor(image), torch.as_tensor(label)
    if number.numel() != 1:
        raise DynamizeError(f"the {name} dataset gives labels {tuple(number.shape)}; it must give one class number")
    images, numbers = checked_batch((image.unsqueeze(0), number.reshape(1)), name)
    return images[0], int(numbers)


def checked_batch(batch: Any, name: str) -> Batch:
    """Images (N, C, H, W) of single precision and int64 labels (N,)."""
    pair = isinstance(batch, list | tuple) and len(batch) == 2 and all(isinstance(x, Tensor) for x in batch)
    if not pair:
        raise DynamizeError(
            f"the {name} loader gave {_described(batch)}; it must give (images, labels): let its collate_fn return them"
        )
    images, labels = batch
    if images.dim() != 4 or not images.is_floating_point():
        raise DynamizeError(
            f"the {name} loader gave images {tuple(images.shape)} of {images.dtype}; it must give normalised "
            "floating-point images (N, C, H, W), as the network was trained with"
        )
    if labels.shape != images.shape[:1] or labels.is_floating_point():
        raise DynamizeError(
            f"the {name} loader gave {len(images)} images, labels {tuple(labels.shape)} of {labels.dtype}; "
            "it must give one class number per image"
        )
    if images.dtype is torch.float64:  # as numpy has it
        images = images.to(torch.get_default_dtype())
    return images, labels.long()


def _described(given: Any) -> str:
    if isinstance(given, dict):
        return f"a dict of {', '.join(map(str, given)) or 'nothing'}"
    if isinstance(given, list | tuple):
        return f"a {type(given).__name__} of {', '.join(type(one).__name__ for one in given) or 'nothing'}"
    return f"a {type(given).__name__}"


def _batch_count(loader: Any) -> int | None:
    """How many batches a loader gives; None where it does not say."""
    try:
        return len(loader)
    except TypeError:
        return None
