"""Parallel linear branches in a graph: sums of layers of one feature map that a single convolution computes as well.

Found by the shape of the graph alone, whatever the modules are called: RepVGG, MobileOne and their kin.
"""

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from dynamize.graph.extract import cone, extract
from dynamize.graph.kernels import Kernel, NotOneConvolution, kernel_of
from dynamize.graph.replace import check_same

_ADDITIONS = (operator.add, operator.iadd, torch.add, torch.Tensor.add, torch.Tensor.add_)
_MARGIN = 8  # pixels around the kernel in the map on which branches are compared with their convolution


@dataclass(frozen=True)
class ParallelBranches:
    """Layers between ``source`` and ``top`` that meet in sums.

    Attributes:
        inside: all of their nodes, ``top`` among them.
        kernel: what they compute together.
    """

    source: fx.Node
    top: fx.Node
    inside: frozenset[fx.Node]
    kernel: Kernel

    @property
    def name(self) -> str:
        """Of the node whose value they compute."""
        return self.top.name


def parallel_branches(traced: fx.GraphModule) -> tuple[list[ParallelBranches], dict[str, str]]:
    """All parallel branches of an annotated graph that are one convolution, the last ones first.

    A branch is a row of convolutions, batch norms, average pools and identities that nothing else reads. A batch norm
    behind the sum belongs to it. The convolution may not cost more MACs than they do.

    Returns:
        The branches, and by the name of their last node why others are no convolution.
    """
    search = _Search(traced)
    found: list[ParallelBranches] = []
    refused: dict[str, str] = {}
    taken: set[fx.Node] = set()
    for node in reversed(traced.graph.nodes):
        if node in taken or len(search.summands(node)) < 2:
            continue
        sources = search.sources(node)[1:]
        if not sources:
            continue
        top = search.upwards(node)
        inside = cone(top, sources[0])
        try:
            found.append(ParallelBranches(sources[0], top, frozenset(inside), _kernel(search, top, sources[0], inside)))
        except NotOneConvolution as reason:
            refused[top.name] = str(reason)
        else:
            taken |= inside
    return found, refused


def fuse(traced: fx.GraphModule, found: Sequence[ParallelBranches]) -> None:
    """Let one convolution compute what the branches do, for each of ``found``; their last nodes keep their names.

    Raises:
        DynamizeError: a convolution does not answer as its branches do; nothing was changed.
    """
    convs = [_checked(traced, branches) for branches in found]
    for branches, conv in zip(found, convs, strict=True):
        top, target = branches.top, f"fused_branches.{branches.name}"
        traced.add_submodule(target, conv)
        top.op, top.target = "call_module", target
        top.args, top.kwargs = (branches.source,), {}
    traced.graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    traced.recompile()


def _checked(traced: fx.GraphModule, branches: ParallelBranches) -> nn.Conv2d:
    layers = [traced.get_submodule(str(node.target)) for node in branches.inside if node.op == "call_module"]
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    conv = branches.kernel.as_conv(parameters[0]).train(traced.training)
    conv.requires_grad_(any(parameter.requires_grad for parameter in parameters))
    region = extract(traced, branches.source.name, branches.top.name)
    check_same(branches.name, conv, region, (2, conv.in_channels, *_sides(conv)))
    return conv


def _kernel(search: "_Search", top: fx.Node, source: fx.Node, inside: set[fx.Node]) -> Kernel:
    kernel = search.kernel(top, source)
    height, width = top.meta["shape"][2:]
    if kernel.weight.numel() * height * width > sum(node.meta["macs"] for node in inside):
        raise NotOneConvolution("one convolution would cost more than the branches do")
    return kernel


class _Search:
    def __init__(self, traced: fx.GraphModule) -> None:
        self.traced = traced
        self.called = {n: traced.get_submodule(str(n.target)) for n in traced.graph.nodes if n.op == "call_module"}
        self.calls = Counter(self.called.values())
        self._layers: dict[fx.Node, Kernel | None] = {}
        self._sources: dict[fx.Node, list[fx.Node]] = {}

    def layer(self, node: fx.Node) -> Kernel | None:
        """The layer that this node calls, if it is linear and called here only."""
        if node not in self._layers:
            module, inputs = self.called.get(node), node.all_input_nodes
            fits = module is not None and self.calls[module] == 1 and len(inputs) == 1 and _is_map(node, inputs[0])
            self._layers[node] = kernel_of(module, inputs[0].meta["shape"][1]) if module and fits else None
        return self._layers[node]

    def summands(self, node: fx.Node) -> list[fx.Node]:
        """What a plain sum adds, without the zero that ``sum([...])`` starts from; empty for anything else."""
        called = node.op == "call_function" and node.target in _ADDITIONS
        if not called and not (node.op == "call_method" and node.target in ("add", "add_")):
            return []
        if len(node.args) != 2 or node.kwargs:
            return []
        given = [one for one in node.args if isinstance(one, fx.Node) or one != 0]
        maps = [one for one in given if isinstance(one, fx.Node) and _is_map(node, one)]
        return maps if len(maps) == len(given) and all(_shape(one) == _shape(node) for one in maps) else []

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """The nodes of which this one is a linear function, from itself backwards."""
        if node not in self._sources:
            self._sources[node] = [node, *self._behind(node)]
        return self._sources[node]

    def _behind(self, node: fx.Node) -> list[fx.Node]:
        reads = node.all_input_nodes if self.layer(node) is not None else self.summands(node)
        found = [self.sources(one) if len(one.users) == 1 else [one] for one in reads]
        return [one for one in found[0] if all(one in others for others in found[1:])] if found else []

    def upwards(self, node: fx.Node) -> fx.Node:
        """The last of the batch norms and identities that alone read this sum, or the sum itself."""
        while len(node.users) == 1:
            user = next(iter(node.users))
            kernel = self.layer(user)
            if kernel is None or not kernel.pointwise or not kernel.groups == kernel.inputs == kernel.outputs:
                break
            node = user
        return node

    def kernel(self, node: fx.Node, source: fx.Node) -> Kernel:
        """All layers between the two as one."""
        if node is source:
            return Kernel.per_channel(torch.ones(_shape(source)[1]))
        layer = self.layer(node)
        if layer is not None:
            before = node.all_input_nodes[0]
            return layer if before is source else self.kernel(before, source).then(layer)
        parts = [self.kernel(one, source) for one in self.summands(node)]
        total = parts[0]
        for part in parts[1:]:
            total = total.plus(part)
        return total


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta.get("shape") or ())


def _is_map(node: fx.Node, source: fx.Node) -> bool:
    return len(_shape(node)) == len(_shape(source)) == 4


def _sides(conv: nn.Conv2d) -> tuple[int, ...]:
    return tuple(
        step * (size - 1) + _MARGIN * stride
        for step, size, stride in zip(conv.dilation, conv.kernel_size, conv.stride, strict=True)
    )
