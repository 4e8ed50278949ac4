"""How long solving the thresholds of 8 exits on 50,000 images takes, presort included.

python benchmarks/solver.py
"""

import time

import numpy as np

from dynamize.calibration.solver import solve_budget
from dynamize.calibration.table import ConfidenceTable

IMAGES, EXITS, BUDGETS = 50_000, 8, (0.4, 0.55, 0.7)


def table(seed: int) -> ConfidenceTable:
    """Exits that get better with depth; scores that know something of whether the answer is right."""
    random = np.random.default_rng(seed)
    ease = np.linspace(0.6, 1.8, EXITS)[:, None] - random.normal(size=IMAGES)
    margin = ease + 0.5 * random.normal(size=(EXITS, IMAGES))
    scores = margin + 0.5 * random.normal(size=(EXITS, IMAGES))
    labels = random.integers(0, 10, IMAGES)
    answers = np.where(margin > 0, labels, (labels + 1) % 10)
    costs = {"macs": np.linspace(0.3, 1.02, EXITS)}
    return ConfidenceTable(scores, answers, labels, answers[-1], costs, {"macs": 1.0})


def main() -> None:
    """Print the slowest and the median of fresh solves."""
    seconds = []
    for seed in range(5):
        for budget in BUDGETS:
            fresh = table(seed)
            started = time.perf_counter()
            solve_budget(fresh, budget)
            seconds.append(time.perf_counter() - started)
    print(f"{len(seconds)} solves: median {np.median(seconds):.3f} s, slowest {max(seconds):.3f} s")


if __name__ == "__main__":
    main()
