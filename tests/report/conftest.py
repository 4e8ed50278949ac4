"""A whole report with made-up numbers that are consistent with each other."""

import base64
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Opened
from ledgers import leaving
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

from dynamize.calibration.operating import OperatingPoint
from dynamize.report import (
    Answerer,
    Classes,
    Gallery,
    GalleryImage,
    Ledger,
    Mark,
    Place,
    ReportData,
    Rival,
    Row,
    Section,
    Standing,
    html,
)

STATIC_MACS = 126_550_000.0
STATIC_MS = 1.132
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,900",
)


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


def changing(name: str, macs: float, *options: tuple[str, float]) -> Section:
    """A gated piece, with options as (label, share of its MACs)."""
    place = Place(
        name=name,
        kind="skip",
        effect="changes",
        options=[label for label, _ in options],
        macs=[part * macs for _, part in options],
        always=1e3,
    )
    return Section(name=name, member="main", place=place)


def leaves(name: str) -> Section:
    """A piece at which images leave."""
    options = ["leaves", "goes on"]
    place = Place(name=name, kind="exit", effect="leaves", options=options, macs=[0, 0], always=2e4)
    return Section(name=name, member="main", place=place)


@pytest.fixture
def sections() -> list[Section]:
    widths = (("25 % wide", 0.26), ("50 % wide", 0.5), ("75 % wide", 0.75))
    return [
        Section(name="upto.layer1.0", member="main", macs=30e6),
        changing("layer1.1 to layer1.3", 14.2e6, ("skipped", 0), ("whole", 1)),
        leaves("exit.1"),
        changing("layer2.0", 7.1e6, ("skipped", 0.25), ("whole", 1)),
        leaves("exit.2"),
        changing("layer3.1", 9.4e6, *widths, ("whole", 1)),
        Section(name="upto.output", member="main", macs=65e6),
    ]


def stand(index: int, point: OperatingPoint, last: Row) -> Standing:
    """A point as it was measured: a little more accurate than calibration expects."""
    out, second, rest = point.exits
    here = 1 - out
    decisions = {
        "layer1.1 to layer1.3": [0.125, 0.875],
        "exit.1": [out, here],
        "layer2.0": [0.5 * here, 0.5 * here],
        "exit.2": [second, rest],
        "layer3.1": [0.125 * rest, 0.25 * rest, 0.125 * rest, 0.5 * rest],
    }
    accuracy = min(0.9357, point.accuracy + 0.001)
    speeds = (1 / (point.macs_ratio + 0.1), 1 / (point.macs_ratio + 0.05))
    figures = dict(row(4, last.transform, point.macs_ratio, accuracy, speeds, decisions=decisions))
    figures |= {"leaving": ["exit.1", "exit.2"], "params": last.params, "size": last.size}

    def image(number: int, confidence: float, macs: float | None = None) -> GalleryImage:
        answer = (number + 1) % 10 if number % 4 == 3 else number % 10
        picture = number % 24
        return GalleryImage(picture=picture, label=number % 10, answer=answer, confidence=confidence, macs=macs)

    names = ["exit 1 (stage 1)", "exit 2 (stage 2)", "own classifier"]
    gallery = [
        Gallery(
            exit=k,
            name=name,
            first=[image(index + 7 * k + i, 0.999 - 0.002 * i) for i in range(6)],
            last=[image(index + 7 * k + i + 3, 0.71 - 0.01 * i) for i in range(6)],
        )
        for k, name in enumerate(names)
    ]
    cheap, dear = ([image(i + index, 0.9, 31e6 + 1e6 * i) for i in range(6)] for index in (index, index + 5))
    return Standing(
        **figures,
        point=point.name,
        words={"exit.1": f"at least {80 + index} % sure", "exit.2": "not used" if index < 3 else "at least 60 % sure"},
        reached=[1, 1, 1, here, here, rest, rest],
        right=[0.97, 0.9 if second else None, 0.8],
        routings=37 + index,
        classes=Classes(count=[1000] * 10, right=[930 - index, *[935] * 9], confused=[(0, 3, 70 + index), (2, 1, 65)]),
        gallery=[*gallery, Gallery(exit=None, name="all images", first=cheap, last=dear)],
    )


