"""Putting another region in the place of one between two cut points."""

import operator
from typing import Any

from torch import fx, nn

from dynamize.graph.extract import cone
from dynamize.graph.nodes import nodes_by_name


def splice(traced: fx.GraphModule, after: str, upto: str, region: fx.GraphModule | None) -> None:
    """From now on ``traced`` computes its cut point ``upto`` from the cut point ``after`` as ``region`` does.

    Both nodes keep their names, so other cut points and regions stay where they are; shapes and MACs have to be
    annotated anew. Layers stand under the names that they have in ``region``, unless these are in use elsewhere.

    Args:
        region: of one input and one output, which shares layers with ``traced`` or has copies of its own; None hands
            the value on as it is.
    """
    nodes = nodes_by_name(traced.graph)
    start, end = nodes[after], nodes[upto]
    _clear(traced.graph, start, end)
    others = [node for node in traced.graph.nodes if node is not end and node.op in ("call_module", "get_attr")]
    taken = {str(node.target) for node in others}
    last = start
    values: dict[fx.Node, fx.Node] = {}
    adopted: dict[str, str] = {}
    for node in region.graph.nodes if region is not None else ():
        if node.op == "placeholder":
            values[node] = start
        elif node.op == "output":
            last = values[node.args[0]]
        else:
            with traced.graph.inserting_before(end):
                values[node] = traced.graph.node_copy(node, lambda source: values[source])
            if node.op in ("call_module", "get_attr"):
                path = str(node.target)
                if path not in adopted:
                    adopted[path] = _adopt(traced, path, operator.attrgetter(path)(region), taken, upto)
                values[node].target = adopted[path]
    end.op, end.target = "call_module", f"{upto}_spliced"
    end.args, end.kwargs = (last,), {}
    traced.add_submodule(f"{upto}_spliced", nn.Identity())
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced.recompile()


def _clear(graph: fx.Graph, start: fx.Node, end: fx.Node) -> None:
    """Erase what was computed for ``end`` only."""
    before = cone(end, start) - {end}
    end.args, end.kwargs = (start,), {}
    for node in reversed(graph.nodes):
        if node in before and not node.users and node.op != "placeholder":
            graph.erase_node(node)


def _adopt(traced: fx.GraphModule, path: str, layer: Any, taken: set[str], upto: str) -> str:
    """Make a layer or a tensor one of ``traced``; returns where it stands."""
    try:
        known = operator.attrgetter(path)(traced)
    except AttributeError:
        known = None
    if known is layer:
        return path
    if known is None or path in taken:
        path = f"{upto}_{path.replace('.', '_')}"
    if isinstance(layer, nn.Module):
        traced.add_submodule(path, layer)
        return path
    parent, _, name = path.rpartition(".")
    setattr(traced.get_submodule(parent), name, layer)
    return path
