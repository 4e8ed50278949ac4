"""Cluttered canvases: each image of a source somewhere on a large canvas, among fragments of other images.

The stand-in for photographs in which an object has to be looked for (after the cluttered MNIST of Mnih et al. 2014,
sec. 4.1), for any labelled images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynamize.data.canvas_spec import CanvasSpec
from dynamize.data.pools import Pool, Source
from dynamize.data.storage import Geometry, Storage

_SHELF = 1000  # images of a split that fragments are cut out of: in memory, for each canvas takes some of many

Integers = NDArray[np.int64]


def on_canvases(source: Source, spec: CanvasSpec) -> Source:
    """The source with each of its images on a canvas, and with boxes that say where."""
    pools = {name: _on_canvases(pool, spec, number) for number, (name, pool) in enumerate(source.pools.items())}
    return replace(source, pools=pools)


def _on_canvases(pool: Pool, spec: CanvasSpec, number: int) -> Pool:
    """``number`` tells the pool from the others of its source."""
    draws = np.random.RandomState([spec.seed, number]).random_sample((len(pool.labels), 3))  # frozen in all versions
    sides = _whole(draws[:, 0], *spec.object)
    left, top = (_whole(draws[:, one], 0, spec.size - sides) for one in (1, 2))
    boxes = np.stack([left, top, left + sides, top + sides], axis=1)
    storage = CanvasStorage(pool.storage, spec, number, np.arange(len(boxes)), boxes)
    return replace(pool, place=f"{pool.place}, on canvases", storage=storage, boxes=boxes)


class CanvasStorage:
    """Canvases, painted each time they are read.

    What is on a canvas follows from the seed, the pool and the number of its image there; fragments are cut out of the
    images that this storage holds, so that those of a split are from that split.
    """

    def __init__(self, inner: Storage, spec: CanvasSpec, pool: int, numbers: Integers, boxes: Integers) -> None:
        self.inner, self.spec, self.pool, self.numbers, self.boxes = inner, spec, pool, numbers, boxes
        self.size = (spec.size, spec.size)
        count = len(numbers)
        self._places = np.unique(np.linspace(0, count - 1, min(count, _SHELF)).round().astype(np.int64))
        self._shelves: dict[int, NDArray[np.uint8]] = {}

    def __len__(self) -> int:
        return len(self.numbers)

    def at(self, index: Sequence[int]) -> CanvasStorage:
        chosen = np.asarray(index, dtype=np.int64)
        return CanvasStorage(self.inner.at(index), self.spec, self.pool, self.numbers[chosen], self.boxes[chosen])

    def read(self, index: Sequence[int], geometry: Geometry) -> Tensor:
        canvases = torch.zeros(len(index), geometry.channels, *self.size, dtype=torch.uint8)
        for canvas, i in zip(canvases.numpy(), index, strict=True):
            self._paint(canvas, int(i))
        return geometry.of_pixels(canvases)

    def _paint(self, canvas: NDArray[np.uint8], i: int) -> None:
        channels, size = canvas.shape[:2]
        for image, rows, columns, side, top, left in self._fragments(i):
            piece = self._shelf(channels)[image, :, rows : rows + side, columns : columns + side]
            canvas[:, top : top + side, left : left + side] = piece
        left, top, right, bottom = self.boxes[i].tolist()
        canvas[:, top:bottom, left:right] = self.inner.read([i], _square(channels, right - left))[0].numpy()

    def _fragments(self, i: int) -> list[list[int]]:
        """Of each: image on the shelf, row and column there, side, row and column on the canvas."""
        spec, (own,) = self.spec, self.numbers[[i]]
        draws = np.random.RandomState([spec.seed, self.pool, own]).random_sample((spec.clutter, 6)).T
        images = _whole(draws[0], 0, len(self._places) - 1)
        images = np.where(self._places[images] == i, (images + 1) % len(self._places), images)
        sides = _whole(draws[1], *spec.fragments)
        inside = [_whole(one, 0, spec.object[1] - sides) for one in draws[2:4]]
        around = [_whole(one, 0, spec.size - sides) for one in draws[4:6]]
        found: list[list[int]] = np.stack([images, *inside, sides, *around], axis=1).tolist()
        return found

    def _shelf(self, channels: int) -> NDArray[np.uint8]:
        if channels not in self._shelves:
            self._shelves[channels] = self.inner.read(
                self._places.tolist(), _square(channels, self.spec.object[1])
            ).numpy()
        return self._shelves[channels]


def _square(channels: int, side: int) -> Geometry:
    return Geometry(channels, (side, side), resize=(side, side))


def _whole(draws: NDArray[np.float64], least: int | Integers, most: int | Integers) -> Integers:
    """Whole numbers from ``least`` to ``most`` out of numbers in [0, 1)."""
    return least + np.floor(draws * (np.asarray(most) - least + 1)).astype(np.int64)
