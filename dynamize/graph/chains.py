"""Private channel chains: channels that only the layers between one convolution and its readers ever see.

They can be left out, sample by sample, without any other part of the network noticing: what Runtime Neural Pruning
(Lin et al. 2017) and slimmable networks narrow.
"""

import math
import operator
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torchvision.ops import StochasticDepth

from dynamize.graph.channelwise import (
    ACTIVATION_MODULES,
    DROPOUTS,
    PAD_MODULES,
    POOL_MODULES,
    POOLS,
    PRODUCTS,
    REDUCTIONS,
    SHAPES,
    SUMS,
    constants,
    is_drop_path,
    is_one_channel,
    is_per_channel_call,
    is_scalar,
    is_value_per_channel,
    operator_name,
)
from dynamize.graph.slices import blocks_of, can_slice


@dataclass(frozen=True)
class Chain:
    """The channels of one convolution, and all layers that have parameters for them.

    Attributes:
        name: name of the node of the first producer.
        channels: how many there are.
        producers: paths of the modules whose output channels they are: the convolution, and the last layer of a
            squeeze-and-excitation that is multiplied into them.
        per_channel: paths on the way of modules with parameters for each channel, or each group of them, by itself
            (batch norms, depthwise and grouped convolutions, group norms, PReLU) and of single tensors with a value for
            each channel.
        consumers: paths of the modules whose input channels they are.
        macs: MACs per image, at full width, of all of these: what shrinks with the width.
        together: how many neighbouring channels only go together: those of a group, where a grouped convolution or
            norm is among them. Behind a convolution with more outputs than inputs there are more of them.
    """

    name: str
    channels: int
    producers: tuple[str, ...]
    per_channel: tuple[str, ...]
    consumers: tuple[str, ...]
    macs: float
    together: int = 1

    @property
    def units(self) -> int:
        """How many parts can be left out by themselves: channels, or groups of them."""
        return self.channels // self.together


def private_chains(region: fx.GraphModule) -> list[Chain]:
    """All private chains of an annotated graph (`trace`, or `extract` from it) in order of execution.

    From a convolution (groups=1) the channels may run through anything that treats each by itself: batch norms,
    activations, pooling, padding, dropout, depthwise convolutions, sums and products among themselves or with a
    parameter for each, and multiplication by a gate computed from them. Through grouped convolutions and group norms
    they run in whole groups, of which there have to be two. All readers must be convolutions with groups=1 or linear
    layers. Sums
    with other channels, concatenations, permutations and whatever is not known end the search, and so do modules that
    the region calls twice or that share a parameter. Vectors, such as those inside of a squeeze-and-excitation, are
    left whole. A module is at most once a producer and at most once a consumer.
    """
    search = _Search(region)
    for node in region.graph.nodes:
        search.visit(node)
    return [_chain(group) for group in search.groups if search.why_whole(group) is None]


def why_whole(region: fx.GraphModule) -> dict[str, str]:
    """Why the channels of a convolution (groups=1) are no private chain, in plain words, by the layer's path."""
    search = _Search(region)
    for node in region.graph.nodes:
        search.visit(node)
    found = [(group, search.why_whole(group)) for group in search.groups if search.is_map(group)]
    return {str(min(group.producers).target): reason for group, reason in found if reason is not None}


