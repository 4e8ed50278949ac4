"""Training with gates: every module runs once, open gates train as the original does, decisions carry gradients."""

import copy
from typing import Any

import pytest
import torch
from gated_networks import GATES, gated_resnet, images
from networks import close, conv_block, randomise_norms, set_offset
from torch import Tensor, nn
from torch.nn import functional

from dynamize.conversion import convert
from dynamize.models import create
from dynamize.nn.gates import ALL_OPEN
from dynamize.nn.network import DynamicNetwork, key_of
from dynamize.transforms import ChannelGates, SkipGates


@pytest.mark.parametrize("fields", GATES)
@pytest.mark.fast("fields0", "fields2")
def test_training_leaves_decisions_with_gradients_and_can_be_copied(fields: dict) -> None:
    network, batch = gated_resnet(**fields).train(), images(8)
    found = network(batch)
    found.logits[0].square().sum().backward()
    assert list(found.shares) == [unit.name for unit in network.changing]
    for shares in found.shares.values():
        assert shares.requires_grad
        assert torch.allclose(shares.detach().max(1).values, torch.ones(8))
    parameters = [p for unit in network.changing for p in unit.gate.parameters()]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)
    again = copy.deepcopy(network)  # nothing of the graph is left in the network: what has a history is not copied
    assert torch.equal(again.eval()(batch), network.eval()(batch))


def test_noise_is_for_training_only_and_can_be_switched_off() -> None:
    network, batch = gated_resnet(keep_first=False), images(16)
    with torch.no_grad():
        for unit in network.changing:
            unit.gate.linear.weight.zero_()
            unit.gate.linear.bias.zero_()
    assert torch.equal(network(batch), network(batch))
    network.train()
    drawn = []
    for noise in (1.0, 0.0):
        network.choose.noise = noise
        shares = network(batch).shares.values()
        drawn.append(torch.stack([one[:, 1] for one in shares]).detach().mean())
    assert 0.2 < drawn[0] < 0.8
    assert drawn[1] == 0


class Projected(nn.Module):
    """A projection with a batch norm and a table of its own, then a block that would overwrite what it is given."""

    shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.branch, self.shortcut = conv_block(8, 8), nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.register_buffer("table", torch.rand(8, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.branch(x) + self.shortcut(x) * self.table
        x = x.clone() + self.conv(functional.relu(x, inplace=True))
        return self.linear(x.mean((2, 3)))


def projected(noise: float = 0.0, **fields: Any) -> tuple[nn.Module, DynamicNetwork]:
    torch.manual_seed(0)
    network = randomise_norms(Projected()).eval()
    steps = [SkipGates.model_validate({"group": 1, "keep_first": False} | fields)]
    dynamic = convert(network, steps, Projected.shape)
    dynamic.choose.noise = noise
    return network, dynamic


def test_every_tensor_stands_once_in_the_state_dict() -> None:
    for dynamic in (gated_resnet(), projected()[1]):
        kept = dynamic.state_dict()
        assert len({value.data_ptr() for value in kept.values()}) == len(kept)
        original = dynamic.plain.state_dict()
        others = [name for name in kept if ".gate." not in name]
        assert others == [f"nets.main.{name}" for name in original]
        gates = [name for name in kept if ".gate." in name]
        assert all(
            any(name.startswith(f"pieces.{key_of(unit.name)}.gate.") for unit in dynamic.changing) for name in gates
        )
        assert gates


@pytest.mark.parametrize("gate", ["linear", "conv", "recurrent"])
def test_a_train_step_of_open_gates_is_that_of_the_original(gate: str) -> None:
    """Each batch norm moves once, and all gradients are the same."""
    network, dynamic = projected(gate=gate)
    batch = torch.randn(6, *Projected.shape)
    answers = [network.train()(batch), dynamic.train()(batch).logits[0]]
    assert torch.equal(*answers)
    for answer in answers:
        answer.square().sum().backward()
    found, wanted = dynamic.plain.state_dict(), network.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert wanted["shortcut.1.num_batches_tracked"] == 1
    gradients = dict(dynamic.plain.named_parameters())
    assert all(close(gradients[name].grad, value.grad) for name, value in network.named_parameters())


@pytest.mark.parametrize("gate", ["linear", "conv", "recurrent"])
def test_a_train_step_of_closed_gates_is_that_of_the_shortcuts(gate: str) -> None:
    network, dynamic = projected(gate=gate)
    with torch.no_grad():
        for unit in dynamic.changing:
            unit.gate.linear.bias.copy_(torch.tensor([2.0, -2.0]))
    batch = torch.randn(6, *Projected.shape)
    found = dynamic.train()(batch).logits[0]
    network.train()
    features = network.stem(batch)
    assert close(found, network.linear((network.shortcut(features) * network.table).mean((2, 3))))
    found.square().sum().backward()
    assert torch.equal(dynamic.plain.get_submodule("conv").weight.grad, torch.zeros(8, 8, 3, 3))
    assert all(unit.gate.linear.bias.grad.abs().sum() > 0 for unit in dynamic.changing)


@pytest.mark.parametrize("mode", [True, False])
def test_moving_a_network_moves_the_tables_of_its_shortcuts(mode: bool) -> None:
    network, dynamic = projected()
    batch = torch.randn(6, *Projected.shape).double()
    network.double().train(mode)
    dynamic.double().train(mode)
    answers = dynamic(batch)
    assert torch.equal(answers.logits[0] if mode else answers, network(batch))
    again = copy.deepcopy(dynamic).float().eval()
    set_offset(again, -ALL_OPEN)
    network.float().eval()
    features = network.stem(batch.float())
    wanted = network.linear((network.shortcut(features) * network.table).mean((2, 3)))
    assert close(again(batch.float()), wanted)


def test_moving_a_network_moves_the_tables_of_its_channel_gates() -> None:
    network = convert(create("digits_resnet"), [ChannelGates(blocks=["layer2.0"])], (1, 8, 8)).double()
    (unit,) = network.changing
    assert "layer2_0_shortcut_copies" in str(unit.body.graph)  # an option-A shortcut
    features, shares = torch.randn(4, 16, 8, 8).double(), torch.eye(len(unit.path_macs))[-1:].expand(4, -1).double()
    assert close(unit.blend(features, shares), unit.paths()[-1](features), 1e-12)


@pytest.mark.parametrize("fields", GATES)
@pytest.mark.fast("fields0", "fields2")
def test_training_on_one_image(fields: dict) -> None:
    network = gated_resnet(**fields).train()
    before = {name: value.clone() for name, value in network.state_dict().items() if ".gate." in name}
    network(images(1)).logits[0].square().sum().backward()
    assert all(p.grad is not None for unit in network.changing for p in unit.gate.parameters())
    linear = fields["gate"] != "conv"
    assert not linear or all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
