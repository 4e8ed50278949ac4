"""Whether the first batch after a switch of operating points takes longer than those that follow.

    dynamize run quickstart --out cascade
    python benchmarks/knob.py cascade

Each turn switches from one operating point to another and runs some batches there; turns at which nothing is switched
(the point is set anew) come in between, in random order. Timed are the switch by itself, and each batch behind it.
Nothing else may run meanwhile.
"""

import random
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

import dynamize as dz
from dynamize.runtime.compiled import CompiledNetwork

AFTER = 8  # batches in a turn
QUANTILES = (50, 95, 99)


def main(
    artifact: Annotated[Path, typer.Argument(help="of a calibrated network")],
    batches: Annotated[str, typer.Option(help="sizes, comma-separated")] = "1,64",
    turns: Annotated[int, typer.Option(help="for each point and size")] = 300,
    backend: Annotated[str, typer.Option(help="that of the network")] = "onnxruntime",
) -> None:
    """Print quantiles in microseconds, for each size of batch."""
    network = dz.load(artifact).eval()
    compiled = dz.compile_network(network, backend)
    print("| batch | what | " + " | ".join(f"{q} %, us" for q in QUANTILES) + " |\n|---|---|" + "---|" * len(QUANTILES))
    for size in map(int, batches.split(",")):
        images = torch.randn(size, *network.input_shape, generator=torch.Generator().manual_seed(0))
        switched, stayed = measure(compiled, images, turns)
        for name, times in {
            "the switch itself": switched[:, 0],
            "first batch after a switch": switched[:, 1],
            "second": switched[:, 2],
            "all later ones": switched[:, 3:],
        }.items():
            shown = " | ".join(f"{1e6 * one:.0f}" for one in np.percentile(times, QUANTILES))
            print(f"| {size} | {name} | {shown} |")
        ratio = np.median(switched[:, 1] / np.median(switched[:, 2:], axis=1))
        alike = np.median(stayed[:, 1] / np.median(stayed[:, 2:], axis=1))
        print(f"| {size} | first / later ones of its turn: {ratio:.3f}; same point set anew: {alike:.3f} | | | |")


def measure(compiled: CompiledNetwork, images: torch.Tensor, turns: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of the switch and of each batch behind it, (turns, 1 + AFTER), of turns with a switch and without."""
    points = list(compiled.network.operating_points)
    order = random.Random(0)
    for point in points:  # memory for batches of this size
        turn(compiled, point, images)
    found: dict[bool, list[list[float]]] = {True: [], False: []}
    here = points[-1]
    for _ in range(turns * len(points)):
        switches = order.random() < 0.5
        here = order.choice([one for one in points if one is not here]) if switches else here
        found[switches].append(turn(compiled, here, images))
    return np.array(found[True]), np.array(found[False])


def turn(compiled: CompiledNetwork, point: object, images: torch.Tensor) -> list[float]:
    """Seconds of setting the point, and of each batch."""
    at = [time.perf_counter()]
    compiled.set_operating_point(point)
    at.append(time.perf_counter())
    for _ in range(AFTER):
        compiled(images)
        at.append(time.perf_counter())
    return np.diff(at).tolist()


if __name__ == "__main__":
    typer.run(main)
