"""What leaving at each exit costs, in multiply-accumulates."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dynamize.graph.macs import count_macs, counting_macs
from dynamize.graph.trace import blank
from dynamize.nn.gated import GatedSegment, Unit
from dynamize.nn.heads import ExitHead, extend_context
from dynamize.nn.network import DynamicNetwork


@dataclass(frozen=True)
class ExitCosts:
    """MACs per image of each segment (K,) and each head (K,); the last entry of ``heads`` is the last exit's fusion.

    In a chained network every head on the way runs; otherwise one whose exit is off does not. Segments are counted
    with all gates open; ``saved`` is, for each gated unit, what each path (P,) costs less, and ``stages`` the segment
    that the unit is in.
    """

    segments: NDArray[np.float64]
    heads: NDArray[np.float64]
    chained: bool
    saved: tuple[NDArray[np.float64], ...] = ()
    stages: tuple[int, ...] = ()

    def cumulative(self, thresholds: Sequence[float | None] | None = None) -> NDArray[np.float64]:
        """MACs of leaving at each exit (K,); with all exits on where no thresholds are given."""
        runs = np.ones(len(self.heads), dtype=bool)
        if thresholds is not None and not self.chained:
            runs[:-1] = [threshold is not None for threshold in thresholds]
        return cast(NDArray[np.float64], np.cumsum(self.segments + self.heads * runs))

    def executed(
        self, exits_N: NDArray[np.int64], choices_NU: NDArray[np.int64], thresholds: Sequence[float | None]
    ) -> NDArray[np.float64]:
        """MACs that each image (N,) cost that left at these exits and took these paths (-1: left before)."""
        macs = self.cumulative(thresholds)[exits_N]
        return cast(NDArray[np.float64], macs - self.savings(choices_NU).sum(axis=1))

    def savings(self, choices_NU: NDArray[np.int64]) -> NDArray[np.float64]:
        """MACs that each image saves in each gated unit, (N, U); choices may lack units that no image came to."""
        choices_NU = np.pad(choices_NU, ((0, 0), (0, len(self.saved) - choices_NU.shape[1])), constant_values=-1)
        columns = [np.append(saved, 0.0)[choices_NU[:, u]] for u, saved in enumerate(self.saved)]
        return np.stack(columns, axis=1) if columns else np.zeros((len(choices_NU), 0))


def exit_costs(network: DynamicNetwork) -> ExitCosts:
    """Count one blank image through every segment and head, gates open."""
    training = network.training
    network.eval()
    features, context = blank(network, 1, *network.input_shape), None
    segments, heads = [], []
    with torch.no_grad():
        for k, segment in enumerate(network.segments):
            macs, features = _through(segment, features)
            segments.append(macs)
            if k < len(network.heads):
                head = cast(ExitHead, network.heads[k])
                heads.append(count_macs(head, features, context))
                pooled = head(features, context)[1]
                context = extend_context(context, pooled) if network.chained else None
    heads.append(0.0 if network.fusion is None else count_macs(network.fusion, context))
    network.train(training)
    saved = tuple(unit.path_macs[-1] - np.array(unit.path_macs) for unit in network.units)
    stages = tuple(
        k for k, segment in enumerate(network.segments) if isinstance(segment, GatedSegment) for _ in segment.units
    )
    return ExitCosts(np.array(segments), np.array(heads), network.chained, saved, stages)


def _through(segment: nn.Module, features: torch.Tensor) -> tuple[float, torch.Tensor]:
    macs = 0.0
    for piece in segment.pieces if isinstance(segment, GatedSegment) else [segment]:
        with counting_macs() as counted:
            features = piece(features)
        # a unit may make its paths when it is first called, which would be counted too
        macs += piece.gate_macs + piece.path_macs[-1] if isinstance(piece, Unit) else counted()
    return macs, features
