"""The CIFAR and digits networks against the formulas of the paper, written out again with plain functions."""

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dynamize.errors import DynamizeError
from dynamize.models import REGISTRY, create
from dynamize.models.cifar_resnet import BasicBlock, CifarResNet, PadShortcut

DEPTHS = (20, 32, 44, 56, 110)


def _perturb(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random batch norm statistics, so that a forgotten layer changes the output."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                assert tensor is not None
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.eval()


def _by_hand(state: dict[str, Tensor], images: Tensor, blocks: int) -> Tensor:
    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"])

    x = F.relu(norm(F.conv2d(images, state["conv1.weight"], padding=1), "bn1"))
    for stage in (1, 2, 3):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = F.relu(norm(F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1"))
            y = norm(F.conv2d(y, state[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
            shortcut = torch.zeros_like(y)
            before = (y.shape[1] - x.shape[1]) // 2
            shortcut[:, before : before + x.shape[1]] = x[:, :, ::stride, ::stride]
            x = F.relu(y + shortcut)
    return F.linear(x.mean((2, 3)), state["linear.weight"], state["linear.bias"])


@pytest.mark.parametrize(("name", "shape"), [("cifar_resnet20", (2, 3, 32, 32)), ("digits_resnet", (3, 1, 8, 8))])
def test_equals_the_formula(name: str, shape: tuple[int, ...]) -> None:
    model = _perturb(create(name))
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(images), _by_hand(model.state_dict(), images, 3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("depth", DEPTHS)
def test_depth_counts_weighted_layers(depth: int) -> None:
    model = create(f"cifar_resnet{depth}")
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules()) == depth


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154), (56, 853_018), (110, 1_727_962)])
def test_parameter_counts_are_those_of_the_published_implementation(depth: int, parameters: int) -> None:
    assert sum(p.numel() for p in create(f"cifar_resnet{depth}").parameters()) == parameters


def test_digits_network_is_small() -> None:
    model = create("digits_resnet")
    assert sum(p.numel() for p in model.parameters()) < 120_000
    assert sum(t.numel() * t.element_size() for t in model.state_dict().values()) < 450_000


@pytest.mark.parametrize("name", ["cifar_resnet20", "digits_resnet"])
def test_traces_to_the_same_function_at_any_batch_size(name: str) -> None:
    model = _perturb(create(name))
    traced = fx.symbolic_trace(model)
    shape = (1, 8, 8) if name == "digits_resnet" else (3, 32, 32)
    for batch in (1, 5):
        images = torch.randn(batch, *shape)
        with torch.no_grad():
            assert torch.equal(traced(images), model(images))


def test_arguments_reach_the_layers() -> None:
    model = create("cifar_resnet32", num_classes=7, in_channels=4)
    assert model(torch.zeros(2, 4, 16, 16)).shape == (2, 7)


def test_shortcut_pads_both_sides_and_keeps_odd_sizes() -> None:
    x = torch.arange(2 * 5 * 5, dtype=torch.float32).reshape(1, 2, 5, 5)
    out = PadShortcut(2, 5, 2)(x)
    assert out.shape == (1, 5, 3, 3)
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2])
    assert out[:, [0, 3, 4]].abs().sum() == 0


def test_block_without_change_of_shape_has_an_identity() -> None:
    assert isinstance(BasicBlock(8, 8, 1).shortcut, nn.Identity)
    assert isinstance(BasicBlock(8, 8, 2).shortcut, PadShortcut)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"blocks": (1, 1)}, "three blocks"),
        ({"blocks": (1, 0, 1)}, "positive"),
        ({"blocks": (1, 1, 1), "num_classes": "ten"}, "num_classes='ten'"),
        ({"blocks": (1, 1, 1), "widths": (16, 8, 32)}, "sort them"),
    ],
)
def test_impossible_sizes_are_refused(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(DynamizeError, match=said):
        CifarResNet(**arguments)  # type: ignore[arg-type]


def test_unknown_name_lists_the_names() -> None:
    with pytest.raises(DynamizeError) as caught:
        create("cifar_resnet18")
    assert all(name in str(caught.value) for name in REGISTRY)
