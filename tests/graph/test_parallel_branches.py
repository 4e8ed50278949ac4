"""Parallel linear branches are found by the shape of the graph, and one convolution answers as they did."""

import pytest
import torch
from networks import close, randomise_norms, small_resnet, torchvision_network
from torch import Tensor, fx, nn

from dynamize.errors import DynamizeError
from dynamize.graph.parallel import fuse, parallel_branches
from dynamize.graph.trace import annotate, trace

SHAPE = (4, 9, 9)


class Classified(nn.Module):
    """A block between two activations and a classifier behind it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.first, self.block, self.linear = nn.Conv2d(4, 4, 1), block, nn.LazyLinear(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.block(torch.tanh(self.first(x)))).mean((2, 3)))


def conv_norm(inputs: int, outputs: int, size: int = 3, stride: int = 1, **fields: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False, **fields)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Sum(nn.Module):
    """A sum of branches as people write it."""

    def __init__(self, *branches: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.branches, self.norm = nn.ModuleList(branches), norm or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(sum(branch(x) for branch in self.branches))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv_norm(4, 4), conv_norm(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        out = self.a(x)
        out += self.b(x)
        return out.add(self.c(x)) + x


class Dbb(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kxk = conv_norm(4, 6)
        self.deep = nn.Sequential(nn.Conv2d(4, 3, 1, bias=False), nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.mean = nn.Sequential(nn.Conv2d(4, 6, 1, bias=False), nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.kxk(x), self.deep(x)) + self.mean(x)


BLOCKS = {
    "two": (Sum(conv_norm(4, 6), conv_norm(4, 6, 1)), 1),
    "strided": (Sum(conv_norm(4, 6, 5, 2), conv_norm(4, 6, 1, 2), conv_norm(4, 6, 3, 2)), 1),
    "identity": (Sum(conv_norm(4, 4), nn.Identity()), 1),
    "norm": (Sum(conv_norm(4, 4), nn.BatchNorm2d(4), nn.Dropout(0.0)), 1),
    "depthwise": (Sum(conv_norm(4, 4, groups=4), conv_norm(4, 4, 1, groups=4), nn.Identity()), 1),
    "grouped": (Sum(conv_norm(4, 4, groups=2), nn.BatchNorm2d(4)), 1),
    "norm behind": (Sum(conv_norm(4, 4), conv_norm(4, 4, 1), nn.Identity(), norm=nn.BatchNorm2d(4)), 1),
    "in place": (InPlace(), 1),
    "dbb": (Dbb(), 1),
    "nested": (Sum(Sum(conv_norm(4, 4), nn.Identity()), conv_norm(4, 4, 1)), 1),
    "twice": (nn.Sequential(Sum(conv_norm(4, 4), nn.Identity()), nn.ReLU(), Sum(conv_norm(4, 4), nn.Identity())), 2),
    "one after the other": (nn.Sequential(Sum(conv_norm(4, 4), nn.Identity()), Sum(conv_norm(4, 4), nn.Identity())), 2),
    "inside of a block": (Sum(nn.Sequential(Sum(conv_norm(4, 4), nn.Identity()), nn.ReLU()), nn.Identity()), 1),
}


def traced(block: nn.Module) -> tuple[nn.Module, fx.GraphModule]:
    network = Classified(block).eval()
    network(torch.zeros(1, *SHAPE))
    randomise_norms(network)
    return network, trace(network, SHAPE)


def convolutions(module: nn.Module) -> int:
    return sum(isinstance(one, nn.Conv2d) for one in module.modules())


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_become_convolutions(name: str) -> None:
    block, count = BLOCKS[name]
    network, plain = traced(block)
    names = {node.name for node in plain.graph.nodes}
    macs = sum(node.meta["macs"] for node in plain.graph.nodes)
    found, _ = parallel_branches(plain)
    assert len(found) == count
    fuse(plain, found)
    annotate(plain, SHAPE)
    assert {node.name for node in plain.graph.nodes} <= names
    assert {one.name for one in found} <= names
    assert convolutions(plain) == count + 1
    assert not any(isinstance(one, nn.BatchNorm2d) for one in plain.modules())
    assert sum(node.meta["macs"] for node in plain.graph.nodes) <= macs
    images = torch.randn(3, *SHAPE)
    with torch.no_grad():
        assert close(plain(images), network(images))
    assert parallel_branches(plain)[0] == []


@pytest.mark.parametrize(
    ("block", "why"),
    [
        (Sum(conv_norm(4, 6), nn.Sequential(nn.Conv2d(4, 3, 1), nn.Conv2d(3, 6, 3, padding=1))), "pads with zeros"),
        (Sum(conv_norm(4, 4), nn.Sequential(conv_norm(4, 4), conv_norm(4, 4))), "neither looks at single pixels"),
        (Sum(conv_norm(4, 4, groups=4), conv_norm(4, 4, 1)), "one convolution would cost more"),
        (Sum(nn.BatchNorm2d(4), nn.Identity()), "one convolution would cost more"),
        (Sum(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.AvgPool2d(3, 1, 1)), "in different ways"),
        (Sum(nn.Conv2d(4, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())), None),
        (Sum(nn.Conv2d(4, 4, 1), nn.Dropout(0.1)), None),
    ],
)
def test_what_is_no_convolution_stays(block: nn.Module, why: str | None) -> None:
    network, plain = traced(block)
    found, refused = parallel_branches(plain)
    assert found == []
    assert [why in reason for reason in refused.values()] == ([True] if why else [])


class Shared(nn.Module):
    """Branches that something else reads too, or that are called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        x = torch.tanh(a + self.b(x)) * a
        return torch.tanh(self.c(x) + x) + torch.tanh(self.c(x) - x)


def test_what_others_read_stays() -> None:
    assert parallel_branches(traced(Shared())[1]) == ([], {})


def test_residual_networks_have_none() -> None:
    for network, shape in ((small_resnet(), (3, 16, 16)), (torchvision_network("mobilenet_v3_small"), (3, 64, 64))):
        assert parallel_branches(trace(network, shape)) == ([], {})


def test_a_wrong_kernel_is_refused_and_nothing_changes() -> None:
    network, plain = traced(
        nn.Sequential(Sum(conv_norm(4, 6), conv_norm(4, 6, 1)), nn.ReLU(), Sum(conv_norm(6, 6), conv_norm(6, 6, 1)))
    )
    found, _ = parallel_branches(plain)
    code, modules = plain.code, dict(plain.named_modules())
    found[1].kernel.weight[0, 0, 0, 0] += 1e-3
    with pytest.raises(DynamizeError, match=r"cannot be replaced: the new layer differs from it by"):
        fuse(plain, found)
    assert plain.code == code
    assert dict(plain.named_modules()) == modules
    images = torch.randn(2, *SHAPE)
    assert torch.equal(plain(images), network(images))


@pytest.mark.parametrize(("name", "blocks"), [("repvgg_a0", 22), ("mobileone_s0", 43)])
@pytest.mark.fast("repvgg_a0-22")
def test_networks_of_timm(name: str, blocks: int) -> None:
    timm = pytest.importorskip("timm", reason="needs timm, for networks that others re-parameterise")
    torch.manual_seed(0)
    network = randomise_norms(timm.create_model(name, num_classes=10)).eval()
    plain = trace(network, (3, 64, 64))
    found, refused = parallel_branches(plain)
    assert refused == {}
    assert len(found) == blocks
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = plain(images)
        fuse(plain, found)
        assert close(plain(images), wanted)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
