"""The converted network as an ordinary module: training, gradients, copies, state and operating points."""

import copy

import pytest
import torch
from networks import (
    SmallResNet,
    close,
    dense,
    set_thresholds,
    small_resnet,
    split_at,
    temperatures,
    thresholds,
    with_exits,
)

from dynamize.calibration.operating import OperatingPoint, OperatingPoints
from dynamize.conversion import convert, wrap
from dynamize.errors import DynamizeError
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Dense, Static
from dynamize.transforms import Exits


def images(count: int = 6) -> torch.Tensor:
    return torch.randn(count, *SmallResNet.shape, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("chain", [False, True])
def test_training_returns_every_exit_and_reaches_every_parameter(chain: bool) -> None:
    dynamic = with_exits(chain=chain).train()
    logits = dynamic(images())
    assert isinstance(logits, Dense)
    assert logits.shares == {}
    assert [tuple(one.shape) for one in logits.logits] == [(6, 7)] * 3
    sum(one.square().sum() for one in logits.logits).backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in dynamic.parameters())


def test_training_ignores_thresholds() -> None:
    dynamic = with_exits().train()
    set_thresholds(dynamic, [float("-inf"), float("-inf")])
    assert [tuple(one.shape) for one in dynamic(images()).logits] == [(6, 7)] * 3


def test_a_network_without_exits_returns_its_logits_in_either_mode() -> None:
    network = small_resnet()
    plain = wrap(network, SmallResNet.shape)
    assert plain.exit_count == 1
    assert torch.equal(plain(images()), network(images()))
    assert plain.train()(images()).shape == (6, 7)


def test_wrapping_twice_is_a_copy() -> None:
    dynamic = with_exits()
    again = wrap(dynamic, SmallResNet.shape)
    assert again is not dynamic
    assert not {p.data_ptr() for p in again.parameters()} & {p.data_ptr() for p in dynamic.parameters()}


def gradients(dynamic: DynamicNetwork, weights: list[float]) -> dict[str, torch.Tensor]:
    """Of a weighted sum of one loss per exit, in training mode without dropout."""
    dynamic.train()
    dynamic.plain.get_submodule("dropout").eval()
    dynamic.zero_grad()
    logits = dynamic(images().double()).logits
    sum(weight * one.square().mean() for weight, one in zip(weights, logits, strict=True)).backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in dynamic.named_parameters()}


def static_owners(dynamic: DynamicNetwork) -> dict[str, int]:
    """Number of the static piece that computes with each parameter of the original network."""
    modules = [piece.module for piece in dynamic.row if isinstance(piece, Static)]
    owners = {id(parameter): k for k, module in enumerate(modules) for parameter in module.parameters()}
    return {name: owners[id(value)] for name, value in dynamic.named_parameters() if id(value) in owners}


@pytest.mark.parametrize("chain", [False, True])
def test_gradient_equilibrium_averages_the_exits_behind_each_piece(chain: bool) -> None:
    """IMTA, sec. 3.2: what reaches static piece k is the sum over the exits behind it divided by their number, K - k;
    the heads get their own exit's gradient as it is."""
    dynamic = with_exits(chain=chain).double()
    single = [gradients(dynamic, [float(j == k) for j in range(3)]) for k in range(3)]
    dynamic.choose.equilibrium = True
    static = static_owners(dynamic)
    assert set(static.values()) == {0, 1, 2}
    together = gradients(dynamic, [1.0, 1.0, 1.0])
    for name, found in together.items():
        wanted = single[0][name] + single[1][name] + single[2][name]
        assert (name in static) == name.startswith("nets.main.")
        if name in static:
            wanted = wanted / (3 - static[name])
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12), name


def test_gradient_equilibrium_changes_no_answer() -> None:
    dynamic = with_exits()
    plain = dynamic.all_exits(images())
    dynamic.choose.equilibrium = True
    assert all(torch.equal(a, b) for a, b in zip(dynamic.all_exits(images()), plain, strict=True))


