"""Cut points of networks whose answer is known, and finding them by name."""

import pytest
import torch
from networks import Residual, SmallResNet, ThreeLayer, conv_block, small_resnet
from torch import Tensor, nn
from torch.nn import functional as F

from dynamize.errors import DynamizeError
from dynamize.graph.cuts import CutPoint, cut_points, find_cut
from dynamize.graph.trace import trace


def cuts_of(network: nn.Module, shape: tuple[int, ...] = (3, 8, 8)) -> list[CutPoint]:
    return cut_points(trace(network, shape))


def test_a_straight_net_is_cut_behind_each_activation() -> None:
    assert cuts_of(ThreeLayer()) == [
        CutPoint("relu", "", (4, 8, 8), 6912),
        CutPoint("relu_1", "", (8, 4, 4), 6912 + 4608),
    ]


def test_a_residual_net_is_cut_between_its_blocks_only() -> None:
    cuts = cuts_of(small_resnet(), SmallResNet.shape)
    assert [cut.module for cut in cuts] == [
        "stem", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3.0", "layer3.1",
    ]  # fmt: skip
    assert [cut.shape for cut in cuts][::2] == [(8, 16, 16), (8, 16, 16), (16, 8, 8), (24, 4, 4)]
    assert all(a.macs < b.macs for a, b in zip(cuts, cuts[1:], strict=False))


class LongSkip(nn.Module):
    """The input of b and c is needed again at the end: no cut inside, one before."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (conv_block(i, 8) for i in (3, 8, 8, 8))
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        start = self.a(x)
        x = self.d(self.c(self.b(start)) + start)
        return self.linear(x.mean((2, 3)))


def test_no_cut_inside_a_long_skip() -> None:
    assert [cut.name for cut in cuts_of(LongSkip())] == ["a_2", "add", "d_2"]


def test_the_image_itself_being_used_at_the_end_leaves_no_cut_before_it() -> None:
    class FromTheStart(LongSkip):
        def forward(self, x: Tensor) -> Tensor:
            deep = self.c(self.b(self.a(x)))
            return self.linear(deep.mean((2, 3)) + x.mean((1, 2, 3))[:, None])

    assert cuts_of(FromTheStart()) == []


class Sizes(LongSkip):
    """Shape arithmetic, concatenation and chunks, as ShuffleNet and DenseNet do them."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        batch, channels, height, width = x.size()
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, -1, height, width)
        left, right = x.chunk(2, dim=1)
        x = self.b(torch.cat([left, F.relu(right)], dim=1))
        x = torch.cat([x[:, :4], self.c(x)[:, 4:]], 1)
        x = self.d(x)
        return self.linear(x.view(x.size(0), 8, -1).mean(2))


def test_size_and_cat() -> None:
    assert [cut.name for cut in cuts_of(Sizes())] == ["cat", "b_2", "cat_1", "d_2"]


def test_a_size_that_is_read_early_keeps_no_cut_away() -> None:
    class KeepsBatch(LongSkip):
        def forward(self, x: Tensor) -> Tensor:
            batch = x.size(0)  # would be wrong for whoever is still there after an exit
            return self.linear(self.b(self.a(x)).mean((2, 3)).view(batch, 8))

    assert [cut.name for cut in cuts_of(KeepsBatch())] == ["a_2", "b_2"]


def test_what_shares_memory_with_the_image_is_no_cut() -> None:
    class Crop(LongSkip):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, :, 1:, 1:] * 1.0)

    assert [cut.name for cut in cuts_of(Crop(), (3, 9, 9))] == ["a_2", "add", "d_2"]


def test_an_overwritten_value_is_cut_behind_the_operator_that_overwrites_it() -> None:
    class Inplace(LongSkip):
        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x) - 0.5
            y = F.relu(x, inplace=True)
            return self.linear((x + self.b(y)).mean((2, 3)))

    assert [cut.name for cut in cuts_of(Inplace())] == ["relu", "add"]


def test_pooled_and_integer_values_are_no_cuts() -> None:
    class Pooled(LongSkip):
        def forward(self, x: Tensor) -> Tensor:
            x = F.adaptive_avg_pool2d(self.a(x), 1)
            return self.linear(self.b(x).flatten(1))

    assert [cut.name for cut in cuts_of(Pooled())] == ["a_2"]


def test_a_parameter_used_twice_does_not_join_what_it_touches() -> None:
    class Shift(LongSkip):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.randn(1, 8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            shift = self.shift * 2
            return self.linear(self.c(self.b(self.a(x) + shift) + shift).mean((2, 3)))

    assert [cut.name for cut in cuts_of(Shift())] == ["add", "add_1", "c_2"]


class TestFindCut:
    @pytest.fixture(scope="class")
    def cuts(self) -> list[CutPoint]:
        return cuts_of(small_resnet(), SmallResNet.shape)

    def test_by_node_name(self, cuts: list[CutPoint]) -> None:
        assert [find_cut(cuts, cut.name) for cut in cuts] == cuts

    def test_by_module_path_the_last_inside(self, cuts: list[CutPoint]) -> None:
        assert find_cut(cuts, "layer2").module == "layer2.1"
        assert find_cut(cuts, "layer2.0").module == "layer2.0"

    def test_unknown_name_lists_near_ones(self, cuts: list[CutPoint]) -> None:
        near = cuts[3].name
        with pytest.raises(DynamizeError, match=rf"'{near}x' is no cut point .*Did you mean .*{near}"):
            find_cut(cuts, near + "x")

    def test_a_prefix_of_a_name_is_not_a_path(self, cuts: list[CutPoint]) -> None:
        with pytest.raises(DynamizeError, match="'layer' is no cut point"):
            find_cut(cuts, "layer")


def test_a_block_that_is_the_whole_network_has_no_cut_inside() -> None:
    class OneBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.linear = Residual(3, 3), nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.block(x).mean((2, 3)))

    assert [cut.module for cut in cuts_of(OneBlock())] == ["block"]
