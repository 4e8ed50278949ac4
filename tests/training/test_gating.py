"""The budget of the gates: its numbers by hand, what it pushes, and that a training arrives at it."""

from typing import Any

import pytest
import torch
from gated_networks import gated_resnet
from networks import SmallResNet, small_resnet
from torch import Tensor, nn

from dynamize.conversion import apply, convert
from dynamize.data import DataSpec, Splits, load_data
from dynamize.errors import DynamizeError
from dynamize.graph.macs import count_macs
from dynamize.measure.accuracy import routed_answers
from dynamize.measure.costs import exit_costs
from dynamize.models import create
from dynamize.nn.executor import Routed
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Choose, Dense
from dynamize.training.gating import BudgetLoss, GatedLoss, Noise
from dynamize.training.objectives import MultiExitLoss
from dynamize.transform import Context
from dynamize.transforms import Distill, Exits, SkipGates

CPU = torch.device("cpu")
SHAPE = (1, 8, 8)
OPENED, CLOSED = [0.0, 1.0], [1.0, 0.0]


def loss_of(target: float = 0.5, noise: Noise = "falling") -> BudgetLoss:
    """Two units of 30 and of 10 to 40 in a network of 100 of which 30 always run."""
    return BudgetLoss(Choose(), target, {"first": [0.0, 30.0], "second": [10.0, 40.0]}, 30.0, 100.0, noise)


def shares_of(*shares: list[list[float]]) -> dict[str, Tensor]:
    return {name: torch.tensor(rows) for name, rows in zip(("first", "second"), shares, strict=True)}


@pytest.mark.parametrize(
    ("progress", "shares", "wanted"),
    [
        # mean cost 0.30 + 0.15 + 0.40 = 0.85 against 1; bounds 1 to 1: the first unit is 0.5 below
        (0.0, ([OPENED, CLOSED], [OPENED, OPENED]), 10 * (0.15**2 + 0.5**2 / 2)),
        (0.0, ([OPENED, OPENED], [OPENED, OPENED]), 0.0),
        # half-way down: 0.75; bounds 0.375 to 0.875: the second unit is 0.125 above
        (1 / 6, ([OPENED, CLOSED], [OPENED, OPENED]), 10 * (0.1**2 + 0.125**2 / 2)),
        # mean cost 0.30 + 0.15 + 0.10 = 0.55; the second unit costs 0.25 of itself, 0.125 below
        (1 / 6, ([OPENED, CLOSED], [CLOSED, CLOSED]), 10 * (0.2**2 + 0.125**2 / 2)),
        # from a third on the target is 0.5 and the bounds are 0 to 1
        (1 / 3, ([OPENED, CLOSED], [OPENED, OPENED]), 10 * 0.35**2),
        (1.0, ([OPENED, CLOSED], [OPENED, OPENED]), 10 * 0.35**2),
        (1.0, ([CLOSED, CLOSED], [CLOSED, CLOSED]), 10 * 0.1**2),
    ],
)
def test_by_hand(progress: float, shares: tuple, wanted: float) -> None:
    loss = loss_of()
    loss.advance(progress)
    assert float(loss(shares_of(*shares))) == pytest.approx(wanted, abs=1e-6)


def test_what_can_be_reached() -> None:
    assert loss_of().reachable == pytest.approx((0.4, 1.0))


def test_the_cost_is_not_rounded_under_autocast() -> None:
    loss = loss_of(target=0.43)
    shares = shares_of([OPENED, CLOSED, OPENED], [OPENED, CLOSED, CLOSED])
    loss.advance(1.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(shares)
    assert found.dtype == torch.float32
    assert float(found) == float(loss(shares))


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("falling", ((0.0, 1.0), (0.4, 0.5), (0.8, 0.0), (0.81, 0.0), (0.2, 0.75))),
        ("long", ((0.0, 1.0), (0.6, 1.0), (0.7, 0.5), (0.8, 0.0), (1.0, 0.0))),
    ],
)
def test_the_noise_of_decisions_falls_to_none_in_the_first_four_fifths(kind: Noise, wanted: tuple) -> None:
    loss = loss_of(noise=kind)
    for progress, noise in wanted:
        loss.advance(progress)
        assert loss.choose.noise == pytest.approx(noise)


