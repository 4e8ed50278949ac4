"""An artifact loads into the code that it was converted from, and into no other of the same shapes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dynamize as dz
from dynamize.conversion import wrap
from dynamize.errors import DynamizeError
from dynamize.fingerprint import Answers

SHAPE = (3, 12, 12)


class Net(nn.Module):
    """Four layers, and what others may do between them."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.relu, eps: float = 1e-5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3, 2)
        self.norm = nn.BatchNorm2d(8, eps=eps)
        self.head = nn.Linear(12, 5)
        self.between = between

    def forward(self, images: Tensor) -> Tensor:
        features = self.between(self.norm(self.first(images)))
        return self.head(self.between(self.second(features)).mean((2, 3)))


class Scaled(nn.Module):
    """A constant that no state dict holds."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.net = Net()
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images * self.scale)


def saved(net: nn.Module, folder: Path) -> dz.DynamicNetwork:
    made = dz.convert(net.eval(), [dz.Exits(count=1, share=1.0, head="linear")], SHAPE)
    dz.save(made, folder)
    return made


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Net(functional.gelu), Net(lambda x: functional.gelu(x, approximate="tanh"))),
        (Net(functional.leaky_relu), Net(lambda x: functional.leaky_relu(x, 0.02))),
        (Net(), Net(eps=2e-3)),
        (Scaled(torch.ones(1)), Scaled(torch.tensor([1.01]))),
    ],
    ids=["approximation", "slope", "eps", "constant"],
)
def test_other_code_of_the_same_shapes_is_refused(one: nn.Module, other: nn.Module, tmp_path: Path) -> None:
    made = saved(one, tmp_path)
    with pytest.raises(DynamizeError, match="was converted from another network than"):
        dz.load(tmp_path, network=other.eval())
    images = torch.randn(3, *SHAPE)
    assert torch.equal(dz.load(tmp_path, network=one)(images), made.eval()(images))


def test_weights_of_the_given_network_do_not_matter(tmp_path: Path) -> None:
    made, other = saved(Net(), tmp_path), Net()
    nn.init.normal_(other.first.weight)
    images = torch.randn(3, *SHAPE)
    assert torch.equal(dz.load(tmp_path, network=other)(images), made.eval()(images))


def test_an_artifact_without_answers_still_loads(tmp_path: Path) -> None:
    saved(Net(functional.leaky_relu), tmp_path)
    file = tmp_path / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["answers"]
    file.write_text(json.dumps(manifest))
    assert dz.load(tmp_path, network=Net(lambda x: functional.leaky_relu(x, 0.5))).history[0]["pass"] == "exits"


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_type_is_compared_exactly(kind: torch.dtype) -> None:
    answers = Answers.of(wrap(Net().to(kind).eval(), SHAPE))
    assert answers is not None
    assert answers.dtype == "float64"
    assert answers.distance(wrap(Net().to(kind).eval(), SHAPE)) < 1e-9


def test_bytes_are_compared_with_what_rounding_allows(tmp_path: Path) -> None:
    parts = ("train", "calibration", "test")
    data = dz.splits(**{name: (torch.randn(32, *SHAPE), torch.arange(32) % 5) for name in parts})
    net = Net(lambda x: functional.leaky_relu(x, 0.1)).eval()
    made = dz.convert(net, [dz.Quantize(images=32)], SHAPE, dz.Context(data=data, backend="eager"))
    dz.save(made, tmp_path)
    images = torch.randn(3, *SHAPE)
    assert torch.equal(dz.load(tmp_path, network=net)(images), made(images))
    with pytest.raises(DynamizeError, match="another network"):
        dz.load(tmp_path, network=Net(lambda x: functional.leaky_relu(x, 0.3)))
