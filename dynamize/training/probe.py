"""What a head at a cut point could reach, from one forward pass: ridge regression with leave-one-out answers."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx
from torch.nn.functional import adaptive_avg_pool2d, one_hot

_POOLED_FEATURES = 1024  # a map is pooled to 2x2 where that gives no more features than this


def probe(
    traced: fx.GraphModule, names: Sequence[str], batches: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> Tensor:
    """Whether a linear classifier on the pooled features of each node would be right, image by image.

    Args:
        traced: the network in eval mode.
        names: P nodes whose value is (N, C, H, W).
        batches: images (N, C, H, W) under the test-time transform, and labels (N,).

    Returns:
        (P, n) bool. Every image is answered by the classifier fitted to all others (closed-form leave-one-out, the
        PRESS residual of ridge regression), so a node with many channels is not flattered.
    """
    tap = _Tap(traced, names)
    pooled: list[list[Tensor]] = [[] for _ in names]
    labels: list[Tensor] = []
    with torch.no_grad():
        for images, targets in batches:
            for kept, features in zip(pooled, tap.features(images.to(device)), strict=True):
                kept.append(_pool(features).float().cpu())
            labels.append(targets.cpu())
    truth = torch.cat(labels)
    targets_NC = one_hot(truth).double() * 2 - 1
    return torch.stack([_leave_one_out(torch.cat(f).double(), targets_NC) == truth for f in pooled])


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
    return ((fitted - leverage * targets_NC) / (1 - leverage).clamp_min(1e-6)).argmax(1)


class _Tap(fx.Interpreter):
    """Runs a network up to the last of some nodes and returns their values."""

    def __init__(self, traced: fx.GraphModule, names: Sequence[str]) -> None:
        super().__init__(traced)
        self.names, self.seen = list(names), dict[str, Tensor]()

    def features(self, images: Tensor) -> list[Tensor]:
        self.seen.clear()
        self.run(images)
        return [self.seen[name] for name in self.names]

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if n.name in self.names:
            self.seen[n.name] = value.clone()  # a later in-place operator must not change it
        return value
