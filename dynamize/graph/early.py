"""Sizes that are read early and used late: what would keep the beginning of a network alive until its end.

``n = x.size(0)`` at the top and ``x.view(n, -1)`` at the end is no data that is still in use. Behind a place where the
network can be cut, a size that follows the number of images is read anew from what is at hand there, and any other is
written into the graph as the number that it is.
"""

import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from dynamize.graph.cuts import separating
from dynamize.graph.tracer import BATCHES


def read_late(graph: fx.Graph) -> None:
    """Let no fact of an annotated graph (a node with ``fact`` in its ``meta``) be used behind a place where the network
    can be cut. A fact of which neither can be said is left as it is."""
    facts = {node for node in graph.nodes if "fact" in node.meta and node.op not in ("output", "get_attr")}
    if not facts:
        return
    position = {node: i for i, node in enumerate(graph.nodes)}
    cuts = [position[node] for node, _ in separating(graph, facts)]
    begins: dict[fx.Node, int] = {}  # where the first tensor is that a fact is read from
    for node in graph.nodes:
        if node in facts:
            sources = [begins.get(source, position[source]) for source in node.all_input_nodes]
            begins[node] = min(sources, default=position[node])
    for user in list(graph.nodes):
        for fact in [] if user in facts else [one for one in user.all_input_nodes if one in facts]:
            if any(begins[fact] < cut < position[user] for cut in cuts):
                _replace(user, fact)


def _replace(user: fx.Node, fact: fx.Node) -> None:
    two, three = fact.meta["fact"]
    values: list[Any]
    if isinstance(two, (torch.dtype, torch.device)):
        tensor = next(iter(_at_hand(user)), None)
        values = [] if tensor is None else [_insert(user, "call_function", getattr, tensor, fact.args[1])]
    elif isinstance(two, tuple) and len(two) == len(three):
        values = [(*(_size(user, *pair) for pair in zip(two, three, strict=True)),)]
    else:
        values = [_size(user, two, three)]
    for value in values:
        if None not in (value if isinstance(value, tuple) else (value,)):
            exchange: Callable[[Any], Any] = lambda one: value if one is fact else one  # noqa: B023, E731
            user.args, user.kwargs = map_aggregate(user.args, exchange), map_aggregate(user.kwargs, exchange)


def _size(user: fx.Node, two: Any, three: Any) -> Any:
    """A number that stands for itself, or what reads so many times the number of images from a tensor at hand."""
    if two == three:
        return two
    if not isinstance(two, int) or two * BATCHES[1] != three * BATCHES[0]:
        return None
    for tensor in _at_hand(user):
        for dimension, (one, other) in enumerate(zip(*tensor.meta["sizes"], strict=True)):
            if one != other and one * BATCHES[1] == other * BATCHES[0]:
                ratio = Fraction(two, one)
                size = _insert(user, "call_method", "size", tensor, dimension)
                if ratio.numerator > 1:
                    size = _insert(user, "call_function", operator.mul, size, ratio.numerator)
                if ratio.denominator > 1:
                    size = _insert(user, "call_function", operator.floordiv, size, ratio.denominator)
                return size
    return None


def _at_hand(user: fx.Node) -> list[fx.Node]:
    """Tensors that follow the number of images: inputs of ``user``, or else the newest before it."""
    given = [node for node in user.all_input_nodes if _follows(node)]
    node = user.prev
    while not given and node.op != "root":
        given = [node] if _follows(node) else []
        node = node.prev
    return given


def _follows(node: fx.Node) -> bool:
    two, three = node.meta.get("sizes", ((), ()))
    return len(two) == len(three) and two != three


def _insert(user: fx.Node, op: str, target: Any, *args: Any) -> fx.Node:
    with user.graph.inserting_before(user):
        node = user.graph.create_node(op, target, args)
    node.meta = {"shape": None, "macs": 0.0, "floating": False}
    return node
