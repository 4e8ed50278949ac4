"""What each static part of a network computes in bytes, and which tensors are rounded for it."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx

from dynamize.graph.integers import Places, find_places, note_shapes, prepared, whys
from dynamize.graph.nodes import output_value, placeholder, positions
from dynamize.graph.tracer import blank
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Part
from dynamize.rewrite.written import write_out

Key = tuple[int, int]  # of a tensor: its part and place in the graph, or (-1 - border, 0)


@dataclass(frozen=True)
class RoundedPart:
    """A static part of a prepared network.

    Attributes:
        part: its graph is prepared (:func:`dynamize.graph.integers.prepared`). All parts that read from a border or
            give to it agree on its steps.
        places: what it computes in bytes.
    """

    part: Part
    places: Places

    @property
    def graph(self) -> fx.GraphModule:
        """What is computed."""
        return cast(fx.GraphModule, self.part.graph)

    def put(self, module: torch.nn.Module) -> None:
        """Let ``module`` stand in the place of the graph."""
        assert self.part.put is not None
        self.part.put(module)

    def tensor_keys(self, index: int) -> dict[fx.Node, Key]:
        """For each rounded tensor, what its steps are known by. ``index`` is that of the part."""
        rounded = self.places.rounded
        answer = output_value(self.graph.graph)
        keys = {node: self.key_of(index, node) for node in rounded.values()}
        if answer in rounded and rounded[answer].op != "placeholder":
            keys[rounded[answer]] = _border(self.part.after)
        return {node: keys[source] for node, source in rounded.items()}

    def key_of(self, index: int, node: fx.Node) -> Key:
        """What the values of one tensor are known by."""
        if node.op == "placeholder":
            return _border(self.part.before)
        graph = self.graph.graph
        return _border(self.part.after) if node is output_value(graph) else (index, positions(graph)[node.name])

    def layer_name(self, node: fx.Node) -> str:
        """The path of a layer, for people and recipes."""
        return self.part.prefix + str(node.target)


def prepare(network: DynamicNetwork) -> DynamicNetwork:
    """A copy for eval mode only, whose parts are prepared graphs of its own."""
    found = copy.deepcopy(network).eval()
    write_out(found)
    found.freeze()
    reached: dict[int, Tensor] = {}
    with torch.no_grad():
        for part in _graphs(found):
            assert part.put is not None
            assert part.graph is not None
            given = reached.get(part.before)
            if given is None:  # what no part gives is an image, at the start and after restarts
                given = blank(found, 1, *found.shapes[part.before])
            graph = prepared(part.graph, given)
            reached.setdefault(part.after, note_shapes(graph, given))
            part.put(graph)
    return found


def rounded_parts(network: DynamicNetwork, keep_float: Sequence[str]) -> list[RoundedPart]:
    """All parts of a prepared network in order of execution.

    Args:
        keep_float: names of layers that stay in float; those that lie below a name stay too.
    """
    rounded: set[int] = set()
    while True:
        found = [_rounded(part, rounded, keep_float) for part in _graphs(network)]
        now = rounded | {one.part.before for one in found if placeholder(one.graph.graph) in one.places.rounded}
        now |= {one.part.after for one in found if output_value(one.graph.graph) in one.places.rounded}
        if now == rounded:
            return found
        rounded = now


def layer_names(network: DynamicNetwork) -> list[str]:
    """Names of all layers of a prepared network that can compute in bytes."""
    whole = rounded_parts(network, [])
    return list(dict.fromkeys(one.layer_name(node) for one in whole for node in one.places.layers))


def left_in_float(network: DynamicNetwork) -> dict[str, str]:
    """Names of the convolutions and products of a prepared network that have no form in bytes, and why not."""
    found: dict[str, str] = {}
    for part in _graphs(network):
        here = whys(cast(fx.GraphModule, part.graph))
        found |= {part.prefix + path: why for path, why in here.items()}
    return found


def _graphs(network: DynamicNetwork) -> list[Part]:
    return [part for part in network.parts() if part.graph is not None]


def _rounded(part: Part, rounded: set[int], keep_float: Sequence[str]) -> RoundedPart:
    graph = cast(fx.GraphModule, part.graph)
    paths = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    kept = {path for path in paths if any(f"{part.prefix}{path}.".startswith(f"{name}.") for name in keep_float)}
    return RoundedPart(part, find_places(graph, part.before in rounded, part.after in rounded, kept))


def _border(number: int) -> Key:
    return -1 - number, 0
