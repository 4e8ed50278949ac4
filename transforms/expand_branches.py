"""`expand_branches`: convolutions get linear branches for training, which `fuse_branches` takes away again."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from dynamize.errors import DynamizeError, closest
from dynamize.graph.fold import affine, has_hooks
from dynamize.graph.macs import annotated_macs
from dynamize.nn.branches import BranchBlock, Form, fits
from dynamize.nn.network import DynamicNetwork
from dynamize.rewrite.exchange import layers_and_norms, replace_layers, sliced_layers
from dynamize.transform import Applied, Context, Kind, Transform

Names = Annotated[list[str], Field(min_length=1)]


class ExpandBranches(Transform):
    """Put linear branches beside trained convolutions: more to train at no cost once fused.

    The branches start at zero, so nothing changes, in training mode neither; see
    ``dynamize.nn.branches.BranchBlock`` for the forms and their papers. Residual networks gain from ``acnet`` and
    ``dbb`` rather than from ``repvgg``; ``qarepvgg`` is for networks that are quantised later.

    Example:
        >>> import torch
        >>> net = dz.source("dynamize:digits_resnet", pretrained=True)
        >>> dyn = dz.convert(net, [dz.ExpandBranches(form="acnet")], (1, 8, 8))
        >>> images = torch.randn(2, 1, 8, 8)
        >>> torch.allclose(dyn(images), net(images), atol=1e-4)
        True
    """

    pass_name: Literal["expand_branches"] = Field("expand_branches", alias="pass")
    form: Form = Field(
        "dbb",
        description="acnet: 1 x k and k x 1; dbb: 1 x 1, 1 x 1 - k x k and 1 x 1 - average; repvgg: 1 x 1 and "
        "identity, each with a batch norm; qarepvgg: the same without their batch norms",
    )
    layers: Literal["auto"] | Names = Field(
        "auto", description="paths of convolutions, or auto: all square ones of odd size above 1"
    )

    not_after: ClassVar[Kind] = Kind.SPLITS_CHANNELS | Kind.FUSES_BRANCHES | Kind.RESHAPES_LAYERS | Kind.REFINES_GATES

    def apply(self, network: DynamicNetwork, context: Context) -> Applied:
        found = _convolutions(network)
        chosen = list(found) if self.layers == "auto" else [_find(network, found, name) for name in self.layers]
        if not chosen:
            raise DynamizeError(
                "expand_branches: the network has no square convolution of odd size above 1 outside of channel gates: "
                "leave this step out"
            )
        if len(set(chosen)) < len(chosen):
            raise DynamizeError(f"expand_branches: a layer is named twice in {chosen}: name each once")
        norms = layers_and_norms(network)
        new: dict[nn.Module, nn.Module] = {}
        with torch.random.fork_rng():  # initialising layers draws from the global generator
            torch.manual_seed(0)
            for name in chosen:
                conv, norm = found[name], norms.get(found[name])
                if norm is not None and not _is_plain(norm):
                    norm = None
                new[conv] = BranchBlock(conv, norm, self.form)
                if norm is not None:
                    new[norm] = nn.Identity()
        before = annotated_macs(network.plain)
        replace_layers(network, new)
        more = annotated_macs(network.plain) / before
        notes = [f"{len(chosen)} convolutions with {self.form} branches: {more:.1f} x the MACs until `fuse_branches`"]
        return Applied(network, self.model_copy(update={"layers": chosen}), notes)


def _convolutions(network: DynamicNetwork) -> dict[str, nn.Conv2d]:
    """All convolutions that can get branches, by their paths, in order of execution."""
    plain = network.plain
    paths = [str(node.target) for node in plain.graph.nodes if node.op == "call_module"]
    modules = [plain.get_submodule(path) for path in paths]
    sliced = sliced_layers(network)
    found: dict[str, nn.Conv2d] = {}
    for path, module in zip(paths, modules, strict=True):
        once = modules.count(module) == 1 and module not in sliced
        if type(module) is nn.Conv2d and once and fits(module) and not has_hooks(module):
            found[path] = module
    return found


def _is_plain(norm: nn.Module) -> bool:
    """Whether a batch norm does nothing besides, so that branches can be added behind it."""
    found = affine(norm)
    return found is not None and found.rest is None


def _find(network: DynamicNetwork, found: dict[str, nn.Conv2d], name: str) -> str:
    if name in found:
        return name
    paths = dict(network.plain.named_modules())
    why = f"'{name}' is no layer of this network"
    if name in paths:
        why = f"'{name}' is no square convolution of odd size above 1 that is called once"
        if paths[name] in sliced_layers(network):
            why = f"'{name}' is in a block with channel gates, which slice its channels: put this step before them"
    known = ", ".join(found) or "none"
    raise DynamizeError(f"expand_branches: {why}. {closest(name, list(found))}Layers that can be expanded: {known}.")
