"""Exchanging layers of a converted network everywhere at once; costs are counted anew and answers compared."""

import copy
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, fx, nn

from dynamize.errors import DynamizeError
from dynamize.graph.fold import norm_pairs
from dynamize.graph.replace import TOLERANCE, difference, every_module, replace_modules
from dynamize.graph.trace import annotate
from dynamize.graph.tracer import NetworkTracer, blank
from dynamize.nn.gates import ALL_OPEN
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting


def replace_layers(network: DynamicNetwork, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put ``new[layer]`` in the place of each ``layer`` in the original graph and all pieces, and count MACs anew."""
    replace_modules(network, new)
    count_again(network)


def count_again(network: DynamicNetwork) -> None:
    """Write shapes and MACs into the original graphs and the pieces.

    For a network in eval mode whose layers were exchanged or have changed their sizes.
    """
    for prefix, graph in network.graphs.items():
        annotate(cast(fx.GraphModule, graph), network.seen_by(prefix))
    network.count()


def layers_and_norms(network: DynamicNetwork) -> dict[nn.Module, nn.Module]:
    """Every convolution or linear layer with the batch norm that alone reads it, in all graphs that call either.

    Those that pieces slice while they run are left out: their narrower ways slice both. So are layers that several ways
    share, each with a norm of its own behind.
    """
    pairs: dict[nn.Module, nn.Module] = {}
    elsewhere = sliced_layers(network)
    for root, graph in _graphs(network):
        here = {_module(root, layer): _module(root, norm) for layer, norm in norm_pairs(root, graph)}
        called = {_module(root, node) for node in graph.nodes if node.op == "call_module"}
        elsewhere |= called - set(here) - set(here.values())
        elsewhere |= {layer for layer, norm in here.items() if pairs.get(layer, norm) is not norm}
        pairs |= here
    return {layer: norm for layer, norm in pairs.items() if layer not in elsewhere and norm not in elsewhere}


def sliced_layers(network: DynamicNetwork) -> set[nn.Module]:
    """All modules whose weights pieces slice while the network runs (channel gates)."""
    return {module for piece in network.row for module in piece.sliced()}


def module_names(network: DynamicNetwork) -> dict[nn.Module, str]:
    """Paths of all modules, in the original graph where they are in it."""
    roots = [("", network), *network.graphs.items()]
    return {module: prefix + name for prefix, root in roots for name, module in root.named_modules()}


def exit_answers(network: DynamicNetwork) -> list[Tensor]:
    """Logits (N, classes) of all exits for four images of noise, in eval mode with all gates open."""
    like = blank(network, 4, *network.input_shape)
    images_NCHW = torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like)
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            return network.all_exits(images_NCHW, Setting(offset=ALL_OPEN))
    finally:
        network.train(training)


def in_double(network: DynamicNetwork) -> DynamicNetwork:
    """A copy on the CPU in float64, on which a change can be checked without the rounding of long sums."""
    return copy.deepcopy(network).cpu().double()


def check_answers(step: str, network: DynamicNetwork, wanted: list[Tensor]) -> None:
    """Refuse a change after which an exit answers otherwise than ``wanted``, which :func:`exit_answers` gave before.

    Raises:
        DynamizeError: by more than 1e-5 of the spread of the logits.
    """
    errors = [difference(*pair) for pair in zip(exit_answers(network), wanted, strict=True)]
    worst = max(range(len(errors)), key=lambda k: errors[k] if errors[k] == errors[k] else float("inf"))
    if not errors[worst] <= TOLERANCE:
        raise DynamizeError(
            f"{step}: exit {worst + 1} of {len(errors)} answers {errors[worst]:.1e} of the spread of its logits "
            f"otherwise than before, more than {TOLERANCE:g} allow. Leave this step out, and please report the network."
        )


def _graphs(network: DynamicNetwork) -> Iterator[tuple[nn.Module, fx.Graph]]:
    """Every graph in the network, with what holds its modules."""
    bodies = [part.graph for part in network.parts() if part.role == "head"]
    for module in every_module(network):
        if isinstance(module, fx.GraphModule):
            yield module, module.graph
        elif module in bodies:
            yield module, NetworkTracer().trace(module)


def _module(root: nn.Module, node: fx.Node) -> nn.Module:
    return root.get_submodule(str(node.target))
