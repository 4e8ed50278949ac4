"""Decisions as actions: taken by a policy instead of the gates' own sampling, and trained by their reward.

SkipNet's hybrid reinforcement learning with the self-critical baseline of BlockDrop.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from dynamize.graph.macs import count_macs
from dynamize.graph.trace import blank
from dynamize.nn.gated import GatedSegment, Policy
from dynamize.nn.network import DynamicNetwork


class Decision(NamedTuple):
    """What one unit did with a batch: the features that reached it (N, C, H, W), its gate's scores (N, P) and the path
    of each image (N,)."""

    features: Tensor
    scores: Tensor
    paths: Tensor


class Recorder:
    """A policy that keeps its decisions.

    Args:
        decide: scores (N, P) -> path of each image (N,).
    """

    def __init__(self, decide: Callable[[Tensor], Tensor]) -> None:
        self.decide = decide
        self._taken: list[Decision] = []

    def __call__(self, features_NCHW: Tensor, scores_NP: Tensor) -> Tensor:
        paths_N = self.decide(scores_NP.detach())
        self._taken.append(Decision(features_NCHW, scores_NP, paths_N))
        return as_shares(paths_N, scores_NP)

    def take(self) -> list[Decision]:
        """The decisions since the last call, in order of execution."""
        taken, self._taken = self._taken, []
        return taken


@contextmanager
def deciding(network: DynamicNetwork, policy: Policy) -> Iterator[None]:
    """Let ``policy`` take all decisions of ``network`` in train mode."""
    segments = [segment for segment in network.segments if isinstance(segment, GatedSegment)]
    before = [segment.policy for segment in segments]
    for segment in segments:
        segment.policy = policy
    try:
        yield
    finally:
        for segment, policy_before in zip(segments, before, strict=True):
            segment.policy = policy_before


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


def follow_best(features_NCHW: Tensor, scores_NP: Tensor) -> Tensor:
    """The policy of eval mode."""
    return as_shares(best(scores_NP), scores_NP)


def relative_costs(network: DynamicNetwork) -> list[Tensor]:
    """For each unit the MACs of its paths (P,) as a share of the original network's. ``network`` is in eval mode."""
    whole = count_macs(network.plain, blank(network.plain, 1, *network.input_shape))
    return [torch.tensor(unit.path_macs, dtype=torch.float32) / whole for unit in network.units]


def executed_costs(paths: Sequence[Tensor], costs: Sequence[Tensor]) -> Tensor:
    """Cost of each decision, (N, U), from the paths taken through each unit, (N,), and the costs of its paths, (P,)."""
    return torch.stack([each.to(path.device)[path] for path, each in zip(paths, costs, strict=True)], 1)


def mean_cross_entropy(logits: Tensor | Sequence[Tensor], labels: Tensor) -> Tensor:
    """Of each image, the mean over exits, (N,)."""
    exits = [logits] if isinstance(logits, Tensor) else logits
    each = [functional.cross_entropy(one.float(), labels, reduction="none") for one in exits]
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
        costs: for each unit the relative cost of its paths, (P,).
        cost: weight of the cost against a cross entropy of 1 (SkipNet's alpha).
        rl_weight: weight of the policy gradient.
    """

    def __init__(
        self, network: DynamicNetwork, answers: Any, costs: Sequence[Tensor], *, cost: float, rl_weight: float
    ) -> None:
        self.network, self.answers, self.costs = network, answers, costs
        self.cost, self.rl_weight = cost, rl_weight
        self.recorder = Recorder(sample)

    def __call__(self, logits: Tensor | Sequence[Tensor], images: Tensor, labels: Tensor) -> Tensor:
        taken = self.recorder.take()
        greedy = Recorder(best)
        with torch.no_grad(), deciding(self.network, greedy):
            baseline_NU = self._returns(self.network.all_exits(images), labels, greedy.take())
            advantage_NU = self._returns(logits, labels, taken) - baseline_NU
        loss: Tensor = self.answers(logits, images, labels) + self.rl_weight * policy_loss(taken, advantage_NU)
        return loss

    def _returns(self, logits: Tensor | Sequence[Tensor], labels: Tensor, taken: Sequence[Decision]) -> Tensor:
        costs_NU = executed_costs([one.paths for one in taken], self.costs)
        return returns(mean_cross_entropy(logits, labels), costs_NU, self.cost)


def policy_loss(taken: Sequence[Decision], advantage_NU: Tensor) -> Tensor:
    """What has the policy gradient as its gradient (Williams 1992, REINFORCE): minus the log-probabilities of the
    decisions, weighted by their advantage, summed over units, mean over images."""
    chosen = [one.scores.float().log_softmax(1).gather(1, one.paths[:, None]) for one in taken]
    return -(advantage_NU * torch.cat(chosen, 1)).sum(1).mean()
