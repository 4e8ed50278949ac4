"""`channel_gates`: channels in groups, of which each image computes the first few."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import fx

from dynamize.errors import DynamizeError, closest
from dynamize.graph.chains import Chain, private_chains
from dynamize.graph.cuts import CutPoint, cut_points
from dynamize.graph.extract import extract
from dynamize.graph.narrow import importance, reorder
from dynamize.graph.trace import annotate, blank
from dynamize.nn.channels import ChannelUnit, Widths, path_costs
from dynamize.nn.gates import RecurrentMemory, gate_macs, make_gate
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.segments import Region, build_segments
from dynamize.transform import Applied, Context, Transform

_LEAST = 0.02  # of the network's MACs: a unit with less to save is not worth a gate

Groups = Annotated[int, Field(ge=2, le=8)]


class ChannelGates(Transform):
    """Split hidden channels into groups and let a gate choose how many each image needs.

    Runtime Neural Pruning (Lin et al. 2017) in the form of DS-Net (Li et al. 2021): channels are sorted by importance,
    which changes nothing, and a gate for each block picks a prefix. All gates start with all channels.
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
    before: ClassVar[tuple[str, ...]] = ("distill", "calibrate")

    def apply(self, network: DynamicNetwork, context: Context) -> Applied:
        plain = network.plain
        annotate(plain, network.input_shape)
        found = self._regions(network)
        if self.blocks != "auto":
            found = {cut: chains for cut, chains in found.items() if cut in [_find(found, n) for n in self.blocks]}
        if not found:
            raise DynamizeError(
                "channel_gates: the network has no private channels wide enough to be split, that is, channels that "
                f"only convolutions after them read, at least two times {self.multiple} of them. "
                "`dynamize inspect MODEL` lists them; a smaller `multiple` finds more."
            )
        borders = dict(_borders(network))
        units = {unit.region: unit for unit in network.units}
        with torch.random.fork_rng():  # initialising layers draws from the global generator
            torch.manual_seed(0)
            if self.gate == "recurrent" and network.memory is None:
                network.memory = RecurrentMemory(self.groups)
            for cut, chains in found.items():
                region = borders[cut.name], cut.name
                units[region] = self._unit(network, region, cut, chains)
        network.segments = torch.nn.ModuleList(build_segments(plain, network.cuts, units))
        network.to(blank(plain)).train(network.training)
        resolved = self.model_copy(update={"blocks": [cut.name for cut in found]})
        saved = sum(units[borders[cut.name], cut.name].path_macs[-1] for cut in found)
        least = sum(units[borders[cut.name], cut.name].path_macs[0] for cut in found)
        return Applied(
            network, resolved, [f"{len(found)} gates; {(saved - least) / _macs(plain):.0%} of the MACs can be left out"]
        )

    def _regions(self, network: DynamicNetwork) -> dict[CutPoint, list[Chain]]:
        """Blocks between neighbouring cut points with channels to split, by the cut that ends them."""
        plain, whole = network.plain, _macs(network.plain)
        taken = [unit.region for unit in network.units]
        position = {node.name: i for i, node in enumerate(plain.graph.nodes)}
        found: dict[CutPoint, list[Chain]] = {}
        everywhere = {
            chain.producers for chain in private_chains(plain)
        }  # a region does not see who else uses a module
        cuts = {cut.name: cut for cut in cut_points(plain)}
        for upto, after in _borders(network):
            inside = any(position[a] <= position[after] and position[upto] <= position[b] for a, b in taken)
            private = [one for one in private_chains(extract(plain, after, upto)) if one.producers in everywhere]
            chains = [chain for chain in private if len(self._widths(chain)) > 1]
            saving = sum(chain.macs for chain in chains) / 2
            if chains and not inside and saving >= _LEAST * whole / 2:
                found[cuts[upto]] = chains
        if self.keep_first and self.blocks == "auto" and len(found) > 1:
            found.pop(next(iter(found)))
        return found

    def _widths(self, chain: Chain) -> list[int]:
        """Ascending widths of a chain, the last one whole."""
        step = self.multiple
        wanted = {-(-chain.channels * m // (self.groups * step)) * step for m in range(1, self.groups + 1)}
        return sorted({min(width, chain.channels) for width in wanted})

    def _unit(self, network: DynamicNetwork, region: Region, cut: CutPoint, chains: list[Chain]) -> ChannelUnit:
        body = extract(network.plain, *region)
        for chain in chains:
            reorder(body, chain, importance(body, chain).argsort(descending=True, stable=True))
        paths = max(len(self._widths(chain)) for chain in chains)
        widths: Widths = {chain.name: _spread(self._widths(chain), paths) for chain in chains}
        shape = next(node.meta["shape"] for node in body.graph.nodes if node.op == "placeholder")
        memory = network.memory if isinstance(network.memory, RecurrentMemory) else None
        gate = make_gate(self.gate, shape[1], paths, memory)
        example = blank(body, *shape)
        return ChannelUnit(
            cut.module or cut.name,
            region,
            gate,
            body,
            widths,
            path_costs(body, widths, example),
            gate_macs(gate, example),
        )


def _spread(widths: list[int], paths: int) -> list[int]:
    """As many widths as the unit has paths, where a narrow chain has fewer of its own."""
    return [widths[-(-(p + 1) * len(widths) // paths) - 1] for p in range(paths)]


def _borders(network: DynamicNetwork) -> list[tuple[str, str]]:
    """Each cut point and the one before it."""
    names = [cut.name for cut in cut_points(network.plain)]
    return list(zip(names[1:], names, strict=False))


def _find(found: dict[CutPoint, list[Chain]], name: str) -> CutPoint:
    for cut in found:
        if name in (cut.name, cut.module):
            return cut
    known = [cut.module or cut.name for cut in found]
    raise DynamizeError(
        f"channel_gates: '{name}' is no block with channels to split. {closest(name, known)}Known: {', '.join(known)}."
    )


def _macs(plain: fx.GraphModule) -> float:
    return float(sum(node.meta["macs"] for node in plain.graph.nodes))