@pytest.fixture
def rivals() -> list[Rival]:
    found = []
    for number, (name, ratio, accuracy) in enumerate(
        (("resnet20", 0.326, 0.916), ("resnet32", 0.551, 0.9263)), start=5
    ):
        figures = dict(row(number, f"rival: {name}", ratio, accuracy, (1 / ratio, 1 / ratio)))
        found.append(Rival(**figures, lead=accuracy - 0.9327, lead_ci=(accuracy - 0.94, accuracy - 0.925)))
    return found


@pytest.fixture
def report(ledger: Ledger, points: list[OperatingPoint], sections: list[Section], rivals: list[Rival]) -> ReportData:
    stands = [stand(index, point, ledger.rows[-1]) for index, point in enumerate(points)]
    here = stands[4]
    fields = {name: getattr(here, name) for name in Row.model_fields if name not in ("notes", "step", "transform")}
    last = ledger.rows[-1].model_copy(update=fields)
    names = ["exit 1 (stage 1)", "exit 2 (stage 2)", "own classifier"]
    alike = ([1, 0.9, 0.5], [0.9, 1, 0.75], [0.5, 0.75, 1])
    return ReportData(
        ledger=ledger.model_copy(update={"rows": [*ledger.rows[:-1], last], "rivals": rivals}),
        operating_points=points,
        standings=stands,
        selected=points[4].name,
        answerers=[Answerer(name=name, alone=0.9, alike=row) for name, row in zip(names, alike, strict=True)],
        anytime=[
            Mark(name="exit 1", macs=0.352 * STATIC_MACS, accuracy=0.7752),
            Mark(name="exit 2", macs=0.681 * STATIC_MACS, accuracy=0.9021),
            Mark(name="own classifier", macs=1.012 * STATIC_MACS, accuracy=0.9352),
        ],
        budgeted=[
            Mark(name=f"budget {ratio:.2f}", macs=ratio * STATIC_MACS, accuracy=0.775 + 0.16 * (ratio - 0.352) ** 0.5)
            for ratio in (0.45, 0.6, 0.75, 0.9)
        ],
        sections=sections,
        images=10_000,
        pictures=[png(60 + 37 * k % 196, 60 + 91 * k % 196, 60 + 13 * k % 196) for k in range(24)],
        classes=Classes(count=[1000] * 10, right=[936] * 10, confused=[(0, 3, 64), (2, 1, 64)]),
        class_names=["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
        metrics=[
            {"step": "distill", "epoch": k, "loss": 3 / k, "calibration_accuracy": [0.7 + 0.01 * k, 0.8, 0.9]}
            for k in range(1, 5)
        ],
        recipe="version: 1\nsteps: []\n",
        folder="runs/cifar exits",
        versions={"dynamize": "1", "python": "3.11", "threads": "2"},
        notes=["Checkpoint not trained on the calibration images."],
    )


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    if not (CHROMIUM and CHROMEDRIVER):
        pytest.skip("chromium and chromedriver are not both on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(chromium: webdriver.Chrome, tmp_path: Path) -> Opened:
    """Opens a report from a file, with the logs emptied before, and waits until its script has drawn the charts."""
    drawn = "return [...document.querySelectorAll('.plot')].every((plot) => plot.hasChildNodes())"

    def open_page(report: ReportData) -> webdriver.Chrome:
        page = tmp_path / "report.html"
        page.write_text(html.render(report), encoding="utf-8")
        for kind in ("browser", "performance"):
            chromium.get_log(kind)
        chromium.get(page.as_uri())
        WebDriverWait(chromium, 20).until(lambda driver: driver.execute_script(drawn))
        return chromium

    return open_page
