"""Two trained networks of your own, one behind the other: calibrated on 300 images, judged on others, drawn as a curve.

python examples/cascade.py            # the bundled digits networks; seconds, writes cascade.png and runs/cascade
"""

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, TensorDataset

import dynamize as dz
from dynamize.data import DataSpec, load_data
from dynamize.measure.costs import exit_costs

SHAPE = (1, 8, 8)


def main(picture: str = "cascade.png") -> None:
    # yours: dz.source("torchvision:resnet50,num_classes=10", checkpoint="large.pt"), or any nn.Module in eval mode
    large = dz.source("dynamize:digits_resnet", pretrained=True)
    small = dz.source("dynamize:digits_resnet_small", pretrained=True)
    data = load_data(DataSpec(source="digits", calibration=300, normalize=((0.305,), (0.376,))), SHAPE)
    calibration, test = (loader_of(images) for images in (data.calibration, data.test))

    step = dz.Cascade(first=[{"name": "small"}])
    dynamic = dz.convert(large, [step], SHAPE, dz.Context(members={"small": small})).eval()
    points = dz.calibrate(dynamic, calibration, teacher=large)

    alone = {"small": judged(dz.convert(small, [], SHAPE), test), "large": judged(dz.convert(large, [], SHAPE), test)}
    whole = alone["large"][0]
    curve = []
    for point in points:
        dynamic.set_operating_point(point)
        curve.append(judged(dynamic, test))
        macs, accuracy = curve[-1]
        print(f"{point.name}: {accuracy:.1%} of the test images right, {macs / whole:.3f} of the large network's MACs")
    for name, (macs, accuracy) in alone.items():
        print(f"{name} alone: {accuracy:.1%}, {macs / whole:.3f}")
    dynamic.set_operating_point(points.at(max_drop=0.5))
    dz.save(dynamic, "runs/cascade")
    draw(
        [(macs / whole, accuracy) for macs, accuracy in curve],
        {name: (macs / whole, accuracy) for name, (macs, accuracy) in alone.items()},
    ).save(picture)
    print(f"The curve: {Path(picture).resolve()}")


def loader_of(images) -> DataLoader:
    """Yours: a DataLoader of normalised images and labels that neither network was trained on."""
    parts = list(images.batches(256))
    return DataLoader(TensorDataset(*(torch.cat(one) for one in zip(*parts, strict=True))), 64)


def judged(network: dz.DynamicNetwork, loader: DataLoader) -> tuple[float, float]:
    """Executed MACs per image, and accuracy."""
    network.eval()
    with torch.no_grad(), dz.record_routing(network) as routing:
        right = torch.cat([network(images).argmax(1) == labels for images, labels in loader])
    macs = exit_costs(network).executed(routing.taken, len(right))
    return float(macs.mean()), float(right.double().mean())


def draw(curve, alone, size=(720, 440), margin=60) -> Image.Image:
    """Accuracy against MACs, both as shares: a line for the cascade, a square for each network alone."""
    marks = [*curve, *alone.values()]
    right = 1.1 * max(x for x, _ in marks)
    low, high = min(y for _, y in marks) - 0.005, min(1, max(y for _, y in marks) + 0.005)

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = x / right, (y - low) / (high - low)
        return margin + across * (size[0] - 2 * margin), size[1] - margin - up * (size[1] - 2 * margin)

    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    pen.line([place(0, high), place(0, low), place(right, low)], fill="#999")
    for y in (low, high):
        pen.text(place(0, y), f"{y:.1%} ", fill="#555", anchor="rm")
    for x in (0, 0.5, 1):
        pen.text(place(x, low), f"\n{x:g}", fill="#555", anchor="ma")
    pen.text((size[0] / 2, size[1] - 20), "executed MACs, the large network = 1", fill="#555", anchor="mm")
    pen.text((margin, 20), "accuracy on test images", fill="#555", anchor="lm")
    pen.line([place(*mark) for mark in sorted(curve)], fill="#2f5bea", width=3)
    for mark in curve:
        x, y = place(*mark)
        pen.ellipse((x - 5, y - 5, x + 5, y + 5), fill="#2f5bea")
    for name, mark in alone.items():
        x, y = place(*mark)
        pen.rectangle((x - 5, y - 5, x + 5, y + 5), fill="#d4570f")
        pen.text((x + 10, y), f"{name} alone", fill="#d4570f", anchor="lm")
    return picture


if __name__ == "__main__":
    main()
