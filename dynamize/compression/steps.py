"""From the values that a tensor takes to the steps that its bytes stand for."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

RangeName = Literal["minmax", "percentile", "mse"]
_LEVELS = 255
_BINS = 2048
_SHRINKS = 60  # ranges that are tried, down to a fifth of the whole


class Steps(NamedTuple):
    """A byte q stands for ``scale * (q - zero_point)``."""

    scale: float = 1.0
    zero_point: int = 0


def steps_between(low: float, high: float) -> Steps:
    """Steps that reach from ``low`` to ``high``, with 0 among them exactly (Jacob et al. 2018, sec. 3)."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / _LEVELS
    if not scale > torch.finfo(torch.float32).tiny:
        return Steps()
    return Steps(scale, round(-low / scale))


class Observer:
    """What a tensor's values are, in two passes: first their range, then a histogram over it.

    Attributes:
        images: how many were seen in the first pass.
    """

    def __init__(self) -> None:
        self.images = 0
        self.low, self.high = 0.0, 0.0
        self._counts = torch.zeros(_BINS, dtype=torch.float64)

    def see_range(self, values: Tensor) -> None:
        """First pass: values (N, ...)."""
        self.images += len(values)
        if values.numel():
            low, high = values.aminmax()
            self.low, self.high = min(self.low, float(low)), max(self.high, float(high))

    def see_values(self, values: Tensor) -> None:
        """Second pass, over the same images."""
        if self.high > self.low:
            counts = torch.histc(values.float(), _BINS, self.low, self.high)
            self._counts += counts.cpu().double()

    def steps(self, ranges: RangeName, percentile: float) -> Steps:
        """The steps for these values.

        Args:
            ranges: ``minmax`` reaches over all of them; ``percentile`` leaves out a share at either end; ``mse``
                minimises the squared error of rounding and clipping.
            percentile: how many percent of the values stay inside, above 0 and below it.
        """
        if ranges == "minmax" or not float(self._counts.sum()):
            return steps_between(self.low, self.high)
        centres = self.low + (torch.arange(_BINS, dtype=torch.float64) + 0.5) * (self.high - self.low) / _BINS
        if ranges == "percentile":
            return self._at_percentile(centres, 1 - percentile / 100)
        shrinks = torch.linspace(1.0, 0.2, _SHRINKS).tolist()
        tried = [steps_between(self.low * shrink, self.high * shrink) for shrink in shrinks]
        return min(tried, key=lambda steps: self._error(centres, steps))

    def _at_percentile(self, centres: Tensor, outside: float) -> Steps:
        shares = self._counts.cumsum(0) / self._counts.sum()
        low = float(centres[int((shares <= outside).sum())]) if self.low < 0 else 0.0
        high = float(centres[min(int((shares < 1 - outside).sum()), _BINS - 1)])
        return steps_between(max(low, self.low), min(high, self.high))

    def _error(self, centres: Tensor, steps: Steps) -> float:
        scale, zero_point = steps
        found = ((centres / scale).round() + zero_point).clamp(0, _LEVELS) - zero_point
        return float((self._counts * (centres - found * scale) ** 2).sum())
