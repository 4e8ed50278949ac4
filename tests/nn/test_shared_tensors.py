"""Pieces share the layers of the original network: what moves, copies or loads it does so with all of them."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from gated_networks import gated_resnet, masked, scatter, split_exits
from networks import SmallResNet, close, conv_block, force, randomise_norms, small_resnet, split_at, with_exits
from quick import only
from torch import Tensor, nn
from torch.nn import functional

from dynamize.conversion import convert
from dynamize.graph.replace import every_module
from dynamize.models import create
from dynamize.nn.channels import ChannelUnit
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting
from dynamize.transforms import ChannelGates, Exits, SkipGates, SpatialSampling

EXITS = Exits(at=["layer1", "layer2"], head="conv", share=1.0, chain=True)


class Tables(nn.Module):
    """Tensors that no layer holds: in a block, in its projection, and in what all images run through."""

    shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.linear = conv_block(3, 8), nn.Linear(8, 7)
        self.branch, self.shortcut = conv_block(8, 8), nn.Conv2d(8, 8, 1)
        self.scale = nn.Parameter(torch.rand(8, 1, 1) + 0.5)
        self.register_buffer("table", torch.rand(8, 1, 1) + 0.5)
        self.register_buffer("last", torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = functional.relu(self.branch(x) * self.scale + self.shortcut(x) * self.table)
        return self.linear(x.mean((2, 3)) * self.last)


def with_tables() -> DynamicNetwork:
    torch.manual_seed(0)
    steps = [Exits(at=["stem_2"], head="linear", share=1.0), SkipGates(group=1, keep_first=False)]
    network = convert(randomise_norms(Tables()).eval(), steps, Tables.shape)
    return scatter(network, batch(network, 64))


def option_a(*steps: Any) -> DynamicNetwork:
    """CIFAR-10's ResNet-20, whose shortcuts copy channels by a table."""
    torch.manual_seed(0)
    network = convert(randomise_norms(create("cifar_resnet20")).eval(), list(steps), (3, 16, 16))
    assert any("shortcut" in name for name, _ in network.plain.named_buffers())
    return scatter(network, batch(network, 64))


def with_channels(own: bool) -> DynamicNetwork:
    steps = [EXITS, ChannelGates(groups=3, multiple=2, keep_first=False)]
    network = scatter(convert(small_resnet(), steps, SmallResNet.shape), images(64))
    for unit in network.changing if own else ():
        unit.own_statistics()
        for name, statistics in unit.named_buffers(recurse=False):
            if name.startswith("statistics"):
                statistics.mul_(torch.empty_like(statistics).uniform_(0.5, 1.5))
    return network


def with_coarse() -> DynamicNetwork:
    network = convert(small_resnet(), [EXITS, SpatialSampling(group=1, keep_first=False)], SmallResNet.shape)
    for unit in network.changing:
        for name, statistics in unit.named_buffers():
            if "running" in name:
                statistics.mul_(torch.empty_like(statistics).uniform_(0.5, 1.5))
    return scatter(network, images(64))


def images(count: int, shape: tuple[int, ...] = SmallResNet.shape) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(count))


def batch(network: DynamicNetwork, count: int) -> Tensor:
    return images(count, network.input_shape)


NETWORKS: dict[str, Callable[[], DynamicNetwork]] = {
    "exits": lambda: with_exits(chain=True),
    "skip gates": lambda: gated_resnet({"chain": True}, keep_first=False),
    "recurrent gates": lambda: gated_resnet({}, gate="recurrent"),
    "channel gates": lambda: with_channels(own=False),
    "own statistics": lambda: with_channels(own=True),
    "coarse grids": with_coarse,
    "tables": with_tables,
    "option A": lambda: option_a(Exits(at=["layer1.1", "layer2.1"], share=0.3), SkipGates(group=1)),
    "option A, channels": lambda: option_a(ChannelGates(multiple=4)),
}
ALL = pytest.mark.parametrize("name", only(["skip gates", "own statistics"], NETWORKS))


