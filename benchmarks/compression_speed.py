"""Pruning and neural-compressor's quantisation: does the clock show them, and does ResNet-56 keep its accuracy?

    python benchmarks/compression_speed.py --checkpoint resnet56-cifar10-jpeg.pt --data cifar10 \\
        --out runs/figures/compression.md

ResNet-50 and MobileNetV3 have random weights, for nobody has trained them here, and batch-norm statistics of images:
only their times mean something. How far their logits in bytes are from those in float says little, for untrained they
amplify all noise: 1 % of it on the images moves the logits by a quarter. They see CIFAR-10 at 224 pixels. ResNet-56 is
quantised with ranges from one half of the test images and judged on the other. Times are medians of interleaved rounds
in one process, all against the float network in ONNX Runtime; nothing else may run meanwhile.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from cifar10_images import CPU, JUDGING, SHAPE, halves
from torch import nn

import dynamize as dz
from dynamize.compression.comparison import whole_macs
from dynamize.conversion import apply, wrap
from dynamize.data import Splits
from dynamize.files import write_text
from dynamize.measure.accuracy import accuracy, everything
from dynamize.measure.latency import REST, interleave
from dynamize.nn.network import DynamicNetwork
from dynamize.transform import Context

LARGE = ("resnet50", "mobilenet_v3_large")
BATCH = 50  # images whose statistics are taken together
INT8_ENGINES = ("onnxruntime", "openvino")


def main(
    checkpoint: Annotated[Path, typer.Option(help="of a ResNet-56")],
    data: Annotated[Path, typer.Option(help="folder with train/ and test/")],
    out: Annotated[Path, typer.Option(help="Markdown file to write")],
    batches: Annotated[str, typer.Option(help="comma-separated")] = "1,16",
    seconds: Annotated[float, typer.Option(help="for each comparison of times")] = 10.0,
) -> None:
    """Compress, judge and time, and print one Markdown table."""
    sizes = [int(batch) for batch in batches.split(",")]
    lines = [
        "| network | step | MACs | accuracy | engine | batch | float ms | ms | x |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    large = halves(data, (3, 224, 224), train_limit=100, calibration=200, test_limit=200)
    small = halves(data, train_limit=JUDGING)
    for name in LARGE:
        torch.manual_seed(0)
        network = with_statistics(dz.source(f"torchvision:{name},num_classes=10"), large)
        static = wrap(network, (3, 224, 224))
        if name == "resnet50":
            pruned, _ = apply(wrap(static, static.input_shape), dz.Prune(macs_ratio=0.5), Context())
            macs = f"{whole_macs(pruned) / whole_macs(static):.2f}"
            lines += rows(name, "prune", static, pruned, macs, "", ("onnxruntime",), sizes, seconds)
        found, said = quantised(static, large)
        lines += rows(name, "quantize", static, found, "1.00", said, INT8_ENGINES, sizes, seconds)
    static = wrap(dz.source("dynamize:cifar_resnet56", checkpoint=checkpoint), SHAPE)
    found, said = quantised(static, small)
    lines += rows("ResNet-56", "quantize", static, found, "1.00", said, INT8_ENGINES, sizes, seconds)
    write_text(out, "\n".join(lines) + "\n")
    print("\n".join(lines))


def with_statistics(network: nn.Module, splits: Splits) -> nn.Module:
    """Batch norms that know what their layers compute: untrained ones leave logits that hardly depend on the image."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean over batches
    network.train()
    with torch.no_grad():
        for batch, _ in splits.train.batches(BATCH):
            network(batch)
    return network.eval()


def quantised(static: DynamicNetwork, splits: Splits) -> tuple[DynamicNetwork, str]:
    """With neural-compressor's ranges, and how its answers compare."""
    step = dz.Quantize(ranges="neural-compressor", images=128, max_drop=None)
    found, _ = apply(wrap(static, static.input_shape), step, Context(data=splits, teacher=static.plain))
    seen = [everything(one, splits.test, CPU) for one in (static, found)]
    before, after = (one.logits[-1] for one in seen)
    right = [100 * accuracy(one.logits[-1], one.labels) for one in seen]
    apart = 100 * float((after - before).norm() / before.norm())
    return found, f"{right[0]:.2f} -> {right[1]:.2f} %, logits {apart:.1f} % apart"


def rows(
    name: str,
    step: str,
    static: DynamicNetwork,
    found: DynamicNetwork,
    macs: str,
    said: str,
    engines: tuple[str, ...],
    batches: list[int],
    seconds: float,
) -> list[str]:
    """A row for each engine and batch size."""
    lines = []
    generator = torch.Generator().manual_seed(0)
    contenders = {"float": dz.compile_network(static, "onnxruntime")}
    contenders |= {engine: dz.compile_network(found, engine) for engine in engines}
    for batch in batches:
        inputs = [torch.randn(batch, *static.input_shape, generator=generator) for _ in range(16 if batch == 1 else 2)]
        times = interleave(contenders, inputs, CPU, seconds, rest=REST)
        for engine in engines:
            lines.append(
                f"| {name} | {step} | {macs} | {said} | {engine} | {batch} | {times.median_ms('float'):.2f} "
                f"| {times.median_ms(engine):.2f} | {times.speedup('float', engine):.2f} |"
            )
            print(lines[-1], flush=True)
    return lines


if __name__ == "__main__":
    typer.run(main)
