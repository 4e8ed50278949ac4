"""Gates start open, choose by score and cost, and let gradients through a hard decision."""

import pytest
import torch

from dynamize.nn.gates import (
    ALL_OPEN,
    OPEN,
    ConvGate,
    Gate,
    LinearGate,
    RecurrentGate,
    State,
    choose,
    make_memory,
    pool,
    sample_paths,
)

KINDS = ["linear", "conv", "recurrent"]


def make(kind: str, channels: int = 12, paths: int = 3) -> Gate:
    if kind == "recurrent":
        return RecurrentGate(channels, paths, make_memory()).eval()
    return (LinearGate if kind == "linear" else ConvGate)(channels, paths).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_gate_prefers_the_last_path_whatever_it_sees(kind: str) -> None:
    gate = make(kind)
    for features in (torch.randn(5, 12, 6, 6), 1e3 * torch.randn(5, 12, 6, 6), torch.zeros(5, 12, 1, 1)):
        scores, _ = gate.decide(gate(features))
        assert torch.equal(scores, torch.tensor([0.0, 0.0, OPEN]).expand(5, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_each_image_is_scored_by_itself(kind: str) -> None:
    gate, features = make(kind), torch.randn(6, 12, 5, 7)
    torch.nn.init.normal_(gate.linear.weight)
    whole, _ = gate.decide(gate(features))
    assert len(whole.unique(dim=0)) == 6
    for n in range(6):
        alone, _ = gate.decide(gate(features[n : n + 1]))
        assert torch.allclose(alone, whole[n : n + 1], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_in_double_precision_has_gates_in_double_precision(kind: str) -> None:
    gate = make(kind).double()
    scores, _ = gate.decide(gate(torch.randn(2, 12, 4, 4, dtype=torch.float64)))
    assert scores.dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_last_layer_although_it_starts_at_zero(kind: str) -> None:
    gate = make(kind)
    shares = sample_paths(gate.decide(gate(torch.randn(4, 12, 4, 4)))[0], noise=0.0)
    (shares @ torch.tensor([0.0, 1.0, 2.0])).sum().backward()
    layer = gate.linear
    assert layer.bias.grad is not None
    assert layer.weight.grad is not None
    assert layer.bias.grad.abs().min() > 0
    assert layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_one_image_alone_is_trained_with_the_running_statistics(kind: str) -> None:
    """Of a 2 x 2 map the conv gate's own convolution leaves one value for each channel, too."""
    gate, image = make(kind), torch.randn(1, 12, 2, 2)
    torch.nn.init.normal_(gate.linear.weight)
    gate.norm.running_mean.uniform_(-1, 1)
    gate.norm.running_var.uniform_(0.5, 2)
    wanted, _ = gate.decide(gate(image))
    held = {name: value.clone() for name, value in gate.norm.state_dict().items()}
    gate.train()
    found, _ = gate.decide(gate(image))
    assert torch.equal(found, wanted)
    assert all(torch.equal(value, held[name]) for name, value in gate.norm.state_dict().items())
    found.sum().backward()
    two, _ = gate.decide(gate(torch.cat([image, 2 * image])))
    assert not torch.allclose(two[:1], wanted)
    assert gate.norm.num_batches_tracked == 1


def test_only_gates_that_read_channel_means_say_so() -> None:
    features = torch.randn(3, 12, 4, 6)
    means = features.mean((2, 3))
    assert torch.allclose(pool(features), means, atol=1e-6)
    for kind in KINDS:
        gate = make(kind)
        described = gate(features)
        assert gate.pooled == (described.shape == means.shape and torch.allclose(described, means, atol=1e-6))


def test_a_recurrent_gate_remembers_and_shares_its_memory() -> None:
    memory = make_memory()
    first, second = RecurrentGate(8, 2, memory).eval(), RecurrentGate(8, 2, memory).eval()
    torch.nn.init.normal_(second.linear.weight)
    described = torch.randn(4, 8)
    _, state = first.decide(described)
    assert not torch.allclose(second.decide(described, state)[0], second.decide(described)[0])
    assert first.memory is second.memory is memory
    assert not first.alone
    for gate in (LinearGate(8, 2), ConvGate(8, 2)):
        assert gate.memory is None
        assert gate.alone


def test_other_gates_hand_the_state_on() -> None:
    state = (torch.zeros(2, 1), torch.ones(2, 1))
    for kind in ("linear", "conv"):
        gate = make(kind)
        assert gate.decide(gate(torch.randn(2, 12, 4, 4)), state)[1] is state


def test_decisions_without_noise_are_the_best_paths_with_the_gradient_of_a_softmax() -> None:
    scores, weights = torch.randn(50, 3, requires_grad=True), torch.randn(50, 3)
    shares = sample_paths(scores, noise=0.0)
    wanted = torch.nn.functional.one_hot(scores.argmax(1), 3).float()
    assert torch.equal(shares, wanted)  # exactly, so that a network with open gates trains as the original did
    (found,) = torch.autograd.grad((shares * weights).sum(), scores)
    (soft,) = torch.autograd.grad((scores.softmax(1) * weights).sum(), scores)
    assert torch.allclose(found, soft, atol=1e-6)


def test_decisions_with_noise_are_draws_from_the_softmax() -> None:
    scores = torch.tensor([0.0, 1.0, 2.0]).repeat(4000, 1).requires_grad_()
    shares = sample_paths(scores, noise=1.0)
    assert torch.allclose(shares.max(1).values, torch.ones(4000))
    assert torch.allclose(shares.sum(1), torch.ones(4000))
    assert torch.allclose(shares.mean(0), scores[0].softmax(0), atol=0.03)
    quieter = sample_paths(scores, noise=0.5).mean(0)
    assert torch.allclose(quieter, (scores[0] / 0.5).softmax(0), atol=0.03)
    shares[:, 0].sum().backward()
    assert scores.grad is not None
    assert scores.grad.abs().sum() > 0


SCORES = torch.tensor([[1.0, 0.0, 0.5], [0.0, 2.0, 1.9], [-1.0, 0.0, 3.0]])
COSTS = torch.tensor([0.0, 0.5, 1.0])


@pytest.mark.parametrize(
    ("offset", "paths"),
    [
        (0.0, [0, 1, 2]),
        (0.4, [0, 2, 2]),  # 1.0 against 0.2 and 0.9; 0.0 against 2.2 and 2.3
        (0.6, [2, 2, 2]),  # 1.0 against 0.3 and 1.1
        (-3.5, [0, 1, 2]),  # 0.0 against 0.25 and -1.6; -1.0 against -1.75 and -0.5
        (ALL_OPEN, [2, 2, 2]),
        (-ALL_OPEN, [0, 0, 0]),
    ],
)
def test_the_offset_counts_by_relative_cost(offset: float, paths: list[int]) -> None:
    assert choose(SCORES, COSTS, offset).tolist() == paths


def test_no_score_outweighs_all_open() -> None:
    scores = torch.tensor([[1e4, -1e4], [-1e4, 1e4]])
    assert choose(scores, torch.tensor([0.3, 1.0]), ALL_OPEN).tolist() == [1, 1]
    assert choose(scores, torch.tensor([0.3, 1.0]), -ALL_OPEN).tolist() == [0, 0]


class Doubtful(LinearGate):
    def decide(self, described_ND: torch.Tensor, state: State = None) -> tuple[torch.Tensor, State]:
        return -super().decide(described_ND)[0], state


class Backwards:
    def score(self, described_ND: torch.Tensor, carried: dict[str, torch.Tensor], fresh: bool) -> torch.Tensor:
        return -super().score(described_ND, carried, fresh)  # type: ignore[misc, no-any-return]


class BackwardsGate(Backwards, RecurrentGate):
    pass


class OnlyNamed(ConvGate):
    pass


def test_a_gate_that_decides_otherwise_does_not_say_that_it_decides_like_its_base() -> None:
    for gate in (Doubtful(12, 3), BackwardsGate(12, 3, make_memory())):
        assert gate.scorer(fresh=True) is None
        assert gate.quick_paths(torch.ones(3)) is None
    assert isinstance(OnlyNamed(12, 3).scorer(fresh=True), torch.nn.Linear)
