"""Distillation of feature maps: the network learns to see what the original network sees, before it answers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from dynamize.errors import DynamizeError
from dynamize.graph.cuts import cut_points
from dynamize.graph.trace import annotate
from dynamize.nn.channels_last import images_for
from dynamize.nn.network import DynamicNetwork


class HintLoss:
    """Another loss plus the distance of feature maps to the teacher's, for ``loss(logits, images, labels)``.

    The mean over layers of mean((student - teacher)^2) / mean(teacher^2): hints without adapters (Romero et al. 2015,
    FitNets, eq. 3). Compared is what layers read that follow an exit, or the end of a resolution.

    Args:
        answers: the other loss.
        weight: of the distance, against a cross entropy of 1.
        student: whose forward the logits come from; in eval mode for now.
        teacher: the original network, frozen.

    Raises:
        DynamizeError: no feature map of the two has the same shape.
    """

    def __init__(self, answers: Any, weight: float, student: DynamicNetwork, teacher: nn.Module) -> None:
        self.answers, self.weight, self.teacher = answers, weight, teacher.eval()
        self.pairs = _pairs(student, teacher)
        self._seen: dict[str, Tensor] = {}
        self._wanted: dict[str, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take note of the feature maps of every forward inside the block."""
        handles = []
        for name, (ours, theirs) in self.pairs.items():
            handles.append(ours.register_forward_pre_hook(_noting(self._seen, name)))
            handles.append(theirs.register_forward_pre_hook(_noting(self._wanted, name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __call__(self, logits: Any, images: Tensor, labels: Tensor) -> Tensor:
        self._wanted.clear()
        loss: Tensor = self.answers(logits, images, labels)
        if not self._wanted:  # the other loss did not ask the teacher
            with torch.no_grad():
                self.teacher(images_for(self.teacher, images))
        distances = [relative_distance(self._seen[name], wanted) for name, wanted in self._wanted.items()]
        self._seen.clear()
        return loss + self.weight * torch.stack(distances).mean()


def relative_distance(features_NCHW: Tensor, wanted_NCHW: Tensor) -> Tensor:
    """Mean squared distance as a share of the mean square of ``wanted_NCHW``: a scalar."""
    wanted = wanted_NCHW.detach().float()
    return (features_NCHW.float() - wanted).square().mean() / wanted.square().mean().clamp_min(1e-12)


def _noting(notes: dict[str, Tensor], name: str) -> Any:
    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        notes[name] = inputs[0]

    return note


def _pairs(student: DynamicNetwork, teacher: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
    """By cut point, a layer of the student that reads it and the teacher's layer of the same path."""
    annotate(student.plain, student.input_shape)
    readers = _readers(student.plain)
    paths = dict(teacher.named_modules())
    shapes = _shapes(teacher, {path: paths[path] for path in readers.values() if path in paths}, student)
    usable = [cut for cut in cut_points(student.plain) if shapes.get(readers.get(cut.name, "")) == cut.shape]
    last = {cut.shape[1:]: cut.name for cut in usable}  # of each resolution
    found = {
        cut.name: (student.plain.get_submodule(readers[cut.name]), paths[readers[cut.name]])
        for cut in usable
        if cut.name in {*last.values(), *student.exit_places}
    }
    if not found:
        raise DynamizeError(
            "distill: features, but no feature map of the network has the shape of the original network's at the same "
            "place (`prune` narrows them): set features: 0"
        )
    return found


def _readers(plain: fx.GraphModule) -> dict[str, str]:
    """By node name, the path of a layer that reads it and is called once."""
    calls = [str(node.target) for node in plain.graph.nodes if node.op == "call_module"]
    found: dict[str, str] = {}
    for node in plain.graph.nodes:
        first = node.all_input_nodes[0] if node.op == "call_module" and node.all_input_nodes else None
        if first is not None and calls.count(str(node.target)) == 1:
            found.setdefault(first.name, str(node.target))
    return found


def _shapes(teacher: nn.Module, layers: Mapping[str, nn.Module], student: DynamicNetwork) -> dict[str, tuple[int, ...]]:
    """(C, H, W) of what reaches these layers of the teacher."""
    seen: dict[str, Tensor] = {}
    handles = [layer.register_forward_pre_hook(_noting(seen, path)) for path, layer in layers.items()]
    like = next(teacher.parameters())
    try:
        with torch.no_grad():
            teacher.eval()(torch.zeros(1, *student.input_shape, device=like.device, dtype=like.dtype))
    finally:
        for handle in handles:
            handle.remove()
    return {path: tuple(one.shape[1:]) for path, one in seen.items()}
