"""What a coarser grid saves on the clock, stage by stage, and from which share of coarse images on its gates pay.

    python benchmarks/spatial_speed.py --backends onnxruntime,openvino

Every way through each gated block is timed by itself, one image at a time, in turns in one process, on what reaches the
block from an image of noise; ``gate`` is what the whole network takes longer with all gates open than the network as it
was on the same backend, for each gate. Nothing else may run meanwhile.
"""

from collections import defaultdict
from typing import Annotated

import numpy as np
import torch
import typer

import dynamize as dz
from dynamize.graph.nodes import nodes_by_name
from dynamize.runtime.profile import option_latency

CPU = torch.device("cpu")


def main(
    network: Annotated[str, typer.Option(help="a source")] = "torchvision:resnet50",
    side: Annotated[int, typer.Option(help="pixels")] = 224,
    backends: Annotated[str, typer.Option(help="comma-separated")] = "onnxruntime",
    seconds: Annotated[float, typer.Option(help="for each backend")] = 40.0,
) -> None:
    """Print a Markdown table."""
    torch.manual_seed(0)
    plain = dz.source(network).eval()
    dynamic = dz.convert(plain, [dz.SpatialSampling(group=1, keep_first=False)], (3, side, side)).eval()
    nodes = nodes_by_name(dynamic.plain.graph)
    maps = {
        unit.name: nodes[run[-1]].meta["shape"][1:]
        for unit, run in zip(dynamic.changing, dynamic.history[0]["blocks"], strict=True)
    }
    print("| backend | maps | blocks | whole | coarse | times as fast | gate | pays from a share of |")
    print("|---|---|---|---|---|---|---|---|")
    for backend in backends.split(","):
        times = option_latency(dynamic, backend, CPU, seconds)
        gate = max(0.0, times.opened - times.static) / len(times.options)
        stages = defaultdict(list)
        for name, ways in times.options.items():
            stages[maps[name]].append(ways)
        for (height, width), ways in stages.items():
            coarse, whole = np.mean(ways, axis=0)
            share = gate / (whole - coarse) if whole > coarse else np.inf
            told = f"{share:.2f}" if share <= 1 else "-"
            print(
                f"| {backend} | {height} x {width} | {len(ways)} | {whole:.3f} ms | {coarse:.3f} ms | "
                f"{whole / coarse:.2f} x | {1e3 * gate:.0f} us | {told} |",
                flush=True,
            )


if __name__ == "__main__":
    typer.run(main)
