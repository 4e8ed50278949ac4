"""Rewards and policy gradients worked out by hand, and that costs push where they should."""

import math

import pytest
import torch
from digits import SHAPE
from gated_digits import UNITS, gated_digits, indifferent, set_scores
from torch import Tensor

from dynamize.training import policy
from dynamize.training.policy import Action, FollowBest, HybridLoss, Recorder, deciding, relative_costs

IMAGES = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(64) % 10


def no_answers(logits: object, images: Tensor, labels: Tensor) -> Tensor:
    return torch.zeros(())


def test_costs_are_shares_of_the_original_network() -> None:
    """Each block has two convolutions of 4*4 pixels * 12 * 12 * 9, the stem 4*4 * 12 * 9, the classifier 120."""
    block, whole = 2 * 16 * 144 * 9, 3 * 2 * 16 * 144 * 9 + 16 * 12 * 9 + 120
    found = relative_costs(gated_digits())
    assert list(found) == list(UNITS)
    for costs in found.values():
        assert costs.tolist() == pytest.approx([0.0, block / whole])


def test_returns_by_hand() -> None:
    costs = {"second": torch.tensor([0.1, 0.2, 0.4]), "first": torch.tensor([0.0, 0.5])}
    features, scores = IMAGES[:2], torch.zeros(2, 3)
    paths = {"first": torch.tensor([1, 0]), "second": torch.tensor([2, 0])}
    taken = {name: Action(features, scores, each) for name, each in paths.items()}
    executed = policy.executed_costs(taken, costs)
    assert executed.tolist() == [pytest.approx([0.5, 0.4]), pytest.approx([0.0, 0.1])]
    found = policy.returns(torch.tensor([1.0, 3.0]), executed, weight=2.0)
    assert found.tolist() == [pytest.approx([-1 - 1.8, -1 - 0.8]), pytest.approx([-3 - 0.2, -3 - 0.2])]


def test_cross_entropy_is_the_mean_over_exits() -> None:
    first, second = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
    found = policy.mean_cross_entropy([first, second], torch.tensor([0]))
    assert found.tolist() == pytest.approx([(math.log(2) + math.log(4 / 3)) / 2])


def test_the_gradient_raises_paths_of_positive_advantage() -> None:
    """d/ds of -A log softmax(s)[a] is A (softmax(s) - onehot(a)), a mean over images."""
    scores = torch.zeros(2, 2, requires_grad=True)
    taken = {"one": Action(IMAGES[:2], scores, torch.tensor([1, 1]))}
    policy.policy_loss(taken, torch.tensor([[3.0], [-1.0]])).backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [[0.75, -0.75], [-0.25, 0.25]]


def test_samples_follow_the_softmax() -> None:
    scores = torch.tensor([0.1, 0.2, 0.7]).log().expand(20_000, 3)
    shares = torch.bincount(policy.sample(scores), minlength=3) / 20_000
    assert shares.tolist() == pytest.approx([0.1, 0.2, 0.7], abs=0.015)


def test_recorded_decisions_are_those_that_the_network_followed() -> None:
    network = gated_digits().train()
    recorder = Recorder(lambda scores: torch.zeros(len(scores), dtype=torch.int64))
    with deciding(network, recorder):
        output = network(IMAGES)
    assert list(output.shares) == list(UNITS)
    assert all(shares.tolist() == [[1.0, 0.0]] * 64 for shares in output.shares.values())
    taken = recorder.take()
    assert list(taken) == list(UNITS)
    assert all(int(one.paths.sum()) == 0 for one in taken.values())
    first, _, last = taken.values()
    assert torch.equal(first.features, last.features)  # skipped blocks hand on what they were given
    assert recorder.take() == {}


def test_the_policy_before_comes_back_also_after_an_error() -> None:
    network = gated_digits()
    own, best = network.choose, FollowBest()
    with deciding(network, best):
        with pytest.raises(RuntimeError), deciding(network, Recorder(policy.sample)):
            raise RuntimeError
        assert network.choose is best
    assert network.choose is own


def hybrid_gradient(cost: float) -> list[Tensor]:
    """Of the biases of all gates, under decisions that are sampled half and half and do not change the loss."""
    network = indifferent(gated_digits()).eval()
    costs = relative_costs(network)
    set_scores(network, [[0.0, 0.0]] * 3)
    loss = HybridLoss(network, no_answers, costs, cost=cost, rl_weight=1.0)
    with deciding(network.train(), loss.recorder):
        loss(network(IMAGES), IMAGES, LABELS).backward()
    return [unit.gate.linear.bias.grad for unit in network.changing]


def test_a_cost_pushes_execution_down_where_the_loss_does_not_care() -> None:
    for skip, run in hybrid_gradient(cost=1.0):
        assert run > 0.01  # a step against the gradient lowers the score of running
        assert skip == pytest.approx(-run)
    assert all(float(gradient.abs().max()) < 1e-6 for gradient in hybrid_gradient(cost=0.0))


def test_decisions_as_good_as_the_best_ones_have_no_advantage() -> None:
    network = gated_digits().eval()
    costs = relative_costs(network)
    set_scores(network, [[0.0, 50.0], [50.0, 0.0], [0.0, 50.0]])  # sampled with certainty
    loss = HybridLoss(network, no_answers, costs, cost=1.0, rl_weight=1.0)
    with deciding(network.train(), loss.recorder):
        found = loss(network(IMAGES), IMAGES, LABELS)
    assert found.item() == pytest.approx(0.0, abs=1e-6)


def test_the_loss_of_the_answers_reaches_the_network_and_the_reward_the_gates() -> None:
    network = gated_digits().eval()
    loss = HybridLoss(
        network,
        lambda output, images, labels: output.logits[-1].square().mean(),
        relative_costs(network),
        cost=0.0,
        rl_weight=1e-9,
    )
    with deciding(network.train(), loss.recorder):
        loss(network(IMAGES), IMAGES, LABELS).backward()
    gates = {id(p) for unit in network.changing for p in unit.gate.parameters()}
    size = {True: 0.0, False: 0.0}
    for parameter in network.parameters():
        assert parameter.grad is not None
        size[id(parameter) in gates] += float(parameter.grad.abs().sum())
    assert size[False] > 0.1
    assert size[True] < 1e-6
