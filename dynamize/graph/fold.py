"""Folding batch norms into the convolutions before them, for execution only."""

import copy

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dynamize.graph.trace import NetworkTracer

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def folded(module: nn.Module) -> fx.GraphModule:
    """A traced copy of ``module`` in eval mode whose batch norms after convolutions are folded away.

    Exact up to rounding. A batch norm stays where its input has other users, it does more than normalise or it keeps
    no running statistics.
    """
    module = copy.deepcopy(module).eval()
    result = fx.GraphModule(module, NetworkTracer().trace(module))
    for node in list(result.graph.nodes):
        norm, before = _module(result, node), node.all_input_nodes[0] if node.all_input_nodes else None
        conv = _module(result, before) if before is not None else None
        if type(norm) is not nn.BatchNorm2d or type(conv) not in _CONVS or len(before.users) > 1:
            continue
        if norm.running_mean is None:
            continue
        if _uses(result, node.target) > 1 or _uses(result, before.target) > 1:
            continue  # a layer that is called twice serves two places
        result.set_submodule(str(before.target), fuse_conv_bn_eval(conv, norm))  # type: ignore[type-var, arg-type]
        node.replace_all_uses_with(before)
        result.graph.erase_node(node)
    result.delete_all_unused_submodules()
    result.recompile()
    return result


def _module(traced: fx.GraphModule, node: fx.Node | None) -> nn.Module | None:
    return traced.get_submodule(str(node.target)) if node is not None and node.op == "call_module" else None


def _uses(traced: fx.GraphModule, target: object) -> int:
    return sum(node.op == "call_module" and node.target == target for node in traced.graph.nodes)