@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_in_eval_mode_are_those_of_the_exits_taken(chain: bool, frozen: bool) -> None:
    dynamic, batch = with_exits(chain=chain).double(), images(9).double()
    dynamic.nets.requires_grad_(not frozen)
    split_at(dynamic, batch, [0.4, 0.5])
    taken = dense(dynamic, batch).exits_N
    assert set(taken.tolist()) == {0, 1, 2}

    def gradient_of(answer: object) -> list[torch.Tensor]:
        dynamic.zero_grad()
        given = batch.clone().requires_grad_(not frozen)
        answer(given).square().sum().backward()  # type: ignore[operator]
        return [given.grad, *(p.grad for p in dynamic.parameters())]

    routed = gradient_of(dynamic)
    wanted = gradient_of(lambda given: torch.stack(dynamic.all_exits(given))[taken, torch.arange(9)])
    assert any(gradient is not None for gradient in routed)
    for found, expected in zip(routed, wanted, strict=True):
        assert (found is None) == (expected is None)
        # a chained context is detached in training: what earlier heads pooled is an input there, not a way back
        assert found is None or chain or close(found, expected, 1e-9)


def test_state_dict_round_trip() -> None:
    first, second = with_exits(seed=1), with_exits(seed=2)
    assert not torch.equal(first(images()), second(images()))
    second.load_state_dict(first.state_dict())
    set_thresholds(first, [0.5, 0.5])
    set_thresholds(second, [0.5, 0.5])
    assert torch.equal(second(images()), first(images()))
    assert torch.equal(temperatures(second), temperatures(first))


def test_every_tensor_of_the_original_is_in_the_state_dict_once() -> None:
    original, found = small_resnet().state_dict(), with_exits().state_dict()
    names = [name.removeprefix("nets.main.") for name in found if name.startswith("nets.")]
    assert sorted(names) == sorted(original)


def test_a_deep_copy_is_independent_and_the_same() -> None:
    dynamic = with_exits(chain=True)
    split_at(dynamic, images(), [0.5, 0.5])
    copied = copy.deepcopy(dynamic)
    wanted = dynamic(images())
    assert torch.equal(copied(images()), wanted)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    set_thresholds(copied, [None, None])
    assert torch.equal(dynamic(images()), wanted)
    assert copied.history == dynamic.history


def test_a_deep_copy_keeps_layers_shared_between_pieces_shared() -> None:
    class Shared(SmallResNet):
        def __init__(self) -> None:
            super().__init__()
            self.layer1[1] = self.layer1[0]

    dynamic = convert(Shared().eval(), [Exits(at=["stem", "relu"], share=1.0)], SmallResNet.shape)
    copied = copy.deepcopy(dynamic)
    for network in (dynamic, copied):
        _, second, third = (set(piece.module.parameters()) for piece in network.row if isinstance(piece, Static))
        assert second < third
    assert len(list(copied.parameters())) == len(list(dynamic.parameters()))
    assert torch.equal(copied(images()), dynamic(images()))


def point(name: str, values: list[float | None]) -> OperatingPoint:
    return OperatingPoint(
        name=name,
        thresholds={f"exit.{k}": value for k, value in enumerate(values, start=1)},
        accuracy=0.9,
        accuracy_ci=(0.8, 1.0),
        accuracy_drop=0.0,
        accuracy_drop_ci=(-0.1, 0.1),
        macs=10.0,
        macs_ci=(9.0, 11.0),
        macs_ratio=0.5,
        exits=[0.5, 0.3, 0.2],
    )


class TestOperatingPoints:
    def test_by_object_by_name_and_off(self) -> None:
        dynamic, chosen = with_exits(), point("half", [0.25, None])
        dynamic.operating_points = OperatingPoints((chosen, point("full", [None, None])))
        dynamic.set_operating_point("half")
        assert (thresholds(dynamic), dynamic.operating_point) == ([0.25, None], chosen)
        dynamic.set_operating_point(None)
        assert (thresholds(dynamic), dynamic.operating_point) == ([None, None], None)
        dynamic.set_operating_point(chosen)
        set_thresholds(dynamic, [None, None])
        assert chosen.thresholds == {"exit.1": 0.25, "exit.2": None}

    def test_no_points_yet(self) -> None:
        with pytest.raises(DynamizeError, match="no operating points yet: run the `calibrate` step"):
            with_exits().set_operating_point("half")

    def test_unknown_name_leaves_everything_as_it_was(self) -> None:
        dynamic = with_exits()
        dynamic.operating_points = OperatingPoints((point("half", [0.5, 0.5]),))
        dynamic.set_operating_point("half")
        with pytest.raises(DynamizeError, match="'third'.*half"):
            dynamic.set_operating_point("third")
        assert thresholds(dynamic) == [0.5, 0.5]

    def test_of_another_network(self) -> None:
        with pytest.raises(DynamizeError, match="for exit.1, exit.2, exit.3, the network exit.1, exit.2: calibrate"):
            with_exits().set_operating_point(point("three", [0.1, 0.2, 0.3]))
