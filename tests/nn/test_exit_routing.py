"""Promise 1: nothing changes until exits are on. Promise 2: what is skipped is not executed, image by image."""

import copy
import math

import pytest
import torch
from networks import (
    SmallResNet,
    close,
    dense,
    set_thresholds,
    small_resnet,
    split_at,
    thresholds,
    torchvision_network,
    with_exits,
)
from torch import nn

from dynamize.conversion import convert
from dynamize.graph.cuts import cut_points
from dynamize.graph.macs import count_macs
from dynamize.graph.trace import trace
from dynamize.nn.exits import Fusion
from dynamize.nn.network import DynamicNetwork, record_routing
from dynamize.transforms import Exits

HEADS = [
    {"head": "linear"},
    {"head": "conv", "size": [16, 16]},
    {"head": "tail", "size": [1, 0]},
    {"head": "conv", "chain": True},
    {"head": "tail", "chain": True, "confidence": "entropy"},
    {"head": "linear", "confidence": "margin"},
]


def images(count: int) -> torch.Tensor:
    return torch.randn(count, *SmallResNet.shape, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("fields", HEADS)
@pytest.mark.fast("fields0", "fields2", "fields4")
def test_with_exits_off_the_answers_are_bit_equal(fields: dict) -> None:
    network = small_resnet()
    dynamic = convert(network, [Exits.model_validate({"at": ["layer1", "layer2"], "share": 1.0} | fields)], (3, 16, 16))
    assert thresholds(dynamic) == [None, None]
    for count in (1, 5):
        assert torch.equal(dynamic(images(count)), network(images(count)))


@pytest.mark.parametrize(
    ("name", "head"),
    [("resnet18", "conv"), ("mobilenet_v2", "linear"), ("shufflenet_v2_x0_5", "conv"), ("squeezenet1_1", "linear")],
)
@pytest.mark.fast("mobilenet_v2-linear", "squeezenet1_1-linear")
def test_torchvision_networks_are_bit_equal(name: str, head: str) -> None:
    network, batch = torchvision_network(name), torch.randn(2, 3, 64, 64)
    dynamic = convert(network, [Exits(count=3, head=head, share=0.3)], (3, 64, 64))
    assert len(dynamic.leaving) == 3
    with torch.no_grad():
        assert torch.equal(dynamic(batch), network(batch))


def test_converting_leaves_the_network_alone() -> None:
    network = small_resnet().train()
    before = copy.deepcopy(network.state_dict())
    dynamic = convert(network, [Exits(share=0.5)], SmallResNet.shape)
    assert network.training
    assert dynamic.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    own = {parameter.data_ptr() for parameter in network.parameters()}
    assert not own & {parameter.data_ptr() for parameter in dynamic.parameters()}
    assert torch.equal(dynamic.eval()(images(3)), network.eval()(images(3)))


def test_converting_gives_the_same_heads_each_time_and_draws_nothing() -> None:
    network = small_resnet()
    state = torch.get_rng_state()
    first, second = (convert(network, [Exits(share=0.5)], SmallResNet.shape).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)


def cumulative_by_hand(dynamic: DynamicNetwork) -> list[float]:
    """Cost of leaving at each exit from the traced original's cut points and each head counted by itself."""
    traced = trace(small_resnet(), SmallResNet.shape)
    total = sum(node.meta["macs"] for node in traced.graph.nodes)
    upto = {cut.name: cut for cut in cut_points(traced)}
    chosen = [upto[name] for name in dynamic.history[-1]["at"]]
    heads, costs = 0.0, []
    for k, (piece, cut) in enumerate(zip(dynamic.leaving, chosen, strict=True)):
        fused = piece.head.fusion
        context = None if fused is None else torch.zeros(1, fused.in_features)
        runs = piece.chained or thresholds(dynamic)[k] is not None
        heads += count_macs(piece.head, torch.zeros(1, *cut.shape), context) * runs
        costs.append(cut.macs + heads)
    fusion = sum(piece.linear.weight.numel() for piece in dynamic.row if isinstance(piece, Fusion))
    return [*costs, total + heads + fusion]


def assert_promise_2(dynamic: DynamicNetwork, batch: torch.Tensor) -> list[int]:
    """Answers, routing and executed MACs against the dense computation; returns how many left where."""
    wanted = dense(dynamic, batch)
    with torch.no_grad(), record_routing(dynamic) as routing:
        found = dynamic(batch)
    assert torch.equal(routing.exits, wanted.exits_N)
    assert close(found, wanted.answers_NC)
    costs = cumulative_by_hand(dynamic)
    assert count_macs(dynamic, batch) == sum(costs[k] for k in wanted.exits_N.tolist())
    return torch.bincount(wanted.exits_N, minlength=dynamic.exit_count).tolist()


@pytest.mark.parametrize("fields", HEADS)
@pytest.mark.fast("fields0", "fields2", "fields4")
def test_each_image_leaves_by_itself(fields: dict) -> None:
    dynamic = with_exits(**fields)
    for count in (2, 7, 64):
        split_at(dynamic, images(count), [0.4, 0.5])
        left = assert_promise_2(dynamic, images(count))
        assert sum(left) == count
        assert left[0] > 0
        assert left[1] > 0


@pytest.mark.parametrize("fields", HEADS)
@pytest.mark.fast("fields0", "fields3")
def test_a_single_image_at_every_exit(fields: dict) -> None:
    dynamic = with_exits(**fields)
    scores = dense(dynamic, images(1)).scores_KN[:, 0].tolist()
    for k, values in enumerate(
        ([scores[0] - 0.1, scores[1] - 0.1], [scores[0] + 0.1, scores[1] - 0.1], [scores[0] + 0.1, scores[1] + 0.1])
    ):
        set_thresholds(dynamic, values)
        assert assert_promise_2(dynamic, images(1)) == [int(k == j) for j in range(3)]


@pytest.mark.parametrize("fields", HEADS[2:4])
@pytest.mark.parametrize(
    ("values", "exit_index"),
    [
        ([float("-inf"), float("-inf")], 0),
        ([float("inf"), float("-inf")], 1),
        ([float("inf"), float("inf")], 2),
        ([None, float("-inf")], 1),
        ([float("inf"), None], 2),
        ([None, None], 2),
    ],
)
@pytest.mark.fast("values0-0-fields0", "values2-2-fields1", "values4-2-fields1")
def test_everyone_leaves_at_once_or_nobody(fields: dict, values: list, exit_index: int) -> None:
    dynamic = with_exits(**fields)
    set_thresholds(dynamic, values)
    for count in (1, 2, 7, 64):
        assert assert_promise_2(dynamic, images(count))[exit_index] == count


@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.fast("True")
def test_an_exit_that_is_off_among_exits_that_are_on(chain: bool) -> None:
    dynamic = with_exits(at=["layer1.0", "layer1", "layer2"], chain=chain)
    split_at(dynamic, images(16), [0.3, 0.3, 0.3])
    everything = count_macs(dynamic, images(16))
    for off in range(3):
        kept = thresholds(dynamic)
        set_thresholds(dynamic, [None if k == off else one for k, one in enumerate(kept)])
        assert assert_promise_2(dynamic, images(16))[off] == 0
        set_thresholds(dynamic, kept)
    assert count_macs(dynamic, images(16)) == everything


def test_the_last_block_is_not_entered_when_everyone_has_left() -> None:
    dynamic, entered = with_exits(), []
    dynamic.row[-1].module.register_forward_hook(lambda *_: entered.append(True))
    set_thresholds(dynamic, [float("inf"), float("-inf")])
    dynamic(images(4))
    assert not entered
    set_thresholds(dynamic, [None, None])
    dynamic(images(4))
    assert entered


def test_a_score_on_the_threshold_leaves() -> None:
    dynamic = with_exits()
    set_thresholds(dynamic, [float(dense(dynamic, images(1)).scores_KN[0, 0]), None])
    with record_routing(dynamic) as routing:
        dynamic(images(1))
    assert routing.exits.tolist() == [0]


@pytest.mark.parametrize("count", [1, 2])
def test_thresholds_between_two_float32_numbers_are_not_rounded(count: int) -> None:
    dynamic, batch = with_exits(), images(1).repeat(count, 1, 1, 1)
    score = float(dense(dynamic, batch).scores_KN[0, 0])
    for threshold, exit_index in ((math.nextafter(score, -math.inf), 0), (math.nextafter(score, math.inf), 2)):
        set_thresholds(dynamic, [threshold, None])
        with record_routing(dynamic) as routing:
            dynamic(batch)
        assert routing.exits.tolist() == [exit_index] * count


def test_a_score_that_is_not_a_number_goes_on() -> None:
    dynamic, batch = with_exits(), images(3)
    set_thresholds(dynamic, [float("-inf"), None])
    batch[1] = float("nan")
    with record_routing(dynamic) as routing:
        dynamic(batch)
    assert routing.exits.tolist() == [0, 2, 0]


def test_answers_keep_the_order_of_the_images() -> None:
    dynamic, batch = with_exits(), images(31)
    split_at(dynamic, batch, [0.5, 0.5])
    whole = dynamic(batch)
    for order in (torch.arange(30, -1, -1), torch.randperm(31)):
        assert close(dynamic(batch[order]), whole[order])
    assert close(torch.cat([dynamic(one[None]) for one in batch]), whole)


def test_the_images_are_not_overwritten() -> None:
    class Crop(SmallResNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x[:, :, 1:-1])

    dynamic, batch = convert(Crop().eval(), [Exits(at=["stem"], share=1.0)], (3, 18, 16)), torch.randn(8, 3, 18, 16)
    kept = batch.clone()
    split_at(dynamic, batch, [0.5])
    dynamic(batch)
    assert torch.equal(batch, kept)


def test_an_empty_batch_gives_an_empty_answer() -> None:
    dynamic = with_exits(chain=True)
    for values in ([None, None], [0.0, 0.0]):
        set_thresholds(dynamic, values)
        with record_routing(dynamic) as routing:
            assert dynamic(images(2)[:0]).shape == (0, 7)
        assert routing.exits.shape == (0,)


@pytest.mark.parametrize("chain", [False, True])
def test_double_precision(chain: bool) -> None:
    network, batch = small_resnet().double(), images(9).double()
    fields = {"at": ["layer1", "layer2"], "share": 1.0, "chain": chain}
    dynamic = convert(network, [Exits.model_validate(fields)], SmallResNet.shape)
    assert torch.equal(dynamic(batch), network(batch))
    split_at(dynamic, batch, [0.4, 0.5])
    wanted = dense(dynamic, batch)
    assert dynamic(batch).dtype == torch.float64
    assert close(dynamic(batch), wanted.answers_NC, 1e-12)


def test_channels_last() -> None:
    dynamic, batch = with_exits(), images(9)
    split_at(dynamic, batch, [0.4, 0.5])
    wanted = dense(dynamic, batch)
    dynamic.to(memory_format=torch.channels_last)
    with record_routing(dynamic) as routing:
        found = dynamic(batch.contiguous(memory_format=torch.channels_last))
    assert torch.equal(routing.exits, wanted.exits_N)
    assert close(found, wanted.answers_NC)


class InFloat(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()


def test_autocast_where_heads_and_last_layer_differ_in_type() -> None:
    network = small_resnet()
    network.linear = nn.Sequential(network.linear, InFloat())  # float32 under autocast, unlike the heads
    dynamic, batch = convert(network, [Exits(at=["layer2"], share=1.0)], SmallResNet.shape), images(8)
    split_at(dynamic, batch, [0.5])
    wanted = dense(dynamic, batch)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = dynamic(batch)
    assert close(found.float(), wanted.answers_NC, 0.05)


def test_a_conv_head_that_ends_in_one_pixel_trains_on_one_image() -> None:
    dynamic = with_exits(at=["layer3"], size=[16]).train()
    for module in dynamic.plain.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    before = copy.deepcopy(dynamic.state_dict())
    for count in (1, 2):
        dynamic.dense(torch.randn(count, *SmallResNet.shape)).logits[0].sum().backward()
    assert all(value.isfinite().all() for value in dynamic.state_dict().values())
    assert any(not torch.equal(value, before[name]) for name, value in dynamic.state_dict().items())
