"""Promise 2 for gates: each image runs what its gates chose and nothing else, and answers as masks would have it."""

import copy
from typing import Any

import pytest
import torch
from gated_networks import GATES, gated_resnet, images, masked, scatter, split_exits
from networks import SmallResNet, close, force, set_offset, set_thresholds, small_resnet
from torch import Tensor, nn

from dynamize.conversion import convert
from dynamize.errors import DynamizeError
from dynamize.graph.macs import count_macs
from dynamize.measure.costs import exit_costs
from dynamize.nn.gates import ALL_OPEN, ConvGate
from dynamize.nn.network import DynamicNetwork, record_routing
from dynamize.nn.piece import Setting
from dynamize.transforms import SkipGates

EXITS: list[dict[str, Any] | None] = [None, {}, {"chain": True}]


def run(network: DynamicNetwork, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Answers, exits and choices."""
    with torch.no_grad(), record_routing(network) as routing:
        found = network(batch)
    return found, routing.exits, routing.choices


@pytest.mark.parametrize("exits", EXITS)
@pytest.mark.parametrize("fields", GATES)
@pytest.mark.fast("fields0-None", "fields1-exits1", "fields2-exits2", "fields3-None")
def test_each_image_runs_what_it_chose(fields: dict, exits: dict | None) -> None:
    network = gated_resnet(exits, **fields)
    costs = exit_costs(network)
    split_exits(network, images(64))
    seen = []
    for count in (1, 2, 7, 16):
        batch = images(count)
        wanted = masked(network, batch)
        assert wanted.clear.float().mean() > 0.9
        found, left_at, choices = run(network, batch)
        taken = network.run(batch).taken
        clear = wanted.clear
        assert torch.equal(left_at[clear], wanted.exits_N[clear])
        assert torch.equal(choices[clear], wanted.choices_NU[clear])
        assert close(found[clear], wanted.answers_NC[clear])
        alone = [run(network, batch[n : n + 1]) for n in range(count)]
        assert torch.equal(torch.cat([one[2] for one in alone])[clear], choices[clear])
        assert close(torch.cat([one[0] for one in alone])[clear], found[clear])
        executed = costs.executed(taken, count)
        assert count_macs(network, batch) == executed.sum()
        seen.append(choices)
    every = torch.cat(seen)
    assert len(every.unique(dim=0)) > 2
    assert (every == -1).any() == (exits is not None)
    split = [{0, 1} <= set(column.tolist()) for column in every.T]
    assert sum(split) >= (2 if fields["gate"] == "recurrent" else len(split) if exits is None else 3)


def test_costs_by_hand() -> None:
    """layer1.1: two convolutions of 16*16 * 8*8 * 9 MACs and a gate of 8*2; layer2.0 skipped leaves 8*8 * 8*16."""
    network = gated_resnet(blocks=[["layer1.1"], ["layer2.0"]])
    block, projected = 2 * 256 * 64 * 9, 64 * 9 * (8 * 16 + 16 * 16) + 64 * 8 * 16
    assert [unit.path_macs for unit in network.changing] == [(0.0, block), (64 * 8 * 16, projected)]
    assert [unit.macs for unit in network.changing] == [16, 16]
    whole = count_macs(small_resnet(), images(1)) + 2 * 16
    for first, second, saved in ((1, 1, 0), (0, 1, block), (1, 0, projected - 64 * 8 * 16)):
        network.setting = Setting(forced=force(network, torch.tensor([[first, second]])))
        assert count_macs(network, images(1)) == whole - saved


@pytest.mark.parametrize("fields", GATES)
@pytest.mark.fast("fields0", "fields2")
def test_a_block_sees_only_the_images_that_run_it(fields: dict) -> None:
    network, batch = gated_resnet(**fields), images(16)
    seen: list[list[int]] = []
    for unit in network.changing:
        sizes: list[int] = []
        conv = next(m for m in unit.paths()[-1].modules() if isinstance(m, nn.Conv2d))
        conv.register_forward_hook(lambda _, inputs, __, sizes=sizes: sizes.append(len(inputs[0])))
        seen.append(sizes)
    _, _, choices = run(network, batch)
    assert seen == [[int(count)] if count else [] for count in (choices == 1).sum(0)]
    assert any(0 < sizes[0] < 16 for sizes in seen if sizes)


def test_a_projection_runs_for_those_that_skip_its_block() -> None:
    network, batch = gated_resnet(blocks=[["layer2.0"]]), images(16)
    (unit,) = network.changing
    bypass = unit.paths()[0]
    assert bypass is not None
    sizes: list[int] = []
    bypass.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    _, _, choices = run(network, batch)
    assert sizes == [int((choices == 0).sum())]
    assert 0 < sizes[0] < 16


@pytest.mark.parametrize("fields", GATES)
@pytest.mark.fast("fields0", "fields2")
def test_forced_decisions_win_over_the_gates(fields: dict) -> None:
    network, batch = gated_resnet(**fields), images(9)
    forced = torch.randint(0, 2, (9, len(network.changing)))
    wanted = masked(network, batch, forced)
    with torch.no_grad():
        found = network.run(batch, Setting(forced=force(network, forced)))
    assert torch.equal(found.choices, forced)
    assert close(found.logits, wanted.answers_NC)
    assert not torch.equal(run(network, batch)[2], forced)


@pytest.mark.parametrize("fields", GATES)
@pytest.mark.fast("fields0", "fields2")
def test_the_offset_opens_and_closes_all_gates(fields: dict) -> None:
    network, batch = gated_resnet(**fields), images(5)
    set_offset(network, ALL_OPEN)
    found, _, choices = run(network, batch)
    assert (choices == 1).all()
    assert torch.equal(found, small_resnet()(batch))
    set_offset(network, -ALL_OPEN)
    found, _, choices = run(network, batch)
    assert (choices == 0).all()
    assert close(found, masked(network, batch, torch.zeros_like(choices)).answers_NC)


def test_a_larger_offset_never_closes_a_first_gate() -> None:
    network, batch = gated_resnet(blocks=[["layer1.1"]]), images(64)
    opened = []
    for offset in (-20.0, -5.0, 0.0, 5.0, 20.0):
        set_offset(network, offset)
        assert torch.equal(run(network, batch)[2], masked(network, batch).choices_NU)
        opened.append(int(run(network, batch)[2].sum()))
    assert opened == sorted(opened)
    assert opened[0] < opened[-1]


def exits_before(network: DynamicNetwork, name: str) -> int:
    pieces = [piece.name for piece in network.row]
    return sum(piece.effect == "leaves" for piece in network.row[: pieces.index(name)])


@pytest.mark.parametrize("chain", [False, True])
def test_choices_line_up_with_the_images(chain: bool) -> None:
    network, batch = gated_resnet({"chain": chain}, keep_first=False), images(31)
    split_exits(network, batch)
    found, left_at, choices = run(network, batch)
    assert len(left_at.unique()) == 3
    stages = torch.tensor([exits_before(network, unit.name) for unit in network.changing])
    assert sorted(set(stages.tolist())) == [0, 1, 2]
    assert torch.equal(choices == -1, stages[None, :] > left_at[:, None])
    for order in (torch.arange(30, -1, -1), torch.randperm(31)):
        again = run(network, batch[order])
        assert torch.equal(again[1], left_at[order])
        assert torch.equal(again[2], choices[order])
        assert close(again[0], found[order])


@pytest.mark.parametrize("fields", GATES)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.fast("False-fields0", "True-fields2")
def test_the_images_are_not_overwritten(fields: dict, grad: bool) -> None:
    network, batch = gated_resnet({"at": ["stem", "layer1"]}, **fields), images(8)
    split_exits(network, batch)
    kept = batch.clone()
    with torch.set_grad_enabled(grad):
        network(batch)
        network.all_exits(batch)
    assert torch.equal(batch, kept)


@pytest.mark.parametrize("exits", EXITS)
@pytest.mark.parametrize("fields", GATES)
@pytest.mark.fast("fields0-exits1", "fields2-None")
def test_eval_mode_with_autograd_answers_alike_and_gives_gradients(fields: dict, exits: dict | None) -> None:
    network, batch = gated_resnet(exits, **fields), images(12)
    split_exits(network, images(64))
    with torch.no_grad():
        wanted = network(batch)
    given = batch.clone().requires_grad_()
    found = network(given)
    assert close(found, wanted)
    found.square().sum().backward()
    assert given.grad is not None
    assert (given.grad.abs().amax((1, 2, 3)) > 0).all()
    (dense,) = torch.autograd.grad(_one_by_one(network, given), given)
    assert close(given.grad, dense, 1e-4)


def _one_by_one(network: DynamicNetwork, batch: Tensor) -> Tensor:
    """The same sum, image by image: nothing is gathered or written back."""
    total = torch.zeros(())
    for n in range(len(batch)):
        total = total + network(batch[n : n + 1]).square().sum()
    return total


@pytest.mark.parametrize("fields", GATES)
@pytest.mark.fast("fields0", "fields2")
def test_an_empty_batch_gives_an_empty_answer(fields: dict) -> None:
    network = gated_resnet({}, **fields)
    for thresholds in ([None, None], [0.0, 0.0]):
        set_thresholds(network, thresholds)
        found, left_at, choices = run(network, images(2)[:0])
        assert found.shape == (0, 7)
        assert left_at.shape == (0,)
        assert len(choices) == 0


@pytest.mark.parametrize("fields", GATES)
@pytest.mark.fast("fields0", "fields2")
def test_double_precision(fields: dict) -> None:
    network = convert(small_resnet().double(), [SkipGates.model_validate({"group": 1} | fields)], SmallResNet.shape)
    batch = images(9).double()
    assert torch.equal(network(batch), small_resnet().double()(batch))
    scatter(network, images(64).double())
    wanted = masked(network, batch)
    found, _, choices = run(network, batch)
    assert found.dtype == torch.float64
    assert len(choices.unique(dim=0)) > 1
    assert torch.equal(choices, wanted.choices_NU)
    assert close(found, wanted.answers_NC, 1e-12)


@pytest.mark.parametrize("fields", GATES)
@pytest.mark.fast("fields1")
def test_channels_last(fields: dict) -> None:
    network, batch = gated_resnet({}, **fields), images(9)
    split_exits(network, images(64))
    wanted = run(network, batch)
    network.to(memory_format=torch.channels_last)
    found = run(network, batch.contiguous(memory_format=torch.channels_last))
    assert torch.equal(found[1], wanted[1])
    assert torch.equal(found[2], wanted[2])
    assert close(found[0], wanted[0])


@pytest.mark.parametrize("fields", GATES)
@pytest.mark.fast("fields1")
def test_autocast(fields: dict) -> None:
    network, batch = gated_resnet({}, **fields), images(16)
    split_exits(network, images(64))
    wanted = masked(network, batch)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), record_routing(network) as routing:
        found = network(batch)
    assert len(routing.choices.unique(dim=0)) > 1
    same = (routing.choices == wanted.choices_NU).all(1) & (routing.exits == wanted.exits_N)
    assert same.float().mean() > 0.5
    assert close(found[same].float(), wanted.answers_NC[same], 0.05)


def test_a_copy_shares_nothing_and_its_recurrent_gates_share_one_memory() -> None:
    network = gated_resnet(gate="recurrent")
    again = copy.deepcopy(network)
    assert not {id(p) for p in network.parameters()} & {id(p) for p in again.parameters()}
    memories = {id(unit.gate.memory) for unit in again.changing}
    assert len(memories) == 1
    assert not memories & {id(unit.gate.memory) for unit in network.changing}
    batch = images(6)
    before = run(network, batch)[2]
    with torch.no_grad():
        for values in again.changing[0].gate.memory.parameters():
            values.add_(5.0)
    assert not torch.equal(run(again, batch)[2], before)
    assert torch.equal(run(network, batch)[2], before)


def test_gates_of_two_kinds_after_each_other() -> None:
    """Behind a gate that does not read channel means, those of the images that skipped are not known."""
    network, batch = gated_resnet(keep_first=False), images(16)
    for unit in network.changing[::2]:
        unit.gate = ConvGate(unit.gate.linear.in_features, 2).eval()
    scatter(network, images(64))
    wanted = masked(network, batch)
    found, _, choices = run(network, batch)
    assert all({0, 1} <= set(column.tolist()) for column in choices.T)
    assert torch.equal(choices[wanted.clear], wanted.choices_NU[wanted.clear])
    assert close(found[wanted.clear], wanted.answers_NC[wanted.clear])


def test_a_compiled_network_is_not_trained() -> None:
    frozen = gated_resnet()
    frozen.freeze()
    frozen.train()
    with pytest.raises(DynamizeError, match="train the network it was made of"):
        frozen(images(2))


@pytest.mark.parametrize("left", ["nobody", "some", "all are answered"])
@pytest.mark.fast("some")
def test_means_from_before_a_block_are_not_read_behind_it(left: str) -> None:
    """A block that part of the images run hands on no means where an exit comes next; if nobody leaves there, the unit
    behind reads the features, not what the gate of the block has read."""
    network, batch = gated_resnet({"at": ["layer1"]}, keep_first=False), images(32)
    names = [piece.name for piece in network.row]
    place = names.index("exit.1")
    before, behind = network.row[place - 1], network.row[place + 1]
    assert (before.effect, behind.effect) == ("changes", "changes")
    assert None in before.paths()
    assert before.gate.pooled
    assert behind.reads_means
    split_exits(network, images(64))
    if left != "some":
        set_thresholds(network, [float("inf")])
    wanted = masked(network, batch)
    with torch.no_grad():
        found = network.run(batch, everyone=left == "all are answered")
    taken = found.taken
    assert {0, 1} <= set(taken[before.name].tolist())
    assert {0, 1} <= set(taken[behind.name].tolist())
    if left == "all are answered":
        network.setting = Setting()
        wanted = masked(network, batch)
    assert wanted.clear.float().mean() > 0.9
    assert torch.equal(found.choices[wanted.clear], wanted.choices_NU[wanted.clear])
    assert close(found.logits[wanted.clear], wanted.answers_NC[wanted.clear])
