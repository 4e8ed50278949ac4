"""The four kinds of source, each read into labelled pools of images, before anything is split or decoded."""

from __future__ import annotations

import difflib
import inspect
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamize.data.spec import DataSpec, split_source
from dynamize.data.storage import FileStorage, ItemStorage, PixelStorage, Storage
from dynamize.errors import DynamizeError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")


@dataclass(frozen=True)
class Pool:
    """Images that lie together: `place` says where (for messages), `keys` names each image uniquely."""

    place: str
    storage: Storage
    labels: np.ndarray
    keys: Sequence[str]


@dataclass(frozen=True)
class Source:
    """What a reader found: class names, and either train, test (and val) pools or one pool called "all".

    `held_out` is the share of a single pool that is test; `standard` fixes its split for every seed. Classes
    that are not `named` were counted from the labels.
    """

    classes: tuple[str, ...]
    pools: dict[str, Pool]
    held_out: float = 0.1
    standard: bool = False
    named: bool = True


def read_source(spec: DataSpec) -> Source:
    """Find the images and labels that `spec.source` names. Raises DynamizeError naming the file or folder."""
    kind, rest = split_source(spec.source)
    if kind == "imagefolder":
        return read_imagefolder(Path(rest))
    if kind == "npz":
        return read_npz(Path(rest))
    if kind == "torchvision":
        name, _, root = rest.partition("@")
        return read_torchvision(name, Path(root), spec.download)
    return read_digits()


def read_imagefolder(root: Path) -> Source:
    """PATH/{train,val,test}/CLASS/image (test or val may be absent), or PATH/CLASS/image."""
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise DynamizeError(f"image folder {root.absolute()} {what}; give the folder of train/ and test/")
    parts = {part: root / part for part in ("train", "val", "test") if _subfolders(root / part)}
    if not parts:
        classes = _class_names(root)
        if set(classes) <= {"train", "val", "test"}:
            _class_names(root / classes[0])
        return Source(classes, {"all": _folder_pool(root, classes)})
    if "train" not in parts or len(parts) == 1:
        lacks = "train/" if "train" not in parts else "test/ and val/"
        raise DynamizeError(
            f"image folder {root.absolute()} has class folders in {' and '.join(parts)}/ but no {lacks}; "
            "add it, or move all class folders directly below the image folder to have them split"
        )
    if "test" not in parts:
        parts["test"] = parts.pop("val")
    classes = _class_names(parts["train"])
    for folder in parts.values():
        _same_classes(folder, classes, parts["train"])
    return Source(classes, {part: _folder_pool(folder, classes) for part, folder in parts.items()})


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))


def _class_names(folder: Path) -> tuple[str, ...]:
    names = _subfolders(folder)
    if not names:
        raise DynamizeError(f"{folder.absolute()} holds no class folders; lay images out as CLASS/image.jpg in it")
    return tuple(names)


def _same_classes(folder: Path, classes: tuple[str, ...], train: Path) -> None:
    found = set(_class_names(folder))
    missing, extra = sorted(set(classes) - found), sorted(found - set(classes))
    if missing or extra:
        lacks = f"lacks the class folders {_some(missing)}" if missing else ""
        has = f"has the class folders {_some(extra)} that train does not" if extra else ""
        raise DynamizeError(
            f"{folder.absolute()} {' and '.join(filter(None, (lacks, has)))}; "
            f"it must hold the same classes as {train.absolute()}"
        )


def _folder_pool(folder: Path, classes: tuple[str, ...]) -> Pool:
    paths: list[str] = []
    keys: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(images_below(os.path.join(folder, name)))
        if not found:
            raise DynamizeError(
                f"class folder {(folder / name).absolute()} holds no image ({' '.join(IMAGE_ENDINGS)}); "
                "put images there or delete the folder"
            )
        paths += [path for path, _ in found]
        keys += [key for _, key in found]
        labels += [label] * len(found)
    return Pool(str(folder.absolute()), FileStorage(paths), np.array(labels, dtype=np.int64), keys)


