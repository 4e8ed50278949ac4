"""The kinds of source, each read into labelled pools of images, before anything is split or decoded."""

from __future__ import annotations

import difflib
import inspect
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamize.data.canvas import on_canvases
from dynamize.data.canvas_spec import CanvasSpec
from dynamize.data.pools import PARTS, UNLABELLED, Pool, Source
from dynamize.data.spec import DataSpec, split_source
from dynamize.data.storage import FileStorage, ItemStorage, PixelStorage, Storage
from dynamize.errors import DynamizeError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")


def read_source(spec: DataSpec) -> Source:
    """Find the images and labels that `spec.source` names. Raises DynamizeError naming the file or folder."""
    kind, rest = split_source(spec.source)
    if kind == "canvas":
        inner, canvas = CanvasSpec.read(rest)
        return on_canvases(read_source(spec.model_copy(update={"source": inner})), canvas)
    if kind == "imagefolder":
        return read_imagefolder(Path(rest))
    if kind == "npz":
        return read_npz(Path(rest))
    if kind == "torchvision":
        name, _, root = rest.partition("@")
        return read_torchvision(name, Path(root), spec.download)
    return read_digits()


def read_imagefolder(root: Path) -> Source:
    """PATH/{train,val,test}/CLASS/image (any of train, val and test alone, but train), or PATH/CLASS/image.

    Images that lie in no class folder have no labels: PATH/test/image, or PATH/image for test images alone.
    """
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise DynamizeError(f"image folder {root.absolute()} {what}; give the folder of train/ and test/")
    parts = {part: root / part for part in PARTS if _subfolders(root / part) or _holds_images(root / part)}
    if not parts:
        if _holds_images(root) and not _subfolders(root):
            return Source((), {"test": _unlabelled_pool(root)}, named=False)
        classes = _class_names(root)
        if set(classes) <= set(PARTS):
            _class_names(root / classes[0])
        return _labelled({"all": root}, classes)
    if list(parts) == ["train"]:
        raise DynamizeError(
            f"image folder {root.absolute()} has images in train/ but no test/ or val/; add one, or move all class "
            "folders directly below the image folder to have them split"
        )
    if "test" not in parts:
        parts["test"] = parts.pop("val")
    labelled = {part: folder for part, folder in parts.items() if _subfolders(folder)}
    first = labelled.get("train")
    names = _class_names(first) if first else sorted({name for one in labelled.values() for name in _subfolders(one)})
    for folder in labelled.values() if first else ():
        _no_other_classes(folder, tuple(names), first)
    found = _labelled(labelled, tuple(names)) if labelled else Source((), {}, named=False)
    bare = {part: _unlabelled_pool(folder) for part, folder in parts.items() if part not in labelled}
    return replace(found, pools={part: {**found.pools, **bare}[part] for part in parts})


def _holds_images(folder: Path) -> bool:
    """Whether images lie in the folder itself."""
    return folder.is_dir() and any(entry.name.lower().endswith(IMAGE_ENDINGS) for entry in os.scandir(folder))


def _unlabelled_pool(folder: Path) -> Pool:
    found = sorted(images_below(str(folder)))
    labels = np.full(len(found), UNLABELLED, dtype=np.int64)
    return Pool(str(folder.absolute()), FileStorage([path for path, _ in found]), labels, [key for _, key in found])


def _labelled(folders: Mapping[str, Path], classes: tuple[str, ...]) -> Source:
    """The images of class folders; a class may have none in some of them."""
    pools = {part: _folder_pool(folder, classes) for part, folder in folders.items()}
    warnings = []
    for part, pool in pools.items():
        if missing := [name for label, name in enumerate(classes) if label not in pool.labels]:
            what = "the images" if part == "all" else f"the {part} images"
            warnings.append(f"{what} in {pool.place} have none of {_some(missing)}: nothing is judged on these classes")
    return Source(classes, pools, warnings=tuple(warnings))


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))


def _class_names(folder: Path) -> tuple[str, ...]:
    names = _subfolders(folder)
    if not names:
        raise DynamizeError(f"{folder.absolute()} holds no class folders; lay images out as CLASS/image.jpg in it")
    return tuple(names)


def _no_other_classes(folder: Path, classes: tuple[str, ...], train: Path | None) -> None:
    extra = sorted(set(_class_names(folder)) - set(classes))
    if extra and train is not None:
        missing = sorted(set(classes) - set(_class_names(folder)))
        lacks = f" and lacks {_some(missing)}" if missing else ""
        raise DynamizeError(
            f"{folder.absolute()} has the class folders {_some(extra)} that train does not{lacks}; name its folders as "
            f"those of {train.absolute()}"
        )


def _folder_pool(folder: Path, classes: tuple[str, ...]) -> Pool:
    paths: list[str] = []
    keys: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        inside = os.path.join(folder, name)
        found = sorted(images_below(inside)) if os.path.isdir(inside) else []
        paths += [path for path, _ in found]
        keys += [key for _, key in found]
        labels += [label] * len(found)
    if not paths:
        raise DynamizeError(
            f"the class folders in {folder.absolute()} hold no image ({' '.join(IMAGE_ENDINGS)}); put images there"
        )
    return Pool(str(folder.absolute()), FileStorage(paths), np.array(labels, dtype=np.int64), keys)


def images_below(folder: str, above: frozenset[str] = frozenset()) -> list[tuple[str, str]]:
    """(path, path with links resolved) of every image in a folder and those below it.

    Raises:
        DynamizeError: a link leads back to a folder ``above`` it.
    """
    found: list[tuple[str, str]] = []
    real = os.path.realpath(folder)
    if real in above:
        raise DynamizeError(
            f"{folder} is a link to a folder that it lies in, so its images have no end: remove the link"
        )
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            found += images_below(entry.path, above | {real})
        elif entry.name.lower().endswith(IMAGE_ENDINGS) and (entry.is_file() or entry.is_symlink()):
            key = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
            found.append((entry.path, key))
    return found


def read_npz(path: Path) -> Source:
    """Arrays x_train, y_train, x_test, y_test (and x_val, y_val), or x and y; optionally names in `classes`.

    x_train may be absent, and so may the labels of what is not trained on.

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
    parts = [part for part in PARTS if f"x_{part}" in arrays]
    names = {part: (f"x_{part}", f"y_{part}") for part in parts} or {"all": ("x", "y")}
    if "test" not in names and "val" in names:
        names["test"] = names.pop("val")
    wanted = [x for x, _ in names.values()] + (["y_train"] if "train" in names else [])
    absent = [key for key in wanted if key not in arrays] + (["x_test", "y_test"] if list(names) == ["train"] else [])
    if absent:
        raise DynamizeError(
            f"{where} lacks {_some(absent)} (it holds {_some(sorted(arrays))}); "
            "it needs x_train, y_train, x_test and y_test, or x and y; x_train, y_test and y may be left out"
        )
    pools = {
        part: _array_pool(arrays[x], arrays.get(y), f"{where} ({x}, {y})", f"{part}:") for part, (x, y) in names.items()
    }
    if "all" in pools and "y" not in arrays:
        pools = {"test": pools["all"]}
    highest = max(int(pool.labels.max(initial=0)) for pool in pools.values())
    labelled = any(y in arrays for _, y in names.values())
    classes = tuple(str(n) for n in arrays.get("classes", np.arange(highest + 1 if labelled else 0)))
    return Source(classes, pools, named="classes" in arrays)


def _array_pool(x: np.ndarray, y: np.ndarray | None, place: str, prefix: str) -> Pool:
    if y is None:
        y = np.full(len(x), UNLABELLED)
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
