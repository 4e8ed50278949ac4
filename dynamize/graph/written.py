"""Layers of torch's own for convolutions, products and norms whose tensors are held or computed in another way.

Weight norm, spectral norm, standardised weights and ``functional.conv2d`` with a parameter give answers that an
``nn.Conv2d`` gives too. What cuts channels knows that one only.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dynamize.graph.modes import InTraining, freeze
from dynamize.graph.nodes import callee
from dynamize.graph.replace import TOLERANCE, difference

_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_MIXING: tuple[Any, ...] = (functional.conv2d, functional.linear)
_OF_TORCH = (nn.Conv2d, nn.Linear)

Given = Mapping[str, Any]  # the arguments of a call, by name


def computed_layers(traced: fx.GraphModule) -> dict[nn.Module, nn.Module]:
    """For each convolution and linear layer of an annotated graph that computes its weight anew in each call, one that
    holds the weight as it is now. The graph is left as it was, and in eval mode."""
    traced.eval()
    found: dict[nn.Module, nn.Module] = {}
    for node in traced.graph.find_nodes(op="call_module"):
        layer = traced.get_submodule(str(node.target))
        shape = node.all_input_nodes[0].meta["shape"] if node.all_input_nodes else None
        if isinstance(layer, _OF_TORCH) and shape is not None:
            written = _written(layer, shape)
            if written is not None:
                found[layer] = written
    return found


def functions_to_layers(traced: fx.GraphModule) -> list[str]:
    """Let layers stand in an annotated graph for ``conv2d``, ``linear`` and ``batch_norm``, called as functions
    with trained tensors of the network or with what is computed of them alone, in place. Nodes keep their names.

    Returns:
        Paths of the new layers.
    """
    traced.eval()
    values, made = _Values(traced), []
    for node in traced.graph.nodes:
        layer = _mixing(node, values) or _norm(traced, node, values)
        if layer is None:
            continue
        source = node.all_input_nodes[0]
        node.op, node.target, node.args, node.kwargs = "call_module", _free_path(traced, node, layer), (source,), {}
        traced.add_submodule(str(node.target), layer)
        made.append(str(node.target))
    if made:
        _clear(traced, values.leaves)
    return made


# --- layers


class _Calls(TorchFunctionMode):
    """Calls of convolutions and products, as they come."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Given] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _MIXING:
            self.found.append({**dict(zip(_NAMES, args, strict=False)), **(kwargs or {})})
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _written(layer: nn.Conv2d | nn.Linear, shape: tuple[int, ...]) -> nn.Module | None:
    """The layer with a weight of its own; None if it has one, or does something else besides."""
    if "weight" in layer._parameters and not _standardises(layer):
        return None
    generator = torch.Generator().manual_seed(0)
    like = next((one for one in layer.parameters() if one.is_floating_point()), None)
    if like is None or layer._forward_hooks:
        return None
    inputs = torch.randn(2, *shape[1:], generator=generator).to(like)
    calls = _Calls()
    try:
        with calls:
            wanted = layer(inputs.clone())
    except Exception:  # code of somebody's
        return None
    if len(calls.found) != 1 or calls.found[0]["weight"] is layer._parameters.get("weight"):
        return None
    (given,) = calls.found
    trained = any(one.requires_grad for one in layer.parameters())
    for options in _paddings(layer, given):
        plain = _layer({**given, **options}, trained).eval()
        found = plain(inputs.clone())
        if found.shape == wanted.shape and difference(found, wanted) <= TOLERANCE:
            return plain
    return None


def _standardises(layer: nn.Module) -> bool:
    """Whether code of its own may compute another weight from the one that it holds."""
    plain = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
    return type(layer).forward is not plain.forward or bool(layer._forward_pre_hooks)


def _paddings(layer: nn.Module, given: Given) -> list[Given]:
    """How the map may have been continued: by the call, or before it as the layer says."""
    if not isinstance(layer, nn.Conv2d):
        return [{}]
    return [{}, {"padding": layer.padding, "padding_mode": layer.padding_mode}]


def _layer(given: Given, trained: bool) -> nn.Module:
    weight, bias = given["weight"], given.get("bias")
    made: nn.Module
    if weight.ndim == 2:
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    else:
        options: Any = {name: given[name] for name in ("stride", "padding", "dilation", "groups") if name in given}
        inputs = weight.shape[1] * options.get("groups", 1)
        options |= {"padding_mode": given.get("padding_mode", "zeros"), "bias": bias is not None, "device": "meta"}
        made = nn.Conv2d(inputs, weight.shape[0], tuple(weight.shape[2:]), **options)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            held = value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach().clone(), trained)
            made.register_parameter(name, held)
    return made


# --- functions


