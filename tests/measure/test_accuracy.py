"""Answers of every exit and of the routed network over a split."""

import pytest
import torch
from digits import digit_network, digit_splits
from gated_digits import gated_digits
from networks import exit_scores, force, split_at

from dynamize.measure import accuracy
from dynamize.measure.accuracy import everything, exit_accuracies, routed_answers, top_answers
from dynamize.nn.piece import Setting

CPU = torch.device("cpu")


def test_every_exit_over_a_split() -> None:
    network, split = digit_network().train(), digit_splits().calibration
    seen = everything(network, split, CPU)
    images = torch.cat([batch for batch, _ in split.batches(64)])
    with torch.no_grad():
        wanted = network.eval().all_exits(images)
    assert torch.equal(seen.labels, split.labels)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(seen.logits, wanted, strict=True))
    scores = [exit_scores(network, wanted[k], k) for k in range(2)]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(seen.scores, scores, strict=True))
    assert seen.taken == {}
    right = [float((one.argmax(1) == seen.labels).float().mean()) for one in wanted]
    assert torch.allclose(torch.tensor(exit_accuracies(network, split, CPU)), torch.tensor(right))


def test_routed_answers_come_from_the_exit_that_is_named() -> None:
    network, split = digit_network(), digit_splits().test
    split_at(network, torch.cat([batch for batch, _ in split.batches(64)]), [0.4, 0.5])
    found, labels, _, routing = routed_answers(network, split, CPU)
    exits = routing.exits
    logits = everything(network, split, CPU).logits
    assert torch.equal(labels, split.labels)
    assert set(exits.tolist()) == {0, 1, 2}
    assert torch.equal(found, torch.stack(logits)[exits, torch.arange(len(exits))].argmax(1))
    assert torch.equal(top_answers(network, split, CPU)[0], found)
    assert network.routing is None


def test_forced_options_are_by_image_of_the_whole_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three batches, of which the last is smaller."""
    monkeypatch.setattr(accuracy, "_BATCH", 40)
    network, split = gated_digits(), digit_splits().test
    assert len(split) == 100
    forced = torch.randint(0, 2, (100, len(network.changing)))
    options = force(network, forced)
    seen = everything(network, split, CPU, Setting(forced=options))
    assert list(seen.taken) == [unit.name for unit in network.changing]
    assert all(torch.equal(seen.taken[name], options[name]) for name in options)
    images = torch.cat([batch for batch, _ in split.batches(64)])
    with torch.no_grad():
        wanted = network.run(images, Setting(forced=options)).logits
    assert torch.allclose(seen.logits[-1], wanted, atol=1e-5)
