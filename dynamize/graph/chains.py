"""Private channel chains: channels that only the layers between one convolution and its readers ever see.

They can be left out, sample by sample, without any other part of the network noticing: what Runtime Neural Pruning
(Lin et al. 2017) and slimmable networks narrow.
"""

import copy
import math
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth, stochastic_depth


@dataclass(frozen=True)
class Chain:
    """The channels of one convolution, and all layers that have parameters for them.

    Attributes:
        name: name of the node of the first producer.
        channels: how many there are.
        producers: paths of the modules whose output channels they are: the convolution, and the last layer of a
            squeeze-and-excitation that is multiplied into them.
        per_channel: paths of modules on the way with parameters for each channel by itself: batch norms, depthwise
            convolutions, PReLU.
        consumers: paths of the modules whose input channels they are.
        macs: MACs per image, at full width, of all of these: what shrinks with the width.
    """

    name: str
    channels: int
    producers: tuple[str, ...]
    per_channel: tuple[str, ...]
    consumers: tuple[str, ...]
    macs: float


def private_chains(region: fx.GraphModule) -> list[Chain]:
    """All private chains of an annotated graph (`trace`, or `extract` from it) in order of execution.

    From a convolution (groups=1) the channels may run through anything that treats each by itself: batch norms,
    activations, pooling, padding, dropout, depthwise convolutions, sums and products among themselves, and
    multiplication by a gate computed from them. All readers must be convolutions with groups=1 or linear layers. Sums
    with other channels, concatenations, permutations and whatever is not known end the search, and so do modules that
    the region calls twice or that share a parameter. Vectors, such as those inside of a squeeze-and-excitation, are
    left whole. A module is at most once a producer and at most once a consumer.
    """
    search = _Search(region)
    for node in region.graph.nodes:
        search.visit(node)
    return [_chain(group) for group in search.groups if group.private and group.consumers and search.is_map(group)]


def _chain(group: "_Group") -> Chain:
    parts = [group.producers, group.per_channel, group.consumers]
    nodes = {node for part in parts for node in part}
    producers, per_channel, consumers = (tuple(str(node.target) for node in sorted(part)) for part in parts)
    macs = sum(node.meta["macs"] for node in nodes)
    return Chain(min(group.producers).name, group.channels, producers, per_channel, consumers, macs)


_Op = Callable[..., Any]
_ACTIVATIONS = (
    *(
        "relu",
        "relu_",
        "relu6",
        "hardtanh",
        "hardtanh_",
        "sigmoid",
        "sigmoid_",
        "tanh",
        "tanh_",
        "silu",
        "mish",
        "gelu",
    ),
    *("hardswish", "hardsigmoid", "elu", "elu_", "selu", "selu_", "celu", "leaky_relu", "leaky_relu_", "softplus"),
    *("softsign", "logsigmoid", "clamp", "clamp_", "abs", "exp", "neg", "square", "sqrt", "pow"),
    *("contiguous", "clone", "float", "double", "half"),
)
_DROPOUTS = ("dropout", "alpha_dropout", "dropout1d", "dropout2d", "feature_alpha_dropout")
_POOLS = ("max_pool2d", "avg_pool2d", "lp_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d")
_REDUCTIONS = ("mean", "sum", "amax")
_PRODUCTS = ("mul", "mul_", "imul")
_SUMS = ("add", "add_", "iadd", "sub", "sub_", "isub", "div", "div_", "truediv", "itruediv")
_SHAPES = ("flatten", "squeeze", "unsqueeze")
_OTHERS = ("interpolate", "pad", "view", "reshape", "expand_as", "getitem")

_FUNCTIONS: dict[_Op, str] = {
    getattr(home, name): name
    for home in (torch, F, operator)
    for name in [*_ACTIVATIONS, *_DROPOUTS, *_POOLS, *_REDUCTIONS, *_PRODUCTS, *_SUMS, *_SHAPES, *_OTHERS]
    if hasattr(home, name)
} | {getattr: "getattr", stochastic_depth: "dropout"}

