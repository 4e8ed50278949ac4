"""Recording which way each image takes."""

import pytest
import torch
from gated_networks import gated_resnet, split_exits
from networks import SmallResNet, dense, set_thresholds, split_at, with_exits

from dynamize.nn.network import record_routing
from dynamize.nn.routing import Routing


def images(count: int = 6) -> torch.Tensor:
    return torch.randn(count, *SmallResNet.shape, generator=torch.Generator().manual_seed(count))


def test_batches_are_recorded_in_order() -> None:
    dynamic = with_exits()
    split_at(dynamic, images(8), [0.5, 0.5])
    wanted = dense(dynamic, images(8)).exits_N
    with record_routing(dynamic) as routing:
        dynamic(images(8)[:3])
        dynamic(images(8)[3:])
    assert routing.images == 8
    assert torch.equal(routing.exits, wanted)
    assert routing.shares(3) == pytest.approx([float((wanted == k).double().mean()) for k in range(3)])


def test_nothing_is_recorded_outside() -> None:
    dynamic = with_exits()
    with record_routing(dynamic) as routing:
        pass
    dynamic(images())
    assert routing.exits.tolist() == []
    assert routing.shares(3) == [0, 0, 0]
    assert dynamic.routing is None


def test_recording_ends_when_the_body_fails() -> None:
    dynamic = with_exits()
    with pytest.raises(RuntimeError), record_routing(dynamic):
        dynamic(torch.zeros(1, 4, 16, 16))
    assert dynamic.routing is None


def test_the_inner_recording_sees_its_own_batches_only() -> None:
    dynamic = with_exits()
    with record_routing(dynamic) as outer:
        dynamic(images(2))
        with record_routing(dynamic) as inner:
            dynamic(images(3))
        dynamic(images(4))
    assert (outer.images, inner.images) == (6, 3)
    assert (len(outer.exits), len(inner.exits)) == (6, 3)
    assert dynamic.routing is None


def test_training_takes_no_decisions() -> None:
    dynamic = with_exits().train()
    with record_routing(dynamic) as routing:
        dynamic(images())
    assert routing == Routing(("exit.1", "exit.2"))
    assert (routing.images, routing.exits.tolist()) == (0, [])


def test_options_by_the_names_of_their_decisions() -> None:
    network = gated_resnet({}, keep_first=False)
    split_exits(network, images(16))
    with torch.no_grad(), record_routing(network) as routing:
        network(images(16))
    assert list(routing.taken) == ["exit.1", "exit.2", *(unit.name for unit in network.changing)]
    assert routing.exits.unique().tolist() == [0, 1, 2]
    first, second = routing.taken["exit.1"], routing.taken["exit.2"]  # 0: leaves, 1: goes on, -1: not reached
    assert torch.equal(first == 0, routing.exits == 0)
    assert torch.equal(second, torch.tensor([-1, 0, 1])[routing.exits])
    columns = [routing.taken[unit.name] for unit in network.changing]
    assert torch.equal(torch.stack(columns, 1), routing.choices)


def test_batches_that_leave_early_and_others_are_recorded_side_by_side() -> None:
    network = gated_resnet({})
    with torch.no_grad(), record_routing(network) as routing:
        set_thresholds(network, [float("-inf"), None])
        network(images(3))
        set_thresholds(network, [None, None])
        network(images(2))
    assert routing.exits.tolist() == [0, 0, 0, 2, 2]
    assert routing.choices.shape == (5, 5)
    assert (routing.choices[:3, 1:] == -1).all()
    assert (routing.choices[:3, 0] >= 0).all()
    assert (routing.choices[3:] >= 0).all()
