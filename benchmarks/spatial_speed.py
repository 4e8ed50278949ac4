"""What a coarser grid or tiles save on the clock, run by run of blocks, and from where on they pay.

    python benchmarks/spatial_speed.py --backends onnxruntime,openvino
    python benchmarks/spatial_speed.py --form tiles --backends onnxruntime,openvino

Every way through each gated block is timed by itself, one image at a time, in turns in one process, on what reaches the
block from an image of noise; ``gate`` is what the whole network takes longer with all gates open than the network as it
was on the same backend, for each gate. Tiles are timed for one block of each size of map, with what gathering and
writing back takes. Nothing else may run meanwhile.
"""

from typing import Annotated, Literal

import torch
import typer

import dynamize as dz
from dynamize.graph.nodes import nodes_by_name
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.tiles import TileUnit
from dynamize.runtime.profile import OptionTimes, option_latency

CPU = torch.device("cpu")
DENSITY = 0.2


def main(
    network: Annotated[str, typer.Option(help="a source")] = "torchvision:resnet50",
    form: Annotated[Literal["grid", "tiles"], typer.Option(help="what is timed")] = "grid",
    side: Annotated[int, typer.Option(help="pixels")] = 224,
    group: Annotated[int, typer.Option(help="grid: blocks under one gate, at most")] = 4,
    tile: Annotated[str, typer.Option(help="tiles: their side, or auto")] = "auto",
    backends: Annotated[str, typer.Option(help="comma-separated")] = "onnxruntime",
    seconds: Annotated[float, typer.Option(help="for each backend")] = 40.0,
) -> None:
    """Print a Markdown table."""
    torch.manual_seed(0)
    source, shape = dz.source(network).eval(), (3, side, side)
    if form == "grid":
        dynamic = dz.convert(source, [dz.SpatialSampling(group=group, keep_first=False)], shape).eval()
        print("| backend | blocks | maps | whole | coarse | times as fast | gate | pays from a share of |")
        print("|---|---|---|---|---|---|---|---|")
    else:
        step = dz.SpatialSampling(form="tiles", tile=tile if tile == "auto" else int(tile), dense_from=1)
        blocks = [[block] for block in one_of_each_size(dz.convert(source, [step], shape))]
        dynamic = dz.convert(source, [step.model_copy(update={"blocks": blocks})], shape).eval()
        print(
            f"| backend | block | maps | tiles | windows | whole | nearest to {DENSITY} of the tiles | times as fast | "
            "breaks even at | gate |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|")
    for backend in backends.split(","):
        times = option_latency(dynamic, backend, CPU, seconds)
        rows = grids(dynamic, times) if form == "grid" else tiles(dynamic, times)
        print("\n".join(f"| {backend} | {row} |" for row in rows), flush=True)


def one_of_each_size(dynamic: DynamicNetwork) -> list[str]:
    """The last node of the first gated block on maps of each size."""
    nodes = nodes_by_name(dynamic.plain.graph)
    ends = [unit.place[1] for unit in dynamic.changing]
    return list({nodes[end].meta["shape"][2:]: end for end in reversed(ends)}.values())[::-1]


def gate_ms(times: OptionTimes) -> float:
    return max(0.0, times.opened - times.static) / len(times.options)


def grids(dynamic: DynamicNetwork, times: OptionTimes) -> list[str]:
    nodes, gate, rows = nodes_by_name(dynamic.plain.graph), gate_ms(times), []
    for unit in dynamic.changing:
        coarse, whole = times.options[unit.name]
        height, width = nodes[unit.place[1]].meta["shape"][2:]
        pays = f"{gate / (whole - coarse):.2f}" if whole - coarse > gate else "-"
        rows.append(
            f"{unit.name} | {height} x {width} | {whole:.2f} ms | {coarse:.2f} ms | {whole / coarse:.2f} x | "
            f"{gate:.2f} ms | {pays}"
        )
    return rows


def tiles(dynamic: DynamicNetwork, times: OptionTimes) -> list[str]:
    rows = []
    for unit in dynamic.changing:
        assert isinstance(unit, TileUnit)
        tiling, (_, *some, whole) = unit.tiling, times.options[unit.name]
        count = len(tiling.tiles)
        few = min(range(1, len(some) + 1), key=lambda wanted: abs(wanted / count - DENSITY))
        window, (height, width) = tiling.window, (tiling.height, tiling.width)
        rows.append(
            f"{unit.name} | {height} x {width} | {count} of {tiling.side} x {tiling.side} | "
            f"{window[0]} x {window[1]} | "
            f"{whole:.2f} ms | {few / count:.2f}: {some[few - 1]:.2f} ms | {whole / some[few - 1]:.2f} x | "
            f"{breaks_even(some, whole, count)} | {gate_ms(times):.2f} ms"
        )
    return rows


def breaks_even(some: list[float], whole: float, count: int) -> str:
    """The share of tiles that takes as long as the whole map, between two that were timed."""
    before = 0.0
    for wanted, taken in enumerate(some, start=1):
        if taken >= whole:
            return f"{(wanted - (taken - whole) / (taken - before)) / count:.2f}"
        before = taken
    return f"above {len(some) / count:.2f}"


if __name__ == "__main__":
    typer.run(main)
