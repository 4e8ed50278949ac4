"""Convolutions of classes of their own that compute what torch's does, made into torch's, which all steps know."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from dynamize.graph.fold import has_hooks


def plain_convolutions(traced: fx.GraphModule) -> None:
    """Exchange such convolutions in an annotated graph for ``nn.Conv2d`` that hold the same parameters, under the same
    names: those without code of their own, and those of stride 1 that pad by themselves, evenly.

    A strided one that pads by itself pads otherwise at other image sizes, and stays what it is:
    :func:`dynamize.graph.padding.explicit_padding` is for one size.
    """
    for node in traced.graph.find_nodes(op="call_module"):
        layer = traced.get_submodule(str(node.target))
        if not isinstance(layer, nn.Conv2d) or type(layer) is nn.Conv2d or has_hooks(layer):
            continue
        plain = _plain(layer, node.all_input_nodes[0].meta["shape"], node.meta["shape"])
        if plain is not None:
            traced.set_submodule(str(node.target), plain)


def _plain(layer: nn.Conv2d, given: tuple[int, ...] | None, gives: tuple[int, ...] | None) -> nn.Conv2d | None:
    inherited = type(layer).forward is nn.Conv2d.forward and type(layer)._conv_forward is nn.Conv2d._conv_forward
    names = {name for name, _ in [*layer.named_parameters(), *layer.named_buffers()]}
    if given is None or gives is None or not names <= {"weight", "bias"} or "weight" not in layer._parameters:
        return None
    padding: Any = layer.padding
    if not inherited:
        reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        missing = [out + r - size for out, r, size in zip(gives[2:], reach, given[2:], strict=True)]
        if tuple(layer.stride) != (1, 1) or any(one % 2 or one < 0 for one in missing):
            return None
        padding = (missing[0] // 2, missing[1] // 2)
    plain = holding(layer, padding, layer.padding_mode if inherited else "zeros")
    return plain if same_answers(layer, plain, given) else None


def holding(layer: nn.Conv2d, padding: Any, mode: str = "zeros") -> nn.Conv2d:
    """An ``nn.Conv2d`` with the parameters of ``layer``, that pads so."""
    same: Any = {name: getattr(layer, name) for name in ("kernel_size", "dilation", "groups")}
    plain = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        **same,
        stride=tuple(layer.stride),  # type: ignore[arg-type]
        padding=padding,
        bias=layer.bias is not None,
        padding_mode=mode,  # type: ignore[arg-type]
        device="meta",
    )
    plain.weight, plain.bias = layer.weight, layer.bias
    plain.train(layer.training)
    return plain


@torch.no_grad()
def same_answers(layer: nn.Conv2d, plain: nn.Conv2d, given: tuple[int, ...], ends: Sequence[int] = ()) -> bool:
    """Whether both answer alike in either mode, whatever the weights are.

    Args:
        given: shape of what they read.
        ends: zeros around that for ``plain``, as ``functional.pad`` takes them.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, *given[1:], generator=generator).to(layer.weight)
    twins = [copy.deepcopy(one) for one in (layer, plain)]
    values = torch.randn(layer.weight.shape, generator=generator).to(layer.weight)
    for twin in twins:
        twin.weight.copy_(values)
    try:
        padded = functional.pad(images, list(ends))
        answers = [
            [twin.train(mode)(x.clone()) for twin, x in zip(twins, (images, padded), strict=True)]
            for mode in (True, False)
        ]
    except Exception:  # code of somebody's, that does not run so
        return False
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in answers)
