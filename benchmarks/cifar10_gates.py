"""The figures of a ResNet-56 run with gates: offsets from one half of the CIFAR-10 test images, judged on the other.

    dynamize run benchmarks/cifar10_skip.yaml --out runs/skip
    python benchmarks/cifar10_gates.py --artifact runs/skip --baseline runs/baselines/resnet56.safetensors \\
        --data cifar10 --out runs/figures/skip.md

The static baseline is the ResNet-56 of cifar10_baselines.py: fine-tuned on the same images for as many epochs. Times
are medians of interleaved rounds in one process; nothing else may run meanwhile.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from cifar10_images import CPU, JUDGING, SHAPE, halves

import dynamize as dz
from dynamize.calibration.collect import TableMaker
from dynamize.calibration.offsets import OffsetTables, best_point
from dynamize.calibration.operating import OperatingPoint
from dynamize.calibration.points import point_for_budget, point_for_drop
from dynamize.calibration.table import ConfidenceTable
from dynamize.conversion import wrap
from dynamize.data import Splits
from dynamize.errors import InfeasibleError
from dynamize.evaluation import Evaluator, Judgement, gather, representative
from dynamize.files import write_text
from dynamize.measure.controls import adaptivity
from dynamize.measure.latency import interleave
from dynamize.nn.executor import side_by_side
from dynamize.nn.network import DynamicNetwork
from dynamize.report import share_of_saving_shown

BATCHES = (1, 64)


@dataclass(frozen=True)
class Asked:
    """A largest drop in points, or a share of the MACs."""

    figure: Literal["drop", "MACs"]
    value: float

    def __str__(self) -> str:
        return f"{self.figure} {self.value:g}"

    def solve(self, table: ConfidenceTable) -> OperatingPoint:
        if self.figure == "drop":
            return point_for_drop(table, self.value)
        return point_for_budget(table, self.value * table.static_cost["macs"])


@dataclass
class Half:
    """What was asked for gives on one judging half."""

    point: OperatingPoint
    judged: Judgement
    drop: float
    macs_ratio: float


def main(
    artifact: Annotated[Path, typer.Option(help="folder that `dynamize run` wrote")],
    baseline: Annotated[Path, typer.Option(help="resnet56.safetensors of cifar10_baselines.py")],
    data: Annotated[Path, typer.Option(help="folder with train/ and test/")],
    out: Annotated[Path, typer.Option(help="Markdown file to write")],
    backends: Annotated[str, typer.Option(help="comma-separated")] = "onnxruntime,eager",
    seconds: Annotated[float, typer.Option(help="for each comparison of times")] = 10.0,
    drops: Annotated[str, typer.Option(help="points, comma-separated")] = "0,0.2,0.3,0.5,1",
    budgets: Annotated[str, typer.Option(help="shares of the MACs, comma-separated")] = "0.7",
    chosen: Annotated[float, typer.Option(help="points: the least of these drops to look at closer")] = 0.3,
) -> None:
    """Measure everything and print one Markdown report."""
    asked = [Asked("drop", float(drop)) for drop in drops.split(",") if drop]
    asked += [Asked("MACs", float(ratio)) for ratio in budgets.split(",") if ratio]
    network = dz.load(artifact)
    static = dz.source("dynamize:cifar_resnet56", checkpoint=baseline)
    folds = [halves(data, fold=fold, train_limit=JUDGING) for fold in (0, 1)]
    judged = [judge_fold(network, static, splits, asked) for splits in folds]
    lines = [
        "| asked | executed MACs | accuracy % | drop, points | promised MACs | promised drop |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_row(one, [found[one] for found in judged]) for one in asked]
    met = [one for one in asked if all(isinstance(found[one], Half) for found in judged)]
    nearest = next((one for one in met if one.figure == "MACs" or one.value >= chosen), None)
    if nearest is None:
        lines += ["", "Nothing asked is feasible on both halves: there is no point to look at closer."]
    else:
        points = [half for one in judged if isinstance(half := one[nearest], Half)]
        lines += _at_point(network, static, nearest, folds, points)
        lines += times(network, static, folds[-1], points[-1], backends.split(","), seconds)
    write_text(out, "\n".join(lines) + "\n")
    print("\n".join(lines))


def _row(asked: Asked, halves: list[Half | InfeasibleError]) -> str:
    refused = [half for half in halves if isinstance(half, InfeasibleError)]
    if refused:
        least = max(error.nearest for error in refused)
        return (
            f"| {asked} | infeasible on {len(refused)} of {len(halves)} halves: "
            f"at least {100 * least:.2f} points are expected | | | | |"
        )
    found = [half for half in halves if isinstance(half, Half)]
    return (
        f"| {asked} | {mean(h.macs_ratio for h in found):.3f} "
        f"| {100 * mean(h.judged.accuracy for h in found):.2f} | {100 * mean(h.drop for h in found):.2f} "
        f"| {mean(h.point.macs_ratio for h in found):.3f} | {100 * mean(h.point.accuracy_drop for h in found):.2f} |"
    )


def _at_point(
    network: DynamicNetwork, static: torch.nn.Module, asked: Asked, folds: list[Splits], halves: list[Half]
) -> list[str]:
    """Whether the network is input-adaptive at each half's point, and how its images are spread."""
    verdicts = []
    for splits, half in zip(folds, halves, strict=True):
        network.set_operating_point(half.point)
        verdicts.append(adaptivity(network, splits.test, CPU).verdict())
    names = network.decision_names[1]
    choices = [side_by_side(half.judged.taken, names, len(half.judged.labels)) for half in halves]
    rates = np.mean([(each > 0).double().mean(0).numpy() for each in choices], axis=0)
    units = ", ".join(f"{name} {100 * rate:.0f}" for name, rate in zip(names, rates, strict=True))
    routings = [len(each.unique(dim=0)) for each in choices]
    return [
        "",
        f"At {asked}, on the judging halves: {' And: '.join(verdicts)}.",
        "",
        f"Images (%) that take more than the cheapest path: {units}. Different routings: {routings}.",
        "",
    ]


