"""`spatial_sampling`: residual blocks that each image computes in full, or on a coarser grid, or in tiles."""

import math
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator
from torch import fx

from dynamize.block_gates import PATHS, BlockGates
from dynamize.errors import DynamizeError
from dynamize.graph.coarse import coarse
from dynamize.graph.extract import extract
from dynamize.graph.reach import Tiling, reach
from dynamize.graph.residual import ResidualBlock, keeping_input
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.tiles import TileGate, TileUnit
from dynamize.nn.units import CoarseUnit, GateMaker, Unit
from dynamize.transform import Context

_LEAST = 4  # rows and columns of a map that is worth a coarser grid
_LEAST_TILE = 7  # of a tile that `auto` takes: smaller ones are mostly margin
_PARTS = (4, 2)  # tiles along a map that `auto` takes


class SpatialSampling(BlockGates):
    """Put a gate before residual blocks, by which an image computes their branches in some places only (after Xie et
    al. 2020, Spatially Adaptive Inference with Stochastic Feature Sampling and Interpolation). All gates start open:
    nothing is left out.

    `form: grid`: an image computes the branches at a quarter of the positions, a grid of half the resolution, and
    interpolates the rest, or computes them in full. Both ways share weights; the coarse one has batch-norm statistics
    of its own. The shortcut keeps every position. `form: tiles`: the gate scores square tiles of the map, and an image
    computes the blocks in those it needs, each with a margin of what they look at around it; elsewhere their input
    stays, as where `skip_gates` skip them (DynConv, Verelst & Tuytelaars 2020; SBNet, Ren et al. 2018).

    Blocks with a projection and those on small maps stay as they are. `distill` teaches the gates what each image
    needs.

    Example:
        >>> net = dz.source("dynamize:digits_resnet", pretrained=True)
        >>> dyn = dz.convert(net, [dz.SpatialSampling(group=1)], (1, 8, 8))
        >>> [decision.options for decision in dyn.decisions()][0]
        ('coarse', 'whole')
    """

    pass_name: Literal["spatial_sampling"] = Field("spatial_sampling", alias="pass")
    form: Literal["grid", "tiles"] = Field(
        "grid", description="grid: a coarser grid, or all; tiles: some tiles, or all"
    )
    tile: Literal["auto"] | PositiveInt = Field(
        "auto",
        description="for form: tiles: rows and columns of a tile; auto: a quarter of the map, or half where that is "
        "less than 7",
    )
    dense_from: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5,
        description="for form: tiles: share of the tiles from which an image computes the whole map, which then takes "
        "no longer: tiles are computed with margins",
    )

    @model_validator(mode="after")
    def _for_its_form(self) -> Self:
        if self.form == "grid" and (self.tile != "auto" or self.dense_from != 0.5):
            raise ValueError("tile and dense_from are for form: tiles")
        if self.form == "tiles" and self.gate != "linear":
            raise ValueError(f"gate: {self.gate} scores whole images: form: tiles has gate: linear")
        return self

    def _fits(self, plain: fx.GraphModule, block: ResidualBlock) -> bool:
        if self.form == "tiles":
            return block.identity and self._tiling(plain, [block]) is not None
        return block.identity and min(block.shape[1:]) >= _LEAST

    def _lacking(self) -> str:
        if self.form == "tiles":
            return (
                "the network has no residual block that hands its input on unchanged and computes each position from "
                "those near it, on a map large enough for tiles. `skip_gates` and `form: grid` take more blocks."
            )
        return (
            f"the network has no residual block that hands its input on unchanged, on a map of {_LEAST} x {_LEAST} "
            "positions or more. `dynamize inspect MODEL` lists its blocks; `skip_gates` takes those with a projection "
            "too."
        )

    def _group(
        self, network: DynamicNetwork, blocks: list[ResidualBlock], context: Context
    ) -> tuple[list[list[ResidualBlock]], list[str]]:
        if self.form == "grid":
            return super()._group(network, blocks, context)
        step = self if self.group != "auto" else self.model_copy(update={"group": 1})  # with each block margins grow
        runs, notes = super(SpatialSampling, step)._group(network, blocks, context)
        fitting = [self._tiling(network.plain, run) is not None for run in runs]
        parted = [[run] if fits else [[block] for block in run] for run, fits in zip(runs, fitting, strict=True)]
        return [run for each in parted for run in each], notes

    def _unit(self, plain: fx.GraphModule, run: Sequence[ResidualBlock], name: str, gates: GateMaker) -> Unit:
        first, last = run[0], run[-1]
        body = keeping_input(extract(plain, first.after, last.upto), first.shape)
        if self.form == "grid":
            return CoarseUnit(name, gates(first.shape[0], PATHS), body, coarse(plain, run))
        found = self._tiling(plain, run)
        if found is None:
            raise DynamizeError(
                f"{self.pass_name}: '{name}' cannot be computed in tiles: with what its blocks look at around them "
                "these have to be smaller than the map. Put fewer blocks under one gate, or make `tile` smaller."
            )
        tiling, most = found
        return TileUnit(name, TileGate(first.shape[0], tiling.side), body, tiling, most)

    def _tiling(self, plain: fx.GraphModule, run: Sequence[ResidualBlock]) -> tuple[Tiling, int] | None:
        """How the map of a run of blocks falls into tiles, and the most of them that an image computes one by one; None
        where that is none."""
        _, height, width = run[0].shape
        side, margin = self._side(min(height, width)), reach(extract(plain, run[0].after, run[-1].upto))
        if side is None or margin is None:
            return None
        tiling = Tiling(height, width, side, margin)
        rows, columns = tiling.window
        wanted = math.ceil(self.dense_from * len(tiling.tiles)) - 1
        most = min(wanted, (height * width - 1) // (rows * columns))
        return (tiling, most) if most > 0 else None

    def _side(self, length: int) -> int | None:
        if self.tile != "auto":
            return self.tile
        return next((side for parts in _PARTS if (side := math.ceil(length / parts)) >= _LEAST_TILE), None)
