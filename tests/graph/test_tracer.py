"""Questions about sizes that are answered while a network is read."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from networks import ThreeLayer, conv_block
from torch import Tensor, nn

from dynamize.errors import DynamizeError
from dynamize.graph.cuts import cut_points
from dynamize.graph.trace import trace


class Base(ThreeLayer):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grid", torch.randn(1, 1, 8, 8))
        self.halves = nn.ModuleList(conv_block(2, 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv2(self.middle(self.conv1(x))).mean((2, 3)))

    def middle(self, x: Tensor) -> Tensor:
        return x


class Chunks(Base):
    def middle(self, x: Tensor) -> Tensor:
        parts = list(x.chunk(2, 1))
        parts.append(self.halves[0](parts[-1]))
        return torch.cat(parts[1:], 1)


class Splits(Base):
    def middle(self, x: Tensor) -> Tensor:
        return torch.cat([half(part) for half, part in zip(self.halves, x.split(x.shape[1] // 2, 1), strict=True)], 1)


class Expands(Base):
    def middle(self, x: Tensor) -> Tensor:
        return x + self.grid.expand(x.shape[0], -1, -1, -1)


class Creates(Base):
    def middle(self, x: Tensor) -> Tensor:
        return x + torch.ones(x.shape[0], x.shape[1], 1, 1, device=x.device, dtype=x.dtype)


class Asks(Base):
    def middle(self, x: Tensor) -> Tensor:
        for _ in range(x.shape[1] // 2):
            x = x * 2 if x.shape[-1] % 2 == 0 and len(x.shape) == 4 else x
        return x + 1 if x.shape == x.relu().shape else x


class Slices(Base):
    def middle(self, x: Tensor) -> Tensor:
        return nn.Sequential(*self.halves)[:1](x[:, :2]).repeat(1, 2, 1, 1)


@pytest.mark.parametrize("kind", [Chunks, Splits, Expands, Creates, Asks, Slices])
def test_sizes_are_known_while_a_network_is_read(kind: type[Base]) -> None:
    network, images = kind().eval(), torch.randn(5, 3, 8, 8)
    assert torch.equal(trace(network, Base.shape)(images), network(images))


def test_a_question_about_the_number_of_images_is_refused() -> None:
    class Lone(Base):
        def middle(self, x: Tensor) -> Tensor:
            return x * 2 if x.shape[0] == 1 else x

    with pytest.raises(DynamizeError, match="cannot be traced: the top module"):
        trace(Lone(), Base.shape)


def test_sizes_read_first_are_read_again_behind_a_cut() -> None:
    class First(Base):
        def forward(self, x: Tensor) -> Tensor:
            n, size = x.size(0), x.shape[-2:]
            x = self.conv2(self.conv1(x))
            x = nn.functional.interpolate(x, size=size)
            return self.linear(x.view(n * 2, -1, size[0]).mean(2).view(n, 8, -1).mean(2))

    network, images = First().eval(), torch.randn(5, 3, 8, 8)
    traced = trace(network, Base.shape)
    assert torch.equal(traced(images), network(images))
    assert [cut.name for cut in cut_points(traced)] == ["conv1", "interpolate"]


def test_threads_read_networks_while_others_draw_at_random() -> None:
    networks = [ThreeLayer().eval() for _ in range(12)]
    images = torch.randn(2, *ThreeLayer.shape)
    wanted = [network(images) for network in networks]

    def read(network: nn.Module) -> Tensor:
        torch.nn.init.normal_(torch.empty(1000))
        return trace(network, ThreeLayer.shape)(images)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(read, networks))
    assert all(map(torch.equal, found, wanted))
