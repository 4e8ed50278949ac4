"""Convolutions that pad by themselves, taken apart into zeros around the map and ``nn.Conv2d``."""

from collections.abc import Callable, Iterator

from torch import fx, nn
from torch.nn import functional

from dynamize.graph.fold import has_hooks
from dynamize.graph.nodes import callee
from dynamize.graph.subclasses import holding, same_answers

_RULES: tuple[Callable[[int, int], int], ...] = (
    lambda missing, reach: missing // 2,  # zeros before the map, by TensorFlow's rule
    lambda missing, reach: missing - missing // 2,  # by Caffe's
    lambda missing, reach: reach // 2,  # by the size of the kernel
)


def pads_by_itself(layer: nn.Module) -> bool:
    """Whether it is a convolution that may work out its padding while it runs."""
    return isinstance(layer, nn.Conv2d) and (type(layer) is not nn.Conv2d or isinstance(layer.padding, str))


def explicit_padding(traced: fx.GraphModule) -> None:
    """Take apart all such convolutions, for the image size that ``shape`` in the nodes' ``meta`` is of.

    The layer keeps its name and its parameters. One that computes anything else stays what it is.
    """
    for node in list(traced.graph.find_nodes(op="call_module")):
        layer = traced.get_submodule(str(node.target))
        if not isinstance(layer, nn.Conv2d) or not pads_by_itself(layer):
            continue
        given = node.all_input_nodes[0].meta["shape"]
        for padding, ends in _candidates(layer, given, node.meta["shape"]):
            plain = holding(layer, padding)
            if same_answers(layer, plain, given, ends):
                traced.set_submodule(str(node.target), plain)
                if ends:
                    _pad_before(node, ends)
                break
    traced.recompile()


def pads_zeros(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node puts zeros around a map, and does nothing else."""
    layer = callee(module, node)
    if type(layer) in (nn.ZeroPad2d, nn.ConstantPad2d):
        return bool(not layer.value and all(int(one) >= 0 for one in layer.padding))
    if layer is not functional.pad:
        return False
    given = {**dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)), **node.kwargs}
    ends = given["pad"]
    if not isinstance(ends, list | tuple) or not all(isinstance(one, int) and one >= 0 for one in ends):
        return False
    return bool(given.get("mode", "constant") == "constant" and not given.get("value"))


Padding = tuple[tuple[int, int], list[int]]


def _candidates(layer: nn.Conv2d, given: tuple[int, ...], gives: tuple[int, ...]) -> Iterator[Padding]:
    """Paddings that the layer may have: its own where both ends are alike, else zeros to put around the map."""
    names = {name for name, _ in [*layer.named_parameters(), *layer.named_buffers()]}
    if has_hooks(layer) or not names <= {"weight", "bias"} or "weight" not in layer._parameters:
        return
    sizes = list(zip(given[2:], gives[2:], layer.stride, layer.dilation, layer.kernel_size, strict=True))
    for rule in _RULES:
        before, behind = [], []
        for size, out, step, spread, length in sizes:
            reach = spread * (length - 1)
            missing = (out - 1) * step + reach + 1 - size
            before.append(rule(max(0, missing), reach))
            behind.append(max(0, missing - before[-1]))
        if all(first >= last for first, last in zip(before, behind, strict=True)):
            yield (before[0], before[1]), []
        yield (0, 0), [before[1], behind[1], before[0], behind[0]]


def _pad_before(node: fx.Node, ends: list[int]) -> None:
    source = node.all_input_nodes[0]
    with node.graph.inserting_before(node):
        padded = node.graph.call_function(functional.pad, (source, ends))
    node.replace_input_with(source, padded)
