"""The picture of the README: accuracy against time, the cascade beside static networks, and who answered which image.

    python benchmarks/cifar10_cascade.py --data cifar10 --given DIR          # writes the figures
    dynamize run cascade --model dynamize:cifar_resnet56 --checkpoint DIR/resnet56-cifar10-jpeg.pt \
        --data imagefolder:cifar10 --input 3,32,32 --out runs/cifar10_cascade \
        --set steps.1.max_drop=null --set steps.1.macs_ratio=0.53 \
        --set "steps.0.first=[{source: 'dynamize:cifar_resnet20', checkpoint: DIR/resnet20-cifar10-jpeg.pt}, \
            {source: 'dynamize:cifar_resnet32', checkpoint: DIR/resnet32-cifar10-jpeg.pt}]"
    python docs/picture.py --figures runs/figures/cascade-20-32-56-onnxruntime.json --run runs/cifar10_cascade

Times are those of one image (batch 1), as shares of the largest network's.
"""

import json
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image, ImageDraw, ImageFont

from dynamize.report.data import Answerer, ReportData
from dynamize.report.folder import read_report
from dynamize.report.standing import Gallery

SIZE = (1680, 720)
PLOT = (110, 60, 870, 610)  # left, top, right, bottom
STRIP = (960, 60)
TILE, GAP, SHOWN = 76, 8, 8
INK, FAINT, LINE, CASCADE, STATIC = "#1c2430", "#5b6675", "#d9dee6", "#2f5bea", "#d4570f"
Mark = tuple[float, float]


def main(
    figures: Annotated[Path, typer.Option(help="JSON that benchmarks/cifar10_cascade.py wrote")],
    run: Annotated[Path, typer.Option(help="folder of a run, whose gallery is shown")],
    out: Annotated[Path, typer.Option(help="PNG to write")] = Path(__file__).parent / "images" / "cascade.png",
) -> None:
    found, report = json.loads(figures.read_text()), read_report(run)
    picture = Image.new("RGB", SIZE, "white")
    pen = ImageDraw.Draw(picture)
    static = {name: (1 / found["speedup"][name]["1"], 100 * found["static"][name]) for name in found["static"]}
    curve(pen, sorted((1 / row["speedup"]["1"], 100 * row["accuracy"]) for row in found["rows"]), static)
    gallery(picture, pen, report)
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(128).save(out, optimize=True)
    print(f"{out}: {out.stat().st_size / 1e3:.0f} kB")


def font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def curve(pen: ImageDraw.ImageDraw, cascade: list[Mark], static: dict[str, Mark]) -> None:
    """Accuracy against time."""
    left, top, right, bottom = PLOT
    heights = [y for _, y in [*cascade, *static.values()]]
    low, high = int(min(heights)), int(max(heights)) + 1

    def place(x: float, y: float) -> Mark:
        return left + x / 1.1 * (right - left), bottom - (y - low) / (high - low) * (bottom - top)

    for percent in range(low, high + 1):
        pen.line([place(0, percent), place(1.1, percent)], fill=LINE, width=2)
        pen.text(place(0, percent), f"{percent} %  ", fill=FAINT, anchor="rm", font=font(22))
    for x in (0.25, 0.5, 0.75, 1.0):
        across, down = place(x, low)
        pen.text((across, down + 14), f"{x:g}", fill=FAINT, anchor="ma", font=font(22))
    pen.text((left, top - 40), "accuracy on CIFAR-10", fill=INK, anchor="lm", font=font(26))
    pen.text(
        ((left + right) / 2, bottom + 66), "time for one image, ResNet-56 = 1", fill=INK, anchor="mm", font=font(26)
    )
    for marks, colour in ((sorted(static.values()), STATIC), (cascade, CASCADE)):
        pen.line([place(*mark) for mark in marks], fill=colour, width=5)
        for x, y in (place(*mark) for mark in marks):
            pen.ellipse((x - 9, y - 9, x + 9, y + 9), fill=colour)
    for name, mark in static.items():
        x, y = place(*mark)
        pen.text((x + 14, y + 8), name, fill=STATIC, anchor="la", font=font(22))
    x, y = place(*cascade[-1])
    pen.text((x + 18, y), "the three in a row", fill=CASCADE, anchor="lm", font=font(26))


def gallery(picture: Image.Image, pen: ImageDraw.ImageDraw, report: ReportData) -> None:
    """A row of images for each network that answers, with the share that it answered."""
    left, y = STRIP
    pen.text((left, y - 40), "who answers", fill=INK, anchor="lm", font=font(26))
    here = report.stands[report.here]
    shown = {one.exit: one for one in here.gallery}
    for index, (answerer, share, rightly) in enumerate(zip(report.answerers, here.exits, here.right, strict=False)):
        right = "" if rightly is None else f", {100 * rightly:.0f} % of them rightly"
        told = f"{called(answerer)}: {100 * share:.1f} % of the images{right}"
        pen.text((left, y + 16), told, fill=INK, anchor="lm", font=font(24))
        for column, tile in enumerate(tiles(shown.get(index), report)):
            x = left + column * (TILE + GAP)
            picture.paste(tile[0], (x, y + 42))
            pen.text((x + TILE / 2, y + 42 + TILE + 6), tile[1], fill=tile[2], anchor="ma", font=font(16))
        y += 190


def called(answerer: Answerer) -> str:
    return answerer.name.replace("cifar_resnet", "ResNet-").replace("main", "ResNet-56")


def tiles(shown: Gallery | None, report: ReportData) -> list[tuple[Image.Image, str, str]]:
    """Images with the answer, which is of another colour where it is wrong."""
    found = []
    images = [] if shown is None else [*shown.first[: SHOWN - 3], *shown.last[:2], *shown.wrong]
    for one in {one.picture: one for one in images}.values():
        image = Image.open(BytesIO(b64decode(report.pictures[one.picture]))).convert("RGB")
        image = image.resize((TILE, TILE), Image.Resampling.NEAREST)
        found.append((image, report.class_name(one.answer), FAINT if one.answer == one.label else "#c02020"))
    return found[:SHOWN]


if __name__ == "__main__":
    typer.run(main)
