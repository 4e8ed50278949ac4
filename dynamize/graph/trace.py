"""Reading a network: a symbolic trace whose leaves keep everything that training and folding need."""

import logging
import traceback
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from dynamize.errors import DynamizeError
from dynamize.graph.answers import check_answers
from dynamize.graph.early import read_late
from dynamize.graph.given import own_copy, unwrapped
from dynamize.graph.macs import counting_macs
from dynamize.graph.modes import Unmatched, freeze_as, keep_modes
from dynamize.graph.subclasses import plain_convolutions
from dynamize.graph.tracer import TRACING, NetworkTracer, blank

log = logging.getLogger(__name__)

_COPYING = {"view": "reshape", "view_as": "reshape_as"}
_READS_MEMORY = ("as_strided", "stride", "view", torch.as_strided, torch.view_as_complex)
_BEAR_ANY_MEMORY = ("torch", "torchvision", "timm")  # whose functions do


def trace(network: nn.Module, input_shape: Sequence[int], *, check: bool = True) -> fx.GraphModule:
    """Trace a copy of ``network`` in eval mode and annotate every node.

    Each node's ``meta`` gets ``shape`` (of its tensor for one image, else None) and ``macs`` (multiply-accumulates
    per image). The network itself is left as it was; parameter names are kept. The traced one gives the same answers
    however its images lie in memory.

    Args:
        network: any CNN classifier, ``(N, C, H, W) -> (N, classes)``.
        input_shape: ``(C, H, W)``.
        check: whether answers are looked at; not those of a network whose weights are still to come.

    Raises:
        DynamizeError: the network cannot be traced, run on this shape, does not return class scores, or its answers
            cannot be taken apart (:func:`dynamize.graph.answers.check_answers`).
    """
    with TRACING:  # all of it: what another thread draws at random would count as drawn by the network
        return _trace(unwrapped(network), input_shape, check)


def _trace(network: nn.Module, input_shape: Sequence[int], check: bool) -> fx.GraphModule:
    network, trainer = own_copy(network), own_copy(network)
    network.eval()  # by itself: an own `train()` may return nothing
    trainer.train()
    flags = {path: module.training for path, module in trainer.named_modules()}
    graph, leaves = _read_both(network, trainer, input_shape)
    _copy_where_views_fail(graph)
    for name, leaf in leaves.items():
        network.add_module(name, leaf)
    traced = fx.GraphModule(network, graph, type(network).__name__)
    for name in leaves:
        delattr(network, name)
    freeze_as(traced, flags)
    annotate(traced, input_shape)
    plain_convolutions(traced)
    read_late(traced.graph)
    _give_plain_memory(traced.graph)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    if check:
        check_answers(network, traced, input_shape)
    return traced


def _read_both(
    network: nn.Module, trainer: nn.Module, input_shape: Sequence[int]
) -> tuple[fx.Graph, dict[str, nn.Module]]:
    """The graph of a network in evaluation, and the leaves in it that do otherwise in training.

    A module of which the training step cannot be read is left whole.
    """
    whole: frozenset[str] = frozenset()
    while True:
        graph = _read(network, input_shape, whole)
        try:
            return graph, keep_modes(network, graph, trainer, _read(trainer, input_shape, whole))
        except Unmatched as error:
            path, why = error.module, "it changes something by the way"
        except _Unreadable as error:
            path, why = error.module, str(error)
        if not path or path in whole:
            raise DynamizeError(
                f"{type(network).__name__} does otherwise in training than in evaluation, and that cannot be traced: "
                f"{why}. Put what depends on `self.training` into a module of its own, which then stays whole. "
                "Nothing was changed."
            )
        log.warning("'%s' is kept whole, as what it does in training cannot be traced: %s", path, why)
        whole |= {path}


class _Unreadable(DynamizeError):
    def __init__(self, message: str, module: str) -> None:
        super().__init__(message)
        self.module = module


def _read(network: nn.Module, input_shape: Sequence[int], whole: frozenset[str]) -> fx.Graph:
    """A graph in the mode that the network is in; what is computed of buffers is recorded only where that helps."""
    failure: _Unreadable | None = None
    found: fx.Graph | None = None
    for buffers in (False, True):
        tracer = NetworkTracer(input_shape, buffers=buffers, whole=whole)
        try:
            graph = tracer.trace(network)
        except Exception as error:
            failure = failure or _unreadable(network, tracer, error)
            continue
        if tracer.drawing is not None:
            where = f"'{tracer.drawing}'" if tracer.drawing else type(network).__name__
            raise _Unreadable(
                f"{where} asks a random number what to do, which a graph cannot. Draw a tensor of random numbers for "
                "the images instead, as torch.nn.Dropout does",
                tracer.drawing,
            )
        if not tracer.lost:
            return graph
        found = found or graph
    if found is not None:
        return found
    assert failure is not None
    raise failure


def _copy_where_views_fail(graph: fx.Graph) -> None:
    """``x.view(n, -1)`` needs values that lie side by side, which those of a channels-last map do not; ``reshape``
    copies them then."""
    for node in graph.nodes:
        if node.op == "call_method" and node.target in _COPYING and not _is_dtype(node.args[1:], node.kwargs):
            node.target = _COPYING[node.target]
            if "size" in node.kwargs:
                node.kwargs = {"shape": node.kwargs["size"]}


