"""Putting other layers in the place of layers, wherever a network holds them, and checking that answers stay."""

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from dynamize.errors import DynamizeError

TOLERANCE = 1e-5  # largest difference, relative to the spread of the values


def replace_modules(root: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put ``new[module]`` in the place of each ``module`` under ``root``, found by identity.

    Every parent that holds a module gets the new one under the same name: the original graph, segments cut out of it,
    the paths of gated units, tuples of modules. Node names, and with them cut points, stay as they are. For a
    :class:`~dynamize.nn.network.DynamicNetwork` use :func:`dynamize.rewrite.exchange.replace_layers`, which also counts
    MACs anew. A new module is put in the mode of the one it replaces.
    """
    parents = [module for module in every_module(root) if module not in new]
    for module, other in new.items():
        other.train(module.training)
    for parent in parents:
        for name, child in list(parent._modules.items()):
            if child is not None and child in new:
                setattr(parent, name, new[child])
        for name, value in list(vars(parent).items()):
            if type(value) is tuple and any(isinstance(one, nn.Module) and one in new for one in value):
                setattr(parent, name, tuple(new.get(one, one) if isinstance(one, nn.Module) else one for one in value))


def every_module(root: nn.Module) -> Iterator[nn.Module]:
    """Every module that ``root`` holds, once each, also those in tuples, which state dicts leave out."""
    seen: set[nn.Module] = set()
    waiting = [root]
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        yield module
        held = [one for value in vars(module).values() if isinstance(value, tuple) for one in value]
        waiting += [one for one in [*module.children(), *held] if isinstance(one, nn.Module)]


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the spread of ``wanted``: between its largest and its smallest value."""
    return float((found - wanted).abs().max()) / spread(wanted)


def spread(wanted: Tensor) -> float:
    """Between the largest and the smallest value; where all are alike, their magnitude."""
    between = float(wanted.max() - wanted.min())
    return max(between or float(wanted.abs().max()), torch.finfo(wanted.dtype).tiny)


def check_same(name: str, found: nn.Module, wanted: nn.Module, example: tuple[int, ...]) -> None:
    """Refuse a layer that does not answer like what it replaces, in eval mode on random inputs.

    Both are computed in float64, so that only the layer's own numbers count and not the rounding of long sums.

    Args:
        name: of the place, for the message.
        example: shape of the input, batch included.

    Raises:
        DynamizeError: the answers differ by more than 1e-5 of their spread.
    """
    inputs = torch.randn(example, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        answers = [copy.deepcopy(module).eval().cpu().double()(inputs.clone()) for module in (found, wanted)]
    error = difference(*answers) if answers[0].shape == answers[1].shape else float("inf")
    if not error <= TOLERANCE:
        raise DynamizeError(
            f"`{name}` cannot be replaced: the new layer differs from it by {error:.1e} of the spread of its output, "
            f"more than {TOLERANCE:g}. Leave it out."
        )
