"""A layer as a product of smaller ones: truncated SVD of linear layers and 1x1 convolutions, Tucker-2 of larger
kernels (Kim et al. 2016, sec. 3.1), computed in float64."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dynamize.graph.fold import has_hooks

Ranks = tuple[int, ...]  # one for a linear layer or 1x1 convolution; outputs and inputs of the core for a larger kernel


def can_factorize(layer: nn.Module) -> bool:
    """Whether this is a linear layer, or a convolution in which every output reads every input; its weight is its own,
    and not computed (``weight_norm``)."""
    if has_hooks(layer):
        return False
    if type(layer) is nn.Linear:
        return True
    return type(layer) is nn.Conv2d and layer.groups == 1 and (not _pointwise(layer) or layer.padding == (0, 0))


def _pointwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or cast(nn.Conv2d, layer).kernel_size == (1, 1)


def spectra(layer: nn.Module) -> list[Tensor]:
    """Squared singular values, descending, of the matrix, or of a larger kernel unfolded along outputs and inputs."""
    weight = _weight(layer)
    if _pointwise(layer):
        return [torch.linalg.svdvals(weight.flatten(1)).square()]
    return [_directions(weight, 0)[0], _directions(weight, 1)[0]]


def ranks_at(found: Sequence[Tensor], energy: float, multiple: int) -> Ranks:
    """The least ranks, in whole multiples, that keep a share of the sum of squared singular values.

    Args:
        found: from :func:`spectra`.
        energy: the share, 0 to 1.
    """
    return tuple(_rank(squares, energy, multiple) for squares in found)


def _rank(squares: Tensor, energy: float, multiple: int) -> int:
    kept = squares.cumsum(0) >= energy * squares.sum() * (1 - 1e-12)
    least = int(kept.int().argmax()) + 1 if bool(kept.any()) else len(squares)
    return min(len(squares), math.ceil(least / multiple) * multiple)


def factor_costs(layer: nn.Module, ranks: Ranks, shape: Sequence[int], out_shape: Sequence[int]) -> tuple[float, float]:
    """MACs per image of the layer and of its factors.

    Args:
        shape: of the input for one image, batch included.
        out_shape: of the output.
    """
    weight = layer.get_parameter("weight")
    outputs, inputs = weight.shape[:2]
    after = math.prod(out_shape) / outputs  # positions, where channels stand at dimension 1 or last
    if _pointwise(layer):
        return outputs * inputs * after, ranks[0] * (inputs + outputs) * after
    before, window = math.prod(shape[2:]), math.prod(weight.shape[2:])
    core_out, core_in = ranks
    factors = core_out * core_in * window * after
    factors += inputs * core_in * before if core_in < inputs else 0
    factors += core_out * outputs * after if core_out < outputs else 0
    return outputs * inputs * window * after, factors


@torch.no_grad()
def factorized(layer: nn.Module, ranks: Ranks) -> nn.Sequential:
    """The layer as two or three, of which the last has its bias; on a side of full rank there is no factor."""
    with torch.random.fork_rng():  # initialising layers draws from the global generator
        made = _two(layer, ranks[0]) if _pointwise(layer) else _tucker(cast(nn.Conv2d, layer), *ranks)
    held = layer.get_parameter("weight")
    for parameter in made.parameters():
        parameter.requires_grad_(held.requires_grad)
    return made.to(held).train(layer.training)


def _two(layer: nn.Module, rank: int) -> nn.Sequential:
    """W = (U S^1/2) (S^1/2 V): the singular values are shared, so that both factors train at one rate."""
    weight = _weight(layer).flatten(1)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = values[:rank].sqrt()
    first, second = root[:, None] * right[:rank], left[:, :rank] * root
    bias = cast(Tensor | None, layer.bias)
    into: nn.Linear | nn.Conv2d
    out_of: nn.Linear | nn.Conv2d
    if isinstance(layer, nn.Linear):
        into = nn.Linear(layer.in_features, rank, bias=False)
        out_of = nn.Linear(rank, layer.out_features, bias=bias is not None)
        into.weight.copy_(first)
        out_of.weight.copy_(second)
    else:
        conv = cast(nn.Conv2d, layer)  # its stride leaves pixels out: the first factor need not compute them
        into = _conv1x1(first, stride=conv.stride)
        out_of = _conv1x1(second, bias is not None)
    if bias is not None:
        cast(Tensor, out_of.bias).copy_(bias)
    return nn.Sequential(into, out_of)


def _tucker(conv: nn.Conv2d, core_out: int, core_in: int) -> nn.Sequential:
    """Higher-order SVD: the kernel projected on the leading directions of outputs and inputs."""
    core = _weight(conv)
    factors: list[nn.Module] = []
    ends: list[nn.Module] = []
    whole_in, whole_out = core_in == conv.in_channels, core_out == conv.out_channels
    outputs, inputs = _directions(core, 0)[1][:, :core_out], _directions(core, 1)[1][:, :core_in]
    if not whole_in:
        factors.append(_conv1x1(inputs.T))
        core = torch.einsum("oihw,ir->orhw", core, inputs)
    if not whole_out:
        ends.append(_conv1x1(outputs, conv.bias is not None))
        core = torch.einsum("oihw,or->rihw", core, outputs)
    middle = nn.Conv2d(
        core_in,
        core_out,
        cast(tuple[int, int], conv.kernel_size),
        cast(tuple[int, int], conv.stride),
        cast(tuple[int, int], conv.padding),
        cast(tuple[int, int], conv.dilation),
        bias=whole_out and conv.bias is not None,
        padding_mode=conv.padding_mode,
    )
    middle.weight.copy_(core)
    made = nn.Sequential(*factors, middle, *ends)
    if conv.bias is not None:
        cast(Tensor, made[-1].bias).copy_(conv.bias)
    return made


def _conv1x1(matrix: Tensor, bias: bool = False, stride: Sequence[int] = (1, 1)) -> nn.Conv2d:
    outputs, inputs = matrix.shape
    conv = nn.Conv2d(inputs, outputs, 1, (stride[0], stride[1]), bias=bias)
    conv.weight.copy_(matrix[:, :, None, None])
    return conv


def _directions(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Squared singular values, descending, and left singular vectors of a kernel unfolded along ``dim``."""
    unfolded = weight.transpose(0, dim).flatten(1)
    squares, vectors = torch.linalg.eigh(unfolded @ unfolded.T)
    return squares.flip(0).clamp_min(0), vectors.flip(1)


def _weight(layer: nn.Module) -> Tensor:
    return layer.get_parameter("weight").detach().cpu().double()
