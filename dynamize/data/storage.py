"""Where pixels come from: image files, arrays in memory or a torchvision dataset, all read as uint8 batches.

`Geometry` is the deterministic half of the image transform (colour, resize, centre crop), done at decoding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from dynamize.errors import DynamizeError

Progress = Callable[[int, int], None]


class UnreadableImage(DynamizeError):
    """An image that cannot be decoded. Strips what a DataLoader's worker process wraps around the message."""

    def __init__(self, message: str) -> None:
        super().__init__(message.rsplit(f"{type(self).__name__}: ", 1)[-1].strip())


@dataclass(frozen=True)
class Geometry:
    """Images to `channels` x `size` (H, W): resized exactly, or to cover `resize` and then cropped centrally.

    For square sizes the latter is torchvision's Resize(resize[0]) and CenterCrop(size), antialiased bilinear.
    """

    channels: int
    size: tuple[int, int]
    resize: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.channels, *self.size)

    def cropped_only(self) -> Geometry:
        """For images that have been through this geometry already."""
        return replace(self, resize=None)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.resize is None:
            return self.size
        want_height, want_width = self.resize
        if want_height * width >= want_width * height:
            return want_height, max(want_width, int(want_height * width / height))
        return max(want_height, int(want_width * height / width)), want_width

    def of_image(self, image: Image.Image) -> Tensor:
        """A PIL image of any mode and size -> uint8 (C, H, W)."""
        if image.mode.startswith(("I", "F")):
            image = _eight_bits(image)
        image = image.convert("L" if self.channels == 1 else "RGB")
        height, width = self._resized(image.height, image.width)
        if (image.height, image.width) != (height, width):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        top, left = self._corner(height, width)
        if (height, width) != self.size:
            image = image.crop((left, top, left + self.size[1], top + self.size[0]))
        pixels = torch.from_numpy(np.array(image))
        return pixels[None] if self.channels == 1 else pixels.permute(2, 0, 1)

    def of_pixels(self, pixels_NCHW: Tensor) -> Tensor:
        """uint8 (N, 1 or 3, any H, any W) -> uint8 (N, C, H, W); the same tensor if nothing is to be done."""
        pixels = _recoloured(pixels_NCHW, self.channels)
        height, width = self._resized(*pixels.shape[2:])
        if tuple(pixels.shape[2:]) != (height, width):
            pixels = TF.resize(pixels, [height, width], antialias=True)
        top, left = self._corner(height, width)
        return pixels[:, :, top : top + self.size[0], left : left + self.size[1]]

    def of_boxes(self, boxes_N4: np.ndarray, size: tuple[int, int]) -> Tensor:
        """Left, top, right and bottom in pixels of images of a ``size`` (H, W) -> where that lies in what becomes of
        these images, float32 (N, 4); what is cut off is left out."""
        height, width = self._resized(*size)
        top, left = self._corner(height, width)
        scale, corner = np.array([width / size[1], height / size[0]] * 2), np.array([left, top] * 2)
        inside = np.clip(boxes_N4 * scale - corner, 0, np.array([self.size[1], self.size[0]] * 2))
        return torch.from_numpy(inside.astype(np.float32))

    def _corner(self, height: int, width: int) -> tuple[int, int]:
        return round((height - self.size[0]) / 2), round((width - self.size[1]) / 2)


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey is scaled down, which `Image.convert` would clip to white instead."""
    levels = np.asarray(image).astype(np.float64)
    if image.mode.startswith("I") and levels.max(initial=0) > 255:
        levels = levels / 257
    elif image.mode == "F" and levels.max(initial=0) <= 1:
        levels = levels * 255
    return Image.fromarray(np.clip(np.rint(levels), 0, 255).astype(np.uint8))


def _recoloured(pixels_NCHW: Tensor, channels: int) -> Tensor:
    if pixels_NCHW.shape[1] == channels:
        return pixels_NCHW
    if channels == 3:
        return pixels_NCHW.expand(-1, 3, -1, -1)
    red, green, blue = pixels_NCHW.to(torch.int32).unbind(1)
    luma = (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16  # ITU-R 601, as PIL's convert("L")
    return luma.to(torch.uint8)[:, None]


class Storage(Protocol):
    """`read` returns uint8 (N, C, H, W) under a geometry; `at` is the same storage with only those images; `size` is
    the (H, W) that all of them have, or None."""

    @property
    def size(self) -> tuple[int, int] | None: ...

    def __len__(self) -> int: ...

    def at(self, index: Sequence[int]) -> Storage: ...

    def read(self, index: Sequence[int], geometry: Geometry) -> Tensor: ...


class PixelStorage:
    """uint8 images (N, C, H, W) in memory."""

    def __init__(self, pixels_NCHW: Tensor) -> None:
        self.pixels = pixels_NCHW
        self.shape = tuple(pixels_NCHW.shape[1:])
        self.size = (int(pixels_NCHW.shape[2]), int(pixels_NCHW.shape[3]))

    def __len__(self) -> int:
        return len(self.pixels)

    def at(self, index: Sequence[int]) -> PixelStorage:
        if len(index) == len(self.pixels) and list(index) == list(range(len(index))):
            return self
        return PixelStorage(self.pixels[torch.as_tensor(index, dtype=torch.int64)])

    def read(self, index: Sequence[int], geometry: Geometry) -> Tensor:
        return geometry.of_pixels(self.pixels[torch.as_tensor(index, dtype=torch.int64)])


class FileStorage:
    """Image files, decoded each time they are read."""

    size = None

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def at(self, index: Sequence[int]) -> FileStorage:
        return FileStorage([self.paths[i] for i in index])

    def read(self, index: Sequence[int], geometry: Geometry) -> Tensor:
        return torch.stack([self._decoded(self.paths[i], geometry) for i in index])

    @staticmethod
    def _decoded(path: str, geometry: Geometry) -> Tensor:
        if not os.path.isfile(path):  # a pipe would be waited for
            what = "is no file" if os.path.exists(path) else "does not exist"
            raise UnreadableImage(f"the image {os.path.abspath(path)} {what}: name another one, or remove the link")
        try:
            with Image.open(path) as image:
                return geometry.of_image(image)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            reason = "not an image, or cut short" if "cannot identify" in str(error) else str(error)
            raise UnreadableImage(
                f"cannot decode the image {os.path.abspath(path)}: {reason}; replace or delete this file"
            ) from error


class ItemStorage:
    """A torchvision dataset whose items are (PIL image, label)."""

    size = None

    def __init__(self, dataset: Any, index: Sequence[int]) -> None:
        self.dataset = dataset
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def at(self, index: Sequence[int]) -> ItemStorage:
        return ItemStorage(self.dataset, [self.index[i] for i in index])

    def read(self, index: Sequence[int], geometry: Geometry) -> Tensor:
        return torch.stack([self._decoded(self.index[i], geometry) for i in index])

    def _decoded(self, item: int, geometry: Geometry) -> Tensor:
        try:
            return geometry.of_image(self.dataset[item][0])
        except (OSError, ValueError, SyntaxError) as error:
            folder = os.path.abspath(self.dataset.root)
            raise UnreadableImage(
                f"cannot decode image {item} of the torchvision dataset in {folder}: {error}; "
                "delete the folder and fetch the dataset again"
            ) from error


def decode(storage: Storage, geometry: Geometry, done: Callable[[int], None]) -> PixelStorage:
    """Read everything into memory with one thread per core; `done(n)` is called after every n images.

    Raises UnreadableImage for the first image, in order, that cannot be decoded.
    """
    pixels = torch.empty((len(storage), *geometry.shape), dtype=torch.uint8)
    chunks = [range(i, min(i + 64, len(storage))) for i in range(0, len(storage), 64)]

    def read_into(chunk: range) -> int:
        pixels[chunk.start : chunk.stop] = storage.read(chunk, geometry)
        return len(chunk)

    workers = ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="decode")
    try:
        for count in workers.map(read_into, chunks):
            done(count)
    finally:
        workers.shutdown(cancel_futures=True)
    return PixelStorage(pixels)
