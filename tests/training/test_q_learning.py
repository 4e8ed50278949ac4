"""Q-learning of gates: targets by hand, exploration, the target copy, and what counts as a gate."""

import math
from typing import Any

import pytest
import torch
from digits import SHAPE, digit_splits
from gated_digits import UNITS, gated_digits, indifferent, set_scores
from torch import Tensor

from dynamize.nn.network import DynamicNetwork
from dynamize.training import q_learning
from dynamize.training.policy import deciding, relative_costs
from dynamize.training.q_learning import QLearning, all_but_gates, all_gates, copy_gates, follow, q_targets

IMAGES = torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(32) % 10
FIELDS: dict[str, Any] = {"penalty": 0.5, "loss_scale": 1.0, "discount": 0.9, "epsilon": (0.0, 0.0), "follow": 0.0}


def learning(network: DynamicNetwork, **fields: Any) -> QLearning:
    return QLearning(network, copy_gates(network), relative_costs(network.eval()), **(FIELDS | fields))


def test_targets_by_hand() -> None:
    rewards = torch.tensor([[-0.1, -0.2, -1.5]])
    found = q_targets(rewards, torch.tensor([[9.0, -1.0, -2.0]]), discount=0.9)
    assert found.tolist() == [pytest.approx([-0.1 - 0.9, -0.2 - 1.8, -1.5])]
    assert rewards.tolist() == [pytest.approx([-0.1, -0.2, -1.5])]


def test_the_loss_by_hand() -> None:
    """Gates and target say the same for every image; all logits are zero, so the cross entropy is log 10."""
    network = indifferent(gated_digits())
    set_scores(network, [[-0.5, -1.0], [-1.2, -1.1], [-0.7, -3.0]])
    learner = learning(network, loss_scale=0.4)
    set_scores(network, [[0.0, 0.1], [0.3, 0.2], [-0.1, 0.0]])  # best paths 1, 0, 1
    cost = float(relative_costs(network)[UNITS[0]][1])
    with deciding(network.train(), learner.recorder):
        loss = learner(network(IMAGES), IMAGES, LABELS)
    wanted = [-0.5 * cost + 0.9 * -1.1, 0.9 * -0.7, -0.5 * cost - 0.4 * math.log(10)]
    differences = [abs(value - target) for value, target in zip([0.1, 0.3, 0.0], wanted, strict=True)]
    huber = [d - 0.5 if d > 1 else d * d / 2 for d in differences]
    assert loss.item() == pytest.approx(sum(huber) / 3, rel=1e-5)


def test_the_value_of_a_path_goes_towards_its_target_and_no_other_moves() -> None:
    network = indifferent(gated_digits())
    set_scores(network, [[-1.0, -1.0]] * 3)
    learner = learning(network)
    set_scores(network, [[0.0, 0.1], [0.3, 0.2], [-0.1, 0.0]])
    with deciding(network.train(), learner.recorder):
        learner(network(IMAGES), IMAGES, LABELS).backward()
    gradients = [unit.gate.linear.bias.grad for unit in network.changing]
    for gradient, taken in zip(gradients, [1, 0, 1], strict=True):
        assert gradient[taken] > 0.01  # all are worth less than their scores say
        assert gradient[1 - taken] == 0
    assert all(parameter.grad is None for parameter in learner.target.parameters())


def test_learnt_values_prefer_the_cheap_path_where_the_loss_does_not_care() -> None:
    network = indifferent(gated_digits())
    learner = learning(network, epsilon=(1.0, 1.0), follow=0.2, discount=1.0, penalty=1.0, loss_scale=0.1)
    optimizer = torch.optim.SGD(all_gates(network).parameters(), lr=0.5)
    with deciding(network.train(), learner.recorder):
        for _ in range(80):
            learner.advance(0.0)
            optimizer.zero_grad()
            learner(network(IMAGES), IMAGES, LABELS).backward()
            optimizer.step()
    choices = network.eval().run(IMAGES).choices
    assert choices.shape == (len(IMAGES), 3)
    assert int(choices.abs().sum()) == 0


