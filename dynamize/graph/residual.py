"""Residual blocks of a traced network: where skipping a branch leaves a shortcut to go on from.

Found by the shape of the graph alone: between two neighbouring cut points lies a sum, whatever the modules are called.
"""

import copy
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional as F

from dynamize.errors import DynamizeError
from dynamize.graph.cuts import CutPoint, cut_points, module_path
from dynamize.graph.extract import cone, extract
from dynamize.graph.nodes import nodes_by_name, output_value, placeholder
from dynamize.graph.tracer import blank

_ADDITIONS = (operator.add, operator.iadd, torch.add, torch.Tensor.add, torch.Tensor.add_)
_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
_MAX_POOLS = (F.max_pool2d, torch.max_pool2d)

_NO_SUM = "no sum of a shortcut and a branch"
_CONCATENATED = "parallel branches meet in a concatenation"
_IN_PART = "its shortcut is added to some of its channels only"
_SCALED = "its sum is scaled by alpha or written into another tensor"
_UNCLEAR = "it is unclear which of its summands is the shortcut"
_BROADCAST = "a shortcut would have to be broadcast to the shape of the sum"
_LINEAR = "its parallel branches are linear, without an activation between: they can be fused to one convolution"
_FREE = "what is added to the shortcut has no multiply-accumulates to save"


@dataclass(frozen=True)
class ResidualBlock:
    """A region ``a -> post(shortcut(a) + branch(a))`` between neighbouring cut points (SkipNet, Wang et al. 2018).

    Attributes:
        after: name of the cut point where it begins, ``a``.
        upto: name of the cut point that is its value.
        module: path of the module that adds, for people ("layer1.2"); the node's name where that is the whole network.
        shape: (C, H, W) of ``a``.
        macs: MACs per image of the whole block.
        bypass_macs: MACs per image of what still runs when its branch is skipped.
        identity: skipping the branch returns ``a`` unchanged: the shortcut is ``a`` itself, and ``post`` is empty or an
            activation that leaves values in the range of ``a`` as they are (a ReLU of what a ReLU gave).
    """

    after: str
    upto: str
    module: str
    shape: tuple[int, ...]
    macs: float
    bypass_macs: float
    identity: bool


def residual_blocks(traced: fx.GraphModule) -> list[ResidualBlock]:
    """All residual blocks of an annotated graph in execution order.

    The shortcut is the cut point's own value where that is a summand, else the summand of fewest MACs (projection,
    pooling, padding) of those that share none with the others; all other summands are the branch. What follows the sum
    may be anything without MACs. A sum of convolutions and batch norms alone (RepVGG, Ding et al. 2021) is none: it
    becomes one convolution once it is trained.
    """
    nodes = nodes_by_name(traced.graph)
    found: list[ResidualBlock] = []
    for before, cut, parts in _regions(traced):
        if isinstance(parts, str):
            continue
        found.append(
            ResidualBlock(
                after=before.name,
                upto=cut.name,
                module=module_path(parts.sum) or parts.sum.name,
                shape=before.shape,
                macs=parts.macs,
                bypass_macs=parts.bypass_macs,
                identity=_is_identity(traced, nodes[before.name], parts),
            )
        )
    return found


def why_not(traced: fx.GraphModule) -> dict[str, str]:
    """Why the other regions between neighbouring cut points are no residual blocks, in plain words.

    Keys are the module paths of the regions' last nodes; one entry stands for all regions of a module that are refused
    for the same reason. A node in no module, or a second reason in the same module, is listed by its node's name.
    """
    reasons: dict[str, str] = {}
    for _, cut, parts in _regions(traced):
        if isinstance(parts, str):
            path = cut.module or cut.name
            reasons[path if reasons.get(path, parts) == parts else cut.name] = parts
    return reasons


def bypass(traced: fx.GraphModule, block: ResidualBlock) -> fx.GraphModule | None:
    """``a -> post(shortcut(a))``: what an image goes through whose branch is skipped; None where that changes nothing.

    Modules and parameters are shared with ``traced`` under the same names, without those that only the branch uses.
    The input, (N, C, H, W), is not written to.

    Raises:
        DynamizeError: ``block`` is not one of ``traced``.
    """
    region, (parts,) = taken_out(traced, [block])
    if block.identity:
        return None
    parts.sum.replace_all_uses_with(parts.shortcut)
    region.graph.eliminate_dead_code()
    path = fx.GraphModule(region, region.graph, "Bypass")
    path.train(traced.training)
    return keeping_input(path, block.shape)


