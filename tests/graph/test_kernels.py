"""Linear layers as kernels: chained and added they compute what the layers do, to the last digits of float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import randomise_norms
from torch import Tensor, nn

from dynamize.graph.kernels import Kernel, NotOneConvolution, kernel_of, padding_of

LIKE = torch.zeros(1, dtype=torch.float64)


def double(*layers: nn.Module) -> nn.Sequential:
    """Layers with random statistics, in float64 and eval mode."""
    network = nn.Sequential(*layers)
    return randomise_norms(network).double().eval()  # type: ignore[return-value]


def kernel(module: nn.Module, channels: int = 4) -> Kernel:
    found = kernel_of(module, channels)
    assert found is not None
    return found


def maps(channels: int = 4, height: int = 11, width: int = 9) -> Tensor:
    return torch.randn(2, channels, height, width, dtype=torch.float64)


def same(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, (1, 5), padding=(0, 2), groups=2, bias=False),
        nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=4, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, padding="same", dilation=3),
        nn.BatchNorm2d(4),
        nn.BatchNorm2d(4, affine=False),
        nn.AvgPool2d(3, 1, 1),
        nn.AvgPool2d(2),
        nn.Identity(),
        nn.Dropout(0.0),
    ],
)
def test_one_layer(layer: nn.Module) -> None:
    layer = double(layer)[0]
    images = maps()
    conv = kernel(layer).as_conv(LIKE)
    assert same(conv(images), layer(images))


@pytest.mark.parametrize(
    "layer",
    [
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.AvgPool2d(3, 1, 1, count_include_pad=False),
        nn.AvgPool2d(3, 2, ceil_mode=True),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.ConvTranspose2d(4, 4, 3),
        nn.Conv2d(4, 4, 2, padding="same"),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
        nn.utils.spectral_norm(nn.Conv2d(4, 4, 3)),
    ],
)
def test_what_is_no_kernel(layer: nn.Module) -> None:
    assert kernel_of(layer, 4) is None


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6)),
        (nn.Conv2d(4, 6, 1), nn.Conv2d(6, 8, 3)),
        (nn.Conv2d(4, 6, 1, groups=2), nn.Conv2d(6, 9, 3, 2, dilation=2, groups=3)),
        (nn.Conv2d(4, 8, 1, bias=False), nn.Conv2d(8, 8, 3, padding=1, groups=8)),
        (nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.AvgPool2d(3, 2)),
        (nn.Conv2d(4, 4, 5, padding=2, groups=4), nn.Conv2d(4, 6, 1, groups=2)),
        (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2)),
        (nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular")),
    ],
)
def test_layers_that_follow_each_other(layers: tuple[nn.Module, ...]) -> None:
    row = double(*layers)
    total, channels = kernel(row[0]), 4
    for layer in row[1:]:
        total = total.then(kernel(layer, total.outputs))
    assert total.inputs == channels
    images = maps()
    assert same(total.as_conv(LIKE)(images), row(images))


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        (
            nn.Conv2d(4, 6, 1),
            nn.Conv2d(6, 8, 3, padding=1),
            "a layer with bias is followed by one that pads with zeros",
        ),
        (nn.BatchNorm2d(4), nn.AvgPool2d(3, 1, 1), "a layer with bias is followed by one that pads with zeros"),
        (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), "neither looks at single pixels only"),
        (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1, stride=2), "neither looks at single pixels only"),
    ],
)
def test_rows_that_are_no_convolution(first: nn.Module, second: nn.Module, why: str) -> None:
    with pytest.raises(NotOneConvolution, match=why):
        kernel(first).then(kernel(second, kernel(first).outputs))


def test_a_bias_before_zero_padding_really_matters() -> None:
    """What is refused above is wrong at the border: 3 x 3 ones over a constant 1 see 4 of 9 pixels in a corner."""
    point, conv = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 3, padding=1, bias=False)
    nn.init.zeros_(point.weight)
    nn.init.ones_(point.bias)
    nn.init.ones_(conv.weight)
    assert conv(point(torch.zeros(1, 1, 5, 5)))[0, 0, 0, 0].item() == 4
    fused = kernel(nn.Conv2d(1, 1, 1), 1)
    with pytest.raises(NotOneConvolution):
        fused.then(kernel(conv, 1))


KERNELS = st.tuples(
    st.sampled_from([1, 3, 5]),  # rows
    st.sampled_from([1, 2, 3]),  # columns
    st.integers(1, 3),  # dilation
    st.sampled_from([1, 2, 4]),  # groups
    st.booleans(),  # bias
)


@settings(max_examples=60, deadline=None)
@given(st.lists(KERNELS, min_size=2, max_size=4), st.sampled_from([1, 2]))
def test_sums_of_convolutions(drawn: list[tuple[int, int, int, int, bool]], stride: int) -> None:
    """Branches of any size whose taps lie on one lattice or on none: the common start is a common padding."""
    layers, total = [], None
    for rows, columns, dilation, groups, bias in drawn:
        padding = (dilation * (rows // 2), 0)
        conv = nn.Conv2d(4, 8, (rows, columns), stride, padding, dilation, groups, bias).double()
        layers.append(conv)
        total = kernel(conv) if total is None else total.plus(kernel(conv))
    assert total is not None
    images, reach = maps(4, 14, 13), max(dilation * (columns - 1) for _, columns, dilation, _, _ in drawn)
    wanted = 0
    for conv in layers:
        cut = reach - conv.dilation[1] * (conv.kernel_size[1] - 1)
        wanted = wanted + conv(images[..., : 13 - cut])
    assert same(total.as_conv(LIKE)(images), wanted)


def test_a_smaller_kernel_lies_in_the_middle_of_a_larger_one() -> None:
    large = Kernel.of_conv(nn.Conv2d(1, 1, 3, padding=1, bias=False))
    small = Kernel.of_conv(nn.Conv2d(1, 1, 1, bias=False))
    total = large.plus(small)
    assert total.size == (3, 3)
    assert total.start == (-1, -1)
    assert float(total.weight[0, 0, 1, 1]) == pytest.approx(float(large.weight[0, 0, 1, 1] + small.weight[0, 0, 0, 0]))


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), "differ in stride or channels"),
        (nn.Conv2d(4, 8, 3, padding=1), "differ in stride or channels"),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), "continue the map beyond its border in different ways"),
    ],
)
def test_sums_that_are_no_convolution(other: nn.Module, why: str) -> None:
    with pytest.raises(NotOneConvolution, match=why):
        kernel(nn.Conv2d(4, 6, 3, padding=1)).plus(kernel(other))


def test_a_branch_that_leaves_the_border_out_is_no_convolution_alone() -> None:
    cropped = Kernel.of_conv(nn.Conv2d(4, 4, 1), crop=(1, 1))
    assert cropped.start == (1, 1)
    with pytest.raises(NotOneConvolution, match="leave the border"):
        cropped.as_conv(LIKE)


def test_padding_of_a_convolution() -> None:
    assert padding_of(nn.Conv2d(1, 1, 5, padding="same")) == (2, 2)
    assert padding_of(nn.Conv2d(1, 1, (3, 5), padding="valid")) == (0, 0)
    assert padding_of(nn.Conv2d(1, 1, (3, 5), padding=(1, 2))) == (1, 2)
    with pytest.raises(NotOneConvolution, match="more at one side"):
        padding_of(nn.Conv2d(1, 1, 4, padding="same"))
