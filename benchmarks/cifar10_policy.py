"""What the reinforcement steps do to trained gates, with seeds: `hybrid_gates` and `q_gates` after a run with gates.

    python benchmarks/cifar10_policy.py --artifact runs/skip --data cifar10 --checkpoint resnet56-cifar10-jpeg.pt \\
        --out runs/figures/policy.md

Each seed starts from the same artifact, refines its gates on the same part of the train images, and is judged on the
half of the test images that the run did not calibrate on. Offsets are zero: what the gates themselves decide.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from cifar10_images import CPU, SHAPE, halves

import dynamize as dz
from dynamize.conversion import wrap
from dynamize.evaluation import Evaluator
from dynamize.files import write_text
from dynamize.nn.executor import side_by_side
from dynamize.nn.network import DynamicNetwork
from dynamize.transform import Context, Transform


def main(
    artifact: Annotated[Path, typer.Option(help="folder that `dynamize run` wrote, with gates")],
    data: Annotated[Path, typer.Option(help="folder with train/ and test/")],
    checkpoint: Annotated[Path, typer.Option(help="of the ResNet-56 that the artifact was made from")],
    out: Annotated[Path, typer.Option(help="Markdown file to write")],
    images: Annotated[int, typer.Option(help="train images that each step sees in an epoch")] = 5000,
    seeds: Annotated[int, typer.Option(help="how many")] = 3,
) -> None:
    """Refine with every seed and print one Markdown table."""
    splits = halves(data, train_limit=images)
    teacher = dz.source("dynamize:cifar_resnet56", checkpoint=checkpoint)
    evaluator = Evaluator(wrap(teacher, SHAPE), splits.test, CPU, ())
    steps: dict[str, Transform] = {
        "hybrid_gates, 1 epoch": dz.HybridGates(epochs=1),
        "q_gates, 1 round of 1 + 1 epochs": dz.QGates(rounds=1, gate_epochs=1, network_epochs=1),
    }
    lines = [
        f"| step, on {images} train images | seeds | executed MACs | accuracy % | different routings |",
        "|---|---|---|---|---|",
        _row("none", [_judge(evaluator, _load(artifact))]),
    ]
    print("\n".join(lines), flush=True)
    for name, step in steps.items():
        found = []
        for seed in range(seeds):
            context = Context(data=splits, teacher=teacher, seed=seed)
            found.append(_judge(evaluator, step.apply(_load(artifact), context).network))
        lines.append(_row(name, found))
        print(lines[-1], flush=True)
    write_text(out, "\n".join(lines) + "\n")


def _load(artifact: Path) -> DynamicNetwork:
    network = dz.load(artifact)
    network.set_operating_point(None)
    return network.requires_grad_(True)


def _judge(evaluator: Evaluator, network: DynamicNetwork) -> tuple[float, float, float]:
    judged = evaluator.judge(network.eval())
    choices = side_by_side(judged.taken, network.decision_names[1], len(judged.labels))
    routings = len(choices.unique(dim=0))
    return float(judged.macs.mean()) / evaluator.static_macs, 100 * judged.accuracy, float(routings)


def _row(name: str, found: list[tuple[float, float, float]]) -> str:
    """Means with the largest distance from it."""
    cells = []
    for values, digits in zip(np.array(found).T, (3, 2, 0), strict=True):
        spread = f" ± {np.abs(values - values.mean()).max():.{digits}f}" if len(values) > 1 else ""
        cells.append(f"{values.mean():.{digits}f}{spread}")
    return f"| {name} | {len(found)} | {' | '.join(cells)} |"


if __name__ == "__main__":
    typer.run(main)
