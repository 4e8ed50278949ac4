"""`spatial_sampling`: residual blocks that each image computes in full or on a grid of half the resolution."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import fx

from dynamize.block_gates import PATHS, BlockGates
from dynamize.graph.coarse import coarse
from dynamize.graph.extract import extract
from dynamize.graph.residual import ResidualBlock, keeping_input
from dynamize.nn.units import CoarseUnit, GateMaker

_LEAST = 4  # rows and columns of a map that is worth a coarser grid


class SpatialSampling(BlockGates):
    """Put a gate before residual blocks, by which an image computes their branches at a quarter of the positions and
    interpolates the rest (after Xie et al. 2020, Spatially Adaptive Inference with Stochastic Feature Sampling and
    Interpolation, with the positions of a grid). All gates start open: nothing is left out.

    The shortcut keeps every position, so blocks with a projection and those on maps of fewer than 4 x 4 stay as they
    are. Both ways share weights; the coarse one has batch-norm statistics of its own. Images whose content is coarse
    need no more; `distill` teaches the gates which these are.

    Example:
        >>> net = dz.source("dynamize:digits_resnet", pretrained=True)
        >>> dyn = dz.convert(net, [dz.SpatialSampling(group=1)], (1, 8, 8))
        >>> [decision.options for decision in dyn.decisions()][0]
        ('coarse', 'whole')
    """

    pass_name: Literal["spatial_sampling"] = Field("spatial_sampling", alias="pass")

    def _fits(self, block: ResidualBlock) -> bool:
        return block.identity and min(block.shape[1:]) >= _LEAST

    def _lacking(self) -> str:
        return (
            f"the network has no residual block that hands its input on unchanged, on a map of {_LEAST} x {_LEAST} "
            "positions or more. `dynamize inspect MODEL` lists its blocks; `skip_gates` takes those with a projection "
            "too."
        )

    def _unit(self, plain: fx.GraphModule, run: Sequence[ResidualBlock], name: str, gates: GateMaker) -> CoarseUnit:
        first, last = run[0], run[-1]
        return CoarseUnit(
            name,
            gates(first.shape[0], PATHS),
            keeping_input(extract(plain, first.after, last.upto), first.shape),
            coarse(plain, run),
        )
