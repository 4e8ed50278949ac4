"""Weights of a converted network written out, so that channels can be cut."""

from typing import cast

from torch import fx, nn

from dynamize.graph.trace import annotate
from dynamize.graph.written import computed_layers, functions_to_layers
from dynamize.nn.network import DynamicNetwork
from dynamize.rewrite.exchange import replace_layers

_LISTED = 5


def write_out(network: DynamicNetwork) -> list[str]:
    """Let each convolution, linear layer and batch norm of the original graphs hold its tensors as torch's own do, in
    place: weights that are computed from others (weight norm, standardised ones) are themselves trained from now on.
    Answers stay.

    What functions compute inside of units that stand in the row already stays as it is.

    Returns:
        A note where there were any.
    """
    training = network.training
    network.eval()
    graphs = {prefix: cast(fx.GraphModule, graph) for prefix, graph in network.graphs.items()}
    found: list[str] = []
    layers: dict[nn.Module, nn.Module] = {}
    for prefix, graph in graphs.items():
        annotate(graph, network.seen_by(prefix))
        layers |= (here := computed_layers(graph))
        found += [prefix + path for path, module in graph.named_modules() if module in here]
    replace_layers(network, layers)
    if not network.changing:
        made = [prefix + path for prefix, graph in graphs.items() for path in functions_to_layers(graph)]
        found += made
        if made:
            for prefix, graph in graphs.items():
                annotate(graph, network.seen_by(prefix))
            network.rebuild()
    network.train(training)
    if not found:
        return []
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return [
        f"{len(found)} layers hold their tensors themselves now, which were computed in each call or given to a "
        f"function: {', '.join(found[:_LISTED])}{more}"
    ]
