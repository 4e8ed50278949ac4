"""What the exits are trained towards: labels, the teacher, and the last exit."""

from collections.abc import Sequence
from itertools import accumulate
from operator import add

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from dynamize.arguments import class_numbers, given_network
from dynamize.errors import DynamizeError
from dynamize.nn.channels_last import images_for
from dynamize.nn.piece import Dense

UNLABELLED = -1
Output = Tensor | Sequence[Tensor] | Dense
"""What a network gives in train mode: logits (N, classes), those of all exits, or these with the shares of gates."""


def exit_logits(output: Output) -> Sequence[Tensor]:
    """The logits of all exits, (N, classes) each."""
    if isinstance(output, Tensor):
        return [output]
    return output.logits if isinstance(output, Dense) else output


class MultiExitLoss:
    """Weighted sum over exits of cross entropy and distillation, for ``loss(output, images, labels)`` in any loop.

    Of each exit's loss, ``alpha`` is T^2 KL(teacher || exit) at temperature T (Hinton et al. 2015, eq. 4), the rest
    cross entropy. ``from_last`` adds the same distance to the last exit, detached (Phuong & Lampert 2019, sec. 3).
    ``joined`` adds the loss of the answers so far joined, as products of probabilities.
    Images labelled -1 have no label: all of their loss is distillation.

    Args:
        teacher: a frozen classifier, or None for labels only.
        alpha: share of distillation, 0 to 1.
        temperature: T.
        from_last: weight of the distance of each early exit to the last exit.
        weights: one for each exit; None weighs all alike. They are normalised to a sum of K.
        joined: weight of the loss of each joined answer, of two or more exits.

    Example:
        >>> import torch
        >>> net = dz.source("dynamize:digits_resnet", pretrained=True)
        >>> dyn = dz.convert(net, [dz.Exits()], (1, 8, 8)).train()
        >>> images, labels = torch.randn(8, 1, 8, 8), torch.arange(8)
        >>> loss = dz.MultiExitLoss(teacher=net)(dyn(images), images, labels)
        >>> loss.backward()
    """

    def __init__(
        self,
        teacher: nn.Module | None = None,
        *,
        alpha: float = 0.5,
        temperature: float = 2.0,
        from_last: float = 0.0,
        weights: Sequence[float] | None = None,
        joined: float = 0.0,
    ) -> None:
        self.teacher = None if teacher is None else given_network(teacher, "dz.MultiExitLoss").eval()
        self.alpha = alpha if teacher is not None else 0.0
        self.temperature, self.from_last, self.joined = temperature, from_last, joined
        self.weights = None if weights is None else [w * len(weights) / sum(weights) for w in weights]

    def __call__(self, output: Output, images: Tensor, labels: Tensor) -> Tensor:
        """What the network gave in train mode; images (N, C, H, W) for the teacher; labels (N,). A scalar.

        Raises:
            DynamizeError: labels are no class numbers, or there are images without labels and no teacher.
        """
        exits = [one.float() for one in exit_logits(output)]
        labels = class_numbers(labels, exits[0].shape[1], "the loss", unlabelled=True)
        taught = self._teach(images)
        weights = self.weights or [1.0] * len(exits)
        if taught is None and bool((labels == UNLABELLED).any()):
            raise DynamizeError(
                f"there are images without labels ({UNLABELLED}), and no original network to learn them from: give a "
                "teacher and alpha above 0, or label them"
            )
        shares_N = torch.where(labels == UNLABELLED, 1.0, self.alpha)
        losses = [weight * self._one(one, labels, taught, shares_N) for weight, one in zip(weights, exits, strict=True)]
        for k, one in enumerate(exits[:-1] if self.from_last else ()):
            losses.append(weights[k] * self.from_last * self.distance(one, exits[-1].detach()))
        together = accumulate((one.log_softmax(1) for one in exits), add)
        for one in list(together)[1:] if self.joined else ():
            losses.append(self.joined * self._one(one, labels, taught, shares_N))
        return torch.stack(losses).sum()

    def _one(self, logits: Tensor, labels: Tensor, taught: Tensor | None, shares_N: Tensor) -> Tensor:
        """Of one answer, from labels and teacher."""
        by_label = cross_entropy(logits, labels, ignore_index=UNLABELLED, reduction="none")
        loss = (1 - self.alpha) * by_label.mean()
        return loss if taught is None else loss + (shares_N * self.distances(logits, taught)).mean()

    def distance(self, logits: Tensor, target: Tensor) -> Tensor:
        """T^2 KL(softmax(target / T) || softmax(logits / T)), mean over the batch."""
        return self.distances(logits, target).mean()

    def distances(self, logits: Tensor, target: Tensor) -> Tensor:
        """The same of each image, (N,)."""
        t = self.temperature
        log_p, log_q = (target / t).log_softmax(1), (logits / t).log_softmax(1)
        return t * t * kl_div(log_q, log_p, log_target=True, reduction="none").sum(1)

    def _teach(self, images: Tensor) -> Tensor | None:
        if self.teacher is None or self.alpha == 0:
            return None
        with torch.no_grad():
            return self.teacher(images_for(self.teacher, images)).float()
