"""Operators of a graph that treat each channel of a feature map by itself."""

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torchvision.ops import stochastic_depth

from dynamize.graph.modes import Dropping

_Op = Callable[..., Any]
ACTIVATIONS = (
    *("relu", "relu_", "relu6", "hardtanh", "hardtanh_", "sigmoid", "sigmoid_", "tanh", "tanh_", "silu", "mish"),
    *("hardswish", "hardsigmoid", "elu", "elu_", "selu", "selu_", "celu", "leaky_relu", "leaky_relu_", "softplus"),
    *("softsign", "logsigmoid", "clamp", "clamp_", "abs", "exp", "neg", "square", "sqrt", "rsqrt", "reciprocal", "pow"),
    *("gelu", "contiguous", "clone", "float", "double", "half"),
)
DROPOUTS = ("dropout", "alpha_dropout", "dropout1d", "dropout2d", "feature_alpha_dropout")
POOLS = ("max_pool2d", "avg_pool2d", "lp_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d")
REDUCTIONS = ("mean", "sum", "amax")
PRODUCTS = ("mul", "mul_", "imul")
SUMS = ("add", "add_", "iadd", "sub", "sub_", "isub", "div", "div_", "truediv", "itruediv")
SHAPES = ("flatten", "squeeze", "unsqueeze")
_OTHERS = ("interpolate", "pad", "view", "reshape", "expand_as", "getitem")

_FUNCTIONS: dict[_Op, str] = {
    getattr(home, name): name
    for home in (torch, F, operator)
    for name in [*ACTIVATIONS, *DROPOUTS, *POOLS, *REDUCTIONS, *PRODUCTS, *SUMS, *SHAPES, *_OTHERS]
    if hasattr(home, name)
} | {getattr: "getattr", stochastic_depth: "dropout"}

ACTIVATION_MODULES = (
    *(nn.ReLU, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.GELU, nn.ELU),
    *(nn.SELU, nn.CELU, nn.LeakyReLU, nn.RReLU, nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Tanhshrink),
    *(nn.Hardshrink, nn.Softshrink, nn.Threshold),
)
POOL_MODULES = (nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
PAD_MODULES = (nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d, nn.Upsample)


def operator_name(node: fx.Node) -> str:
    """Of a known operator; a method is called like the function."""
    if node.op == "call_method":
        return str(node.target)
    return _FUNCTIONS.get(node.target, "") if callable(node.target) else ""


def is_drop_path(module: nn.Module) -> bool:
    return isinstance(module, Dropping) or "DropPath" in type(module).__name__


def is_per_channel_call(node: fx.Node, name: str, shape: tuple[int, ...]) -> bool:
    if name in ACTIVATIONS:
        return True
    if name in POOLS or name == "interpolate":
        return len(shape) == 4
    argument: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad" if name == "pad" else "dim")
    if name == "pad":
        return isinstance(argument, (tuple, list)) and len(argument) <= 2 * (len(shape) - 2)
    if name in REDUCTIONS:
        dimensions = argument if isinstance(argument, (tuple, list)) else [argument]
        return all(isinstance(one, int) and one % len(shape) > 1 for one in dimensions)
    if name == "getitem" and isinstance(argument, tuple):
        everything = (slice(None), None, Ellipsis)
        return argument[:2] == (slice(None), slice(None)) and all(one in everything for one in argument)
    return False


def is_one_channel(value: fx.Node, carrier: fx.Node) -> bool:
    """Whether a value is the same for all channels of the carrier."""
    shape, wanted = value.meta["shape"], carrier.meta["shape"]
    if value.op == "get_attr":
        return math.prod(shape) == 1
    return shape == () or (len(shape) == len(wanted) and shape[1] == 1)


def is_scalar(value: fx.Node) -> bool:
    """Whether a node gives a tensor of one element."""
    shape = value.meta.get("shape")
    return shape is not None and math.prod(shape) == 1


def is_elementwise(node: fx.Node) -> bool:
    """Whether a node computes its value element by element, or gives it more dimensions of size 1 whatever its size."""
    name = operator_name(node)
    if name in ("view", "reshape"):
        sizes: Any = node.args[1] if isinstance(node.args[-1], (tuple, list)) else node.args[1:]
        return list(sizes).count(-1) == 1 and list(sizes).count(1) == len(sizes) - 1
    if name == "getitem":
        index: Any = node.args[1]
        return isinstance(index, tuple) and all(one in (slice(None), None, Ellipsis) for one in index)
    return name in (*ACTIVATIONS, *PRODUCTS, *SUMS, "unsqueeze")


def constants(graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    """The values that are computed element by element from tensors of the network, and from which of them."""
    found: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr":
            found[node] = {node}
        elif sources and all(one in found for one in sources) and is_elementwise(node):
            found[node] = set().union(*(found[one] for one in sources))
    return found


def is_value_per_channel(constant: fx.Node, leaves: set[fx.Node], carrier: fx.Node) -> bool:
    """Whether a value computed from these tensors of the network alone is one for each channel of the carrier, as the
    tensors are that have more than one element."""
    shape, own = carrier.meta["shape"], constant.meta["shape"]
    aligned = (1,) * (len(shape) - len(own)) + tuple(own)
    if len(aligned) != len(shape) or aligned[1] != shape[1] or math.prod(aligned) != shape[1]:
        return False
    sizes = [leaf.meta["shape"] for leaf in leaves if not is_scalar(leaf)]
    return all(math.prod(size) == max(size) == shape[1] for size in sizes)
