"""Three disjoint splits of one source: dealt out per class, decoded if they fit, refused if they overlap."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamize.data.augment import Normalize
from dynamize.data.images import Images, ImageSet
from dynamize.data.pools import UNLABELLED, Pool, Source
from dynamize.data.readers import read_source
from dynamize.data.spec import DataSpec
from dynamize.data.storage import Geometry, Progress, decode
from dynamize.errors import DynamizeError

logger = logging.getLogger("dynamize")

SPLITS = ("train", "calibration", "test")
LARGE = 96  # from this size on: resize and centre crop, random resized crops
FEWEST = 20  # calibration images: below this a threshold is a guess

SEEN = (
    "the calibration images come from the training part: a checkpoint trained on them is too sure of itself "
    "there, and thresholds will not hold; set data.calibration_from to test (or val) if the checkpoint has "
    "seen them"
)


@dataclass(frozen=True)
class Splits:
    """Train, calibration and test images that share nothing.

    `spec` is the resolved section: calibration count and normalisation filled in (None for what users bring);
    `warnings` are sentences for the report.
    """

    train: Images
    calibration: Images
    test: Images
    classes: tuple[str, ...]
    spec: DataSpec | None = None
    warnings: list[str] = field(default_factory=list)

    def relabelled(self, answer: Callable[[Images], Tensor]) -> Splits:
        """The same, with what ``answer`` says (N,) of calibration and test images where these have no label."""
        found: dict[str, Any] = {}
        warnings = list(self.warnings)
        for name in ("calibration", "test"):
            images: Images = getattr(self, name)
            if images.unlabelled:
                found[name] = images.relabelled(answer(images))
                warnings.append(
                    f"{name} images have no labels: the original network's answers stand in for them, so that accuracy "
                    "is agreement with it"
                )
                logger.warning(warnings[-1])
        return replace(self, **found, warnings=warnings) if found else self


def load_data(
    spec: DataSpec,
    input_shape: tuple[int, int, int],
    num_classes: int | None = None,
    progress: Progress | None = None,
    decoded: Collection[str] = SPLITS,
) -> Splits:
    """Read, split, size and decode what `spec` names, for a network with input (C, H, W).

    The splits named in `decoded` are read into memory as far as they fit, the others each time that someone asks for
    their images. `progress(done, total)` is called meanwhile. Raises DynamizeError, which names
    the file or folder: unreadable images, empty or differing class folders, a class count that is not the
    network's, labels out of range, channels that are neither 1 nor 3, fewer than 20 calibration images.
    """
    _check_channels(spec, input_shape[0])
    source = read_source(spec)
    source = _check_classes(source, num_classes)
    dealt, spec = _deal(source, spec)
    warnings = _warnings(source, spec, input_shape)
    sets = {
        name: image_set(name, pool, index, source.classes, spec, input_shape) for name, (pool, index) in dealt.items()
    }
    check_disjoint({name: set(images.keys) for name, images in sets.items()})
    decode_what_fits({name: sets[name] for name in decoded}, spec.memory_gb, progress)
    if spec.normalize is None:
        seen = sets["train"] if len(sets["train"]) else sets["calibration"]
        spec = spec.model_copy(update={"normalize": _pixel_statistics(seen)})
        logger.info("data.normalize computed on the %s split: %s", seen.name, spec.normalize)
    if spec.normalize is not None:
        for images in sets.values():
            images.normalize = Normalize(*spec.normalize)
    for warning in warnings:
        logger.warning(warning)
    return Splits(sets["train"], sets["calibration"], sets["test"], source.classes, spec, warnings)


def check_disjoint(keys: dict[str, set[Any]]) -> None:
    """Refuse splits that share images; ``keys`` say by split which images it holds."""
    for a, b in (("train", "calibration"), ("train", "test"), ("calibration", "test")):
        shared = keys[a] & keys[b]
        if shared:
            named = sorted(key for key in shared if isinstance(key, str))
            example = f", such as {named[0]}" if named else ""
            raise DynamizeError(
                f"{a} and {b} share {len(shared)} images{example}; no image may be in two splits, "
                "or the network is judged on what it was fitted to"
            )


def _check_channels(spec: DataSpec, channels: int) -> None:
    if channels not in (1, 3):
        raise DynamizeError(
            f"the network's input has {channels} channels, and image files have 1 or 3; "
            "give your own loaders or datasets in Python, with dz.splits"
        )
    if spec.normalize is not None and len(spec.normalize[0]) != channels:
        raise DynamizeError(
            f"data.normalize has {len(spec.normalize[0])} channels and the network's input {channels}; "
            f"give {channels} means and {channels} deviations"
        )


def _check_classes(source: Source, num_classes: int | None) -> Source:
    """The source, with as many classes as the network where they were counted from labels."""
    if not source.named and num_classes is not None and len(source.classes) < num_classes:
        source = replace(source, classes=tuple(map(str, range(num_classes))))
    count, place = len(source.classes), next(iter(source.pools.values())).place
    for pool in source.pools.values():
        if len(pool.labels) == 0:
            raise DynamizeError(f"{pool.place} holds no images; add some or name another source")
        low, high = int(pool.labels.min()), int(pool.labels.max())
        limit = count if source.named or num_classes is None else num_classes
        if (low < 0 and not low == high == UNLABELLED) or high >= limit:
            raise DynamizeError(
                f"{pool.place} has labels {low} to {high}, out of range for {limit} classes; "
                f"count them from 0 to {limit - 1}"
            )
    if num_classes is not None and count != num_classes:
        names = ", ".join(source.classes[:5]) + (", ..." if count > 5 else "")
        fewer = "add an empty folder for each class without images, " if source.named and count < num_classes else ""
        raise DynamizeError(
            f"{place} has {count} classes ({names}) and the network answers {num_classes}; {fewer}"
            "give the data the network was trained for, or a checkpoint with that many classes"
        )
    return source


def _deal(source: Source, spec: DataSpec) -> tuple[dict[str, tuple[Pool, np.ndarray]], DataSpec]:
    """Which images of which pool each split holds, and the spec with the calibration count filled in."""
    if "all" in source.pools:
        parts = _cut_single_pool(source, spec)
    else:
        parts = {name: (pool, np.arange(len(pool.labels))) for name, pool in source.pools.items()}
    if "train" not in parts and "calibration_from" not in spec.model_fields_set:
        spec = spec.model_copy(update={"calibration_from": "val" if "val" in parts else "test"})
    if spec.calibration_from not in parts:
        raise DynamizeError(
            f"data.calibration_from is {spec.calibration_from}, which {spec.source} does not have; "
            f"use one of {', '.join(parts)}"
        )
    pool, index = parts[spec.calibration_from]
    calibration, rest = _draw_calibration(pool, index, source, spec)
    parts["calibration"] = pool, calibration
    parts[spec.calibration_from] = pool, rest
    trains = "train" in parts
    parts.setdefault("train", (pool, np.array([], dtype=np.int64)))
    for name, limit in (("train", spec.train_limit), ("test", spec.test_limit)):
        pool, index = parts[name]
        if limit is not None and limit < len(index):
            parts[name] = pool, _stratified(pool.labels, index, limit, spec.seed)
        if len(parts[name][1]) == 0 and (trains or name == "test"):
            raise DynamizeError(f"no {name} image of {spec.source} is left; lower data.calibration")
    resolved = spec.model_copy(update={"calibration": len(calibration)})
    return {name: parts[name] for name in SPLITS}, resolved


def _cut_single_pool(source: Source, spec: DataSpec) -> dict[str, tuple[Pool, np.ndarray]]:
    """Test images (twice as many if calibration is to come out of them) off a pool without parts.

    By default the training images are the same in both cases."""
    pool = source.pools["all"]
    everything = np.arange(len(pool.labels))
    least = min(FEWEST, len(everything) // 3)
    count, seed = max(round(source.held_out * len(everything)), least), _seed(source, spec)
    test = _stratified(pool.labels, everything, count, seed)
    train = np.setdiff1d(everything, test)
    if spec.calibration_from == "test":
        second = _stratified(pool.labels, train, count, seed)
        test, train = np.union1d(test, second), np.setdiff1d(train, second)
    return {"train": (pool, train), "test": (pool, test)}


def _draw_calibration(pool: Pool, index: np.ndarray, source: Source, spec: DataSpec) -> tuple[np.ndarray, np.ndarray]:
    """(calibration, rest) of `index`."""
    available = index
    default = 0.1 if "all" not in source.pools else source.held_out
    whole = len(index) if "all" not in source.pools else len(pool.labels)
    if spec.calibration_from == "test":
        rank = _rank_in_class(pool.labels[index])
        available = index[rank % spec.folds == spec.fold]
    asked = spec.calibration
    if asked is None:
        few = min(FEWEST, len(available) // 2)
        count = max(round(default * whole), few) if spec.calibration_from == "train" else len(available)
    else:
        count = asked if isinstance(asked, int) else round(asked * whole)
    if not FEWEST <= count <= len(available):
        raise DynamizeError(
            f"{count} calibration images asked of {pool.place}: at least {FEWEST} are needed and it can give "
            f"{len(available)}; change data.calibration, or add images"
        )
    chosen = _stratified(pool.labels, available, count, _seed(source, spec))
    taken = available if spec.calibration_from == "test" else chosen
    return chosen, np.setdiff1d(index, taken)


def _seed(source: Source, spec: DataSpec) -> int:
    return 0 if source.standard else spec.seed


def _rank_in_class(labels: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... within each class, in the order given."""
    rank = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        rank[of_class] = np.arange(len(of_class))
    return rank