def images_below(folder: str) -> list[tuple[str, str]]:
    """(path, path with links resolved) of every image in a folder and those below it."""
    found: list[tuple[str, str]] = []
    real = os.path.realpath(folder)
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            found += images_below(entry.path)
        elif entry.name.lower().endswith(IMAGE_ENDINGS):
            key = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
            found.append((entry.path, key))
    return found


def read_npz(path: Path) -> Source:
    """Arrays x_train, y_train, x_test, y_test (and x_val, y_val), or x and y; optionally names in `classes`.

    Images are (N, H, W), (N, H, W, C) or (N, C, H, W): uint8, whole numbers in 0..255 or floats in 0..1.
    """
    where = path.absolute()
    if not path.is_file():
        raise DynamizeError(f"data file {where} does not exist; give the path of an .npz file")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, TypeError) as error:
        raise DynamizeError(
            f"cannot read {where}: {error}; save plain arrays with numpy.savez(x_train=..., y_train=..., ...)"
        ) from error
    parts = [part for part in ("train", "val", "test") if f"x_{part}" in arrays]
    names = {part: (f"x_{part}", f"y_{part}") for part in parts} or {"all": ("x", "y")}
    if "all" not in names and not {"train", "test"} <= names.keys():
        names |= {part: (f"x_{part}", f"y_{part}") for part in ("train", "test")}
    absent = [key for pair in names.values() for key in pair if key not in arrays]
    if absent:
        raise DynamizeError(
            f"{where} lacks {_some(absent)} (it holds {_some(sorted(arrays))}); "
            "it needs x_train, y_train, x_test and y_test, or x and y"
        )
    pools = {
        part: _array_pool(arrays[x], arrays[y], f"{where} ({x}, {y})", f"{part}:") for part, (x, y) in names.items()
    }
    highest = max(int(pool.labels.max(initial=0)) for pool in pools.values())
    classes = tuple(str(n) for n in arrays.get("classes", np.arange(highest + 1)))
    return Source(classes, pools, named="classes" in arrays)


def _array_pool(x: np.ndarray, y: np.ndarray, place: str, prefix: str) -> Pool:
    labels = y.reshape(-1) if y.ndim == 2 and y.shape[1] == 1 else y
    if labels.ndim != 1 or len(labels) != len(x) or labels.dtype.kind not in "iu":
        raise DynamizeError(
            f"{place}: labels {y.shape} of {y.dtype} for images {x.shape}; "
            "give one whole number per image, counted from 0"
        )
    keys = [f"{prefix}{i}" for i in range(len(x))]
    return Pool(place, PixelStorage(_pixels(x, place)), labels.astype(np.int64), keys)


def _pixels(x: np.ndarray, place: str) -> Tensor:
    """Any accepted array of images -> uint8 (N, C, H, W)."""
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise DynamizeError(
            f"{place}: images of shape {x.shape} do not have 1 or 3 channels; "
            "give (N, H, W), (N, H, W, C) or (N, C, H, W)"
        )
    if x.dtype == np.bool_:
        x = x.astype(np.uint8) * np.uint8(255)
    if x.dtype != np.uint8:
        low, high = (float(x.min()), float(x.max())) if x.size else (0.0, 0.0)
        scale = 255 if x.dtype.kind == "f" and high <= 1 else 1
        if x.dtype.kind not in "iuf" or not (low >= 0 and high <= 255) or (scale == 1 and (x % 1).any()):
            raise DynamizeError(
                f"{place}: images of {x.dtype} in {low:g}..{high:g} are not plain pixels; give uint8 in "
                "0..255 or floats in 0..1, not normalised (that is what data.normalize is for)"
            )
        x = np.rint(x * scale).astype(np.uint8)
    return torch.from_numpy(np.ascontiguousarray(x))