def test_epsilon_is_annealed_linearly() -> None:
    learner = learning(gated_digits(), epsilon=(1.0, 0.2))
    found = []
    for progress in (0.0, 0.25, 1.0):
        learner.advance(progress)
        found.append(learner.epsilon)
    assert found == pytest.approx([1.0, 0.8, 0.2])


@pytest.mark.parametrize(("epsilon", "share"), [(0.0, 0.0), (0.6, 0.4), (1.0, 2 / 3)])
def test_exploring_takes_any_path(epsilon: float, share: float) -> None:
    learner = learning(gated_digits(), epsilon=(epsilon, epsilon))
    paths = learner.decide(torch.tensor([0.0, 2.0, 1.0]).expand(20_000, 3))
    assert float((paths != 1).float().mean()) == pytest.approx(share, abs=0.015)


def test_the_target_follows_the_gates() -> None:
    network = gated_digits()
    set_scores(network, [[0.0, 0.0]] * 3)
    learner = learning(network, follow=0.25)
    set_scores(network, [[4.0, 8.0]] * 3)
    network.changing[0].gate.norm.running_mean.fill_(7.0)
    for wanted in ([1.0, 2.0], [1.75, 3.5]):
        learner.advance(0.0)
        assert learner.target[0].linear.bias.tolist() == wanted
    assert learner.target[0].norm.running_mean.tolist() == [7.0] * 12
    assert not any(parameter.requires_grad for parameter in learner.target.parameters())
    assert network.changing[0].gate.linear.bias.tolist() == [4.0, 8.0]


def test_a_copy_of_recurrent_gates_has_its_own_memory() -> None:
    network = gated_digits("recurrent")
    target = copy_gates(network)
    with torch.no_grad():
        network.changing[0].gate.linear.weight.normal_()
        target[0].linear.weight.copy_(network.changing[0].gate.linear.weight)
        network.changing[0].gate.memory.bias_hh.add_(5.0)
    described = torch.randn(4, 12)
    before = target[0].decide(described)[0]
    assert not torch.allclose(before, network.changing[0].gate.decide(described)[0])
    follow(target, all_gates(network), 1.0)
    assert torch.equal(target[0].decide(described)[0], network.changing[0].gate.eval().decide(described)[0])


@pytest.mark.parametrize("gate", ["linear", "conv", "recurrent"])
def test_the_target_sees_what_the_gates_saw(gate: str) -> None:
    """In eval mode of the gates, a fresh copy values each path as they do."""
    network = gated_digits(gate)
    learner = learning(network)
    all_gates(network.train()).eval()
    with deciding(network, learner.recorder):
        network(IMAGES)
    taken = learner.recorder.take()
    wanted = torch.stack([one.scores.amax(1) for one in taken.values()], 1)
    assert torch.equal(learner._best_values(taken), wanted)


@pytest.mark.parametrize("gate", ["linear", "recurrent"])
def test_every_parameter_belongs_to_the_gates_or_to_the_rest(gate: str) -> None:
    network = gated_digits(gate)
    gates = {id(p) for p in all_gates(network).parameters()}
    rest = {id(p) for module in all_but_gates(network) for p in module.parameters()}
    assert gates
    assert not gates & rest
    assert gates | rest == {id(p) for p in network.parameters()}


@pytest.mark.parametrize("gate", ["linear", "recurrent"])
def test_scaling_scores(gate: str) -> None:
    network = gated_digits(gate)
    factors = [2.0, 3.0, 4.0]

    def scores() -> list[Tensor]:
        described = torch.ones(1, 12)
        return [unit.gate.eval().decide(described)[0] for unit in network.changing]

    before = scores()
    q_learning.scale_scores(network, factors)
    for old, new, factor in zip(before, scores(), factors, strict=True):
        assert torch.allclose(new, factor * old)


def test_the_scale_makes_the_mean_loss_one() -> None:
    network = indifferent(gated_digits())
    found = q_learning.find_loss_scale(network, digit_splits(64).train, torch.device("cpu"), seed=0)
    assert found == pytest.approx(1 / math.log(10))
    assert network.setting.forced == {}
