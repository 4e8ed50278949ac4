"""Which networks can be wrapped: promises 1, 2 and 6 of `glance_focus` and of a resolution cascade, as
benchmarks/coverage.py for exits.

    python benchmarks/coverage_looks.py --library torchvision --out coverage-looks-torchvision.md
    python benchmarks/coverage_looks.py --library timm --out coverage-looks-timm.md

Each network is built with random weights and the batch-norm statistics of a few small images. Promise 1: with all looks
off, and by a glance at the image in full, it answers bit-equally. Promise 2: four images that leave at different looks
get what a dense pass and the thresholds say, and exactly the multiply-accumulates of their looks are executed. Promise
6: saved, and loaded in another process, it answers, routes and looks as before. ``look`` is what the crop's place is
found by, with its multiply-accumulates as a share of the glance's.
"""

import gc
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from coverage import SIDES, TOLERANCE, Library, Table, settle
from torch import Tensor, nn

import dynamize as dz
from dynamize import artifact
from dynamize.graph.macs import annotated_macs, count_macs
from dynamize.measure.costs import exit_costs
from dynamize.nn.executor import Routed
from dynamize.nn.looking import Look
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting
from dynamize.transform import Transform

IMAGES, SIDE, STRIDE = 4, 128, 32
ALL = float("-inf")


@dataclass
class Row:
    """One line: how it looks, which promises hold for each wrapper, and why not."""

    network: str
    look: str = "-"
    cells: dict[str, str] = field(default_factory=dict)
    why_not: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return all(cell == "yes, yes, yes" for cell in self.cells.values())

    def markdown(self) -> str:
        why = "; ".join(self.why_not).replace("|", "\\|").replace("\n", " ")
        return f"| {self.network} | {self.look} | {' | '.join(self.cells.values())} | {self.seconds:.0f} | {why} |"


HEADER = (
    "| network | look | glance_focus: 1, 2, 6 | resolution cascade: 1, 2, 6 | s | why not |\n|---|---|---|---|---|---|"
)


def wrappers(side: int) -> dict[str, Transform]:
    """What is put around a network for images of so many pixels."""
    small = side // 2 // STRIDE * STRIDE
    return {
        "glance_focus": dz.GlanceFocus(glance=small, size=small, crop=small / side, crops=1),
        "cascade": dz.Cascade(first=[{"resolution": small}]),
    }


def check(library: Library, name: str, folder: Path, other: ProcessPoolExecutor) -> Row:
    """Both wrappers on one network; what fails is in the row."""
    row, started = Row(name), time.monotonic()
    side = SIDES.get(name, SIDE)
    for kind, transform in wrappers(side).items():
        try:
            with torch.no_grad():
                kept = _check(row, f"{library}:{name}", side, transform, folder, other)
            row.cells[kind] = ", ".join("yes" if one else "NO" for one in kept)
        except Exception as error:  # whatever a network does, the table says it and goes on
            row.cells[kind] = "NO"
            row.why_not.append(f"{kind}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        gc.collect()
    row.seconds = time.monotonic() - started
    return row


def _check(
    row: Row, source: str, side: int, transform: Transform, folder: Path, other: ProcessPoolExecutor
) -> tuple[bool, bool, bool]:
    torch.manual_seed(0)
    network = dz.source(source)
    shape = (3, side, side)
    images = torch.randn(IMAGES, *shape) * torch.tensor([0.5, 1.0, 1.5, 2.0])[:, None, None, None]
    settle(network, images)
    wanted = network(images)
    dynamic = dz.convert(network, [transform], shape).eval()
    first = torch.equal(dynamic(images), wanted)
    if isinstance(transform, dz.GlanceFocus):
        first = first and torch.equal(in_full(network, images), wanted)
        row.look = looking(dynamic)
    del network
    setting = halved(dynamic, images)
    routed = dynamic.run(images, setting)
    second = _promise_2(row, dynamic, images, setting, routed)
    artifact.save(dynamic, folder)
    del dynamic
    gc.collect()
    again = other.submit(answers, folder, setting, images.numpy(), torch.get_num_threads()).result()
    last = all(np.array_equal(one, two) for one, two in zip(again, told(routed), strict=True))
    return first, second, last


def in_full(network: nn.Module, images: Tensor) -> Tensor:
    """What a glance at the whole image in its own resolution answers."""
    side = images.shape[-1]
    dynamic = dz.convert(network, [dz.GlanceFocus(glance=side, crops=0)], images.shape[1:]).eval()
    return dynamic.run(images, Setting({"glance": ALL})).logits


def looking(dynamic: DynamicNetwork) -> str:
    """What the place is found by, and what that costs."""
    (look,) = (piece for piece in dynamic.row if isinstance(piece, Look))
    glance: Any = dynamic.graphs["glance/"]
    return f"{type(look.where).__name__}, {look.macs / annotated_macs(glance):.1%}"


def halved(dynamic: DynamicNetwork, images: Tensor) -> Setting:
    """Thresholds at which half of the images that come to a look leave there."""
    waiting = torch.ones(len(images), dtype=torch.bool)
    thresholds: dict[str, float | None] = {}
    for name, _, scores in dynamic.run(images, everyone=True).seen:
        assert scores is not None
        ranked = scores[waiting].sort().values.tolist()
        middle = len(ranked) // 2
        thresholds[name] = (ranked[middle - 1] + ranked[middle]) / 2
        waiting &= scores < thresholds[name]
    return Setting(thresholds)


def _promise_2(row: Row, dynamic: DynamicNetwork, images: Tensor, setting: Setting, routed: Routed) -> bool:
    seen = dynamic.run(images, everyone=True)
    every = torch.stack([*(logits for _, logits, _ in seen.seen), seen.logits])
    failed = []
    if len(set(routed.exits.tolist())) != len(every):
        failed.append(f"left at {routed.exits.tolist()}")
    dense = every[routed.exits, torch.arange(len(images))]
    distance = float((routed.logits - dense).abs().max() / dense.abs().max())
    if not distance <= TOLERANCE:
        failed.append(f"dynamic and dense answers differ by {distance:.1e}")
    executed = count_macs(dynamic.run, images, setting)
    singly = sum(count_macs(dynamic.run, image, setting) for image in images.split(1))
    listed = exit_costs(dynamic).executed(routed.taken, len(images)).sum()
    if executed != singly or executed != listed:
        failed.append(f"executed {executed:.0f} MACs, one image at a time {singly:.0f}, exit_costs says {listed:.0f}")
    row.why_not += failed
    return not failed


def told(routed: Routed) -> list[np.ndarray]:
    """Answers, where images left, and what they showed."""
    return [routed.logits.numpy(), routed.exits.numpy(), *(boxes.numpy() for boxes in routed.crops.values())]


def answers(folder: Path, setting: Setting, images: np.ndarray, threads: int) -> list[np.ndarray]:
    """In another process: load the artifact, and run it."""
    torch.set_num_threads(threads)
    dynamic = artifact.load(folder)
    with torch.no_grad():
        found = told(dynamic.run(torch.from_numpy(images), setting))
    del dynamic
    gc.collect()
    return found


def summary(_: Library, found: list[Row]) -> str:
    """How many hold."""
    good = sum(row.good for row in found)
    return f"{good} of {len(found)} networks keep all three promises with both."


main = Table(Row, HEADER, check, summary).write


if __name__ == "__main__":
    typer.run(main)
