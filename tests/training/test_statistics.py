"""Batch-norm statistics are those of the images that come to a batch norm, whatever the batches."""

import copy
from collections.abc import Iterable

import pytest
import torch
from digits import digit_network, digit_splits
from gated_networks import gated_resnet, scatter
from networks import SmallResNet, conv_block, set_offset, small_resnet
from torch import Tensor, nn

from dynamize.conversion import convert, wrap
from dynamize.data.loaders import LoaderSet
from dynamize.nn.channels import ChannelUnit
from dynamize.nn.gates import ALL_OPEN, Gate
from dynamize.nn.network import DynamicNetwork, record_routing
from dynamize.training import statistics
from dynamize.training.statistics import Estimated, estimate_statistics, moments
from dynamize.transforms import ChannelGates, SkipGates

CPU = torch.device("cpu")
COUNT = 90  # more than one batch, and not a multiple


def images(count: int = COUNT) -> Tensor:
    return torch.randn(count, *SmallResNet.shape, generator=torch.Generator().manual_seed(count))


def split(batch: Tensor) -> LoaderSet:
    labels = torch.zeros(len(batch), dtype=torch.int64)
    return LoaderSet("train", [(part, labels[: len(part)]) for part in batch.split(40)])


def estimate(network: DynamicNetwork, batch: Tensor, norms: str, monkeypatch: pytest.MonkeyPatch) -> Estimated:
    monkeypatch.setattr(statistics, "_RARE", 2)
    return estimate_statistics(network, split(batch), CPU, count=len(batch), seed=0, norms=norms)


