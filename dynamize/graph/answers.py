"""Whether a network answers as one that may be taken apart must: each image by itself, and with logits."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dynamize.errors import DynamizeError
from dynamize.graph.modes import module_of
from dynamize.graph.nodes import output_value
from dynamize.graph.tracer import blank

_SIGMOIDS = (nn.Sigmoid, torch.sigmoid, F.sigmoid, torch.special.expit, "sigmoid", "sigmoid_")
_MODULES_HANDING_ON = (nn.Identity, nn.Flatten, nn.modules.dropout._DropoutNd)
_HANDING_ON = (*_MODULES_HANDING_ON, torch.flatten, torch.squeeze, "flatten", "squeeze", "view", "reshape")


def check_answers(network: nn.Module, traced: fx.GraphModule, input_shape: Sequence[int]) -> None:
    """Refuse what cannot be converted without a silent change.

    Raises:
        DynamizeError: the tracer misread the network (it follows one branch and takes ``x += y`` for ``x = x + y``), a
            layer does not bear the channels-last memory of training and the eager backend, the answer to an image is
            drawn at random or depends on the other images of its batch, or answers are no logits of several classes.
    """
    images_NCHW = _images(network, input_shape)
    try:
        wanted_NC = _answers(network, images_NCHW)
        found_NC = _answers(traced, images_NCHW)
    except Exception as error:
        raise DynamizeError(
            f"the network runs on one image but not on several: {_first_line(error)}. A converted network works on "
            "batches of any size: take the batch size from the tensors"
        ) from error
    _refuse_no_logits(traced, wanted_NC)
    if not _alike(_answers(network, images_NCHW, seed=1), wanted_NC):
        raise DynamizeError(
            f"{type(network).__name__} draws random numbers in evaluation: two calls on the same images answer "
            "differently. Let it draw in training only (`if self.training`). Nothing was changed."
        )
    if not torch.allclose(found_NC, wanted_NC, rtol=1e-3, atol=1e-3 * float(wanted_NC.abs().max())):
        raise DynamizeError(
            f"{type(network).__name__} answers differently once it is traced: something in its forward depends on the "
            "values, or `x += y` changes a tensor that another name still holds. Write `x = x + y` there, or wrap the "
            "function with torch.fx.wrap so that tracing keeps it whole. Nothing was changed."
        )
    try:
        _answers(traced, images_NCHW.contiguous(memory_format=torch.channels_last))
    except Exception as error:
        raise DynamizeError(
            f"the network does not run on images that lie channels last in memory: {_first_line(error)}. A layer that "
            "tracing keeps whole calls `view`: write `reshape` there. Nothing was changed."
        ) from error
    if not _by_itself(network, images_NCHW):
        raise DynamizeError(
            f"{_mixing(traced, images_NCHW)}: the answer to an image depends on the other images of its batch, but a "
            "dynamic network computes images in changing company. Give batch norms running statistics "
            "(track_running_stats=True), and normalise each image by itself. Nothing was changed."
        )


def _images(network: nn.Module, input_shape: Sequence[int]) -> Tensor:
    """Three images of noise that differ in contrast and brightness, so that what mixes them shows."""
    like = blank(network, 3, *input_shape)
    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(0))
    scales, shifts = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.0, 0.5, -0.5])
    return (noise * scales.view(-1, 1, 1, 1) + shifts.view(-1, 1, 1, 1)).to(like)


def _answers(module: Callable[[Tensor], Tensor], images_NCHW: Tensor, seed: int = 0) -> Tensor:
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        return module(images_NCHW.clone())


def _by_itself(network: nn.Module, images_NCHW: Tensor) -> bool:
    """Whether each image alone is answered as in the batch, if need be in float64: kernels add up in another order for
    another batch size, and deep networks multiply such rounding errors."""

    def holds(module: nn.Module, images: Tensor) -> bool:
        return _alike(torch.cat([_answers(module, image[None]) for image in images]), _answers(module, images))

    if holds(network, images_NCHW):
        return True
    try:
        return holds(copy.deepcopy(network).double(), images_NCHW.double())
    except Exception:  # a layer of somebody's that bears float32 only
        return False


def _alike(found: Tensor, wanted: Tensor) -> bool:
    """Within a hundredth of how far the values of one tensor lie apart, or the rounding of its type."""
    found, wanted = found.float(), wanted.float()
    spread = float(wanted.max() - wanted.min())
    rounding = 1e3 * torch.finfo(torch.float32).eps * float(wanted.abs().max())
    return float((found - wanted).abs().max()) <= max(1e-2 * spread, rounding)


def _refuse_no_logits(traced: fx.GraphModule, answers_NC: Tensor) -> None:
    answers_NC = answers_NC.float()
    if not answers_NC.isfinite().all():
        raise DynamizeError(
            "the network answers images of noise with values that are no finite numbers: training has diverged, or a "
            "layer divides by zero. Nothing was changed."
        )
    if answers_NC.shape[1] < 2:
        raise DynamizeError(
            "the network gives one score for each image, and one class is no choice: an exit could not say how sure it "
            "is. Give it two classes: for a score s of a sigmoid, return torch.cat([-s / 2, s / 2], dim=1)."
        )
    ones_N = torch.ones(len(answers_NC), device=answers_NC.device)
    if bool((answers_NC >= 0).all()) and torch.allclose(answers_NC.sum(1), ones_N, atol=1e-3):
        ending = "probabilities, as by softmax"
    elif torch.allclose(answers_NC.exp().sum(1), ones_N, atol=1e-3):
        ending = "logarithms of probabilities, as by log_softmax"
    elif _ends_in_sigmoid(traced):
        ending = "a sigmoid for each class"
    else:
        return
    raise DynamizeError(
        f"the network ends in {ending}, but exits, distillation and calibration take logits and would count that "
        "operator twice. Leave the last operator out: the class of the largest value stays the same. For a model in "
        "nn.Sequential that is net[:-1]."
    )


def _ends_in_sigmoid(traced: fx.GraphModule) -> bool:
    node = output_value(traced.graph)
    while _is(traced, node, _HANDING_ON):
        node = node.all_input_nodes[0]
    return _is(traced, node, _SIGMOIDS)


def _is(traced: fx.GraphModule, node: fx.Node, kinds: Sequence[object]) -> bool:
    if node.op == "call_module":
        classes = tuple(kind for kind in kinds if isinstance(kind, type))
        return isinstance(traced.get_submodule(str(node.target)), classes)
    return node.op in ("call_function", "call_method") and node.target in kinds


class _Values(fx.Interpreter):
    """All values of a run."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.values: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.values[n] = value.clone()
        return value


def _mixing(traced: fx.GraphModule, images_NCHW: Tensor) -> str:
    """Which module computes the first value that differs between an image alone and in a batch."""
    together, alone = _Values(traced), _Values(traced)
    with torch.no_grad():
        together.run(images_NCHW.clone())
        alone.run(images_NCHW[:1].clone())
    for node, value in together.values.items():
        other = alone.values.get(node)
        if other is None or value.ndim == 0 or value.shape[1:] != other.shape[1:] or not value.is_floating_point():
            continue
        if len(other) == 1 and len(value) == len(images_NCHW) and not _alike(value[:1], other):
            path = str(node.target) if node.op == "call_module" else module_of(node) or "the top module"
            return f"`{node.name}` in {path}" if node.op != "call_module" else f"`{path}`"
    return "the network"


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0].rstrip(".") if text else type(error).__name__
