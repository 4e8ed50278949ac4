"""What a coarser grid saves on the clock, run by run of blocks, and from which share of coarse images on gates pay.

    python benchmarks/spatial_speed.py --backends onnxruntime,openvino

Every way through each gated block is timed by itself, one image at a time, in turns in one process, on what reaches the
block from an image of noise; ``gate`` is what the whole network takes longer with all gates open than the network as it
was on the same backend, for each gate. Nothing else may run meanwhile.
"""

from typing import Annotated

import torch
import typer

import dynamize as dz
from dynamize.graph.nodes import nodes_by_name
from dynamize.runtime.profile import option_latency

CPU = torch.device("cpu")


def main(
    network: Annotated[str, typer.Option(help="a source")] = "torchvision:resnet50",
    side: Annotated[int, typer.Option(help="pixels")] = 224,
    group: Annotated[int, typer.Option(help="blocks under one gate, at most")] = 4,
    backends: Annotated[str, typer.Option(help="comma-separated")] = "onnxruntime",
    seconds: Annotated[float, typer.Option(help="for each backend")] = 40.0,
) -> None:
    """Print a Markdown table."""
    torch.manual_seed(0)
    step = dz.SpatialSampling(group=group, keep_first=False)
    dynamic = dz.convert(dz.source(network).eval(), [step], (3, side, side)).eval()
    nodes, runs = nodes_by_name(dynamic.plain.graph), dynamic.history[0]["blocks"]
    print("| backend | blocks | maps | whole | coarse | times as fast | gate | pays from a share of |")
    print("|---|---|---|---|---|---|---|---|")
    for backend in backends.split(","):
        times = option_latency(dynamic, backend, CPU, seconds)
        gate = max(0.0, times.opened - times.static) / len(times.options)
        for (name, (coarse, whole)), run in zip(times.options.items(), runs, strict=True):
            height, width = nodes[run[-1]].meta["shape"][2:]
            pays = f"{gate / (whole - coarse):.2f}" if whole - coarse > gate else "-"
            print(
                f"| {backend} | {name} | {height} x {width} | {whole:.2f} ms | {coarse:.2f} ms | "
                f"{whole / coarse:.2f} x | {gate:.2f} ms | {pays} |",
                flush=True,
            )


if __name__ == "__main__":
    typer.run(main)
