"""Taking a region of a network out as a module of its own."""

from torch import fx

from dynamize.graph.nodes import nodes_by_name, output_value, placeholder


def extract(traced: fx.GraphModule, after: str | None, upto: str | None) -> fx.GraphModule:
    """The nodes that follow ``after`` up to and including ``upto`` as a network of one input and one output.

    Both are names of cut points; None stands for the network's input and output. Modules and parameters are shared
    with ``traced``, under the same names, so nothing is copied and training one trains the other.
    """
    nodes = nodes_by_name(traced.graph)
    last = nodes[upto] if upto else output_value(traced.graph)
    first = nodes[after] if after else placeholder(traced.graph)

    region = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {first: region.placeholder("x")}
    copies[first].meta.update(first.meta, macs=0.0)
    needed = cone(last, first)
    for node in traced.graph.nodes:
        if node in needed:
            copies[node] = region.node_copy(node, lambda source: copies[source])
    region.output(copies[last])
    module = fx.GraphModule(traced, region, "Segment")
    module.train(traced.training)
    return module


def cone(last: fx.Node, first: fx.Node) -> set[fx.Node]:
    """What has to be computed for ``last`` once ``first`` is known: ``last``, but not ``first``."""
    needed: set[fx.Node] = set()
    stack = [last]
    while stack:
        node = stack.pop()
        if node is not first and node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    return needed
