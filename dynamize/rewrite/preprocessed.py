"""A network that makes the images it wants of those that another one takes."""

from collections.abc import Sequence

from torch import fx, nn

from dynamize.graph.nodes import nodes_by_name, placeholder
from dynamize.graph.trace import annotate, trace
from dynamize.nn.preprocess import Preprocess
from dynamize.preprocessing import Steps

_PATHS = "nn_module_stack"


def preprocessed(net: nn.Module, given: Sequence[int], steps: Steps | None) -> fx.GraphModule:
    """A network's graph, annotated, which takes images of the shape ``given``, (C, H, W).

    Raises:
        DynamizeError: it cannot be traced, or does not run on images of that size.
    """
    channels, *size = given
    traced = trace(net, (channels, *(size if steps is None else steps.size)))
    if isinstance(net, fx.GraphModule):
        _keep_paths(traced, net)
    if steps is None:
        return traced
    first = placeholder(traced.graph)
    traced.add_submodule(
        "preprocess",
        Preprocess((size[0], size[1]), steps.size, steps.share, steps.scale, steps.shift, steps.interpolation),
    )
    with traced.graph.inserting_after(first):
        own = traced.graph.call_module("preprocess", (first,))
    first.replace_all_uses_with(own)
    own.args = (first,)
    traced.recompile()
    annotate(traced, given)
    return traced


def _keep_paths(traced: fx.GraphModule, before: fx.GraphModule) -> None:
    """Let nodes belong to the modules that they belonged to in the graph that was read again."""
    known = nodes_by_name(before.graph)
    for node in traced.graph.nodes:
        same = known.get(node.name)
        if same is not None and same.op == node.op and _PATHS in same.meta:
            node.meta[_PATHS] = same.meta[_PATHS]
