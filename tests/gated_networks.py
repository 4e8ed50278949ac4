"""Networks whose gates disagree about images, and what they have to answer, worked out densely."""

from dataclasses import dataclass
from typing import Any

import torch
from built import built_once
from networks import SmallResNet, excite_heads, exit_scores, set_thresholds, small_resnet, thresholds
from torch import Tensor, nn
from torch.nn import functional

from dynamize.conversion import convert
from dynamize.nn.exits import extend
from dynamize.nn.network import DynamicNetwork
from dynamize.transforms import Exits, SkipGates

GATES: list[dict[str, Any]] = [
    {"gate": "linear", "keep_first": False},
    {"gate": "linear", "group": 2, "keep_first": False},
    {"gate": "conv", "keep_first": False},
    {"gate": "recurrent"},
]
CLEAR = 1e-3  # scores this far apart are not turned round by rounding


def images(count: int) -> Tensor:
    """As many as asked for, always the same (N, C, H, W)."""
    return torch.randn(count, *SmallResNet.shape, generator=torch.Generator().manual_seed(count))


@built_once
def gated_resnet(exits: dict[str, Any] | None = None, seed: int = 0, **fields: Any) -> DynamicNetwork:
    """The small ResNet with gates that split random images; ``fields`` are those of `SkipGates`."""
    steps: list[Any] = [SkipGates.model_validate({"group": 1} | fields)]
    if exits is not None:
        steps.insert(0, Exits.model_validate({"at": ["layer1", "layer2"], "head": "conv", "share": 1.0} | exits))
    network = convert(small_resnet(seed), steps, SmallResNet.shape)
    excite_heads(network)
    return scatter(network, torch.randn(64, *SmallResNet.shape, generator=torch.Generator().manual_seed(99)))


def scatter(network: DynamicNetwork, images: Tensor) -> DynamicNetwork:
    """Random weights for all gates, under which each sends about half of ``images`` each way."""
    features, state = images, None
    with torch.no_grad():
        for piece in network.row:
            if piece.effect is None and not piece.answers:
                features = piece.module(features)
            if piece.effect == "changes":
                gate, state = piece.gate, None if piece.fresh else state
                described = gate(features)
                if isinstance(gate.norm, nn.BatchNorm1d):
                    gate.norm.running_mean.copy_(described.mean(0))
                    gate.norm.running_var.copy_(described.var(0))
                last = gate.linear
                last.weight.normal_(0, 1)
                last.bias.zero_()
                scores, _ = gate.decide(described, state)
                last.weight.mul_(5 / (scores[:, -1] - scores[:, 0]).std())
                scores, _ = gate.decide(described, state)
                ranked = (scores[:, -1] - scores[:, 0]).sort().values
                last.bias[0] = (ranked[len(ranked) // 2 - 1] + ranked[len(ranked) // 2]) / 2
                scores, state = gate.decide(described, state)
                features = piece.blend(features, functional.one_hot(scores.argmax(1), scores.shape[1]).float())
    return network


@dataclass
class Masked:
    """What every exit says and which way each image takes, with everything computed and masks in the place of routing.

    ``margins`` is how far apart the scores of the paths lie at the closest decision of each image.
    """

    logits_KNC: Tensor
    exits_N: Tensor
    choices_NU: Tensor
    margins_N: Tensor

    @property
    def answers_NC(self) -> Tensor:
        return self.logits_KNC[self.exits_N, torch.arange(len(self.exits_N))]

    @property
    def clear(self) -> Tensor:
        """(N,): images that rounding does not send another way."""
        return self.margins_N > CLEAR


def masked(network: DynamicNetwork, images: Tensor, forced_NU: Tensor | None = None) -> Masked:
    """All paths and all exits for all images, in eval mode; ``forced_NU`` in the place of the gates."""
    features, context, state = images, None, None
    logits: list[Tensor] = []
    choices: list[Tensor] = []
    owners: list[int] = []
    margins = torch.full((len(images),), float("inf"))
    with torch.no_grad():
        for piece in network.row:
            if piece.effect == "changes":
                scores, state = piece.gate.decide(piece.gate(features), None if piece.fresh else state)
                scores = scores + network.setting.offset * piece.path_costs
                choice = scores.argmax(1) if forced_NU is None else forced_NU[:, len(choices)]
                best = scores.topk(2).values
                margins = torch.minimum(margins, (best[:, 0] - best[:, 1]).float())
                shares = functional.one_hot(choice, scores.shape[1]).to(features)
                features = piece.blend(features.clone(), shares)
                choices.append(choice)
                owners.append(len(logits))
            elif piece.effect == "leaves":
                found, pooled = piece.head(features, context)
                context = extend(context, pooled) if piece.chained else None
                logits.append(found)
            else:
                features = features + piece.linear(context) if piece.answers else piece.module(features.clone())
    logits.append(features)
    exits_N = torch.full((len(images),), len(network.leaving))
    for k in reversed(range(len(network.leaving))):
        threshold = thresholds(network)[k]
        if threshold is not None:
            scores_N = exit_scores(network, logits[k], k)
            exits_N[scores_N >= threshold] = k
            margins = torch.minimum(margins, 100 * (scores_N - threshold).abs())
    choices_NU = torch.stack(choices, 1)
    for u, k in enumerate(owners):
        choices_NU[exits_N < k, u] = -1
    return Masked(torch.stack(logits), exits_N, choices_NU, margins)


def split_exits(network: DynamicNetwork, images: Tensor) -> None:
    """Thresholds at the medians of the exits' scores under the gates as they stand."""
    logits = masked(network, images).logits_KNC
    medians = [float(exit_scores(network, one, k).median()) + 1e-4 for k, one in enumerate(logits[:-1])]
    set_thresholds(network, medians)


def split_forced(network: DynamicNetwork, batch: Tensor, forced: Tensor) -> None:
    """Thresholds at which about half of the images leave at each exit, none of them borderline."""
    logits = masked(network, batch, forced).logits_KNC
    found = []
    for k in range(len(network.leaving)):
        ranked = exit_scores(network, logits[k], k).sort().values
        gap = len(ranked) // 2
        found.append(float(ranked[gap] + ranked[gap + 1]) / 2)
    set_thresholds(network, found)