def test_the_two_losses_are_added_and_the_clock_is_passed_on() -> None:
    budget = loss_of()
    loss = GatedLoss(lambda output, images, labels: output.logits[0].sum() + images.sum() + labels.sum(), budget)
    loss.advance(1.0)
    assert budget.progress == 1.0
    one = torch.ones(1)
    output = Dense([one], shares_of([OPENED, CLOSED], [OPENED, OPENED]))
    assert float(loss(output, 2 * one, 3 * one)) == pytest.approx(6 + 10 * 0.35**2, rel=1e-5)


def images(count: int) -> Tensor:
    return torch.randn(count, *SmallResNet.shape)


def budget_of(network: DynamicNetwork, target: float) -> BudgetLoss:
    return Distill(gate_budget=target)._budget(network, Context())


@pytest.mark.parametrize(("asked", "wanted"), [("auto", "long"), ("falling", "falling"), ("long", "long")])
def test_gates_that_skip_or_run_are_drawn_at_random_for_longer(asked: str, wanted: str) -> None:
    network = gated_resnet()
    budget = Distill(gate_budget=0.6, gate_noise=asked)._budget(network, Context())
    assert budget.noise == wanted
    assert budget.choose is network.choose


@pytest.mark.parametrize("exits", [None, {"head": "linear"}, {"head": "linear", "chain": True}])
@pytest.mark.fast("exits1")
def test_the_loss_counts_what_is_executed(exits: dict | None) -> None:
    """With all images going to the end: the mean cost that the loss sees is that of the choices, as counted."""
    network, batch = gated_resnet(exits, keep_first=False), images(8)
    budget = budget_of(network, 0.5)
    budget.advance(1.0)
    whole = count_macs(small_resnet(), batch[:1])
    found: list[Routed] = []
    with torch.no_grad():
        executed = count_macs(lambda: found.append(network.run(batch, everyone=True))) / 8 / whole
    taken = found[0].taken
    shares = {unit.name: nn.functional.one_hot(taken[unit.name], 2).float() for unit in network.changing}
    assert float(budget(shares)) == pytest.approx(10 * (executed - 0.5) ** 2, rel=1e-4)
    cheapest, dearest = budget.reachable
    assert cheapest < executed < dearest


@pytest.mark.parametrize("gate", ["linear", "conv", "recurrent"])
@pytest.mark.fast("linear", "recurrent")
def test_gradients_reach_every_gate_and_lead_towards_the_target(gate: str) -> None:
    """Above the target open paths lose score, below it they win; at the target nothing moves."""
    network = convert(small_resnet(), [SkipGates.model_validate({"gate": gate, "group": 1})], SmallResNet.shape)
    lasts = [unit.gate.linear for unit in network.changing]
    network.train()
    for opening, target, sign in ((3.0, 0.6, 1), (-3.0, 0.6, -1), (3.0, None, 0)):
        budget = budget_of(network, 0.6)
        if target is None:
            budget.target = budget.reachable[1]
        budget.advance(1.0)
        for last in lasts:
            nn.init.constant_(last.bias, 0.0)
            with torch.no_grad():
                last.bias[-1] = opening
        network.zero_grad()
        budget(network(images(8)).shares).backward()
        for last in lasts:
            assert last.bias.grad is not None
            assert last.bias.grad.sign().tolist() == ([-sign, sign] if sign else pytest.approx([0, 0], abs=1e-4))


def test_the_budget_alone_lowers_the_mean_cost() -> None:
    network = convert(small_resnet(), [SkipGates(gate="conv", group=1)], SmallResNet.shape)
    budget = budget_of(network, 0.6)
    gates = [p for unit in network.changing for p in unit.gate.parameters()]
    optimizer = torch.optim.SGD(gates, lr=0.02, momentum=0.9)
    network.train()
    costs = []
    for step in range(60):
        budget.advance(step / 60)
        shares = network(images(8)).shares
        optimizer.zero_grad()
        budget(shares).backward()
        optimizer.step()
        spent = [float((share.detach().mean(0) * budget.costs[name]).sum()) for name, share in shares.items()]
        assert len(spent) == len(budget.costs)
        costs.append(sum(spent) + budget.fixed)
    assert sum(costs[:10]) / 10 > 0.9
    assert sum(costs[-10:]) / 10 < 0.75


