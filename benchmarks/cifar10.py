"""The figures of the ResNet-56 run: thresholds from one half of the CIFAR-10 test images, judged on the other.

    dynamize run benchmarks/cifar10.yaml --out runs/cifar10
    python benchmarks/cifar10_baselines.py --data cifar10 --checkpoints . --out runs/baselines --epochs 10
    python benchmarks/cifar10.py --artifact runs/cifar10 --baselines runs/baselines --data cifar10 \\
        --given DIR

The static baseline is the ResNet-56 of cifar10_baselines.py: fine-tuned on the same images for as many epochs as the
dynamic network; so are its smaller rivals. DIR holds the checkpoints that all of them began from, which are judged
too. Times are medians of interleaved rounds in one process; nothing else may run meanwhile.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from cifar10_images import CPU, JUDGING, SHAPE, halves

import dynamize as dz
from dynamize.calibration.collect import TableMaker
from dynamize.calibration.operating import OperatingPoint
from dynamize.calibration.points import point_for_budget, point_for_drop
from dynamize.calibration.table import ConfidenceTable
from dynamize.conversion import wrap
from dynamize.data import Splits
from dynamize.evaluation import gather, representative
from dynamize.files import write_text
from dynamize.measure.accuracy import top_answers
from dynamize.measure.latency import interleave
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting
from dynamize.report import share_of_saving_shown
from dynamize.runtime.compiled import CompiledNetwork

BUDGETS = (0.25, 0.30, 0.35, 0.40, 0.45, 0.50, 0.55, 0.60, 0.70, 0.80)
DROPS = (0.002, 0.003)
BATCHES = (1, 8, 64)
DEPTHS = (56, 32, 20)
STEPS = 8  # bisections
STATIC = "ResNet-56"


@dataclass
class Fold:
    """One half calibrates, the other judges: tables of both, and the answers of the static networks on the latter."""

    calibration: ConfidenceTable
    test: ConfidenceTable
    splits: Splits
    rivals: dict[str, float]  # accuracy of each static network on the judging half

    @property
    def static_accuracy(self) -> float:
        return self.test.reference_accuracy

    def achieved(self, point: OperatingPoint) -> dict[str, Any]:
        """What a point does on the half it was not calibrated on, beside what was promised."""
        found = self.test.evaluate(list(point.thresholds.values()))
        return {
            "accuracy": found.accuracy,
            "drop": self.static_accuracy - found.accuracy,
            "macs_ratio": found.cost / self.test.static_cost["macs"],
            "exits": found.shares.tolist(),
            "macs_inside": point.macs_ci[0] <= found.cost <= point.macs_ci[1],
            "drop_inside": point.accuracy_drop_ci[0]
            <= self.static_accuracy - found.accuracy
            <= point.accuracy_drop_ci[1],
        }


def main(
    artifact: Annotated[Path, typer.Option(help="folder that `dynamize run` wrote")],
    baselines: Annotated[Path, typer.Option(help="folder that cifar10_baselines.py wrote")],
    data: Annotated[Path, typer.Option(help="folder with train/ and test/")],
    given: Annotated[Path, typer.Option(help="folder with the resnet*-cifar10-jpeg.pt that all began from")],
    out: Annotated[Path, typer.Option(help="where cifar10.md and cifar10.json are written")] = Path("runs/figures"),
    backend: str = "onnxruntime",
    seconds: Annotated[float, typer.Option(help="for each comparison of times")] = 20.0,
) -> None:
    """Measure everything and print one Markdown report."""
    network = dz.load(artifact)
    statics = {}
    for depth in DEPTHS:
        name = f"dynamize:cifar_resnet{depth}"
        statics[f"ResNet-{depth} as given"] = dz.source(name, checkpoint=given / f"resnet{depth}-cifar10-jpeg.pt")
        statics[f"ResNet-{depth}"] = dz.source(name, checkpoint=baselines / f"resnet{depth}.safetensors")
    # the network keeps the temperatures of the last fold, with whose thresholds it is timed
    folds = [make_fold(network, statics, data, fold, backend) for fold in (0, 1)]
    curve = [summarise(folds, budget=budget) for budget in BUDGETS] + [summarise(folds, drop=drop) for drop in DROPS]
    kept = [row for row in curve if row["drop"] <= 0.003]
    chosen = min(kept, key=lambda row: row["macs_ratio"]) if kept else curve[-1]
    figures = {
        "static_accuracy": mean(fold.static_accuracy for fold in folds),
        "static": {name: mean(fold.rivals[name] for fold in folds) for name in folds[0].rivals},
        "exits": np.mean([fold.test.correct.mean(axis=1) for fold in folds], axis=0).tolist(),
        "exit_macs": (folds[0].test.costs["macs"] / folds[0].test.static_cost["macs"]).tolist(),
        "curve": curve,
        "chosen": chosen,
        "latency": [latency(network, statics, folds, chosen, batch, backend, seconds) for batch in BATCHES],
    }
    text = render(figures, backend)
    write_text(out / "cifar10.json", json.dumps(figures, indent=1))
    write_text(out / "cifar10.md", text)
    print(text)


def make_fold(
    network: DynamicNetwork, statics: dict[str, torch.nn.Module], data: Path, fold: int, backend: str
) -> Fold:
    splits = halves(data, fold=fold, train_limit=JUDGING)
    tables = TableMaker(network, splits.calibration, statics[STATIC], CPU, backend)
    rivals = {}
    for name, static in statics.items():
        found, labels = top_answers(static, splits.test, CPU)
        rivals[name] = float((found == labels).double().mean())
    return Fold(tables.table(0.0), tables.table(0.0, splits.test), splits, rivals)


def summarise(folds: list[Fold], budget: float | None = None, drop: float | None = None) -> dict[str, Any]:
    """One setting on both folds: points solved on each calibration half, means over the judging halves."""
    points, rows = [], []
    for fold in folds:
        if budget is not None:
            point = point_for_budget(fold.calibration, budget * fold.calibration.static_cost["macs"])
        else:
            assert drop is not None
            point = point_for_drop(fold.calibration, 100 * drop)
        points.append(point)
        rows.append(fold.achieved(point))
    return {
        "asked": f"{budget:.2f} of the MACs" if budget is not None else f"drop {100 * (drop or 0):.1f}",
        "macs_ratio": mean(row["macs_ratio"] for row in rows),
        "accuracy": mean(row["accuracy"] for row in rows),
        "drop": mean(row["drop"] for row in rows),
        "promised_macs": mean(point.macs_ratio for point in points),
        "promised_drop": mean(point.accuracy_drop for point in points),
        "exits": np.mean([row["exits"] for row in rows], axis=0).tolist(),
        "macs_inside": [row["macs_inside"] for row in rows],
        "drop_inside": [row["drop_inside"] for row in rows],
        "thresholds": points[-1].thresholds,
    }


def latency(
    network: DynamicNetwork,
    statics: dict[str, torch.nn.Module],
    folds: list[Fold],
    chosen: dict[str, Any],
    batch: int,
    backend: str,
    seconds: float,
) -> dict[str, Any]:
    """All static networks against the dynamic one at the chosen point and at the speed of each smaller rival."""
    # further fine-tuning does not change the time, so each depth is timed once
    contenders = {
        f"ResNet-{depth}": dz.compile_network(wrap(statics[f"ResNet-{depth} as given"], SHAPE), backend)
        for depth in DEPTHS
    }
    inputs = mixed(folds[-1], chosen["thresholds"], batch)
    compiled = dz.compile_network(network, backend)
    dynamic = partial(compiled.run, setting=Setting(chosen["thresholds"]))
    times = interleave({**contenders, "chosen": dynamic}, inputs, CPU, seconds)
    found: dict[str, Any] = {"batch": batch, "busy_elsewhere": times.busy_elsewhere}
    for name in times.seconds:
        found[name] = {
            "ms": times.median_ms(name),
            "p95_ms": times.p95_ms(name),
            "speedup": times.speedup(STATIC, name),
        }
    found["share_shown"] = share_of_saving_shown(chosen["macs_ratio"], found["chosen"]["speedup"])
    found["at_speed_of"] = {
        name: at_speed(compiled, contenders, folds, name, batch, seconds) for name in contenders if name != STATIC
    }
    return found


def at_speed(
    compiled: CompiledNetwork,
    contenders: dict[str, Any],
    folds: list[Fold],
    rival: str,
    batch: int,
    seconds: float,
) -> dict[str, Any]:
    """The dearest budget, by bisection, at which the dynamic network is no slower than a static rival on its own mix of
    images; accuracies are means over both folds."""
    best: dict[str, Any] = {}
    low, high = 0.15, 1.0
    for _ in range(STEPS):
        ratio = (low + high) / 2
        points = [point_for_budget(fold.calibration, ratio * fold.calibration.static_cost["macs"]) for fold in folds]
        inputs = mixed(folds[-1], points[-1].thresholds, batch)
        dynamic = partial(compiled.run, setting=Setting(points[-1].thresholds))
        times = interleave({"rival": contenders[rival], "dynamic": dynamic}, inputs, CPU, seconds / 4)
        if times.speedup("rival", "dynamic") < 1:
            high = ratio
            continue
        low = ratio
        best = {
            "asked": ratio,
            "accuracy": mean(fold.achieved(point)["accuracy"] for fold, point in zip(folds, points, strict=True)),
            "tuned": mean(fold.rivals[rival] for fold in folds),
            "given": mean(fold.rivals[f"{rival} as given"] for fold in folds),
        }
    return best


def mixed(fold: Fold, thresholds: Mapping[str, float | None], batch: int) -> list[torch.Tensor]:
    """Batches of the judging half's images that leave at the exits in the shares of all its images."""
    exits = torch.from_numpy(fold.test.route(list(thresholds.values())))
    images = gather(fold.splits.test, representative(exits, 256), CPU)
    return [images[i : i + batch] for i in range(0, len(images) - batch + 1, batch)]


