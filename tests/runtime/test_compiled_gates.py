"""Backends route through gates as the module does, image by image, and run only what is chosen."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from backends import FLOAT32, quick_openvino
from gated_networks import gated_resnet, masked, scatter, split_exits, split_forced
from networks import SmallResNet, close, force, set_offset, set_thresholds, small_resnet, torchvision_network
from quick import only
from torch import Tensor, nn

from dynamize.conversion import convert
from dynamize.errors import DynamizeError
from dynamize.graph.macs import counting_macs
from dynamize.measure.costs import exit_costs
from dynamize.nn.gates import ALL_OPEN
from dynamize.nn.piece import Setting
from dynamize.runtime.compiled import compile_network
from dynamize.runtime.onnxruntime import OnnxRuntime
from dynamize.transforms import SkipGates

GATES: list[dict[str, Any]] = [
    {"gate": "linear", "keep_first": False},
    {"gate": "conv", "group": 2, "keep_first": False},
    {"gate": "recurrent"},
]
EXITS: list[dict[str, Any] | None] = [None, {}, {"chain": True}]


def images(count: int) -> Tensor:
    return torch.randn(count, *SmallResNet.shape, generator=torch.Generator().manual_seed(count))


def every_combination(exits: Sequence[dict | None], fast: tuple[dict | None, dict]) -> Iterator[Any]:
    """OpenVINO with one of them in the fast set."""
    for backend, one, fields in product(FLOAT32, exits, GATES):
        quick = backend.values == quick_openvino.values and (one, fields) == fast
        yield pytest.param(*backend.values, one, fields, marks=quick_openvino.marks if quick else backend.marks)


@pytest.mark.parametrize(("backend", "exits", "fields"), every_combination(EXITS, (EXITS[-1], GATES[0])))
@pytest.mark.fast("eager-exits5-fields5", "onnxruntime-None-fields9", "onnxruntime-exits15-fields15")
def test_same_answers_and_routing_for_any_batch_size(backend: str, exits: dict | None, fields: dict) -> None:
    network = gated_resnet(exits, **fields)
    split_exits(network, images(64))
    compiled = compile_network(network, backend)
    for count in (1, 2, 7, 16):
        wanted = masked(network, images(count))
        clear = wanted.clear
        assert clear.float().mean() > 0.9
        found = compiled.run(images(count))
        logits, left_at, choices = found.logits, found.exits, found.choices
        assert torch.equal(left_at[clear], wanted.exits_N[clear])
        assert torch.equal(choices[clear], wanted.choices_NU[clear])
        assert close(logits[clear], wanted.answers_NC[clear], 2e-5)
        assert torch.equal(compiled(images(count)), logits)
        if count == 16:
            assert len(choices.unique(dim=0)) > 1
            for n in range(count):
                if clear[n]:
                    alone = compiled.run(images(count)[n : n + 1])
                    assert torch.equal(alone.choices[0], choices[n])
                    assert close(alone.logits[0], logits[n], 2e-5)


@pytest.mark.parametrize("exits", EXITS)
@pytest.mark.fast("exits1")
def test_eager_executes_what_was_chosen(exits: dict | None) -> None:
    network = gated_resnet(exits, keep_first=False)
    split_exits(network, images(64))
    compiled, costs = compile_network(network, "eager"), exit_costs(network)
    for count in (1, 7, 16):
        with counting_macs() as counted:
            found = compiled.run(images(count))
        assert counted() == costs.executed(found.taken, count).sum()


def test_onnxruntime_runs_each_way_for_those_that_chose_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[nn.Module, int]] = []
    path = OnnxRuntime.path

    def counting(self: OnnxRuntime, module: nn.Module, *given: Any) -> Any:
        way = path(self, module, *given)
        return lambda features: (ran.append((module, len(features))), way(features))[1]

    monkeypatch.setattr(OnnxRuntime, "path", counting)
    network = gated_resnet(blocks=[["layer1.1"], ["layer2.0"]])
    compiled = compile_network(network, "onnxruntime")
    ran.clear()
    choices = compiled.run(images(16)).choices
    counts = [int((choices[:, u] == path).sum()) for u in range(2) for path in range(2)]
    assert min(counts) > 0
    first, unit, second, last = compiled.row
    assert [piece.effect for piece in compiled.row] == [None, "changes", "changes", None]
    expected = [(first.module, 16), (unit.paths()[1], counts[1])]
    expected += [(second.paths()[0], counts[2]), (second.paths()[1], counts[3]), (last.module, 16)]
    assert ran == expected


@pytest.mark.parametrize("backend", FLOAT32)
@pytest.mark.parametrize("gate", only(["conv"], ["linear", "conv"]))
@pytest.mark.fast("conv-onnxruntime")
def test_a_torchvision_network(backend: str, gate: str) -> None:
    network, batch = torchvision_network("mobilenet_v3_small"), torch.randn(6, 3, 32, 32)
    dynamic = convert(network, [SkipGates.model_validate({"gate": gate, "group": 1})], (3, 32, 32))
    compiled = compile_network(dynamic, backend)
    with torch.no_grad():
        assert close(compiled(batch), network(batch), 2e-5)
    scatter(dynamic, torch.randn(32, 3, 32, 32))
    compiled, wanted = compile_network(dynamic, backend), masked(dynamic, batch)
    found = compiled.run(batch)
    clear = wanted.clear
    assert len(found.choices.unique(dim=0)) > 1
    assert torch.equal(found.choices[clear], wanted.choices_NU[clear])
    assert close(found.logits[clear], wanted.answers_NC[clear], 1e-4)


@pytest.mark.parametrize("backend", FLOAT32)
def test_the_offset_is_read_at_each_call(backend: str) -> None:
    network, batch = gated_resnet({}, keep_first=False), images(5)
    compiled = compile_network(network, backend)
    set_offset(network, ALL_OPEN)
    opened = compiled.run(batch)
    assert (opened.choices == 1).all()
    assert close(opened.logits, small_resnet()(batch).detach())
    set_offset(network, -ALL_OPEN)
    closed = compiled.run(batch)
    assert (closed.choices == 0).all()
    assert close(closed.logits, masked(network, batch).answers_NC)
    set_offset(network, 0.0)
    assert len(compiled.run(batch).choices.unique()) == 2


@pytest.mark.parametrize("backend", FLOAT32)
def test_forced_paths(backend: str) -> None:
    network, batch = gated_resnet({}, keep_first=False), images(9)
    compiled = compile_network(network, backend)
    free = compiled.run(batch)
    forced = torch.randint(0, 2, free.choices.shape)
    found = compiled.run(batch, Setting(forced=force(network, forced)))
    assert torch.equal(found.choices, forced)
    assert close(found.logits, masked(network, batch, forced).answers_NC)
    assert torch.equal(compiled.run(batch).choices, free.choices)  # for one call only


@pytest.mark.parametrize("backend", FLOAT32)
@pytest.mark.parametrize("fields", GATES)
@pytest.mark.fast("fields0-eager", "fields1-onnxruntime")
def test_weights_are_frozen_and_the_network_is_left_alone(backend: str, fields: dict) -> None:
    network, batch = gated_resnet({}, **fields).train(), images(6)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    compiled = compile_network(network, backend)
    first = compiled.run(batch)
    assert all(module.training for module in network.modules())
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    again = compiled.run(batch)
    assert torch.equal(again.logits, first.logits)
    assert torch.equal(again.exits, first.exits)
    assert torch.equal(again.choices, first.choices)


@pytest.mark.parametrize("backend", FLOAT32)
@pytest.mark.parametrize("fields", GATES)
@pytest.mark.fast("fields0-eager", "fields1-onnxruntime")
def test_the_images_are_not_overwritten(backend: str, fields: dict) -> None:
    network, batch = gated_resnet({"at": ["stem", "layer1"]}, **fields), images(8)
    split_exits(network, batch)
    kept = batch.clone()
    compile_network(network, backend)(batch)
    assert torch.equal(batch, kept)


@pytest.mark.parametrize("backend", FLOAT32)
def test_an_empty_batch_and_images_that_want_gradients(backend: str) -> None:
    network = gated_resnet({})
    compiled = compile_network(network, backend)
    assert compiled(images(2)[:0]).shape == (0, 7)
    assert torch.equal(compiled(images(2).requires_grad_()), compiled(images(2)))


@pytest.mark.parametrize("backend", FLOAT32)
def test_a_batch_that_leaves_early_has_a_column_for_every_unit(backend: str) -> None:
    network = gated_resnet({})
    set_thresholds(network, [float("-inf"), None])
    compiled = compile_network(network, backend)
    for count in (1, 3):
        choices = compiled.run(images(count)).choices
        assert choices.shape == (count, len(network.changing))
        assert (choices[:, 1:] == -1).all()
        assert (choices[:, 0] >= 0).all()


@pytest.mark.parametrize(("backend", "exits", "fields"), every_combination(EXITS[-1:], (EXITS[-1], GATES[-1])))
@pytest.mark.fast("eager-exits0-fields0", "onnxruntime-exits4-fields4")
def test_no_answer_depends_on_the_cache(backend: str, exits: dict, fields: dict) -> None:
    network, batch = gated_resnet(exits, **fields), images(31)
    split_exits(network, images(64))
    compiled = compile_network(network, backend)
    wanted = compiled.run(batch)
    assert len(wanted.choices.unique(dim=0)) > 2
    assert len(wanted.exits.unique()) == 3
    for cache in (1, 8 * 3 * 8 * 16 * 16 * 4, 2**16, 2**30):  # one image at a time, three, ...
        compiled.cache = cache
        found = compiled.run(batch)
        assert torch.equal(found.exits, wanted.exits)
        assert torch.equal(found.choices, wanted.choices)
        assert close(found.logits, wanted.logits, 2e-5)


@pytest.mark.parametrize(("backend", "exits", "fields"), every_combination(EXITS[-1:], (EXITS[-1], GATES[-1])))
@pytest.mark.fast("eager-exits1-fields1", "onnxruntime-exits5-fields5")
def test_forced_options_are_by_image_while_images_leave(backend: str, exits: dict, fields: dict) -> None:
    network, batch = gated_resnet(exits, **fields), images(31)
    forced = torch.randint(0, 2, (31, len(network.changing)), generator=torch.Generator().manual_seed(5))
    split_forced(network, batch, forced)
    wanted = masked(network, batch, forced)
    assert wanted.exits_N.unique().tolist() == [0, 1, 2]
    setting = Setting(network.setting.thresholds, forced=force(network, forced))
    compiled = compile_network(network, backend)
    for cache in (1, 2**16, 2**30):
        compiled.cache = cache
        found = compiled.run(batch, setting)
        assert torch.equal(found.exits, wanted.exits_N)
        assert torch.equal(found.choices, wanted.choices_NU)
        assert close(found.logits, wanted.answers_NC, 2e-5)


@pytest.mark.parametrize("backend", FLOAT32)
def test_forced_options_for_other_images_are_refused(backend: str) -> None:
    network = gated_resnet({})
    compiled = compile_network(network, backend)
    with pytest.raises(DynamizeError, match="options of 9 images are forced at 'layer1.1', but the batch has 5"):
        compiled.run(images(5), Setting(forced={"layer1.1": torch.zeros(9, dtype=torch.int64)}))


@pytest.mark.parametrize("backend", FLOAT32)
def test_means_from_before_a_block_are_not_read_behind_it(backend: str) -> None:
    """As in tests/nn/test_units.py: a unit that may skip, an exit at which nobody leaves, a gate that reads means."""
    network, batch = gated_resnet({"at": ["layer1"]}, keep_first=False), images(32)
    compiled = compile_network(network, backend)
    for values in ([float("inf")], [None]):
        set_thresholds(network, values)
        found, wanted = compiled.run(batch), masked(network, batch)
        for name in ("layer1.1", "layer2.0"):
            assert {0, 1} <= set(found.taken[name].tolist())
        assert torch.equal(found.choices[wanted.clear], wanted.choices_NU[wanted.clear])
        assert close(found.logits[wanted.clear], wanted.answers_NC[wanted.clear], 2e-5)
