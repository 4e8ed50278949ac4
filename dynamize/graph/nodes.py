"""Looking up nodes of a graph."""

from typing import Any

from torch import fx


def placeholder(graph: fx.Graph) -> fx.Node:
    """The input; of a masked region, which has further inputs, the first one."""
    first: fx.Node = graph.find_nodes(op="placeholder")[0]
    return first


def output_value(graph: fx.Graph) -> fx.Node:
    """What the graph of one output hands on: not the output node itself, but the node that it returns."""
    (value,) = graph.output_node().all_input_nodes
    return value


def nodes_by_name(graph: fx.Graph) -> dict[str, fx.Node]:
    """All nodes by their names, in order of execution."""
    return {node.name: node for node in graph.nodes}


def positions(graph: fx.Graph) -> dict[str, int]:
    """The place of each node in the order of execution, by its name."""
    return {node.name: i for i, node in enumerate(graph.nodes)}


def callee(module: fx.GraphModule, node: fx.Node) -> Any:
    """The module, function or name of the method that a node calls; None for other nodes."""
    if node.op == "call_module":
        return module.get_submodule(str(node.target))
    return node.target if node.op in ("call_function", "call_method") else None
