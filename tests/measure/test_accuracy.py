"""Answers of every exit and of the routed network over a split."""

import torch
from digits import digit_network, digit_splits
from networks import split_at

from dynamize.measure.accuracy import answers, exit_accuracies, exit_logits, routed_answers

CPU = torch.device("cpu")


def test_every_exit_over_a_split() -> None:
    network, split = digit_network().train(), digit_splits().calibration
    logits, labels = exit_logits(network, split, CPU)
    images = torch.cat([batch for batch, _ in split.batches(64)])
    with torch.no_grad():
        wanted = network.eval().all_exits(images)
    assert torch.equal(labels, split.labels)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(logits, wanted, strict=True))
    right = [float((one.argmax(1) == labels).float().mean()) for one in wanted]
    assert torch.allclose(torch.tensor(exit_accuracies(network, split, CPU)), torch.tensor(right))


def test_routed_answers_come_from_the_exit_that_is_named() -> None:
    network, split = digit_network(), digit_splits().test
    split_at(network, torch.cat([batch for batch, _ in split.batches(64)]), [0.4, 0.5])
    found, labels, routing = routed_answers(network, split, CPU)
    exits = routing.exits
    logits, _ = exit_logits(network, split, CPU)
    assert torch.equal(labels, split.labels)
    assert set(exits.tolist()) == {0, 1, 2}
    assert torch.equal(found, torch.stack(logits)[exits, torch.arange(len(exits))].argmax(1))
    assert torch.equal(answers(network, split, CPU)[0], found)
    assert network.routing is None
