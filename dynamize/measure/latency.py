"""Latency by comparison: contenders take turns on the same inputs in one process, so a ratio survives a noisy
machine where a single time does not. A turn is several calls, before which one is not counted: a network in use finds
its weights in the cache, and would pay here for those of the others."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

Contender = Callable[[Tensor], object]
_FEWEST_ROUNDS = 5
LEAST_ROUNDS = _FEWEST_ROUNDS + 1  # with the one that is not counted
_TURN = 16  # short against the seconds over which a clock or a neighbour changes
REST = 0.05  # seconds: ONNX Runtime's threads spin for 0.04 after a call, against those of another backend
DISTURBED = "while latency was measured"  # said in each warning of a disturbed measurement
_BUSY = 0.15  # cores that other processes may use before timings are called unreliable


@dataclass(frozen=True)
class Times:
    """Seconds by contender, (rounds, inputs) each, and how many cores other processes used meanwhile."""

    seconds: dict[str, NDArray[np.float64]]
    busy_elsewhere: float

    def median_ms(self, name: str) -> float:
        """Mean time of a call over the inputs, median over rounds, in milliseconds."""
        return float(np.median(self.seconds[name].mean(axis=1))) * 1e3

    def p95_ms(self, name: str) -> float:
        """95th percentile over all calls, in milliseconds."""
        return float(np.percentile(self.seconds[name], 95)) * 1e3

    def speedup(self, static: str, name: str) -> float:
        """How many times faster than ``static`` over the same inputs: median over rounds of the ratio."""
        return float(np.median(self.seconds[static].sum(axis=1) / self.seconds[name].sum(axis=1)))

    def warnings(self) -> list[str]:
        """A sentence if other processes disturbed the measurement."""
        if self.busy_elsewhere < _BUSY:
            return []
        return [f"other processes used {self.busy_elsewhere:.1f} cores while latency was measured: repeat it alone"]


def interleave(
    contenders: Mapping[str, Contender],
    inputs: Sequence[Tensor],
    device: torch.device,
    seconds: float = 5.0,
    rest: float = 0.0,
) -> Times:
    """Time every contender on every input, round after round, in rotating order.

    In a round a contender has turns of at most ``_TURN`` inputs. The first round warms up and is not counted; at least
    five are.

    Args:
        contenders: name -> what is called with an input.
        inputs: batches (N, C, H, W) already on ``device``.
        seconds: how long to go on.
        rest: seconds of quiet before each turn; :data:`REST` where contenders are on different backends.
    """
    names = list(contenders)
    rounds: list[NDArray[np.float64]] = []
    foreign = _ForeignLoad()
    started = time.perf_counter()
    while len(rounds) < LEAST_ROUNDS or time.perf_counter() - started < seconds:
        taken = np.zeros((len(names), len(inputs)))
        for turn, first in enumerate(range(0, len(inputs), _TURN)):
            some = inputs[first : first + _TURN]
            for j in np.roll(np.arange(len(names)), -(turn + len(rounds))):
                time.sleep(rest)
                taken[j, first : first + _TURN] = _turn(contenders[names[j]], some, device)
        rounds.append(taken)
    counted = np.stack(rounds[1:])
    return Times({name: counted[:, j] for j, name in enumerate(names)}, foreign.cores())


def _turn(contender: Contender, inputs: Sequence[Tensor], device: torch.device) -> list[float]:
    contender(inputs[0])
    taken = []
    for batch in inputs:
        synchronize(device)
        before = time.perf_counter()
        contender(batch)
        synchronize(device)
        taken.append(time.perf_counter() - before)
    return taken


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class _ForeignLoad:
    """Cores that other processes keep busy, from creation until :meth:`cores`."""

    def __init__(self) -> None:
        self._start = self._read()

    def _read(self) -> tuple[float, float, float]:
        machine, own = psutil.cpu_times(), psutil.Process().cpu_times()
        busy = sum(machine) - machine.idle - getattr(machine, "iowait", 0.0) - getattr(machine, "steal", 0.0)
        return busy, own.user + own.system, time.perf_counter()

    def cores(self) -> float:
        busy, own, at = self._read()
        return max(0.0, (busy - self._start[0]) - (own - self._start[1])) / max(1e-9, at - self._start[2])
