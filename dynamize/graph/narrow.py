"""Leaving channels of private chains out: ranking them, sorting them, and copies that keep only the first ones.

The channels that stay are always a prefix, so that a narrower layer is a slice of the wide one and not a gather.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from dynamize.errors import DynamizeError, closest
from dynamize.graph.chains import Chain, private_chains
from dynamize.graph.macs import counting_macs
from dynamize.graph.nodes import placeholder
from dynamize.graph.trace import blank


def importance(region: fx.GraphModule, chain: Chain) -> Tensor:
    """How much each channel is worth, (channels,) in float64.

    The L2 norm of all weights that read it, times the magnitude of the last batch norm's scale as in Network Slimming
    (Liu et al. 2017, section 3); where the chain has no batch norm with a scale, times the norm of the producer's
    filter.
    """
    squares = torch.zeros(chain.channels, dtype=torch.float64)
    for target in chain.consumers:
        weight = region.get_parameter(f"{target}.weight").detach().cpu().double()
        blocks = weight.reshape(len(weight), chain.channels, -1)
        squares += blocks.square().sum((0, 2))
    norms = [region.get_submodule(target) for target in chain.per_channel]
    scales = [norm.weight for norm in norms if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.affine]
    if scales:
        strength = scales[-1].detach().cpu().double().abs()
    else:
        filters = region.get_parameter(f"{chain.producers[0]}.weight").detach().cpu().double()
        strength = filters.flatten(1).norm(dim=1)
    return squares.sqrt() * strength


def reorder(region: fx.GraphModule, chain: Chain, order: Tensor | Sequence[int]) -> None:
    """Sort the channels in place: channel i becomes what ``order[i]`` was. The region's output stays the same.

    Raises:
        DynamizeError: ``order`` does not have each channel once. Nothing was changed.
    """
    index = torch.as_tensor(order)
    if sorted(index.tolist()) != list(range(chain.channels)):
        raise DynamizeError(
            f"the order for `{chain.name}` does not name each of its {chain.channels} channels once: "
            "give a permutation such as importance(region, chain).argsort(descending=True)."
        )
    with torch.no_grad():
        for module, role in _layers(region, chain):
            for name, chosen in _chosen(module, role, chain.channels, index).items():
                getattr(module, name).copy_(chosen)


def narrow(region: fx.GraphModule, widths: Mapping[str, int]) -> fx.GraphModule:
    """A copy of ``region`` in which each named chain has only its first channels; the others stay as they are.

    In eval mode it answers like the region whose other channels are multiplied by zero at `mask_points`. It shares no
    memory with the region, and its nodes are annotated with its own shapes and MACs.

    Args:
        widths: how many channels remain, by the names of `private_chains`.

    Raises:
        DynamizeError: a name is no private chain of the region, or its width is not from 1 to its channels.
    """
    chains = {chain.name: chain for chain in private_chains(region)}
    for name, width in widths.items():
        _check(name, width, chains)
    narrowed = copy.deepcopy(region)
    for name, width in widths.items():
        for module, role in _layers(narrowed, chains[name]):
            _keep(module, role, chains[name].channels, width)
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
        read = {_unflattened(nodes[target].all_input_nodes[0], chain.channels) for target in chain.consumers}
        points[chain.name] = tuple(node.name for node in sorted(read))
    return points


def _unflattened(node: fx.Node, channels: int) -> fx.Node:
    while node.meta["shape"][1] != channels:
        node = node.all_input_nodes[0]
    return node


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


def _layers(region: fx.GraphModule, chain: Chain) -> Iterator[tuple[nn.Module, str]]:
    """Every layer with parameters for these channels, and on which side: "out", "each" or "in"."""
    for targets, role in ((chain.producers, "out"), (chain.per_channel, "each"), (chain.consumers, "in")):
        for target in targets:
            yield region.get_submodule(target), role


def _chosen(module: nn.Module, role: str, channels: int, index: Tensor) -> dict[str, Tensor]:
    """Copies of a layer's parameters and statistics for the channels of this index only."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if role == "in":
        weight = tensors["weight"]
        blocks = weight.unflatten(1, (channels, -1))  # several columns for each channel behind a flattened map
        return {"weight": blocks.index_select(1, index.to(weight.device)).flatten(1, 2).contiguous()}
    return {
        name: tensor.index_select(0, index.to(tensor.device)).contiguous()
        for name, tensor in tensors.items()
        if tensor.ndim
    }


_SIZES = {
    "out": ("out_channels", "out_features"),
    "in": ("in_channels", "in_features"),
    "each": ("in_channels", "out_channels", "groups", "num_features", "num_parameters"),
}


@torch.no_grad()
def _keep(module: nn.Module, role: str, channels: int, width: int) -> None:
    chosen = _chosen(module, role, channels, torch.arange(width))
    for name, tensor in chosen.items():
        old = getattr(module, name)
        setattr(module, name, nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor)
    size = chosen["weight"].shape[1] if role == "in" else width
    for name in _SIZES[role]:
        if hasattr(module, name):
            setattr(module, name, size)


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
