"""`channel_gates`: channels in groups, of which each image computes the first few."""

import math
from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import fx

from dynamize.errors import DynamizeError, closest
from dynamize.graph.chains import Chain, private_chains, why_whole
from dynamize.graph.cuts import cut_points
from dynamize.graph.extract import extract
from dynamize.graph.macs import annotated_macs
from dynamize.graph.narrow import importance, reorder
from dynamize.graph.nodes import placeholder, positions
from dynamize.graph.trace import annotate
from dynamize.nn.channels import ChannelUnit, Widths
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.row import Region
from dynamize.nn.units import GateMaker, gate_maker, unique_names
from dynamize.rewrite.written import write_out
from dynamize.transform import Applied, Context, Kind, Transform

_LEAST = 0.005  # of the network's MACs: a unit with fewer is not worth a gate
_LISTED = 3  # reasons

Groups = Annotated[int, Field(ge=2, le=8)]


class ChannelGates(Transform):
    """Split hidden channels into groups and let a gate choose how many each image needs.

    Runtime Neural Pruning (Lin et al. 2017) in the form of DS-Net (Li et al. 2021): channels are sorted by importance,
    which changes nothing, and a gate for each block picks a prefix. All gates start with all channels.

    Example:
        >>> net = dz.source("dynamize:digits_resnet", pretrained=True)
        >>> dyn = dz.convert(net, [dz.ChannelGates(groups=2)], (1, 8, 8))
        >>> len(dyn.history[0]["blocks"])
        8
    """

    pass_name: Literal["channel_gates"] = Field("channel_gates", alias="pass")
    blocks: Literal["auto"] | Annotated[list[str], Field(min_length=1)] = Field(
        "auto", description="blocks with a gate each, by module path or node name of what they end with; or auto"
    )
    groups: Groups = Field(4, description="widths to choose from: 1/groups, 2/groups, ... of the channels")
    multiple: PositiveInt = Field(
        8, description="widths are rounded up to multiples of this; CPUs lose on narrower slices"
    )
    gate: Literal["linear", "recurrent", "conv"] = Field("linear", description="as in skip_gates")
    keep_first: bool = Field(True, description="the first block keeps all channels, for `blocks: auto`")

    exact: ClassVar[bool] = False  # sums run over channels in another order
    once: ClassVar[bool] = True
    kind: ClassVar[Kind] = Kind.ADDS_GATES | Kind.SPLITS_CHANNELS
    not_after: ClassVar[Kind] = Kind.TRAINS

    def apply(self, network: DynamicNetwork, context: Context) -> Applied:
        plain = network.plain
        written = write_out(network)
        annotate(plain, network.input_shape)
        found = self._regions(network)
        if self.blocks != "auto":
            found = {region: found[region] for region in (_find(plain, found, name) for name in self.blocks)}
        if not found:
            raise DynamizeError(f"channel_gates: the network has no channels that can be split. {self._why(plain)}")
        with torch.random.fork_rng():  # initialising layers draws from the global generator
            torch.manual_seed(0)
            gates = gate_maker(self.gate, network.changing)
            labels = unique_names(
                [_label(plain, upto) for _, upto in found],
                [upto for _, upto in found],
                [piece.name for piece in network.row],
            )
            added = {
                region: self._unit(network, region, chains, label, gates)
                for (region, chains), label in zip(found.items(), labels, strict=True)
            }
        network.insert(added)
        resolved = self.model_copy(update={"blocks": [upto for _, upto in found]})
        share = sum(unit.path_macs[-1] - unit.path_macs[0] for unit in added.values()) / annotated_macs(plain)
        notes = [f"{len(found)} gates; {share:.0%} of the MACs can be left out"]
        return Applied(network, resolved, notes + written)

    def _regions(self, network: DynamicNetwork) -> dict[Region, list[Chain]]:
        """Where a gate can stand, in order of execution: from the cut point before a chain to the one that follows it.

        Of regions that overlap the shorter one is taken, so in a chain of convolutions every second has a gate.
        """
        plain = network.plain
        position = positions(plain.graph)
        taken = [tuple(position[end] for end in unit.place) for unit in network.changing]
        exits = [position[name] for name in network.exit_places]
        everywhere = {chain.producers: chain for chain in private_chains(plain)}  # sees who else uses a module
        regions = {_region(plain, chain) for chain in everywhere.values()}
        spans = sorted(
            (position[one[1]] - position[one[0]], position[one[0]], one) for one in regions if one is not None
        )
        found: dict[Region, list[Chain]] = {}
        for _, _, region in spans:
            start, end = position[region[0]], position[region[1]]
            if any(start < b and a < end for a, b in taken) or any(start < cut < end for cut in exits):
                continue
            private = [one for one in private_chains(extract(plain, *region)) if one.producers in everywhere]
            chains = [chain for chain in private if len(self._widths(chain)) > 1]
            if sum(chain.macs for chain in chains) >= _LEAST * annotated_macs(plain):
                found[region] = chains
                taken.append((start, end))
        ordered = dict(sorted(found.items(), key=lambda item: position[item[0][0]]))
        if self.keep_first and self.blocks == "auto" and len(ordered) > 1:
            ordered.pop(next(iter(ordered)))
        return ordered

    def _why(self, plain: fx.GraphModule) -> str:
        """What stands in the way of a gate, in words."""
        chains = private_chains(plain)
        narrow = [chain for chain in chains if len(self._widths(chain)) < 2]
        if narrow:
            widest = max(narrow, key=lambda chain: chain.channels)
            step = math.lcm(self.multiple, widest.together)
            return (
                f"Those that only convolutions behind them read are too few: {widest.channels} at `{widest.name}`, of "
                f"which a multiple of {step} has to be left out. A smaller `multiple` finds more."
            )
        if chains:
            return (
                f"Only `{chains[0].name}` and the like have channels of their own, before the first or behind the last "
                f"place to stand at, or with less than {_LEAST:.1%} of the MACs: `skip_gates` and `exits` may fit."
            )
        reasons = list(why_whole(plain).items())
        if not reasons:
            return "No convolution holds a weight of its own that can be cut. Use `skip_gates` or `exits`."
        few = "; ".join(f"those of `{name}`: {reason}" for name, reason in reasons[:_LISTED])
        more = f"; and {len(reasons) - _LISTED} more" if len(reasons) > _LISTED else ""
        return f"Only convolutions behind them may read them. {few}{more}. Use `skip_gates` or `exits`."

    def _widths(self, chain: Chain) -> list[int]:
        """Ascending widths of a chain, the last one whole."""
        step = math.lcm(self.multiple, chain.together)
        wanted = {-(-chain.channels * m // (self.groups * step)) * step for m in range(1, self.groups + 1)}
        return sorted({min(width, chain.channels) for width in wanted})

    def _unit(
        self, network: DynamicNetwork, region: Region, chains: list[Chain], label: str, gates: GateMaker
    ) -> ChannelUnit:
        body = extract(network.plain, *region)
        for chain in chains:
            reorder(body, chain, importance(body, chain).argsort(descending=True, stable=True))
        paths = max(len(self._widths(chain)) for chain in chains)
        widths: Widths = {chain.name: _spread(self._widths(chain), paths) for chain in chains}
        channels = placeholder(body.graph).meta["shape"][1]
        return ChannelUnit(label, gates(channels, paths), body, widths)


def _spread(widths: list[int], paths: int) -> list[int]:
    """As many widths as the unit has paths, where a narrow chain has fewer of its own."""
    return [widths[-(-(p + 1) * len(widths) // paths) - 1] for p in range(paths)]


def _region(plain: fx.GraphModule, chain: Chain) -> Region | None:
    """The nearest cut points around a chain; None at either end of the network."""
    layers = {*chain.producers, *chain.consumers}
    position = positions(plain.graph)
    places = [position[node.name] for node in plain.graph.find_nodes(op="call_module") if node.target in layers]
    names = [cut.name for cut in cut_points(plain)]
    before = [name for name in names if position[name] < min(places)]
    behind = [name for name in names if position[name] >= max(places)]
    return (before[-1], behind[0]) if before and behind else None


def _label(plain: fx.GraphModule, name: str) -> str:
    return next(cut.module for cut in cut_points(plain) if cut.name == name) or name


def _find(plain: fx.GraphModule, found: Iterable[Region], name: str) -> Region:
    known = {region[1]: region for region in found}
    labels = [_label(plain, upto) for upto in known]
    if name in known:
        return known[name]
    if labels.count(name) == 1:
        return list(known.values())[labels.index(name)]
    names = [label if labels.count(label) == 1 else upto for label, upto in zip(labels, known, strict=True)]
    raise DynamizeError(
        f"channel_gates: '{name}' is no block with channels to split, or several. {closest(name, names)}"
        f"Known: {', '.join(names)}."
    )