def masked(traced: fx.GraphModule, block: ResidualBlock) -> fx.GraphModule:
    """``(a, runs) -> post(shortcut(a) + runs * branch(a))``: a block and its bypass for training, dense.

    ``runs`` is (N,), 1 for an image that runs the block and 0 for one that skips it (ConvNet-AIG, Veit & Belongie
    2018, eq. 2); every module is called once. Modules and parameters are shared with ``traced`` under the same names,
    and the input, (N, C, H, W), is not written to.

    Raises:
        DynamizeError: ``block`` is not one of ``traced``.
    """
    region, (parts,) = taken_out(traced, [block])
    graph = region.graph
    with graph.inserting_after(placeholder(graph)):
        runs = graph.placeholder("runs")
    for summand in parts.branch:
        ones = [1] * (len(summand.addition.meta["shape"]) - 1)
        with graph.inserting_before(summand.addition):
            mask = graph.call_method("type_as", (graph.call_method("reshape", (runs, -1, *ones)), summand.operand))
            product = graph.call_function(operator.mul, (summand.operand, mask))
        summand.addition.replace_input_with(summand.operand, product)
    path = fx.GraphModule(region, graph, "Masked")
    path.train(traced.training)
    return keeping_input(path, block.shape)


def keeping_input(path: fx.GraphModule, shape: Sequence[int]) -> fx.GraphModule:
    """``path``, beginning with a copy of its input if it writes to it: others may still read what it was given.

    Args:
        path: takes features, and for each image of a batch one number more for each further input.
        shape: (C, H, W) of the features.
    """
    if _writes_into_input(path, shape):
        _copy_input(path.graph)
        path.recompile()
    return path


def taken_out(traced: fx.GraphModule, run: Sequence[ResidualBlock]) -> tuple[fx.GraphModule, list["Parts"]]:
    """Neighbouring blocks as a module of its own, which shares its layers with ``traced``, and the parts of each.

    Raises:
        DynamizeError: one is no block of ``traced``.
    """
    known = residual_blocks(traced)
    for block in run:
        if block not in known:
            raise DynamizeError(
                f"'{block.module}' from `{block.after}` to `{block.upto}` is no residual block of this network. "
                "Take one that `residual_blocks` lists for the same traced network."
            )
    region = extract(traced, run[0].after, run[-1].upto)
    nodes = nodes_by_name(region.graph) | {run[0].after: placeholder(region.graph)}
    nodes[run[-1].upto] = output_value(region.graph)
    found = [_read(region, nodes[block.after], nodes[block.upto]) for block in run]
    assert not any(isinstance(parts, str) for parts in found), "a region reads like the graph that it is a copy of"
    return region, [parts for parts in found if isinstance(parts, Parts)]


@dataclass(frozen=True)
class Summand:
    """What a branch adds to the shortcut."""

    value: fx.Node  # before the operators that pass it on as it is
    operand: fx.Node  # what they give
    addition: fx.Node


@dataclass(frozen=True)
class Parts:
    """Nodes of a residual block."""

    sum: fx.Node
    shortcut: fx.Node
    handed_on: fx.Node  # the shortcut as it is added
    branch: tuple[Summand, ...]
    post: tuple[fx.Node, ...]
    macs: float
    bypass_macs: float


class _Region:
    """The nodes from ``first`` to ``last`` that depend on ``first``, in execution order."""

    def __init__(self, first: fx.Node, last: fx.Node) -> None:
        self.first, self.last = first, last
        needed = cone(last, first)
        depends = {first}
        for node in first.graph.nodes:
            if node in needed and any(source in depends for source in node.all_input_nodes):
                depends.add(node)
        self.nodes = [node for node in first.graph.nodes if node in depends and node is not first]
        self.position = {node: i for i, node in enumerate(self.nodes)}

    def depends(self, node: fx.Node) -> bool:
        return node is self.first or node in self.position

    def users(self, node: fx.Node) -> list[fx.Node]:
        return [user for user in node.users if user in self.position]

    def macs(self, node: fx.Node) -> float:
        return sum((source.meta["macs"] for source in cone(node, self.first)), 0.0)

    def joints(self) -> Iterator[fx.Node]:
        """Nodes that all paths run through and behind which there are no MACs, the last one first."""
        found: list[fx.Node] = []
        open_until = max((self.position[user] for user in self.users(self.first)), default=0)
        for i, node in enumerate(self.nodes):
            if open_until <= i:
                found.append(node)
            open_until = max([open_until, *(self.position[user] for user in self.users(node))])
        for node in reversed(found):
            yield node
            if any(n.meta["macs"] for n in self.nodes[self.position[node] :]):
                return