@pytest.fixture(scope="module")
def splits() -> Splits:
    spec = DataSpec(source="digits", augment="crop", normalize=((0.305,), (0.376,)), train_limit=640, test_limit=200)
    return load_data(spec, SHAPE, 10)


def digits_network(*steps: Any) -> DynamicNetwork:
    return convert(create("digits_resnet", pretrained=True).eval(), list(steps), SHAPE)


STEP = {"epochs": 8, "batch_size": 32, "lr": 0.2, "precision": "float32"}


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["linear", "recurrent"])
def test_a_training_arrives_at_the_budget(gate: str, splits: Splits) -> None:
    teacher = create("digits_resnet", pretrained=True).eval()
    network = digits_network(SkipGates.model_validate({"gate": gate, "group": 1}))
    tuned, _ = apply(network, Distill(**STEP, gate_budget=0.55), Context(data=splits, teacher=teacher))
    found, labels, _, routing = routed_answers(tuned, splits.test, CPU)
    executed = exit_costs(tuned).executed(routing.taken, routing.images).mean()
    assert abs(executed / count_macs(teacher, torch.zeros(1, *SHAPE)) - 0.55) < 0.15
    assert float((found == labels).float().mean()) > 0.85
    assert tuned.history[-1]["gate_budget"] == 0.55


def test_heads_alone_are_trained_with_the_gates_as_they_are(splits: Splits) -> None:
    network = digits_network(Exits(at=["layer1"], share=1.0, size=[8]), SkipGates(gate="recurrent", group=3))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    step = Distill.model_validate(STEP | {"epochs": 1, "train": "heads"})
    tuned, _ = apply(network, step, Context(data=splits))
    changed = {name for name, value in tuned.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("pieces.exit__1.head.") for name in changed)
    assert tuned.history[-1]["gate_budget"] is None


def test_without_a_budget_it_is_six_tenths_and_the_history_says_so(splits: Splits) -> None:
    network = digits_network(SkipGates(group=3))
    tuned, _ = apply(network, Distill.model_validate(STEP | {"epochs": 1}), Context(data=splits))
    assert tuned.history[-1]["gate_budget"] == 0.6


@pytest.mark.parametrize(
    ("steps", "fields", "message"),
    [
        ([Exits(at=["layer1"], share=1.0)], {"gate_budget": 0.5}, "gate_budget, but the network has no gates: put"),
        ([SkipGates(group=3)], {"gate_budget": 0.05}, r"gate_budget 0\.05 cannot be reached: with all gates closed"),
        ([SkipGates(group=3, keep=["layer1.1", "layer1.2"])], {}, r"gate_budget 0\.6 cannot be .* costs 0\.6\d\d of "),
        (
            [Exits(at=["layer1"], share=1.0), SkipGates(group=3)],
            {"gate_budget": 0.5, "train": "heads"},
            "gate_budget, but train: heads leaves the gates as they are: use train: all",
        ),
    ],
)
def test_refusals(steps: list, fields: dict, message: str, splits: Splits) -> None:
    if steps[0].pass_name == "skip_gates" and not fields:
        steps = [SkipGates(blocks=[["layer1.1", "layer1.2"]])]  # too little to skip
    with pytest.raises(DynamizeError, match=message):
        apply(digits_network(*steps), Distill.model_validate(STEP | fields), Context(data=splits))


def test_in_the_users_own_loop() -> None:
    network = gated_resnet({"head": "linear"}).train()
    loss = GatedLoss(MultiExitLoss(), budget_of(network, 0.5))
    loss.advance(0.5)
    batch, labels = images(8), torch.arange(8) % 7
    loss(network.train()(batch), batch, labels).backward()
    assert all(p.grad is not None for p in network.parameters())
