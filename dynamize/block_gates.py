"""What transforms that put a gate before residual blocks share: which blocks, and how many under one gate."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import fx

from dynamize.errors import DynamizeError, closest
from dynamize.graph.macs import annotated_macs
from dynamize.graph.residual import ResidualBlock, residual_blocks
from dynamize.graph.trace import annotate
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.units import GateMaker, Unit, gate_maker, unique_names
from dynamize.runtime.profile import gate_price
from dynamize.transform import Applied, Context, Kind, Transform

PATHS = 2  # the cheaper one, and the block as it was
_CHEAPER = 0.5  # share of images that take the cheaper way where a gate has to pay
_LONGEST = 4  # blocks under one gate: more leave too little to decide

Run = Annotated[list[str], Field(min_length=1)]


class BlockGates(Transform, ABC):
    """A gate before residual blocks, by which each image takes one of two ways: a cheaper one, or the block as it was.
    All gates start open."""

    blocks: Literal["auto"] | Annotated[list[Run], Field(min_length=1)] = Field(
        "auto", description="lists of neighbouring blocks under one gate each, by module path or node name; or auto"
    )
    gate: Literal["linear", "recurrent", "conv"] = Field(
        "linear",
        description="linear: on pooled features; recurrent: an LSTM over pooled features, shared by all gates "
        "(SkipNet); conv: a strided convolution (SkipNet's FFGate-II)",
    )
    group: Literal["auto"] | PositiveInt = Field(
        "auto",
        description="blocks under one gate, for `blocks: auto`; auto: as few as make up for the gate's own time on the "
        "backend when half of the images take the cheaper way",
    )
    keep: list[str] = Field([], description="blocks without a gate, for `blocks: auto`")
    keep_first: bool = Field(True, description="the first block has none, for `blocks: auto`")

    once: ClassVar[bool] = True
    kind: ClassVar[Kind] = Kind.ADDS_GATES
    not_after: ClassVar[Kind] = Kind.TRAINS

    def apply(self, network: DynamicNetwork, context: Context) -> Applied:
        annotate(network.plain, network.input_shape)
        found = [block for block in residual_blocks(network.plain) if self._fits(network.plain, block)]
        if not found:
            raise DynamizeError(f"{self.pass_name}: {self._lacking()}")
        notes: list[str] = []
        if self.blocks == "auto":
            runs, notes = self._group(network, self._gateable(found), context)
        else:
            runs = [[self._find(found, name) for name in names] for names in self.blocks]
            self._check_runs(network, runs)
        before = {unit.name for unit in network.changing}
        self._insert(network, runs)
        resolved = self.model_copy(
            update={"blocks": [[b.upto for b in run] for run in runs], "group": max(map(len, runs)), "keep": []}
        )
        saved = sum(unit.path_macs[-1] - unit.path_macs[0] for unit in network.changing if unit.name not in before)
        share = saved / annotated_macs(network.plain)
        notes = [f"{len(runs)} gates over {sum(map(len, runs))} blocks, {share:.0%} of the MACs", *notes]
        return Applied(network, resolved, notes)

    @abstractmethod
    def _fits(self, plain: fx.GraphModule, block: ResidualBlock) -> bool:
        """Whether the cheaper way is there for this block."""

    @abstractmethod
    def _lacking(self) -> str:
        """What the network lacks where no block fits, and what to use instead."""

    @abstractmethod
    def _unit(self, plain: fx.GraphModule, run: Sequence[ResidualBlock], name: str, gates: GateMaker) -> Unit:
        """A run of blocks with both ways through it."""

    def _gateable(self, found: list[ResidualBlock]) -> list[ResidualBlock]:
        kept = {self._find(found, name).upto for name in self.keep} | ({found[0].upto} if self.keep_first else set())
        gateable = [block for block in found if block.upto not in kept]
        if not gateable:
            raise DynamizeError(
                f"{self.pass_name}: all {len(found)} residual blocks are kept open: shorten `keep` or set keep_first: "
                "false"
            )
        return gateable

    def _group(
        self, network: DynamicNetwork, blocks: list[ResidualBlock], context: Context
    ) -> tuple[list[list[ResidualBlock]], list[str]]:
        if self.group != "auto":
            return _runs(blocks, self.group, network.exit_places), []
        trial = _runs(blocks, 1, network.exit_places)
        price = gate_price(network, lambda one: self._insert(one, trial), context.backend, context.device)
        saved_ms = price.blocks_ms / len(blocks)
        length = min(_LONGEST, max(1, math.ceil(price.gate_ms / (_CHEAPER * saved_ms))))
        notes = [
            f"on {context.backend} at batch 1 a gate takes {1e3 * price.gate_ms:.0f} us and the cheaper way of a block "
            f"saves {1e3 * saved_ms:.0f} us, so one gate governs up to {length} blocks"
        ]
        if price.gate_ms > _CHEAPER * saved_ms * length:
            notes.append("even so, gates take longer here at batch 1 than half of the images save")
        return _runs(blocks, length, network.exit_places), notes

    def _insert(self, network: DynamicNetwork, runs: Sequence[Sequence[ResidualBlock]]) -> None:
        """Put a unit into ``network`` in the place of each run."""
        plain = network.plain
        with torch.random.fork_rng():  # initialising layers draws from the global generator
            torch.manual_seed(0)
            gates = gate_maker(self.gate, network.changing)
            taken = [piece.name for piece in network.row]
            names = unique_names([_label(run) for run in runs], [run[-1].upto for run in runs], taken)
            units = [self._unit(plain, run, name, gates) for run, name in zip(runs, names, strict=True)]
        network.insert({(run[0].after, run[-1].upto): unit for run, unit in zip(runs, units, strict=True)})

    def _check_runs(self, network: DynamicNetwork, runs: Sequence[Sequence[ResidualBlock]]) -> None:
        for run in runs:
            if len(_runs(run, len(run), network.exit_places)) != 1:
                raise DynamizeError(
                    f"{self.pass_name}: the blocks {[block.upto for block in run]} cannot share a gate: they must "
                    "follow each other without an exit between them, have one shape and no projection. Give each one "
                    "its own list."
                )
        names = [block.upto for run in runs for block in run]
        if len(set(names)) < len(names):
            raise DynamizeError(f"{self.pass_name}: a block is named twice in {names}: name each once")

    def _find(self, blocks: Sequence[ResidualBlock], name: str) -> ResidualBlock:
        for block in blocks:
            if name in (block.upto, block.module):
                return block
        known = [block.module for block in blocks]
        raise DynamizeError(
            f"{self.pass_name}: '{name}' is no residual block of this network. "
            f"{closest(name, known)}Known: {', '.join(known)}."
        )


def _label(run: Sequence[ResidualBlock]) -> str:
    return run[0].module if len(run) == 1 else f"{run[0].module} to {run[-1].module}"


def _runs(blocks: Sequence[ResidualBlock], length: int, cuts: Sequence[str]) -> list[list[ResidualBlock]]:
    """Neighbours of one shape that return their input when skipped: ``length`` at most, none across an exit."""
    runs: list[list[ResidualBlock]] = []
    for block in blocks:
        if runs and len(runs[-1]) < length and _joins(runs[-1][-1], block) and block.after not in cuts:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def _joins(last: ResidualBlock, block: ResidualBlock) -> bool:
    alike = last.identity and block.identity and last.shape == block.shape
    return alike and last.upto == block.after
