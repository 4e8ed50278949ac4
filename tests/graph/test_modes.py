"""What depends on the training flag: kept in the traced network, or refused."""

import copy
import random
from collections.abc import Callable

import pytest
import torch
from networks import conv_block
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import stochastic_depth

from dynamize.errors import DynamizeError
from dynamize.graph.modes import Dropping
from dynamize.graph.trace import trace

SHAPE = (3, 8, 8)
Drop = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """A residual block whose branch goes through ``drop``."""

    def __init__(self, drop: Drop) -> None:
        super().__init__()
        self.drop, self.share = drop, 0.5
        self.a, self.b, self.linear = conv_block(3, 8), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x + self.drop(self, self.b(x))
        return self.linear(x.mean((2, 3)))


def drop_connect(net: Net, x: Tensor) -> Tensor:
    if not net.training:
        return x
    keep = 1 - net.share
    mask = torch.floor(keep + torch.rand([x.shape[0], 1, 1, 1], dtype=x.dtype, device=x.device))
    return x / keep * mask


def drop_in_place(net: Net, x: Tensor) -> Tensor:
    if net.training:
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - net.share)
        mask.div_(1 - net.share)  # the result has no name
        x = x * mask
    return x


def by_python(net: Net, x: Tensor) -> Tensor:
    return x * 0 if net.training and random.random() < net.share else x


FUNCTIONS: dict[str, Drop] = {
    "dropout": lambda net, x: F.dropout(x, p=net.share, training=net.training),
    "dropout2d": lambda net, x: F.dropout2d(x, net.share, net.training),
    "alpha": lambda net, x: F.alpha_dropout(x, net.share, net.training),
    "feature_alpha": lambda net, x: F.feature_alpha_dropout(x, net.share, net.training),
    "torch": lambda net, x: torch.dropout(x, net.share, net.training),
    "stochastic_depth": lambda net, x: stochastic_depth(x, net.share, "row", net.training),
    "noise": lambda net, x: x + torch.randn_like(x) if net.training else x,
    "drop_connect": drop_connect,
    "drop_in_place": drop_in_place,
}


def frozen_norms(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return network


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_dropped_in_training_is_dropped_alike_behind_the_trace(name: str) -> None:
    network, images = Net(FUNCTIONS[name]), torch.randn(8, *SHAPE)
    traced = trace(network, SHAPE)
    assert torch.equal(traced(images), network.eval()(images))
    spreads = []
    for module in (network, copy.deepcopy(traced)):
        frozen_norms(module.train())
        torch.manual_seed(0)
        spreads.append(torch.stack([module(images).detach() for _ in range(200)]).std(0).mean())
    assert spreads[0] > 0
    assert torch.allclose(spreads[0], spreads[1], rtol=0.05)


def test_a_dropout_function_becomes_the_module_and_code_a_leaf() -> None:
    plain, code = (trace(Net(FUNCTIONS[name]), SHAPE) for name in ("dropout", "drop_connect"))
    assert [layer.p for layer in plain.modules() if isinstance(layer, nn.Dropout)] == [0.5]
    assert any(isinstance(layer, Dropping) for layer in code.modules())
    assert code.state_dict().keys() == Net(drop_connect).state_dict().keys()


def test_a_decision_by_a_python_number_keeps_its_module_whole_or_is_refused() -> None:
    with pytest.raises(DynamizeError, match="asks a random number what to do.*module of its own"):
        trace(Net(by_python), SHAPE)

    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 0 if self.training and random.random() < 0.5 else x

    network = Net(lambda net, x: net.own(x))  # type: ignore[operator]
    network.own = Own()
    assert any(isinstance(layer, Own) for layer in trace(network, SHAPE).modules())


def test_a_batch_norm_that_is_called_as_a_function_goes_on_learning_its_statistics() -> None:
    class Functional(Net):
        def __init__(self) -> None:
            super().__init__(lambda net, x: F.batch_norm(x, net.mean, net.var, None, None, net.training, 0.1))  # type: ignore[arg-type]
            self.register_buffer("mean", torch.zeros(8))
            self.register_buffer("var", torch.ones(8))

    network, images = Functional(), torch.randn(8, *SHAPE)
    traced = trace(network, SHAPE)
    assert torch.equal(traced(images), network.eval()(images))
    for module in (network, traced):
        module.train()(images)
    assert torch.allclose(traced.mean, network.mean)
    assert not torch.equal(traced.mean, torch.zeros(8))


def test_a_norm_that_computes_its_statistics_in_code_stays_whole() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.mean.mul_(0.9).add_(0.1 * x.mean((0, 2, 3)).detach())
            return x - self.mean[:, None, None]

    network = Net(lambda net, x: net.norm(x))  # type: ignore[operator]
    network.norm = Norm()
    traced = trace(network, SHAPE).train()
    traced(torch.randn(4, *SHAPE))
    assert not torch.equal(traced.norm.mean, torch.zeros(8))


def test_batch_norms_that_an_own_train_freezes_stay_frozen() -> None:
    class Freezes(Net):
        def train(self, mode: bool = True) -> None:  # type: ignore[override]  # people forget to return it
            frozen_norms(super().train(mode))

    traced = copy.deepcopy(trace(Freezes(lambda net, x: x), SHAPE)).train()
    before = traced.a.get_submodule("1").running_mean.clone()
    traced(torch.randn(4, *SHAPE))
    assert torch.equal(traced.a.get_submodule("1").running_mean, before)
    assert traced.linear.training


def test_what_training_returns_besides_the_scores_is_left_out_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    class Auxiliary(Net):
        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
            scores = super().forward(x)
            return (scores, self.linear(self.a(x).amax((2, 3)))) if self.training else scores

    traced = trace(Auxiliary(lambda net, x: x), SHAPE).train()
    assert traced(torch.randn(2, *SHAPE)).shape == (2, 5)
    assert "in training the network returns 2 values" in caplog.text
