"""Which networks take gates: promises 1, 2 and 6 of skip gates and channel gates, as benchmarks/coverage.py for exits.

    python benchmarks/coverage_gates.py --library torchvision --out coverage-gates-torchvision.md
    python benchmarks/coverage_gates.py --library timm --out coverage-gates-timm.md

Each network is built with random weights and the batch-norm statistics of a few small images. Promise 1: with gates
open its answers for one image at a time are bit-equal (channel gates, whose sums run in another order: within 1e-5 of
the largest, for a batch; images with large feature maps go through gates one by one, and one image's kernels add up in
another order than a batch's). Promise 2:
with random gates, images get what computing every path and mixing by the decisions gives, within 1e-5, and exactly the
multiply-accumulates of their paths are executed. What need not be bit-equal is compared in float64, because deep random
networks multiply rounding errors. Promise 6: saved, and loaded in another process, it answers and decides as before. A
network without anything to gate is refused with a reason, which is "none" in the table.
"""

import gc
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import typer
from coverage import SIDES, Library, Table, settle
from torch import Tensor
from torch.nn import functional

import dynamize as dz
from dynamize import artifact
from dynamize.conversion import apply, wrap
from dynamize.graph.macs import count_macs
from dynamize.measure.costs import exit_costs
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Static
from dynamize.nn.units import Unit
from dynamize.transform import Context, Transform

IMAGES, SIDE = 4, 96
TOLERANCE = 1e-5  # of the largest logit
NOTHING = ("no residual block", "no channels that can be split")
GATES: dict[str, Transform] = {
    "skip": dz.SkipGates(group=1, keep_first=False),
    "channel": dz.ChannelGates(keep_first=False),
}


@dataclass
class Row:
    """One line: for each kind of gate the number of units and which promises hold, and why not."""

    network: str
    cells: dict[str, str] = field(default_factory=dict)
    why_not: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return "NO" not in "".join(self.cells.values())

    def markdown(self) -> str:
        why = "; ".join(self.why_not).replace("|", "\\|").replace("\n", " ")
        return f"| {self.network} | {' | '.join(self.cells.values())} | {self.seconds:.0f} | {why} |"


HEADER = "| network | skip gates | channel gates | s | why not |\n|---|---|---|---|---|"


def check(library: Library, name: str, folder: Path, other: ProcessPoolExecutor) -> Row:
    """Both kinds of gates on one network; what fails is in the row."""
    row, started = Row(name), time.monotonic()
    for kind, transform in GATES.items():
        try:
            with torch.no_grad():
                row.cells[kind] = _check(row, f"{library}:{name}", transform, folder, other)
        except Exception as error:  # whatever a network does, the table says it and goes on
            first = str(error).splitlines()[0] if str(error) else ""
            nothing = isinstance(error, dz.DynamizeError) and any(words in first for words in NOTHING)
            row.cells[kind] = "none" if nothing else "NO"
            row.why_not += [] if nothing else [f"{kind}: {type(error).__name__}: {first}"]
    row.seconds = time.monotonic() - started
    return row


def _check(row: Row, source: str, transform: Transform, folder: Path, other: ProcessPoolExecutor) -> str:
    torch.manual_seed(0)
    network = dz.source(source)
    side = SIDES.get(row.network, SIDE)
    images = torch.randn(IMAGES, 3, side, side) * torch.tensor([0.5, 1.0, 1.5, 2.0])[:, None, None, None]
    settle(network, images)
    if not transform.exact:
        network, images = network.double(), images.double()
    dynamic, _ = apply(wrap(network, (3, side, side)), transform, Context())
    if transform.exact:
        first = all(torch.equal(dynamic(one), network(one)) for one in images.split(1))
    else:
        first = near(dynamic(images), network(images))
    del network
    scatter(dynamic)
    second = _promise_2(row, dynamic.double(), images.double())
    images = images.float()
    dynamic.float()
    with dz.record_routing(dynamic) as routing:
        found = dynamic(images)
    units = len(dynamic.changing)
    artifact.save(dynamic, folder)
    choices = routing.choices.numpy()
    del dynamic
    gc.collect()
    again = other.submit(answers, folder, images.numpy(), torch.get_num_threads()).result()
    last = bool(np.array_equal(again[0], found.numpy()) and np.array_equal(again[1], choices))
    kept = [{True: "yes", False: "NO"}[one] for one in (first, second, last)]
    return f"{units} units: {', '.join(kept)}"


def _promise_2(row: Row, dynamic: DynamicNetwork, images: Tensor) -> bool:
    with dz.record_routing(dynamic) as routing:
        found = dynamic(images)
    dense = masked(dynamic, images, routing.taken)
    listed = exit_costs(dynamic).executed(routing.taken, len(images)).sum()
    executed = count_macs(dynamic, images)
    kept = near(found, dense) and abs(executed - listed) <= 1e-6 * listed
    if not kept:
        row.why_not.append(f"differs from masked by {float((found - dense).abs().max()):.1e}, {executed} of {listed}")
    return kept


def scatter(dynamic: DynamicNetwork) -> None:
    """Random gates that decide differently for different images."""
    generator = torch.Generator().manual_seed(0)
    for unit in dynamic.changing:
        for parameter in unit.gate.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def masked(dynamic: DynamicNetwork, images: Tensor, taken: dict[str, Tensor]) -> Tensor:
    """Every path for every image, mixed by these decisions."""
    features = images.clone()  # which layers in place may write over
    for piece in dynamic.row:
        if isinstance(piece, Unit):
            shares = functional.one_hot(taken[piece.name], len(piece.path_macs)).to(features)
            features = piece.blend(features, shares)
        else:
            assert isinstance(piece, Static)
            features = piece.module(features)
    return features


def near(found: Tensor, wanted: Tensor) -> bool:
    return float((found - wanted).abs().max()) <= TOLERANCE * float(wanted.abs().max())


def answers(folder: Path, images: np.ndarray, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """In another process: load the artifact, and say what it answers and decides."""
    torch.set_num_threads(threads)
    dynamic = artifact.load(folder)
    with torch.no_grad(), dz.record_routing(dynamic) as routing:
        logits = dynamic(torch.from_numpy(images))
    return logits.numpy(), routing.choices.numpy()


def summary(_: Library, found: list[Row]) -> str:
    """How many hold, and how many take each kind of gate."""
    taken = {kind: sum("units" in row.cells[kind] for row in found) for kind in GATES}
    gated = " and ".join(f"{count} take {kind} gates" for kind, count in taken.items())
    good = sum(row.good for row in found)
    return f"{good} of {len(found)} networks keep all promises, or have nothing to gate; {gated}."


main = Table(Row, HEADER, check, summary).write


if __name__ == "__main__":
    typer.run(main)
