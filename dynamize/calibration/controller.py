"""Holding a wanted mean cost while load or images change, by moving along the operating points.

What is wanted is divided by how much dearer images are of late than calibration expected, and what was spent too much
or too little is paid back over the next images. As such debts are bounded, so is what the mean can differ by, whatever
drifts (Gibbs and Candes 2021, Adaptive Conformal Inference Under Distribution Shift, proposition 4.1, for the same
argument). Between two operating points their batches alternate, so that any mean between them can be held.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from dynamize.arguments import is_positive
from dynamize.calibration.drift import Drift
from dynamize.calibration.operating import OperatingPoint
from dynamize.errors import DynamizeError
from dynamize.measure.costs import Costs, exit_costs
from dynamize.measure.latency import synchronize
from dynamize.nn.executor import Routed
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting, setting_at

HORIZON = 500
_TRUSTED = 0.1  # of the horizon: how many images calibration counts for at first
_MOST_DEBT = 0.5  # of the horizon's wanted cost


class Runs(Protocol):
    """A compiled network, as far as it is used here."""

    network: DynamicNetwork
    device: object

    def run(self, images_NCHW: Tensor, setting: Setting | None = None) -> Routed: ...


class Controller:
    """Chooses the operating point of each batch.

    Give one of ``latency_ms``, ``macs_ratio`` and ``last_share``.

    Args:
        points: of the network, :attr:`DynamicNetwork.operating_points`.
        latency_ms: wanted mean milliseconds per image, of the network alone.
        macs_ratio: wanted mean MACs per image, as a share of the original network's.
        last_share: wanted share of the images that only the last exit answers: those that a cascade hands on to its
            last network.
        horizon: images over which the mean is held: fewer follow a change sooner, more move less without need.
        clock: seconds.

    Raises:
        DynamizeError: not exactly one is given, one is no positive number, or there are fewer than two points.

    Example:
        >>> import torch
        >>> net = dz.source("dynamize:digits_resnet", pretrained=True)
        >>> dyn = dz.convert(net, [dz.Exits(count=2)], (1, 8, 8))
        >>> images = torch.randn(200, 1, 8, 8)
        >>> points = dz.calibrate(dyn, [(images, net(images).argmax(1))], teacher=net)
        >>> fast, hold = dz.compile_network(dyn, "onnxruntime"), dz.Controller(points, macs_ratio=0.6)
        >>> for batch in images.split(50):
        ...     logits = hold.run(fast, batch).logits
    """

    def __init__(
        self,
        points: Iterable[OperatingPoint] | None,
        *,
        latency_ms: float | None = None,
        macs_ratio: float | None = None,
        last_share: float | None = None,
        horizon: int = HORIZON,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        given = {"latency_ms": latency_ms, "macs_ratio": macs_ratio, "last_share": last_share}
        self.held, self.wanted = _one_of(given)
        if not isinstance(horizon, int) or horizon < 1:
            raise DynamizeError(f"horizon={horizon!r} is no number of images: give for example {HORIZON}")
        every = list(points or [])
        known = self.held != "latency_ms" or all(point.latency_ms is not None for point in every)
        self._points, self._costs = _front(every, self.held if known else "macs_ratio")
        if len(self._points) < 2:
            raise DynamizeError(
                f"{len(self._points)} operating points leave nothing to choose from: calibrate the network first, for "
                "example with dz.calibrate"
            )
        self._horizon, self._clock = horizon, clock
        self._want = min(max(self.wanted, self._costs[0]), self._costs[-1]) if known else self._costs[0]
        trusted = _TRUSTED * horizon * self._want if known else 0.0
        self._seen, self._stated = trusted, trusted
        self._debt, self._carry = 0.0, 0.0
        self._drift = Drift(horizon)
        self._settings: dict[str, Setting] = {}
        self._macs: Costs | None = None
        self._choose()

    @property
    def point(self) -> OperatingPoint:
        """The operating point of the next batch."""
        return self._points[self._at]

    @property
    def dearer(self) -> float:
        """How many times what calibration expected images cost of late."""
        return self._seen / self._stated if self._stated and self._seen else 1.0

    @property
    def notes(self) -> list[str]:
        """What does not fit: a mean that no operating point has, or images that leave elsewhere than those that the
        network was calibrated on."""
        notes = [self._drift.note] if self._drift.note else []
        least = self._costs[0] * self.dearer
        if least > self.wanted * 1.05:
            notes.append(
                f"{self.held}={self.wanted:g} cannot be held: even at '{self._points[0].name}', the cheapest operating "
                f"point, it is about {least:.3g} now"
            )
        return notes

    def run(self, compiled: Runs, images_NCHW: Tensor) -> Routed:
        """Answer a batch at the operating point that is due, and learn from it."""
        setting = self._settings.setdefault(self.point.name, setting_at(self.point))
        started = self._clock()
        routed = compiled.run(images_NCHW, setting)
        synchronize(compiled.device)  # type: ignore[arg-type]
        seconds = self._clock() - started
        images = max(1, len(images_NCHW))
        if self.held == "latency_ms":
            self.saw(1e3 * seconds / images, routed.exits.numpy())
        elif self.held == "macs_ratio":
            self._macs = self._macs or exit_costs(compiled.network)
            whole = self.point.macs / self.point.macs_ratio
            self.saw(float(self._macs.executed(routed.taken, routed.images).sum()) / images / whole, routed.exits)
        else:
            self.saw(None, routed.exits.numpy())
        return routed

    def saw(self, mean: float | None, exits: Sequence[int] | np.ndarray | Tensor) -> None:
        """Learn from a batch that ran at :attr:`point`, and choose the next one.

        Args:
            mean: what is held, per image; None for ``last_share``, which ``exits`` tell.
            exits: (N,), where each image left, counted from 0.
        """
        left = np.asarray(exits, np.int64)
        if not len(left):
            return
        if self.held == "last_share":
            mean = float((left == len(self.point.exits) - 1).mean())
        elif not is_positive(mean):
            raise DynamizeError(f"{self.held} of a batch cannot be {mean!r}: give its mean per image")
        self._drift.saw(self.point, left)
        self._learn(float(mean or 0.0), len(left))
        self._choose()

    def _learn(self, mean: float, images: int) -> None:
        horizon = max(self._horizon, 2 * images)
        kept = math.exp(-images / horizon)
        self._seen = kept * self._seen + images * mean
        self._stated = kept * self._stated + images * self._costs[self._at]
        plain = self.wanted / self.dearer
        if self._costs[0] <= plain <= self._costs[-1]:  # what cannot be had is nobody's debt
            most = _MOST_DEBT * horizon * self.wanted
            self._debt = min(max(self._debt + images * (mean - self.wanted), -most), most)
        want = (self.wanted - self._debt / horizon) / self.dearer
        self._want = min(max(want, self._costs[0]), self._costs[-1])

    def _choose(self) -> None:
        """Of the two points around what is wanted, the one that brings the mean of those chosen nearer to it."""
        above = int(np.clip(np.searchsorted(self._costs, self._want), 1, len(self._costs) - 1))
        low, high = self._costs[above - 1], self._costs[above]
        due = self._want + self._carry
        self._at = above if due - low > high - due else above - 1
        self._carry = min(max(due - self._costs[self._at], low - high), high - low)


def _front(points: Sequence[OperatingPoint], held: str) -> tuple[list[OperatingPoint], list[float]]:
    """Points than which none is as cheap and as accurate, and what each costs, the cheapest first."""
    stated = {"latency_ms": lambda one: one.latency_ms, "macs_ratio": lambda one: one.macs_ratio}
    cost = stated.get(held, lambda one: one.exits[-1])
    front: list[OperatingPoint] = []
    for point in sorted(points, key=lambda one: (cost(one), -one.accuracy)):
        if not front or (point.accuracy > front[-1].accuracy and cost(point) > cost(front[-1])):
            front.append(point)
    return front, [cost(point) for point in front]


def _one_of(given: dict[str, float | None]) -> tuple[str, float]:
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) != 1:
        raise DynamizeError(
            f"{len(named)} wanted means were given ({', '.join(named) or 'none'}): give one of {', '.join(given)}"
        )
    ((name, value),) = named.items()
    if not is_positive(value):
        raise DynamizeError(f"{name}={value!r} is no mean that could be held: give a positive number")
    return name, float(value)
