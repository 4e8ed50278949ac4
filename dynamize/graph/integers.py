"""Where a static graph can compute in bytes: which layers, and which tensors have to be rounded for it."""

import copy
import operator
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torchvision.ops import StochasticDepth

from dynamize.graph.fold import folded, has_hooks
from dynamize.graph.modes import Dropping
from dynamize.graph.nodes import callee, output_value
from dynamize.graph.padding import explicit_padding, pads_by_itself, pads_zeros
from dynamize.graph.tracer import NetworkTracer

_DROPPED = (nn.modules.dropout._DropoutNd, StochasticDepth, Dropping, nn.Identity)
_CLAMPS: tuple[Any, ...] = (nn.ReLU, nn.ReLU6, nn.Hardtanh, functional.relu, functional.relu6, functional.hardtanh,
                            torch.relu, torch.clamp, "relu", "clamp")  # fmt: skip
_CURVES: tuple[Any, ...] = (nn.Sigmoid, nn.Hardsigmoid, nn.Hardswish, nn.SiLU, nn.Tanh, nn.LeakyReLU, torch.sigmoid,
                            functional.sigmoid, functional.hardsigmoid, functional.hardswish, functional.silu,
                            functional.leaky_relu, torch.tanh, "sigmoid", "tanh")  # fmt: skip
_SUMS: tuple[Any, ...] = (operator.add, torch.add, operator.mul, torch.mul, "add", "mul")
_POOLS: tuple[Any, ...] = (nn.AdaptiveAvgPool2d, nn.AvgPool2d, functional.adaptive_avg_pool2d, functional.avg_pool2d)
_MOVES: tuple[Any, ...] = (nn.MaxPool2d, functional.max_pool2d, nn.Flatten, torch.flatten, torch.reshape, "flatten",
                           "view", "reshape", "squeeze")  # fmt: skip
_PRODUCTS = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear)
_IN_PLACE: dict[Any, Any] = {operator.iadd: operator.add, operator.imul: operator.mul, "add_": torch.add,
                             "mul_": torch.mul, "relu_": torch.relu}  # fmt: skip


@dataclass(frozen=True)
class Places:
    """What a graph computes in bytes.

    Attributes:
        layers: calls of convolutions and linear layers, with the clamp that they compute besides, or themselves.
        rounded: for each tensor that is rounded to steps, the one whose steps it has: itself, or for one that only
            holds values of another, such as a max pool's output, that one. The input's steps are its own.
    """

    layers: dict[fx.Node, fx.Node]
    rounded: dict[fx.Node, fx.Node]


def prepared(module: nn.Module, features: Tensor) -> fx.GraphModule:
    """A copy in eval mode for quantising: batch norms folded, nothing overwritten, convolutions that pad by themselves
    or that a function computes made layers, means over all pixels made pools. Exact up to rounding.

    Args:
        features: as many as it is given, (1, C, H, W), which padding is taken from.
    """
    found = folded(_with_padding(module, features))
    for node in list(found.graph.nodes):
        called = callee(found, node)
        if isinstance(called, _DROPPED) or called is functional.dropout:
            node.replace_all_uses_with(node.all_input_nodes[0])
            found.graph.erase_node(node)
        elif called is functional.conv2d:
            _make_layer(found, node)
        elif called in (torch.mean, "mean"):
            _make_pool(found, node)
        elif isinstance(called, nn.Module) and getattr(called, "inplace", False):
            called.inplace = False  # type: ignore[assignment]
        elif not isinstance(called, nn.Module) and called in _IN_PLACE:
            node.op, node.target = "call_function", _IN_PLACE[called]
        elif node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
    found.delete_all_unused_submodules()
    found.graph.lint()
    found.recompile()
    return found


def _with_padding(module: nn.Module, features: Tensor) -> nn.Module:
    if not any(map(pads_by_itself, module.modules())):
        return module
    module = copy.deepcopy(module).eval()
    traced = fx.GraphModule(module, NetworkTracer(buffers=True).trace(module))
    note_shapes(traced, features)
    explicit_padding(traced)
    return traced


