"""Which part of a network is trained, while the rest stays as it is."""

from typing import Literal

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynamize.graph.nodes import callee
from dynamize.nn.network import DynamicNetwork

Trained = Literal["all", "heads", "last"]

_ANSWERING = (nn.Linear, nn.Conv2d)


def kept(network: DynamicNetwork, trained: Trained) -> tuple[list[nn.Module], list[nn.Module]]:
    """Modules that stay as they are, with their parameters and batch-norm statistics, and those inside of them that are
    trained all the same.

    Args:
        trained: all; heads: what pieces of the row brought that can be trained alone; last: that, and the last layer
            and the last batch norm of each network (Touvron et al. 2019, FixRes).
    """
    if trained == "all":
        return [], []
    held = [network.nets, *(piece for piece in network.row if not piece.trains_alone)]
    return held, last_layers(network) if trained == "last" else []


def last_layers(network: DynamicNetwork) -> list[nn.Module]:
    """The last layer with weights, and the last batch norm, that each network of the row calls; as far as there are."""
    found: list[nn.Module] = []
    for graph in network.graphs.values():
        if not isinstance(graph, fx.GraphModule):
            continue
        called = [callee(graph, node) for node in graph.graph.nodes if node.op == "call_module"]
        for kind in (_ANSWERING, _BatchNorm):
            found += [one for one in called if isinstance(one, kind)][-1:]
    return found
