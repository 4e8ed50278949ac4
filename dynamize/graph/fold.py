"""Folding batch norms into the convolutions and linear layers before them."""

import copy
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from dynamize.graph.tracer import NetworkTracer

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PLAIN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

Foldable = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


@dataclass(frozen=True)
class Affine:
    """A batch norm in eval mode: ``rest(scale * x + shift)``, channel by channel.

    Attributes:
        scale: (C,), float64.
        shift: (C,), float64.
        rest: what it does afterwards (timm's norms with an activation), or None.
    """

    scale: Tensor
    shift: Tensor
    rest: nn.Module | None


def affine(module: nn.Module | None) -> Affine | None:
    """A batch norm with running statistics as an affine map; None for any other module.

    A subclass counts if its answers to random inputs are those of the map and of its children after it.
    """
    norm = module
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_mean is None or norm.running_var is None:
        return None
    if has_hooks(norm):
        return None
    scale = (_double(norm.running_var) + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * _double(norm.weight)
    shift = -_double(norm.running_mean) * scale
    if norm.affine:
        shift = shift + _double(norm.bias)
    kept = [child for child in norm.children() if not isinstance(child, nn.Identity)]
    rest = nn.Sequential(*kept).train(norm.training) if len(kept) > 1 else next(iter(kept), None)
    found = Affine(scale, shift, rest)
    return found if type(norm) in _PLAIN_NORMS or _is(norm, found) else None


def norm_pairs(root: nn.Module, graph: fx.Graph) -> list[tuple[fx.Node, fx.Node]]:
    """Each convolution or linear layer whose output only a batch norm reads, with that norm.

    Both are called once, and nothing reads their parameters directly.

    Args:
        root: holds the modules that ``graph`` calls. A linear layer counts where its shape (N, features) is annotated.
    """
    called = {node: root.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
    uses = Counter(called.values())
    uses.update(_owner(root, node) for node in graph.nodes if node.op == "get_attr")
    pairs = []
    for norm, module in called.items():
        layer = norm.all_input_nodes[0]
        if layer not in called or uses[module] > 1 or uses[called[layer]] > 1 or len(layer.users) > 1:
            continue
        if _has_channels(layer, called[layer], module) and affine(module) is not None:
            pairs.append((layer, norm))
    return pairs


def fold_norm(layer: nn.Module, norm: Affine) -> nn.Module:
    """A copy of a convolution or linear layer with bias that answers ``norm.scale * layer(x) + norm.shift``.

    Computed in float64: W' = scale W, b' = scale b + shift (Ding et al. 2021, DBB, Transform I).
    """
    folded = copy.deepcopy(layer)
    assert isinstance(folded, Foldable)
    old = folded.weight
    weight = _double(old) * norm.scale.view(-1, *[1] * (old.ndim - 1))
    bias = norm.shift if folded.bias is None else norm.shift + norm.scale * _double(folded.bias)
    folded.weight = nn.Parameter(weight.to(old), old.requires_grad)
    folded.bias = nn.Parameter(bias.to(old), old.requires_grad)
    return folded


def folded(module: nn.Module) -> fx.GraphModule:
    """A traced copy of ``module`` in eval mode whose batch norms after convolutions are folded away.

    Exact up to rounding. A batch norm stays where its input has other users or it keeps no running statistics; what it
    does besides normalising is kept. For execution only.
    """
    module = copy.deepcopy(module).eval()
    result = fx.GraphModule(module, NetworkTracer(buffers=True).trace(module))
    for layer, norm in norm_pairs(result, result.graph):
        found = affine(result.get_submodule(str(norm.target)))
        assert found is not None
        result.set_submodule(str(layer.target), fold_norm(result.get_submodule(str(layer.target)), found))
        result.set_submodule(str(norm.target), found.rest or nn.Identity())
    for node in list(result.graph.nodes):
        if node.op == "call_module" and type(result.get_submodule(str(node.target))) is nn.Identity:
            node.replace_all_uses_with(node.all_input_nodes[0])
            result.graph.erase_node(node)
    result.delete_all_unused_submodules()
    result.recompile()
    return result


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says, such as computing its weight (``weight_norm``)."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _owner(root: nn.Module, attribute: fx.Node) -> nn.Module:
    return root.get_submodule(str(attribute.target).rpartition(".")[0])


def _has_channels(node: fx.Node, layer: nn.Module, norm: nn.Module) -> bool:
    """Whether the layer can be folded into, and its output channels are what the norm normalises."""
    if has_hooks(layer):
        return False
    if type(layer) is nn.Linear:
        outputs = layer.out_features if len(node.meta.get("shape") or ()) == 2 else None
    else:
        outputs = getattr(layer, "out_channels", None) if type(layer) in _CONVS else None
    return outputs is not None and outputs == getattr(norm, "num_features", None)


def _is(norm: nn.Module, found: Affine) -> bool:
    """Whether a norm of a class of its own computes this map and then what its children compute."""
    twin = copy.deepcopy(norm).eval().cpu().double()
    inputs = torch.randn(2, len(found.scale), 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    try:
        with torch.no_grad():
            wanted = twin(inputs.clone())
            answer = nn.Sequential(*twin.children())(inputs * _row(found.scale) + _row(found.shift))
    except (RuntimeError, ValueError, TypeError):
        return False
    return answer.shape == wanted.shape and torch.allclose(answer, wanted, rtol=1e-9, atol=1e-9)


def _row(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


def _double(values: Tensor) -> Tensor:
    return values.detach().cpu().double()
