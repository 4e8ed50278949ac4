"""Predictions as they are given, in memory or in files, checked and brought into one form."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_softmax

from dynamize.calibration.evidence import LEAST_PROBABILITY, Classes, Floats
from dynamize.errors import DynamizeError, unknown

_MOST = 1.01  # that probabilities may sum to, in half precision


class Named(NamedTuple):
    """One network's classes (n, k), the most probable first, and their log-probabilities (n, k); ``whole`` if these are
    all classes."""

    classes: Classes
    log_probabilities: Floats
    whole: bool = False


def as_named(name: str, given: Any) -> Named:
    if isinstance(given, Named):
        return given
    pair = isinstance(given, tuple | list) and len(given) == 2 and np.ndim(given[0]) == 2
    probabilities = np.asarray(given[1] if pair else given)
    if probabilities.ndim != 2 or not len(probabilities) or not np.issubdtype(probabilities.dtype, np.floating):
        raise DynamizeError(
            f"{name}: give probabilities (images, classes), or a pair of classes (images, k) and probabilities "
            f"(images, k); these have the shape {probabilities.shape} and are {probabilities.dtype}."
        )
    probabilities = probabilities.astype(np.float64)
    sums = probabilities.sum(axis=1)
    if not (probabilities >= 0).all() or not (sums <= _MOST).all():
        raise DynamizeError(
            f"{name}: probabilities lie between {probabilities.min():.3g} and {probabilities.max():.3g}, and those of "
            f"an image sum to {sums.max():.3g}: give softmax outputs, or logits by PredictionTable.from_logits."
        )
    if not pair and not (sums >= 2 - _MOST).all():
        raise DynamizeError(
            f"{name}: probabilities of all classes sum to {sums.min():.3g}: give the classes beside them."
        )
    order = np.argsort(-probabilities, axis=1, kind="stable")
    logs = np.log(np.maximum(np.take_along_axis(probabilities, order, axis=1), LEAST_PROBABILITY))
    if not pair:
        return Named(order, logs, whole=True)
    classes = np.asarray(given[0])
    if classes.shape != probabilities.shape or not np.issubdtype(classes.dtype, np.integer) or classes.min() < 0:
        raise DynamizeError(f"{name}: classes have to be indices, one for each of its probabilities.")
    classes = np.take_along_axis(classes.astype(np.int64), order, axis=1)
    ordered = np.sort(classes, axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise DynamizeError(f"{name}: an image has the same class twice among its most probable.")
    return Named(classes, logs)


def from_logits(name: str, logits: NDArray[Any]) -> Named:
    if logits.ndim != 2 or not np.isfinite(logits).all():
        raise DynamizeError(f"{name}: give finite logits (images, classes); these have the shape {logits.shape}.")
    logs = log_softmax(logits.astype(np.float64), axis=1)
    order = np.argsort(-logs, axis=1, kind="stable")
    return Named(order, np.take_along_axis(logs, order, axis=1), whole=True)


def as_labels(labels: ArrayLike, images: int) -> Classes:
    array = np.asarray(labels)
    if array.shape != (images,) or not np.issubdtype(array.dtype, np.integer) or array.min() < 0:
        raise DynamizeError(f"labels have to be {images} class indices, one for each image; None where there are none.")
    return array.astype(np.int64)


def as_costs(measure: str, given: Mapping[str, float], names: Sequence[str]) -> Floats:
    missing = [name for name in names if name not in given]
    if missing:
        raise DynamizeError(f"{measure} of {', '.join(missing)} is missing: give one number for each network.")
    costs = np.array([float(given[name]) for name in names])
    if not (np.isfinite(costs) & (costs > 0)).all():
        raise DynamizeError(f"{measure} are {costs.tolist()}: give positive numbers, of each network alone.")
    return costs


def read_arrays(file: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DynamizeError(f"{file} is no .npz file of arrays that can be read: {error}") from error


def from_arrays(name: str, arrays: Mapping[str, NDArray[Any]]) -> Any:
    if f"{name}.logits" in arrays:
        return from_logits(name, arrays[f"{name}.logits"])
    if f"{name}.probabilities" not in arrays:
        raise DynamizeError(
            unknown(name, "network in these files", sorted({key.rpartition(".")[0] for key in arrays} - {""}))
        )
    classes, probabilities = arrays.get(f"{name}.classes"), arrays[f"{name}.probabilities"]
    return probabilities if classes is None else (classes, probabilities)