def _regions(traced: fx.GraphModule) -> Iterator[tuple[CutPoint, CutPoint, Parts | str]]:
    nodes = nodes_by_name(traced.graph)
    cuts = cut_points(traced)
    for before, cut in zip(cuts, cuts[1:], strict=False):
        yield before, cut, _read(traced, nodes[before.name], nodes[cut.name])


def _read(module: fx.GraphModule, first: fx.Node, last: fx.Node) -> Parts | str:
    """The parts of a residual block, or why the region is none."""
    region = _Region(first, last)
    reasons: list[str] = []
    for joint in region.joints():
        shortcut = _shortcut(module, region, joint)
        if isinstance(shortcut, fx.Node):
            summands = _summands(module, region, joint)
            branch = tuple(one for one in summands if one.value is not shortcut)
            handed_on = next(one.operand for one in summands if one.value is shortcut)
            post = tuple(region.nodes[region.position[joint] + 1 :])
            return Parts(joint, shortcut, handed_on, branch, post, region.macs(last), region.macs(shortcut))
        reasons.append(shortcut)
    return next((reason for reason in reasons if reason != _NO_SUM), _NO_SUM)


def _shortcut(module: fx.GraphModule, region: _Region, joint: fx.Node) -> fx.Node | str:
    """The summand of ``joint`` to keep when the others are skipped, or why there is none."""
    sources = [node for node in joint.all_input_nodes if region.depends(node)]
    if joint.op == "call_function" and joint.target in _CONCATENATIONS and len(sources) > 1:
        return _IN_PART if any(_adds_shortcut(region, source) for source in sources) else _CONCATENATED
    layer = _layer(module, joint)
    if layer is not None and joint.meta["macs"] and any(True for _ in layer.children()):
        return f"{type(layer).__name__} is traced as a whole, so a sum inside it cannot be seen"
    if len(_operands(region, joint)) != 2:
        return _NO_SUM
    if not _is_plain(joint):
        return _SCALED
    summands = [summand.value for summand in _summands(module, region, joint)]
    fitting = [node for node in summands if node.meta["shape"] == joint.meta["shape"]]
    itself = [node for node in summands if node is region.first]
    if not fitting or (itself and region.first not in fitting):
        return _BROADCAST
    if region.macs(region.last) <= min(region.macs(node) for node in itself or fitting):
        return _FREE
    if all(_is_linear(module, region, node) for node in cone(joint, region.first) if region.depends(node)):
        return _LINEAR
    candidates = sorted(itself or _apart(region, fitting, summands), key=region.macs)
    if not candidates or (len(candidates) > 1 and region.macs(candidates[0]) == region.macs(candidates[1])):
        return _UNCLEAR
    return candidates[0]


def _apart(region: _Region, candidates: Sequence[fx.Node], summands: Sequence[fx.Node]) -> list[fx.Node]:
    """Those that share no MACs with another summand: a projection is computed from the block's input for itself."""
    costly = {node: {n for n in cone(node, region.first) if n.meta["macs"]} for node in summands}
    return [node for node in candidates if all(other is node or not costly[other] & costly[node] for other in summands)]


def _operands(region: _Region, node: fx.Node) -> list[fx.Node]:
    """The tensors that depend on the region's input and that ``node`` adds; none where it is no addition."""
    called = node.op == "call_function" and node.target in _ADDITIONS
    if not called and not (node.op == "call_method" and node.target in ("add", "add_")):
        return []
    given = [*node.args, *(node.kwargs.get(name) for name in ("input", "other"))]
    operands = [value for value in given if isinstance(value, fx.Node)]
    return [value for value in operands if region.depends(value) and value.meta["shape"] is not None]


def _is_plain(addition: fx.Node) -> bool:
    """No alpha, also not in the old form ``torch.add(x, alpha, y)``, and no ``out``."""
    scale, out = addition.kwargs.get("alpha", 1), addition.kwargs.get("out")
    return bool(scale == 1) and out is None and len(addition.args) <= 2