def judge_fold(
    network: DynamicNetwork, static: torch.nn.Module, splits: Splits, asked: list[Asked]
) -> dict[Asked, Half | InfeasibleError]:
    """Solve for all that is asked on the calibration half and judge it on the other."""
    network.set_operating_point(None)
    tables = OffsetTables(TableMaker(network, splits.calibration, static, CPU, "onnxruntime"))
    evaluator = Evaluator(wrap(static, SHAPE), splits.test, CPU, ())
    found: dict[Asked, Half | InfeasibleError] = {}
    for one in asked:
        try:
            point = best_point(tables, one.solve, cheapest=one.figure == "drop")
        except InfeasibleError as error:
            found[one] = error
            continue
        network.set_operating_point(point)
        judged = evaluator.judge(network)
        lost = evaluator.reference.accuracy - judged.accuracy
        found[one] = Half(point, judged, lost, float(judged.macs.mean()) / evaluator.static_macs)
    return found


def times(
    network: DynamicNetwork, static: torch.nn.Module, splits: Splits, half: Half, backends: list[str], seconds: float
) -> list[str]:
    """The table of times at the chosen point, on the judging half's mix of images."""
    network.set_operating_point(half.point)
    images = gather(splits.test, representative(half.judged.macs, 256), CPU)
    lines = [
        "| backend | batch | ResNet-56, ms | dynamic, ms | speed-up | share of the MACs saving shown |",
        "|---|---|---|---|---|---|",
    ]
    busy = 0.0
    for backend in backends:
        contenders: dict[str, Any] = {
            "static": dz.compile_network(wrap(static, SHAPE), backend),
            "dynamic": dz.compile_network(network, backend),
        }
        for batch in BATCHES:
            inputs = [images[i : i + batch] for i in range(0, len(images) - batch + 1, batch)]
            found = interleave(contenders, inputs, CPU, seconds)
            speedup = found.speedup("static", "dynamic")
            shown = share_of_saving_shown(half.macs_ratio, speedup)
            lines.append(
                f"| {backend} | {batch} | {found.median_ms('static'):.2f} | {found.median_ms('dynamic'):.2f} "
                f"| {speedup:.2f} | {shown:.2f} |"
            )
            busy = max(busy, found.busy_elsewhere)
    return [*lines, "", f"Other processes used at most {busy:.2f} cores meanwhile."]


def mean(values: Any) -> float:
    return float(np.mean(list(values)))


if __name__ == "__main__":
    typer.run(main)
