"""Cascades of given ResNets on CIFAR-10, without training: thresholds from one half of the test images, judged on the
other.

    python benchmarks/cifar10_cascade.py --data cifar10 --given DIR
    python benchmarks/cifar10_cascade.py --data cifar10 --given DIR --bytes --backend openvino --networks 20,32
    python benchmarks/cifar10_cascade.py --data cifar10 --given DIR --artifact runs/shrink --budgets 0.2,0.3

DIR holds the three resnet*-cifar10-jpeg.pt. ``--artifact`` judges what a recipe made of the ResNet-56 instead, such as
benchmarks/cifar10_shrink.yaml. Accuracies and MACs are means of both halves, executed. Times are medians of interleaved
rounds in one process with the static networks, for the setting solved on the first half and images that cost as the
other half does; nothing else may run meanwhile. With ``--bytes`` all networks are quantised first, and the ResNet-56 in
float32 on ONNX Runtime is timed beside them.
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
from dynamize.calibration.offsets import best_of_all, every_asking
from dynamize.calibration.operating import OperatingPoint
from dynamize.calibration.points import point_for_budget, point_for_drop
from dynamize.conversion import convert, wrap
from dynamize.data import Splits
from dynamize.errors import InfeasibleError
from dynamize.evaluation import Evaluator, gather, representative
from dynamize.files import write_text
from dynamize.graph.macs import annotated_macs
from dynamize.measure.latency import interleave
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting
from dynamize.transform import Context, Transform

DROPS = (0.0, 0.3)
BATCHES = (1, 8, 64)
DEPTHS = (20, 32, 56)
IMAGES = 96  # timed in each round, at least one batch


def main(
    data: Annotated[Path, typer.Option(help="folder with train/ and test/")],
    given: Annotated[Path, typer.Option(help="folder with the resnet*-cifar10-jpeg.pt")],
    out: Annotated[Path, typer.Option(help="where the results are written")] = Path("runs/figures"),
    backend: str = "onnxruntime",
    networks: Annotated[str, typer.Option(help="depths of the networks, the cheapest first")] = "20,32,56",
    in_bytes: Annotated[bool, typer.Option("--bytes", help="quantise all networks")] = False,
    artifact: Annotated[Path | None, typer.Option(help="judge this instead; it was made of the ResNet-56")] = None,
    budgets: Annotated[str, typer.Option(help="shares of the ResNet-56's MACs")] = "0.40,0.44,0.53",
    seconds: Annotated[float, typer.Option(help="for each comparison of times")] = 8.0,
) -> None:
    """Measure everything and print one Markdown report."""
    statics = {
        n: dz.source(f"dynamize:cifar_resnet{n}", checkpoint=given / f"resnet{n}-cifar10-jpeg.pt") for n in DEPTHS
    }
    depths = [int(depth) for depth in networks.split(",")]
    folds = [Fold(statics, depths, data, fold, backend, in_bytes, artifact) for fold in (0, 1)]
    shares = [float(budget) for budget in budgets.split(",")]
    rows = [row for budget in shares if (row := summary(folds, f"{budget:.2f} of the MACs", budget=budget))]
    rows += [row for drop in DROPS if (row := summary(folds, f"drop of {drop:g} points", drop=drop))]
    static = {f"ResNet-{n}": sum(fold.alone[n] for fold in folds) / 2 for n in DEPTHS}
    times = {batch: folds[0].speedups([row["points"][0] for row in rows], batch, seconds) for batch in BATCHES}
    for number, row in enumerate(rows):
        row["speedup"] = {batch: times[batch][str(number)] for batch in BATCHES}
    of_static = {name: {batch: times[batch][name] for batch in BATCHES} for name in times[BATCHES[0]] if name[0] == "R"}
    title = artifact.name if artifact else "Cascade of " + ", ".join(f"ResNet-{depth}" for depth in depths)
    text = render(title, rows, static, of_static, backend, in_bytes)
    kept = [{name: value for name, value in row.items() if name != "points"} for row in rows]
    kind = f"-{artifact.name}" if artifact else f"-{networks.replace(',', '-')}"
    name = f"cascade{kind}-{backend}{'-bytes' if in_bytes else ''}"
    write_text(out / f"{name}.json", json.dumps({"static": static, "speedup": of_static, "rows": kept}, indent=1))
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
        artifact: Path | None,
    ) -> None:
        self.splits: Splits = halves(data, fold=fold, train_limit=JUDGING)
        self.backend, self.in_bytes = backend, in_bytes
        context = Context(data=self.splits, teacher=statics[56], backend=backend, members=named(statics, depths[:-1]))
        more: list[Transform] = [dz.Quantize()] if in_bytes else []
        if artifact:
            made = dz.load(artifact)
            self.network = dz.apply(made, more[0], context)[0].eval() if more else made.eval()
        else:
            first = [{"name": f"resnet{depth}"} for depth in depths[:-1]]
            self.network = convert(statics[depths[-1]], [dz.Cascade(first=first), *more], SHAPE, context).eval()
        self.float56 = wrap(statics[56], SHAPE)
        self.statics = {n: convert(net, more, SHAPE, context).eval() for n, net in statics.items()}
        self.alone = {n: self.judge(net).accuracy for n, net in self.statics.items()}
        own = self.statics[56] if in_bytes else statics[56]
        self.every = every_asking(TableMaker(self.network, self.splits.calibration, own, CPU, backend))

    def judge(self, network: DynamicNetwork) -> Any:
        evaluator = Evaluator(wrap(self.statics[56], SHAPE), self.splits.test, CPU, [self.backend])
        return evaluator.judge(network)

    def point(self, budget: float | None = None, drop: float | None = None) -> OperatingPoint:
        """Solved on the calibration half."""
        if drop is not None:
            return best_of_all(self.every, lambda table: point_for_drop(table, drop), cheapest=True)[0]
        assert budget is not None
        return best_of_all(self.every, lambda table: point_for_budget(table, budget * self.static_macs), False)[0]

    def judged(self, point: OperatingPoint) -> tuple[float, float, torch.Tensor]:
        """Accuracy, MACs as a share of the ResNet-56's, and MACs of each image, on the judging half."""
        self.network.set_operating_point(point)
        found = self.judge(self.network)
        return found.accuracy, float(found.macs.mean()) / self.static_macs, found.macs

    @property
    def static_macs(self) -> float:
        return annotated_macs(self.float56.plain)

    def speedups(self, points: list[OperatingPoint], batch: int, seconds: float) -> dict[str, float]:
        """Over the static ResNet-56, of the cascade at each point by its number, and of all static networks."""
        compiled = dz.compile_network(self.network, self.backend, threads="shared")
        contenders: dict[str, Any] = {
            f"ResNet-{n}": dz.compile_network(net, self.backend, threads="shared") for n, net in self.statics.items()
        }
        if self.in_bytes:
            float56 = dz.compile_network(self.float56, "onnxruntime", threads="shared")
            contenders["ResNet-56 in float32, onnxruntime"] = float56
        found: dict[str, float] = {}
        for number, point in enumerate(points):
            _, _, macs = self.judged(point)
            chosen = representative(macs, max(IMAGES, batch))
            images = gather(self.splits.test, chosen, CPU)
            inputs = [images[i : i + batch] for i in range(0, len(images) - batch + 1, batch)]
            setting = Setting(point.thresholds, combine=point.combine)
            times = interleave({**contenders, "ours": partial(compiled.run, setting=setting)}, inputs, CPU, seconds)
            found |= {name: times.speedup("ResNet-56", name) for name in contenders}
            found[str(number)] = times.speedup("ResNet-56", "ours")
        return found


