"""Images for conversion: one `data:` section, or what users bring (`dz.splits`), becomes three disjoint splits.

    splits = load_data(DataSpec(source="digits"), input_shape=(1, 8, 8), num_classes=10)
    for epoch in range(epochs):
        set_epoch(loader, epoch)                       # loader = splits.train.training_loader(128, seed=0)
        for images, labels in loader:
            images = splits.train.prepare(images, generator)   # augmented; without a generator: test-time
    for images, labels in splits.test.batches(256): ...        # test-time transform, in order

Names are loaded on first use, so that a recipe's schema does not cost an import of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynamize.data.augment import Normalize as Normalize
    from dynamize.data.augment import augment as augment
    from dynamize.data.images import Images as Images
    from dynamize.data.images import ImageSet as ImageSet
    from dynamize.data.images import loader as loader
    from dynamize.data.images import set_epoch as set_epoch
    from dynamize.data.loaders import LoaderSet as LoaderSet
    from dynamize.data.spec import DataSpec as DataSpec
    from dynamize.data.splits import Splits as Splits
    from dynamize.data.splits import load_data as load_data

_HOMES = {
    "DataSpec": "spec",
    "Images": "images",
    "ImageSet": "images",
    "LoaderSet": "loaders",
    "Normalize": "augment",
    "Splits": "splits",
    "augment": "augment",
    "load_data": "splits",
    "loader": "images",
    "set_epoch": "images",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
