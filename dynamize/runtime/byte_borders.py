"""Segments in bytes hand bytes to each other: a quarter of the memory, and nothing is computed at the border."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from dynamize.graph.nodes import output_value, placeholder
from dynamize.graph.tracer import Whole
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Part
from dynamize.nn.quantized import LEVELS, Quantizer


def exchange_bytes(network: DynamicNetwork) -> set[int]:
    """Let features cross the borders at heads as bytes, in place, where both sides round them alike.

    The same numbers are computed. For execution by a backend only.

    Returns:
        The numbers of these borders.
    """
    every = network.parts()
    exchanged: set[int] = set()
    for border in {part.before for part in every if part.role == "head"}:
        givers = [part for part in every if part.after == border]
        takers = [part for part in every if part.before == border]
        if len(givers) == 1 and _exchange_at(givers[0], takers):
            exchanged.add(border)
    return exchanged


def _exchange_at(giver: Part, takers: Sequence[Part]) -> bool:
    graphs = [part.graph for part in (giver, *takers)]
    if not all(isinstance(graph, fx.GraphModule) for graph in graphs):
        return False
    gives, *take = cast(list[fx.GraphModule], graphs)
    nodes = [_last(gives), *(_first(graph) for graph in take)]
    if any(node is None for node in nodes):
        return False
    last, *firsts = cast(list[fx.Node], nodes)
    held = [_quantizer(gives, last), *(_quantizer(graph, first) for graph, first in zip(take, firsts, strict=True))]
    if any(not torch.equal(_numbers(held[0]), _numbers(one)) for one in held[1:]):
        return False
    _exchange(gives, last, ToBytes(held[0]))
    for graph, first in zip(take, firsts, strict=True):
        _exchange(graph, first, FromBytes(held[0]))
    return True


class ToBytes(Whole):
    """The first half of a :class:`~dynamize.nn.quantized.Quantizer`: values -> uint8."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.register_buffer("scale", quantizer.scale)
        self.register_buffer("zero_point", quantizer.zero_point)

    def forward(self, values: Tensor) -> Tensor:
        found: Tensor = _ToBytes.apply(values, self.scale, self.zero_point)
        return found


class FromBytes(ToBytes):
    """Its second half: uint8 -> values."""

    def forward(self, values: Tensor) -> Tensor:
        found: Tensor = _FromBytes.apply(values, self.scale, self.zero_point)
        return found


class _ToBytes(torch.autograd.Function):
    """QuantizeLinear of ONNX."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return ((values / scale).round() + zero_point).clamp(0, LEVELS).to(torch.uint8)

    @staticmethod
    def symbolic(graph: Any, values: Any, scale: Any, zero_point: Any) -> Any:
        found = graph.op("QuantizeLinear", values, scale, zero_point)
        return found.setType(values.type().with_dtype(torch.uint8))


class _FromBytes(torch.autograd.Function):
    """DequantizeLinear of ONNX."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return (values.to(scale.dtype) - zero_point) * scale

    @staticmethod
    def symbolic(graph: Any, values: Any, scale: Any, zero_point: Any) -> Any:
        found = graph.op("DequantizeLinear", values, scale, zero_point)
        return found.setType(values.type().with_dtype(torch.float32))


def _last(graph: fx.GraphModule) -> fx.Node | None:
    """The rounding that gives a graph's output and nothing else."""
    output = output_value(graph.graph)
    return output if _rounds(graph, output) and len(output.users) == 1 else None


def _first(graph: fx.GraphModule) -> fx.Node | None:
    """The rounding that alone reads a graph's input."""
    readers = list(placeholder(graph.graph).users)
    return readers[0] if len(readers) == 1 and _rounds(graph, readers[0]) else None


def _rounds(graph: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), Quantizer)


def _quantizer(graph: fx.GraphModule, node: fx.Node) -> Quantizer:
    return cast(Quantizer, graph.get_submodule(str(node.target)))


def _numbers(quantizer: Quantizer) -> Tensor:
    return torch.stack([quantizer.scale, quantizer.zero_point.to(quantizer.scale)])


def _exchange(graph: fx.GraphModule, node: fx.Node, module: nn.Module) -> None:
    """Call another module at this node; others may share the one that it calls now."""
    path = f"{node.target}_exchanged"
    graph.add_submodule(path, module)
    node.target = path
    graph.recompile()
