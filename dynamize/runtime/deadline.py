"""Answers by a deadline: at each place where images may leave, all do if what comes next would take too long.

How long it takes from one such place to the next is measured where it runs: in a rehearsal, and from then on whenever
it runs. Images that are still on their way get the answer of the last classifier that they passed.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamize.arguments import is_positive
from dynamize.errors import DynamizeError
from dynamize.measure.latency import synchronize
from dynamize.nn.executor import Routed
from dynamize.nn.flow import NOBODY, Indices
from dynamize.nn.piece import Piece, Setting

_START, _END, _LEFT = "(start)", "(end)", "(left)"  # beside places; left: all did, and answers are put in order
_REHEARSALS = 3
_GAIN, _SPREAD_GAIN, _SPREADS = 1 / 8, 1 / 4, 4.0  # of a running mean and its deviation, as in RFC 6298 (Jacobson 1988)
_FIRST_SPREAD = 0.05
_FORGOTTEN = 1 / 256  # of what a stretch takes beyond its rehearsal, each time that it does not run


@dataclass(frozen=True)
class Timely:
    """How a batch was answered by a deadline.

    Attributes:
        routed: logits (N, classes), and the options that each image took.
        cut: (N,), bool: the images that would have gone on, and were answered for want of time.
        place: where they were; None if all went their whole way.
        first: whether nobody came further than the first place that gives answers, before which nothing can be cut.
        took_ms: until the answers were there.
        late_ms: by how much that is more than the deadline; 0 if it is not.
    """

    routed: Routed
    cut: Tensor
    place: str | None
    first: bool
    took_ms: float
    late_ms: float

    @property
    def logits(self) -> Tensor:
        """(N, classes)."""
        return self.routed.logits


@dataclass
class Stretch:
    """How long it takes from one place to the next.

    Attributes:
        rehearsed: by number of images, the least seconds of some runs.
        pace: by which factor it takes longer of late.
        spread: mean deviation of that factor.
    """

    rehearsed: dict[int, float] = field(default_factory=dict)
    pace: float = 1.0
    spread: float = _FIRST_SPREAD
    _passed_over: bool = False

    def rehearse(self, images: int, seconds: float) -> None:
        """Take in one run of a rehearsal."""
        self.rehearsed[images] = min(seconds, self.rehearsed.get(images, math.inf))

    def usual(self, images: int) -> float:
        """Seconds in rehearsal: interpolated, and in proportion for more images than were rehearsed."""
        sizes = sorted(self.rehearsed)
        seconds = float(np.interp(images, sizes, [self.rehearsed[size] for size in sizes]))
        return max(1e-9, seconds * max(1.0, images / sizes[-1]))

    def expected(self, images: int) -> float:
        """Seconds that it will hardly exceed."""
        return self.usual(images) * (self.pace + _SPREADS * self.spread)

    def note(self, images: int, seconds: float) -> None:
        """Learn from a run."""
        seen = seconds / self.usual(images)
        if self._passed_over:  # what was known is old
            self.pace, self._passed_over = max(seen, 1.0), False
            return
        self.spread += _SPREAD_GAIN * (abs(seen - self.pace) - self.spread)
        self.pace += _GAIN * (seen - self.pace)

    def pass_over(self) -> None:
        """It was thought too long, and did not run: what was slow for a while must not be thought so for ever."""
        self._passed_over = True
        self.spread -= _FORGOTTEN * self.spread
        self.pace -= _FORGOTTEN * max(0.0, self.pace - 1)


class Watch:
    """Follows one batch by the clock: what a setting's ``ends`` asks.

    Args:
        clock: seconds.
        images: N.
        too_late: whether so many images that go on from a place now would be late; without it nobody is held up.
    """

    def __init__(
        self, clock: Callable[[], float], images: int, too_late: Callable[[str, int, float], bool] | None = None
    ) -> None:
        self._clock, self._too_late = clock, too_late
        self.place: str | None = None
        self.cut = NOBODY
        self.seen = [(_START, images, clock())]  # where, how many went on, and when

    def __call__(self, place: str, going_on: Indices) -> bool:
        now, images = self._clock(), len(going_on)
        late = images > 0 and self._too_late is not None and self._too_late(place, images, now)
        if late:
            self.place, self.cut = place, going_on
        self.seen.append((place, 0 if late else images, now))
        return late

    def stretches(self, done: float) -> Iterator[tuple[str, str, int, float]]:
        """From where to where, images and seconds, of all that ran, if the answers were there at ``done``."""
        end = _END if self.seen[-1][1] else _LEFT
        for (place, images, at), (after, _, then) in pairwise([*self.seen, (end, 0, done)]):
            yield place, after, images, then - at


class Deadlines:
    """Runs a network by deadlines, and keeps what it learns of its times.

    Args:
        run: runs a batch at a setting.
        row: the pieces that it runs.
        device: on which they run.
        clock: seconds.
    """

    def __init__(
        self,
        run: Callable[[Tensor, Setting], Routed],
        row: Sequence[Piece],
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._run, self._device, self._clock = run, device, clock
        self._leaving = [piece for piece in row if piece.effect == "leaves"]
        self._stretches: dict[tuple[str, str], Stretch] = {}
        self._rehearsed: dict[tuple[str, ...], int] = {}

    def answer(self, images_NCHW: Tensor, setting: Setting, deadline_ms: float) -> Timely:
        """The best answers that there are when the time is up.

        Places that are off at this setting give answers too where the whole way might take too long. The first call for
        more images than before rehearses first, which is not counted.

        Raises:
            DynamizeError: the deadline is no positive number.
        """
        seconds = seconds_of(deadline_ms)
        if not len(images_NCHW):
            return Timely(self._run(images_NCHW, setting), torch.zeros(0, dtype=torch.bool), None, False, 0.0, 0.0)
        self.rehearse(images_NCHW, setting)
        started = self._clock()
        if self._whole(setting, len(images_NCHW)) > seconds:
            setting = self._everywhere(setting)
        watch = Watch(self._clock, len(images_NCHW), self._by(started + seconds, setting, len(images_NCHW)))
        routed, done = self._followed(images_NCHW, setting, watch)
        for place, after, count, took in watch.stretches(done):
            self._between(place, after).note(self._counted(after, count, len(images_NCHW)), took)
        cut = torch.zeros(len(images_NCHW), dtype=torch.bool)
        cut[torch.from_numpy(watch.cut)] = True
        took = done - started
        first = len(watch.seen) == 2
        return Timely(routed, cut, watch.place, first, 1e3 * took, 1e3 * max(0.0, took - seconds))

    def rehearse(self, images_NCHW: Tensor, setting: Setting) -> None:
        """Measure how long each stretch takes for these images and for fewer, if so many were not rehearsed yet."""
        every = len(images_NCHW)
        for way in (setting, self._everywhere(setting)):
            asked = self._asked(way)
            if self._rehearsed.get(asked, 0) >= every:
                continue
            for count in sorted({every, *(4**power for power in range(every.bit_length()) if 4**power < every)}):
                self._rehearse(images_NCHW[:count], way)
            self._rehearsed[asked] = every

    def _rehearse(self, images_NCHW: Tensor, setting: Setting) -> None:
        """Some runs in which nobody leaves, and some in which all leave at the first place; the first of each, in which
        memory is made, does not count."""
        count = len(images_NCHW)
        staying = replace(setting, forced={}, thresholds=dict.fromkeys(self._asked(setting), math.inf))
        for too_late in (None, lambda place, images, now: True):
            for number in range(_REHEARSALS + 1):
                watch = Watch(self._clock, count, too_late)
                _, done = self._followed(images_NCHW, staying, watch)
                for place, after, images, took in watch.stretches(done):
                    if number and (too_late is None or after == _LEFT):
                        self._between(place, after).rehearse(self._counted(after, images, count), took)

    def _followed(self, images_NCHW: Tensor, setting: Setting, watch: Watch) -> tuple[Routed, float]:
        """The outcome of a batch, and when it was there."""
        routed = self._run(images_NCHW, replace(setting, ends=watch))
        synchronize(self._device)
        return routed, self._clock()

    def _by(self, until: float, setting: Setting, every: int) -> Callable[[str, int, float], bool]:
        following = dict(pairwise([*self._asked(setting), _END]))

        def too_late(place: str, images: int, now: float) -> bool:
            after = following[place]
            coming = self._between(place, after)
            rest = 0.0 if after == _END else self._between(after, _LEFT).expected(every)
            if now + coming.expected(images) + rest <= until:
                return False
            coming.pass_over()
            return True

        return too_late

    def _whole(self, setting: Setting, images: int) -> float:
        """Seconds that the whole way hardly exceeds."""
        way = [_START, *self._asked(setting), _END]
        return sum(self._between(place, after).expected(images) for place, after in pairwise(way))

    def _asked(self, setting: Setting) -> tuple[str, ...]:
        return tuple(piece.name for piece in self._leaving if not piece.idle(setting))

    def _everywhere(self, setting: Setting) -> Setting:
        """With all places on; nobody leaves of his own accord where the setting has them off."""
        given = setting.thresholds
        on = {piece.name: given.get(piece.name) for piece in self._leaving}
        return replace(setting, thresholds={name: math.inf if one is None else one for name, one in on.items()})

    def _between(self, place: str, after: str) -> Stretch:
        key = (_LEFT, _LEFT) if after == _LEFT else (place, after)
        return self._stretches.setdefault(key, Stretch())

    def _counted(self, after: str, going_on: int, every: int) -> int:
        """By how many images a stretch is known: putting answers in order takes all of a batch."""
        return every if after == _LEFT else going_on


def seconds_of(deadline_ms: Any) -> float:
    """A deadline in seconds.

    Raises:
        DynamizeError: it is no positive number.
    """
    if not is_positive(deadline_ms):
        raise DynamizeError(
            f"a deadline of {deadline_ms!r} cannot be kept: give milliseconds above 0, for example 5, or leave it out"
        )
    return float(deadline_ms) / 1e3


def deadline_notes(batches: Sequence[Timely], deadline_ms: float) -> list[str]:
    """Sentences on what a deadline made of some batches."""
    cut, images = sum(int(one.cut.sum()) for one in batches), sum(len(one.cut) for one in batches)
    late = [one for one in batches if one.late_ms]
    notes = [f"{cut} of {images} images were answered where they were when the time was up"] if cut else []
    if late:
        worst = max(late, key=lambda one: one.late_ms)
        reason = "the first answer takes that long" if all(one.first for one in late) else "something else took time"
        notes.append(
            f"{len(late)} of {len(batches)} batches missed the deadline of {deadline_ms:g} ms, by "
            f"{worst.late_ms:.2g} ms at most: {reason}"
        )
    return notes
