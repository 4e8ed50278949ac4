"""Where in an image a classifier's evidence lies: the feature map whose means its last linear layer reads."""

from dataclasses import dataclass

import torch
from torch import fx, nn

from dynamize.graph.extract import extract
from dynamize.graph.nodes import callee, output_value, placeholder
from dynamize.graph.tracer import blank

_ALIKE = 1e-3  # of the spread of logits


@dataclass(frozen=True)
class LastMap:
    """The name of the node that gives the map, its size (h, w), and the layer that reads its channel means."""

    node: str
    size: tuple[int, int]
    linear: nn.Linear


def last_map(traced: fx.GraphModule) -> LastMap | None:
    """Of an annotated graph; None for one that does not end in the mean of a map and a linear layer.

    Whether it does is found out by comparing with what these two give, not by the kinds of its layers.
    """
    end = output_value(traced.graph)
    linear = callee(traced, end)
    node = end
    while len(node.meta["shape"]) != 4 or set(node.meta["shape"][2:]) == {1}:
        read = [one for one in node.all_input_nodes if one.meta.get("shape") is not None]
        if len(read) != 1:  # sizes that are read besides do not count
            return None
        (node,) = read
    _, channels, height, width = map(int, node.meta["shape"])
    if not isinstance(linear, nn.Linear) or linear.in_features != channels or node is placeholder(traced.graph):
        return None
    shape = placeholder(traced.graph).meta["shape"]
    images = torch.randn(2, *shape[1:], generator=torch.Generator().manual_seed(0)).to(blank(traced, 1))
    with torch.no_grad():
        features = extract(traced, None, node.name)(images)
        wanted = extract(traced, node.name, None)(features.clone())
        apart = (linear(features.mean((2, 3))) - wanted).abs().max()
    alike = bool(apart <= _ALIKE * (wanted.std() + 1e-6))
    return LastMap(node.name, (height, width), linear) if alike else None
