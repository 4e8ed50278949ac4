"""What statistics and a last layer of its own give back to a network on smaller images: cluttered canvases.

    python benchmarks/resolution_canvas.py --data cifar10 --static runs/canvas_static

The network is that of benchmarks/canvas_static.yaml, trained at 96 pixels. At each smaller size: as it came; with
batch-norm statistics from train images; and with its last layer and last batch norm trained besides (`train: last`,
Touvron et al. 2019, FixRes). All test images judge: nothing is chosen by them.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from canvas import CHANNELS, SIDE, canvases, spread

import dynamize as dz
from dynamize.conversion import apply
from dynamize.data import Splits
from dynamize.graph.macs import annotated_macs
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting
from dynamize.transform import Context

TRAIN = {"epochs": 4, "alpha": 0, "lr": 0.02, "train": "last"}


def main(
    data: Annotated[Path, typer.Option(help="folder with train/ and test/ of CIFAR-10")],
    static: Annotated[Path, typer.Option(help="folder of the run of canvas_static.yaml")],
    sides: Annotated[str, typer.Option(help="pixels, comma-separated")] = "48,64,80",
) -> None:
    """Print a Markdown table."""
    images = canvases(data)
    plain = dz.load(static).eval().plain
    context = Context(data=images, teacher=plain)
    print(f"| {len(images.train)} train images | MACs | as it came | statistics anew | and the last layer trained |")
    print("|---|---|---|---|---|")
    for side in map(int, sides.split(",")):
        row = dz.convert(plain, [dz.Cascade(first=[{"resolution": side}])], (CHANNELS, SIDE, SIDE)).eval()
        share = annotated_macs(row.graphs[f"main-{side}/"]) / annotated_macs(row.plain)
        cells = [told(row, images)]
        for step in (dz.Recalibrate(statistics="recalibrated"), dz.Distill(**TRAIN, member=f"main-{side}")):
            row = apply(row, step, context)[0].eval()
            cells.append(told(row, images))
        print(f"| {side} pixels | {share:.2f} | {' | '.join(cells)} |", flush=True)


def told(row: DynamicNetwork, images: Splits) -> str:
    """How many of all test images the first network answers rightly."""
    compiled = dz.compile_network(row, "onnxruntime")
    setting = Setting({row.members[0]: float("-inf")})
    right = [
        (compiled.run(batch, setting).logits.argmax(1) == labels).numpy()
        for part in (images.calibration, images.test)
        for batch, labels in part.batches(200)
    ]
    return spread(int(np.concatenate(right).sum()), sum(map(len, right)))


if __name__ == "__main__":
    typer.run(main)
