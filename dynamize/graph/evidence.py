"""Where in an image a classifier's evidence lies: its last feature map, and what makes logits of that."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from dynamize.graph.cuts import separating
from dynamize.graph.extract import extract
from dynamize.graph.nodes import callee, output_value, placeholder
from dynamize.graph.tracer import blank

_ALIKE = 1e-3  # of the spread of logits


@dataclass(frozen=True)
class LastMap:
    """The last feature map of more than one pixel.

    Attributes:
        node: its name in the graph.
        shape: (C, h, w).
        means: whether the network ends in the mean of the map and one linear layer, so that each pixel of it adds to
            the logits by itself.
    """

    node: str
    shape: tuple[int, int, int]
    means: bool


def last_map(traced: fx.GraphModule) -> LastMap | None:
    """Of an annotated graph; None where no map of several pixels separates the image from the logits."""
    node = _before_the_end(traced)
    if node is None:
        separates = separating(traced.graph)
        if not separates:
            return None
        node = separates[-1][0]
    _, channels, height, width = map(int, node.meta["shape"])
    return LastMap(node.name, (channels, height, width), _ends_in_means(traced, node))


def classifier(traced: fx.GraphModule) -> Any:
    """The layer that gives the logits, before what only hands them on."""
    node = output_value(traced.graph)
    while isinstance(found := callee(traced, node), nn.Identity):
        (node,) = node.all_input_nodes
    return found


def _before_the_end(traced: fx.GraphModule) -> fx.Node | None:
    """The map that a straight line of layers makes logits of."""
    node = output_value(traced.graph)
    while len(node.meta["shape"]) != 4 or set(node.meta["shape"][2:]) == {1}:
        read = [one for one in node.all_input_nodes if one.meta.get("shape") is not None]
        if len(read) != 1:  # sizes that are read besides do not count
            return None
        (node,) = read
    return None if node is placeholder(traced.graph) else node


def _ends_in_means(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Found out by comparing with what these two give, not by the kinds of its layers."""
    linear = classifier(traced)
    if not isinstance(linear, nn.Linear) or linear.in_features != int(node.meta["shape"][1]):
        return False
    shape = placeholder(traced.graph).meta["shape"]
    images = torch.randn(2, *shape[1:], generator=torch.Generator().manual_seed(0)).to(blank(traced, 1))
    with torch.no_grad():
        features = extract(traced, None, node.name)(images)
        wanted = extract(traced, node.name, None)(features.clone())
        apart = (linear(features.mean((2, 3))) - wanted).abs().max()
    return bool(apart <= _ALIKE * (wanted.std() + 1e-6))
