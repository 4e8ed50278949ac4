"""Reading a network: a symbolic trace whose leaves keep everything that training and folding need."""

import copy
import traceback
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torchvision.ops import StochasticDepth

from dynamize.errors import DynamizeError
from dynamize.graph.macs import counting_macs


class Whole(nn.Module):
    """A module of ours that stays one node when a network is traced."""


# Subclasses outside torch.nn (timm's BatchNormAct2d, Conv2dSame, ...) must stay modules: traced through, a
# batch norm freezes its training flag and disappears from the network.
_LEAF_TYPES: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.dropout._DropoutNd,
    StochasticDepth,
    Whole,
)
# Kept whole by timm because of an in-place `mul_` whose result nothing names; `annotate` puts it in order.
_TRACED_ALL_THE_SAME = ("NormFreeBlock",)
_COPYING = {"view": "reshape", "view_as": "reshape_as"}
_READS_MEMORY = ("as_strided", "stride", "view", torch.as_strided, torch.view_as_complex)
_BEAR_ANY_MEMORY = ("torch", "torchvision", "timm")  # whose functions do


class NetworkTracer(fx.Tracer):
    """``fx.Tracer`` with the leaf lists of torchvision and, where it is installed, timm."""

    def __init__(self) -> None:
        functions, self._timm_leaves = _timm_leaves()
        super().__init__(autowrap_functions=functions)
        self.visiting = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, _LEAF_TYPES + self._timm_leaves) or "DropPath" in type(m).__name__:
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def create_proxy(self, kind: str, target: Any, args: tuple, kwargs: dict, *rest: Any, **more: Any) -> Any:
        if kind == "placeholder" and args and self.graph.find_nodes(op="placeholder"):
            return args[0]  # forward(images, mask=None): a classifier is called with the images only
        return super().create_proxy(kind, target, args, kwargs, *rest, **more)

    def call_module(self, m: nn.Module, forward: object, args: tuple, kwargs: dict) -> object:
        outer, self.visiting = self.visiting, self.path_of_module(m)
        result = super().call_module(m, forward, args, kwargs)  # type: ignore[arg-type]
        self.visiting = outer  # not restored on an error: it then names the module that failed
        return result


def _timm_leaves() -> tuple[tuple, tuple[type[nn.Module], ...]]:
    try:
        from timm.models._features_fx import get_notrace_functions, get_notrace_modules
    except ImportError:
        return (), ()
    modules = [module for module in get_notrace_modules() if module.__name__ not in _TRACED_ALL_THE_SAME]
    return tuple(get_notrace_functions()), tuple(modules)


def trace(network: nn.Module, input_shape: Sequence[int]) -> fx.GraphModule:
    """Trace a copy of ``network`` in eval mode and annotate every node.

    Each node's ``meta`` gets ``shape`` (of its tensor for one image, else None) and ``macs`` (multiply-accumulates
    per image). The network itself is left as it was; parameter names are kept. The traced one gives the same answers
    however its images lie in memory.

    Args:
        network: any CNN classifier, ``(N, C, H, W) -> (N, classes)``.
        input_shape: ``(C, H, W)``.

    Raises:
        DynamizeError: the network cannot be traced, run on this shape, or does not return class scores.
    """
    network = copy.deepcopy(network).eval()
    tracer = NetworkTracer()
    try:
        graph = tracer.trace(network)
    except Exception as error:
        raise DynamizeError(_why_untraceable(network, tracer, error)) from error
    _copy_where_views_fail(graph)
    traced = fx.GraphModule(network, graph, type(network).__name__)
    annotate(traced, input_shape)
    _give_plain_memory(traced.graph)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    _check_answers(network, traced, input_shape)
    return traced


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


def blank(module: nn.Module, *shape: int) -> torch.Tensor:
    """Zeros on the device and of the floating type that ``module`` computes with."""
    tensors = [*module.parameters(), *module.buffers()]
    floating = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
    return torch.zeros(shape, device=tensors[0].device if tensors else "cpu", dtype=floating)


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


def _check_answers(network: nn.Module, traced: fx.GraphModule, input_shape: Sequence[int]) -> None:
    """Refuse a network that the tracer misread (it follows one branch and takes ``x += y`` for ``x = x + y``), or in
    which a layer does not bear the channels-last memory of training and the eager backend."""
    like = blank(network, 2, *input_shape)
    images_NCHW = torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like)
    answers: list[torch.Tensor] = []
    for module in (network, traced):
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            try:
                answers.append(module(images_NCHW.clone()))
            except Exception as error:
                raise DynamizeError(
                    f"the network runs on one image but not on two: {_first_line(error)}. A converted network works "
                    "on batches of any size: take the batch size from the tensors"
                ) from error
    try:
        with torch.no_grad(), torch.random.fork_rng():
            traced(images_NCHW.contiguous(memory_format=torch.channels_last))
    except Exception as error:
        raise DynamizeError(
            f"the network does not run on images that lie channels last in memory: {_first_line(error)}. A layer that "
            "tracing keeps whole calls `view`: write `reshape` there. Nothing was changed."
        ) from error
    wanted, found = answers
    if not torch.allclose(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()), equal_nan=True):
        raise DynamizeError(
            f"{type(network).__name__} answers differently once it is traced: something in its forward depends on the "
            "values, or `x += y` changes a tensor that another name still holds. Write `x = x + y` there, or wrap the "
            "function with torch.fx.wrap so that tracing keeps it whole. Nothing was changed."
        )


def _why_untraceable(network: nn.Module, tracer: NetworkTracer, error: Exception) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "torch/fx" not in f.filename.replace("\\", "/")]
    frames = [f for f in frames if not f.filename.endswith("graph/trace.py") and "/torch/nn/" not in f.filename]
    line = f", {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
    where = f"module '{tracer.visiting}'" if tracer.visiting else "the top module"
    return (
        f"{type(network).__name__} cannot be traced: {where}{line}: {_first_line(error)}. "
        "Control flow must not depend on tensor values or shapes there: rewrite that line, or wrap the function "
        "with torch.fx.wrap so that tracing keeps it whole. Nothing was changed."
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0].rstrip(".") if text else type(error).__name__
