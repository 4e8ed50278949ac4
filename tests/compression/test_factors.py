"""Layers as products: exact at full rank, off by what was dropped at less, cheaper by what arithmetic says."""

import pytest
import torch
from networks import close
from torch import nn
from torch.nn import functional as F

from dynamize.compression.factors import can_factorize, factor_costs, factorized, ranks_at, spectra
from dynamize.graph.macs import count_macs

torch.manual_seed(0)
KERNELS = {
    "plain": nn.Conv2d(6, 8, 3, padding=1),
    "stride": nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False),
    "dilated": nn.Conv2d(6, 8, 3, padding=2, dilation=2),
    "oblong": nn.Conv2d(6, 8, (1, 5), padding=(0, 2)),
    "reflected": nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
    "same": nn.Conv2d(6, 8, 3, padding="same"),
}
POINTWISE = {
    "1x1": nn.Conv2d(6, 8, 1),
    "1x1 stride": nn.Conv2d(6, 8, 1, stride=2, bias=False),
    "linear": nn.Linear(6, 8),
    "linear without bias": nn.Linear(6, 8, bias=False),
}
LAYERS = KERNELS | POINTWISE


def inputs(layer: nn.Module) -> torch.Tensor:
    return torch.randn(2, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 6, 9, 9)


@pytest.mark.parametrize("name", LAYERS)
def test_full_rank_is_exact(name: str) -> None:
    layer = LAYERS[name]
    ranks = ranks_at(spectra(layer), 1.0, 1)
    assert ranks == ((8, 6) if name in KERNELS else (6,))
    batch = inputs(layer)
    assert close(factorized(layer, ranks)(batch), layer(batch), 1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_low_rank_is_found_and_kept(name: str) -> None:
    layer = type(LAYERS[name]).__new__(type(LAYERS[name]))
    layer.__dict__ = dict(LAYERS[name].__dict__, _parameters=dict(LAYERS[name]._parameters))
    weight = layer.weight.detach()
    core = torch.randn(3, 2, *weight.shape[2:])
    low = torch.einsum("or,rs...,is->oi...", torch.randn(8, 3), core, torch.randn(6, 2))
    layer.weight = nn.Parameter(low)
    ranks = ranks_at(spectra(layer), 0.999999, 1)
    assert ranks == ((3, 2) if name in KERNELS else (2,))
    batch = inputs(layer)
    assert close(factorized(layer, ranks)(batch), layer(batch), 1e-4)


def test_svd_drops_the_least_squares_that_it_can() -> None:
    matrix = nn.Linear(5, 4, bias=False)
    left, _ = torch.linalg.qr(torch.randn(4, 4))
    right, _ = torch.linalg.qr(torch.randn(5, 4))
    nn.Parameter.copy_(matrix.weight.data, left @ torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5])) @ right.T)
    (squares,) = spectra(matrix)
    assert torch.allclose(squares, torch.tensor([16.0, 4.0, 1.0, 0.25], dtype=torch.float64), atol=1e-5)
    # shares kept by 1, 2, 3, 4 of them: 16/21.25 = 0.753, 20/21.25 = 0.941, 21/21.25 = 0.988, 1
    assert [ranks_at([squares], e, 1) for e in (0.75, 0.76, 0.95, 0.99)] == [(1,), (2,), (3,), (4,)]
    assert ranks_at([squares], 0.75, 3) == (3,)
    assert ranks_at([squares], 0.99, 3) == (4,)
    product = factorized(matrix, (2,))
    rebuilt = (product[1].weight @ product[0].weight).detach()
    assert float((rebuilt - matrix.weight.detach()).square().sum()) == pytest.approx(1.25, rel=1e-4)


@pytest.mark.parametrize(("ranks", "kinds"), [((8, 2), [1, 3]), ((3, 6), [3, 1]), ((3, 2), [1, 3, 1])])
def test_a_side_of_full_rank_has_no_factor(ranks: tuple[int, int], kinds: list[int]) -> None:
    layer = KERNELS["plain"]
    product = factorized(layer, ranks)
    assert [factor.kernel_size[0] for factor in product] == kinds
    assert [factor.bias is not None for factor in product] == [False] * (len(kinds) - 1) + [True]
    assert torch.equal(product[-1].bias, layer.bias)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("ranks", [(2, 2), (8, 4), (3, 6)])
def test_costs_are_what_is_executed(name: str, ranks: tuple[int, int]) -> None:
    layer = LAYERS[name]
    used = ranks if name in KERNELS else ranks[:1]
    if used == (8,):
        used = (6,)
    batch = inputs(layer)[:1]
    whole, factors = factor_costs(layer, used, batch.shape, layer(batch).shape)
    assert whole == count_macs(layer, batch)
    assert factors == count_macs(factorized(layer, used), batch)


def test_costs_by_hand() -> None:
    layer = nn.Conv2d(16, 32, 3, stride=2, padding=1)
    # 4*4 pixels * 32 * 16 * 9; then 8*8 * 16 * 4 + 4*4 * 4 * 8 * 9 + 4*4 * 8 * 32
    assert factor_costs(layer, (8, 4), (1, 16, 8, 8), (1, 32, 4, 4)) == (73728, 4096 + 4608 + 4096)


def test_linear_layers_on_channels_last_count_every_position() -> None:
    layer = nn.Linear(16, 16)
    assert factor_costs(layer, (4,), (1, 7, 7, 16), (1, 7, 7, 16)) == (49 * 256, 49 * 4 * 32)


@pytest.mark.parametrize(
    ("layer", "possible"),
    [
        (nn.Conv2d(4, 4, 3, groups=4), False),
        (nn.Conv2d(4, 8, 1, padding=1), False),  # the border is the bias alone: the factors' would be too, but padded
        (nn.ConvTranspose2d(4, 4, 2), False),
        (nn.BatchNorm2d(4), False),
        (nn.Conv2d(4, 4, 3), True),
        (nn.Linear(4, 4), True),
    ],
)
def test_which_layers_can_be_products(layer: nn.Module, possible: bool) -> None:
    assert can_factorize(layer) is possible


def test_subclasses_may_do_something_else() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.conv2d(x, self.weight / self.weight.norm())

    assert not can_factorize(Standardised(4, 4, 3))


def test_factors_are_where_and_as_the_layer_is() -> None:
    layer = nn.Conv2d(6, 8, 3).double().eval().requires_grad_(False)
    state = torch.get_rng_state()
    product = factorized(layer, (4, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert {parameter.dtype for parameter in product.parameters()} == {torch.float64}
    assert not any(parameter.requires_grad for parameter in product.parameters())
    assert not product.training
