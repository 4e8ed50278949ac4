"""Whether images in use leave where calibration expects them to."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from dynamize.calibration.operating import OperatingPoint

FALSE_ALARM = 0.05  # the chance that a word is ever said of images that are like those of calibration


class Drift:
    """Compares where images left with the shares that their operating points state, window after window.

    A share is as uncertain as the calibration images and those of the window together make it. The more windows, the
    wider the interval (window w has 6 / (pi w)^2 of the error), so that all of them together keep the level.

    Args:
        window: images after which it is looked at.
    """

    def __init__(self, window: int) -> None:
        self.note: str | None = None
        self._window, self._windows, self._images = window, 0, 0
        self._known: dict[str, NDArray[np.float64]] = {}  # shares, variances of one image, deviations of the shares
        self._left: NDArray[np.float64] = np.zeros(0)
        self._sums: NDArray[np.float64] = np.zeros((3, 0))

    def saw(self, point: OperatingPoint, exits: Sequence[int] | NDArray[np.int64]) -> None:
        """Take in the exits (N,), counted from 0, at which the images of a batch left."""
        if point.images is None:
            return
        if point.name not in self._known:
            shares = np.array(point.exits)
            careful = (shares * point.images + 1) / (point.images + 2)  # nothing seen is not nothing possible
            variance = careful * (1 - careful)
            self._known[point.name] = np.stack([shares, variance, np.sqrt(variance / point.images)])
        sums = len(exits) * self._known[point.name]
        left = np.bincount(exits, minlength=sums.shape[1]).astype(np.float64)
        self._left, self._sums = (self._left + left, self._sums + sums) if self._images else (left, sums)
        self._images += len(exits)
        if self._images >= self._window:
            self._windows += 1
            self.note = self._odd([*point.thresholds])
            self._images = 0

    def _odd(self, names: Sequence[str]) -> str | None:
        error = FALSE_ALARM * 6 / (math.pi * self._windows) ** 2 / len(self._left)
        expected, fresh, fitted = self._sums
        half = NormalDist().inv_cdf(1 - error / 2) * np.sqrt(fresh + fitted**2)
        beyond = np.abs(self._left - expected) - half
        worst = int(beyond.argmax())
        if beyond[worst] <= 0:
            return None
        left, stated, around = 100 * np.array([self._left[worst], expected[worst], half[worst]]) / self._images
        place = f"at '{names[worst]}'" if worst < len(names) else "at the end"
        return (
            f"of the last {self._images} images {left:.1f} % left {place}, where calibration expects {stated:.1f} % "
            f"({max(0.0, stated - around):.1f} to {min(100.0, stated + around):.1f} %): they are unlike those that it "
            "saw, so accuracy may be lower too: calibrate again on images like these"
        )
