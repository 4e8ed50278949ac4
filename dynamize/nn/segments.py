"""From the original graph to segments: parted at the exits, and within them at the gated units, which can be fixed."""

from collections.abc import Mapping, Sequence
from typing import cast

from torch import fx, nn

from dynamize.graph.extract import extract
from dynamize.graph.splice import splice
from dynamize.graph.trace import annotate
from dynamize.nn.gated import GatedSegment, Unit
from dynamize.nn.network import DynamicNetwork

Region = tuple[str, str]  # from one cut point to another


def build_segments(plain: fx.GraphModule, cuts: Sequence[str], units: Mapping[Region, Unit]) -> list[nn.Module]:
    """The segments between the cut points ``cuts``, with each unit in the place of its region.

    Args:
        plain: the whole network.
        cuts: names of the K - 1 cut points that exits stand at, in order of execution.
        units: none of their regions overlap, and none holds a cut inside.
    """
    position = {node.name: i for i, node in enumerate(plain.graph.nodes)}
    ordered = sorted(units, key=lambda region: position[region[0]])
    borders: list[str | None] = [None, *cuts, None]
    segments: list[nn.Module] = []
    for first, last in zip(borders, borders[1:], strict=False):
        start = -1 if first is None else position[first]
        end = len(position) if last is None else position[last]
        inside = [region for region in ordered if start <= position[region[0]] and position[region[1]] <= end]
        segments.append(_segment(plain, first, last, inside, units))
    return segments


def _segment(
    plain: fx.GraphModule, first: str | None, last: str | None, regions: Sequence[Region], units: Mapping[Region, Unit]
) -> nn.Module:
    if not regions:
        return plain if first is None and last is None else extract(plain, first, last)
    output = cast(fx.Node, next(node for node in plain.graph.nodes if node.op == "output").args[0]).name
    pieces: list[nn.Module] = []
    for after, upto in regions:
        if first != after:
            pieces.append(extract(plain, first, after))
        pieces.append(units[after, upto])
        first = upto
    if first != (output if last is None else last):
        pieces.append(extract(plain, first, last))
    return GatedSegment([piece for piece in pieces if isinstance(piece, Unit) or not _changes_nothing(piece)])


def _changes_nothing(piece: nn.Module) -> bool:
    """Whether a piece only hands on what it is given, as a block does that is skipped for good."""
    ends = ("placeholder", "output")
    nodes = [node for node in cast(fx.GraphModule, piece).graph.nodes if node.op not in ends]
    return all(node.op == "call_module" and isinstance(piece.get_submodule(node.target), nn.Identity) for node in nodes)


def fix_paths(network: DynamicNetwork, paths: Mapping[Region, int]) -> None:
    """Make gated units static, in place: all images take the path given for the unit of a region, and its gate is gone.

    Where that is not the original path, what it leaves out is gone from ``network.plain`` too.
    """
    plain, training = network.plain, network.training
    network.eval()
    for unit in network.units:
        path = paths.get(unit.region, len(unit.path_macs) - 1)
        if path < len(unit.path_macs) - 1:
            splice(plain, *unit.region, cast(fx.GraphModule | None, unit.paths()[path]))
    annotate(plain, network.input_shape)
    left = {unit.region: unit for unit in network.units if unit.region not in paths}
    network.segments = nn.ModuleList(build_segments(plain, network.cuts, left))
    network.gate_offset = network.gate_offset  # the new segments stand where the old ones stood
    network.train(training)
