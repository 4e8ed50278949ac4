"""Which networks are pruned and turned into bytes: on every CNN of torchvision, or one of each timm family.

    python benchmarks/coverage_compression.py --library torchvision --out coverage-compression-torchvision.md
    python benchmarks/coverage_compression.py --library timm --out coverage-compression-timm.md

Each network is built with random weights and the batch-norm statistics of a few small images. `prune` takes channels
out until 0.7 of the multiply-accumulates are left, without training (the step itself compares what is left with the
whole network that does not read those channels); then the narrower network executes what it says it costs. `quantize`
turns all layers that it can into bytes, with ranges from random images, and none falls back to float, since the answers
of random networks hang on a hair; what part of the top answers stays is said. Saved, and loaded in another process,
both answer bit by bit as before. What is refused in words is in the last column.
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

import dynamize as dz
from dynamize import artifact
from dynamize.compression.rounding import layer_names, prepare
from dynamize.conversion import apply, wrap
from dynamize.graph.macs import count_macs
from dynamize.measure.costs import exit_costs
from dynamize.transform import Context, Transform

IMAGES, SIDE, LEFT = 16, 64, 0.7
STEPS: dict[str, Transform] = {
    "prune": dz.Prune(macs_ratio=LEFT, statistics_images=0),
    "quantize": dz.Quantize(max_drop=None, images=IMAGES, ranges="minmax"),
}


@dataclass
class Row:
    """One line: what each step came to, whether its result holds together, and why not."""

    network: str
    cells: dict[str, str] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return not self.wrong

    def markdown(self) -> str:
        why = "; ".join(self.wrong + self.refused).replace("|", "\\|").replace("\n", " ")
        return f"| {self.network} | {' | '.join(self.cells.values())} | {self.seconds:.0f} | {why} |"


HEADER = (
    "| network | MACs left by prune | in bytes by quantize, top answers that stay | s | why not |\n"
    "|---|---|---|---|---|"
)


def check(library: Library, name: str, folder: Path, other: ProcessPoolExecutor) -> Row:
    """Both steps on one network; what fails is in the row."""
    row, started = Row(name), time.monotonic()
    for kind, step in STEPS.items():
        try:
            with torch.no_grad():
                row.cells[kind] = _check(row, f"{library}:{name}", step, folder, other)
        except dz.DynamizeError as error:
            row.cells[kind] = "refused"
            row.refused.append(f"{kind}: {error}")
        except Exception as error:  # whatever a network does, the table says it and goes on
            row.cells[kind] = "WRONG"
            row.wrong.append(f"{kind}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    row.seconds = time.monotonic() - started
    return row


def _check(row: Row, source: str, step: Transform, folder: Path, other: ProcessPoolExecutor) -> str:
    torch.manual_seed(0)
    network = dz.source(source)
    side = SIDES.get(row.network, SIDE)
    images = torch.randn(IMAGES, 3, side, side) * torch.linspace(0.5, 2, IMAGES)[:, None, None, None]
    settle(network, images)
    plain = wrap(network, (3, side, side))
    before, wanted = float(exit_costs(plain).cumulative()[-1]), plain(images)
    layers = layer_names(prepare(plain)) if step.pass_name == "quantize" else []
    data = dz.splits(calibration=(images, wanted.argmax(1)), test=(images[:1].clone(), wanted[:1].argmax(1)))
    dynamic, _ = apply(plain, step, Context(data=data, backend="onnxruntime"))
    found = dynamic(images[:4])
    share = float(exit_costs(dynamic).cumulative()[-1]) / before
    if step.pass_name == "prune":
        cell = f"{share:.2f}"
        executed = count_macs(dynamic, images[:1]) / before
        if share > LEFT or abs(executed - share) > 1e-6:
            row.wrong.append(f"prune: it says {share:.3f} of the MACs and executes {executed:.3f}")
    else:
        floats = dynamic.history[0]["float_layers"]
        stay = float((dynamic(images).argmax(1) == wanted.argmax(1)).float().mean())
        cell = f"{len(layers) - len(floats)} of {len(layers)}, {100 * stay:.0f} %"
    if not bool(torch.isfinite(found).all()):
        row.wrong.append(f"{step.pass_name}: answers are not finite")
    artifact.save(dynamic, folder)
    del dynamic, plain, network
    gc.collect()
    again = other.submit(answers, folder, images[:4].numpy(), torch.get_num_threads()).result()
    if not np.array_equal(again, found.numpy()):
        row.wrong.append(f"{step.pass_name}: loaded elsewhere it differs by {np.abs(again - found.numpy()).max():.1e}")
    return cell


def answers(folder: Path, images: np.ndarray, threads: int) -> np.ndarray:
    """In another process: load the artifact, and say what it answers."""
    torch.set_num_threads(threads)
    dynamic = artifact.load(folder)
    with torch.no_grad():
        return dynamic(Tensor(images)).numpy()


def summary(_: Library, found: list[Row]) -> str:
    """How many take each step, and how many are right."""
    taken = {kind: sum(row.cells[kind] not in ("refused", "WRONG") for row in found) for kind in STEPS}
    each = " and ".join(f"{count} are taken by {kind}" for kind, count in taken.items())
    right = sum(row.good for row in found)
    return f"Of {len(found)} networks {each}; in {right} all that was made holds together."


main = Table(Row, HEADER, check, summary).write


if __name__ == "__main__":
    typer.run(main)
