"""Cascades of given ResNets on CIFAR-10, without training: thresholds from one half of the test images, judged on the
other.

    python benchmarks/cifar10_cascade.py --data cifar10 --given DIR

DIR holds the three resnet*-cifar10-jpeg.pt. Accuracies and MACs are means of both halves. Times are medians of
interleaved rounds in one process with the static networks, for the setting solved on the first half and images that
cost as the other half does; nothing else may run meanwhile. With ``--bytes`` all networks are quantised first.
"""

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from cifar10_images import CPU, JUDGING, SHAPE, halves

import dynamize as dz
from dynamize.calibration.collect import TableMaker
from dynamize.calibration.offsets import OffsetTables, best_of_all, every_asking
from dynamize.calibration.operating import OperatingPoint
from dynamize.calibration.points import point_for_budget, point_for_drop
from dynamize.conversion import convert, wrap
from dynamize.data import Splits
from dynamize.errors import InfeasibleError
from dynamize.evaluation import Evaluator, gather, representative
from dynamize.files import write_text
from dynamize.measure.latency import interleave
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting
from dynamize.transform import Context, Transform

BUDGETS = (0.36, 0.40, 0.44, 0.48, 0.53, 0.60, 0.67)
DROPS = (0.0,)
BATCHES = (1, 8, 64)
DEPTHS = (20, 32, 56)
IMAGES = 96  # timed in each round, at least one batch


def main(
    data: Annotated[Path, typer.Option(help="folder with train/ and test/")],
    given: Annotated[Path, typer.Option(help="folder with the resnet*-cifar10-jpeg.pt")],
    out: Annotated[Path, typer.Option(help="where the results are written")] = Path("runs/figures"),
    backend: str = "onnxruntime",
    first: Annotated[str, typer.Option(help="depths in front of the ResNet-56")] = "20,32",
    in_bytes: Annotated[bool, typer.Option("--bytes", help="quantise all networks")] = False,
    seconds: Annotated[float, typer.Option(help="for each comparison of times")] = 20.0,
) -> None:
    """Measure everything and print one Markdown report."""
    statics = {
        n: dz.source(f"dynamize:cifar_resnet{n}", checkpoint=given / f"resnet{n}-cifar10-jpeg.pt") for n in DEPTHS
    }
    depths = [int(depth) for depth in first.split(",")]
    folds = [Fold(statics, depths, data, fold, backend, in_bytes) for fold in (0, 1)]
    rows = [summary(folds, f"{budget:.2f} of the MACs", budget=budget) for budget in BUDGETS]
    rows += [summary(folds, f"drop of {drop:g}", drop=drop) for drop in DROPS]
    static = {f"ResNet-{n}": sum(fold.alone[n] for fold in folds) / 2 for n in DEPTHS}
    for row in rows:
        row["speedup"] = {batch: folds[0].speedups(row["points"][0], batch, seconds) for batch in BATCHES}
    text = render(rows, static, backend, in_bytes, depths)
    kept = [{name: value for name, value in row.items() if name != "points"} for row in rows]
    name = f"cascade-{backend}{'-bytes' if in_bytes else ''}"
    write_text(out / f"{name}.json", json.dumps({"static": static, "rows": kept}, indent=1))
    write_text(out / f"{name}.md", text)
    print(text)


