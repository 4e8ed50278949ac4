"""`fold_batchnorm`: each convolution or linear layer and the batch norm behind it become one layer with bias."""

from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from dynamize.errors import DynamizeError
from dynamize.graph.fold import Affine, affine, fold_norm
from dynamize.graph.replace import TOLERANCE, check_same, difference
from dynamize.nn.network import DynamicNetwork
from dynamize.rewrite.exchange import (
    check_answers,
    exit_answers,
    in_double,
    layers_and_norms,
    module_names,
    replace_layers,
    sliced_layers,
)
from dynamize.transform import Applied, Context, Transform

_PIXELS = 16  # added to the reach of a kernel: side of the map on which a layer is compared


class FoldBatchnorm(Transform):
    """Fold batch norms into the layers before them (Ding et al. 2021, DBB, Transform I), in heads too.

    Answers stay the same up to rounding, which is checked in float64 against their spread; training afterwards has no
    batch norms left. The backends fold for themselves: this step is for exports, and before layers are taken apart or
    quantised.

    Example:
        >>> import torch
        >>> net = dz.source("dynamize:digits_resnet", pretrained=True)
        >>> dyn = dz.convert(net, [dz.FoldBatchnorm()], (1, 8, 8))
        >>> any(isinstance(layer, torch.nn.BatchNorm2d) for layer in dyn.modules())
        False
    """

    pass_name: Literal["fold_batchnorm"] = Field("fold_batchnorm", alias="pass")

    whole: ClassVar[bool] = True
    exact: ClassVar[bool] = False  # rounding

    def apply(self, network: DynamicNetwork, context: Context) -> Applied:
        pairs = layers_and_norms(network)
        if not pairs:
            raise DynamizeError(
                "fold_batchnorm: the network has no convolution or linear layer whose output only a batch norm with "
                "running statistics reads: leave this step out"
            )
        exact = in_double(network)
        wanted = exit_answers(exact)
        _fold(exact)
        check_answers("fold_batchnorm", exact, wanted)
        before = exit_answers(network)
        _fold(network)
        notes = [f"{len(pairs)} batch norms are part of the layers before them"]
        rounded = max(difference(*pair) for pair in zip(exit_answers(network), before, strict=True))
        if rounded > TOLERANCE:
            notes.append(f"answers differ by {rounded:.0e} of their spread, as sums round otherwise")
        if sliced_layers(network):
            notes.append("blocks with channel gates keep theirs: each width needs its own")
        elif any(unit.has_own for unit in network.changing):
            notes.append("gated blocks keep theirs: each way through them has its own")
        return Applied(network, self, notes)


def _fold(network: DynamicNetwork) -> None:
    names = module_names(network)
    new: dict[nn.Module, nn.Module] = {}
    for layer, norm in layers_and_norms(network).items():
        new |= _folded(names[layer], layer, norm)
    replace_layers(network, new)


def _folded(name: str, layer: nn.Module, norm: nn.Module) -> dict[nn.Module, nn.Module]:
    """What to put in the place of both: the layer with bias, and what the norm does besides."""
    found = affine(norm)
    assert isinstance(found, Affine)
    folded, rest = fold_norm(layer, found), found.rest or nn.Identity()
    check_same(name, nn.Sequential(folded, rest), nn.Sequential(layer, norm), _example(layer))
    return {layer: folded, norm: rest}


def _example(layer: nn.Module) -> tuple[int, ...]:
    if isinstance(layer, nn.Linear):
        return 2, layer.in_features
    assert isinstance(layer, nn.modules.conv._ConvNd)
    reach = [step * (size - 1) for step, size in zip(layer.dilation, layer.kernel_size, strict=True)]
    return 2, layer.in_channels, *(_PIXELS + side for side in reach)
