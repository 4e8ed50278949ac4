"""Per-sample execution: run a stage, let the decided samples go, go on with the others only."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from dynamize.nn.dispatch import Piece
    from dynamize.nn.network import DynamicNetwork

Indices = NDArray[np.int64]
_NOBODY = np.zeros(0, np.int64)
_ONLY = np.zeros(1, np.int64)  # the row of a single image


class StageOutput(NamedTuple):
    """What one stage hands on.

    Attributes:
        features: (N, C, H, W) for the next stage; None after the last one.
        context: (N, D) that later exits build on, or None.
        logits: (N, classes), or None where the exit was not asked for.
        score: (N,) confidence, or None for the last exit and where it was not asked for.
        choices: (N, units of this stage) path that each image took through each gated unit, or None without units.
    """

    features: Tensor | None
    context: Tensor | None
    logits: Tensor | None
    score: Tensor | None
    choices: Tensor | None = None


class Routed(NamedTuple):
    """The outcome for a batch.

    Attributes:
        logits: (N, classes).
        exits: (N,), int64, the exit that each answer came from.
        choices: (N, U), int64, the path taken through each gated unit, -1 where the image left before.
    """

    logits: Tensor
    exits: Tensor
    choices: Tensor


class Stage(Protocol):
    """A segment of ``network`` with the exit behind it, on any backend."""

    network: "DynamicNetwork"

    def __call__(self, features: Tensor, context: Tensor | None, decide: bool) -> StageOutput: ...

    def pieces(self) -> "list[Piece]":
        """What a stage with gates consists of; empty without gates."""
        ...


def run_stages(stages: Sequence[Stage], thresholds: Sequence[float | None], images_NCHW: Tensor) -> Routed:
    """Answer each image from the first exit whose score reaches its threshold.

    Args:
        stages: K stages; the last one answers whoever reaches it.
        thresholds: one for each of the K - 1 early exits; None switches an exit off.
        images_NCHW: the batch.
    """
    features, context = images_NCHW, None
    waiting_N = np.arange(len(images_NCHW))  # row r of `features` belongs to image waiting[r]
    exits_N = np.zeros(len(images_NCHW), np.int64)
    answered: list[tuple[Indices, Tensor]] = []
    chosen: list[tuple[Indices, Tensor]] = []
    for k, stage in enumerate(stages):
        last = k == len(stages) - 1
        threshold = None if last else thresholds[k]
        output = stage(features, context, last or threshold is not None)
        if output.choices is not None:
            chosen.append((waiting_N.copy(), output.choices))
        if output.logits is not None:
            leaving_N = _leaving(output.score, threshold, len(waiting_N))
            exits_N[waiting_N[leaving_N]] = k
            if len(leaving_N) == len(waiting_N):
                answered.append((waiting_N, output.logits))
                break
            if len(leaving_N):
                answered.append((waiting_N[leaving_N], output.logits[torch.from_numpy(leaving_N)]))
        else:
            leaving_N = _NOBODY
        assert output.features is not None
        features, context, waiting_N = _compact(output.features, output.context, waiting_N, leaving_N)
    choices_NU = _all_choices(chosen, stages, len(images_NCHW))
    return Routed(_in_order(answered), torch.from_numpy(exits_N), choices_NU)


def _leaving(score_N: Tensor | None, threshold: float | None, count: int) -> Indices:
    """Rows whose score reaches the threshold; without one, as at the last exit, all."""
    if score_N is None or threshold is None:
        return np.arange(count)
    if count == 1:  # a single image waits for every microsecond between two sessions
        return _ONLY if score_N.item() >= threshold else _NOBODY
    scores = score_N.detach().cpu().numpy().astype(np.float64)  # in float32 the threshold would be rounded
    return np.flatnonzero(scores >= threshold)


def _in_order(answered: list[tuple[Indices, Tensor]]) -> Tensor:
    """Logits of all images from those of each exit."""
    if len(answered) == 1:  # all left at once, so their order is the images'
        return answered[0][1]
    order = np.concatenate([images for images, _ in answered])
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return torch.cat([logits for _, logits in answered])[torch.from_numpy(place)]


def _all_choices(chosen: list[tuple[Indices, Tensor]], stages: Sequence[Stage], images: int) -> Tensor:
    """Side by side for all images, -1 for those that a stage did not see."""
    if len(chosen) == 1 and len(stages) == 1:
        return chosen[0][1].cpu()
    whole = torch.full((images, len(stages[0].network.units)), -1)
    start = 0
    for rows, choices in chosen:
        whole[torch.from_numpy(rows), start : start + choices.shape[1]] = choices.cpu()
        start += choices.shape[1]
    return whole


def _compact(
    features: Tensor, context: Tensor | None, waiting: Indices, leaving: Indices
) -> tuple[Tensor, Tensor | None, Indices]:
    """Drop the rows that leave by moving rows from the end into their places.

    At most min(leaving, staying) rows are copied, so compaction is cheaper than any stage it shortens, whatever the
    share that leaves; the order of the images is kept in ``waiting``, not in the rows.
    """
    if not len(leaving):
        return features, context, waiting
    staying = len(waiting) - len(leaving)
    stays = np.ones(len(waiting), bool)
    stays[leaving] = False
    holes = leaving[leaving < staying]
    fillers = np.flatnonzero(stays[staying:]) + staying
    kept = np.arange(staying)
    kept[holes] = fillers
    if torch.is_grad_enabled():  # even of frozen features a head keeps the rows for its own gradient
        rows = torch.from_numpy(kept)
        return features[rows], None if context is None else context[rows], waiting[kept]
    for tensor in (features, context):
        if tensor is not None and len(holes):
            _move_rows(tensor, holes, fillers)
    return features[:staying], None if context is None else context[:staying], waiting[kept]


def _move_rows(rows: Tensor, targets: Indices, sources: Indices) -> None:
    """Copy rows within a tensor. Contiguous ones on the CPU are copied by numpy: a parallel region of torch would leave
    its threads spinning against those of ONNX Runtime, which costs more than the copy."""
    if rows.device.type == "cpu" and rows.is_contiguous() and rows.dtype != torch.bfloat16:
        array = rows.numpy()
        array[targets] = array[sources]
    else:
        rows[torch.from_numpy(targets)] = rows[torch.from_numpy(sources)]


@dataclass
class Routing:
    """Which exit each image left at and which path it took through each gated unit, batch after batch."""

    batches: list[Tensor] = field(default_factory=list)
    paths: list[Tensor] = field(default_factory=list)

    def add(self, routed: Routed) -> None:
        """Keep the routing of a batch."""
        self.batches.append(routed.exits)
        self.paths.append(routed.choices)

    @property
    def exits(self) -> Tensor:
        """Exit index of every image seen, in order, (N,), int64."""
        return torch.cat(self.batches) if self.batches else torch.zeros(0, dtype=torch.int64)

    @property
    def choices(self) -> Tensor:
        """Path index of every image through every gated unit, (N, U), int64; -1 where it left before."""
        if not self.paths:
            return torch.zeros(0, 0, dtype=torch.int64)
        return torch.cat(self.paths)

    def shares(self, count: int) -> list[float]:
        """Share of the images that left at each of ``count`` exits."""
        seen = torch.bincount(self.exits, minlength=count)
        return (seen / max(1, int(seen.sum()))).tolist()


@contextmanager
def record_routing(network: "DynamicNetwork") -> Iterator[Routing]:
    """Record which exit each image takes while ``network`` runs in eval mode inside the block.

    Example:
        >>> import torch
        >>> net = dz.source("dynamize:digits_resnet", pretrained=True)
        >>> dyn = dz.convert(net, [dz.Exits(count=2)], (1, 8, 8))
        >>> with dz.record_routing(dyn) as routing:  # all exits are off: images leave at the last of three
        ...     logits = dyn(torch.randn(2, 1, 8, 8))
        >>> routing.exits.tolist()
        [2, 2]
    """
    outer, network.routing = network.routing, Routing()
    try:
        yield network.routing
    finally:
        network.routing = outer
