"""Image files that belong to no split: found by path, read under a network's test-time transform or trained on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from dynamize.data.augment import Normalize
from dynamize.data.images import ImageSet, Together
from dynamize.data.pools import Pool
from dynamize.data.readers import IMAGE_ENDINGS, images_below
from dynamize.data.spec import DataSpec
from dynamize.data.splits import SPLITS, Splits, decode_what_fits, image_set
from dynamize.data.storage import FileStorage, Geometry
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


def check_folder_of_images(folder: str | os.PathLike[str]) -> None:
    """Refuse what is no folder; whether it holds images is seen when they are read.

    Raises:
        DynamizeError: it does not exist, or is a file.
    """
    if not os.path.isdir(folder):
        what = "is a file, not a folder" if os.path.exists(folder) else "does not exist"
        raise DynamizeError(f"unlabelled: the folder {os.path.abspath(folder)} {what}: name the folder of the images")


def with_unlabelled(data: Splits, folder: str | os.PathLike[str]) -> Splits:
    """The splits with all image files below ``folder`` among the train images, labelled -1.

    They are sized, augmented and normalised like these. Files that are train images already are left out.

    Raises:
        DynamizeError: the folder holds no image or one of the calibration or test images, or the train images come
            from a loader of the user's own.
    """
    train = data.train
    if data.spec is None or not isinstance(train, ImageSet):
        raise DynamizeError(
            "unlabelled is for images that a data section names: let your own train loader give them, with the label -1"
        )
    check_folder_of_images(folder)
    found = sorted(images_below(os.fspath(folder)))
    known = set(train.keys)
    new = [(path, key) for path, key in found if key not in known]
    if not new:
        raise DynamizeError(f"unlabelled: {folder} holds no image that is not trained on already: name another folder")
    judged = {key: part.name for part in (data.calibration, data.test) for key in getattr(part, "keys", ())}
    for path, key in new:
        if key in judged:
            raise DynamizeError(
                f"unlabelled: {path} is one of the {judged[key]} images, and a network is not judged on what it was "
                "trained on: take it out of that folder"
            )
    pool = Pool(
        os.fspath(folder),
        FileStorage([path for path, _ in new]),
        np.full(len(new), -1, dtype=np.int64),
        [key for _, key in new],
    )
    images = image_set("train", pool, np.arange(len(new)), train.classes, data.spec, train.shape)
    if images.geometry.shape != train.geometry.shape:  # arrays that had their size
        images.geometry = Geometry(train.geometry.channels, train.geometry.size, resize=train.geometry.size)
    sets = {name: one for name in SPLITS if isinstance(one := getattr(data, name), ImageSet)}
    decode_what_fits({**sets, "unlabelled": images}, data.spec.memory_gb, None)
    return replace(data, train=Together(train, images))
