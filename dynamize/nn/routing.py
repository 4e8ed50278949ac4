"""Per-sample execution: run a stage, let the decided samples go, go on with the others only."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dynamize.nn.gated import Piece
    from dynamize.nn.network import DynamicNetwork

_FIRST = torch.tensor([0])


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
    if len(images_NCHW) == 1:
        return _run_one(stages, thresholds, images_NCHW)
    features, context = images_NCHW, None
    exits_N = torch.zeros(len(images_NCHW), dtype=torch.int64)
    logits_NK: Tensor | None = None
    waiting = torch.arange(len(images_NCHW))  # row r of `features` belongs to image waiting[r]
    chosen: list[tuple[Tensor, Tensor]] = []
    for k, stage in enumerate(stages):
        last = k == len(stages) - 1
        threshold = None if last else thresholds[k]
        output = stage(features, context, last or threshold is not None)
        if output.choices is not None:
            chosen.append((waiting.clone(), output.choices))
        if output.logits is None:
            assert output.features is not None
            features, context = output.features, output.context
            continue
        if last:
            leaves_N = torch.ones(len(waiting), dtype=torch.bool)
        else:
            assert output.score is not None
            assert threshold is not None
            leaves_N = output.score.cpu().double() >= threshold  # in float32 the threshold would be rounded
        leaving = leaves_N.nonzero().flatten()
        if len(leaving) == len(images_NCHW):
            return Routed(output.logits, exits_N.fill_(k), _all_choices(chosen, stages, len(images_NCHW)))
        if len(leaving):
            if logits_NK is None:
                logits_NK = output.logits.new_empty(len(images_NCHW), output.logits.shape[1])
            logits_NK[waiting[leaving]] = output.logits[leaving]
            exits_N[waiting[leaving]] = k
        if len(leaving) == len(waiting):
            break
        assert output.features is not None
        features, context, waiting = _compact(output.features, output.context, waiting, leaves_N)
    assert logits_NK is not None
    return Routed(logits_NK, exits_N, _all_choices(chosen, stages, len(images_NCHW)))


def _run_one(stages: Sequence[Stage], thresholds: Sequence[float | None], image: Tensor) -> Routed:
    """The same for a batch of one, without the bookkeeping, which a small network would feel."""
    features, context = image, None
    chosen: list[tuple[Tensor, Tensor]] = []
    for k, stage in enumerate(stages):
        last = k == len(stages) - 1
        threshold = None if last else thresholds[k]
        output = stage(features, context, last or threshold is not None)
        if output.choices is not None:
            chosen.append((_FIRST, output.choices))
        if last:
            break
        if threshold is not None:
            assert output.score is not None
            if output.score.item() >= threshold:
                break
        assert output.features is not None
        features, context = output.features, output.context
    assert output.logits is not None
    return Routed(output.logits, torch.tensor([k]), _all_choices(chosen, stages, 1))


def _all_choices(chosen: list[tuple[Tensor, Tensor]], stages: Sequence[Stage], images: int) -> Tensor:
    """Side by side for all images, -1 for those that a stage did not see."""
    whole = torch.full((images, len(stages[0].network.units)), -1)
    start = 0
    for rows, choices in chosen:
        whole[rows, start : start + choices.shape[1]] = choices.cpu()
        start += choices.shape[1]
    return whole


def _compact(
    features: Tensor, context: Tensor | None, waiting: Tensor, leaves: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Drop the rows that leave by moving rows from the end into their places.

    At most min(leaving, staying) rows are copied, so compaction is cheaper than any stage it shortens, whatever the
    share that leaves; the order of the images is kept in ``waiting``, not in the rows.
    """
    staying = len(waiting) - int(leaves.sum())
    if staying == len(waiting):
        return features, context, waiting
    holes = leaves[:staying].nonzero().flatten()
    fillers = (~leaves[staying:]).nonzero().flatten() + staying
    if torch.is_grad_enabled():  # even of frozen features a head keeps the rows for its own gradient
        kept = torch.arange(staying).index_copy(0, holes, fillers)
        return features[kept], None if context is None else context[kept], waiting[kept]
    for rows in (features, context, waiting):
        if rows is not None and len(holes):
            _move_rows(rows, holes, fillers)
    return features[:staying], None if context is None else context[:staying], waiting[:staying]


def _move_rows(rows: Tensor, targets: Tensor, sources: Tensor) -> None:
    """Copy rows within a tensor. Contiguous ones on the CPU are copied by numpy: a parallel region of torch would leave
    its threads spinning against those of ONNX Runtime, which costs more than the copy."""
    if rows.device.type == "cpu" and rows.is_contiguous() and rows.dtype != torch.bfloat16:
        array = rows.numpy()
        array[targets.numpy()] = array[sources.numpy()]
    else:
        rows[targets] = rows[sources]


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
    """Record which exit each image takes while ``network`` runs in eval mode inside the block."""
    outer, network.routing = network.routing, Routing()
    try:
        yield network.routing
    finally:
        network.routing = outer
