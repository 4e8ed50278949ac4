"""What leaving at each exit costs, in multiply-accumulates."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from dynamize.graph.trace import blank
from dynamize.measure.macs import count_macs
from dynamize.nn.heads import ExitHead, extend_context
from dynamize.nn.network import DynamicNetwork


@dataclass(frozen=True)
class ExitCosts:
    """MACs per image of each segment (K,) and each head (K,); the last entry of ``heads`` is the last exit's fusion.

    In a chained network every head on the way runs; otherwise one whose exit is off does not.
    """

    segments: NDArray[np.float64]
    heads: NDArray[np.float64]
    chained: bool

    def cumulative(self, thresholds: Sequence[float | None] | None = None) -> NDArray[np.float64]:
        """MACs of leaving at each exit (K,); with all exits on where no thresholds are given."""
        runs = np.ones(len(self.heads), dtype=bool)
        if thresholds is not None and not self.chained:
            runs[:-1] = [threshold is not None for threshold in thresholds]
        return cast(NDArray[np.float64], np.cumsum(self.segments + self.heads * runs))


def exit_costs(network: DynamicNetwork) -> ExitCosts:
    """Count one blank image through every segment and head."""
    training = network.training
    network.eval()
    features, context = blank(network, 1, *network.input_shape), None
    segments, heads = [], []
    with torch.no_grad():
        for k, segment in enumerate(network.segments):
            segments.append(count_macs(segment, features))
            features = segment(features)
            if k < len(network.heads):
                head = cast(ExitHead, network.heads[k])
                heads.append(count_macs(head, features, context))
                pooled = head(features, context)[1]
                context = extend_context(context, pooled) if network.chained else None
    heads.append(0.0 if network.fusion is None else count_macs(network.fusion, context))
    network.train(training)
    return ExitCosts(np.array(segments), np.array(heads), network.chained)
