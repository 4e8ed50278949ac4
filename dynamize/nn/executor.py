"""The one loop that runs a row of pieces: each for the images that need it, the undecided ones only.

Between two places where images may leave, images with large feature maps go by themselves, for then nothing is
gathered where a gate parts them; of smaller ones a few go together. A piece takes as many of these groups in turn as a
cache holds before the next piece does: its weights are there. How images are grouped changes no answer.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dynamize.devices import cache_bytes
from dynamize.errors import DynamizeError, closest
from dynamize.nn.flow import Flow, Indices, join
from dynamize.nn.piece import LEAVES, Effect, Piece, Run, Setting

_LARGE = 2**20  # bytes of an image's feature maps from which it goes by itself
CACHE = cache_bytes()


@dataclass(frozen=True)
class Stretch:
    """Neighbouring pieces between two places where images may leave or start again; ``grouped`` if one of them parts
    images."""

    runs: tuple[Run, ...]
    grouped: bool


@dataclass(frozen=True)
class Program:
    """A row as the executor runs it.

    Attributes:
        stretches: in order.
        leaving: names of the decisions at which images may leave, in order, idle ones too.
        changing: names of the others.
        options: how many options each decision has.
    """

    stretches: tuple[Stretch, ...]
    leaving: tuple[str, ...]
    changing: tuple[str, ...]
    options: Mapping[str, int]


def program(bound: Iterable[tuple[Piece, Run]], row: Sequence[Piece]) -> Program:
    """What runs these pieces, those of ``row`` that are needed."""
    stretches: list[Stretch] = []
    runs: list[Run] = []
    grouped = False
    for piece, run in bound:
        if piece.effect == "leaves" or piece.restarts:
            stretches += [Stretch(tuple(runs), grouped)] if runs else []
            stretches.append(Stretch((run,), False))
            runs, grouped = [], False
            continue
        runs.append(run)
        grouped = grouped or piece.effect is not None
    stretches += [Stretch(tuple(runs), grouped)] if runs else []
    options = {piece.name: piece.option_count for piece in row if piece.effect is not None}
    return Program(tuple(stretches), names(row, "leaves"), names(row, "changes"), options)


def names(row: Iterable[Piece], effect: Effect) -> tuple[str, ...]:
    """Of the pieces whose decisions have an effect."""
    return tuple(piece.name for piece in row if piece.effect == effect)


class Taken(ABC):
    """The options that images took, and what follows from them.

    Attributes:
        leaving: names of the decisions at which images may leave, in order.
        changing: names of the others.
        images: N.
    """

    leaving: Sequence[str]
    changing: Sequence[str]
    images: int

    @property
    @abstractmethod
    def taken(self) -> dict[str, Tensor]:
        """By decision, the option of each image in order, (N,), int64; -1 where it was not reached."""

    @property
    def exits(self) -> Tensor:
        """Where each image left, (N,), int64: the number of that decision among those that leave; the end is last."""
        return exits_of(self.taken, self.leaving, self.images)

    @property
    def choices(self) -> Tensor:
        """Options of what changes side by side, (N, U), int64; -1 where the image left before."""
        taken = self.taken
        columns = [taken[name] for name in self.changing]
        return torch.stack(columns, 1) if columns else torch.zeros(self.images, 0, dtype=torch.int64)


class Routed(Taken):
    """The outcome for a batch.

    Attributes:
        logits: (N, classes).
        seen: where nobody leaves: (decision, logits, score) of each place where images may.
    """

    def __init__(self, flow: Flow, leaving: Sequence[str], changing: Sequence[str]) -> None:
        self.logits = _in_order(flow.answered)
        self.seen = flow.seen or []
        self.leaving, self.changing = leaving, changing
        self._log, self._chosen, self.images = flow.log, flow.chosen, len(flow.images)

    @property
    def taken(self) -> dict[str, Tensor]:
        found = {name: np.full(self.images, -1) for name in (*self.leaving, *self.changing)}
        for name, rows, options in self._log:
            found[name][rows] = options
        return {name: torch.from_numpy(options) for name, options in found.items()}

    @property
    def crops(self) -> dict[str, Tensor]:
        """By network that saw a part of each image: left, top, right and bottom of it in pixels, (N, 4), int64; -1 for
        images that it was not asked about."""
        found: dict[str, Indices] = {}
        for name, rows, corners, (height, width) in self._chosen:
            boxes = found.setdefault(name, np.full((self.images, 4), -1))
            top, left = corners.T
            boxes[rows] = np.stack([left, top, left + width, top + height], axis=1)
        return {name: torch.from_numpy(boxes) for name, boxes in found.items()}


def exits_of(taken: Mapping[str, Tensor], leaving: Sequence[str], images: int) -> Tensor:
    """Number of the place at which each image left, (N,), from the options taken; the end is the last."""
    exits = torch.full((images,), len(leaving), dtype=torch.int64)
    for k, name in reversed(list(enumerate(leaving))):
        exits[taken[name] == LEAVES] = k
    return exits


def execute(
    ran: Program, setting: Setting, images_NCHW: Tensor, *, everyone: bool = False, cache: int = CACHE
) -> Routed:
    """Run a batch at a setting.

    Args:
        ran: what runs.
        setting: thresholds and forced options for decisions that there are; one option for each image.
        images_NCHW: the batch.
        everyone: nobody leaves: all places where images may leave answer all images.
        cache: bytes of the processor's last cache, by which images are grouped.

    Raises:
        DynamizeError: the setting names other decisions, or forces options of more or fewer images.
    """
    _check(setting, ran, len(images_NCHW))
    flow = Flow(images_NCHW, everyone)
    for stretch in ran.stretches:
        if stretch.grouped and len(flow) > 1:
            flow = join(_in_groups(stretch.runs, setting, [flow], cache))
        else:
            for run in stretch.runs:
                run(flow, setting)
        if flow.answered and not len(flow):
            break
    if len(flow) or not flow.answered:
        flow.answered.append((flow.rows, flow.features))
    return Routed(flow, ran.leaving, ran.changing)


def _check(setting: Setting, ran: Program, images: int) -> None:
    unknown = [name for name in setting.thresholds if name not in ran.leaving]
    unknown += [name for name in setting.forced if name not in ran.leaving and name not in ran.changing]
    if unknown:
        known = [*ran.leaving, *ran.changing]
        raise DynamizeError(
            f"the setting names '{unknown[0]}', which is no such decision of this network. "
            f"{closest(unknown[0], known)}Known: {', '.join(known) or 'none'}."
        )
    for name, options in setting.forced.items():
        if len(options) != images:
            raise DynamizeError(
                f"options of {len(options)} images are forced at '{name}', but the batch has {images}: give one for "
                "each image"
            )
        most = ran.options[name] - 1
        if images and not (int(options.min()) >= -1 and int(options.max()) <= most):
            raise DynamizeError(f"an option of '{name}' is forced that it does not have: give 0 to {most}")


def _in_groups(runs: Sequence[Run], setting: Setting, flows: Sequence[Flow], cache: int) -> Sequence[Flow]:
    """Run all pieces; where feature maps get twice or half as large, other numbers of images suit them."""
    flows = _regrouped(flows, cache)
    size, ran = flows[0].size, len(runs)
    in_turn = max(1, cache // 2 // max(1, size * len(flows[0])))
    found: list[Flow] = []
    larger = False
    for start in range(0, len(flows), in_turn):
        some = flows[start : start + in_turn]
        for count, run in enumerate(runs[:ran], start=1):
            for flow in some:
                run(flow, setting)
            if not size < 2 * some[0].size < 4 * size:
                ran = count
                break
        larger = some[0].size > size  # then these images go on before the next come, which would fill the cache
        found += _in_groups(runs[ran:], setting, some, cache) if larger and ran < len(runs) else some
    return found if larger or ran == len(runs) else _in_groups(runs[ran:], setting, found, cache)


def _regrouped(flows: Sequence[Flow], cache: int) -> Sequence[Flow]:
    """The same images in flows of the size that suits their features."""
    size = flows[0].size
    rows = 1 if size >= _LARGE else max(1, cache // 8 // max(1, size))
    if max(map(len, flows)) <= rows and (rows == 1 or len(flows) == 1):
        return flows
    return join(flows).split(rows)


def _in_order(answered: list[tuple[Indices, Tensor]]) -> Tensor:
    """Logits of all images from those of each place where some have left."""
    if len(answered) == 1:  # all left at once, so their order is the images'
        return answered[0][1]
    order = np.concatenate([images for images, _ in answered])
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return torch.cat([logits for _, logits in answered])[torch.from_numpy(place)]
