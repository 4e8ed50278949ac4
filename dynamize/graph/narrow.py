"""Leaving channels of private chains out: ranking them, sorting them, and copies that keep only the first ones.

The channels that stay are always a prefix, so that a narrower layer is a slice of the wide one and not a gather.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx

from dynamize.errors import DynamizeError, closest
from dynamize.graph.chains import Chain, private_chains
from dynamize.graph.macs import counting_macs
from dynamize.graph.nodes import placeholder
from dynamize.graph.slices import held, keep_first, scale_of, taken
from dynamize.graph.tracer import blank


def importance(region: fx.GraphModule, chain: Chain) -> Tensor:
    """How much each unit of the chain is worth, (units,) in float64: a channel, or those that go together.

    The L2 norm of all weights that read it, times the magnitude of the last norm's scale as in Network Slimming (Liu
    et al. 2017, section 3); where the chain has no norm with a scale, times the norm of the producer's filter.
    """
    squares = torch.zeros(chain.units, dtype=torch.float64)
    for target in chain.consumers:
        weight = _double(region.get_parameter(f"{target}.weight"))
        squares += weight.unflatten(1, (chain.units, -1)).square().flatten(2).sum((0, 2))
    norms = [region.get_submodule(target) for target in chain.per_channel if _is_module(region, target)]
    scales = [scale for norm in norms if (scale := scale_of(norm)) is not None]
    strengths = scales[-1] if scales else region.get_parameter(f"{chain.producers[0]}.weight").flatten(1)
    return squares.sqrt() * _double(strengths).unflatten(0, (chain.units, -1)).flatten(1).norm(dim=1)


def _double(values: Tensor) -> Tensor:
    return values.detach().cpu().double()


def _is_module(region: fx.GraphModule, target: str) -> bool:
    return target in dict(region.named_modules())


def reorder(region: fx.GraphModule, chain: Chain, order: Tensor | Sequence[int]) -> None:
    """Sort the units of a chain in place: unit i becomes what ``order[i]`` was. The region's output stays the same.

    Raises:
        DynamizeError: ``order`` does not have each unit once. Nothing was changed.
    """
    index = torch.as_tensor(order)
    if sorted(index.tolist()) != list(range(chain.units)):
        raise DynamizeError(
            f"the order for `{chain.name}` does not name each of its {chain.units} "
            f"{'channels' if chain.together == 1 else 'groups of channels'} once: "
            "give a permutation such as importance(region, chain).argsort(descending=True)."
        )
    with torch.no_grad():
        for target, role in _layers(chain):
            for holder, name, dim in held(region, target, role):
                tensor = getattr(holder, name)
                tensor.copy_(taken(tensor, dim, chain.units, index))


def narrow(region: fx.GraphModule, widths: Mapping[str, int]) -> fx.GraphModule:
    """A copy of ``region`` in which each named chain has only its first channels; the others stay as they are.

    In eval mode it answers like the region whose other channels are multiplied by zero at `mask_points`. It shares no
    memory with the region, and its nodes are annotated with its own shapes and MACs.

    Args:
        widths: how many channels remain, by the names of `private_chains`; where channels go together, a multiple.

    Raises:
        DynamizeError: a name is no private chain of the region, or it cannot have this width.
    """
    chains = {chain.name: chain for chain in private_chains(region)}
    for name, width in widths.items():
        _check(name, width, chains)
    narrowed = copy.deepcopy(region)
    for name, width in widths.items():
        chain = chains[name]
        for target, role in _layers(chain):
            keep_first(narrowed, target, role, chain.units, width // chain.together)
    _annotate(narrowed)
    return narrowed


def mask_points(region: fx.GraphModule, chains: Sequence[Chain]) -> dict[str, tuple[str, ...]]:
    """Where to multiply the channels of each chain, by its name, by zeros and ones to get what `narrow` computes.

    These are the nodes that the consumers read, in order of execution, (N, C, H, W) or (N, C); for a linear layer on
    a flattened feature map the node before flattening. Masked here and not before the batch norm, a channel that is
    left out is really zero, whatever the biases are.
    """
    nodes = {str(node.target): node for node in region.graph.nodes if node.op == "call_module"}
    points: dict[str, tuple[str, ...]] = {}
    for chain in chains:
        read = {_unflattened(nodes[target].all_input_nodes[0], chain) for target in chain.consumers}
        points[chain.name] = tuple(node.name for node in sorted(read))
    return points


def _unflattened(read: fx.Node, chain: Chain) -> fx.Node:
    """The feature map that was flattened to what a linear layer reads, or what is read itself."""
    node = read
    while len(node.meta["shape"]) == 2 and node.target not in chain.producers:
        node = node.all_input_nodes[0]
    return node if len(node.meta["shape"]) > 2 and math.prod(node.meta["shape"][2:]) > 1 else read


def _check(name: str, width: int, chains: Mapping[str, Chain]) -> None:
    if name not in chains:
        raise DynamizeError(
            f"`{name}` is no private channel chain here. {closest(name, list(chains))}"
            f"Use the names of private_chains(region): {', '.join(chains) or 'there are none'}."
        )
    if not isinstance(width, int) or isinstance(width, bool) or not 1 <= width <= chains[name].channels:
        raise DynamizeError(
            f"`{name}` cannot keep {width!r} channels: give a whole number from 1 to {chains[name].channels}."
        )
    if width % chains[name].together:
        raise DynamizeError(
            f"`{name}` cannot keep {width} channels: they go in groups, so give a multiple of {chains[name].together}."
        )


def _layers(chain: Chain) -> Iterator[tuple[str, str]]:
    """Every layer with parameters for these channels, and on which side: "out", "each" or "in"."""
    for targets, role in ((chain.producers, "out"), (chain.per_channel, "each"), (chain.consumers, "in")):
        for target in targets:
            yield target, role


class _Measure(fx.Interpreter):
    def run_node(self, n: fx.Node) -> object:
        with counting_macs() as counted:
            value = super().run_node(n)
        n.meta["macs"] = counted()
        n.meta["shape"] = tuple(value.shape) if isinstance(value, Tensor) else None
        return value


def _annotate(narrowed: fx.GraphModule) -> None:
    """Write shapes and MACs anew, measured on a copy so that no statistics move."""
    trial = copy.deepcopy(narrowed).eval()
    with torch.no_grad():
        _Measure(trial).run(blank(trial, *placeholder(trial.graph).meta["shape"]))
    for node, measured in zip(narrowed.graph.nodes, trial.graph.nodes, strict=True):
        node.meta.update({key: measured.meta[key] for key in ("macs", "shape")})
