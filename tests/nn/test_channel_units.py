"""Channel units: narrower paths are slices, which may have batch-norm statistics of their own."""

import copy

import torch
from gated_networks import masked, scatter
from networks import SmallResNet, close, force, small_resnet
from torch import Tensor, nn

from dynamize.conversion import convert
from dynamize.nn.channels import ChannelUnit
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting
from dynamize.transforms import ChannelGates

NORMS = 2  # in each unit: one between its convolutions, one behind them


def images(count: int) -> Tensor:
    return torch.randn(count, *SmallResNet.shape, generator=torch.Generator().manual_seed(count))


def channels(groups: int = 2) -> DynamicNetwork:
    gates = ChannelGates(groups=groups, multiple=2, keep_first=False)
    return scatter(convert(small_resnet(), [gates], SmallResNet.shape), images(64))


def own(network: DynamicNetwork) -> list[ChannelUnit]:
    found = [unit for unit in network.changing if isinstance(unit, ChannelUnit)]
    assert len(found) == 6
    for unit in found:
        unit.own_statistics()
    return found


def test_nothing_changes_until_they_are_estimated() -> None:
    network, batch = channels(), images(16)
    with torch.no_grad():
        wanted = network(batch)
        keys = set(network.state_dict())
        units = own(network)
        assert torch.equal(network(batch), wanted)
        added = {name: tensor for name, tensor in network.state_dict().items() if name not in keys}
        assert len(added) == len(units) * NORMS * 2
        widths = [unit.body.get_buffer(name).shape[0] for unit in units for name, _ in unit.body.named_buffers()
                  if "running" in name]  # fmt: skip
        assert sorted(tensor.shape for tensor in added.values()) == sorted((1, width) for width in widths)
        for unit in units:
            unit.own_statistics()
        assert set(network.state_dict()) == keys | set(added)
        for unit in units:
            unit.shared_statistics()
            unit.shared_statistics()
        assert set(network.state_dict()) == keys
        assert torch.equal(network(batch), wanted)


def test_each_path_has_its_own() -> None:
    unit = own(channels(4))[3]
    features = torch.rand(3, *unit_shape(unit))
    paths = len(unit.path_macs)
    assert paths == 4
    with torch.no_grad():
        before = [path(features.clone()) for path in unit.paths()]
        unit.statistics_0[1] += 0.5  # running means of the first batch norm on the second path
        after = [path(features.clone()) for path in unit.paths()]
    assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [True, False, True, True]


def unit_shape(unit: ChannelUnit) -> tuple[int, ...]:
    return next(node.meta["shape"] for node in unit.body.graph.nodes if node.op == "placeholder")[1:]


def test_what_a_path_was_given_is_used_from_then_on() -> None:
    unit = own(channels())[0]
    features = torch.rand(3, *unit_shape(unit))
    narrower = unit.paths()[0]
    with torch.no_grad():
        for norm in narrower.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.uniform_(-1, 1)
                norm.running_var.uniform_(1, 2)
        wanted = narrower(features)
        assert torch.equal(unit.paths()[0](features), wanted)
        assert unit.paths()[0] is narrower
        again = copy.deepcopy(unit).paths()[0]  # from the unit's own tensors
        assert again is not narrower
        assert torch.equal(again(features), wanted)


def disturb(network: DynamicNetwork) -> DynamicNetwork:
    """As after training and estimating: paths that answer differently than with shared statistics."""
    with torch.no_grad():
        for unit in own(network):
            for name, tensor in unit.named_buffers(recurse=False):
                if name.startswith("statistics"):
                    tensor.mul_(torch.empty_like(tensor).uniform_(0.5, 1.5))
    return network


def test_each_image_runs_what_it_chose() -> None:
    network, batch = disturb(channels(4)), images(16)
    shared = channels(4)
    wanted = masked(network, batch)
    with torch.no_grad():
        found = network(batch)
        assert close(found[wanted.clear], wanted.answers_NC[wanted.clear])
        assert not close(found, shared(batch), 1e-2)
        forced = torch.stack([torch.randint(0, len(unit.path_macs), (16,)) for unit in network.changing], 1)
        found = network.run(batch, Setting(forced=force(network, forced))).logits
        assert close(found, masked(network, batch, forced).answers_NC)


def test_training_knows_the_shared_ones_only() -> None:
    first, second, batch = channels(), disturb(channels()), images(8)
    for network in (first, second):
        torch.manual_seed(0)  # of the decisions and of dropout
        network.train()(batch)
    with torch.no_grad():
        found = []
        for network in (first, second):
            torch.manual_seed(1)
            found.append(network(batch))
    assert torch.equal(found[0].logits[0], found[1].logits[0])
    assert all(torch.equal(shares, found[1].shares[name]) for name, shares in found[0].shares.items())


def test_copies_weights_and_moves_take_them_along() -> None:
    network, batch = disturb(channels()), images(8)
    other = channels()
    own(other)
    with torch.no_grad():
        wanted = network(batch)
        assert not torch.equal(other(batch), wanted)
        other.load_state_dict(network.state_dict())
        assert torch.equal(other(batch), wanted)
        again = copy.deepcopy(network)
        again.changing[0].statistics_0 += 1
        assert torch.equal(network(batch), wanted)
        assert torch.equal(copy.deepcopy(network)(batch), wanted)
        assert close(copy.deepcopy(network).double()(batch.double()).float(), wanted)
