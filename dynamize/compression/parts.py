"""The static parts of a network and the borders between them, where features are handed on."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import cast

import torch
from torch import Tensor, fx, nn

from dynamize.graph.integers import Places, find_places, note_shapes, prepared
from dynamize.graph.nodes import output_value, placeholder, positions
from dynamize.graph.trace import blank
from dynamize.nn.gated import GatedSegment, Unit
from dynamize.nn.heads import ExitHead
from dynamize.nn.network import DynamicNetwork

Key = tuple[int, int]  # of a tensor: its part and place in the graph, or (border, 0)


@dataclass(frozen=True)
class Part:
    """A static graph: a segment, a piece of one with gates, a way through a unit, or the body of a head.

    Attributes:
        graph: prepared (:func:`dynamize.graph.integers.prepared`).
        holder: the module that has it as a child, named ``key``.
        prefix: of its layers' names.
        before: the border that it reads from. All parts that read from a border or give to it agree on its steps: what
            passes a unit unchanged lies on the same side as what was computed.
        after: the border that it gives to.
        places: what it computes in bytes.
    """

    graph: fx.GraphModule
    holder: nn.Module
    key: str
    prefix: str
    before: int
    after: int
    places: Places

    def put(self, module: nn.Module) -> None:
        """Let ``module`` stand in the place of the graph."""
        self.holder._modules[self.key] = module

    def tensor_keys(self, index: int) -> dict[fx.Node, Key]:
        """For each rounded tensor, what its steps are known by. ``index`` is that of the part."""
        rounded = self.places.rounded
        answer = output_value(self.graph.graph)
        keys = {node: self.key_of(index, node) for node in rounded.values()}
        if answer in rounded and rounded[answer].op != "placeholder":
            keys[rounded[answer]] = (self.after, 0)
        return {node: keys[source] for node, source in rounded.items()}

    def key_of(self, index: int, node: fx.Node) -> Key:
        """What the values of one tensor are known by."""
        if node.op == "placeholder":
            return self.before, 0
        graph = self.graph.graph
        return (self.after, 0) if node is output_value(graph) else (index, positions(graph)[node.name])

    def layer_name(self, node: fx.Node) -> str:
        """The path of a layer, for people and recipes."""
        return self.prefix + str(node.target)


def prepare(network: DynamicNetwork) -> DynamicNetwork:
    """A copy for eval mode only, whose segments, ways and heads' bodies are prepared graphs."""
    found = copy.deepcopy(network).eval()
    found.segments = nn.ModuleList([_prepared(segment) for segment in found.segments])
    for head in found.heads:
        cast(ExitHead, head).body = prepared(cast(ExitHead, head).body)
    _note_all_shapes(found)
    return found


def parts(network: DynamicNetwork, keep_float: Sequence[str]) -> list[Part]:
    """All parts of a prepared network in order of execution.

    Args:
        keep_float: names of layers that stay in float; those that lie below a name stay too.
    """
    rounded: set[int] = set()
    while True:
        found = [_part(*place, rounded, keep_float) for place in _places(network)]
        now = rounded | {part.before for part in found if placeholder(part.graph.graph) in part.places.rounded}
        now |= {part.after for part in found if output_value(part.graph.graph) in part.places.rounded}
        if now == rounded:
            return found
        rounded = now


def layer_names(network: DynamicNetwork) -> list[str]:
    """Names of all layers of a prepared network that can compute in bytes."""
    return list(dict.fromkeys(part.layer_name(node) for part in parts(network, []) for node in part.places.layers))


_Place = tuple[nn.Module, str, str, int, int]


def _places(network: DynamicNetwork) -> Iterator[_Place]:
    """Holder, key, prefix and borders of each part."""
    numbers = count(-1, -1)  # negative: those of parts are not
    border = next(numbers)
    for k, segment in enumerate(network.segments):
        if isinstance(segment, GatedSegment):
            for i, piece in enumerate(segment.pieces):
                before, stays = border, isinstance(piece, Unit) and None in piece.paths()
                border = border if stays else next(numbers)
                if not isinstance(piece, Unit):
                    yield segment.pieces, str(i), "", before, border
                    continue
                ways = cast(nn.ModuleList, piece.ways)
                yield from (
                    (ways, str(p), "", before, border) for p, way in enumerate(piece.paths()) if way is not None
                )
        else:
            before, border = border, next(numbers)
            yield network.segments, str(k), "", before, border
        if k < len(network.heads):
            yield network.heads[k], "body", f"heads.{k}.body.", border, next(numbers)


def _part(
    holder: nn.Module, key: str, prefix: str, before: int, after: int, rounded: set[int], keep_float: Sequence[str]
) -> Part:
    graph = cast(fx.GraphModule, holder._modules[key])
    paths = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    kept = {path for path in paths if any(f"{prefix}{path}.".startswith(f"{name}.") for name in keep_float)}
    places = find_places(graph, before in rounded, after in rounded, kept)
    return Part(graph, holder, key, prefix, before, after, places)


def _prepared(segment: nn.Module) -> nn.Module:
    return segment.compiled(prepared) if isinstance(segment, GatedSegment) else prepared(segment)


def _note_all_shapes(network: DynamicNetwork) -> None:
    reached: dict[int, Tensor] = {-1: blank(network, 1, *network.input_shape)}
    with torch.no_grad():
        for holder, key, _, before, after in _places(network):
            given = note_shapes(cast(fx.GraphModule, holder._modules[key]), reached[before])
            reached.setdefault(after, given)
