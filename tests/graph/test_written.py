"""Weights that are computed from others, and functions with tensors of the network, as layers of torch's own."""

from collections.abc import Callable

import pytest
import torch
from networks import close
from random_blocks import FunctionalNorm, Standardised
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from dynamize.graph.fold import affine
from dynamize.graph.trace import trace
from dynamize.graph.written import computed_layers, functions_to_layers


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def spectral(layer: nn.Module) -> nn.Module:
    return parametrizations.spectral_norm(layer)


def own(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Twice())
    return layer


def reflecting(layer: nn.Conv2d) -> nn.Module:
    layer.padding_mode, layer._reversed_padding_repeated_twice = "reflect", [1, 1, 1, 1]
    return parametrizations.weight_norm(layer)


WRAPS: list[Callable[[nn.Conv2d], nn.Module]] = [
    parametrizations.weight_norm,
    nn.utils.weight_norm,
    spectral,
    nn.utils.spectral_norm,
    own,
    reflecting,
]


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_computed_weight_is_written_out(wrap: Callable[[nn.Conv2d], nn.Module]) -> None:
    torch.manual_seed(0)
    layer = wrap(nn.Conv2d(3, 8, 3, 2, 1))
    network = nn.Sequential(layer, nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    traced = trace(network, (3, 9, 9))
    ((old, new),) = computed_layers(traced).items()
    assert old is traced.get_submodule("0")
    assert type(new) is nn.Conv2d
    assert {name for name, _ in new.named_parameters()} == {"weight", "bias"}
    assert new.weight.requires_grad
    images = torch.randn(2, 3, 9, 9)
    assert close(new(images), layer(images))


def test_code_of_a_subclass_counts_where_it_computes_a_weight() -> None:
    class Shifted(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x.mean((1, 2, 3), keepdim=True)

    layers = [Standardised(3, 8, 3, padding=1), Shifted(8, 8, 1), nn.Conv2d(8, 8, 1)]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
    traced = trace(network, (3, 8, 8))
    assert list(computed_layers(traced)) == [traced.get_submodule("0")]


class Held(nn.Module):
    """Tensors of its own, given to functions of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.scale = nn.Parameter(torch.randn(8, 2, 3, 3)), nn.Parameter(torch.rand(8, 1, 1, 1) + 0.5)
        self.register_buffer("fixed", torch.randn(8, 8, 1, 1))
        self.norm, self.out = FunctionalNorm(8), nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel * self.scale, None, 2, padding=1, groups=2)
        x = F.conv2d(self.norm(x).relu(), self.fixed)
        return F.linear(x.mean((2, 3)), self.out)


def test_functions_become_layers_where_their_tensors_are_trained() -> None:
    torch.manual_seed(0)
    network = Held().eval()
    images = torch.randn(4, 4, 9, 9)
    wanted = network(images)
    traced = trace(network, (4, 9, 9))
    names = [node.name for node in traced.graph.nodes]
    made = functions_to_layers(traced)
    assert made == ["conv2d", "norm.batchnorm2d", "linear"]
    assert {node.name for node in traced.graph.nodes} <= set(names)
    assert close(traced(images), wanted)
    assert {name for name, _ in traced.named_parameters()} == {
        *("conv2d.weight", "norm.batchnorm2d.weight", "norm.batchnorm2d.bias", "linear.weight")
    }
    assert traced.conv2d.groups == 2
    assert affine(traced.norm.batchnorm2d) is not None
    assert close(traced.train()(images), network.train()(images))
    assert torch.allclose(traced.norm.batchnorm2d.running_mean, network.norm.mean)


def test_a_norm_that_is_frozen_stays_so() -> None:
    class Frozen(FunctionalNorm):
        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.mean, self.var, self.scale, self.shift)

    network = nn.Sequential(nn.Conv2d(3, 8, 1), Frozen(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    images = torch.randn(4, 3, 4, 4)
    wanted = network.eval()(images)
    traced = trace(network, (3, 4, 4))
    assert functions_to_layers(traced) == ["1.frozenbatchnorm2d"]
    assert close(traced.train()(images), wanted)
