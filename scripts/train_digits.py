"""Train a digits network that comes with the package, from scratch, on scikit-learn's digits (train split).

    python scripts/train_digits.py --out dynamize/models/digits_resnet.safetensors
    python scripts/train_digits.py digits_resnet_small --out dynamize/models/digits_resnet_small.safetensors

Two runs on one machine give the same weights, bit by bit. A recipe that uses this checkpoint normalises its
images as NORMALIZE says. Nothing is fitted to calibration or test images; the last epoch is kept.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer

import dynamize as dz
from dynamize.checkpoints import save_state_dict
from dynamize.conversion import apply, wrap
from dynamize.data import DataSpec, load_data
from dynamize.measure.accuracy import top_answers
from dynamize.models import create
from dynamize.transform import Context
from dynamize.transforms import Distill

INPUT_SHAPE = (1, 8, 8)
NORMALIZE = ((0.305,), (0.376,))  # of the train split's pixels in 0..1, rounded


def main(
    name: Annotated[str, typer.Argument(help="digits_resnet or digits_resnet_small")] = "digits_resnet",
    *,
    out: Annotated[Path, typer.Option(help="the safetensors file to write")],
    epochs: int = 60,
    seed: int = 0,
) -> None:
    """Train, save, load what was saved, and print its accuracy."""
    torch.set_num_threads(1)  # how sums are split over threads changes their rounding
    spec = DataSpec(source="digits", augment="crop", normalize=NORMALIZE)
    splits = load_data(spec, INPUT_SHAPE, 10)
    torch.manual_seed(seed)
    untrained = wrap(create(name), INPUT_SHAPE)
    step = Distill(epochs=epochs, batch_size=64, lr=0.1, alpha=0.0, precision="float32")
    trained, _ = apply(untrained, step, Context(data=splits, seed=seed))
    save_state_dict(trained.plain.state_dict(), out)

    network = dz.source(f"dynamize:{name}", checkpoint=out)
    for images in (splits.calibration, splits.test):
        found, labels = top_answers(network, images, torch.device("cpu"))
        print(f"{images.name}: {(found == labels).double().mean():.2%} of {len(labels)} images")
    print(f"{out}: {out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    typer.run(main)