def _stratified(labels: np.ndarray, index: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` of `index`, sorted, each class in its proportion (largest remainders), drawn with `seed`.

    What is drawn next from the rest follows in the same order. RandomState, because numpy has frozen its
    stream: a split must be the same in every version.
    """
    order = np.random.RandomState(seed % 2**32).permutation(len(labels))
    shuffled = order[np.isin(order, index)]
    classes, sizes = np.unique(labels[index], return_counts=True)
    exact = sizes * (count / len(index))
    quota = np.floor(exact + 1e-9).astype(np.int64)
    quota[np.argsort(quota - exact, kind="stable")[: count - quota.sum()]] += 1
    drawn = [shuffled[labels[shuffled] == c][:share] for c, share in zip(classes, quota, strict=True)]
    return np.sort(np.concatenate(drawn))


def image_set(
    name: str,
    pool: Pool,
    index: np.ndarray,
    classes: tuple[str, ...],
    spec: DataSpec,
    shape: tuple[int, int, int],
) -> ImageSet:
    channels, *size = shape
    height, width = size if spec.image_size is None else (spec.image_size, spec.image_size)
    geometry = _geometry(name, pool, spec, channels, height, width)
    storage = pool.storage.at(index.tolist())
    labels = torch.from_numpy(pool.labels[index])
    keys = [pool.keys[i] for i in index]
    augmentation = spec.augment if name == "train" else "none"
    boxes = None
    if pool.boxes is not None and pool.storage.size is not None:
        shown = Geometry(channels, (height, width), resize=geometry.resize)
        boxes = shown.of_boxes(pool.boxes[index], pool.storage.size)
    return ImageSet(name, storage, labels, classes, keys, geometry, (height, width), augmentation, boxes)


def _geometry(name: str, pool: Pool, spec: DataSpec, channels: int, height: int, width: int) -> Geometry:
    """How the images of a split come to their size.

    Images that all have the size stay as they are. Large training images are not cropped after the resize, so
    that random crops have something to cut from.
    """
    shorter = min(height, width)
    if spec.resize is not None and spec.resize < shorter:
        raise DynamizeError(f"data.resize {spec.resize} is below the image size; give {shorter} or more")
    if pool.storage.size == (height, width) or (spec.resize is None and shorter < LARGE):
        return Geometry(channels, (height, width))
    to = resized_side(spec, shorter)
    canvas = (round(height * to / shorter), round(width * to / shorter))
    uncropped = name == "train" and shorter >= LARGE
    return Geometry(channels, canvas if uncropped else (height, width), resize=canvas)


def resized_side(spec: DataSpec, side: int) -> int:
    """What the shorter side of an image is resized to, before the middle of ``side`` is cut out of it."""
    return spec.resize or (round(side * 256 / 224) if side >= LARGE else side)


def _warnings(source: Source, spec: DataSpec, shape: tuple[int, int, int]) -> list[str]:
    found = list(source.warnings)
    if "train" not in source.pools and "all" not in source.pools:
        found.append(f"{spec.source} has no train images: no step can train, but `distill` with unlabelled: FOLDER")
        if spec.normalize is None:
            found.append(
                "data.normalize is not given and there are no train images to compute it on: it comes from the "
                "calibration images; give the means and deviations that the network was trained with"
            )
    size = next(iter(source.pools.values())).labels.size
    usual = source.standard and (spec.calibration or 0) <= round(source.held_out * size)
    if spec.calibration_from == "train" and not usual:
        found.append(SEEN)
    if spec.image_size is not None and shape[1:] != (spec.image_size,) * 2:
        found.append(
            f"images are {spec.image_size} x {spec.image_size} (data.image_size) and the network's input is "
            f"{shape[1]} x {shape[2]}"
        )
    return found


def decode_what_fits(sets: dict[str, ImageSet], memory_gb: float, progress: Progress | None) -> None:
    """Into memory, smaller sets first (they are read most often), up to `memory_gb`; says the size before."""
    left = memory_gb * 1e9
    waiting: list[ImageSet] = []
    for images in sorted(sets.values(), key=len):
        size = len(images) * int(np.prod(images.geometry.shape))
        if images.in_memory:
            left -= size
        elif size <= left:
            left -= size
            waiting.append(images)
            logger.info("%s: %d images decoded into %.1f MB", images.name, len(images), size / 1e6)
        else:
            logger.info(
                "%s: %d images would take %.1f GB in memory, more than is left of data.memory_gb %g: "
                "decoded anew in every epoch",
                images.name,
                len(images),
                size / 1e9,
                memory_gb,
            )
    total, done = sum(len(images) for images in waiting), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    for images in waiting:
        images.storage = decode(images.storage, images.geometry, advance)
        images.geometry = images.geometry.cropped_only()


def _pixel_statistics(images: ImageSet, most: int = 5000) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of pixels in 0..1 per channel, over at most `most` images spread evenly."""
    index = np.unique(np.linspace(0, len(images) - 1, min(most, len(images))).round().astype(int)).tolist()
    totals: list[Tensor] = []
    for start in range(0, len(index), 256):
        pixels, _ = images.__getitems__(index[start : start + 256])
        values = pixels.transpose(0, 1).flatten(1).double() / 255
        count = torch.full((len(values),), values.shape[1])
        totals.append(torch.stack([values.sum(1), values.square().sum(1), count]))
    total, squares, count = torch.stack(totals).sum(0)
    mean = total / count
    deviation = (squares / count - mean.square()).clamp(min=0).sqrt().clamp(min=1e-3)
    return tuple(round(v, 6) for v in mean.tolist()), tuple(round(v, 6) for v in deviation.tolist())
