"""What gates a network can take, block by block: which of them can be skipped, and which channels can be split."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from dynamize.graph.chains import Chain, private_chains
from dynamize.graph.cuts import CutPoint, cut_points
from dynamize.graph.nodes import positions
from dynamize.graph.residual import residual_blocks, why_not


@dataclass(frozen=True)
class GateableBlock:
    """What lies between two neighbouring cut points.

    Attributes:
        block: name of the cut point at its end, which ``blocks`` of `skip_gates` and `channel_gates` takes.
        module: path of the module that computes it, for people; "" for none.
        macs: MACs per image.
        skip: whether it is a residual block, which a skip gate can leave out.
        identity: whether skipping it leaves its input as it is.
        bypass_macs: MACs per image of what still runs where it is skipped: a projection shortcut.
        why_not: why it cannot be skipped.
        chains: channels that a channel gate can split, whose last reader is in this block; in plain chains of
            convolutions they come from the block before, and of two that overlap in a block one can have a gate.
    """

    block: str
    module: str
    macs: float
    skip: bool
    identity: bool
    bypass_macs: float
    why_not: str | None
    chains: tuple[Chain, ...]


def gateable_blocks(traced: fx.GraphModule) -> list[GateableBlock]:
    """All blocks of an annotated graph in order of execution; what comes before the first cut point always runs."""
    residual = {block.upto: block for block in residual_blocks(traced)}
    reasons = why_not(traced)
    cuts = cut_points(traced)
    chains = _chains_by_block(traced, cuts)
    found: list[GateableBlock] = []
    for before, cut in zip(cuts, cuts[1:], strict=False):
        block = residual.get(cut.name)
        found.append(
            GateableBlock(
                block=cut.name,
                module=cut.module,
                macs=cut.macs - before.macs,
                skip=block is not None,
                identity=block is not None and block.identity,
                bypass_macs=block.bypass_macs if block else 0.0,
                why_not=None if block else reasons.get(cut.name) or reasons[cut.module],
                chains=tuple(chains[cut.name]),
            )
        )
    return found


def _chains_by_block(traced: fx.GraphModule, cuts: Sequence[CutPoint]) -> dict[str, list[Chain]]:
    """Chains between any two cut points, by the first cut point that follows each."""
    position = positions(traced.graph)
    layers = {str(node.target): position[node.name] for node in traced.graph.find_nodes(op="call_module")}
    found: dict[str, list[Chain]] = {cut.name: [] for cut in cuts}
    for chain in private_chains(traced):
        places = [layers[name] for name in (*chain.producers, *chain.consumers)]
        behind = [cut.name for cut in cuts if position[cut.name] >= max(places)]
        if behind and position[cuts[0].name] < min(places):
            found[behind[0]].append(chain)
    return found
