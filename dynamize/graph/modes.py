"""What a network does otherwise in training than in evaluation, kept in one graph that follows the training flag.

A trace reads one mode. Two of them are laid side by side here: where a value that both know is computed otherwise in
training (dropout called as a function, stochastic depth written as code, batch norm with ``training=self.training``),
a leaf stands in the graph that holds both ways.
"""

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg
from torch.nn import functional as F

from dynamize.graph.tracer import Whole, attribute

log = logging.getLogger(__name__)

_DROPOUTS: dict[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}


Call = tuple[Any, tuple[Any, ...], dict[str, Any]]  # what is called, and with what


class InTraining(Whole):
    """Two ways to one value: of evaluation and of training, which never calls the other.

    Args:
        evaluated: None hands on the first input.
        trained: as ``evaluated``, takes tensors.
    """

    def __init__(self, evaluated: nn.Module | None, trained: nn.Module) -> None:
        super().__init__()
        self.evaluated, self.trained = evaluated, trained

    def forward(self, *values: Tensor) -> Tensor:
        way = self.trained if self.training else self.evaluated
        found: Tensor = values[0] if way is None else way(*values)
        return found

    def calls(self, node: fx.Node) -> tuple[Call, Call] | None:
        """The calls in evaluation and in training that ``node``, which calls this leaf, stands for, as calls in its own
        graph; None unless each way is a single one."""
        ways = [_single(way, node) for way in (self.evaluated, self.trained)]
        return None if ways[0] is None or ways[1] is None else (ways[0], ways[1])


class Dropping(InTraining):
    """Hands on its input in evaluation, and in training what code of the network makes of it: a dropout of its own."""


def _single(way: nn.Module | None, node: fx.Node) -> Call | None:
    if not isinstance(way, fx.GraphModule):
        return None
    given = dict(zip(way.graph.find_nodes(op="placeholder"), node.all_input_nodes, strict=True))
    calls = [one for one in way.graph.nodes if one.op not in ("placeholder", "output")]
    if len(calls) != 1 or calls[0].op != "call_function":
        return None
    (call,) = calls
    args: Any = map_arg(call.args, given.__getitem__)
    kwargs: Any = map_arg(call.kwargs, given.__getitem__)
    return call.target, args, kwargs


class _Frozen(nn.Module):
    def train(self, mode: bool = True) -> Any:
        return super().train(False)


@dataclass
class Unmatched(Exception):
    """Work of a training step that changes something but leads to no value: the module that does it is to be left
    whole."""

    module: str


@dataclass
class _Both:
    """Two graphs of one network; nodes of training that have one of evaluation as their equal."""

    evaluating: fx.Graph
    training: fx.Graph
    equal: dict[fx.Node, fx.Node] = field(default_factory=dict)
    used: set[fx.Node] = field(default_factory=set)  # of training, without an equal, but in a leaf

    def cone(self, node: fx.Node, known: Callable[[fx.Node], bool]) -> tuple[list[fx.Node], list[fx.Node]]:
        """What has to be computed for ``node`` from nodes that are known in either mode, and these, in order."""
        inside: set[fx.Node] = set()
        border: dict[fx.Node, None] = {}
        waiting = [node]
        while waiting:
            one = waiting.pop()
            if known(one):
                border[one] = None
            elif one not in inside:
                inside.add(one)
                waiting += one.all_input_nodes
        order = {one: i for i, one in enumerate(node.graph.nodes)}
        return sorted(inside, key=order.__getitem__), sorted(border, key=order.__getitem__)