def _is_dtype(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a ``view`` is one of the same bytes as another type."""
    given = next(iter([*args, *kwargs.values()]), None)
    if isinstance(given, fx.Node):
        return given.target is getattr and str(given.args[1]) == "dtype"
    return isinstance(given, torch.dtype)


def _give_plain_memory(graph: fx.Graph) -> None:
    """Contiguous tensors for calls that see how a tensor lies in memory, and for the user's functions, which may."""
    for node in list(graph.nodes):
        whole = isinstance(node.target, types.FunctionType) and not _is_at_home(node.target, _BEAR_ANY_MEMORY)
        read = node.all_input_nodes if whole else node.all_input_nodes[:1] if node.target in _READS_MEMORY else []
        for given in read:
            if given.meta["shape"] is not None:
                with graph.inserting_before(node):
                    plain = graph.call_method("contiguous", (given,))
                plain.meta = {**given.meta, "macs": 0.0}
                node.replace_input_with(given, plain)


def _is_at_home(function: types.FunctionType, packages: Sequence[str]) -> bool:
    return (function.__module__ or "").partition(".")[0] in packages


def annotate(traced: fx.GraphModule, input_shape: Sequence[int]) -> None:
    """Run one blank image of ``(C, H, W)`` and write ``shape`` and ``macs`` into the meta of each node.

    What a node overwrites in place is from there on read from that node, so that the order of execution can be seen
    in the graph.
    """
    image_NCHW = blank(traced, 1, *input_shape)
    annotator = _Annotator(traced)
    try:
        with torch.inference_mode(False), torch.no_grad():
            output = annotator.run(image_NCHW)
    except DynamizeError:
        raise
    except Exception as error:
        raise DynamizeError(
            f"the network does not run on one image of shape {tuple(input_shape)}: {_first_line(error)}. "
            "Give the shape it was trained on, e.g. --input 3,224,224."
        ) from error
    if not isinstance(output, torch.Tensor) or output.ndim != 2:
        tensor = isinstance(output, torch.Tensor)
        given = f"a tensor of shape {tuple(output.shape)}" if tensor else type(output).__name__
        raise DynamizeError(
            f"the network returns {given}, but a classifier returns one tensor (N, classes). "
            "Wrap it in a module whose forward returns the class scores only."
        )
    annotator.order_overwriting()


class _Annotator(fx.Interpreter):
    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.position = {node: i for i, node in enumerate(traced.graph.nodes)}
        self.overwritten: list[tuple[fx.Node, fx.Node, bool]] = []  # a value used later, who changes it, all of it?

    def run_node(self, n: fx.Node) -> object:
        live = {
            node: (held, held._version)
            for node, held in self.env.items()
            if isinstance(held, torch.Tensor) and any(self.position[user] > self.position[n] for user in node.users)
        }
        with counting_macs() as counted:
            value = super().run_node(n)
        for node, (held, version) in live.items():
            if held._version != version:
                self.overwritten.append((node, n, _same_memory(value, held)))
        n.meta["macs"] = counted()
        n.meta["shape"] = tuple(value.shape) if isinstance(value, torch.Tensor) else None
        n.meta["floating"] = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value

    def order_overwriting(self) -> None:
        """Make every use of a value after it was overwritten a use of the node that overwrote it."""
        newest: dict[fx.Node, fx.Node] = {}
        for node, writer, whole in self.overwritten:
            if not whole:
                raise DynamizeError(
                    f"the network cannot be taken apart: `{writer.name}` writes in place into a part of "
                    f"`{node.name}`, which is used again later. Make that operator out of place. Nothing was changed."
                )
            held = newest.get(node, node)
            for user in list(held.users):
                if self.position[user] > self.position[writer]:
                    user.replace_input_with(held, writer)
            newest[node] = writer


def _same_memory(value: object, held: torch.Tensor) -> bool:
    if not isinstance(value, torch.Tensor) or value.data_ptr() != held.data_ptr():
        return False
    return value.shape == held.shape and value.stride() == held.stride()


def _unreadable(network: nn.Module, tracer: NetworkTracer, error: Exception) -> _Unreadable:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "torch/fx" not in f.filename.replace("\\", "/")]
    frames = [
        f
        for f in frames
        if not f.filename.endswith(("graph/trace.py", "graph/tracer.py")) and "/torch/nn/" not in f.filename
    ]
    line = f", {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
    where = f"module '{tracer.visiting}'" if tracer.visiting else "the top module"
    mode = " in training" if network.training else ""
    return _Unreadable(
        f"{type(network).__name__} cannot be traced{mode}: {where}{line}: {_first_line(error)}. "
        "Control flow must not depend on tensor values or shapes there: rewrite that line, or wrap the function "
        "with torch.fx.wrap so that tracing keeps it whole. Nothing was changed.",
        tracer.visiting,
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0].rstrip(".") if text else type(error).__name__
