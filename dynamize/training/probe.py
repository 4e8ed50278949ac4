"""What a head at a cut point could reach, from one forward pass: ridge regression with leave-one-out answers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import adaptive_avg_pool2d, one_hot

from dynamize.arguments import class_numbers
from dynamize.graph.nodes import output_value

_POOLED_FEATURES = 1024  # a map is pooled to 2x2 where that gives no more features than this


@dataclass(frozen=True)
class Probed:
    """What was found at P places for n images.

    Attributes:
        right: (P, n) bool, whether the answer there would be right.
        scores: (P, n), how sure it would be: larger is surer.
        own: (n,) bool, whether the network's own answer is right.
        classes: how many the network tells apart.
    """

    right: Tensor
    scores: Tensor
    own: Tensor
    classes: int


def probe(
    traced: fx.GraphModule,
    bodies: Mapping[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
) -> Probed:
    """What heads with these bodies would answer, image by image, if their classifiers alone were fitted.

    A classifier sees what its body gives, and the pooled map itself where the body has something to learn.

    Args:
        traced: the network in eval mode.
        bodies: of the head after each of P nodes whose value is (N, C, H, W): feature map -> feature map.
        batches: images (N, C, H, W) under the test-time transform, and labels (N,); where a label is -1, the network's
            own answer counts as right.

    Every image is answered by the classifier fitted to all others (closed-form leave-one-out, the PRESS residual of
    ridge regression), so a node with many channels is not flattered.
    """
    tap = _Tap(traced, [*bodies, output_value(traced.graph).name])
    pooled: list[list[Tensor]] = [[] for _ in bodies]
    labels: list[Tensor] = []
    answers: list[Tensor] = []
    heads = [body.to(device).eval() for body in bodies.values()]
    with torch.no_grad():
        for images, targets in batches:
            *features, logits = tap.features(images.to(device))
            for kept, head, value in zip(pooled, heads, features, strict=True):
                kept.append(_seen(head, value).float().cpu())
            answers.append(logits.argmax(1).cpu())
            given = class_numbers(targets.cpu(), logits.shape[1], "the calibration images", unlabelled=True)
            labels.append(torch.where(given < 0, answers[-1], given))
    truth = torch.cat(labels)
    targets_NC = one_hot(truth, logits.shape[1]).double() * 2 - 1
    outputs = [_leave_one_out(torch.cat(one).double(), targets_NC) for one in pooled]
    top_PN2 = torch.stack([one.topk(2, dim=1).values for one in outputs])
    right = torch.stack([one.argmax(1) == truth for one in outputs])
    return Probed(right, top_PN2[..., 0] - top_PN2[..., 1], torch.cat(answers) == truth, logits.shape[1])


def _seen(body: nn.Module, features_NCHW: Tensor) -> Tensor:
    found = body(features_NCHW).mean(dim=(2, 3))
    learns = next(body.parameters(), None) is not None
    return torch.cat([_pool(features_NCHW), found], dim=1) if learns else found


def _pool(features_NCHW: Tensor) -> Tensor:
    size = 2 if features_NCHW.shape[1] * 4 <= _POOLED_FEATURES and min(features_NCHW.shape[2:]) >= 2 else 1
    return adaptive_avg_pool2d(features_NCHW, size).flatten(1)


def _leave_one_out(features_ND: Tensor, targets_NC: Tensor) -> Tensor:
    features = (features_ND - features_ND.mean(0)) / (features_ND.std(0) + 1e-6)
    features = torch.cat([features, torch.ones(len(features), 1, dtype=features.dtype)], dim=1)
    gram = features.T @ features
    gram += torch.eye(len(gram), dtype=gram.dtype) * (0.01 * len(features))
    solved = torch.linalg.solve(gram, features.T)  # (D, N)
    fitted = features @ (solved @ targets_NC)
    leverage = (features * solved.T).sum(1, keepdim=True)
    return (fitted - leverage * targets_NC) / (1 - leverage).clamp_min(1e-6)


class _Tap(fx.Interpreter):
    """Runs a network and returns the values of some nodes."""

    def __init__(self, traced: fx.GraphModule, names: list[str]) -> None:
        super().__init__(traced)
        self.names, self.kept = names, dict[str, Tensor]()

    def features(self, images: Tensor) -> list[Tensor]:
        self.kept.clear()
        self.run(images)
        return [self.kept[name] for name in self.names]

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if n.name in self.names:
            self.kept[n.name] = value.clone()  # a later in-place operator must not change it
        return value
