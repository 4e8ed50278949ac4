"""The converted network as an ordinary module: training, gradients, copies, state and operating points."""

import copy

import pytest
import torch
from networks import SmallResNet, close, dense, small_resnet, split_at, with_exits
from torch import nn

from dynamize.calibration.points import OperatingPoint, OperatingPoints
from dynamize.conversion import convert, wrap
from dynamize.errors import DynamizeError
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.routing import Routing, record_routing
from dynamize.transforms import Exits


def images(count: int = 6) -> torch.Tensor:
    return torch.randn(count, *SmallResNet.shape, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("chain", [False, True])
def test_training_returns_every_exit_and_reaches_every_parameter(chain: bool) -> None:
    dynamic = with_exits(chain=chain).train()
    logits = dynamic(images())
    assert isinstance(logits, list)
    assert [tuple(one.shape) for one in logits] == [(6, 7)] * 3
    sum(one.square().sum() for one in logits).backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in dynamic.parameters())


def test_training_ignores_thresholds() -> None:
    dynamic = with_exits().train()
    dynamic.thresholds = [float("-inf"), float("-inf")]
    assert len(dynamic(images())) == 3


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
    dynamic.segments[-1].dropout.eval()
    dynamic.zero_grad()
    logits = dynamic(images().double())
    sum(weight * one.square().mean() for weight, one in zip(weights, logits, strict=True)).backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in dynamic.named_parameters()}


@pytest.mark.parametrize("chain", [False, True])
def test_gradient_equilibrium_averages_the_exits_behind_each_segment(chain: bool) -> None:
    """IMTA, sec. 3.2: what reaches segment k is the sum over the exits behind it divided by their number, K - k;
    the heads get their own exit's gradient as it is."""
    dynamic = with_exits(chain=chain).double()
    single = [gradients(dynamic, [float(j == k) for j in range(3)]) for k in range(3)]
    dynamic.gradient_equilibrium = True
    together = gradients(dynamic, [1.0, 1.0, 1.0])
    for name, found in together.items():
        wanted = single[0][name] + single[1][name] + single[2][name]
        if name.startswith("segments."):
            wanted = wanted / (3 - int(name.split(".")[1]))
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12), name


def test_gradient_equilibrium_changes_no_answer() -> None:
    dynamic = with_exits()
    plain = dynamic.all_exits(images())
    dynamic.gradient_equilibrium = True
    assert all(torch.equal(a, b) for a, b in zip(dynamic.all_exits(images()), plain, strict=True))


@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_in_eval_mode_are_those_of_the_exits_taken(chain: bool, frozen: bool) -> None:
    dynamic, batch = with_exits(chain=chain).double(), images(9).double()
    dynamic.segments.requires_grad_(not frozen)
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
    first.thresholds = second.thresholds = [0.5, 0.5]
    assert torch.equal(second(images()), first(images()))
    assert torch.equal(second.temperatures, first.temperatures)


def test_every_tensor_of_the_original_is_in_the_state_dict_once() -> None:
    original, found = small_resnet().state_dict(), with_exits().state_dict()
    names = [name.split(".", 2)[2] for name in found if name.startswith("segments.")]
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
    copied.thresholds[0] = None
    assert torch.equal(dynamic(images()), wanted)
    assert copied.history == dynamic.history


def test_a_deep_copy_keeps_layers_shared_between_segments_shared() -> None:
    class Shared(SmallResNet):
        def __init__(self) -> None:
            super().__init__()
            self.layer1[1] = self.layer1[0]

    dynamic = convert(Shared().eval(), [Exits(at=["stem", "relu_3"], share=1.0)], SmallResNet.shape)
    assert dynamic.segments[1].layer1 is not None
    copied = copy.deepcopy(dynamic)
    assert len(list(copied.parameters())) == len(list(dynamic.parameters()))
    assert torch.equal(copied(images()), dynamic(images()))


class TestRouting:
    def test_batches_are_recorded_in_order(self) -> None:
        dynamic = with_exits()
        split_at(dynamic, images(8), [0.5, 0.5])
        wanted = dense(dynamic, images(8)).exits_N
        with record_routing(dynamic) as routing:
            dynamic(images(8)[:3])
            dynamic(images(8)[3:])
        assert [len(batch) for batch in routing.batches] == [3, 5]
        assert torch.equal(routing.exits, wanted)
        assert routing.shares(3) == pytest.approx([float((wanted == k).double().mean()) for k in range(3)])

    def test_nothing_is_recorded_outside(self) -> None:
        dynamic = with_exits()
        with record_routing(dynamic) as routing:
            pass
        dynamic(images())
        assert routing.exits.tolist() == []
        assert routing.shares(3) == [0, 0, 0]
        assert dynamic.routing is None

    def test_recording_ends_when_the_body_fails(self) -> None:
        dynamic = with_exits()
        with pytest.raises(RuntimeError), record_routing(dynamic):
            dynamic(torch.zeros(1, 4, 16, 16))
        assert dynamic.routing is None

    def test_the_inner_recording_sees_its_own_batches_only(self) -> None:
        dynamic = with_exits()
        with record_routing(dynamic) as outer:
            dynamic(images(2))
            with record_routing(dynamic) as inner:
                dynamic(images(3))
            dynamic(images(4))
        assert ([len(b) for b in outer.batches], [len(b) for b in inner.batches]) == ([2, 4], [3])

    def test_training_takes_no_decisions(self) -> None:
        dynamic = with_exits().train()
        with record_routing(dynamic) as routing:
            dynamic(images())
        assert routing == Routing()


def point(name: str, thresholds: list[float | None]) -> OperatingPoint:
    return OperatingPoint(
        name=name,
        thresholds=thresholds,
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
        assert (dynamic.thresholds, dynamic.operating_point) == ([0.25, None], chosen)
        dynamic.set_operating_point(None)
        assert (dynamic.thresholds, dynamic.operating_point) == ([None, None], None)
        dynamic.set_operating_point(chosen)
        dynamic.thresholds[0] = None
        assert chosen.thresholds == [0.25, None]

    def test_no_points_yet(self) -> None:
        with pytest.raises(DynamizeError, match="no operating points yet: run the `calibrate` step"):
            with_exits().set_operating_point("half")

    def test_unknown_name_leaves_everything_as_it_was(self) -> None:
        dynamic = with_exits()
        dynamic.operating_points = OperatingPoints((point("half", [0.5, 0.5]),))
        dynamic.set_operating_point("half")
        with pytest.raises(DynamizeError, match="'third'.*half"):
            dynamic.set_operating_point("third")
        assert dynamic.thresholds == [0.5, 0.5]

    def test_of_another_network(self) -> None:
        with pytest.raises(DynamizeError, match="has 3 thresholds, the network 2 early exits: calibrate"):
            with_exits().set_operating_point(point("three", [0.1, 0.2, 0.3]))


def test_segments_and_heads_must_match() -> None:
    with pytest.raises(ValueError, match="2 segments need 1 heads, given 0"):
        DynamicNetwork([nn.Identity(), nn.Identity()], input_shape=(3, 8, 8))
