"""Dynamic networks in bytes against static ones in bytes: the accuracy and speed of ResNet-56 with exits on CIFAR-10.

    dynamize run benchmarks/cifar10.yaml --out runs/cifar10
    python benchmarks/cifar10_int8.py --artifacts runs/cifar10 --given DIR --data cifar10 --out runs/figures/int8.md

DIR holds the resnet*-cifar10-jpeg.pt. Each artifact and each static network is quantised with ranges from one half of
the test images, on which the thresholds are solved too, and judged on the other half by the engine that runs it; then
the halves swap. Accuracies are means of both, times are of the second: medians of interleaved rounds in one process,
with a pause before each turn, since ONNX Runtime's threads spin on for a while after a call. Nothing else may run
meanwhile. All drops and speed-ups are against ResNet-56 as given, in float32 in ONNX Runtime.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from cifar10_images import CPU, JUDGING, SHAPE, halves
from torch import Tensor

import dynamize as dz
from dynamize.calibration.collect import TableMaker
from dynamize.calibration.operating import OperatingPoint
from dynamize.calibration.points import point_for_budget, point_for_drop
from dynamize.conversion import apply, wrap
from dynamize.data import Images, Splits
from dynamize.errors import InfeasibleError
from dynamize.evaluation import gather, representative
from dynamize.files import write_text
from dynamize.measure.costs import exit_costs
from dynamize.measure.latency import REST, Contender, Times, interleave
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting
from dynamize.runtime.compiled import CompiledNetwork
from dynamize.transform import Context

DEPTHS = (56, 32, 20)
BUDGETS = (0.6, 0.5, 0.4, 0.3, 0.25)
BATCHES = (1, 64)
JUDGED = 250  # images of a batch when accuracy is judged
TIMED = 256
FLOAT = "ResNet-56, float32, onnxruntime"


@dataclass(frozen=True)
class Candidate:
    """A network in bytes at one setting of its thresholds, as one fold found it."""

    label: str
    network: DynamicNetwork
    setting: Setting = field(default_factory=Setting)


@dataclass(frozen=True)
class Fold:
    """What one half gave: candidates by label, and the half to judge on."""

    candidates: dict[str, Candidate]
    test: Images


def main(
    artifacts: Annotated[str, typer.Option(help="comma-separated folders that `dynamize run` wrote, with exits")],
    given: Annotated[Path, typer.Option(help="folder with the resnet*-cifar10-jpeg.pt")],
    data: Annotated[Path, typer.Option(help="folder with train/ and test/")],
    out: Annotated[Path, typer.Option(help="Markdown file to write")],
    max_drop: Annotated[float, typer.Option(help="points that exits and bytes together may lose")] = 0.5,
    engines: Annotated[str, typer.Option(help="comma-separated backends")] = "onnxruntime,openvino,openvino-bf16",
    seconds: Annotated[float, typer.Option(help="for each comparison of times")] = 20.0,
) -> None:
    """Quantise, solve, judge and time everything, and print one Markdown table for each engine."""
    statics = {
        depth: dz.source(f"dynamize:cifar_resnet{depth}", checkpoint=given / f"resnet{depth}-cifar10-jpeg.pt")
        for depth in DEPTHS
    }
    folders = [Path(name) for name in artifacts.split(",")]
    folds = [make_fold(statics, folders, data, fold, max_drop) for fold in (0, 1)]
    static = wrap(statics[56], SHAPE)
    whole = sum(accuracy(dz.compile_network(static, "onnxruntime"), Setting(), fold.test)[0] for fold in folds) / len(
        folds
    )
    lines = [f"ResNet-56 as given, float32: {100 * whole:.2f} %.", ""]
    for engine in engines.split(","):
        lines += table(engine, static, whole, folds, seconds)
        write_text(out, "\n".join(lines) + "\n")
        print("\n".join(lines[-3 - len(folds[0].candidates) :]), flush=True)


def make_fold(statics: dict[int, torch.nn.Module], folders: list[Path], data: Path, fold: int, max_drop: float) -> Fold:
    """Quantise everything with one half and solve for the drop and the budgets on it."""
    splits = halves(data, fold=fold, train_limit=JUDGING)
    context = Context(data=splits, teacher=statics[56])
    found = []
    for depth, static in statics.items():
        quantised, _ = apply(wrap(static, SHAPE), dz.Quantize(max_drop=None), context)
        found.append(Candidate(f"ResNet-{depth}", quantised.eval()))
    for folder in folders:
        found += dynamic_candidates(folder, splits, context, max_drop)
    return Fold({one.label: one for one in found}, splits.test)


def dynamic_candidates(folder: Path, splits: Splits, context: Context, max_drop: float) -> list[Candidate]:
    """An artifact in bytes: at the drop, if it can be kept, and at each budget."""
    network, _ = apply(dz.load(folder), dz.Calibrate(macs_ratio=BUDGETS[1]), context)  # images reach all pieces
    quantised, notes = apply(network, dz.Quantize(max_drop=None), context)
    print(f"{folder.name}: {'; '.join(notes)}", flush=True)
    maker = TableMaker(quantised.eval(), splits.calibration, context.needs_teacher(dz.Quantize()), CPU, "onnxruntime")
    found = maker.table(0.0)
    points: dict[str, OperatingPoint] = {}
    try:
        points[f"drop {max_drop:g}"] = point_for_drop(found, max_drop)
    except InfeasibleError as error:
        print(f"{folder.name}: {error}", flush=True)
    points |= {f"{ratio:g}": point_for_budget(found, ratio * found.static_cost["macs"]) for ratio in BUDGETS}
    return [Candidate(f"{folder.name}, {name}", quantised, Setting(point.thresholds)) for name, point in points.items()]


def table(engine: str, static: DynamicNetwork, whole: float, folds: list[Fold], seconds: float) -> list[str]:
    """All candidates on one engine: accuracy, MACs and times."""
    compiled = [{id(c.network): dz.compile_network(c.network, engine) for c in f.candidates.values()} for f in folds]
    labels = [label for label in folds[0].candidates if all(label in fold.candidates for fold in folds)]
    last, ready = folds[-1], compiled[-1]
    contenders: dict[str, Contender] = {FLOAT: dz.compile_network(static, "onnxruntime")}
    for label in labels:
        one = last.candidates[label]
        contenders[label] = partial(ready[id(one.network)].run, setting=one.setting)
    images = gather(last.test, mixed(last), CPU)
    times = {batch: interleave(contenders, list(images.split(batch)), CPU, seconds, rest=REST) for batch in BATCHES}
    busy = max(one.busy_elsewhere for one in times.values())
    lines = [
        f"In bytes in {engine} (others used at most {busy:.2f} cores):",
        "",
        "| network | executed MACs | accuracy % | drop, points | "
        + " | ".join(f"b{batch}, ms | x float32 | x ResNet-56 in bytes" for batch in BATCHES)
        + " |",
        "|---|---|---|---|" + "---|" * 3 * len(BATCHES),
    ]
    base = float(exit_costs(static).cumulative()[-1])
    for label in labels:
        found = [
            accuracy(ready[id(fold.candidates[label].network)], fold.candidates[label].setting, fold.test)
            for fold, ready in zip(folds, compiled, strict=True)
        ]
        right, macs = (sum(values) / len(folds) for values in zip(*found, strict=True))
        cells = [cell for batch in BATCHES for cell in _cells(times[batch], label)]
        lines.append(
            f"| {label} | {macs / base:.3f} | {100 * right:.2f} | {100 * (whole - right):.2f} | {' | '.join(cells)} |"
        )
    return [*lines, ""]


def _cells(times: Times, label: str) -> list[str]:
    ratios = (times.speedup(against, label) for against in (FLOAT, "ResNet-56"))
    return [f"{times.median_ms(label):.3f}", *(f"{ratio:.2f}" for ratio in ratios)]


def accuracy(compiled: CompiledNetwork, setting: Setting, images: Images) -> tuple[float, float]:
    """Top-1 and mean executed MACs of a compiled network on a split, on its own engine."""
    right, macs, count = 0, 0.0, 0
    costs = exit_costs(compiled.network)
    for batch, labels in images.batches(JUDGED):
        routed = compiled.run(batch, setting)
        right += int((routed.logits.argmax(1) == labels).sum())
        macs += float(costs.executed(routed.taken, len(batch)).sum())
        count += len(labels)
    return right / count, macs / count


def mixed(fold: Fold) -> Tensor:
    """Images whose confidences at the first exit are spread as those of all, and so leave it in the right shares at
    any threshold."""
    network = list(fold.candidates.values())[-1].network
    scores = []
    with torch.no_grad():
        for batch, _ in fold.test.batches(JUDGED):
            _, _, score = network.run(batch, everyone=True).seen[0]
            scores.append(score)
    return representative(torch.cat(scores), TIMED)


if __name__ == "__main__":
    typer.run(main)
