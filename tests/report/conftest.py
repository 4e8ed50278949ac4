"""A whole report with made-up numbers that are consistent with each other."""

import base64
import struct
import zlib

import pytest
from ledgers import leaving

from dynamize.calibration.operating import OperatingPoint
from dynamize.report import DecisionUse, Gallery, GalleryImage, Ledger, Network, OptionUse, ReportData, Row, Usage

STATIC_MACS = 126_550_000.0
STATIC_MS = 4.4


def png(red: int, green: int, blue: int) -> str:
    """A 32x32 picture: a diagonal ramp towards one colour, as base64."""
    color = (red, green, blue)
    lines = b"".join(b"\0" + bytes(channel * (x + y) // 62 for x in range(32) for channel in color) for y in range(32))

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 32, 32, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()


def row(step: int, transform: str, ratio: float, accuracy: float, speeds: tuple[float, float], **more: object) -> Row:
    """A row of a network that is `speeds` times as fast as the static one at batch 1 and 64."""
    times = dict(zip(("1", "64"), zip((1.132, 38.4), speeds, strict=True), strict=True))
    latency = {b: {"median_ms": ms / speed, "p95_ms": 1.1 * ms / speed} for b, (ms, speed) in times.items()}
    fields: dict[str, object] = {
        "step": step,
        "transform": transform,
        "params": 855_770,
        "macs": STATIC_MACS * ratio,
        "macs_worst": STATIC_MACS * max(1.0, ratio),
        "macs_ratio": ratio,
        "accuracy": accuracy,
        "accuracy_ci": (accuracy - 0.0052, accuracy + 0.0048),
        "accuracy_drop": 0.9357 - accuracy,
        "agreement": 1 - 2 * (0.9357 - accuracy),
        "latency": {"onnxruntime": latency},
        "speedup": {"onnxruntime": dict(zip(("1", "64"), speeds, strict=True))},
        "seconds": 12.5 * step,
    }
    fields |= more
    size = 4 * int(str(fields["params"])) + 21_000
    return Row.model_validate({"size": size, "peak_memory": size + 405_504} | fields)


@pytest.fixture
def ledger() -> Ledger:
    held_out = "thresholds from 5,000 held-out images"
    nobody = leaving(0.0, 0.0)
    split = leaving(0.4321, 0.3111)
    rows = [
        row(0, "static", 1.0, 0.9357, (1.0, 1.0)),
        row(1, "exits", 1.012, 0.9357, (0.97, 0.99), params=901_322, **nobody),
        row(2, "distill", 1.012, 0.9357, (0.97, 0.99), params=901_322, **nobody),
        row(3, "skip_gates", 0.8102, 0.9349, (0.998, 1.03), params=913_042, **nobody),
        row(4, "calibrate", 0.5731, 0.9327, (1.49, 1.63), params=913_042, notes=[held_out], **split),
    ]
    return Ledger(
        rows=rows,
        title="resnet56 on CIFAR-10",
        model="dynamize:cifar_resnet56",
        command="dynamize run cifar-exits.yaml --out out",
        backend="onnxruntime",
        machine="2 cores, AMD EPYC, onnxruntime 1.32",
    )


@pytest.fixture
def points() -> list[OperatingPoint]:
    found = []
    for index in range(13):
        ratio = 0.352 + 0.055 * index
        accuracy = 0.9352 - 0.16 * (1 - index / 12) ** 8
        leave = [max(0.0, 1 - index / 7), 0.0, 0.0]
        leave[2] = (index / 12) ** 1.5 * (1 - leave[0])
        leave[1] = 1 - leave[0] - leave[2]
        found.append(
            OperatingPoint(
                name="cheapest" if index == 0 else "full" if index == 12 else f"macs-{ratio:.2f}",
                thresholds={"exit.1": 0.5 + 0.04 * index, "exit.2": None if index < 3 else 0.6 + 0.03 * index},
                accuracy=accuracy,
                accuracy_ci=(accuracy - 0.0071, accuracy + 0.0069),
                accuracy_drop=0.9357 - accuracy,
                accuracy_drop_ci=(0.9357 - accuracy - 0.004, 0.9357 - accuracy + 0.004),
                macs=STATIC_MACS * ratio,
                macs_ci=(STATIC_MACS * (ratio - 0.012), STATIC_MACS * (ratio + 0.012)),
                macs_ratio=ratio,
                latency_ms=STATIC_MS * (ratio * 0.93 + 0.05),
                latency_ci=(STATIC_MS * (ratio * 0.93 + 0.03), STATIC_MS * (ratio * 0.93 + 0.07)),
                exits=leave,
            )
        )
    return found


def unit(name: str, macs: float, *options: tuple[str, float, float]) -> DecisionUse:
    """Options as (label, share of the unit's MACs, share of the images)."""
    uses = [OptionUse(label=label, macs=part * macs, share=share) for label, part, share in options]
    return DecisionUse(name=name, kind="skip", effect="changes", options=uses, always=1e3)


@pytest.fixture
def usage() -> Usage:
    widths = (("25 % wide", 0.26, 0.05), ("50 % wide", 0.5, 0.1), ("75 % wide", 0.75, 0.05))
    leaves, stays = (
        OptionUse(label=label, macs=0, share=share) for label, share in (("leaves", 0.4), ("goes on", 0.6))
    )
    return Usage(
        decisions=[
            unit("layer1.1 to layer1.3", 14.2e6, ("skipped", 0, 0.125), ("whole", 1, 0.875)),
            DecisionUse(name="exit.1", kind="exit", effect="leaves", options=[leaves, stays], always=2e4),
            unit("layer2.0", 7.1e6, ("skipped", 0.25, 0.3), ("whole", 1, 0.3)),
            unit("layer3.1", 9.4e6, *widths, ("whole", 1, 0.2)),
        ],
        images=10_000,
        routings=37,
    )


@pytest.fixture
def report(ledger: Ledger, points: list[OperatingPoint], usage: Usage) -> ReportData:
    def image(index: int, confidence: float, macs: float | None = None) -> GalleryImage:
        answer = (index + 1) % 10 if index % 4 == 3 else index % 10
        picture = png(60 + 37 * index % 196, 60 + 91 * index % 196, 60 + 13 * index % 196)
        return GalleryImage(png_base64=picture, label=index % 10, answer=answer, confidence=confidence, macs=macs)

    names = ["exit 1 (stage 1)", "exit 2 (stage 2)", "own classifier"]
    return ReportData(
        ledger=ledger,
        operating_points=points,
        anytime=[
            Network(name="exit 1", macs=0.352 * STATIC_MACS, accuracy=0.7752, latency_ms=1.66),
            Network(name="exit 2", macs=0.681 * STATIC_MACS, accuracy=0.9021, latency_ms=3.0),
            Network(name="own classifier", macs=1.012 * STATIC_MACS, accuracy=0.9352, latency_ms=4.37),
        ],
        budgeted=[
            Network(
                name=f"budget {ratio:.2f}", macs=ratio * STATIC_MACS, accuracy=0.775 + 0.16 * (ratio - 0.352) ** 0.5
            )
            for ratio in (0.45, 0.6, 0.75, 0.9)
        ],
        static=Network(name="resnet56, static", macs=STATIC_MACS, accuracy=0.9357, latency_ms=STATIC_MS),
        rivals=[
            Network(name="resnet20", macs=0.326 * STATIC_MACS, accuracy=0.9160, latency_ms=1.6),
            Network(name="resnet32", macs=0.551 * STATIC_MACS, accuracy=0.9263, latency_ms=2.6),
        ],
        latency_label="ms per image, batch 64, onnxruntime",
        usage=usage,
        gallery=[
            Gallery(
                exit=index,
                name=name,
                first=[image(7 * index + k, 0.999 - 0.002 * k) for k in range(6)],
                last=[image(7 * index + k + 3, 0.71 - 0.01 * k) for k in range(6)],
            )
            for index, name in enumerate(names)
        ]
        + [
            Gallery(
                exit=None,
                name="all images",
                first=[image(k, 0.9, 31e6 + 1e6 * k) for k in range(6)],
                last=[image(k + 5, 0.4, 128e6 - 1e6 * k) for k in range(6)],
            )
        ],
        class_names=[
            "airplane",
            "automobile",
            "bird",
            "cat",
            "deer",
            "dog",
            "frog",
            "horse",
            "ship",
            "truck",
        ],
        notes=["Checkpoint not trained on the calibration images."],
    )
