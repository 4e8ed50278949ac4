"""Glance and focus on cluttered canvases, trained, against the static network, a lower resolution and cascades.

    python benchmarks/canvas.py --data cifar10 --static runs/canvas_static --cache canvas.npz \
        runs/canvas_activation runs/canvas_learned runs/canvas_centre runs/canvas_random
    python benchmarks/canvas.py ... --times              # the same settings, timed; nothing else may run meanwhile

The folders are those that benchmarks/canvas_static.yaml and canvas_looks.yaml make; the static network stands behind
all looks. Each network is run once for all test images, in ONNX Runtime, and its logits are kept in ``--cache``; the
rest is arithmetic on them. Half of the test images gives thresholds, temperatures and how answers are joined, and the
others judge; then the other way round.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from cifar10_images import CPU, MEAN_STD
from torch import Tensor

import dynamize as dz
from dynamize.calibration.intervals import wilson
from dynamize.calibration.predictions import Plan
from dynamize.data import DataSpec, Splits, load_data
from dynamize.errors import InfeasibleError
from dynamize.evaluation import gather, representative
from dynamize.graph.macs import annotated_macs
from dynamize.measure.latency import interleave
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import MAIN, Setting
from dynamize.training.statistics import estimate_statistics

SIDE, CHANNELS, CLASSES = 96, 3, 10
RIVAL = 64  # pixels of the static network at a lower resolution, with batch norms estimated anew
BUDGET = 0.4  # of the static network's MACs
TRAIN = 2000  # images that statistics are estimated from
BATCHES, IMAGES = (1, 64), 192

Numbers = Mapping[str, Any]


def main(
    looks: Annotated[list[Path], typer.Argument(help="folders of runs of canvas_looks.yaml, named after the policy")],
    data: Annotated[Path, typer.Option(help="folder with train/ and test/ of CIFAR-10")],
    static: Annotated[Path, typer.Option(help="folder of the run of canvas_static.yaml")],
    cache: Annotated[Path, typer.Option(help="file for the logits; what is there is not made again")],
    times: Annotated[bool, typer.Option("--times", help="time the settings instead")] = False,
    seconds: Annotated[float, typer.Option(help="of timing, for each batch size")] = 30.0,
) -> None:
    """Print one Markdown table."""
    images = canvases(data)
    rows = all_rows(static, looks, images)
    kept = dict(np.load(cache)) if cache.exists() else {}
    missing = {title: network for title, network in rows.items() if f"{title}/{network.members[0]}" not in kept}
    if missing:
        kept |= answered(missing, images, MAIN not in kept)
        np.savez(cache, **kept)
    judged = {title: Row(title, network, kept) for title, network in rows.items()}
    print("\n".join(timed(judged, images, seconds) if times else told(judged, kept)))


def canvases(data: Path) -> Splits:
    spec = DataSpec.model_validate(
        {
            "source": f"canvas:imagefolder:{data},size={SIDE},object=24-40",
            "calibration_from": "test",
            "normalize": MEAN_STD,
            "train_limit": TRAIN,
        }
    )
    return load_data(spec, (CHANNELS, SIDE, SIDE), CLASSES)


def all_rows(static: Path, looks: list[Path], images: Splits) -> dict[str, DynamicNetwork]:
    """What is compared, by title; all end in the static network."""
    whole = dz.load(static).eval()
    cascade = dz.convert(whole.plain, [dz.Cascade(first=[{"resolution": RIVAL}])], (CHANNELS, SIDE, SIDE)).eval()
    small = cascade.take(cascade.members)
    estimate_statistics(small, images.train, CPU, count=TRAIN, seed=0)
    cascade.put(cascade.members, small.eval())
    found = {f"cascade {RIVAL}, {SIDE} pixels": cascade}
    for folder in looks:
        network = dz.load(folder).eval()
        network.graphs[""].load_state_dict(whole.plain.state_dict())
        found[folder.name.removeprefix("canvas_")] = network
    return found


def answered(rows: Mapping[str, DynamicNetwork], images: Splits, whole: bool) -> dict[str, Any]:
    """What each network answers alone for all images, where each looks, and labels; and the static one, if wanted."""
    every = [images.calibration, images.test]
    found: dict[str, Any] = {
        "labels": np.concatenate([part.labels.numpy() for part in every]),
        "boxes": np.concatenate([part.boxes.numpy() for part in every]),
    }
    for title, network in rows.items():
        compiled = dz.compile_network(network, "onnxruntime")
        for member in [*network.members, *([MAIN] if whole and MAIN not in found else [])]:
            before = network.members[: network.members.index(member)] if member != MAIN else []
            setting = Setting({**dict.fromkeys(before, float("inf")), member: float("-inf")} if member != MAIN else {})
            runs = [compiled.run(batch, setting) for part in every for batch, _ in part.batches(200)]
            name = member if member == MAIN else f"{title}/{member}"
            found[name] = torch.cat([one.logits for one in runs]).numpy()
            if crops := runs[0].crops:
                (crop,) = crops
                found[f"{name} crops"] = torch.cat([one.crops[crop] for one in runs]).numpy()
    return found


class Row:
    """A row of networks whose settings are solved on one half of the images and judged on the other."""

    def __init__(self, title: str, network: DynamicNetwork, kept: Numbers) -> None:
        self.title, self.network, self.labels, self.kept = title, network, kept["labels"], kept
        self.macs = {name: annotated_macs(network.graphs[f"{name}/"]) for name in network.members}
        self.macs[MAIN] = annotated_macs(network.plain)
        self.halves = np.array_split(np.arange(len(self.labels)), 2)
        self._plans: dict[tuple[int, tuple[str, ...], str], Plan | None] = {}

    def logits(self, name: str) -> Any:
        return self.kept[name if name == MAIN else f"{self.title}/{name}"]

    def table(self, asked: tuple[str, ...], half: int) -> dz.PredictionTable:
        index = self.halves[half]
        return dz.PredictionTable.from_logits(
            {name: self.logits(name)[index] for name in asked},
            {name: self.macs[name] for name in asked},
            labels=self.labels[index],
        )

    def plan(self, asked: tuple[str, ...], half: int, limit: str) -> Plan | None:
        """Solved on one half; ``limit`` is a drop of 0, or the budget."""
        key = half, asked, limit
        if key not in self._plans:
            try:
                wanted = {"max_drop": 0.0} if limit == "drop" else {"macs_ratio": BUDGET}
                self._plans[key] = self.table(asked, half).solve(**wanted)
            except InfeasibleError:
                self._plans[key] = None
        return self._plans[key]

    def judged(self, asked: tuple[str, ...], limit: str) -> tuple[float, int] | None:
        """Share of the MACs that is spent, mean of both halves, and how many of all images are answered rightly."""
        cost, right = [], 0
        for half in (0, 1):
            plan = self.plan(asked, half, limit)
            if plan is None:
                return None
            found = self.table(asked, 1 - half).evaluate(plan)
            cost.append(found.cost / self.macs[MAIN])
            right += round(found.accuracy * len(self.halves[1 - half]))
        return float(np.mean(cost)), right

    def alone(self, name: str) -> int:
        """How many images one network answers rightly."""
        return int((self.logits(name).argmax(1) == self.labels).sum())

    @property
    def covers(self) -> Any:
        """Whether the first crop covers the middle of the object, for each image."""
        left, top, right, bottom = self.kept[f"{self.title}/focus-1 crops"].T
        boxes = self.kept["boxes"]
        x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
        return (left <= x) & (x < right) & (top <= y) & (y < bottom)

    def covered(self, asked: tuple[str, ...], limit: str) -> float:
        """The same as a share of the images that go past the glance."""
        past = np.concatenate([self.exits(asked, limit, half) > 0 for half in (0, 1)])
        return float(self.covers[past].mean())

    def exits(self, asked: tuple[str, ...], limit: str, half: int) -> Any:
        """Where the images of a half leave, at what was solved on the other one."""
        plan = self.plan(asked, 1 - half, limit)
        assert plan is not None
        scores = self.table(asked, half).read(plan.reading).scores
        at = [plan.point.thresholds[name] for name in asked[:-1]]
        leaves = [one >= (np.inf if least is None else least) for one, least in zip(scores, at, strict=False)]
        return np.argmax([*leaves, np.ones(len(leaves[0]), bool)], axis=0)


def told(rows: Mapping[str, Row], kept: Numbers) -> list[str]:
    """Accuracy and MACs."""
    count, first = len(kept["labels"]), next(iter(rows.values()))
    (rival,) = first.network.members
    share = first.macs[rival] / first.macs[MAIN]
    lines = [
        f"| network | MACs without a drop | accuracy there | accuracy at {BUDGET} | right alone | first crop on it |",
        "|---|---|---|---|---|---|",
        f"| static, {SIDE} pixels | 1 | {spread(first.alone(MAIN), count)} | | | |",
        f"| static, {RIVAL} pixels | {share:.2f} | {spread(first.alone(rival), count)} | | | |",
    ]
    for title, row in rows.items():
        members = tuple(row.network.members)
        lines.append(told_of(row, title, (*members, MAIN), count))
        if title == "activation":
            lines.append(told_of(row, "its glance alone in front", (members[0], MAIN), count))
    return lines


def told_of(row: Row, title: str, asked: tuple[str, ...], count: int) -> str:
    """One line of the table."""
    drop, budget = (row.judged(asked, limit) for limit in ("drop", "budget"))
    cells = [title, "-" if drop is None else f"{drop[0]:.3f}"]
    cells += ["-" if found is None else spread(found[1], count) for found in (drop, budget)]
    cells.append(", ".join(f"{100 * row.alone(name) / count:.1f}" for name in asked[:-1]) + " %")
    if len(asked) > 2:
        past = "" if drop is None else f", {100 * row.covered(asked, 'drop'):.1f} % behind the glance"
        cells.append(f"{100 * row.covers.mean():.1f} %{past}")
    else:
        cells.append("")
    return f"| {' | '.join(cells)} |"


def spread(right: int, count: int) -> str:
    """An accuracy with its interval."""
    low, high = wilson(right, count)
    return f"{100 * right / count:.2f} % ({100 * low:.1f} to {100 * high:.1f})"


def timed(rows: Mapping[str, Row], images: Splits, seconds: float) -> list[str]:
    """Speed over the static network where nothing is lost, for what was solved on the first half, on images that cost
    as the second half does."""
    contenders: dict[str, Any] = {}
    costs = []
    for title, row in rows.items():
        compiled = dz.compile_network(row.network, "onnxruntime", threads="shared")
        members = tuple(row.network.members)
        contenders.setdefault("static", partial(compiled.run, setting=Setting()))
        contenders.setdefault(
            f"static, {RIVAL} pixels", partial(compiled.run, setting=Setting({members[0]: float("-inf")}))
        )
        asked = (*members, MAIN)
        plan = row.plan(asked, 0, "drop") or row.plan(asked, 0, "budget")
        if plan is None:
            continue
        for piece, temperature in zip(row.network.scored, plan.reading.temperatures, strict=True):
            piece.temperature.fill_(temperature)
        setting = Setting(plan.point.thresholds, combine=plan.reading.combine)
        contenders[title] = partial(compiled.run, setting=setting)
        exits = row.exits(asked, "drop" if row.plan(asked, 0, "drop") else "budget", 1)
        costs.append(torch.from_numpy(np.cumsum([row.macs[name] for name in asked])[exits]))
    chosen = gather(images.test, representative(torch.stack(costs).sum(0), IMAGES), CPU)
    return time_table(contenders, "static", chosen, seconds)


def time_table(
    contenders: Mapping[str, Callable[[Tensor], Any]], static: str, chosen: Tensor, seconds: float
) -> list[str]:
    """How many times as fast as ``static`` each is on these images, in interleaved rounds, as Markdown."""
    cells: dict[str, list[str]] = {name: [] for name in contenders}
    for batch in BATCHES:
        inputs = [chosen[i : i + batch] for i in range(0, len(chosen) - batch + 1, batch)]
        found = interleave(contenders, inputs, CPU, seconds)
        for name, one in cells.items():
            one.append(f"{found.speedup(static, name):.2f} x")
    heads = " | ".join(f"batch {batch}" for batch in BATCHES)
    lines = [f"| network | {heads} |", "|---" * (1 + len(BATCHES)) + "|"]
    return [*lines, *[f"| {name} | {' | '.join(one)} |" for name, one in cells.items()]]


if __name__ == "__main__":
    typer.run(main)
