"""How much each channel of a group is worth, by one of three criteria."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dynamize.arguments import class_numbers
from dynamize.compression.layers import dimensions, layers, place
from dynamize.compression.removal import ChannelGroup, Member
from dynamize.nn.gates import ALL_OPEN
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting

Criterion = Literal["magnitude", "bn_scale", "taylor"]


def importance(network: DynamicNetwork, group: ChannelGroup, criterion: Criterion) -> Tensor:
    """How much each channel is worth, (channels,) in float64 on the CPU.

    magnitude: the L2 norm of all weights that make or read it, each layer's divided by their mean, averaged over the
    layers (Li et al. 2017; over coupled layers as in DepGraph, Fang et al. 2023, sec. 3.4). bn_scale: the magnitude of
    the batch norms' scales in the same way (Network Slimming, Liu et al. 2017); magnitude where there is none. taylor:
    |sum of weight times gradient| over all its parameters, the first-order change of the loss without it (Molchanov
    et al. 2019, eq. 8), summed over the layers that make it; gradients come from :func:`add_gradients`.
    """
    if criterion == "taylor":
        return _taylor(network, group)
    known = layers(network)
    scales = [
        _normalised(known[member.layer].get_parameter("weight").detach().double().cpu().abs()[member.index].mean(1))
        for member in group.members
        if _has_scale(known.get(member.layer))
    ]
    if criterion == "bn_scale" and scales:
        return torch.stack(scales).mean(0)
    norms = [_normalised(_squares(network, member).sqrt()) for member in group.members if member.side != "each"]
    return torch.stack(norms).mean(0)


def _has_scale(module: nn.Module | None) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine


def _normalised(values_C: Tensor) -> Tensor:
    return values_C / values_C.mean().clamp_min(1e-30)


def _squares(network: DynamicNetwork, member: Member) -> Tensor:
    """Sum of squared weights of each channel in one layer, (channels,)."""
    weight, dim = _weight(network, member)
    return weight.square().transpose(0, dim).flatten(1).sum(1)[member.index].sum(1)


def _weight(network: DynamicNetwork, member: Member) -> tuple[Tensor, int]:
    if member.dim is None:
        weight = layers(network)[member.layer].get_parameter("weight")
        return weight.detach().double().cpu(), 1 if member.side == "in" else 0
    holder, name = place(network, member.layer)
    tensor: Tensor = getattr(holder, name)
    return tensor.detach().double().cpu(), member.dim


def _taylor(network: DynamicNetwork, group: ChannelGroup) -> Tensor:
    known = layers(network)
    total = torch.zeros(group.channels, dtype=torch.float64)
    for member in group.members:
        if member.side == "in" or member.layer not in known:
            continue
        module = known[member.layer]
        change = torch.zeros(group.channels, dtype=torch.float64)
        for name, _ in dimensions(module, member.side):
            tensor = getattr(module, name)
            if isinstance(tensor, nn.Parameter) and tensor.grad is not None:
                products = tensor.detach().double() * tensor.grad.double()
                change += products.reshape(len(tensor), -1).sum(1).cpu()[member.index].sum(1)
        total += change.abs()
    return total


def add_gradients(network: DynamicNetwork, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Sum the gradients of the cross entropy of all exits over some batches into the parameters' ``grad``."""
    network.zero_grad(set_to_none=True)
    wanted = {parameter: parameter.requires_grad for parameter in network.parameters()}
    try:
        network.eval().requires_grad_(True)
        with torch.enable_grad():
            for images, labels in batches:
                exits = network.all_exits(images, Setting(offset=ALL_OPEN))
                truth = class_numbers(labels, exits[-1].shape[1], "the train images")
                losses = [cross_entropy(logits.float(), truth) for logits in exits]
                torch.stack(losses).sum().backward()
    finally:
        for parameter, before in wanted.items():
            parameter.requires_grad_(before)