def named(statics: dict[int, torch.nn.Module], depths: list[int]) -> dict[str, torch.nn.Module]:
    return {f"resnet{depth}": statics[depth] for depth in depths}


def summary(folds: list[Fold], asked: str, **limit: float) -> dict[str, Any] | None:
    """One limit on both halves; None if it cannot be met."""
    try:
        points = [fold.point(**limit) for fold in folds]
    except InfeasibleError as error:
        print(f"{asked}: {error}")
        return None
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
    title: str,
    rows: list[dict[str, Any]],
    static: dict[str, float],
    of_static: dict[str, dict[int, float]],
    backend: str,
    in_bytes: bool,
) -> str:
    """As Markdown."""
    batches = " | ".join(f"batch {batch}" for batch in BATCHES)
    lines = [
        f"{title}{', in bytes' if in_bytes else ''}, {backend}",
        "",
        f"| network | MACs | accuracy | joined by | {batches} |",
        "|---|---|---|---" + len(BATCHES) * "|---" + "|",
    ]
    for row in rows:
        times = " | ".join(f"{row['speedup'][batch]:.2f} x" for batch in BATCHES)
        joined = "/".join(dict.fromkeys(row["combine"]))
        lines.append(
            f"| {row['asked']} | {row['macs_ratio']:.3f} | {100 * row['accuracy']:.2f} % | {joined} | {times} |"
        )
    for name, found in of_static.items():
        times = " | ".join(f"{found[batch]:.2f} x" for batch in BATCHES)
        accuracy = f"{100 * static[name]:.2f} %" if name in static else ""
        lines.append(f"| static {name} | | {accuracy} | | {times} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
