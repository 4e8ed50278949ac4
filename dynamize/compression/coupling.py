"""Which channels of a dynamic network can only be left out together: torch-pruning's dependency graph (Fang et al.
2023, DepGraph) over everything that the network can compute, heads and gates included."""

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from dynamize.compression.layers import is_depthwise, layers, sizes
from dynamize.compression.removal import ChannelGroup, Member, faithful
from dynamize.errors import DynamizeError, closest
from dynamize.graph.nodes import nodes_by_name
from dynamize.graph.trace import blank
from dynamize.nn.flow import Flow
from dynamize.nn.network import DynamicNetwork

_MIXING = (nn.Conv2d, nn.Linear)


def channel_groups(network: DynamicNetwork, keep: Sequence[str] = ()) -> tuple[list[ChannelGroup], list[str]]:
    """All groups of channels that can be left out, those of the original network first, in order of execution.

    What the network answers with, the gates' own channels and grouped convolutions stay whole, and so does what `keep`
    names. Of each group it was tried that the network without half of it answers like the one that does not read this
    half; a group that fails (through a layer norm, a channel shuffle, an operator that torch-pruning does not know) is
    not listed.

    Args:
        network: in eval mode.
        keep: paths of layers, or of modules all of whose layers keep their channels.

    Returns:
        The groups, and the names of those that failed.

    Raises:
        DynamizeError: torch-pruning fails on this network, or `keep` has an unknown path.
    """
    groups = _groups(network, keep)
    halves = {group.name: range(group.channels // 2, group.channels) for group in groups}
    if faithful(network, groups, halves):
        return groups, []
    found = [group for group in groups if faithful(network, [group], halves)]
    return found, [group.name for group in groups if group not in found]


def _groups(network: DynamicNetwork, keep: Sequence[str]) -> list[ChannelGroup]:
    import torch_pruning as pruning

    dense = _Dense(copy.deepcopy(network))
    kept = _kept(dense, keep)
    graph = pruning.DependencyGraph()
    with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dense.eval().requires_grad_(True)
        try:
            graph.build_dependency(
                dense,
                example_inputs=blank(network, 1, *network.input_shape),
                forward_fn=lambda module, images: module(images),
                ignored_params=dense.not_ours,
                verbose=False,
            )
            every = list(graph.get_all_groups(ignored_layers=kept, root_module_types=list(_MIXING)))
        except Exception as error:  # whatever torch-pruning stumbles over
            raise DynamizeError(
                f"prune: torch-pruning cannot follow the channels of this network ({type(error).__name__}: {error}), "
                "for example through a channel shuffle. `factorize` and `channel_gates` work without it."
            ) from error
    found = [_group(graph, one, dense) for one in every]
    groups = [group for group in found if group is not None and group.channels > 1]
    return sorted(groups, key=lambda group: dense.position(group.name))


class _Dense(nn.Module):
    """All that a network can compute for one image: every exit and every gate, nothing decided, for tracing.

    Attributes:
        paths: of all that can be cut, by id: of layers, of tensors that no layer holds, and of such tensors that a
            layer of this copy stands for.
        bare: ids of these layers.
        not_ours: parameters in which no channel of the network has a place.
    """

    def __init__(self, network: DynamicNetwork) -> None:
        super().__init__()
        self.network = network
        cuttable = sizes(network)
        self.paths = {id(module): path for path, module in layers(network).items() if path in cuttable}
        tensors = network.plain.named_parameters()
        self.paths |= {id(tensor): path for path, tensor in tensors if path in cuttable}
        self.bare: set[int] = set()
        self.deciding = [piece for piece in network.row if piece.effect is not None]
        self.graph = self._with_points()
        called = [self.graph.get_submodule(str(n.target)) for n in self.graph.graph.nodes if n.op == "call_module"]
        paths = [self.paths[id(module)] for module in called if id(module) in self.paths]
        self._order = {path: i for i, path in reversed(list(enumerate(paths)))}
        memories = [unit.gate.memory for unit in network.changing if unit.gate.memory is not None]
        self.not_ours = [parameter for memory in memories for parameter in memory.parameters()]

    def _with_points(self) -> fx.GraphModule:
        """The original graph with the features that decisions read as further outputs."""
        plain = self.network.plain
        graph = plain.graph
        nodes = nodes_by_name(graph)
        output = graph.output_node()
        points = [nodes[piece.place[0]] for piece in self.deciding]
        output.args = ((output.args[0], *points),)
        for node in list(graph.nodes):
            self._as_layer(plain, node)
        return fx.GraphModule(plain, graph, "Dense")

    def _as_layer(self, plain: fx.GraphModule, node: fx.Node) -> None:
        """Make a convolution with a tensor of the network (an option-A shortcut) a layer, which can be followed."""
        weight = node.args[1] if node.target is functional.conv2d and len(node.args) == 2 else None
        if not isinstance(weight, fx.Node) or weight.op != "get_attr" or not set(node.kwargs) <= {"stride", "padding"}:
            return
        path = str(weight.target)
        tensor = _attribute(plain, path)
        stride, padding = (cast(Any, node.kwargs.get(name, value)) for name, value in (("stride", 1), ("padding", 0)))
        outputs, inputs, *size = tensor.shape
        layer = nn.Conv2d(inputs, outputs, (size[0], size[1]), stride, padding, bias=False)
        layer.weight = nn.Parameter(tensor.detach().clone())
        name = f"_{node.name}_layer"
        plain.add_module(name, layer)
        self.paths[id(layer)] = path
        self.bare.add(id(layer))
        with plain.graph.inserting_before(node):
            replaced = plain.graph.call_module(name, (node.args[0],))
        replaced.meta.update(node.meta)
        node.replace_all_uses_with(replaced)
        plain.graph.erase_node(node)

    def forward(self, images_NCHW: Tensor) -> list[Tensor]:
        logits, *points = self.graph(images_NCHW)
        flow, found = Flow(images_NCHW), []
        for piece, features in zip(self.deciding, points, strict=True):
            flow.features = features
            found.append(piece.read(flow))
        flow.features = logits
        ends = [piece.read(flow) for piece in self.network.row if piece.answers and piece.effect is None]
        return [logits, *ends, *found]

    def position(self, path: str) -> int:
        """Of a layer in the order of execution; those of heads come last."""
        return self._order.get(path, len(self._order))

    def answering(self) -> list[nn.Module]:
        """Layers whose outputs are the classes, and all layers of gates and classifiers of heads."""
        network, found = self.network, []
        output = self.graph.graph.output_node()
        waiting = [cast(Any, output.args[0])[0]]
        while waiting:
            node = waiting.pop()
            inside = list(self.graph.get_submodule(str(node.target)).modules()) if node.op == "call_module" else []
            if any(isinstance(module, _MIXING) for module in inside):
                found += inside
            else:
                waiting += node.all_input_nodes
        bodies = {module for part in network.parts() if part.graph is not None for module in part.graph.modules()}
        return [*found, *(module for module in network.pieces.modules() if module not in bodies)]


def _attribute(plain: fx.GraphModule, path: str) -> Tensor:
    holder, _, name = path.rpartition(".")
    return cast(Tensor, getattr(plain.get_submodule(holder), name))


def _kept(dense: _Dense, keep: Sequence[str]) -> list[nn.Module]:
    """Layers whose own channels all stay."""
    known = {path: module for path, module in layers(dense.network).items() if isinstance(module, _MIXING)}
    kept = dense.answering()
    for name in keep:
        inside = [module for path, module in known.items() if path == name or path.startswith(name + ".")]
        if not inside:
            raise DynamizeError(
                f"prune: keep names '{name}', where the network has no convolution or linear layer. "
                f"{closest(name, list(known))}`dynamize inspect MODEL` lists the modules."
            )
        kept += inside
    grouped = [one for one in known.values() if isinstance(one, nn.Conv2d) and one.groups > 1 and not is_depthwise(one)]
    makers = [one for one in kept if isinstance(one, _MIXING) and not is_depthwise(one)]  # not those that carry others'
    return [*makers, *grouped]


def _group(graph: Any, found: Any, dense: _Dense) -> ChannelGroup | None:
    """A group as our own data, or None where something in it cannot be cut."""
    members: list[Member] = []
    channels = len(found[0].idxs)
    for item in found:
        target = item.dep.target.module
        if not isinstance(target, nn.Parameter) and not list(target.parameters()) and not list(target.buffers()):
            continue  # an operator
        index = _index(item.root_idxs, item.idxs, channels)
        path = dense.paths.get(id(target))
        whole = isinstance(target, nn.Conv2d) and target.groups > 1 and not is_depthwise(target)
        if index is None or path is None or whole:
            return None
        members.append(_member(graph, item.dep, path, index, id(target) in dense.bare))
    makers = [member.layer for member in members if member.side == "out" and member.dim is None]
    return ChannelGroup(min(makers, key=dense.position), channels, tuple(members)) if makers else None


def _member(graph: Any, dependency: Any, path: str, index: Tensor, bare: bool) -> Member:
    target = dependency.target.module
    if isinstance(target, nn.Parameter):
        return Member(path, "each", index, dependency.target.pruning_dim % target.ndim)
    if not isinstance(target, _MIXING) or is_depthwise(target):
        return Member(path, "each", index)
    out = graph.is_out_channel_pruning_fn(dependency.handler)
    return Member(path, "out" if out else "in", index, (0 if out else 1) if bare else None)


def _index(roots: Sequence[int], places: Sequence[int], channels: int) -> Tensor | None:
    """(channels, k): the places that belong to each channel of the root."""
    found: dict[int, list[int]] = defaultdict(list)
    for root, spot in zip(roots, places, strict=True):
        found[int(root)].append(int(spot))
    counts = {len(spots) for spots in found.values()}
    if sorted(found) != list(range(channels)) or len(counts) != 1 or math.prod(counts) == 0:
        return None
    return torch.tensor([found[root] for root in range(channels)])
