"""All that a dynamic network can compute, in one graph that torch-pruning can follow."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, cast

from torch import Tensor, fx, nn

from dynamize.compression.layers import is_depthwise, layers, sizes
from dynamize.compression.standins import Stand, put_stand_ins
from dynamize.compression.ties import Tie
from dynamize.graph.nodes import nodes_by_name
from dynamize.graph.replace import every_module
from dynamize.graph.trace import annotate
from dynamize.nn.flow import Flow
from dynamize.nn.network import DynamicNetwork

MIXING = (nn.Conv2d, nn.Linear)


class Dense(nn.Module):
    """All that a network can compute for one image: every exit and every gate, nothing decided, for tracing.

    Attributes:
        stands: what each layer, or tensor that no layer holds, stands for, by id.
        by_key: the same, by key.
        not_ours: parameters in which no channel of the network has a place.
    """

    def __init__(self, network: DynamicNetwork) -> None:
        super().__init__()
        self.network = network
        cuttable = sizes(network)
        for module in every_module(network):
            if getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]  # torch-pruning loses whose output it was
        self.reading = [piece for piece in network.row if piece.reads]
        self.graph = self._with_points()
        modules = [(module, path) for path, module in layers(network).items() if path in cuttable]
        tensors = [(tensor, path) for path, tensor in network.plain.named_parameters() if path in cuttable]
        self._alike: dict[int, list[str]] = defaultdict(list)  # norms that differ in statistics only, by parameters
        for module, path in modules:
            self._alike[id(module._parameters)].append(path)
        self.stands = {id(module): _ordinary(path, self._alike[id(module._parameters)]) for module, path in modules}
        self.stands |= {id(tensor): Stand(path, {"each": ((path, _last(tensor)),)}) for tensor, path in tensors}
        self.stands |= {id(module): stand for module, stand in put_stand_ins(self.graph).items()}
        self.by_key = {stand.key: stand for stand in self.stands.values()}
        called = [self.graph.get_submodule(str(n.target)) for n in self.graph.graph.nodes if n.op == "call_module"]
        keys = [self.stands[id(module)].key for module in called if id(module) in self.stands]
        self._order = {key: i for i, key in reversed(list(enumerate(keys)))}
        memories = [unit.gate.memory for unit in network.changing if unit.gate.memory is not None]
        self.not_ours = [parameter for memory in memories for parameter in memory.parameters()]

    def _with_points(self) -> fx.GraphModule:
        """The original graph with the features that pieces read as further outputs."""
        plain = self.network.plain
        annotate(plain, self.network.input_shape)
        graph = plain.graph
        nodes = nodes_by_name(graph)
        output = graph.output_node()
        points = [nodes[piece.place[0]] for piece in self.reading]
        output.args = ((output.args[0], *points),)
        return fx.GraphModule(plain, graph, "Dense")

    def ties(self) -> Iterator[Tie]:
        """Channels that have to go together, besides those that torch-pruning follows."""
        yield from (stand.ties for stand in self.by_key.values() if stand.ties)
        holders: dict[int, list[tuple[str, nn.Module]]] = defaultdict(list)
        for path, module in layers(self.network).items():
            if path in self._alike[id(module._parameters)][1:]:
                continue
            for parameter in module.parameters(recurse=False):
                holders[id(parameter)].append((path, module))
        for held in holders.values():
            for side in ("out", "in", "each") if len(held) > 1 else ():
                widths = {path: _width(module, side) for path, module in held}
                yield {(path, side): range(width) for path, width in widths.items() if width}

    def forward(self, images_NCHW: Tensor) -> list[Tensor]:
        logits, *points = self.graph(images_NCHW)
        flow, found = Flow(images_NCHW), []
        for piece, features in zip(self.reading, points, strict=True):
            flow.features = features
            found.append(piece.read(flow))
        flow.features = logits
        ends = [piece.read(flow) for piece in self.network.row if piece.answers and piece.effect is None]
        return [logits, *ends, *found]

    def position(self, path: str) -> int:
        """Of a layer in the order of execution; those of heads come last."""
        return self._order.get(path, len(self._order))

    def answering(self) -> list[nn.Module]:
        """Layers whose outputs are the classes, and all layers of gates and classifiers of heads."""
        network, found = self.network, []
        output = self.graph.graph.output_node()
        waiting = [cast(Any, output.args[0])[0]]
        while waiting:
            node = waiting.pop()
            inside = list(self.graph.get_submodule(str(node.target)).modules()) if node.op == "call_module" else []
            if any(isinstance(module, MIXING) for module in inside):
                found += inside
            else:
                waiting += node.all_input_nodes
        bodies = {module for part in network.parts() if part.graph is not None for module in part.graph.modules()}
        return [*found, *(module for module in network.pieces.modules() if module not in bodies)]


def _ordinary(path: str, alike: Sequence[str]) -> Stand:
    """A layer that stands for itself, and for those that have its parameters."""
    held = tuple((one, None) for one in alike)
    return Stand(path, {"each": held, "out": held, "in": held})


def _width(module: nn.Module, side: str) -> int:
    """Channels of a layer on a side; 0 where it has none there."""
    mixing = isinstance(module, MIXING) and not is_depthwise(module)
    if mixing == (side == "each"):
        return 0
    weight = module.get_parameter("weight")
    return weight.shape[1] if side == "in" else len(weight)


def _last(tensor: Tensor) -> int:
    """The dimension in which torch-pruning sees the channels of a tensor that no layer holds."""
    return max((dim for dim, size in enumerate(tensor.shape) if size > 1), default=0)
