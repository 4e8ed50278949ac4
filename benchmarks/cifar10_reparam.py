"""What training with more branches gives: ResNet-20 on CIFAR-10, expanded, trained and fused, against plain training.

    python benchmarks/cifar10_reparam.py --checkpoint resnet20-12fca82f.th --data cifar10 --out runs/figures/reparam.md

The checkpoint was trained on lossless images (81.03 % on these), so that there is something to learn. Both sides train
for as many epochs with the same optimiser, schedule, images and seeds, from labels alone; the expanded network ends as
the same ResNet-20. All test images judge: nothing is chosen on them.
"""

import math
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from cifar10_images import CPU, SHAPE, halves
from scipy import stats

import dynamize as dz
from dynamize.conversion import apply, wrap
from dynamize.data import Splits
from dynamize.files import write_text
from dynamize.measure.accuracy import top_answers
from dynamize.transform import Context, Transform


def main(
    checkpoint: Annotated[Path, typer.Option(help="of a ResNet-20")],
    data: Annotated[Path, typer.Option(help="folder with train/ and test/")],
    out: Annotated[Path, typer.Option(help="Markdown file to write")],
    forms: Annotated[str, typer.Option(help="comma-separated: acnet, dbb, repvgg, qarepvgg")] = "dbb",
    epochs: int = 2,
    lr: float = 0.05,
    seeds: int = 3,
    train_limit: Annotated[int | None, typer.Option(help="train images; all if not given")] = None,
) -> None:
    """Train every seed plain and with each form, and print one Markdown table."""
    splits = halves(data, calibration_from="train", calibration=1000, train_limit=train_limit)
    names = ["plain", *forms.split(",")]
    found: dict[str, list[float]] = {name: [] for name in names}
    minutes = dict.fromkeys(names, 0.0)
    for seed in range(seeds):
        for name in names:
            started = time.monotonic()
            found[name].append(100 * train(name, checkpoint, splits, epochs, lr, seed))
            minutes[name] += (time.monotonic() - started) / 60 / seeds
            print(f"seed {seed}, {name}: {found[name][-1]:.2f} %", flush=True)
    lines = [
        f"| ResNet-20, {epochs} epochs | accuracy % of {seeds} seeds | mean | against plain, points (95 %) | minutes |",
        "|---|---|---|---|---|",
    ]
    for name, values in found.items():
        each = ", ".join(f"{value:.2f}" for value in values)
        apart = "" if name == "plain" else interval(np.array(values) - np.array(found["plain"]))
        lines.append(f"| {name} | {each} | {np.mean(values):.2f} | {apart} | {minutes[name]:.1f} |")
    write_text(out, "\n".join(lines) + "\n")
    print("\n".join(lines))


def train(name: str, checkpoint: Path, splits: Splits, epochs: int, lr: float, seed: int) -> float:
    """Test accuracy after training, fused again if it was expanded."""
    network = wrap(dz.source("dynamize:cifar_resnet20", checkpoint=checkpoint), SHAPE)
    learn = dz.Distill(epochs=epochs, lr=lr, alpha=0.0)
    steps: list[Transform] = [learn]
    if name != "plain":
        steps = [dz.ExpandBranches(form=name), learn, dz.FuseBranches()]  # type: ignore[arg-type]  # checked by pydantic
    context = Context(data=splits, seed=seed)
    for step in steps:
        network, notes = apply(network, step, context)
        print(f"  {step.pass_name}: {'; '.join(notes)}", flush=True)
    right, labels = top_answers(network, splits.test, CPU)
    return float((right == labels).double().mean())


def interval(differences: np.ndarray) -> str:
    """Mean of paired differences with Student's interval."""
    half = stats.t.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / math.sqrt(len(differences))
    return f"{differences.mean():+.2f} ({differences.mean() - half:+.2f} to {differences.mean() + half:+.2f})"


if __name__ == "__main__":
    typer.run(main)
