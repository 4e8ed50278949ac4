"""The images of one split, and the loaders over them: one interface for our own data and for what users bring.

Training reads uint8 batches from `training_loader` and turns them into network input with `prepare`, on the
device they then lie on. Evaluation reads `batches`: network input under the test-time transform, in order.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dynamize.data.augment import Normalize, augment, random_resized_crop
from dynamize.data.pools import UNLABELLED
from dynamize.data.storage import Geometry, PixelStorage, Storage, UnreadableImage
from dynamize.errors import DynamizeError

Batch = tuple[Tensor, Tensor]


class Images(Protocol):
    """What every member of `Splits` offers."""

    name: str
    classes: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int]: ...

    @property
    def labels(self) -> Tensor: ...

    @property
    def unlabelled(self) -> bool: ...

    def relabelled(self, labels: Tensor) -> Any: ...

    def __len__(self) -> int: ...

    def batches(self, batch_size: int, device: str | torch.device = "cpu") -> Iterator[Batch]: ...

    def training_loader(self, batch_size: int, seed: int) -> Any: ...

    def prepare(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor: ...


class ImageSet(Dataset[Batch]):
    """Labelled images of one split, as uint8 in memory or read from their files batch by batch.

    `labels` is int64 (N,), `shape` the network's input (C, H, W), `keys` one name per image that no other
    split may hold. `boxes`, where they are known, say where the object is under the test-time transform: float32
    (N, 4), left, top, right and bottom in pixels of the network's input. A map-style dataset: `images[i]`, and
    `__getitems__` for the DataLoader's batches.
    """

    def __init__(
        self,
        name: str,
        storage: Storage,
        labels: Tensor,
        classes: tuple[str, ...],
        keys: Sequence[str],
        geometry: Geometry,
        size: tuple[int, int],
        augmentation: str = "none",
        boxes: Tensor | None = None,
    ) -> None:
        self.name = name
        self.storage = storage
        self.labels = labels
        self.classes = classes
        self.keys = keys
        self.geometry = geometry
        self.shape = (geometry.channels, *size)
        self.augmentation = augmentation
        self.boxes = boxes
        self.normalize = Normalize((0.0,) * geometry.channels, (1.0,) * geometry.channels)

    @property
    def in_memory(self) -> bool:
        ready = self.geometry.resize is None
        return ready and isinstance(self.storage, PixelStorage) and self.storage.shape == self.geometry.shape

    @property
    def unlabelled(self) -> bool:
        """Whether images without a label, -1, are among them."""
        return bool((self.labels == UNLABELLED).any())

    def relabelled(self, labels: Tensor) -> ImageSet:
        """The same images, with these labels (N,) where they have none."""
        other = copy.copy(self)
        other.labels = torch.where(self.labels == UNLABELLED, labels.to(self.labels), self.labels)
        return other

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, index: Sequence[int]) -> Batch:
        """uint8 images (len(index), C, H', W') and int64 labels; larger than (H, W) if crops follow."""
        return self.storage.read(index, self.geometry), self.labels[torch.as_tensor(index)]

    def prepare(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """uint8 (N, C, H', W') -> normalised float32 (N, C, H, W), on the images' device.

        Without a generator under the test-time transform, with one randomly augmented.
        """
        size = self.shape[1:]
        if generator is None or self.augmentation == "none":
            return self.normalize(_centre(images, size))
        if tuple(images.shape[2:]) == size:
            return self.normalize(augment(images, generator, self.augmentation, padding=min(size) // 8))
        return self.normalize(random_resized_crop(images, generator, size, flip=self.augmentation == "crop_flip"))

    def batches(self, batch_size: int, device: str | torch.device = "cpu") -> Iterator[Batch]:
        """Network input (N, C, H, W) float32 and labels (N,) under the test-time transform, in file order."""
        try:
            for images, labels in loader(self, batch_size):
                yield self.prepare(images.to(device)), labels.to(device)
        except UnreadableImage as error:
            # The traceback would keep torch's worker processes, whose shutdown then waits 5 s for each.
            raise error.with_traceback(None)  # noqa: B904

    def training_loader(self, batch_size: int, seed: int) -> DataLoader[Batch]:
        """Shuffled batches for `prepare`; the last, smaller batch is left out unless it is the only one.

        Raises DynamizeError if there are no images.
        """
        refuse_none(len(self), self.name)
        return loader(self, batch_size, shuffle=True, seed=seed, drop_last=len(self) >= batch_size)


class Together(ImageSet):
    """The images of two sets as one; everything else is as in the first.

    Both give uint8 images of one size.
    """

    def __init__(self, first: ImageSet, second: ImageSet) -> None:
        super().__init__(
            first.name,
            first.storage,
            torch.cat([first.labels, second.labels]),
            first.classes,
            [*first.keys, *second.keys],
            first.geometry,
            (first.shape[1], first.shape[2]),
            first.augmentation,
        )
        self.normalize = first.normalize
        self.first, self.second = first, second

    @property
    def in_memory(self) -> bool:
        return self.first.in_memory and self.second.in_memory

    def __getitems__(self, index: Sequence[int]) -> Batch:
        places = torch.as_tensor(index)
        labels, ours = self.labels[places], places < len(self.first)
        images = torch.empty((len(places), *self.geometry.shape), dtype=torch.uint8)
        for part, here, offset in ((self.first, ours, 0), (self.second, ~ours, len(self.first))):
            if bool(here.any()):
                images[here] = part.__getitems__((places[here] - offset).tolist())[0]
        return images, labels


def refuse_none(count: int, name: str) -> None:
    """Refuse to train on nothing; ``name`` is that of the split."""
    if not count:
        raise DynamizeError(
            f"there are no {name} images, and this step trains on them: leave the step out, or give some; images "
            "without labels do for `distill` (unlabelled: FOLDER)"
        )


def loader(
    images: ImageSet, batch_size: int, shuffle: bool = False, seed: int = 0, drop_last: bool = False
) -> DataLoader[Batch]:
    """A DataLoader of (uint8 images, labels) that accelerate can prepare.

    Its order depends on (seed, epoch) only. Sets in memory are sliced in this process; streamed ones are
    decoded by worker processes.
    """
    workers = 0 if images.in_memory else min(4, os.cpu_count() or 1)
    return DataLoader(
        images,
        batch_size=batch_size,
        sampler=EpochSampler(len(images), seed) if shuffle else None,
        drop_last=drop_last,
        num_workers=workers,
        collate_fn=_as_fetched,
        persistent_workers=workers > 0 and shuffle,
    )


def set_epoch(training_loader: Any, epoch: int) -> None:
    """Choose the shuffling of an epoch, for our loaders, those that accelerate prepared, and users' own."""
    targets: tuple[Any, ...] = (training_loader, getattr(training_loader, "sampler", None))
    for target in targets:
        if hasattr(target, "set_epoch"):
            target.set_epoch(epoch)
            return


class EpochSampler(Sampler[int]):
    """A permutation of `range(count)` for each (seed, epoch); every DDP process draws the same one."""

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(self.count, generator=generator).tolist())


def _as_fetched(batch: Any) -> Any:
    return batch


def _centre(images_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
    top, left = ((have - want) // 2 for have, want in zip(images_NCHW.shape[2:], size, strict=True))
    return images_NCHW[:, :, top : top + size[0], left : left + size[1]]