class _Values:
    """What is computed of tensors of the network alone.

    Attributes:
        leaves: paths of the tensors that layers were made of.
    """

    def __init__(self, traced: fx.GraphModule) -> None:
        self._run = fx.Interpreter(traced)
        self._still: set[fx.Node] = set()
        self.leaves: set[str] = set()
        for node in traced.graph.nodes:
            sources = node.all_input_nodes
            if node.op == "get_attr" or (node.op != "output" and sources and self._still.issuperset(sources)):
                self._still.add(node)

    def known(self, *values: Any) -> bool:
        return all(one is None or one in self._still for one in values)

    def trained(self, *values: Any) -> bool:
        """Whether training changes them."""
        return any(self(leaf).requires_grad for one in values if one is not None for leaf in self._leaves(one))

    def take(self, *values: Any) -> list[Tensor | None]:
        for one in values:
            self.leaves |= {str(leaf.target) for leaf in (self._leaves(one) if one is not None else ())}
        return [None if one is None else self(one) for one in values]

    @torch.no_grad()
    def __call__(self, node: fx.Node) -> Tensor:
        env = self._run.env
        for one in self._before(node):
            if one not in env:
                env[one] = self._run.run_node(one)
        return cast(Tensor, env[node])

    def _leaves(self, node: fx.Node) -> list[fx.Node]:
        return [one for one in self._before(node) if one.op == "get_attr"]

    def _before(self, node: fx.Node) -> list[fx.Node]:
        """What it is computed of and itself, in order."""
        found, waiting = {node}, [node]
        while waiting:
            new = set(waiting.pop().all_input_nodes) - found
            found |= new
            waiting += new
        return sorted(found)


def _mixing(node: fx.Node, values: _Values) -> nn.Module | None:
    if node.op != "call_function" or node.target not in _MIXING:
        return None
    given: dict[str, Any] = {**dict(zip(_NAMES, node.args, strict=False)), **node.kwargs}
    held = given["weight"], given.get("bias")
    if given["input"] is not node.all_input_nodes[0] or not values.known(*held) or not values.trained(held[0]):
        return None
    weight, bias = values.take(*held)
    return _layer({**given, "weight": weight, "bias": bias}, trained=True).eval()


def _norm(traced: fx.GraphModule, node: fx.Node, values: _Values) -> nn.Module | None:
    """A batch norm, of running statistics in evaluation and those of the batch in training, or of the former always."""
    called = callee(traced, node)
    if isinstance(called, InTraining):
        calls = called.calls(node)
    else:
        calls = ((node.target, node.args, node.kwargs),) * 2 if node.op == "call_function" else None
    if calls is None or any(target is not functional.batch_norm for target, *_ in calls):
        return None
    evaluated, trained = (_bound(functional.batch_norm, args, kwargs) for _, args, kwargs in calls)
    tensors = [evaluated.pop(name) for name in ("running_mean", "running_var", "weight", "bias")]
    moves = trained.pop("training")
    same = [trained.pop(name) for name in ("running_mean", "running_var", "weight", "bias")] == tensors
    if evaluated.pop("training") or not same or evaluated != trained or tensors[0] is None:
        return None
    held = [one for one in tensors if one is not None]
    if any(one.op != "get_attr" for one in held) or evaluated["input"] is not node.all_input_nodes[0]:
        return None
    mean, var, weight, bias = values.take(*tensors)
    return _batch_norm(evaluated, len(node.meta["shape"]), mean, var, weight, bias, bool(moves))


def _batch_norm(
    given: Given,
    dimensions: int,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    moves: bool,
) -> nn.Module | None:
    kinds: Mapping[int, type[nn.modules.batchnorm._BatchNorm]]
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}
    if dimensions not in kinds or mean is None or (weight is None) != (bias is None):
        return None
    norm = kinds[dimensions](len(mean), given["eps"], given["momentum"], affine=weight is not None).to(mean.device)
    norm.running_mean, norm.running_var = mean, var
    for name, value in (("weight", weight), ("bias", bias)):
        if isinstance(value, nn.Parameter):
            norm.register_parameter(name, value)
        elif value is not None:
            norm.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return norm.eval() if moves else freeze(norm).eval()


def _bound(function: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    call = inspect.signature(function).bind(*args, **kwargs)
    call.apply_defaults()
    return dict(call.arguments)


# --- where they stand


def _free_path(traced: fx.GraphModule, node: fx.Node, layer: nn.Module) -> str:
    """In the module whose code made the call, under a name that nothing has."""
    stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    path = ".".join(part for part in (stack[-1] if stack else "", type(layer).__name__.lower()) if part)
    taken = {str(one.target) for one in traced.graph.nodes if one.op in ("call_module", "get_attr")}
    while path in taken or any(one.startswith(f"{path}.") for one in taken):
        path += "_"
    return path


def _clear(traced: fx.GraphModule, leaves: set[str]) -> None:
    """Take out what nothing reads any more."""
    traced.graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    left = {str(node.target) for node in traced.graph.find_nodes(op="get_attr")}
    for path in leaves - left:
        holder, _, name = path.rpartition(".")
        try:
            module = traced.get_submodule(holder)
        except AttributeError:
            continue
        if type(module) is nn.Module or module is traced:  # fx holds single tensors in these
            delattr(module, name)
    traced.recompile()
