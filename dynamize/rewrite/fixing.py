"""Making decisions static: one option for all images."""

from collections.abc import Mapping

import torch
from torch import fx, nn

from dynamize.graph.splice import splice
from dynamize.graph.trace import annotate
from dynamize.graph.tracer import NetworkTracer
from dynamize.nn.network import DynamicNetwork


def fix_options(network: DynamicNetwork, options: Mapping[str, int]) -> None:
    """Give gated units one way for all images, in place; their gates are gone.

    Where that is not the original way, what it leaves out is gone from ``network.plain`` too.

    Args:
        options: number of the way by name of the decision.
    """
    training = network.training
    network.eval()
    for unit in network.changing:
        ways = unit.paths()
        option = options.get(unit.name, len(ways) - 1)
        if option < len(ways) - 1:
            way = ways[option]
            if way is not None and unit.slices:
                way = _own(way)
            splice(network.plain, unit.place[0], unit.place[1], None if way is None else _traced(way))
    annotate(network.plain, network.input_shape)
    network.remove(options)
    network.train(training)


def _traced(way: nn.Module) -> fx.GraphModule:
    if isinstance(way, fx.GraphModule):
        return way
    whole = nn.Sequential(way)  # a layer by itself is a leaf
    return fx.GraphModule(whole, NetworkTracer().trace(whole))


def _own(way: nn.Module) -> nn.Module:
    """A narrower way with tensors of its own instead of slices."""
    whole = {"memory_format": torch.contiguous_format}
    for module in way.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module._parameters[name] = nn.Parameter(parameter.detach().clone(**whole), parameter.requires_grad)
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = buffer.clone(**whole)
    return way