class Fold:
    """A cascade whose settings are solved on one half and judged on the other."""

    def __init__(
        self,
        statics: dict[int, torch.nn.Module],
        depths: list[int],
        data: Path,
        fold: int,
        backend: str,
        in_bytes: bool,
    ) -> None:
        self.splits: Splits = halves(data, fold=fold, train_limit=JUDGING)
        self.backend = backend
        context = Context(data=self.splits, teacher=statics[56], backend=backend, members=named(statics, depths))
        more: list[Transform] = [dz.Quantize()] if in_bytes else []
        first = [{"name": f"resnet{depth}"} for depth in depths]
        self.network = convert(statics[56], [dz.Cascade(first=first), *more], SHAPE, context).eval()
        self.statics = {n: convert(net, more, SHAPE, context).eval() for n, net in statics.items()}
        self.alone = {n: self.judge(net).accuracy for n, net in self.statics.items()}
        self.every = every_asking(TableMaker(self.network, self.splits.calibration, self.statics[56], CPU, backend))

    def judge(self, network: DynamicNetwork) -> Any:
        evaluator = Evaluator(wrap(self.statics[56], SHAPE), self.splits.test, CPU, [self.backend])
        return evaluator.judge(network)

    def point(self, budget: float | None = None, drop: float | None = None) -> OperatingPoint:
        """Solved on the calibration half."""
        if drop is not None:
            return best_of_all(self.every, lambda table: point_for_drop(table, drop), cheapest=True)[0]
        assert budget is not None
        return best_of_all(
            self.every, lambda table: point_for_budget(table, budget * table.static_cost["macs"]), False
        )[0]

    def judged(self, point: OperatingPoint) -> tuple[float, float, torch.Tensor]:
        """Accuracy, MACs as a share of the ResNet-56's, and MACs of each image, on the judging half."""
        self.network.set_operating_point(point)
        found = self.judge(self.network)
        return found.accuracy, float(found.macs.mean()) / self.static_macs, found.macs

    @property
    def static_macs(self) -> float:
        tables: OffsetTables = self.every[0]
        return tables.at(0.0).static_cost["macs"]

    def speedups(self, point: OperatingPoint, batch: int, seconds: float) -> dict[str, float]:
        """Over the static ResNet-56, of the cascade and of all static networks."""
        _, _, macs = self.judged(point)
        chosen = representative(macs, max(IMAGES, batch))
        images = gather(self.splits.test, chosen, CPU)
        inputs = [images[i : i + batch] for i in range(0, len(images) - batch + 1, batch)]
        compiled = dz.compile_network(self.network, self.backend, threads="shared")
        contenders: dict[str, Any] = {
            f"ResNet-{n}": dz.compile_network(net, self.backend, threads="shared") for n, net in self.statics.items()
        }
        setting = Setting(point.thresholds, combine=point.combine)
        contenders["cascade"] = partial(compiled.run, setting=setting)
        times = interleave(contenders, inputs, CPU, seconds)
        return {name: times.speedup("ResNet-56", name) for name in contenders}


def named(statics: dict[int, torch.nn.Module], depths: list[int]) -> dict[str, torch.nn.Module]:
    return {f"resnet{depth}": statics[depth] for depth in depths}


def summary(folds: list[Fold], asked: str, **limit: float) -> dict[str, Any]:
    """One limit on both halves; what cannot be met is left out of neither."""
    points = []
    for fold in folds:
        try:
            points.append(fold.point(**limit))
        except InfeasibleError as error:
            raise SystemExit(f"{asked}: {error}") from error
    found = [fold.judged(point) for fold, point in zip(folds, points, strict=True)]
    return {
        "asked": asked,
        "points": points,
        "accuracy": sum(accuracy for accuracy, _, _ in found) / len(found),
        "macs_ratio": sum(ratio for _, ratio, _ in found) / len(found),
        "combine": [point.combine for point in points],
        "thresholds": [point.thresholds for point in points],
    }


def render(
    rows: list[dict[str, Any]], static: dict[str, float], backend: str, in_bytes: bool, depths: list[int]
) -> str:
    """As Markdown."""
    kind = ", in bytes" if in_bytes else ""
    lines = [
        f"Cascade of ResNet-{', -'.join(map(str, [*depths, 56]))}{kind}, {backend}; "
        + ", ".join(f"{name} {100 * one:.2f} %" for name, one in static.items()),
        "",
        "| asked | MACs | accuracy | joined by | b1 | b8 | b64 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = " | ".join(f"{row['speedup'][batch]['cascade']:.2f} x" for batch in BATCHES)
        joined = "/".join(dict.fromkeys(row["combine"]))
        lines.append(
            f"| {row['asked']} | {row['macs_ratio']:.3f} | {100 * row['accuracy']:.2f} % | {joined} | {times} |"
        )
    last = rows[-1]["speedup"]
    for name in static:
        times = " | ".join(f"{last[batch][name]:.2f} x" for batch in BATCHES)
        lines.append(f"| static {name} | | {100 * static[name]:.2f} % | | {times} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