def read_torchvision(name: str, root: Path, download: bool) -> Source:
    """A labelled torchvision dataset with a train and a test (or val) part, from `root`."""
    from torchvision import datasets

    if name not in datasets.__all__:
        known = {str(known).lower(): known for known in datasets.__all__}
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
        hint = f"did you mean torchvision:{known[near[0]]}@{root}?" if near else "see torchvision.datasets"
        raise DynamizeError(f"torchvision has no dataset {name!r}: {hint}")
    factory = getattr(datasets, name)
    arguments = inspect.signature(factory).parameters
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [p.name for p in arguments.values() if p.default is p.empty and p.kind in kinds]
    if needed != ["root"] or not {"train", "split"} & arguments.keys():
        raise DynamizeError(
            f"torchvision:{name} has no train and test part that can be told apart; "
            "lay its images out as folders and use imagefolder:PATH"
        )
    options = {"download": True} if download and "download" in arguments else {}
    parts = {}
    for part in ("train", "test"):
        dataset = _torchvision_part(factory, root, part, "train" in arguments, options)
        parts[part] = dataset, _torchvision_labels(dataset, name)
    highest = max(int(labels.max(initial=0)) for _, labels in parts.values())
    names = getattr(parts["train"][0], "classes", None) or range(highest + 1)
    classes = tuple(", ".join(n) if isinstance(n, tuple) else str(n) for n in names)
    pools = {}
    for part, (dataset, labels) in parts.items():
        keys = [f"{part}:{i}" for i in range(len(labels))]
        place = f"torchvision:{name}@{root.absolute()} ({part})"
        pools[part] = Pool(place, _torchvision_storage(dataset, labels, place), labels, keys)
    return Source(classes, pools)


def _torchvision_part(factory: Any, root: Path, part: str, by_flag: bool, options: dict[str, bool]) -> Any:
    wanted: list[dict[str, Any]] = [{"train": part == "train"}] if by_flag else [{"split": part}]
    if not by_flag and part == "test":
        wanted.append({"split": "val"})
    for choice in wanted:
        try:
            return factory(str(root), **choice, **options)
        except ValueError as error:
            refused = error
        except (OSError, RuntimeError) as error:
            remedy = "" if options else "; check the folder, or set data.download: true to fetch it"
            reason = str(error).split(" You can use download=True")[0]
            raise DynamizeError(
                f"torchvision:{factory.__name__}: no {part} part in {root.absolute()}: {reason}{remedy}"
            ) from error
    raise DynamizeError(
        f"torchvision:{factory.__name__} has no {part} part: {refused}; use imagefolder:PATH"
    ) from refused


def _torchvision_labels(dataset: Any, name: str) -> np.ndarray:
    for attribute in ("targets", "labels", "_labels"):
        labels = getattr(dataset, attribute, None)
        if labels is not None:
            array = np.asarray(labels)
            if array.ndim == 1 and array.dtype.kind in "iu":
                return array.astype(np.int64)
    raise DynamizeError(
        f"torchvision:{name} does not list one class number per image; "
        "lay its images out as folders and use imagefolder:PATH"
    )


def _torchvision_storage(dataset: Any, labels: np.ndarray, place: str) -> Storage:
    pixels = getattr(dataset, "data", None)
    if isinstance(pixels, np.ndarray | Tensor) and len(pixels) == len(labels):
        return PixelStorage(_pixels(np.asarray(pixels), place))
    return ItemStorage(dataset, range(len(labels)))


def read_digits() -> Source:
    """scikit-learn's 1,797 handwritten digits, grey 8 x 8; 60 % train, 20 % calibration, 20 % test."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(np.rint(images * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    keys = [f"digits:{i}" for i in range(len(labels))]
    pool = Pool("scikit-learn's digits", PixelStorage(pixels), labels.astype(np.int64), keys)
    return Source(tuple("0123456789"), {"all": pool}, held_out=0.2, standard=True)


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