def _summands(module: fx.GraphModule, region: _Region, addition: fx.Node) -> list[Summand]:
    """All summands of a sum of sums, without the operators that pass a value on as it is."""
    found: list[Summand] = []
    for operand in _operands(region, addition):
        node, alone = operand, len(region.users(operand)) == 1
        while node is not region.first and _passes_on(module, node):
            node = node.all_input_nodes[0]
            alone = alone and len(region.users(node)) == 1
        nested = alone and node is not region.first and len(_operands(region, node)) == 2 and _is_plain(node)
        found += _summands(module, region, node) if nested else [Summand(node, operand, addition)]
    return found


def _adds_shortcut(region: _Region, node: fx.Node) -> bool:
    """Whether a node adds something to what comes from the region's input without multiply-accumulates."""
    operands = _operands(region, node)
    return len(operands) == 2 and any(region.macs(operand) == 0 for operand in operands)


def _is_linear(module: fx.GraphModule, region: _Region, node: fx.Node) -> bool:
    """Convolutions, batch norms without an activation of their own, sums: what one convolution can hold."""
    layer = _layer(module, node)
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return all(isinstance(child, nn.Identity) for child in layer.children())  # timm's carry their activation
    if isinstance(layer, nn.modules.conv._ConvNd) or _passes_on(module, node):
        return True
    operands = _operands(region, node)
    return bool(operands) and _is_plain(node) and set(node.all_input_nodes) <= set(operands)


def _is_identity(traced: fx.GraphModule, first: fx.Node, parts: Parts) -> bool:
    if parts.shortcut is not first:
        return False
    low, high = _range(traced, first)
    for node in parts.post:
        if _passes_on(traced, node):
            continue
        bounds = _bounds(traced, node)
        if bounds is None or low < bounds[0] or high > bounds[1]:
            return False
    return True


def _range(traced: fx.GraphModule, node: fx.Node) -> tuple[float, float]:
    """Between what the values of a node lie, as far as the activation before it tells; a max pool only selects."""
    while _passes_on(traced, node) or _is_max_pool(traced, node):
        node = node.all_input_nodes[0]
    return _bounds(traced, node) or (-math.inf, math.inf)


def _bounds(module: fx.GraphModule, node: fx.Node) -> tuple[float, float] | None:
    """The interval that an activation clamps to, which makes a second one of its kind an identity."""
    layer = _layer(module, node)
    if type(layer) is nn.ReLU:
        return 0.0, math.inf
    if isinstance(layer, nn.Hardtanh):
        return float(layer.min_val), float(layer.max_val)
    if node.op == "call_method" and node.target in ("relu", "relu_"):
        return 0.0, math.inf
    if node.op == "call_function" and node.target in (F.relu, torch.relu, torch.relu_):
        return 0.0, math.inf
    if node.op == "call_function" and node.target is F.relu6:
        return 0.0, 6.0
    return None


def _passes_on(module: fx.GraphModule, node: fx.Node) -> bool:
    layer = _layer(module, node)
    if isinstance(layer, nn.modules.dropout._DropoutNd):
        return layer.p == 0
    return isinstance(layer, nn.Identity) or (node.op == "call_method" and node.target in ("clone", "contiguous"))


def _is_max_pool(module: fx.GraphModule, node: fx.Node) -> bool:
    called = node.op == "call_function" and node.target in _MAX_POOLS
    return called or type(_layer(module, node)) is nn.MaxPool2d


def _layer(module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _writes_into_input(path: fx.GraphModule, shape: Sequence[int]) -> bool:
    """Whether an in-place operator overwrites what the path is given."""
    trial = copy.deepcopy(path).eval()
    further = len(path.graph.find_nodes(op="placeholder")) - 1
    with torch.inference_mode(False), torch.no_grad():
        image = blank(trial, 1, *shape)
        before = image._version
        trial(image, *(image.new_ones(1) for _ in range(further)))
        return bool(image._version != before)


def _copy_input(graph: fx.Graph) -> None:
    first = placeholder(graph)
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        clone = graph.call_method("clone", (first,))
    clone.meta.update(first.meta)
    first.replace_all_uses_with(clone, delete_user_cb=lambda user: user is not clone)
