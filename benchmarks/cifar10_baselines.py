"""The static rivals on CIFAR-10: ResNet-56, -32 and -20, fine-tuned for as many epochs as the dynamic network.

    python benchmarks/cifar10_baselines.py --data cifar10 --checkpoints DIR --out runs/baselines --epochs 12

DIR holds resnet{56,32,20}-cifar10-jpeg.pt. Same optimiser, schedule, augmentation and precision as the dynamic
network; labels only, no distillation. The last epoch is kept, whatever its accuracy.
"""

from pathlib import Path
from typing import Annotated

import typer
from cifar10_images import SHAPE, halves

import dynamize as dz
from dynamize.checkpoints import save_state_dict
from dynamize.conversion import apply, wrap
from dynamize.measure.accuracy import exit_accuracies
from dynamize.transform import Context
from dynamize.transforms import Distill


def main(
    data: Annotated[Path, typer.Option(help="folder with train/ and test/")],
    checkpoints: Annotated[Path, typer.Option(help="folder with resnet*-cifar10-jpeg.pt")],
    out: Annotated[Path, typer.Option(help="where resnet*.safetensors are written")],
    epochs: int = 12,
    seed: int = 0,
    depths: Annotated[str, typer.Option(help="comma-separated")] = "56,32,20",
) -> None:
    """Fine-tune the three static networks and save them."""
    splits = halves(data, seed=seed)
    for depth in depths.split(","):
        target = out / f"resnet{depth}.safetensors"
        if target.exists():
            continue
        network = dz.source(f"dynamize:cifar_resnet{depth}", checkpoint=checkpoints / f"resnet{depth}-cifar10-jpeg.pt")
        work = out / f"resnet{depth}"
        context = Context(data=splits, seed=seed, work=work, resume=True)
        tuned, _ = apply(wrap(network, SHAPE), Distill(epochs=epochs, alpha=0.0), context)
        accuracies = exit_accuracies(tuned, splits.calibration, context.device)
        save_state_dict(tuned.plain.state_dict(), target)
        print(
            f"ResNet-{depth}: {accuracies[0]:.2%} on the first half of the test images, saved to {target}", flush=True
        )


if __name__ == "__main__":
    typer.run(main)
