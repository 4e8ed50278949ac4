"""Folding batch norms into the convolutions before them, for execution only."""

import copy
from typing import cast

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
        norm = _module(result, node)
        if type(norm) is nn.BatchNorm2d and norm.running_mean is not None and _follows_convolution(result, node):
            before = node.all_input_nodes[0]
            conv = cast(nn.Conv2d, _module(result, before))
            result.set_submodule(str(before.target), fuse_conv_bn_eval(conv, norm))
            node.replace_all_uses_with(before)
            result.graph.erase_node(node)
    result.delete_all_unused_submodules()
    result.recompile()
    return result


def _follows_convolution(traced: fx.GraphModule, norm: fx.Node) -> bool:
    """Whether only this batch norm sees what a convolution gives, and neither layer is called a second time."""
    before = norm.all_input_nodes[0]
    alone = len(before.users) == 1 and _uses(traced, before.target) == 1 and _uses(traced, norm.target) == 1
    return alone and type(_module(traced, before)) in _CONVS


def _module(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def _uses(traced: fx.GraphModule, target: object) -> int:
    return sum(node.op == "call_module" and node.target == target for node in traced.graph.nodes)
