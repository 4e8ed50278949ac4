"""Resolution cascades on cluttered canvases: as given, with statistics of each size, trained, and trained with reuse.

    python benchmarks/canvas_cascades.py --data cifar10 --static runs/canvas_static --cache cascades.npz \
        runs/canvas_cascade runs/canvas_reuse
    python benchmarks/canvas_cascades.py ... --times         # the same settings, timed; nothing else may run meanwhile

The folders are those that benchmarks/canvas_static.yaml, canvas_cascade.yaml and canvas_reuse.yaml make. Each network
is run once for all test images, in ONNX Runtime, and its logits are kept in ``--cache``; the rest is arithmetic on
them.
Half of the test images gives thresholds, temperatures and how answers are joined, and the others judge; then the other
way round. Drops are from the static network, and costs are shares of its MACs.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from canvas import CHANNELS, IMAGES, RIVAL, SIDE, TRAIN, canvases, spread, time_table
from cifar10_images import CPU

import dynamize as dz
from dynamize.calibration.predictions import Plan
from dynamize.conversion import apply
from dynamize.data import Splits
from dynamize.errors import InfeasibleError
from dynamize.evaluation import gather, representative
from dynamize.graph.macs import annotated_macs
from dynamize.measure.costs import exit_costs
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import MAIN, Setting
from dynamize.transform import Context

DROP = 0.3  # points
BUDGETS = (0.55, 0.7, 0.85)  # of the static network's MACs
STATIC, GIVEN, AGAIN = "static", "as given", "statistics anew"
TIMED = 0.7  # of the MACs

Numbers = Mapping[str, Any]


def main(
    cascades: Annotated[
        list[Path], typer.Argument(help="folders of runs of canvas_cascade.yaml and canvas_reuse.yaml")
    ],
    data: Annotated[Path, typer.Option(help="folder with train/ and test/ of CIFAR-10")],
    static: Annotated[Path, typer.Option(help="folder of the run of canvas_static.yaml")],
    cache: Annotated[Path, typer.Option(help="file for the logits; what is there is not made again")],
    times: Annotated[bool, typer.Option("--times", help="time the settings instead")] = False,
    seconds: Annotated[float, typer.Option(help="of timing, for each batch size")] = 12.0,
) -> None:
    """Print one Markdown table."""
    images = canvases(data)
    networks = all_networks(static, cascades)
    if not cache.exists():
        networks[AGAIN] = recalibrated(networks[AGAIN], images)
        np.savez(cache, **answered(networks, images))
    with np.load(cache) as file:
        kept = dict(file)
    rows = {title: Row(title, network, kept) for title, network in networks.items()}
    print("\n".join(timed(rows, images, seconds) if times else told(rows, kept)))


def all_networks(static: Path, cascades: list[Path]) -> dict[str, DynamicNetwork]:
    """What is compared, by title."""
    plain = dz.load(static).eval().plain
    step = dz.Cascade(first=[{"resolution": RIVAL}])
    given = {title: dz.convert(plain, [step], (CHANNELS, SIDE, SIDE)).eval() for title in (GIVEN, AGAIN)}
    return given | {folder.name.removeprefix("canvas_"): dz.load(folder).eval() for folder in cascades}


def recalibrated(network: DynamicNetwork, images: Splits) -> DynamicNetwork:
    """With statistics of its own for the smaller images."""
    step = dz.Recalibrate(images=TRAIN, statistics="recalibrated")
    found, notes = apply(network, step, Context(data=images, teacher=network.plain))
    print("\n".join(notes))
    return found.eval()


def answered(networks: Mapping[str, DynamicNetwork], images: Splits) -> dict[str, Any]:
    """What each network of each row answers alone for all images, and labels."""
    every = [images.calibration, images.test]
    found: dict[str, Any] = {"labels": np.concatenate([part.labels.numpy() for part in every])}
    for title, network in networks.items():
        compiled = dz.compile_network(network, "onnxruntime")
        for name in (*network.members, MAIN):
            setting = Setting({name: float("-inf")} if name != MAIN else {})
            runs = [compiled.run(batch, setting) for part in every for batch, _ in part.batches(200)]
            found[f"{title}/{name}"] = torch.cat([one.logits for one in runs]).numpy()
    return found


class Row:
    """A row of networks whose settings are solved on one half of the images and judged on the other."""

    def __init__(self, title: str, network: DynamicNetwork, kept: Numbers) -> None:
        self.network, self.labels = network, kept["labels"]
        self.asked = (*network.members, MAIN)
        self.logits = {name: kept[f"{title}/{name}"] for name in self.asked}
        self.static = kept[f"{GIVEN}/{MAIN}"].argmax(1) == self.labels
        self.whole = annotated_macs(network.plain)
        self.macs = np.diff(exit_costs(network).cumulative(), prepend=0.0)
        self.always = all(piece.chained for piece in network.leaving)
        self.halves = np.array_split(np.arange(len(self.labels)), 2)

    def table(self, half: int) -> dz.PredictionTable:
        index = self.halves[half]
        macs = dict(zip(self.asked, self.macs, strict=True))
        return dz.PredictionTable.from_logits(
            {name: one[index] for name, one in self.logits.items()}, macs, labels=self.labels[index]
        )

    def plan(self, half: int, drop: float | None, budget: float | None) -> Plan | None:
        """Solved on one half; a drop is from the static network, and None comes of it where the last pass alone loses
        more."""
        index = self.halves[half]
        own = float((self.logits[MAIN][index].argmax(1) == self.labels[index]).mean() - self.static[index].mean())
        left = 100 * own + (drop or 0.0)
        if budget is None and left < 0:
            return None
        try:
            limit = {"max_drop": left} if budget is None else {"macs": budget * self.whole}
            return self.table(half).solve(**limit)
        except InfeasibleError:
            return None

    def judged(self, drop: float | None = None, budget: float | None = None) -> tuple[float, Any] | None:
        """Share of the MACs that is spent, mean of both halves, and which of all images are answered rightly."""
        cost, right = [], []
        for half in (0, 1):
            plan = self.plan(half, drop, budget)
            if plan is None:
                return None
            exits, answers = self.routed(plan, 1 - half)
            spent = np.cumsum(self.macs)
            if not self.always and plan.point.thresholds[self.asked[0]] is None and plan.reading.combine == "last":
                spent = spent - self.macs[0]  # the first is not asked then
            cost.append(float(spent[exits].mean()) / self.whole)
            right.append(answers == self.labels[self.halves[1 - half]])
        return float(np.mean(cost)), np.concatenate(right[::-1])

    def routed(self, plan: Plan, half: int) -> tuple[Any, Any]:
        """Where the images of a half leave, and with which answers."""
        table = self.table(half).read(plan.reading)
        at = [plan.point.thresholds[name] for name in self.asked[:-1]]
        leaves = [one >= (np.inf if least is None else least) for one, least in zip(table.scores, at, strict=False)]
        exits = np.argmax([*leaves, np.ones(len(leaves[0]), bool)], axis=0)
        return exits, table.answers[exits, np.arange(len(exits))]


def told(rows: Mapping[str, Row], kept: Numbers) -> list[str]:
    """Accuracy and MACs."""
    count = len(kept["labels"])
    heads = [f"{RIVAL} / {SIDE} pixels alone", "MACs without a drop", f"MACs at a drop of {DROP}"]
    heads += [f"accuracy at {budget}" for budget in BUDGETS]
    lines = [f"| cascade | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for title, row in rows.items():
        alone = [spread(int((row.logits[name].argmax(1) == row.labels).sum()), count) for name in row.asked]
        drops = [row.judged(drop=drop) for drop in (0.0, DROP)]
        cells = [" / ".join(alone)]
        cells += ["-" if one is None else f"{one[0]:.3f} ({100 * one[1].mean():.2f} %)" for one in drops]
        budgets = [row.judged(budget=budget) for budget in BUDGETS]
        cells += ["-" if one is None else spread(int(one[1].sum()), count) for one in budgets]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return [*lines, *(f"\n{line}" for line in compared(rows))]


def compared(rows: Mapping[str, Row]) -> list[str]:
    """The last row against the one before it, image by image."""
    *_, one, other = rows
    found = []
    for budget in BUDGETS:
        pair = [rows[title].judged(budget=budget) for title in (one, other)]
        if pair[0] is None or pair[1] is None:
            continue
        apart = pair[1][1].astype(float) - pair[0][1]
        wide = 1.96 * apart.std() / len(apart) ** 0.5
        low, high = (100 * (apart.mean() + sign * wide) for sign in (-1, 1))
        found.append(f"{other} over {one} at {budget}: {100 * apart.mean():+.2f} points ({low:+.2f} to {high:+.2f})")
    return found


def timed(rows: Mapping[str, Row], images: Splits, seconds: float) -> list[str]:
    """Speed over the static network at TIMED of its MACs, for what was solved on the first half, on images that cost as
    the second half does; and of both passes for all images."""
    contenders: dict[str, Any] = {}
    costs = []
    for title, row in rows.items():
        compiled = dz.compile_network(row.network, "onnxruntime", threads="shared")
        first = row.network.members[0]
        if not contenders:
            contenders[STATIC] = partial(compiled.run, setting=Setting())
        contenders[f"{title}, both passes"] = partial(compiled.run, setting=Setting({first: float("inf")}))
        plan = row.plan(0, None, TIMED)
        if plan is None or plan.point.thresholds[first] is None:
            continue
        for piece, temperature in zip(row.network.scored, plan.reading.temperatures, strict=True):
            piece.temperature.fill_(temperature)
        compiled = dz.compile_network(row.network, "onnxruntime", threads="shared")
        setting = Setting(plan.point.thresholds, combine=plan.reading.combine)
        contenders[title] = partial(compiled.run, setting=setting)
        costs.append(torch.from_numpy(np.cumsum(row.macs)[row.routed(plan, 1)[0]]))
    chosen = gather(images.test, representative(torch.stack(costs).sum(0), IMAGES), CPU)
    return time_table(contenders, STATIC, chosen, seconds)


if __name__ == "__main__":
    typer.run(main)
