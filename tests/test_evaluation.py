"""Images that stand for a split in a timing, and a row of the ledger against counting by hand."""

import pytest
import torch
from digits import SHAPE, DigitNet, digit_network, digit_splits

from dynamize import evaluation
from dynamize.conversion import wrap
from dynamize.errors import DynamizeError
from dynamize.evaluation import Evaluator, Judgement, busy, gather, representative
from dynamize.measure.costs import exit_costs
from dynamize.measure.latency import LEAST_ROUNDS, Times
from dynamize.measure.memory import peak_bytes, saved_bytes
from dynamize.nn.piece import Decision, Setting

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    torch.manual_seed(0)
    return Evaluator(wrap(DigitNet().eval(), SHAPE), digit_splits().test, CPU, ["eager"], [1, 8], seconds=0.0)


def test_representative_images_have_the_shares_of_all() -> None:
    exits = torch.tensor([0] * 500 + [1] * 300 + [2] * 200)[torch.randperm(1000)]
    chosen = representative(exits, 100)
    assert len(chosen.unique()) == 100
    assert torch.bincount(exits[chosen]).tolist() == [50, 30, 20]
    halves = [torch.bincount(exits[half], minlength=3).tolist() for half in chosen.chunk(2)]
    assert all(min(half) > 0 for half in halves)
    assert len(representative(exits, 5000)) == 1000


def test_gather_keeps_the_order_asked_for() -> None:
    test = digit_splits().test
    everything = torch.cat([images for images, _ in test.batches(32)])
    index = torch.tensor([70, 3, 99, 0])
    assert torch.equal(gather(test, index, CPU), everything[index])


def test_fewer_images_are_timed_where_one_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_INPUTS", 96)
    images = digit_splits().test
    timed = []
    for image_seconds in (1e-6, 0.02, 1.0):
        here = Evaluator(wrap(DigitNet().eval(), SHAPE), images, CPU, ["eager"])
        here.hurry(2 * LEAST_ROUNDS * 0.02 * 20.5, image_seconds)
        timed.append(here.inputs)
    assert timed == [96, 20, 8]


def test_static_row(evaluator: Evaluator) -> None:
    row = evaluator.row(0, "static", evaluator.static, 0.0, [])
    assert row.macs_ratio == 1.0
    assert row.accuracy_drop == 0.0
    assert row.agreement == 1.0
    assert row.speedup == {}
    assert row.size == saved_bytes(evaluator.static)
    assert row.peak_memory == peak_bytes(evaluator.static) > row.size
    assert set(row.latency["eager"]) == {"1", "8"}


def test_row_counts_what_was_executed(evaluator: Evaluator) -> None:
    network = digit_network(seed=1)
    with torch.no_grad():
        routed = network.eval().run(torch.cat([images for images, _ in evaluator.images.batches(32)]), everyone=True)
    (name, logits, scores), (off, _, _) = routed.seen
    threshold = float(scores.quantile(0.4))
    network.setting = Setting({name: threshold, off: None})
    row = evaluator.row(1, "exits", network, 12.34, ["told"])
    first = exit_costs(network).cumulative()[0]
    last = evaluator.static_macs + network.decisions()[0].always  # the second head is off
    assert row.exits == pytest.approx([0.6, 0.0, 0.4], abs=0.011)
    assert row.leaving == ["exit.1", "exit.2"]
    assert row.decisions == {"exit.1": [row.exits[0], pytest.approx(row.exits[2])], "exit.2": [0, 0]}
    assert row.macs == pytest.approx(row.exits[0] * first + row.exits[2] * last)
    assert row.macs_worst == pytest.approx(last)
    answers = torch.where(scores.double() >= threshold, logits.argmax(1), routed.logits.argmax(1))
    labels = torch.cat([labels for _, labels in evaluator.images.batches(32)])
    assert row.accuracy == pytest.approx(float((answers == labels).double().mean()))
    assert row.accuracy_drop == pytest.approx(evaluator.reference.accuracy - row.accuracy)
    assert row.agreement == pytest.approx(float((answers == evaluator.reference.answers).double().mean()))
    assert row.accuracy_ci[0] <= row.accuracy <= row.accuracy_ci[1]
    assert row.seconds == 12.3
    assert row.notes[0] == "told"
    assert set(row.speedup["eager"]) == {"1", "8"}


def test_options_are_shares_of_all_images() -> None:
    four = torch.zeros(4, dtype=torch.int64)
    taken = {"exit.1": torch.tensor([1, 0, 1, 1]), "layer2.0": torch.tensor([2, -1, 0, 2])}
    judged = Judgement(four, four, four.double(), taken, ("exit.1",))
    assert judged.exits.tolist() == [1, 0, 1, 1]
    assert judged.use(Decision("layer2.0", "channels", ("a", "b", "c"), (1, 2, 3), 0.0, "changes")) == [0.25, 0, 0.5]
    assert judged.use(Decision("exit.1", "exit", ("leaves", "goes on"), (0, 0), 1.0, "leaves")) == [0.25, 0.75]


def test_batches_larger_than_the_split_are_timed(evaluator: Evaluator) -> None:
    large = Evaluator(evaluator.static, evaluator.images, CPU, ["eager"], [300], seconds=0.0)
    times = large.times(digit_network(seed=1), large.reference)
    assert times["eager", 300].seconds["dynamic"].shape[1] == 1


def test_an_unknown_backend_is_refused_before_anything_is_timed(evaluator: Evaluator) -> None:
    with pytest.raises(DynamizeError, match="'onyx' is no backend"):
        Evaluator(evaluator.static, evaluator.images, CPU, ["eager", "onyx"], [1])


def test_only_the_gravest_warning_is_told() -> None:
    seconds = {"static": torch.ones(5, 1).numpy()}
    times = {("eager", 1): Times(seconds, 0.5), ("eager", 8): Times(seconds, 1.25), ("eager", 64): Times(seconds, 0.0)}
    assert busy(times) == ["other processes used 1.2 cores while latency was measured: repeat it alone"]
    assert busy({("eager", 64): Times(seconds, 0.0)}) == []
    assert busy({}) == []