def find_places(
    module: fx.GraphModule, rounded_input: bool, rounded_output: bool, keep_float: Collection[str] = ()
) -> Places:
    """What a prepared graph can compute in bytes.

    Every tensor that such an operator reads or gives is rounded; who else reads it reads it rounded. A sum, product,
    concatenation or pool computes in bytes where all that it reads is rounded, a layer wherever it may.

    Args:
        module: from :func:`prepared`, after :func:`note_shapes`.
        rounded_input: whether what comes in has steps.
        rounded_output: whether what goes out must have steps.
        keep_float: module paths of layers that stay in float.
    """
    layers = _layers(module, keep_float)
    answer = output_value(module.graph)
    wanted = {_unpadded(module, node.all_input_nodes[0]) for node in layers} | ({answer} if rounded_output else set())
    rounded: dict[fx.Node, fx.Node] = {}
    fused: dict[fx.Node, fx.Node] = {}  # by the clamp
    for node in module.graph.nodes:
        if node.op == "output" or (node is answer and len(node.meta["shape"]) == 2):
            continue  # logits stay as exact as they are
        moves = _is(module, node, _MOVES) or pads_zeros(module, node)
        source = rounded.get(node.all_input_nodes[0]) if moves else None
        if source is not None and not (node is answer and source.op == "placeholder"):
            rounded[node] = source
            continue
        bytes_ = rounded_input if node.op == "placeholder" else node in layers or _in_bytes(module, node, rounded)
        clamp = next(iter(node.users)) if len(node.users) == 1 else None
        if node in fused or not bytes_ or node.op == "placeholder" or not clamp or not _is(module, clamp, _CLAMPS):
            clamp = None
        if clamp is not None:
            fused[clamp] = node
        elif bytes_ or node in wanted or node in fused:
            rounded[node] = node
    ends = {node: clamp for clamp, node in fused.items()}
    return Places({node: ends.get(node, node) for node in layers}, rounded)


def _unpadded(module: fx.GraphModule, node: fx.Node) -> fx.Node:
    """What a tensor was before zeros were put around it: rounded, it is so with them too."""
    while pads_zeros(module, node):
        node = node.all_input_nodes[0]
    return node


def _layers(module: fx.GraphModule, keep_float: Collection[str]) -> list[fx.Node]:
    """Calls of layers that may compute in bytes; one that is called twice would need two scales of its bias."""
    calls = [node for node in module.graph.nodes if node.op == "call_module" and str(node.target) not in keep_float]
    uses = Counter(str(node.target) for node in calls)
    return [node for node in calls if uses[str(node.target)] == 1 and can_quantize(callee(module, node))]


def whys(module: fx.GraphModule) -> dict[str, str]:
    """Paths of the convolutions and products of a prepared graph that have no form in bytes, and why not."""
    uses = Counter(str(node.target) for node in module.graph.find_nodes(op="call_module"))
    found: dict[str, str] = {}
    for node in module.graph.nodes:
        called = callee(module, node)
        if called in (functional.conv2d, functional.linear, torch.matmul, torch.bmm):
            found[node.name] = "called as a function"
        elif isinstance(called, nn.Module) and any(isinstance(one, _PRODUCTS) for one in called.modules()):
            if not can_quantize(called):
                found[str(node.target)] = _why(called)
            elif uses[str(node.target)] > 1:
                found[str(node.target)] = "called more than once"
    return found


def _why(layer: nn.Module) -> str:
    if not isinstance(layer, _PRODUCTS):
        return f"inside of {type(layer).__name__}, which is kept whole"
    if type(layer) is nn.Conv2d and not has_hooks(layer):
        return "pads otherwise than with zeros"
    return f"of the class {type(layer).__name__}"


def can_quantize(layer: nn.Module) -> bool:
    """Whether there is such a layer in bytes."""
    if has_hooks(layer):
        return False
    if type(layer) is nn.Conv2d:
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return type(layer) is nn.Linear


def _in_bytes(module: fx.GraphModule, node: fx.Node, rounded: Collection[fx.Node]) -> bool:
    """Whether an operator without weights reads rounded tensors only, and there is one for bytes."""
    read = node.all_input_nodes
    if not read or not all(one in rounded for one in read):
        return False
    if _is(module, node, _SUMS):
        return len(node.args) == 2 and all(isinstance(one, fx.Node) for one in node.args) and not node.kwargs
    if _is(module, node, _POOLS) and _over_borders(module, node):
        return False
    return _is(module, node, (*_CLAMPS, *_CURVES, *_POOLS, torch.cat, torch.concat))


