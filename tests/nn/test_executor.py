"""The loop that runs a row: how images are grouped, forced and handed on changes nothing but time."""

from typing import Any

import pytest
import torch
from gated_networks import GATES, gated_resnet, images, masked, split_exits, split_forced
from image_networks import ON_IMAGES, on_images, settings_of
from networks import close, force
from torch import Tensor

from dynamize.errors import DynamizeError
from dynamize.nn.executor import Routed
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting

EXITS: list[dict[str, Any] | None] = [None, {}, {"chain": True}]
CACHES = (1, 2**16, 2**30)


def run(network: DynamicNetwork, batch: Tensor, **given: Any) -> Routed:
    with torch.no_grad():
        return network.run(batch, **given)


def assert_same(found: Routed, wanted: Routed) -> None:
    assert found.taken.keys() == wanted.taken.keys()
    assert all(torch.equal(options, wanted.taken[name]) for name, options in found.taken.items())
    assert torch.equal(found.exits, wanted.exits)
    assert close(found.logits, wanted.logits)


@pytest.mark.parametrize("exits", EXITS)
@pytest.mark.parametrize("fields", GATES)
@pytest.mark.fast("fields0-exits1", "fields1-None", "fields2-exits2")
def test_large_batches_go_through_the_units_in_parts(fields: dict, exits: dict | None) -> None:
    network, batch = gated_resnet(exits, **fields), images(16)
    split_exits(network, images(64))
    wanted, sizes = run(network, batch), []
    for rows in (1, 3, 16):
        cache = 8 * rows * 8 * 16 * 16 * 4  # of which an eighth holds what the first stage's images take
        sizes.append([_most_rows(network, batch, unit, cache) for unit in (0, -1)])
        assert_same(run(network, batch, cache=cache), wanted)
    assert [first for first, _ in sizes] == [1, 3, 16]
    if exits is None:  # smaller maps go more at a time, unless images have left
        assert [last for _, last in sizes] == [5, 16, 16]


def _most_rows(network: DynamicNetwork, batch: Tensor, unit: int, cache: int) -> int:
    """Images that a unit's gate sees together."""
    gate, sizes = network.changing[unit].gate, []
    decide = gate.decide
    gate.decide = lambda described, state=None: (sizes.append(len(described)), decide(described, state))[1]
    run(network, batch, cache=cache)
    del gate.decide
    return max(sizes)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("everyone", [False, True])
@pytest.mark.parametrize("fields", GATES)
@pytest.mark.fast("fields0-False-65536", "fields1-True-1", "fields2-True-65536", "fields3-False-1073741824")
def test_no_answer_depends_on_the_cache(fields: dict, everyone: bool, cache: int) -> None:
    network, batch = gated_resnet({"chain": True}, **fields), images(31)
    split_exits(network, images(64))
    wanted, found = run(network, batch, everyone=everyone), run(network, batch, everyone=everyone, cache=cache)
    assert_same(found, wanted)
    assert len(found.choices.unique(dim=0)) > 2
    assert len(found.seen) == (2 if everyone else 0)
    for one, other in zip(found.seen, wanted.seen, strict=True):
        assert one[0] == other[0]
        assert close(one[1], other[1])


@pytest.mark.parametrize("cache", CACHES)
def test_answers_are_those_of_masks_however_images_are_grouped(cache: int) -> None:
    network, batch = gated_resnet({}, keep_first=False), images(31)
    split_exits(network, images(64))
    wanted, found = masked(network, batch), run(network, batch, cache=cache)
    clear = wanted.clear
    assert clear.float().mean() > 0.9
    assert torch.equal(found.choices[clear], wanted.choices_NU[clear])
    assert torch.equal(found.exits[clear], wanted.exits_N[clear])
    assert close(found.logits[clear], wanted.answers_NC[clear])


@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.parametrize("fields", GATES)
@pytest.mark.fast("fields0-False", "fields2-True")
def test_forced_options_are_by_image_while_images_leave(fields: dict, chain: bool) -> None:
    """Rows change places when images leave; what is forced does not."""
    network, batch = gated_resnet({"chain": chain}, **fields), images(31)
    forced = torch.randint(0, 2, (31, len(network.changing)), generator=torch.Generator().manual_seed(5))
    split_forced(network, batch, forced)
    setting = Setting(network.setting.thresholds, forced=force(network, forced))
    for cache in CACHES:
        found, wanted = run(network, batch, setting=setting, cache=cache), masked(network, batch, forced)
        assert wanted.exits_N.unique().tolist() == [0, 1, 2]
        assert torch.equal(found.exits, wanted.exits_N)
        assert torch.equal(found.choices, wanted.choices_NU)
        taken = found.choices >= 0
        assert torch.equal(found.choices[taken], forced[taken])
        assert close(found.logits, wanted.answers_NC)


