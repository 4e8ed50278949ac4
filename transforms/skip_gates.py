"""`skip_gates`: residual blocks that each image runs or skips."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import fx

from dynamize.block_gates import PATHS, BlockGates
from dynamize.graph.extract import extract
from dynamize.graph.residual import ResidualBlock, bypass, keeping_input, masked
from dynamize.nn.units import GateMaker, SkipUnit


class SkipGates(BlockGates):
    """Put a gate before residual blocks (SkipNet, Wang et al. 2018; ConvNet-AIG, Veit & Belongie 2018).

    A skipped block costs nothing but its projection shortcut, if it has one. All gates start open.

    Example:
        >>> net = dz.source("dynamize:digits_resnet", pretrained=True)
        >>> dyn = dz.convert(net, [dz.SkipGates(group=1)], (1, 8, 8))
        >>> len(dyn.history[0]["blocks"])
        8
    """

    pass_name: Literal["skip_gates"] = Field("skip_gates", alias="pass")

    def _fits(self, plain: fx.GraphModule, block: ResidualBlock) -> bool:
        return True

    def _lacking(self) -> str:
        return (
            "the network has no residual block, that is, no sum of a shortcut and a branch between two cut points. "
            "`dynamize inspect MODEL` says why for each block; `exits` works without."
        )

    def _unit(self, plain: fx.GraphModule, run: Sequence[ResidualBlock], name: str, gates: GateMaker) -> SkipUnit:
        first, last = run[0], run[-1]
        detour = len(run) == 1 and not first.identity
        return SkipUnit(
            name,
            gates(first.shape[0], PATHS),
            keeping_input(extract(plain, first.after, last.upto), first.shape),
            bypass(plain, first) if detour else None,
            masked(plain, first) if detour else None,
        )
