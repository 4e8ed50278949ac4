"""Decisions as actions: taken by a policy instead of the gates' own sampling, and trained by their reward.

SkipNet's hybrid reinforcement learning with the self-critical baseline of BlockDrop.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from dynamize.arguments import class_numbers
from dynamize.graph.macs import count_macs
from dynamize.graph.tracer import blank
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Choose
from dynamize.training.objectives import Output, exit_logits


class Action(NamedTuple):
    """What was done at one decision with a batch: the features that reached it (N, C, H, W), its scores (N, P) and the
    option of each image (N,)."""

    features: Tensor
    scores: Tensor
    paths: Tensor


class Recorder(Choose):
    """Takes decisions and keeps them.

    Args:
        decide: scores (N, P) -> option of each image (N,).
    """

    def __init__(self, decide: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.decide = decide
        self._taken: dict[str, Action] = {}

    def __call__(self, name: str, features: Tensor, scores_NP: Tensor) -> Tensor:
        paths_N = self.decide(scores_NP.detach())
        self._taken[name] = Action(features, scores_NP, paths_N)
        return as_shares(paths_N, scores_NP)

    def take(self) -> dict[str, Action]:
        """By decision, in order of execution, what was done in the last forward; it is forgotten then."""
        taken, self._taken = self._taken, {}
        return taken


class FollowBest(Choose):
    """The decisions of eval mode, without a gradient."""

    def __call__(self, name: str, features: Tensor, scores_NP: Tensor) -> Tensor:
        return as_shares(best(scores_NP), scores_NP)


@contextmanager
def deciding(network: DynamicNetwork, choose: Choose) -> Iterator[None]:
    """Let ``choose`` take all decisions of ``network`` in train mode."""
    before, network.choose = network.choose, choose
    try:
        yield
    finally:
        network.choose = before


def as_shares(paths_N: Tensor, scores_NP: Tensor) -> Tensor:
    """One-hot rows (N, P), without a gradient."""
    return functional.one_hot(paths_N, scores_NP.shape[1]).float()


def sample(scores_NP: Tensor) -> Tensor:
    """A path for each image from the softmax of its scores, (N,), by the Gumbel trick."""
    waits_NP = torch.empty_like(scores_NP, dtype=torch.float32).exponential_()
    return (scores_NP - waits_NP.log()).argmax(1)


def best(scores_NP: Tensor) -> Tensor:
    """The path of the highest score for each image, (N,)."""
    return scores_NP.argmax(1)


def relative_costs(network: DynamicNetwork) -> dict[str, Tensor]:
    """By decision, the MACs of its options (P,) as a share of the original network's. ``network`` is in eval mode."""
    whole = count_macs(network.plain, blank(network.plain, 1, *network.input_shape))
    changing = (decision for decision in network.decisions() if decision.effect == "changes")
    return {one.name: torch.tensor(one.macs, dtype=torch.float32) / whole for one in changing}


def executed_costs(taken: Mapping[str, Action], costs: Mapping[str, Tensor]) -> Tensor:
    """Cost of each decision, (N, U), from what was done and the costs of its options, (P,)."""
    return torch.stack([costs[name].to(one.paths.device)[one.paths] for name, one in taken.items()], 1)


def mean_cross_entropy(output: Output, labels: Tensor) -> Tensor:
    """Of each image, the mean over exits, (N,)."""
    logits = exit_logits(output)
    truth = class_numbers(labels, logits[-1].shape[1], "the train images")
    each = [functional.cross_entropy(one.float(), truth, reduction="none") for one in logits]
    return torch.stack(each).mean(0)


def returns(loss_N: Tensor, costs_NU: Tensor, weight: float) -> Tensor:
    """What follows from each decision, (N, U): -loss - weight x the cost of this decision and of all later ones
    (Wang et al. 2018, SkipNet, eq. 5, undiscounted)."""
    later_NU = costs_NU.flip(1).cumsum(1).flip(1)
    return -loss_N[:, None] - weight * later_NU


class HybridLoss:
    """The loss of the answers, plus a policy gradient of sampled decisions (Wang et al. 2018, SkipNet, sec. 3.3).

    The baseline of a decision is what the best-scored decisions on the same images return from that gate on, found in
    a second forward (Wu et al. 2018, BlockDrop, eq. 6). The network trains under ``deciding(network, loss.recorder)``.

    Args:
        network: with gates.
        answers: loss of (logits, images, labels) that is propagated back through the network.
        costs: by decision, the relative cost of its options, (P,).
        cost: weight of the cost against a cross entropy of 1 (SkipNet's alpha).
        rl_weight: weight of the policy gradient.
    """

    def __init__(
        self, network: DynamicNetwork, answers: Any, costs: Mapping[str, Tensor], *, cost: float, rl_weight: float
    ) -> None:
        self.network, self.answers, self.costs = network, answers, costs
        self.cost, self.rl_weight = cost, rl_weight
        self.recorder = Recorder(sample)

    def __call__(self, output: Output, images: Tensor, labels: Tensor) -> Tensor:
        taken = self.recorder.take()
        greedy = Recorder(best)
        with torch.no_grad(), deciding(self.network, greedy):
            baseline_NU = self._returns(self.network.all_exits(images), labels, greedy.take())
            advantage_NU = self._returns(output, labels, taken) - baseline_NU
        loss: Tensor = self.answers(output, images, labels) + self.rl_weight * policy_loss(taken, advantage_NU)
        return loss

    def _returns(self, output: Output, labels: Tensor, taken: Mapping[str, Action]) -> Tensor:
        return returns(mean_cross_entropy(output, labels), executed_costs(taken, self.costs), self.cost)


def policy_loss(taken: Mapping[str, Action], advantage_NU: Tensor) -> Tensor:
    """What has the policy gradient as its gradient (Williams 1992, REINFORCE): minus the log-probabilities of the
    decisions, weighted by their advantage, summed over units, mean over images."""
    chosen = [one.scores.float().log_softmax(1).gather(1, one.paths[:, None]) for one in taken.values()]
    return -(advantage_NU * torch.cat(chosen, 1)).sum(1).mean()