def _over_borders(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether an average pool takes means of what lies beyond the map, or not of all values: no two backends compute
    such means of bytes alike."""
    called = callee(module, node)
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    if isinstance(called, nn.Module):
        given = {name: getattr(called, name, None) for name in names}
    elif called is functional.avg_pool2d:
        given = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
    else:
        return False
    padding = given.get("padding") or 0
    padded = any(padding) if isinstance(padding, list | tuple) else bool(padding)
    return padded or bool(given.get("ceil_mode")) or given.get("divisor_override") is not None


def _is(module: fx.GraphModule, node: fx.Node, kinds: Collection[Any]) -> bool:
    called = callee(module, node)
    return called is not None and (type(called) if isinstance(called, nn.Module) else called) in kinds


def _make_layer(module: fx.GraphModule, node: fx.Node) -> None:
    """A convolution whose weight is an attribute becomes a layer with the path of what holds it."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    held = [given["weight"]] + ([given["bias"]] if given.get("bias") is not None else [])
    if any(not isinstance(one, fx.Node) or one.op != "get_attr" for one in held):
        return
    weight, *rest = (cast(Tensor, _attribute(module, str(one.target))).detach() for one in held)
    options = {name: given[name] for name in ("stride", "padding", "dilation", "groups") if name in given}
    groups = options.get("groups", 1)
    layer = nn.Conv2d(weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), bias=bool(rest), **options)  # type: ignore[arg-type]
    layer.weight = nn.Parameter(weight.clone())
    if rest:
        layer.bias = nn.Parameter(rest[0].clone())
    path = str(held[0].target).rpartition(".")[0] or f"{held[0].target}_layer"
    others = [
        str(one.target) for one in module.graph.nodes if one.op in ("call_module", "get_attr") and one not in held
    ]
    while any(f"{other}.".startswith(f"{path}.") for other in others):
        path += "_layer"
    module.add_submodule(path, layer.to(weight.device).eval())
    with module.graph.inserting_before(node):
        called = module.graph.call_module(path, (given["input"],))
    _replace(module, node, called)


def _make_pool(module: fx.GraphModule, node: fx.Node) -> None:
    """A mean over the last two dimensions becomes a pool."""
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    keep = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
    given = node.all_input_nodes[0]
    if not isinstance(dims, list | tuple) or sorted(dims) not in ([2, 3], [-2, -1]) or "dtype" in node.kwargs:
        return
    with module.graph.inserting_before(node):
        pooled = module.graph.call_function(functional.adaptive_avg_pool2d, (given, 1))
        if not keep:
            pooled = module.graph.call_function(torch.flatten, (pooled, 1))
    _replace(module, node, pooled)


def _replace(module: fx.GraphModule, old: fx.Node, new: fx.Node) -> None:
    held = [one for one in old.all_input_nodes if one.op == "get_attr"]
    old.replace_all_uses_with(new)
    module.graph.erase_node(old)
    for one in held:
        if not one.users:
            module.graph.erase_node(one)


def _attribute(module: nn.Module, path: str) -> object:
    for part in path.split("."):
        module = getattr(module, part)
    return module


class Recorder(fx.Interpreter):
    """Runs a graph and hands each tensor of one node to ``see``.

    Args:
        module: any static graph.
        see: called with a node and its tensor, in order of execution.
    """

    def __init__(self, module: fx.GraphModule, see: Callable[[fx.Node, Tensor], None]) -> None:
        super().__init__(module)
        self.see = see

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op != "output":
            self.see(n, value)
        return value


def note_shapes(module: fx.GraphModule, features: Tensor) -> Tensor:
    """Run a graph and write the shape of each tensor into its node's ``meta``."""

    def note(node: fx.Node, value: Tensor) -> None:
        node.meta["shape"] = tuple(value.shape)

    with torch.no_grad():
        return cast(Tensor, Recorder(module, note).run(features))