def render(figures: dict[str, Any], backend: str) -> str:
    curve = figures["curve"]
    lines = [
        "| asked | executed MACs | accuracy % | drop, points | promised MACs | promised drop | exits % |",
        "|---|---|---|---|---|---|---|",
        f"| static ResNet-56 | 1.000 | {100 * figures['static_accuracy']:.2f} | 0.00 | | | |",
    ]
    for row in curve:
        exits = "/".join(f"{100 * share:.0f}" for share in row["exits"])
        lines.append(
            f"| {row['asked']} | {row['macs_ratio']:.3f} | {100 * row['accuracy']:.2f} | {100 * row['drop']:.2f} "
            f"| {row['promised_macs']:.3f} | {100 * row['promised_drop']:.2f} | {exits} |"
        )
    inside = {key: sum(sum(row[key]) for row in curve[: len(BUDGETS)]) for key in ("macs_inside", "drop_inside")}
    total = 2 * len(BUDGETS)
    exits = ", ".join(
        f"{100 * a:.2f} % at {c:.3f}" for a, c in zip(figures["exits"], figures["exit_macs"], strict=True)
    )
    lines += [
        "",
        f"Each exit for all images (accuracy at MACs): {exits}.",
        f"Achieved inside the promised 95 % interval: MACs {inside['macs_inside']} of {total}, "
        f"drop {inside['drop_inside']} of {total}.",
        "Static networks: "
        + ", ".join(f"{name} {100 * value:.2f} %" for name, value in figures["static"].items())
        + ".",
        "",
        f"Times in {backend}, ms per batch (95th percentile), at the point '{figures['chosen']['asked']}':",
        "",
        "| batch | ResNet-56 | dynamic | speed-up | share of the MACs saving shown | at the speed of a smaller one |",
        "|---|---|---|---|---|---|",
    ]
    for row in figures["latency"]:
        static, chosen = row[STATIC], row["chosen"]
        rivals = "; ".join(
            f"{name}: {100 * found['accuracy']:.2f} % against {100 * found['tuned']:.2f} %"
            f" (as given {100 * found['given']:.2f} %)"
            if found
            else f"{name}: never as fast"
            for name, found in row["at_speed_of"].items()
        )
        lines.append(
            f"| {row['batch']} | {static['ms']:.2f} ({static['p95_ms']:.2f}) "
            f"| {chosen['ms']:.2f} ({chosen['p95_ms']:.2f}) | {chosen['speedup']:.2f} | {row['share_shown']:.2f} "
            f"| {rivals} |"
        )
    busy = max(row["busy_elsewhere"] for row in figures["latency"])
    lines += ["", f"Other processes used at most {busy:.2f} cores meanwhile."]
    return "\n".join(lines) + "\n"


def mean(values: Any) -> float:
    return float(np.mean(list(values)))


if __name__ == "__main__":
    typer.run(main)
