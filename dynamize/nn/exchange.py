"""Exchanging layers of a converted network everywhere at once; costs are counted anew and answers compared."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, fx, nn

from dynamize.errors import DynamizeError
from dynamize.graph.fold import norm_pairs
from dynamize.graph.macs import count_macs
from dynamize.graph.nodes import nodes_by_name
from dynamize.graph.replace import TOLERANCE, difference, every_module, replace_modules
from dynamize.graph.trace import NetworkTracer, annotate, blank
from dynamize.nn.channels import ChannelUnit
from dynamize.nn.gates import ALL_OPEN, gate_macs
from dynamize.nn.heads import ExitHead
from dynamize.nn.network import DynamicNetwork


def replace_layers(network: DynamicNetwork, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put ``new[layer]`` in the place of each ``layer`` in the original graph, the segments, the gated units and the
    heads, and count MACs anew."""
    replace_modules(network, new)
    count_again(network)


def count_again(network: DynamicNetwork) -> None:
    """Write shapes and MACs into the original graph, and the MACs of paths and gates into the gated units.

    For a network in eval mode whose layers were exchanged or have changed their sizes.
    """
    annotate(network.plain, network.input_shape)
    nodes = nodes_by_name(network.plain.graph)
    for unit in network.units:
        example = blank(network.plain, *nodes[unit.region[0]].meta["shape"])
        macs = [0.0 if way is None else count_macs(way, example.clone()) for way in unit.paths()]
        unit.path_macs = tuple(macs)
        unit.path_costs.copy_(torch.tensor(macs) / macs[-1])
        unit.gate_macs = gate_macs(unit.gate, example)


def layers_and_norms(network: DynamicNetwork) -> dict[nn.Module, nn.Module]:
    """Every convolution or linear layer with the batch norm that alone reads it, in all graphs that call either.

    Those of units with channel gates are left out: their narrower paths slice both.
    """
    pairs: dict[nn.Module, nn.Module] = {}
    elsewhere = channel_layers(network)
    for root, graph in _graphs(network):
        here = {_module(root, layer): _module(root, norm) for layer, norm in norm_pairs(root, graph)}
        called = {_module(root, node) for node in graph.nodes if node.op == "call_module"}
        elsewhere |= called - set(here) - set(here.values())
        pairs |= here
    return {layer: norm for layer, norm in pairs.items() if layer not in elsewhere and norm not in elsewhere}


def channel_layers(network: DynamicNetwork) -> set[nn.Module]:
    """All modules inside of units with channel gates."""
    return {one for unit in network.units if isinstance(unit, ChannelUnit) for one in unit.body.modules()}


def module_names(network: DynamicNetwork) -> dict[nn.Module, str]:
    """Paths of all modules, in the original graph where they are in it."""
    roots = (network, network.plain)
    return {module: name for root in roots for name, module in root.named_modules()}


def answers(network: DynamicNetwork) -> list[Tensor]:
    """Logits (N, classes) of all exits for four images of noise, in eval mode with all gates open."""
    like = blank(network, 4, *network.input_shape)
    images_NCHW = torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like)
    offset, training = network.gate_offset, network.training
    network.gate_offset = ALL_OPEN
    network.eval()
    try:
        with torch.no_grad():
            return network.all_exits(images_NCHW)
    finally:
        network.gate_offset = offset
        network.train(training)


def check_answers(step: str, network: DynamicNetwork, wanted: list[Tensor]) -> None:
    """Refuse a change after which an exit answers otherwise than ``wanted``, which :func:`answers` gave before.

    Raises:
        DynamizeError: by more than 1e-5 of the largest logit.
    """
    errors = [difference(*pair) for pair in zip(answers(network), wanted, strict=True)]
    worst = max(range(len(errors)), key=lambda k: errors[k] if errors[k] == errors[k] else float("inf"))
    if not errors[worst] <= TOLERANCE:
        raise DynamizeError(
            f"{step}: exit {worst + 1} of {len(errors)} answers {errors[worst]:.1e} of its largest logit otherwise "
            f"than before, more than {TOLERANCE:g} allow. Leave this step out, and please report the network."
        )


def _graphs(network: DynamicNetwork) -> Iterator[tuple[nn.Module, fx.Graph]]:
    """Every graph in the network, with what holds its modules."""
    for module in every_module(network):
        if isinstance(module, fx.GraphModule):
            yield module, module.graph
        elif isinstance(module, ExitHead):
            yield module.body, NetworkTracer().trace(module.body)


def _module(root: nn.Module, node: fx.Node) -> nn.Module:
    return root.get_submodule(str(node.target))
