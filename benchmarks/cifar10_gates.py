"""The figures of a ResNet-56 run with gates: offsets from one half of the CIFAR-10 test images, judged on the other.

    dynamize run benchmarks/cifar10_skip.yaml --out runs/skip
    python benchmarks/cifar10_gates.py --artifact runs/skip --baseline runs/baselines/resnet56.safetensors \\
        --data cifar10 --out runs/figures/skip.md

The static baseline is the ResNet-56 of cifar10_baselines.py: fine-tuned on the same images for as many epochs. Times
are medians of interleaved rounds in one process; nothing else may run meanwhile.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import dynamize as dz
from dynamize.calibration import OperatingPoint, point_for_drop
from dynamize.calibration.collect import TableMaker
from dynamize.calibration.gates import GateTables, best_point
from dynamize.conversion import wrap
from dynamize.data import DataSpec, Splits, load_data
from dynamize.evaluation import Evaluator, Judgement, gather, representative
from dynamize.files import write_text
from dynamize.measure.controls import adaptivity
from dynamize.measure.latency import interleave
from dynamize.nn.network import DynamicNetwork
from dynamize.report import share_of_saving_shown

CPU, SHAPE = torch.device("cpu"), (3, 32, 32)
MEAN_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DROPS = (0.0, 0.002, 0.003, 0.005, 0.01)
CHOSEN = 0.003
BATCHES = (1, 64)


@dataclass
class Half:
    """What one drop asked for gives on one judging half."""

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
) -> None:
    """Measure everything and print one Markdown report."""
    network = dz.load(artifact)
    static = dz.source("dynamize:cifar_resnet56", checkpoint=baseline)
    rows: dict[float, list[Half]] = {drop: [] for drop in DROPS}
    controls = []
    for fold in (0, 1):
        spec = DataSpec(
            source=f"imagefolder:{data}", calibration_from="test", fold=fold, normalize=MEAN_STD, train_limit=1000
        )
        splits = load_data(spec, SHAPE, 10)
        judge_fold(network, static, splits, rows)
        network.set_operating_point(rows[CHOSEN][-1].point)
        controls.append(adaptivity(network, splits.test, CPU))
    lines = [
        "| drop asked | executed MACs | accuracy % | drop, points | promised MACs | promised drop |",
        "|---|---|---|---|---|---|",
    ]
    for drop, halves in rows.items():
        lines.append(
            f"| {100 * drop:.1f} | {mean(h.macs_ratio for h in halves):.3f} "
            f"| {100 * mean(h.judged.accuracy for h in halves):.2f} | {100 * mean(h.drop for h in halves):.2f} "
            f"| {mean(h.point.macs_ratio for h in halves):.3f} "
            f"| {100 * mean(h.point.accuracy_drop for h in halves):.2f} |"
        )
    verdicts = " And: ".join(control.verdict() for control in controls)
    lines += ["", f"At drop {100 * CHOSEN:.1f}, on the judging halves: {verdicts}."]
    rates = np.mean([(half.judged.choices > 0).double().mean(0).numpy() for half in rows[CHOSEN]], axis=0)
    units = ", ".join(f"{unit.label} {100 * rate:.0f}" for unit, rate in zip(network.units, rates, strict=True))
    lines += ["", f"Images (%) that take more than the cheapest path: {units}.", ""]
    lines += times(network, static, splits, rows[CHOSEN][-1], backends.split(","), seconds)
    write_text(out, "\n".join(lines) + "\n")
    print("\n".join(lines))


def judge_fold(network: DynamicNetwork, static: torch.nn.Module, splits: Splits, rows: dict[float, list[Half]]) -> None:
    """Solve every drop on the calibration half and judge it on the other."""
    network.set_operating_point(None)
    tables = GateTables(TableMaker(network, splits.calibration, static, CPU, "onnxruntime"))
    evaluator = Evaluator(wrap(static, SHAPE), splits.test, CPU, ())
    for drop, halves in rows.items():
        point = best_point(tables, lambda table, drop=drop: point_for_drop(table, drop), cheapest=True)
        network.set_operating_point(point)
        judged = evaluator.judge(network)
        lost = evaluator.reference.accuracy - judged.accuracy
        halves.append(Half(point, judged, lost, float(judged.macs.mean()) / evaluator.static_macs))


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
