"""How much of the work that a glance and crops save the clock shows at ImageNet shapes, for stated shares of images.

    python benchmarks/glance_focus_speed.py

There is no training data for these: weights and images are random, and thresholds are such that stated shares of the
images leave behind the glance, the first crop, the second crop. ``limit`` is what these shares would give if each look
took as long as the glance takes by itself and nothing lay between them. The static network is the same one on the same
backend. Times are medians of interleaved rounds in one process; nothing else may run meanwhile.
"""

from collections.abc import Sequence
from functools import partial
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

import dynamize as dz
from dynamize.measure.costs import exit_costs
from dynamize.measure.latency import Times, interleave
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting
from dynamize.runtime.compiled import CompiledNetwork

CPU = torch.device("cpu")


def main(
    network: Annotated[str, typer.Option(help="a source")] = "torchvision:resnet50",
    side: Annotated[int, typer.Option(help="pixels of the whole image")] = 224,
    look: Annotated[int, typer.Option(help="pixels of the glance, and of each crop")] = 96,
    shares: Annotated[
        str, typer.Option(help="of the images that leave behind each look; the rest see all")
    ] = "60,25,15",
    batches: Annotated[str, typer.Option(help="comma-separated")] = "1,32",
    images: Annotated[int, typer.Option(help="how many")] = 64,
    backends: Annotated[str, typer.Option(help="comma-separated")] = "onnxruntime",
    seconds: Annotated[float, typer.Option(help="for each backend and batch size")] = 40.0,
) -> None:
    """Print a Markdown table."""
    torch.manual_seed(0)
    leaving = [float(share) / 100 for share in shares.split(",")]
    step = dz.GlanceFocus(glance=look, size=look, crop=look / side, crops=len(leaving) - 1)
    dynamic = dz.convert(dz.source(network).eval(), [step], (3, side, side)).eval()
    noise = torch.randn(images, 3, side, side)
    setting = at_shares(dynamic, noise, leaving)
    exits = dynamic.run(noise, setting).exits
    ratio = exit_costs(dynamic).cumulative()[exits.numpy()].mean() / exit_costs(dynamic).cumulative(Setting())[-1]
    looks = float((exits + 1).clamp(max=len(leaving)).float().mean())
    print(f"{network} at {side} pixels, looks of {look}: {torch.bincount(exits).tolist()} of {images} leave at each\n")
    print(
        "| backend | batch | executed MACs | static | dynamic | times as fast | limit |\n|---|---|---|---|---|---|---|"
    )
    for backend in backends.split(","):
        compiled = dz.compile_network(dynamic, backend, threads="shared")
        for batch in map(int, batches.split(",")):
            found = compare(compiled, noise.split(batch), setting, seconds)
            print(
                f"| {backend} | {batch} | {ratio:.3f} | {found.median_ms('static'):.2f} ms "
                f"| {found.median_ms('dynamic'):.2f} ms | {found.speedup('static', 'dynamic'):.2f} x "
                f"| {found.speedup('static', 'glance') / looks:.2f} x |",
                flush=True,
            )
            print("".join(found.warnings()), end="")


def compare(compiled: CompiledNetwork, inputs: Sequence[Tensor], setting: Setting, seconds: float) -> Times:
    """The whole images alone, each image as far as it goes, and the glance alone."""
    glance = compiled.network.members[0]
    contenders = {
        "static": partial(compiled.run, setting=Setting()),
        "dynamic": partial(compiled.run, setting=setting),
        "glance": partial(compiled.run, setting=Setting({glance: float("-inf")})),
    }
    return interleave(contenders, inputs, CPU, seconds)


def at_shares(network: DynamicNetwork, images: Tensor, shares: Sequence[float]) -> Setting:
    """Thresholds at which these shares of the images leave behind each network in front of the last one."""
    thresholds: dict[str, float | None] = {}
    waiting = np.ones(len(images), bool)
    seen = network.run(images, everyone=True).seen
    for (name, _, found), share in zip(seen, shares, strict=True):
        assert found is not None
        scores = found.double().numpy()
        ranked = np.sort(scores[waiting])[::-1]
        count = round(share * len(images))
        bound = float("-inf") if count >= len(ranked) else float(ranked[count - 1 : count + 1].mean())
        thresholds[name] = bound
        waiting &= scores < bound
    return Setting(thresholds)


if __name__ == "__main__":
    typer.run(main)