def tensors(network: DynamicNetwork) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """All that any module of the network holds itself, also those that are not registered, and the narrower ways."""
    ways = [way for unit in network.changing for way in unit.paths() if way is not None]
    seen = set()
    for root in (network, *ways):
        for module in every_module(root):
            if module in seen:
                continue
            seen.add(module)
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        yield module, name, tensor


def sharing(network: DynamicNetwork) -> list[int]:
    """For each place that holds a tensor, the number of the first place that holds the same one, or a part of it."""
    first: dict[int, int] = {}
    memory = [tensor.untyped_storage()._cdata for _, _, tensor in tensors(network)]
    return [first.setdefault(one, place) for place, one in enumerate(memory)]


def run(network: DynamicNetwork, given: Tensor) -> list[Tensor]:
    """What is answered by some images leaving, at all exits, and by every way."""
    with torch.no_grad():
        found = [network.run(given).logits, *network.all_exits(given)]
        most = max([len(unit.path_macs) for unit in network.changing], default=0)
        for option in range(most):
            options = {
                one.name: torch.full((len(given),), min(option, len(one.path_macs) - 1)) for one in network.changing
            }
            found.append(network.run(given, Setting(forced=options)).logits)
    return found


def made(name: str) -> DynamicNetwork:
    network = NETWORKS[name]()
    with torch.no_grad():
        if network.changing and network.leaving:
            split_exits(network, batch(network, 64))
        elif network.leaving:
            split_at(network, batch(network, 64), [0.4, 0.5])
    return network


@ALL
@pytest.mark.fast("own statistics")
def test_pieces_share_what_they_compute_with(name: str) -> None:
    network = made(name)
    registered = {one.untyped_storage()._cdata for one in network.state_dict(keep_vars=True).values()}
    registered |= {one.untyped_storage()._cdata for one in network.buffers()}
    counters = {"num_batches_tracked"}  # of the narrower ways: nothing computes with them
    assert all(one.untyped_storage()._cdata in registered or held in counters for _, held, one in tensors(network))


@ALL
@pytest.mark.fast("own statistics")
def test_everything_moves_to_double_precision_and_back(name: str) -> None:
    network = made(name)
    given = batch(network, 12)
    wanted, places = run(network, given), sharing(network)
    assert network.double() is network
    assert all(one.dtype == torch.float64 for _, _, one in tensors(network) if one.is_floating_point())
    assert sharing(network) == places
    found = run(network, given.double())
    assert all(one.dtype == torch.float64 for one in found)
    assert all(close(one.float(), other, 1e-4) for one, other in zip(found, wanted, strict=True))
    network.float()
    assert all(one.dtype == torch.float32 for _, _, one in tensors(network) if one.is_floating_point())
    assert sharing(network) == places
    assert all(torch.equal(*pair) for pair in zip(run(network, given), wanted, strict=True))


@ALL
@pytest.mark.fast("own statistics")
def test_everything_moves_to_another_device(name: str) -> None:
    network = made(name)
    places = sharing(network)
    held = [(module, held) for module, held, _ in tensors(network)]
    network.to("meta")
    assert all(one.is_meta for _, _, one in tensors(network))
    assert [(module, held) for module, held, _ in tensors(network)] == held
    assert sharing(network) == places


@ALL
@pytest.mark.fast("skip gates")
def test_a_network_that_comes_back_from_meta_computes_with_what_is_loaded(name: str) -> None:
    network, given = made(name), batch(made(name), 12)
    places, wanted = sharing(network), run(network, given)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    hidden = {key: value.clone() for key, value in network.named_buffers() if key not in state}
    network.to("meta")
    network.to_empty(device="cpu")
    assert sharing(network) == places
    network.load_state_dict(state)
    for key, value in hidden.items():
        network.get_buffer(key).copy_(value)
    assert all(torch.equal(*pair) for pair in zip(run(network, given), wanted, strict=True))


