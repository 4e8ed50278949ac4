"""CIFAR-10 as the benchmarks take it. The checkpoints saw all training images, so one half of the test images
calibrates and the other judges; the second fold swaps them."""

from pathlib import Path
from typing import Any

import torch

from dynamize.data import DataSpec, Splits, load_data

CPU, SHAPE, CLASSES = torch.device("cpu"), (3, 32, 32), 10
MEAN_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
JUDGING = 1000  # train images, where nothing is trained


def halves(data: Path, shape: tuple[int, int, int] = SHAPE, **fields: Any) -> Splits:
    """The splits of the folder with train/ and test/; ``fields`` are those of ``DataSpec`` that differ."""
    spec = DataSpec.model_validate(
        {"source": f"imagefolder:{data}", "calibration_from": "test", "normalize": MEAN_STD} | fields
    )
    return load_data(spec, shape, CLASSES)