def _chain(group: "_Group") -> Chain:
    parts = [group.producers, group.per_channel, group.consumers]
    nodes = {node for part in parts for node in part}
    producers, per_channel, consumers = (tuple(str(node.target) for node in sorted(part)) for part in parts)
    macs = sum(node.meta.get("macs", 0.0) for node in nodes)
    first = min(group.producers)
    channels = first.meta["shape"][1]
    return Chain(first.name, channels, producers, per_channel, consumers, macs, channels // group.units)


@dataclass(eq=False)
class _Group:
    """Channels that have to be kept or left out together; ``units`` of them, or of blocks of neighbours, at will."""

    units: int
    producers: list[fx.Node]
    per_channel: list[fx.Node] = field(default_factory=list)
    consumers: list[fx.Node] = field(default_factory=list)
    seen_by: fx.Node | None = None  # the first node that is not understood


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
        self.constants = constants(region.graph)
        self.holders = Counter(id(tensor) for node in region.graph.nodes for tensor in self._tensors(node))

    def visit(self, node: fx.Node) -> None:
        if node in self.constants:
            return
        if not self._understood(node):
            for source in node.all_input_nodes:
                for table in (self.of, self.sizes, self.counts):
                    if source in table:
                        table[source].seen_by = table[source].seen_by or node
        if self._is_vector(node):
            self.vectors.add(node)

    def why_whole(self, group: _Group) -> str | None:
        """Why channels are no private chain; None if they are one."""
        stranger = group.seen_by or self._stranger(group)
        if stranger is not None:
            return f"`{stranger.name}` ({self._kind(stranger)}) sees them, or shares its weights"
        if group.units < 2:
            mixing = [self._kind(node) for node in group.per_channel if self._is_one_block(node)]
            return f"they go through groups that have no common border ({', '.join(mixing) or 'of several sizes'})"
        return None if group.consumers and self.is_map(group) else "no layer behind them reads them alone"

    def _stranger(self, group: _Group) -> fx.Node | None:
        """Who else reads a tensor that has a value for each of the channels."""
        waiting = [node for node in group.per_channel if node.op == "get_attr"]
        while waiting:
            for user in waiting.pop().users:
                if user in self.constants:
                    waiting.append(user)
                elif self.of.get(user) is not group:
                    return user
        return None

    def _kind(self, node: fx.Node) -> str:
        return type(self._module(node)).__name__ if node.op == "call_module" else operator_name(node) or str(node.op)

    def _is_one_block(self, node: fx.Node) -> bool:
        return node.op == "call_module" and blocks_of(self._module(node), node.meta["shape"][1]) == 1

    def is_map(self, group: _Group) -> bool:
        """Whether the channels begin at a convolution of a feature map."""
        first = min(group.producers)
        return isinstance(self._module(first), nn.Conv2d) and first not in self.vectors

    def _understood(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return len(node.args) == 1 and not node.kwargs and self._layer(node, self._module(node))
        if node.op in ("call_function", "call_method") and node.args and "out" not in node.kwargs:
            return self._operator(node, operator_name(node))
        return False

    def _module(self, node: fx.Node) -> nn.Module:
        return self.region.get_submodule(str(node.target))

    def _tensors(self, node: fx.Node) -> list[torch.Tensor]:
        if node.op == "call_module":
            module = self._module(node)
            return [*module.parameters(), *module.buffers()]
        return [operator.attrgetter(str(node.target))(self.region)] if node.op == "get_attr" else []

    def _may_slice(self, node: fx.Node, role: str, units: int) -> bool:
        only = all(self.holders[id(tensor)] == 1 for tensor in self._tensors(node))
        shape: Any = node.all_input_nodes[0].meta["shape"]
        return only and can_slice(self._module(node), role, units, shape)

    # modules

    def _layer(self, node: fx.Node, module: nn.Module) -> bool:
        source: Any = node.args[0]
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            return self._mix(node, source, isinstance(module, nn.Linear))
        group = self.of.get(source)
        if group is None:
            return False
        if isinstance(module, (nn.Identity, nn.modules.dropout._DropoutNd, StochasticDepth)) or is_drop_path(module):
            return self._same(node, source)
        if source in self.blocked:
            return False
        blocks = blocks_of(module, source.meta["shape"][1])
        if blocks is not None:
            return self._in_blocks(node, group, blocks)
        if isinstance(module, nn.Flatten):
            return self._reshape(node, source)
        if isinstance(module, (*POOL_MODULES, *PAD_MODULES)):
            return len(source.meta["shape"]) == 4 and self._carry(node, source)
        return isinstance(module, (*ACTIVATION_MODULES, nn.PReLU)) and self._carry(node, source)

    def _in_blocks(self, node: fx.Node, group: _Group, blocks: int) -> bool:
        """A layer whose channels come in blocks, each by itself: from now on they go in parts that hold whole ones."""
        group.per_channel.append(node)
        group.units = math.gcd(group.units, blocks)
        self.of[node] = group
        return group.units == 1 or self._may_slice(node, "each", blocks)

    def _mix(self, node: fx.Node, source: fx.Node, linear: bool) -> bool:
        """A layer in which every output channel is a sum over all input channels: old ones end, new ones begin."""
        group, shape = self.of.get(source), node.meta["shape"]
        vector = len(shape) == 2
        if shape[1] > 1 and (vector or not linear) and self._may_slice(node, "out", shape[1]):
            self.of[node] = _Group(shape[1], [node])
            self.groups.append(self.of[node])
        if group is None:
            return False
        group.consumers.append(node)
        inputs = source.meta["shape"][1]
        return (vector if linear else source not in self.blocked) and self._may_slice(node, "in", inputs)

    # functions and methods

    def _operator(self, node: fx.Node, name: str) -> bool:
        source: Any = node.args[0]
        if name in PRODUCTS or name in SUMS or name == "expand_as":
            return self._combine(node, gate=name not in SUMS)
        if source in self.sizes and name == "getitem":
            return self._count(node, node.args[1], self.sizes[source], len(source.args[0].meta["shape"]))
        group = self.of.get(source)
        if group is None:
            return False
        alone = all(one is source or is_scalar(one) for one in node.all_input_nodes)
        if name in DROPOUTS:
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
        if name in SHAPES:
            return self._reshape(node, source)
        return is_per_channel_call(node, name, source.meta["shape"]) and self._carry(node, source)

    def _carry(self, node: fx.Node, source: fx.Node) -> bool:
        shape = node.meta["shape"]
        if shape is None or shape[:2] != (1, source.meta["shape"][1]):
            return False
        self.of[node] = self.of[source]
        return True

    def _same(self, node: fx.Node, source: fx.Node) -> bool:
        self.of[node] = self.of[source]
        if source in self.blocked:
            self.blocked.add(node)
        return True

    def _reshape(self, node: fx.Node, source: fx.Node) -> bool:
        shape, before = node.meta["shape"], source.meta["shape"]
        if len(before) > 2 and shape == (1, math.prod(before)) and shape[1] > before[1]:
            self.of[node] = self.of[source]
            self.blocked.add(node)
            return True
        return self._carry(node, source)

    def _view(self, node: fx.Node, source: fx.Node, group: _Group) -> bool:
        """Only with the number of channels left open or read from the tensor: a constant would stay as it is."""
        sizes: Any = node.args[1] if isinstance(node.args[-1], (tuple, list)) else node.args[1:]
        if len(sizes) < 2 or any(size in self.counts for i, size in enumerate(sizes) if i != 1):
            return False
        if isinstance(sizes[1], fx.Node):
            wanted = self.counts.get(sizes[1])
            if wanted is None or (wanted is not group and not self._join(wanted, group, source)):
                return False
        elif sizes[1] != -1:
            return False
        return self._reshape(node, source)

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
            if other is first or is_one_channel(other, first):
                continue
            if other in self.constants:
                if not carriers or not self._adopt(other, first):
                    return False
                continue
            if other not in self.of or other.meta["shape"][:2] != first.meta["shape"][:2]:
                return False
            if len(other.meta["shape"]) != len(first.meta["shape"]):
                return False
            one, two = self.of[first], self.of[other]
            if one is not two and not (gate and (self._join(one, two, other) or self._join(two, one, first))):
                return False
        return bool(carriers) and self._carry(node, carriers[0])

    def _adopt(self, constant: fx.Node, carrier: fx.Node) -> bool:
        """A value for each channel: the tensors that it is computed from belong to the channels."""
        leaves = self.constants[constant]
        if not is_value_per_channel(constant, leaves, carrier):
            return False
        group, several = self.of[carrier], [leaf for leaf in leaves if not is_scalar(leaf)]
        group.per_channel += [leaf for leaf in several if leaf not in group.per_channel]
        return all(self.holders[id(tensor)] == 1 for leaf in several for tensor in self._tensors(leaf))

    def _join(self, group: _Group, other: _Group, value: fx.Node) -> bool:
        """Make the channels of ``other`` those of ``group`` if ``value``, which carries them, is computed from it."""
        seen, stack = {value}, [value]
        while stack and self.of.get(stack[-1]) is not group:
            new = set(stack.pop().all_input_nodes) - seen
            seen |= new
            stack.extend(new)
        if not stack:
            return False
        group.units = math.gcd(group.units, other.units)
        group.producers += other.producers
        group.per_channel += other.per_channel
        group.consumers += other.consumers
        group.seen_by = group.seen_by or other.seen_by
        self.groups.remove(other)
        for table in (self.of, self.sizes, self.counts):
            table.update({node: group for node, held in table.items() if held is other})
        return True

    def _is_vector(self, node: fx.Node) -> bool:
        shape = node.meta.get("shape")
        if not shape or len(shape) < 2 or math.prod(shape[2:]) > 1 or node.op in ("placeholder", "get_attr"):
            return False
        module = self._module(node) if node.op == "call_module" else None
        if isinstance(module, POOL_MODULES) or operator_name(node) in (*POOLS, *REDUCTIONS):
            return True
        sources = [one for one in node.all_input_nodes if one.meta["shape"] and one.op != "get_attr"]
        return bool(sources) and all(one in self.vectors for one in sources)