class Inputs:
    """What comes to the batch norms of modules while a network runs."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.seen: dict[nn.Module, list[Tensor]] = {}
        for module in modules:
            for norm in module.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    self.seen[norm] = []
                    norm.register_forward_pre_hook(lambda one, given: self.seen[one].append(given[0].clone()))

    def assert_normalised(self) -> None:
        """Of those batch norms that an image came to, which must be most."""
        seen = {norm: given for norm, given in self.seen.items() if given}
        assert len(seen) > len(self.seen) / 2
        for norm, given in seen.items():
            values = torch.cat(given).double().transpose(0, 1).flatten(1)
            assert torch.allclose(norm.running_mean.double(), values.mean(1), atol=1e-4)
            assert torch.allclose(norm.running_var.double(), values.var(1), rtol=1e-3, atol=1e-6)


def running(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items() if "running" in name}


def test_moments_by_hand() -> None:
    """Channel 0: 1, 2, 3, 6, mean 3 and squares 4 + 1 + 0 + 9 over three; channel 1 is constant."""
    mean, variance = moments([torch.tensor([[[1.0], [5]], [[2.0], [5]], [[3.0], [5]]]), torch.tensor([[[6.0], [5]]])])
    assert mean.tolist() == [3, 5]
    assert variance.tolist() == [pytest.approx(14 / 3), 0]


def test_moments_of_large_means_and_empty_batches() -> None:
    values = torch.randn(1000, 3) + torch.tensor([0.0, 1e3, -1e4])
    mean, variance = moments([*values.split(7), values[:0]])
    assert torch.allclose(mean, values.double().mean(0), rtol=1e-6)
    assert torch.allclose(variance, values.double().var(0), rtol=1e-4)


def test_all_norms_of_a_static_network(monkeypatch: pytest.MonkeyPatch) -> None:
    network, batch = wrap(small_resnet(), SmallResNet.shape), images()
    assert estimate(network, batch, "all", monkeypatch) == Estimated(COUNT, 0)
    inputs = Inputs([network])
    assert len(inputs.seen) == 13
    with torch.no_grad():
        network(batch)
    inputs.assert_normalised()


def test_the_size_of_batches_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for size in (64, 1):
        monkeypatch.setattr(statistics, "_BATCH", size)
        network = wrap(small_resnet(), SmallResNet.shape)
        estimate(network, images(20), "all", monkeypatch)
        found.append(running(network))
    assert all(torch.allclose(one, found[1][name], rtol=1e-4, atol=1e-5) for name, one in found[0].items())


def channels(groups: int = 2) -> DynamicNetwork:
    gates = ChannelGates(groups=groups, multiple=4, keep_first=False)
    return scatter(convert(small_resnet(), [gates], SmallResNet.shape), images())


def test_each_width_has_those_of_the_images_that_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    network, batch = channels(), images()
    before = running(network)
    estimate(network, batch, "widths", monkeypatch)
    units = [unit for unit in network.changing if isinstance(unit, ChannelUnit)]
    assert all(unit.has_own for unit in units)
    narrower = Inputs(path for unit in units for path in unit.paths()[:-1])
    sizes: list[int] = []
    units[0].paths()[0].register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    with torch.no_grad():
        network(batch)
    assert 0.3 < sizes[0] / COUNT < 0.7
    narrower.assert_normalised()
    assert all(torch.equal(tensor, before[name]) for name, tensor in running(network).items())


def assert_as_in_training(network: DynamicNetwork, batch: Tensor) -> None:
    """One train-mode forward over all images, decisions not sampled, finds the statistics that are there."""
    trained = copy.deepcopy(network).train()
    for module in trained.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
        if isinstance(module, Gate | nn.Dropout):
            module.eval()
    trained.choose.noise = 0.0
    with torch.no_grad():
        trained(batch)
    found, wanted = running(network), running(trained)
    assert len(found) > 6
    assert all(torch.allclose(one, wanted[name], rtol=1e-3, atol=1e-4) for name, one in found.items())


@pytest.mark.parametrize("exits", [None, {}])
@pytest.mark.fast("exits1")
def test_shared_ones_are_those_of_training(exits: dict | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for network in (channels(), gated_resnet(exits)):
        estimate(network, images(), "all", monkeypatch)
        scatter(network, images())  # gates see other features now
        estimate(network, images(), "all", monkeypatch)
        with torch.no_grad(), record_routing(network) as routing:
            network(images())
        assert len(routing.choices.unique(dim=0)) > 2
        assert_as_in_training(network, images())


def test_shared_ones_beside_those_of_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    network, batch = channels(), images()
    estimate(network, batch, "widths", monkeypatch)
    estimate(network, batch, "all", monkeypatch)
    narrower = Inputs(path for unit in network.changing for path in unit.paths()[:-1])
    with torch.no_grad():
        network(batch)
    narrower.assert_normalised()


def only_static(network: DynamicNetwork) -> list[nn.Module]:
    return [piece for piece in network.row if piece.effect is None and not piece.answers]


def test_a_path_that_no_image_takes_has_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    network, batch = channels(), images()
    set_offset(network, ALL_OPEN)
    with torch.no_grad():
        wanted = network(batch)
        found = estimate(network, batch, "widths", monkeypatch)
        assert found.rare == len(network.changing)
        assert torch.equal(network(batch), wanted)
        unit = network.changing[0]
        before = network.row[0].module(batch)
        inputs = Inputs([unit.paths()[0]])
        unit.paths()[0](before)
    inputs.assert_normalised()


class Projected(nn.Module):
    """A block whose shortcut has a batch norm, which images that skip the block go through too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_block(3, 8)
        self.a, self.norm_a, self.b, self.norm_b = (nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8),
                                                    nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8))  # fmt: skip
        self.short, self.norm_short = nn.Conv2d(8, 8, 1, 2), nn.BatchNorm2d(8)
        self.last, self.linear = conv_block(8, 8), nn.Linear(8, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        branch = self.norm_b(self.b(torch.relu(self.norm_a(self.a(x)))))
        return self.linear(self.last(torch.relu(branch + self.norm_short(self.short(x)))).mean((2, 3)))


def test_a_projection_has_those_of_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    network = convert(Projected().eval(), [SkipGates(group=1, keep_first=False)], SmallResNet.shape)
    estimate(network, images(), "all", monkeypatch)
    scatter(network, images())
    estimate(network, images(), "all", monkeypatch)
    assert_as_in_training(network, images())
    (unit,) = network.changing
    inputs = Inputs([unit.paths()[1].get_submodule("norm_short")])
    with torch.no_grad():
        network(images())
    inputs.assert_normalised()


@pytest.mark.parametrize("gate", ["conv", "recurrent", "linear"])
def test_heads_have_theirs_and_gates_keep_theirs(gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, batch = gated_resnet({"chain": True}, gate=gate), images()
    gates = [running(unit.gate) for unit in network.changing]
    estimate(network, batch, "all", monkeypatch)
    for before, unit in zip(gates, network.changing, strict=True):
        assert all(torch.equal(one, running(unit.gate)[name]) for name, one in before.items())
    inputs = Inputs([*network.leaving, *only_static(network)])
    with torch.no_grad():
        network.all_exits(batch)
    inputs.assert_normalised()


class TwiceNormed(nn.Module):
    """One batch norm at two places has no statistics that suit both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.linear = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 8, 1),
            nn.BatchNorm2d(8),
            nn.Linear(8, 7),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(self.b(self.norm(self.a(x)))).mean((2, 3)))


def test_a_norm_at_two_places_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    network = wrap(TwiceNormed().eval(), SmallResNet.shape)
    before = running(network)
    estimate(network, images(), "all", monkeypatch)
    assert all(torch.equal(tensor, before[name]) for name, tensor in running(network).items())


def test_images_are_drawn_with_the_seed_and_augmented_as_in_training() -> None:
    data = digit_splits()
    assert data.train.augmentation == "crop"
    found = []
    for seed in (0, 0, 1):
        network = digit_network()
        assert estimate_statistics(network, data.train, CPU, count=100, seed=seed).images == 100
        found.append(running(network))
    assert all(torch.equal(one, found[1][name]) for name, one in found[0].items())
    assert not all(torch.equal(one, found[2][name]) for name, one in found[0].items())
    network = digit_network()
    assert estimate_statistics(network, data.train, CPU, count=10**6, seed=0).images == 320
    with_borders = running(network)
    estimate_statistics(network, data.train, CPU, count=10**6, seed=0, augmented=False)
    assert not any(torch.allclose(one, with_borders[name]) for name, one in running(network).items())
    plain = torch.cat([batch for batch, _ in data.train.batches(64)])
    inputs = Inputs([network.row[0]])
    with torch.no_grad():
        network.all_exits(plain)
    inputs.assert_normalised()


def test_fewer_images_where_feature_maps_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest map of the small ResNet is 8 x 16 x 16, of four bytes, four at once."""
    monkeypatch.setattr(statistics, "_BYTES", 10 * 8 * 16 * 16 * 4 * 4)
    network = wrap(small_resnet(), SmallResNet.shape)
    assert estimate(network, images(), "all", monkeypatch).images == 10