def test_exits_are_forced_by_image_too() -> None:
    network, batch = gated_resnet({}, keep_first=False), images(12)
    first = torch.tensor([0, 1, 1] * 4)
    second = torch.tensor([1, 0, 1] * 4)
    forced = torch.randint(0, 2, (12, len(network.changing)))
    setting = Setting(forced={"exit.1": first, "exit.2": second, **force(network, forced)})
    logits = masked(network, batch, forced).logits_KNC
    found = run(network, batch, setting=setting)
    assert found.exits.tolist() == [0, 1, 2] * 4
    assert close(found.logits, logits[found.exits, torch.arange(12)])


def test_some_units_are_forced_and_the_others_decide() -> None:
    network, batch = gated_resnet(keep_first=False), images(64)
    name = network.changing[1].name
    free = run(network, batch).choices
    for option in (0, 1):
        found = run(network, batch, setting=Setting(forced={name: torch.full((64,), option)})).choices
        assert torch.equal(found[:, 0], free[:, 0])
        assert (found[:, 1] == option).all()
        same = free[:, 1] == option
        assert torch.equal(found[same], free[same])
        assert {0, 1} <= set(found[:, 2].tolist())


@pytest.mark.parametrize("count", [0, 1, 4, 6])
@pytest.mark.parametrize("name", ["exit.1", "layer1.1"])
@pytest.mark.fast("exit.1-0", "layer1.1-6")
def test_forced_options_for_other_images_are_refused(name: str, count: int) -> None:
    network = gated_resnet({}, keep_first=False)
    assert name in {one.name for one in network.decisions()}
    setting = Setting(forced={name: torch.zeros(count, dtype=torch.int64)})
    with pytest.raises(DynamizeError, match=f"options of {count} images are forced at '{name}', but the batch has 5"):
        network.run(images(5), setting)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", ON_IMAGES)
@pytest.mark.fast(
    "relu-True-65536",
    "exit after relu-False-65536",
    "unit-True-65536",
    "unit crop-True-1",
    "exit unit-False-65536",
    "exit unit crop-True-1073741824",
)
def test_the_images_are_never_written_to(kind: str, grad: bool, cache: int) -> None:
    network, batch = on_images(kind), images(16)
    kinds = [piece.effect for piece in network.row]
    deciding = [*(["leaves"] if "exit" in kind else []), *(["changes"] if "unit" in kind else [])]
    assert kinds == [*([None] if "relu" in kind or "crop" in kind else []), *deciding, *([None] if deciding else [])]
    for given in (batch, batch.contiguous(memory_format=torch.channels_last), batch.repeat(2, 1, 1, 1)[8:24]):
        kept = given.clone()
        for setting in settings_of(network, given):
            with torch.set_grad_enabled(grad):
                found = network.run(given, setting, cache=cache)
                assert torch.equal(given, kept)
                everyone = network.run(given, setting, everyone=True, cache=cache)
                assert torch.equal(given, kept)
                again = network.run(given.clone(), setting)
            assert close(found.logits, again.logits)
            assert torch.equal(found.exits, again.exits)
            assert len(everyone.logits) == 16


def test_settings_for_other_networks_are_refused() -> None:
    network = gated_resnet({}, keep_first=False)
    known = "Known: exit.1, exit.2, layer1.0"
    with pytest.raises(DynamizeError, match=f"names 'exit.3', .*Did you mean exit.2.*{known}"):
        network.run(images(2), Setting({"exit.3": 0.5}))
    with pytest.raises(DynamizeError, match=f"names 'layer1.2', .*{known}"):
        network.run(images(2), Setting(forced={"layer1.2": torch.zeros(2, dtype=torch.int64)}))
    with pytest.raises(DynamizeError, match=f"names 'layer1.0', .*{known}"):  # at which nobody leaves
        network.run(images(2), Setting({"layer1.0": 0.5}))


@pytest.mark.parametrize("option", [-2, 2, 7])
@pytest.mark.fast("-2", "2")
def test_an_option_that_a_decision_does_not_have_is_refused(option: int) -> None:
    network, batch = gated_resnet({}), images(4)
    for name in [decision.name for decision in network.decisions()]:
        with pytest.raises(DynamizeError, match=f"'{name}' .*give 0 to 1"):
            run(network, batch, setting=Setting(forced={name: torch.full((4,), option)}))
