"""Residual blocks whose branches are computed on a grid of half the resolution."""

import operator
from collections.abc import Sequence
from typing import Any

from torch import fx
from torch.nn import functional as F

from dynamize.graph.extract import cone
from dynamize.graph.residual import Parts, ResidualBlock, keeping_input, taken_out

_STEP = 2


def coarse(traced: fx.GraphModule, run: Sequence[ResidualBlock]) -> fx.GraphModule:
    """``a -> post(a + up(branch(down(a))))`` for each block: the branch sees means of 2 x 2 positions, and what it adds
    to the shortcut is interpolated between them (as Xie et al. 2020 interpolate between sampled positions).

    Modules and parameters are shared with ``traced`` under the same names. The input, (N, C, H, W), is not written to.

    Args:
        run: neighbouring blocks whose shortcut is their input.

    Raises:
        DynamizeError: one is no block of ``traced``.
    """
    region, found = taken_out(traced, run)
    for block, parts in zip(run, found, strict=True):
        _pool_for_branch(parts, block.shape)
        for summand in parts.branch:
            with region.graph.inserting_before(summand.addition):
                fine = _interpolated(summand.operand, block.shape)
            summand.addition.replace_input_with(summand.operand, fine)
    path = fx.GraphModule(region, region.graph, "Coarse")
    path.train(traced.training)
    return keeping_input(path, run[0].shape)


def _pool_for_branch(parts: Parts, shape: Sequence[int]) -> None:
    """Put a pool wherever the branch leaves the way of the shortcut."""
    first = parts.shortcut
    shortcut = {first, *cone(parts.handed_on, first)}
    branch = {node for summand in parts.branch for node in cone(summand.operand, first)} - shortcut
    odd = _is_odd(shape)
    for node in shortcut:
        users = [user for user in node.users if user in branch]
        if users:
            with node.graph.inserting_after(node):
                wanted: dict[str, Any] = {"ceil_mode": odd, "count_include_pad": not odd}
                pooled = node.graph.call_function(F.avg_pool2d, (node, _STEP), wanted)
            for user in users:
                user.replace_input_with(node, pooled)


def _interpolated(value: fx.Node, shape: Sequence[int]) -> fx.Node:
    """By a factor, which ONNX Runtime computes in its blocked layout (a block of a ResNet-50 at 56 x 56: 1.4 ms; to a
    size: 2.5 ms); what is too much of it is cut off."""
    wanted: dict[str, Any] = {"scale_factor": float(_STEP), "mode": "bilinear", "align_corners": False}
    found = value.graph.call_function(F.interpolate, (value,), wanted)
    if not _is_odd(shape):
        return found
    inside = (slice(None), slice(None), *(slice(side) for side in shape[1:]))
    return value.graph.call_function(operator.getitem, (found, inside))


def _is_odd(shape: Sequence[int]) -> bool:
    return any(side % _STEP for side in shape[1:])
