"""What a report says about exits and gates, counted again image by image."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from digits import SHAPE, digit_splits
from gated_networks import scatter
from networks import exit_scores, set_temperatures, set_thresholds, temperatures

from dynamize.calibration.asking import Asking
from dynamize.calibration.collect import confidences, macs_table
from dynamize.calibration.protocols import budgeted_batch
from dynamize.conversion import convert, wrap
from dynamize.data import LoaderSet
from dynamize.evaluation import Evaluator
from dynamize.final import measure
from dynamize.measure.accuracy import everything
from dynamize.measure.costs import exit_costs
from dynamize.models import create
from dynamize.nn.network import DynamicNetwork, record_routing
from dynamize.nn.piece import LEAVES, Setting
from dynamize.report import Gallery, Ledger, ReportData, Standing, markdown
from dynamize.transforms import Cascade, ChannelGates, Exits, SkipGates
from dynamize.verbs.telling import report_data

EXITS = Exits(at=["layer1.1", "layer2.1"], head="conv", share=1.0, size=[16, 16])
SKIPS = SkipGates(blocks=[["layer1.1"], ["layer2.0"], ["layer3.1"]])
CHANNELS = ChannelGates(blocks=["layer1.2", "layer3.2"], multiple=4)
SMALL = {"source": "dynamize:digits_resnet_small", "kwargs": {"pretrained": True}}


class Told:
    """A network with gates or exits that disagree about digits, and the report about it."""

    def __init__(self, *steps: Exits | SkipGates | ChannelGates | Cascade) -> None:
        torch.manual_seed(0)
        original = create("digits_resnet", pretrained=True).eval()
        self.splits = digit_splits()
        self.network: DynamicNetwork = convert(original, list(steps), SHAPE)
        self.images = torch.cat([images for images, _ in self.splits.test.batches(100)])
        if not self.network.members:
            scatter(self.network, self.images)
        self.evaluator = Evaluator(wrap(original, SHAPE), self.splits.test, torch.device("cpu"), [], [1], seconds=0.0)

    def report(self) -> ReportData:
        rows = [self.evaluator.row(0, "static", self.evaluator.static, 0.0, [])]
        if self.network.decisions():
            rows.append(self.evaluator.row(1, "some", self.network, 0.0, []))
        final = measure(self.network, rows, self.evaluator)
        return report_data(Ledger(rows=final.rows), final, self.network, self.evaluator, self.splits)

    def here(self) -> Standing:
        """As the network stands."""
        report = self.report()
        return report.stands[report.here]

    def gallery(self) -> list[Gallery]:
        return self.here().gallery

    def one_by_one(self) -> tuple[list[int], dict[str, list[int]]]:
        """Exit of each image, run alone, and its option in each decision; -1 where it had left."""
        exits: list[int] = []
        taken: dict[str, list[int]] = {one.name: [] for one in self.network.decisions()}
        for image in self.images:
            with torch.no_grad(), record_routing(self.network) as routing:
                self.network.eval()(image[None])
            exits.append(int(routing.exits))
            for name, options in routing.taken.items():
                taken[name].append(int(options))
        return exits, taken


def leaving(told: Told) -> Told:
    """About a third leaves at each exit."""
    with torch.no_grad():
        seen = told.network.eval().run(told.images, everyone=True).seen
    pairs = zip(seen, (0.67, 0.5), strict=True)
    told.network.setting = Setting({name: float(score.quantile(share)) for (name, _, score), share in pairs})
    return told


@pytest.mark.parametrize("exits", [False, True])
@pytest.mark.fast("True")
def test_decisions_are_told_as_images_go(exits: bool) -> None:
    told = leaving(Told(EXITS, SKIPS, CHANNELS)) if exits else Told(SKIPS, CHANNELS)
    report = told.report()
    (stand,) = report.stands
    left, taken = told.one_by_one()
    assert report.images == 100
    assert stand.routings == len(set(zip(left, *taken.values(), strict=True))) > 2
    for place, decision in zip(report.places, told.network.decisions(), strict=True):
        facts = (place.name, place.kind, place.effect, place.always, tuple(place.options), tuple(place.macs))
        assert facts == tuple(
            getattr(decision, name) for name in ("name", "kind", "effect", "always", "options", "macs")
        )
        use, options = stand.use(place), taken[place.name]
        assert [one.share for one in use.options] == pytest.approx(
            [options.count(p) / 100 for p in range(len(use.options))]
        )
        assert use.left == pytest.approx(options.count(-1) / 100)
    assert [place.effect for place in report.places].count("leaves") == (2 if exits else 0)
    assert [place.options for place in report.places if place.kind == "channels"] == [
        ["25 % wide", "50 % wide", "75 % wide", "whole"]
    ] * 2
    assert any(stand.use(place).left for place in report.changing) is exits
    for k, place in enumerate(place for place in report.places if place.effect == "leaves"):
        assert stand.use(place).options[LEAVES].share == pytest.approx(left.count(k) / 100)


@pytest.mark.parametrize("steps", [(EXITS, SKIPS, CHANNELS), (EXITS,), (SKIPS,), (Cascade(first=[SMALL]),)])
@pytest.mark.fast("steps0")
def test_what_is_drawn_adds_up_to_what_was_executed(steps: tuple[Any, ...]) -> None:
    told = Told(*steps)
    report = (leaving(told) if len(told.network.leaving) == 2 else told).report()
    (stand,) = report.stands
    spent = 0.0
    for section, reached in zip(report.sections, stand.reached, strict=True):
        place = section.place
        spent += reached * (section.macs if place is None else place.always)
        if place is not None:
            shares = stand.decisions[place.name]
            spent += sum(share * macs for share, macs in zip(shares, place.macs, strict=True))
    assert spent == pytest.approx(stand.macs)
    assert all(stand.words[name] for name in stand.leaving)


@pytest.mark.parametrize("exits", [False, True])
@pytest.mark.fast("True")
def test_cheapest_and_dearest_images(exits: bool) -> None:
    told = leaving(Told(EXITS, SKIPS)) if exits else Told(SKIPS)
    gallery = told.gallery()
    assert [shown.exit for shown in gallery] == ([0, 1, 2, None] if exits else [None])
    _, taken = told.one_by_one()
    macs = exit_costs(told.network).executed({name: torch.tensor(one) for name, one in taken.items()}, 100)
    ranked = sorted(macs.tolist())
    shown = gallery[-1]
    assert [image.macs for image in shown.first] == ranked[:8]
    assert [image.macs for image in shown.last] == ranked[:-9:-1]
    assert ranked[0] < ranked[-1]
    assert all(image.macs is None for one in gallery[:-1] for image in one.first + one.last)


def test_marks_of_exits_count_what_gates_save() -> None:
    told = Told(EXITS, SKIPS)
    report = told.report()
    for k, mark in enumerate(report.anytime):
        names = enumerate(told.network.decision_names[0])
        told.network.setting = Setting({name: -1e9 if j == k else 1e9 for j, name in names})  # all at exit k, heads on
        assert mark.macs == pytest.approx(float(told.evaluator.judge(told.network).macs.mean()))
    whole = exit_costs(told.network).cumulative()
    assert report.anytime[0].macs < whole[0]


@pytest.mark.parametrize("steps", [(EXITS,), (EXITS, SKIPS)])
@pytest.mark.fast("steps1")
def test_budgets_are_set_on_calibration_images_and_judged_on_test_images(steps: tuple[Exits | SkipGates, ...]) -> None:
    told = leaving(Told(*steps))
    before, setting = temperatures(told.network), told.network.setting
    report = told.report()
    assert torch.equal(temperatures(told.network), before)
    assert told.network.setting == setting
    held_out = torch.cat([images for images, _ in told.splits.calibration.batches(100)])
    with torch.no_grad():
        logits = told.network.eval().all_exits(held_out)
    scores = [exit_scores(told.network, one, k).double().numpy() for k, one in enumerate(logits[:2])]
    seen = macs_table(
        told.network,
        everything(told.network, told.splits.test, torch.device("cpu")),
        told.evaluator.reference.answers,
        told.evaluator.static_macs,
    )
    wanted = budgeted_batch(np.stack([*scores, np.zeros(len(held_out))]), seen, count=12)
    assert len(report.budgeted) == 12
    for mark, point in zip(report.budgeted, wanted, strict=True):
        set_thresholds(told.network, point.thresholds)
        judged = told.evaluator.judge(told.network)  # where images really leave
        assert mark.accuracy == pytest.approx(judged.accuracy)
        assert mark.macs == pytest.approx(float(judged.macs.mean()))
    assert report.budgeted[0].macs < report.budgeted[-1].macs


def test_too_few_images_for_a_table_are_told_and_no_error() -> None:
    told = Told(EXITS)
    told.splits = replace(told.splits, test=LoaderSet("test", [(told.images[:9], torch.arange(9))]))
    told.evaluator.images = told.splits.test
    report = told.report()
    assert report.budgeted == []
    assert "no curve of budgeted batches: 9 " in report.notes[0]
    assert len(report.anytime) == 3


@pytest.fixture(scope="module", params=["mean", "last"])
def cascaded(request: pytest.FixtureRequest) -> Told:
    """Three networks of which the middle one is not asked."""
    told = Told(Cascade(first=[SMALL, {"resolution": 6}]))
    network = told.network
    set_temperatures(network, [2.0, 3.0])
    network.scored[-1].temperature.fill_(1.5)
    with torch.no_grad():
        score = network.run(told.images, everyone=True).seen[0][2]
    network.setting = Setting({"digits_resnet_small": float(score.quantile(0.6))}, combine=request.param)
    return told


@pytest.mark.fast("mean")
def test_who_answers_what_and_what_each_would_answer_alone(cascaded: Told) -> None:
    report = cascaded.report()
    found, stand = report.answerers, report.stands[report.here]
    left, _ = cascaded.one_by_one()
    with torch.no_grad():
        every = [logits.argmax(1) for logits in cascaded.network.eval().all_exits(cascaded.images)]
        given = cascaded.network(cascaded.images).argmax(1)
    labels = torch.cat([truth for _, truth in cascaded.splits.test.batches(100)])
    assert [one.name for one in found] == ["digits_resnet_small", "main-6", "main"]
    assert stand.exits == pytest.approx([left.count(k) / 100 for k in range(3)])
    assert stand.exits[1] == 0
    assert stand.right[1] is None
    for k in (0, 2):
        here = torch.tensor(left) == k
        assert stand.right[k] == pytest.approx(float((given == labels)[here].double().mean()))
    for one, answers in zip(found, every, strict=True):
        assert one.alone == pytest.approx(float((answers == labels).double().mean()))
        assert one.alike == pytest.approx([float((answers == other).double().mean()) for other in every])


@pytest.mark.fast("mean")
def test_a_cascade_is_shown_as_it_answers(cascaded: Told) -> None:
    """Joined where answers are joined, wrong ones from the surest down, and without networks that are not asked."""
    report = cascaded.report()
    network = cascaded.network
    assert [mark.name for mark in report.anytime] == ["digits_resnet_small", "main"]
    for mark, threshold in zip(report.anytime, (-1e9, 1e9), strict=True):
        told = replace_threshold(network, threshold)
        judged = cascaded.evaluator.judge(network)
        network.setting = told
        assert mark.accuracy == pytest.approx(judged.accuracy)
        assert mark.macs == pytest.approx(float(judged.macs.mean()))
    galleries = report.stands[report.here].gallery
    for gallery in galleries:
        sure = [image.confidence for image in gallery.wrong]
        assert sure == sorted(sure, reverse=True)
        assert all(image.label != image.answer for image in gallery.wrong)
    assert not galleries[1].rows
    left = torch.tensor(cascaded.one_by_one()[0])
    joined = network.setting.combine == "mean"
    for gallery, k, temperature in ((galleries[0], 0, 2.0), (galleries[2], 2, 1.5)):
        with torch.no_grad():
            logits = network(cascaded.images)[left == k] / (1 if joined else temperature)
        surest = logits.softmax(1).amax(1).sort(descending=True).values[:8]
        assert [image.confidence for image in gallery.first] == pytest.approx(surest.tolist(), rel=1e-4)
    stand = report.stands[report.here]
    rights = sum(share * (right or 0) for share, right in zip(stand.exits, stand.right, strict=True))
    assert rights == pytest.approx(cascaded.evaluator.judge(network).accuracy)


@pytest.mark.fast("mean")
def test_budgets_of_a_cascade_are_of_the_networks_that_are_asked(cascaded: Told) -> None:
    network, before = cascaded.network, cascaded.network.setting
    asking = Asking.at(network, before)
    kept = [0, 2]
    splits = cascaded.splits
    test, held_out = (everything(network, one, torch.device("cpu")) for one in (splits.test, splits.calibration))
    table = macs_table(network, test, cascaded.evaluator.reference.answers, cascaded.evaluator.static_macs)
    wanted = budgeted_batch(confidences(asking.seen(network, held_out))[kept], table, count=12)
    report = cascaded.report()
    assert len(report.budgeted) == 12
    for mark, point in zip(report.budgeted, wanted, strict=True):
        replace_threshold(network, point.thresholds[0])
        judged = cascaded.evaluator.judge(network)
        network.setting = before
        assert mark.accuracy == pytest.approx(judged.accuracy)
        assert mark.macs == pytest.approx(float(judged.macs.mean()))


def replace_threshold(network: DynamicNetwork, threshold: float | None) -> Setting:
    """Of the first network; gives the setting before."""
    before = network.setting
    network.setting = replace(before, thresholds={**before.thresholds, "digits_resnet_small": threshold})
    return before


def test_nobody_comes_to_the_last_gates() -> None:
    told = Told(EXITS, SKIPS)
    told.network.setting = Setting({told.network.decision_names[0][0]: -1e9})
    report = told.report()
    gates = [report.stands[0].use(place) for place in report.changing]
    assert [use.left for use in gates] == [0, 1, 1]
    assert gates[-1].executed == 0


def test_exits_alone_and_a_static_network_have_no_gates() -> None:
    with_exits = leaving(Told(EXITS)).report()
    assert with_exits.changing == []
    assert "## Gates" not in markdown.render(with_exits)
    assert [shown.exit for shown in with_exits.stands[0].gallery] == [0, 1, 2]
    alone = Told().report()
    assert (alone.places, alone.stands[0].gallery, alone.anytime) == ([], [], [])


def test_a_class_that_only_the_static_network_answers() -> None:
    told = Told(EXITS)
    reference = told.evaluator.reference
    told.evaluator.reference = replace(reference, answers=torch.full_like(reference.answers, 12))
    report = told.report()
    assert report.classes is not None
    assert len(report.classes.count) == 13
    assert sum(images for _, answer, images in report.classes.confused if answer == 12) == 100


def test_costs_are_those_of_the_whole_network_the_first_time_too() -> None:
    network = convert(create("digits_resnet", pretrained=True).eval(), [SKIPS, CHANNELS], SHAPE)
    whole = float(exit_costs(wrap(create("digits_resnet"), SHAPE)).cumulative()[-1])
    gates = sum(one.always for one in network.decisions())
    for _ in range(2):
        assert float(exit_costs(network).cumulative()[-1]) == whole + gates