def keep_modes(
    network: nn.Module, evaluating: fx.Graph, trainer: nn.Module, training: fx.Graph
) -> dict[str, nn.Module]:
    """Put a leaf into ``evaluating`` wherever ``training`` computes a value otherwise.

    Args:
        network, evaluating: read in evaluation mode.
        trainer, training: a copy of the same network, read in training mode.

    Returns:
        The leaves by the names under which the graph calls them.

    Raises:
        Unmatched: a training step does something that leads to no value.
    """
    for graph in (evaluating, training):
        _name_overwritten(graph)
    both = _Both(evaluating, training)
    _match(both, network, trainer)
    leaves: dict[str, nn.Module] = {}
    made: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
    equals = {one: other for other, one in both.equal.items()}
    for node in list(evaluating.nodes):
        if node not in equals:
            continue
        wanted = _operands(equals[node])
        if node.op == "output":
            if len(_operands(node)) != 1:
                break  # no classifier, and refused as that
            wanted = [_answer(both, node, equals[node])]
        for k, (mine, theirs) in enumerate(zip(_operands(node), wanted, strict=True)):
            if both.equal.get(theirs) is mine:
                continue
            if (mine, theirs) not in made:
                made[mine, theirs] = _leaf(both, node, mine, theirs, network, trainer, leaves)
            _put(node, k, made[mine, theirs])
    _refuse_effects(both)
    return leaves


def freeze_as(network: nn.Module, modes: Mapping[str, bool]) -> None:
    """Let those modules stay in evaluation mode that an own ``train()`` of the network left there.

    Args:
        network: what was traced, whose containers are not the network's own any more.
        modes: the training flags of the original's modules after its ``train()``, by path.
    """
    network.train()
    for path, module in network.named_modules():
        if module.training and not modes.get(path, True):
            freeze(module)
    network.eval()


def freeze(module: nn.Module) -> nn.Module:
    """Let a module stay in evaluation mode for good; the same module."""
    module.__class__ = type(f"Frozen{type(module).__name__}", (_Frozen, type(module)), {})
    return module


def _name_overwritten(graph: fx.Graph) -> None:
    """Let what follows ``x.mul_(y)`` read its result, also where the code goes on to say ``x``."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if _overwrites(node) and node.args and isinstance(node.args[0], fx.Node):
            for user in list(node.args[0].users):
                if position[user] > position[node]:
                    user.replace_input_with(node.args[0], node)


def _overwrites(node: fx.Node) -> bool:
    name = node.target if node.op == "call_method" else ""
    return isinstance(name, str) and name.endswith("_") and not name.endswith("__")


def _match(both: _Both, network: nn.Module, trainer: nn.Module) -> None:
    mine, theirs = list(both.evaluating.nodes), list(both.training.nodes)
    keys = [_key(node, network) for node in mine], [_key(node, trainer) for node in theirs]
    for i, j, size in SequenceMatcher(None, *keys, autojunk=False).get_matching_blocks():
        both.equal.update(zip(theirs[j : j + size], mine[i : i + size], strict=True))


def _key(node: fx.Node, root: nn.Module) -> tuple[Any, ...]:
    if node.op == "output":
        return ("output",)
    target = node.target
    if node.op == "get_attr" and "_tensor_constant" in str(target):  # numbered as they come
        value = attribute(root, str(target))
        target = f"{tuple(value.shape)} {value.flatten()[:16].tolist()}"
    blank = map_arg((node.args, node.kwargs), lambda one: "node")
    stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return node.op, target, repr(blank), stack[-1] if stack else ""


def _operands(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    map_arg((node.args, node.kwargs), lambda one: found.append(one))
    return found


def _put(node: fx.Node, place: int, value: fx.Node) -> None:
    count = iter(range(len(_operands(node))))

    def exchange(one: Any) -> Any:
        return value if isinstance(one, fx.Node) and next(count) == place else one

    node.args, node.kwargs = map_aggregate(node.args, exchange), map_aggregate(node.kwargs, exchange)


def _answer(both: _Both, output: fx.Node, trained: fx.Node) -> fx.Node:
    """What training returns in the place of the class scores; it may return more."""
    (mine,) = _operands(output)[:1]
    found = _operands(trained)
    if len(found) > 1:
        log.warning("in training the network returns %d values: only the class scores are kept", len(found))
        both.used |= {one for extra in found for one in both.cone(extra, both.equal.__contains__)[0]}
    return next((one for one in found if both.equal.get(one) is mine), found[0])


def _leaf(
    both: _Both,
    user: fx.Node,
    mine: fx.Node,
    theirs: fx.Node,
    network: nn.Module,
    trainer: nn.Module,
    leaves: dict[str, nn.Module],
) -> fx.Node:
    """A call of what gives ``mine`` in evaluation and ``theirs`` in training, before ``user``."""
    inside, border = both.cone(theirs, both.equal.__contains__)
    both.used |= set(inside)
    known = set(both.equal.values())
    own, sources = both.cone(mine, known.__contains__)
    order = {node: i for i, node in enumerate(both.evaluating.nodes)}
    given = dict.fromkeys(sorted([*sources, *(both.equal[one] for one in border)], key=order.__getitem__))
    inputs = [mine, *(one for one in given if one is not mine)] if not own else list(given)
    module = _dropout(inside, inputs) if all(_is_dropout(one) for one in own) else None
    if module is None:
        trained = _graph(inside, theirs, {one: both.equal[one] for one in border}, inputs, (network, trainer))
        if own:
            module = InTraining(_graph(own, mine, {one: one for one in sources}, inputs, (network,)), trained)
        else:
            module = (Dropping if len(_tensors(inputs)) == 1 else InTraining)(None, trained)
    name = f"{(inside or [theirs])[-1].name}_in_training"
    leaves[name] = module
    with both.evaluating.inserting_before(user):
        node = both.evaluating.call_module(name, tuple(inputs))
    node.meta.update({key: value for key, value in mine.meta.items() if key in ("sizes", "fact")})
    node.meta["nn_module_stack"] = (inside or [theirs])[-1].meta.get("nn_module_stack", {})
    return node


def _tensors(nodes: list[fx.Node]) -> list[fx.Node]:
    return [node for node in nodes if "fact" not in node.meta]


def _is_dropout(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in _DROPOUTS


def _dropout(inside: list[fx.Node], inputs: list[fx.Node]) -> nn.Module | None:
    """A dropout of torch's in the place of its function."""
    if len(inside) != 1 or not _is_dropout(inside[0]) or len(inputs) != 1:
        return None
    (node,) = inside
    call = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    call.apply_defaults()
    return _DROPOUTS[node.target](call.arguments["p"]) if call.arguments["training"] is True else None


