"""Pruning and neural-compressor's quantisation: does the clock show them, and does ResNet-56 keep its accuracy?

    python benchmarks/compression_speed.py --checkpoint resnet56-cifar10-jpeg.pt --data cifar10 \\
        --out runs/figures/compression.md

ResNet-50 and MobileNetV3 have random weights, for nobody has trained them here: only their times mean something, and
how often the network in bytes answers as the one in float. They see CIFAR-10 at 224 pixels. ResNet-56 is quantised with
ranges from one half of the test images and judged on the other. Times are medians of interleaved rounds in one process,
all against the float network in ONNX Runtime; nothing else may run meanwhile.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from cifar10_images import CPU, JUDGING, SHAPE, halves

import dynamize as dz
from dynamize.compression.costs import whole_macs
from dynamize.conversion import apply, wrap
from dynamize.data import Splits
from dynamize.files import write_text
from dynamize.measure.accuracy import answers
from dynamize.measure.latency import REST, interleave
from dynamize.nn.network import DynamicNetwork
from dynamize.transform import Context

LARGE = ("resnet50", "mobilenet_v3_large")
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
        "| network | step | MACs | answers | engine | batch | float ms | ms | x |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    large = halves(data, (3, 224, 224), train_limit=100, calibration=200, test_limit=200)
    small = halves(data, train_limit=JUDGING)
    for name in LARGE:
        torch.manual_seed(0)
        static = wrap(dz.source(f"torchvision:{name},num_classes=10").eval(), (3, 224, 224))
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


def quantised(static: DynamicNetwork, splits: Splits) -> tuple[DynamicNetwork, str]:
    """With neural-compressor's ranges, and how its answers compare."""
    step = dz.Quantize(ranges="neural-compressor", images=128, max_drop=None)
    found, _ = apply(wrap(static, static.input_shape), step, Context(data=splits, teacher=static.plain))
    before, labels = answers(static, splits.test, CPU)
    after, _ = answers(found, splits.test, CPU)
    accuracy = [100 * float((one == labels).double().mean()) for one in (before, after)]
    alike = 100 * float((before == after).double().mean())
    return found, f"{accuracy[0]:.2f} -> {accuracy[1]:.2f} %, {alike:.1f} % alike"


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
