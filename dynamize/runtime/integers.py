"""Segments in bytes hand bytes to each other: a quarter of the memory, and nothing is computed at the border."""

from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from dynamize.graph.nodes import output_value, placeholder
from dynamize.graph.trace import Whole
from dynamize.nn.gated import GatedSegment
from dynamize.nn.heads import ExitHead
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.quantized import LEVELS, Quantizer


def exchange_bytes(network: DynamicNetwork) -> None:
    """Let features cross the borders between segments as bytes, in place, where both sides round them alike.

    The same numbers are computed. For execution by a backend only: ``all_exits`` still works, training does not.
    """
    for k, head in enumerate(network.heads):
        giver = _end(network.segments[k])
        takers = [_start(network.segments[k + 1]), cast(ExitHead, head).body]
        last = None if giver is None else _last(giver)
        firsts = [_first(taker) if isinstance(taker, fx.GraphModule) else None for taker in takers]
        if giver is None or last is None or any(first is None for first in firsts):
            continue
        held = [_quantizer(giver, last)]
        held += [_quantizer(cast(fx.GraphModule, t), cast(fx.Node, f)) for t, f in zip(takers, firsts, strict=True)]
        if any(not torch.equal(_numbers(held[0]), _numbers(one)) for one in held[1:]):
            continue
        _exchange(giver, last, ToBytes(held[0]))
        for taker, first in zip(takers, firsts, strict=True):
            _exchange(cast(fx.GraphModule, taker), cast(fx.Node, first), FromBytes(held[0]))


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


def _end(segment: nn.Module) -> fx.GraphModule | None:
    """The graph that gives a segment's features; None if it is a unit with several ways."""
    last = segment.pieces[-1] if isinstance(segment, GatedSegment) else segment
    return last if isinstance(last, fx.GraphModule) else None


def _start(segment: nn.Module) -> nn.Module:
    return segment.pieces[0] if isinstance(segment, GatedSegment) else segment


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