def _graph(
    inside: list[fx.Node],
    last: fx.Node,
    border: Mapping[fx.Node, fx.Node],
    inputs: list[fx.Node],
    roots: tuple[nn.Module, ...],
) -> fx.GraphModule:
    """The nodes ``inside`` as a module of ``inputs``; ``border`` says which of them stands for a node outside."""
    graph = fx.Graph()
    given = {node: graph.placeholder(f"value_{i}") for i, node in enumerate(inputs)}
    copies = {node: given[other] for node, other in border.items()}
    held: dict[str, Any] = {}
    for node in inside:
        copies[node] = graph.node_copy(node, lambda one: copies[one])
        if node.op in ("call_module", "get_attr"):
            held[str(node.target)] = _held(str(node.target), roots)
    graph.output(copies[last])
    return fx.GraphModule(held, graph, "Way")


def _held(target: str, roots: tuple[nn.Module, ...]) -> Any:
    for root in roots:
        try:
            return attribute(root, target)
        except AttributeError:
            continue
    raise AttributeError(target)


def _refuse_effects(both: _Both) -> None:
    for node in both.training.nodes:
        if node in both.equal or node in both.used:
            continue
        named = getattr(node.target, "__name__", "")
        if _overwrites(node) or named == "setitem" or (named.endswith("_") and not named.endswith("__")):
            raise Unmatched(module_of(node))
        if (
            node.kwargs.get("inplace")
            or node.kwargs.get("out") is not None
            or node.target in (F.batch_norm, torch.batch_norm)
        ):
            raise Unmatched(module_of(node))


def module_of(node: fx.Node) -> str:
    """Path of the module whose code a node is; empty for the network itself."""
    stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    if node.op == "call_module" and stack and stack[-1] == node.target:
        stack = stack[:-1]
    return stack[-1] if stack else ""
