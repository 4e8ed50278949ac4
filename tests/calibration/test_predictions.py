"""Cascades planned from predictions alone: what a plan says is what it does on other images."""

import numpy as np
import pytest
from scipy.special import softmax
from shared import shared_data

import dynamize as dz
from dynamize.calibration.evidence import Reading
from dynamize.calibration.table import LARGEST
from dynamize.errors import DynamizeError, InfeasibleError

MACS = {"small": 1e8, "middle": 3e8, "big": 1e9}
CLASSES = 10


def logits(images: int, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Networks that get better, and whose errors are partly the same; labels."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, images)
    hard = random.normal(size=(images, 1))
    common = 0.5 * random.normal(size=(images, CLASSES))
    found = {}
    for name, lift in {"small": 3.4, "middle": 4.0, "big": 4.6}.items():
        found[name] = common + 1.2 * random.normal(size=(images, CLASSES))
        found[name][np.arange(images), labels] += lift - hard[:, 0]
    return found, labels


def table(images: int = 2000, names: tuple[str, ...] = ("small", "big"), seed: int = 0, **more) -> dz.PredictionTable:
    found, labels = logits(images, seed)
    return dz.PredictionTable.from_logits({name: found[name] for name in names}, MACS, **({"labels": labels} | more))


def test_a_plan_does_on_other_images_what_it_says():
    plan, other = table(4000).solve(max_drop=0.5), table(8000, seed=1)
    found = other.evaluate(plan)
    reference = float((other.evidence.answers[-1] == other.labels).mean())
    assert plan.point.macs_ratio < 0.9
    assert plan.point.accuracy_drop <= 0.005
    assert reference - found.accuracy < 0.015
    assert found.cost == pytest.approx(plan.point.macs, rel=0.05)
    assert list(plan.point.thresholds) == ["small"]
    assert np.allclose(found.shares, plan.point.exits, atol=0.03)


def test_budgets_and_the_curve():
    predictions = table(names=tuple(MACS))
    half = predictions.solve(macs_ratio=0.5)
    assert half.point.macs_ratio <= 0.5 + 1e-9
    assert predictions.solve(macs=5e8).point == half.point
    points = predictions.curve(6, combine="last")
    assert (np.diff([point.accuracy for point in points]) > 0).all()
    assert points[0].macs == pytest.approx(1e8)
    with pytest.raises(InfeasibleError, match="macs_ratio: 0.1 or more"):
        predictions.solve(macs_ratio=0.05)
    with pytest.raises(DynamizeError, match="give `ms`"):
        predictions.solve(latency_ms=1)
    timed = table(ms={"small": 1.0, "big": 10.0})
    assert timed.solve(latency_ms=6).point.latency_ms <= 6 + 1e-9


def test_the_combination_is_chosen_by_cross_fit_and_said():
    predictions = table(4000)
    costs = {}
    for combine in ("last", "mean", "product"):
        plan = predictions.solve(max_drop=0, combine=combine)
        assert plan.reading.combine == combine
        costs[combine] = plan.point.macs
    plan = predictions.solve(max_drop=0)
    assert plan.reading.combine in ("mean", "product")
    assert plan.point.macs <= costs["last"]
    assert all(name in plan.notes[0] for name in costs)


def test_without_labels_disagreement_is_held_and_that_is_said():
    predictions = table(4000, labels=None)
    plan = predictions.solve(max_drop=2)
    assert plan.reading == Reading("top_probability", "last", (1.0, 1.0))
    assert plan.point.labels == "none"
    assert plan.point.accuracy_drop == pytest.approx(1 - plan.point.accuracy)
    assert "differs from the original network's" in plan.notes[0]
    labelled = table(4000)
    found = labelled.evaluate(plan)
    reference = float((labelled.evidence.answers[-1] == labelled.labels).mean())
    assert reference - found.accuracy <= plan.point.accuracy_drop + 0.002
    with pytest.raises(DynamizeError, match="cannot be judged without labels"):
        predictions.solve(combine="mean")


def test_agreement_needs_no_threshold():
    predictions = table(names=tuple(MACS), labels=None)
    plan = predictions.solve(macs_ratio=0.95, score="agreement")
    small, middle, _ = predictions.evidence.answers
    assert plan.point.exits == pytest.approx([0, (small == middle).mean(), (small != middle).mean()])
    assert plan.point.macs == pytest.approx(4e8 + (small != middle).mean() * 1e9)
    with pytest.raises(DynamizeError, match="at least two networks before the last"):
        table().solve(score="agreement")


def test_a_network_that_answers_nobody_is_not_asked_unless_later_answers_build_on_it():
    predictions = table(names=tuple(MACS))
    warmth = (1.0, 1.0, 1.0)
    last, mean = (predictions.read(Reading("margin", one, warmth)) for one in ("last", "mean"))
    assert last.evaluate([None, None]).cost == 1e9
    assert last.evaluate([None, -LARGEST]).cost == 3e8
    assert mean.never == LARGEST
    assert mean.evaluate([LARGEST, LARGEST]).cost == 1.4e9


def test_nothing_is_held_back_where_nothing_is_chosen():
    plan = table(1500).solve(max_drop=3, certain=0.9, combine="last")
    assert plan.point.certified is not None
    assert plan.point.certified.model_dump(exclude_none=True) == {"max_drop": 0.03, "certain": 0.9, "images": 1500}
    assert plan.reading.temperatures == (1.0, 1.0)
    chosen = table(1500).solve(max_drop=3, certain=0.9)
    assert chosen.point.certified is not None
    assert chosen.point.certified.images == 900
    assert table(1500, tuple(MACS), labels=None).solve(max_drop=3, certain=0.9).point.certified.images == 900
    agreed = table(1500, tuple(MACS), labels=None).solve(max_drop=25, certain=0.9, score="agreement")
    assert agreed.point.certified.images == 1500
    assert agreed.point.thresholds == {"small": LARGEST, "middle": 1.0}


def test_files(tmp_path):
    found, labels = logits(300)
    probabilities = {name: softmax(one, axis=1) for name, one in found.items()}
    top = np.argsort(-found["small"], axis=1)[:, 3::-1]  # any order
    np.savez(
        tmp_path / "small.npz",
        **{"small.classes": top, "small.probabilities": np.take_along_axis(probabilities["small"], top, 1)},
        labels=labels,
    )
    np.savez(tmp_path / "others.npz", **{"middle.probabilities": probabilities["middle"], "big.logits": found["big"]})
    files = [tmp_path / "small.npz", tmp_path / "others.npz"]
    read = dz.PredictionTable.read_files(files, MACS)
    assert read.names == tuple(MACS)
    assert (read.labels == labels).all()
    assert (read.evidence.answers == [one.argmax(1) for one in found.values()]).all()
    assert dz.PredictionTable.read_files(files, MACS, labels=None).labels is None
    whole = table(300, tuple(MACS)).read(Reading("margin", "last", (1.0,) * 3))
    assert np.allclose(read.read(Reading("margin", "last", (1.0,) * 3)).scores, whole.scores)
    with pytest.raises(DynamizeError, match="'large' is no network in these files"):
        dz.PredictionTable.read_files(files, {"small": 1, "large": 2})
    (tmp_path / "no.npz").write_bytes(b"nothing")
    with pytest.raises(DynamizeError, match=r"no\.npz"):
        dz.PredictionTable.read_files(tmp_path / "no.npz", MACS)


FINE = np.full((30, 4), 0.25)
TWO = {"one": 1.0, "two": 2.0}


@pytest.mark.parametrize(
    ("predictions", "more", "says"),
    [
        ({"one": FINE}, {}, "at least two"),
        ({"one": FINE, "two": FINE[:20]}, {}, "different numbers of images"),
        ({"one": FINE, "two": FINE}, {"macs": {"one": 1.0}}, "macs of two is missing"),
        ({"one": FINE, "two": FINE}, {"macs": {"one": 1.0, "two": -1.0}}, "positive"),
        ({"two": FINE, "one": FINE}, {}, "two takes more MACs than one, .* give the dearest network last"),
        ({"one": FINE * 8, "two": FINE}, {}, "from_logits"),
        ({"one": FINE / 2, "two": FINE}, {}, "give the classes beside them"),
        ({"one": FINE[0], "two": FINE}, {}, "images, classes"),
        ({"one": FINE, "two": np.full((30, 4), np.nan)}, {}, "softmax"),
        ({"one": FINE, "two": (np.zeros((30, 4), int), FINE)}, {}, "same class twice"),
        ({"one": FINE, "two": (np.zeros((30, 3), int), FINE)}, {}, "classes have to be indices"),
        ({"one": FINE, "two": FINE}, {"labels": np.full(30, -1)}, "class indices"),
        ({"one": FINE, "two": FINE}, {"class_count": 3}, "class 3 is named"),
        ({"one": FINE, "two": np.full((30, 5), 0.2)}, {}, "different numbers of classes"),
    ],
)
def test_refuses_what_does_not_fit(predictions, more, says):
    with pytest.raises(DynamizeError, match=says):
        dz.PredictionTable(predictions, **({"macs": TWO} | more))


@pytest.mark.slow
def test_imagenet_pairs_save_what_was_measured_of_them():
    """MobileNetV2 in front of ResNet-50, both halves of the validation images in turn; agreement of two, on all."""
    file = shared_data() / "imagenet-val-top5.npz"
    macs = {"mobilenet_v2": 0.30e9, "nasnet_mobile": 0.56e9, "resnet50": 4.11e9}
    pair = {name: macs[name] for name in ("mobilenet_v2", "resnet50")}
    predictions = dz.PredictionTable.read_files(file, pair, class_count=1000)
    mixed = np.random.default_rng(0).permutation(predictions.images)
    halves = [predictions.subset(half) for half in np.array_split(mixed, 2)]
    found = []
    for fitted, judged in (halves, halves[::-1]):
        plan = fitted.solve(max_drop=0.5, score="margin")
        reference = float((judged.evidence.answers[-1] == judged.labels).mean())
        seen = judged.evaluate(plan)
        found.append((4.11e9 / seen.cost, reference - seen.accuracy))
    assert np.mean(found, axis=0)[0] > 2.9
    assert np.mean(found, axis=0)[1] < 0.006
    agreed = dz.PredictionTable.read_files(file, macs, class_count=1000)
    point = agreed.solve(macs_ratio=1, score="agreement", combine="last").point
    assert 4.11e9 / point.macs == pytest.approx(2.10, abs=0.01)
    assert 100 * point.accuracy_drop == pytest.approx(-0.83, abs=0.01)
