"""Folded batch norms give the same answers up to rounding, and what must not be folded is not."""

import copy

import pytest
import torch
from networks import SmallResNet, close, conv_block, randomise_norms, small_resnet, torchvision_network
from torch import Tensor, nn

from dynamize.graph.fold import affine, fold_norm, folded, norm_pairs
from dynamize.graph.trace import trace


def norms(module: nn.Module) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
@pytest.mark.fast("resnet18")
def test_torchvision_networks_lose_every_norm_and_keep_their_answers(name: str) -> None:
    network = torchvision_network(name)
    fast, images = folded(trace(network, (3, 64, 64))), torch.randn(3, 3, 64, 64)
    assert norms(fast) == 0
    with torch.no_grad():
        assert close(fast(images), network(images))


def test_the_module_itself_is_left_alone() -> None:
    network = small_resnet().train()
    before = copy.deepcopy(network.state_dict())
    fast = folded(network)
    assert network.training
    assert not fast.training
    assert norms(network) == 13
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_norm_before_its_convolution_stays() -> None:
    network = randomise_norms(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3))).eval()
    fast, images = folded(network), torch.randn(2, 3, 8, 8)
    assert norms(fast) == 1
    assert torch.equal(fast(images), network(images))


class Shared(nn.Module):
    """One convolution called twice, with a norm behind the first call only, and one norm called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.a, self.b, self.twice = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.norm(self.conv(x)))
        return self.twice(self.b(self.twice(self.a(x))))


class SeenElsewhere(nn.Module):
    """The convolution's own output is used beside the norm's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x + self.norm(x)


@pytest.mark.parametrize(("network", "left"), [(Shared(), 2), (SeenElsewhere(), 1)])
def test_layers_that_serve_two_places_are_not_folded(network: nn.Module, left: int) -> None:
    randomise_norms(network).eval()
    fast, images = folded(network), torch.randn(2, 4, 8, 8)
    assert norms(fast) == left
    with torch.no_grad():
        assert close(fast(images), network(images))


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"eps": 0.1}])
def test_unusual_norms(options: dict[str, object]) -> None:
    norm = nn.BatchNorm2d(4, **options)  # type: ignore[arg-type]
    network = randomise_norms(nn.Sequential(nn.Conv2d(3, 4, 3), norm)).eval()
    fast, images = folded(network), torch.randn(5, 3, 8, 8)
    assert norms(fast) == ("track_running_stats" in options)
    with torch.no_grad():
        assert close(fast(images), network(images))


def test_what_a_norm_does_besides_normalising_stays() -> None:
    timm_layers = pytest.importorskip("timm.layers", reason="needs timm: BatchNormAct2d is its norm with activation")
    layers = (
        nn.Conv2d(3, 4, 3),
        timm_layers.BatchNormAct2d(4),
        nn.Conv2d(4, 4, 1),
        timm_layers.BatchNormAct2d(4, apply_act=False),
    )
    network = randomise_norms(nn.Sequential(*layers)).eval()
    fast, images = folded(network), torch.randn(5, 3, 8, 8)
    assert norms(fast) == 0
    assert [type(module) for module in fast.children()] == [nn.Conv2d, nn.ReLU, nn.Conv2d]
    with torch.no_grad():
        assert close(fast(images), network(images))


class Squared(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


class Doubled(nn.BatchNorm2d):
    """Computes what its class says, and one number more, which its children do not tell."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("norm", [Squared(4), Doubled(4)])
def test_norms_that_compute_something_else_stay(norm: nn.Module) -> None:
    network = randomise_norms(nn.Sequential(nn.Conv2d(3, 4, 3), norm)).eval()
    fast, images = folded(network), torch.randn(5, 3, 8, 8)
    assert norms(fast) == 1
    assert torch.equal(fast(images), network(images))


def test_a_weight_that_is_computed_at_each_call_stays() -> None:
    conv = nn.utils.spectral_norm(nn.Conv2d(3, 4, 3))
    network = randomise_norms(nn.Sequential(conv, nn.BatchNorm2d(4))).eval()
    assert norms(folded(network)) == 1


class ReadsItsNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) * self.norm.weight.view(1, -1, 1, 1)


def test_a_norm_whose_numbers_are_read_elsewhere_stays() -> None:
    network = randomise_norms(ReadsItsNorm()).eval()
    fast, images = folded(network), torch.randn(5, 3, 8, 8)
    assert norms(fast) == 1
    assert torch.equal(fast(images), network(images))


def test_a_folded_layer_by_hand() -> None:
    """y = 3 x + 1, then (y - 2) / 2 * 8 + 5: 12 x + 1."""
    linear, norm = nn.Linear(1, 1), nn.BatchNorm1d(1, eps=0.0)
    with torch.no_grad():
        linear.weight.fill_(3), linear.bias.fill_(1)
        norm.running_mean.fill_(2), norm.running_var.fill_(4), norm.weight.fill_(8), norm.bias.fill_(5)
    found = affine(norm)
    assert found is not None
    one = fold_norm(linear, found)
    assert one.weight.item() == 12
    assert one.bias.item() == 1
    assert linear.weight.item() == 3


def test_linear_layers_are_folded_where_their_shape_is_known() -> None:
    """Behind (N, L, F) a norm works on L, which here is as long as F."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4))
    traced = trace(network, (3, 2, 2))
    assert [(a.name, b.name) for a, b in norm_pairs(traced, traced.graph)] == [("_1", "_2")]
    rows = nn.Sequential(nn.Flatten(2), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(16, 3))
    traced = trace(rows, (4, 2, 2))
    assert norm_pairs(traced, traced.graph) == []


def test_grouped_and_strided_convolutions() -> None:
    network = nn.Sequential(conv_block(3, 8), nn.Conv2d(8, 8, 3, stride=2, groups=8, bias=True), nn.BatchNorm2d(8))
    randomise_norms(network).eval()
    images = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        assert close(folded(network)(images), network(images))


def test_the_answer_of_the_small_resnet() -> None:
    network, images = small_resnet(), torch.randn(8, *SmallResNet.shape)
    with torch.no_grad():
        assert close(folded(network)(images), network(images))
