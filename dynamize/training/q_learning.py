"""Gate scores as Q-values: what each path is worth, learnt from one step to the next unit.

The agent of Runtime Neural Pruning (Lin et al. 2017), with gates in the place of its recurrent network.
"""

import copy
from collections.abc import Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynamize.data import Images
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting
from dynamize.training.objectives import Output
from dynamize.training.policy import Action, Recorder, best, executed_costs, mean_cross_entropy

_BATCH, _BATCHES = 256, 8  # to find the scale of the loss


class QLearning:
    """One-step Q-learning over the units that an image passes (Lin et al. 2017, RNP, sec. 3.2 and 3.3).

    A path is rewarded with -``penalty`` times its relative cost, the last one also with -``loss_scale`` times the cross
    entropy of the image. The network trains under ``deciding(network, learning.recorder)``.

    Args:
        network: with gates, of which ``target`` is a copy (:func:`copy_gates`) that follows them slowly.
        costs: by decision, the relative cost of its options, (P,).
        epsilon: probability of a random path at the beginning and at the end, linear between.
        follow: share of the way to the gates that ``target`` goes in each step.
    """

    def __init__(
        self,
        network: DynamicNetwork,
        target: nn.ModuleList,
        costs: Mapping[str, Tensor],
        *,
        penalty: float,
        loss_scale: float,
        discount: float,
        epsilon: tuple[float, float],
        follow: float,
    ) -> None:
        self.network, self.target, self.costs = network, target, costs
        self.penalty, self.loss_scale, self.discount = penalty, loss_scale, discount
        self.epsilons, self.epsilon, self.follow = epsilon, epsilon[0], follow
        self.recorder = Recorder(self.decide)

    def advance(self, progress: float) -> None:
        """Anneal epsilon and let the target follow."""
        first, last = self.epsilons
        self.epsilon = first + (last - first) * progress
        follow(self.target, all_gates(self.network), self.follow)

    def decide(self, scores_NP: Tensor) -> Tensor:
        """The best path of each image, (N,), or with probability epsilon any."""
        explores_N = torch.rand(len(scores_NP), device=scores_NP.device) < self.epsilon
        any_N = torch.randint(scores_NP.shape[1], explores_N.shape, device=scores_NP.device)
        return torch.where(explores_N, any_N, best(scores_NP))

    def __call__(self, output: Output, images: Tensor, labels: Tensor) -> Tensor:
        taken = self.recorder.take()
        with torch.no_grad():
            rewards_NU = -self.penalty * executed_costs(taken, self.costs)
            rewards_NU[:, -1] -= self.loss_scale * mean_cross_entropy(output, labels)
            wanted_NU = q_targets(rewards_NU, self._best_values(taken), self.discount)
        values = [one.scores.float().gather(1, one.paths[:, None]) for one in taken.values()]
        return functional.huber_loss(torch.cat(values, 1), wanted_NU)

    def _best_values(self, taken: Mapping[str, Action]) -> Tensor:
        """The value of the best option of each decision as the target sees it, (N, U)."""
        carried: dict[str, Tensor] = {}
        found = []
        for unit, gate in zip(self.network.changing, self.target, strict=True):
            scores = gate.score(gate(taken[unit.name].features), carried, unit.fresh)  # type: ignore[operator]
            found.append(scores.float().amax(1))
        return torch.stack(found, 1)


def q_targets(rewards_NU: Tensor, best_values_NU: Tensor, discount: float) -> Tensor:
    """What each decision should be worth, (N, U): its reward and, but for the last one, the discounted value of the
    best path in the next unit."""
    wanted_NU = rewards_NU.clone()
    wanted_NU[:, :-1] += discount * best_values_NU[:, 1:]
    return wanted_NU


def all_gates(network: DynamicNetwork) -> nn.ModuleList:
    """The gates in order of execution."""
    return nn.ModuleList([unit.gate for unit in network.changing])


def all_but_gates(network: DynamicNetwork) -> list[nn.Module]:
    """Modules that hold everything else."""
    own = [child for unit in network.changing for child in unit.children() if child is not unit.gate]
    return [network.nets, *(piece for piece in network.row if piece.trains_alone), *own]


def copy_gates(network: DynamicNetwork) -> nn.ModuleList:
    """Frozen copies of all gates, in eval mode."""
    return copy.deepcopy(all_gates(network)).requires_grad_(False).eval()


@torch.no_grad()
def follow(target: nn.Module, source: nn.Module, share: float) -> None:
    """Move the parameters of ``target`` this share of the way to those of ``source``; buffers are copied."""
    for slow, fast in zip(target.parameters(), source.parameters(), strict=True):
        slow.lerp_(fast, share)
    for copied, buffer in zip(target.buffers(), source.buffers(), strict=True):
        copied.copy_(buffer)


@torch.no_grad()
def scale_scores(network: DynamicNetwork, factors: Sequence[float]) -> None:
    """Multiply the scores of each unit's gate."""
    for unit, factor in zip(network.changing, factors, strict=True):
        for parameter in unit.gate.linear.parameters():
            parameter.mul_(factor)


def find_loss_scale(network: DynamicNetwork, images: Images, device: torch.device, seed: int) -> float:
    """The factor that makes the mean cross entropy one when paths are random, on the first images of a split."""
    network.to(device).eval()
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for batch, labels in islice(images.batches(_BATCH, device), _BATCHES):
        forced = {
            one.name: torch.randint(len(one.options), (len(labels),), generator=generator).to(device)
            for one in network.decisions()
            if one.effect == "changes"
        }
        with torch.no_grad():
            losses.append(mean_cross_entropy(network.all_exits(batch, Setting(forced=forced)), labels))
    return 1 / max(1e-6, float(torch.cat(losses).mean()))