_ACTIVATION_MODULES = (
    *(nn.ReLU, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.GELU, nn.ELU),
    *(nn.SELU, nn.CELU, nn.LeakyReLU, nn.RReLU, nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Tanhshrink),
    *(nn.Hardshrink, nn.Softshrink, nn.Threshold),
)
_POOL_MODULES = (nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_PAD_MODULES = (nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d, nn.Upsample)


@dataclass(eq=False)
class _Group:
    """Channels that have to be kept or left out together."""

    channels: int
    producers: list[fx.Node]
    per_channel: list[fx.Node] = field(default_factory=list)
    consumers: list[fx.Node] = field(default_factory=list)
    private: bool = True


class _Search:
    """Follows channels through the graph: what is not understood makes the channels it reads not private."""

    def __init__(self, region: fx.GraphModule) -> None:
        self.region = region
        self.groups: list[_Group] = []
        self.of: dict[fx.Node, _Group] = {}  # tensors whose dimension 1 is the group's channels ...
        self.blocked: set[fx.Node] = set()  # ... or, flattened, channels x positions
        self.sizes: dict[fx.Node, _Group] = {}  # shapes of such tensors
        self.counts: dict[fx.Node, _Group] = {}  # numbers of channels taken from such a shape
        self.vectors: set[fx.Node] = set()  # pooled to 1 x 1, and what is computed from nothing else
        self.holders = Counter(id(tensor) for node in region.graph.nodes for tensor in self._tensors(node))

    def visit(self, node: fx.Node) -> None:
        if not self._understood(node):
            for source in node.all_input_nodes:
                for table in (self.of, self.sizes, self.counts):
                    if source in table:
                        table[source].private = False
        if self._is_vector(node):
            self.vectors.add(node)

    def is_map(self, group: _Group) -> bool:
        """Whether the channels begin at a convolution of a feature map."""
        first = min(group.producers)
        return isinstance(self._module(first), nn.Conv2d) and first not in self.vectors

    def _understood(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return len(node.args) == 1 and not node.kwargs and self._layer(node, self._module(node))
        if node.op in ("call_function", "call_method") and node.args and "out" not in node.kwargs:
            return self._operator(node, _name(node))
        return False

    def _module(self, node: fx.Node) -> nn.Module:
        return self.region.get_submodule(str(node.target))

    def _tensors(self, node: fx.Node) -> list[torch.Tensor]:
        if node.op == "call_module":
            module = self._module(node)
            return [*module.parameters(), *module.buffers()]
        return [operator.attrgetter(str(node.target))(self.region)] if node.op == "get_attr" else []

    def _may_slice(self, node: fx.Node, role: str) -> bool:
        only = all(self.holders[id(tensor)] == 1 for tensor in self._tensors(node))
        shape: Any = node.all_input_nodes[0].meta["shape"]
        return only and _slices(self._module(node), role, shape)

    # modules

    def _layer(self, node: fx.Node, module: nn.Module) -> bool:
        source: Any = node.args[0]
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            return self._mix(node, source, isinstance(module, nn.Linear))
        group = self.of.get(source)
        if group is None:
            return False
        if isinstance(module, (nn.Identity, nn.modules.dropout._DropoutNd, StochasticDepth)) or _is_drop_path(module):
            return self._same(node, source)
        if source in self.blocked:
            return False
        if _is_per_channel(module, group.channels):
            group.per_channel.append(node)
            return self._may_slice(node, "each") and self._carry(node, group)
        if isinstance(module, nn.Flatten):
            return self._reshape(node, source, group)
        if isinstance(module, (*_POOL_MODULES, *_PAD_MODULES)):
            return len(source.meta["shape"]) == 4 and self._carry(node, group)
        return isinstance(module, (*_ACTIVATION_MODULES, nn.PReLU)) and self._carry(node, group)

    def _mix(self, node: fx.Node, source: fx.Node, linear: bool) -> bool:
        """A layer in which every output channel is a sum over all input channels: old ones end, new ones begin."""
        group, shape = self.of.get(source), node.meta["shape"]
        vector = len(shape) == 2
        if self._may_slice(node, "out") and shape[1] > 1 and (vector or not linear):
            self.of[node] = _Group(shape[1], [node])
            self.groups.append(self.of[node])
        if group is None:
            return False
        group.consumers.append(node)
        return self._may_slice(node, "in") and (vector if linear else source not in self.blocked)

    # functions and methods

    def _operator(self, node: fx.Node, name: str) -> bool:
        source: Any = node.args[0]
        if name in _PRODUCTS or name in _SUMS or name == "expand_as":
            return self._combine(node, gate=name not in _SUMS)
        if source in self.sizes and name == "getitem":
            return self._count(node, node.args[1], self.sizes[source], len(source.args[0].meta["shape"]))
        group = self.of.get(source)
        if group is None:
            return False
        alone = node.all_input_nodes == [source]
        if name in _DROPOUTS:
            return alone and self._same(node, source)
        if source in self.blocked:
            return False
        if name in ("view", "reshape"):
            return self._view(node, source, group)
        if not alone:
            return False
        if name == "size" and len(node.args) > 1:
            return self._count(node, node.args[1], group, len(source.meta["shape"]))
        if name == "size" or (name == "getattr" and node.args[1] == "shape"):
            self.sizes[node] = group
            return True
        if name in _SHAPES:
            return self._reshape(node, source, group)
        return _is_per_channel_call(node, name, source.meta["shape"]) and self._carry(node, group)

    def _carry(self, node: fx.Node, group: _Group) -> bool:
        shape = node.meta["shape"]
        if shape is None or shape[:2] != (1, group.channels):
            return False
        self.of[node] = group
        return True

    def _same(self, node: fx.Node, source: fx.Node) -> bool:
        self.of[node] = self.of[source]
        if source in self.blocked:
            self.blocked.add(node)
        return True

    def _reshape(self, node: fx.Node, source: fx.Node, group: _Group) -> bool:
        shape = node.meta["shape"]
        if (
            len(source.meta["shape"]) > 2
            and shape == (1, math.prod(source.meta["shape"]))
            and shape[1] > group.channels
        ):
            self.of[node] = group
            self.blocked.add(node)
            return True
        return self._carry(node, group)

    def _view(self, node: fx.Node, source: fx.Node, group: _Group) -> bool:
        """Only with the number of channels left open or read from the tensor: a constant would stay as it is."""
        sizes: Any = node.args[1] if isinstance(node.args[-1], (tuple, list)) else node.args[1:]
        if len(sizes) < 2 or any(size in self.counts for i, size in enumerate(sizes) if i != 1):
            return False
        if isinstance(sizes[1], fx.Node):
            wanted = self.counts.get(sizes[1])
            if wanted is None or (wanted is not group and not self._join(wanted, group, source)):
                return False
            group = wanted
        elif sizes[1] != -1:
            return False
        return self._reshape(node, source, group)

    def _count(self, node: fx.Node, index: Any, group: _Group, dimensions: int) -> bool:
        if isinstance(index, slice):
            return index in (slice(2, None), slice(-2, None)) and dimensions == 4
        if isinstance(index, int) and index % dimensions == 1:
            self.counts[node] = group
        return isinstance(index, int)

    def _combine(self, node: fx.Node, gate: bool) -> bool:
        """Element by element; other channels may come in only as a gate computed from these."""
        tensors = node.all_input_nodes
        if any(one in self.blocked or one.meta["shape"] is None for one in tensors):
            return False
        carriers = [one for one in tensors if one in self.of]
        for other in tensors:
            first = carriers[0] if carriers else other
            if other is first or _is_one_channel(other, first):
                continue
            if other not in self.of or len(other.meta["shape"]) != len(first.meta["shape"]):
                return False
            one, two = self.of[first], self.of[other]
            if one is not two and not (gate and (self._join(one, two, other) or self._join(two, one, first))):
                return False
        return bool(carriers) and self._carry(node, self.of[carriers[0]])

    def _join(self, group: _Group, other: _Group, value: fx.Node) -> bool:
        """Make the channels of ``other`` those of ``group`` if ``value``, which carries them, is computed from it."""
        seen, stack = {value}, [value]
        while stack and self.of.get(stack[-1]) is not group:
            new = set(stack.pop().all_input_nodes) - seen
            seen |= new
            stack.extend(new)
        if not stack or group.channels != other.channels:
            return False
        group.producers += other.producers
        group.per_channel += other.per_channel
        group.consumers += other.consumers
        group.private &= other.private
        self.groups.remove(other)
        for table in (self.of, self.sizes, self.counts):
            table.update({node: group for node, held in table.items() if held is other})
        return True

    def _is_vector(self, node: fx.Node) -> bool:
        shape = node.meta.get("shape")
        if not shape or len(shape) < 2 or math.prod(shape[2:]) > 1 or node.op in ("placeholder", "get_attr"):
            return False
        module = self._module(node) if node.op == "call_module" else None
        if isinstance(module, _POOL_MODULES) or _name(node) in (*_POOLS, *_REDUCTIONS):
            return True
        sources = [one for one in node.all_input_nodes if one.meta["shape"] and one.op != "get_attr"]
        return bool(sources) and all(one in self.vectors for one in sources)


def _name(node: fx.Node) -> str:
    """Of a known operator; a method is called like the function."""
    if node.op == "call_method":
        return str(node.target)
    return _FUNCTIONS.get(node.target, "") if callable(node.target) else ""


def _is_drop_path(module: nn.Module) -> bool:
    return "DropPath" in type(module).__name__


def _is_per_channel(module: nn.Module, channels: int) -> bool:
    """Whether it has parameters or statistics for each channel by itself."""
    if isinstance(module, nn.Conv2d):
        return module.groups == module.in_channels == module.out_channels
    several = isinstance(module, nn.PReLU) and module.num_parameters == channels
    return several or isinstance(module, nn.modules.batchnorm._BatchNorm)


def _is_per_channel_call(node: fx.Node, name: str, shape: tuple[int, ...]) -> bool:
    if name in _ACTIVATIONS:
        return True
    if name in _POOLS or name == "interpolate":
        return len(shape) == 4
    argument: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad" if name == "pad" else "dim")
    if name == "pad":
        return isinstance(argument, (tuple, list)) and len(argument) <= 2 * (len(shape) - 2)
    if name in _REDUCTIONS:
        dimensions = argument if isinstance(argument, (tuple, list)) else [argument]
        return all(isinstance(one, int) and one % len(shape) > 1 for one in dimensions)
    if name == "getitem" and isinstance(argument, tuple):
        everything = (slice(None), None, Ellipsis)
        return argument[:2] == (slice(None), slice(None)) and all(one in everything for one in argument)
    return False


def _is_one_channel(value: fx.Node, carrier: fx.Node) -> bool:
    """Whether a value is the same for all channels of the carrier."""
    shape, wanted = value.meta["shape"], carrier.meta["shape"]
    if value.op == "get_attr":
        return math.prod(shape) == 1
    return shape == () or (len(shape) == len(wanted) and shape[1] == 1)


_PLAIN = (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.PReLU)
_TENSORS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def _slices(module: nn.Module, role: str, shape: tuple[int, ...]) -> bool:
    """Whether leaving out input channels ("in"), output channels ("out") or both ("each") leaves the others alone.

    Subclasses are tried out: one that standardises its weights, as in timm's BiT, mixes what it is given.
    """
    names = {name for name, _ in [*module.named_parameters(), *module.named_buffers()]}
    return names <= _TENSORS and (type(module) in _PLAIN or _tried(module, role, shape))


@torch.no_grad()
def _tried(module: nn.Module, role: str, shape: tuple[int, ...]) -> bool:
    generator = torch.Generator().manual_seed(0)
    whole = copy.deepcopy(module).cpu().float().eval()
    for parameter in whole.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    part, images = copy.deepcopy(whole), torch.randn(shape, generator=generator)
    fewer = images.clone()
    fewer[:, shape[1] // 2 :] = 0
    for parameter in part.parameters():
        if role == "in" and parameter.ndim > 1:
            parameter[:, shape[1] // 2 :] = 0
        elif role != "in":
            parameter[len(parameter) // 2 :] = 0
    wanted = whole(fewer if role == "in" else images.clone())
    found = part(fewer if role == "each" else images)
    kept = None if role == "in" else wanted.shape[1] // 2
    return torch.allclose(found[:, :kept], wanted[:, :kept], rtol=0, atol=1e-4 * float(wanted.abs().max()))
