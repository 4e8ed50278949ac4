"""A network with gates and images small enough to be trained inside a test."""

import torch
from built import built_once
from digits import SHAPE
from networks import Residual, conv_block
from torch import Tensor, nn

from dynamize.conversion import convert
from dynamize.data import Splits
from dynamize.measure.accuracy import routed_answers
from dynamize.measure.costs import exit_costs
from dynamize.nn.network import DynamicNetwork
from dynamize.transforms import SkipGates

UNITS = ("block1", "block2", "block3")


class GatedDigitNet(nn.Module):
    """Three residual blocks of one size, each of which has a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_block(1, 12, 2)
        self.block1, self.block2, self.block3 = Residual(12, 12), Residual(12, 12), Residual(12, 12)
        self.linear = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.block3(self.block2(self.block1(self.stem(x)))).mean((2, 3)))


@built_once
def gated_digits(gate: str = "linear", seed: int = 0) -> DynamicNetwork:
    """Gates that run a block with probability 0.95, whatever they see."""
    torch.manual_seed(seed)
    gates = SkipGates.model_validate({"blocks": [[name] for name in UNITS], "gate": gate})
    return convert(GatedDigitNet().eval(), [gates], SHAPE)


def indifferent(network: DynamicNetwork) -> DynamicNetwork:
    """With a classifier that gives all classes the same logit, so that no decision changes the loss."""
    for name, parameter in network.named_parameters():
        if parameter.shape[0] == 10:
            assert name.startswith("nets.main.")
            nn.init.zeros_(parameter)
    return network


def set_scores(network: DynamicNetwork, scores: list[list[float]]) -> None:
    """Scores of each unit's gate for every image."""
    with torch.no_grad():
        for unit, wanted in zip(network.changing, scores, strict=True):
            unit.gate.linear.weight.zero_()
            unit.gate.linear.bias.copy_(torch.tensor(wanted))


def same(first: DynamicNetwork, second: DynamicNetwork) -> bool:
    """Whether two networks have the same weights, to the bit."""
    weights, others = first.state_dict(), second.state_dict()
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def accuracy_and_macs(network: DynamicNetwork, data: Splits) -> tuple[float, float]:
    """On the test images: the share of right answers and the mean of executed MACs."""
    answers, labels, _, routing = routed_answers(network, data.test, torch.device("cpu"))
    executed = exit_costs(network).executed(routing.taken, routing.images)
    return float((answers == labels).float().mean()), float(executed.mean())