@ALL
def test_a_deep_copy_shares_within_itself_and_nothing_with_the_first(name: str) -> None:
    network = made(name)
    given = batch(network, 12)
    again = copy.deepcopy(network)
    assert sharing(again) == sharing(network)
    kept = {one.untyped_storage()._cdata for _, _, one in tensors(network)}
    assert not kept & {one.untyped_storage()._cdata for _, _, one in tensors(again)}
    wanted = run(network, given)
    assert all(torch.equal(*pair) for pair in zip(run(again, given), wanted, strict=True))
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.mul_(0.5)
    assert all(torch.equal(*pair) for pair in zip(run(network, given), wanted, strict=True))
    assert not torch.equal(run(again, given)[0], wanted[0])


@ALL
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.fast("True-skip gates", "False-own statistics")
def test_loaded_weights_are_computed_with_everywhere(name: str, assign: bool) -> None:
    network, other = made(name), made(name)
    given = batch(network, 12)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(torch.empty_like(tensor).uniform_(0.9, 1.1))
    run(network, given)  # narrower ways have been made
    wanted, places = run(other, given), sharing(network)
    state = {key: value.clone() for key, value in other.state_dict().items()}
    network.load_state_dict(state, assign=assign)
    assert all(torch.equal(*pair) for pair in zip(run(network, given), wanted, strict=True))
    assert sharing(network) == places


def halve_data(network: DynamicNetwork) -> None:
    for parameter in network.parameters():
        parameter.data.mul_(0.5)


def halve(network: DynamicNetwork) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0.5)


def new_data(network: DynamicNetwork) -> None:
    for parameter in network.parameters():
        parameter.data = parameter.data * 0.5


def step(network: DynamicNetwork) -> None:
    """Of training, which moves batch norms too."""
    optimizer = torch.optim.SGD(network.parameters(), 0.05)
    with torch.enable_grad():
        sum(one.square().sum() for one in network.train()(images(8)).logits).backward()
    optimizer.step()


def assigned(network: DynamicNetwork) -> None:
    state = {name: value.clone() for name, value in network.state_dict().items()}
    for name, value in state.items():
        if name.startswith("nets.") and value.is_floating_point():
            state[name] = value * 0.5
    network.load_state_dict(state, assign=True)


def statistics(network: DynamicNetwork) -> None:
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            if "running" in name:
                buffer.mul_(0.5)


def through_numpy(network: DynamicNetwork) -> None:
    """No version counter of torch knows."""
    for parameter in network.parameters():
        parameter.detach().numpy()[...] *= 0.5


CHANGES = [halve_data, halve, new_data, step, assigned, statistics, through_numpy]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("own", only([True], [False, True]))
@pytest.mark.fast("True-through_numpy")
def test_channel_gates_compute_with_the_weights_as_they_are(
    own: bool, change: Callable[[DynamicNetwork], None]
) -> None:
    network, given = with_channels(own), images(12)
    units = [unit for unit in network.changing if isinstance(unit, ChannelUnit)]
    assert len(units) == 6
    forced = torch.stack([torch.randint(0, len(unit.path_macs), (12,)) for unit in units], 1)
    setting = Setting(forced=force(network, forced))
    with torch.no_grad():
        before = network.run(given, setting).logits
        assert close(before, one_by_one(network, given, forced))
        change(network)
        network.eval()
        found = network.run(given, setting).logits
        assert close(found, one_by_one(network, given, forced), 2e-5)
        assert not close(found, before, 1e-2)
        wanted = masked(network, given)
        free = network.run(given)
    assert torch.equal(free.choices[wanted.clear], wanted.choices_NU[wanted.clear])
    assert close(free.logits[wanted.clear], wanted.answers_NC[wanted.clear], 2e-5)


def one_by_one(network: DynamicNetwork, given: Tensor, forced: Tensor) -> Tensor:
    """By masks; with statistics of each width's own, by those that the state dict has."""
    if not network.changing[0].has_own:
        return masked(network, given, forced).answers_NC
    fresh = with_channels(own=True)
    fresh.load_state_dict(network.state_dict())
    return masked(fresh, given, forced).answers_NC
