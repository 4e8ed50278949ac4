"""Image files that belong to no split: found by path, read under a network's test-time transform."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import numpy as np

from dynamize.data.augment import Normalize
from dynamize.data.images import ImageSet
from dynamize.data.readers import IMAGE_ENDINGS, Pool, images_below
from dynamize.data.spec import DataSpec
from dynamize.data.splits import image_set
from dynamize.data.storage import FileStorage
from dynamize.errors import DynamizeError


def find_images(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Files as they are given, and all image files below folders, sorted.

    Raises DynamizeError for a folder without images. Files are not opened.
    """
    found: list[str] = []
    for path in (os.fspath(one) for one in paths):
        if not os.path.isdir(path):
            found.append(path)
            continue
        inside = sorted(file for file, _ in images_below(path))
        if not inside:
            raise DynamizeError(f"{path} holds no image ({' '.join(IMAGE_ENDINGS)}): name another folder")
        found += inside
    return found


def files_as_images(paths: Sequence[str], spec: DataSpec, input_shape: tuple[int, int, int]) -> ImageSet:
    """The files in this order, for a network with input (C, H, W) that was tested on images of `spec`.

    Labels are all 0. Raises DynamizeError if `spec` does not say how its images were normalised; a file that
    cannot be decoded raises `UnreadableImage` when it is read.
    """
    if spec.normalize is None:
        raise DynamizeError("data.normalize is not known: give the means and deviations the network was trained with")
    pool = Pool("the given files", FileStorage(paths), np.zeros(len(paths), dtype=np.int64), paths)
    images = image_set("test", pool, np.arange(len(paths)), (), spec, input_shape)
    images.normalize = Normalize(*spec.normalize)
    return images
