"""Cascades on the ImageNet validation predictions of eight networks, and how certified limits hold on draws of them.

python benchmarks/imagenet_cascades.py imagenet-val-top5.npz [--draws 1000]

The file holds ``labels``, ``NAME.classes`` and ``NAME.probabilities`` (50000, 5). Plans are made on one random half of
the images and judged on the other, then the other way round; the mean of both is shown. No network is run.
"""

import argparse
import time
from pathlib import Path

import numpy as np

import dynamize as dz
from dynamize.calibration.certified import certify, fixed_order
from dynamize.calibration.evidence import Reading
from dynamize.calibration.goal import Goal
from dynamize.calibration.solver import solve_budget
from dynamize.calibration.table import ConfidenceTable
from dynamize.errors import InfeasibleError

MACS = {
    "mobilenet_v2": 0.30e9,
    "nasnet_mobile": 0.56e9,
    "resnet18": 1.82e9,
    "resnet50": 4.11e9,
    "resnet152": 11.56e9,
    "densenet169": 3.40e9,
    "densenet201": 4.34e9,
    "nasnet_large": 23.8e9,
}
PLANS = [
    (("mobilenet_v2", "resnet50"), 0.0),
    (("mobilenet_v2", "resnet50"), 0.5),
    (("nasnet_mobile", "resnet50"), 0.5),
    (("densenet169", "resnet152"), 0.5),
    (("resnet18", "resnet50"), 0.5),
    (("mobilenet_v2", "densenet169", "resnet152"), 0.2),
]
AGREEING = [("mobilenet_v2", "nasnet_mobile", last) for last in ("resnet50", "resnet152", "nasnet_large")]
DRAWN = (1000, 2000, 5000, 10_000)
DROP, CERTAIN = 1.0, 0.95


def predictions(file: Path, names: tuple[str, ...]) -> dz.PredictionTable:
    """The table of some of the networks."""
    return dz.PredictionTable.read_files(file, {name: MACS[name] for name in names}, class_count=1000)


def judged(file: Path, names: tuple[str, ...], max_drop: float, score: str) -> tuple[float, float]:
    """Points gained over the last network, and how many times fewer MACs, on images that the plan has not seen."""
    whole = predictions(file, names)
    halves = [whole.subset(half) for half in np.array_split(np.random.default_rng(0).permutation(whole.images), 2)]
    found = []
    for fitted, other in (halves, halves[::-1]):
        seen = other.evaluate(fitted.solve(max_drop=max_drop, score=score))
        alone = float((other.evidence.answers[-1] == other.labels).mean())
        found.append((100 * (seen.accuracy - alone), MACS[names[-1]] / seen.cost))
    gained, times = np.mean(found, axis=0)
    return float(gained), float(times)


def held(table: ConfidenceTable, images: int, draws: int) -> tuple[float, float]:
    """In what share of draws the certified drop is not the true one's limit, and the mean share deferred."""
    goal, order = Goal.of(table.static_cost["macs"], max_drop=DROP), fixed_order(1)
    assert order is not None
    violated, deferred = 0, []
    for number in range(draws):
        part = table.subset(np.random.default_rng(number).choice(table.images, images, replace=False))
        try:
            found = certify(lambda _, p=part: p, order, np.arange(images), goal, CERTAIN, 1.0)
        except InfeasibleError:
            deferred.append(1.0)
            continue
        true = table.evaluate(list(found.point.thresholds.values()))
        violated += table.reference_accuracy - true.accuracy > goal.limit
        deferred.append(float(true.shares[1]))
    return violated / draws, float(np.mean(deferred))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--draws", type=int, default=1000)
    given = parser.parse_args()
    print("cascade, asked drop, score: points gained, times fewer MACs than the last network")
    for names, max_drop in PLANS:
        for score in ("top_probability", "margin"):
            gained, times = judged(given.file, names, max_drop, score)
            print(f"{' -> '.join(names)}, {max_drop}, {score}: {gained:+.2f}, {times:.2f}")
    print("agreement of two, all images")
    for names in AGREEING:
        whole = predictions(given.file, names)
        point = whole.solve(macs_ratio=1, score="agreement", combine="last").point
        print(f"{' -> '.join(names)}: {-100 * point.accuracy_drop:+.2f}, {1 / point.macs_ratio:.2f}")
    three = predictions(given.file, ("mobilenet_v2", "densenet169", "resnet152"))
    table = three.read(Reading("margin", "last", (1.0, 1.0, 1.0)))
    started = time.perf_counter()
    solve_budget(table, 4e9)
    print(f"solver, 50,000 x 3: {time.perf_counter() - started:.2f} s")
    pair = predictions(given.file, ("mobilenet_v2", "resnet50"))
    for score in ("top_probability", "margin"):
        table = pair.read(Reading(score, "last", (1.0, 1.0)))
        for images in DRAWN:
            violated, deferred = held(table, images, given.draws)
            print(f"certified drop of {DROP} at {CERTAIN}, {score}, {images}: {violated:.3f} violated, {deferred:.3f}")
        started = time.perf_counter()
        held(table, table.images, 1)
        print(f"certification, 50,000: {time.perf_counter() - started:.2f} s")


if __name__ == "__main__":
    main()
