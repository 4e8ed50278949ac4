"""What a source of images holds before anything is split or decoded: labelled pools of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dynamize.data.storage import Storage

PARTS = ("train", "val", "test")
UNLABELLED = -1


@dataclass(frozen=True)
class Pool:
    """Images that lie together: `place` says where (for messages), `keys` names each image uniquely.

    `boxes`, where they are known, say where in each image its object is: (N, 4), left, top, right and bottom in pixels.
    """

    place: str
    storage: Storage
    labels: np.ndarray
    keys: Sequence[str]
    boxes: np.ndarray | None = None


@dataclass(frozen=True)
class Source:
    """What a reader found: class names, and either pools called train, test and val or one called "all".

    There may be no train pool; images without labels are labelled -1. `held_out` is the share of a single pool that is
    test; `standard` fixes its split for every seed. Classes that are not `named` were counted from the labels.
    `warnings` are sentences for the report.
    """

    classes: tuple[str, ...]
    pools: dict[str, Pool]
    held_out: float = 0.1
    standard: bool = False
    named: bool = True
    warnings: tuple[str, ...] = ()
