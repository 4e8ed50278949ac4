"""What gates are trained towards, beside the answers: a mean cost."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from dynamize.nn.piece import Choose, Dense

_WEIGHT = 10.0  # of the cost, against a cross entropy of 1 (DynConv; LAUDNet)
_ANNEALED = 1 / 3  # of the training, in which the target falls and the bounds widen
_QUIET = 0.8  # from here on decisions are those of eval mode (DynConv, sec. 3.2). Noise falls to none before: cut off
# at once, the mean cost jumps when gates that were open for half of the draws become open for all images or none

Noise = Literal["falling", "long"]
_FALLS_FROM: dict[Noise, float] = {"falling": 0.0, "long": 0.6}


class BudgetLoss:
    """The squared distance of the mean cost to a target, for networks with gates.

    With E the mean cost of a batch under its decisions, relative to the original network: (E - t)^2 plus, averaged over
    the units, max(0, r - u)^2 + max(0, l - r)^2 for each unit's relative cost r (Verelst & Tuytelaars 2020, DynConv,
    eq. 8 and 9). t falls from 1 to ``target`` in the first third of the training, as a pretrained network has to be led
    away from its open gates; meanwhile the bounds widen from t to [0, 1].

    Args:
        choose: how the network takes its decisions.
        target: mean cost as a share of the original network's, gates, heads and what always runs included.
        costs: by decision, the cost of its options (P,).
        fixed: cost of all that always runs.
        whole: cost of the original network.
        noise: falling: decisions are drawn at a temperature that falls from the first step on; long: they are drawn
            from the softmax of the scores for the first 60 % of the training, and it falls after that.
    """

    def __init__(
        self,
        choose: Choose,
        target: float,
        costs: Mapping[str, Sequence[float]],
        fixed: float,
        whole: float,
        noise: Noise = "falling",
    ) -> None:
        self.choose, self.target, self.noise = choose, target, noise
        self.costs = {name: torch.tensor(each, dtype=torch.float32) / whole for name, each in costs.items()}
        self.fixed = fixed / whole
        self.progress = 0.0

    @property
    def reachable(self) -> tuple[float, float]:
        """Relative mean cost with all gates closed and with all open."""
        cheapest = self.fixed + sum(float(costs.min()) for costs in self.costs.values())
        return cheapest, self.fixed + sum(float(costs[-1]) for costs in self.costs.values())

    def advance(self, progress: float) -> None:
        """Tell how much of the training is over, 0 to 1."""
        self.progress = progress
        start = _FALLS_FROM[self.noise]
        self.choose.noise = min(1.0, max(0.0, (_QUIET - progress) / (_QUIET - start)))

    def __call__(self, shares: Mapping[str, Tensor]) -> Tensor:
        """The loss of decisions, by name the shares (N, P) of their options: a scalar."""
        pairs = [(share, self.costs[name].to(share)) for name, share in shares.items()]
        spent = [(share.mean(0) * costs).sum() for share, costs in pairs]
        fall = min(1.0, self.progress / _ANNEALED)
        target = 1 - (1 - self.target) * fall
        tight = math.cos(math.pi / 2 * fall) ** 2
        low, high = target * tight, 1 - (1 - target) * tight
        rates = [one / costs[-1] for one, (_, costs) in zip(spent, pairs, strict=True)]
        outside = [torch.relu(rate - high) ** 2 + torch.relu(low - rate) ** 2 for rate in rates]
        mean = torch.stack(spent).sum() + self.fixed
        return _WEIGHT * ((mean - target) ** 2 + torch.stack(outside).mean())


class GatedLoss:
    """Another loss plus the budget of the gates, for ``loss(output, images, labels)`` in any loop."""

    def __init__(self, answers: Any, budget: BudgetLoss) -> None:
        self.answers, self.budget = answers, budget

    def advance(self, progress: float) -> None:
        self.budget.advance(progress)

    def __call__(self, output: Dense, images: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.answers(output, images, labels) + self.budget(output.shares)
        return loss
