"""Cascades from names, from smaller images, from smaller copies and from Python; and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import close
from pydantic import ValidationError
from torchvision.transforms import v2

import dynamize as dz
from dynamize.data import DataSpec, load_data
from dynamize.member import Member
from dynamize.nn.piece import MAIN, Setting
from dynamize.nn.preprocess import Preprocess
from dynamize.preprocessing import Preprocessing, Steps, of_images, published, steps_between
from dynamize.sources import SourceSpec
from dynamize.transform import Context
from dynamize.transforms.cascade import chance_notes

SHAPE = (1, 8, 8)
SMALL: dict[str, Any] = {"source": "dynamize:digits_resnet_small", "kwargs": {"pretrained": True}}


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    return dz.source("dynamize:digits_resnet", pretrained=True)


@pytest.fixture(scope="module")
def context() -> Context:
    spec = DataSpec(source="digits", train_limit=64, test_limit=60, normalize=((0.305,), (0.376,)))
    return Context(data=load_data(spec, SHAPE, 10), backend="eager")


def test_calibration_chooses_who_is_asked_and_keeps_what_it_promises(
    net: torch.nn.Module, context: Context, tmp_path: Path
) -> None:
    steps = [dz.Cascade(first=[SMALL, {"resolution": 7}]), dz.Calibrate(max_drop=0.5, points=6)]
    network = dz.convert(net, steps, SHAPE, context).eval()
    point = network.operating_point
    assert point.macs_ratio < 0.2
    assert set(point.thresholds) == {"digits_resnet_small", "main-7"}
    dz.save(network, tmp_path)
    loaded = dz.load(tmp_path)
    images = torch.cat([batch for batch, _ in context.data.calibration.batches(256)])
    labels = torch.cat([truth for _, truth in context.data.calibration.batches(256)])
    for each in network.operating_points:
        setting = Setting(each.thresholds, combine=each.combine)
        found, again = network.run(images, setting), loaded.run(images, setting)
        assert torch.equal(found.logits, again.logits)
        right = float((found.logits.argmax(1) == labels).double().mean())
        assert each.accuracy_ci[0] <= right <= each.accuracy_ci[1]


def test_smaller_images_and_smaller_copies(net: torch.nn.Module, context: Context, tmp_path: Path) -> None:
    steps = [
        dz.Cascade(first=[{"shrink": 0.3, "name": "few"}, {"resolution": 6}]),
        dz.Distill(epochs=1, batch_size=32),
        dz.Calibrate(macs_ratio=0.9, points=2),
    ]
    network = dz.convert(net, steps, SHAPE, context).eval()
    assert network.made == (("few",),)
    assert [step.get("member") for step in network.history] == [None, "few", None]
    costs = {piece.name: piece.macs for piece in network.row}
    own = sum(cost for name, cost in costs.items() if "/" not in name)
    assert sum(cost for name, cost in costs.items() if name.startswith("few/")) < 0.35 * own
    before, after = net.state_dict(), network.take([MAIN]).nets[MAIN].state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())  # it came trained
    dz.save(network, tmp_path)
    images = torch.randn(20, *SHAPE)
    assert torch.equal(dz.load(tmp_path)(images), network(images))


@pytest.mark.slow
def test_a_cascade_in_bytes(net: torch.nn.Module, context: Context, tmp_path: Path) -> None:
    """Every network of it has ranges of its own, from images; thresholds are solved again."""
    context = replace(context, teacher=net)
    steps = [dz.Cascade(first=[SMALL, {"resolution": 7}]), dz.Calibrate(max_drop=2), dz.Quantize(images=64)]
    network = dz.convert(net, steps, SHAPE, context).eval()
    assert not network.history[-1]["float_layers"]
    dz.save(network, tmp_path)
    loaded = dz.load(tmp_path)
    images = torch.cat([batch for batch, _ in context.data.test.batches(256)])
    everyone = Setting(dict.fromkeys(network.members, 2.0), combine="product")
    for setting in (everyone, network.setting):
        found = network.run(images, setting)
        again = loaded.run(images, setting)
        assert torch.equal(found.logits, again.logits)
        compiled = dz.compile_network(network, "onnxruntime").run(images, setting)
        assert (compiled.logits.argmax(1) == found.logits.argmax(1)).double().mean() > 0.97


def test_a_network_gets_the_images_that_it_was_trained_on() -> None:
    given = Preprocessing(size=(64, 64), normalize=((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
    wanted = Preprocessing(size=(24, 24), crop=0.75, normalize=((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)))
    steps = steps_between(given, wanted)
    assert steps is not None
    pixels = torch.rand(3, 3, 64, 64)
    theirs = v2.Compose([v2.Resize(32, antialias=True), v2.CenterCrop(24), v2.Normalize(*wanted.normalize)])(pixels)
    ours = Preprocess(given.size, steps.size, steps.share, steps.scale, steps.shift)((pixels - 0.5) / 0.5)
    assert float((ours - theirs).abs().mean()) < 0.05  # cropped before instead of after: edges see other neighbours
    whole = steps_between(given, wanted.model_copy(update={"crop": 1.0}))
    assert whole is not None
    theirs = v2.Compose([v2.Resize(24, antialias=True), v2.Normalize(*wanted.normalize)])(pixels)
    assert close(Preprocess(given.size, whole.size, 1.0, whole.scale, whole.shift)((pixels - 0.5) / 0.5), theirs)
    assert steps_between(given, given) is None


def test_published_preprocessing_is_taken_where_weights_have_some() -> None:
    found = published(SourceSpec(source="torchvision:resnet18", kwargs={"weights": "DEFAULT"}), torch.nn.Identity())
    assert found is not None
    assert found.size == (224, 224)
    assert found.normalize == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert published(SourceSpec(source="torchvision:resnet18"), torch.nn.Identity()) is None
    assert of_images(DataSpec(source="digits", image_size=224), (224, 224)).crop == 224 / 256


def test_networks_from_python_are_given_again(net: torch.nn.Module, tmp_path: Path) -> None:
    small = dz.source("dynamize:digits_resnet_small", pretrained=True)
    network = dz.convert(net, [dz.Cascade(first=[{"name": "mine"}])], SHAPE, Context(members={"mine": small})).eval()
    dz.save(network, tmp_path)
    images = torch.randn(4, *SHAPE)
    setting = Setting({"mine": 3.0}, combine="product")
    loaded = dz.load(tmp_path, members={"mine": dz.source("dynamize:digits_resnet_small")})
    assert torch.equal(loaded.run(images, setting).logits, network.run(images, setting).logits)
    with pytest.raises(dz.DynamizeError, match=r"no network of that name was passed.*members"):
        dz.load(tmp_path)


@pytest.mark.parametrize(
    ("first", "told"),
    [
        ([{"source": "dynamize:digits_resnet_small,num_classes=7"}], "different numbers of classes.*7, main 10"),
        ([{"resolution": 9}], "9 is larger than the 8 x 8 of the recipe's images"),
        ([{"resolution": 100_000}], "100000 is larger"),
        ([{**SMALL, "size": 60}], "not in the order of their costs"),
        ([{"resolution": 7}, SMALL], "not in the order of their costs"),
        ([{**SMALL, "name": "a"}, {"resolution": 7, "name": "a"}], "'a' is the name of two"),
        ([{"source": "dynamize:digits_resnt"}], "no classification network"),
        ([{**SMALL, "kwargs": {}, "checkpoint": "nowhere.pt"}], "nowhere.pt"),
        ([{"shrink": 0.0001}], "ask for a larger share"),
        ([{"name": "mine"}], "no network of that name was passed"),
        ([{**SMALL, "normalize": [[0.5], [0.5]]}], "that of the images is not known"),
    ],
)
def test_what_cannot_be_a_cascade(net: torch.nn.Module, first: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(dz.DynamizeError, match=told):
        dz.convert(net, [dz.Cascade(first=first)], SHAPE, Context(backend="eager"))


@pytest.mark.parametrize(
    ("member", "told"),
    [
        ({}, "say what the network is"),
        ({"resolution": 6, "shrink": 0.5}, "resolution and shrink"),
        ({"name": "main", "resolution": 6}, "cannot be used"),
        ({"name": "a/b", "resolution": 6}, "cannot be used"),
        ({"checkpoint": "x.pt", "resolution": 6}, "belong to a source"),
        ({"source": "resnet50"}, "is not a source"),
        ({"shrink": 1.0}, "less than 1"),
        ({**SMALL, "normalize": [[0.3], [0.0]]}, "std above 0"),
        ({**SMALL, "normalize": [[30.0], [70.0]]}, "divide values meant for 0..255 by 255"),
        ({**SMALL, "normalize": [[0.3, 0.3], [0.3]]}, "2 means and 1 deviations"),
    ],
)
def test_members_that_say_nothing_or_too_much(member: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        Member.model_validate(member)


def test_steps_that_mean_no_network_or_all(net: torch.nn.Module, context: Context) -> None:
    cascade = dz.Cascade(first=[SMALL])
    with pytest.raises(dz.DynamizeError, match="smal is no network of this row. Did you mean"):
        dz.convert(net, [cascade, dz.Exits(member="smal")], SHAPE)
    with pytest.raises(dz.DynamizeError, match=r"came trained.*member: main or digits_resnet_small"):
        dz.convert(net, [cascade, dz.Distill(epochs=1)], SHAPE, context)
    with pytest.raises((ValidationError, dz.DynamizeError), match="about all networks of a row"):
        dz.Calibrate(member="main")


def test_a_network_at_chance_level_is_named(net: torch.nn.Module, context: Context) -> None:
    torch.manual_seed(0)
    applied = dz.Cascade(first=[{"source": "dynamize:digits_resnet_small"}]).apply(dz.convert(net, [], SHAPE), context)
    assert any("as by chance" in note for note in applied.notes)


@pytest.mark.parametrize(("share", "named"), [(0.99, False), (0.75, False), (0.5, True), (0.03, True)])
def test_chance_level_of_two_classes_is_half_or_less(share: float, named: bool) -> None:
    labels = torch.arange(200) % 2
    right = torch.arange(200) < 200 * share
    assert bool(chance_notes("small", right, labels, "test")) == named


def test_a_normalisation_for_other_channels(net: torch.nn.Module, context: Context) -> None:
    colour = {**SMALL, "normalize": [[0.3] * 3, [0.3] * 3]}
    with pytest.raises(dz.DynamizeError, match="normalize has 3 channels and the images 1"):
        dz.convert(net, [dz.Cascade(first=[colour])], SHAPE, context)


def test_points_that_ask_some_networks_say_where_all_images_leave(net: torch.nn.Module, context: Context) -> None:
    """Nobody at networks that are not asked: `dz.Controller` adds up the shares of different points."""
    steps = [dz.Cascade(first=[SMALL, {"resolution": 7}]), dz.Calibrate(macs_ratio=0.9, points=12)]
    network = dz.convert(net, steps, SHAPE, context).eval()
    assert any(None in point.thresholds.values() for point in network.operating_points)
    for point in network.operating_points:
        assert len(point.exits) == 3
        assert sum(point.exits) == pytest.approx(1)
        names = [*point.thresholds]
        assert all(point.exits[names.index(name)] == 0 for name in names if point.thresholds[name] is None)


@pytest.mark.slow
def test_copies_are_said_to_be_untrained(net: torch.nn.Module, context: Context) -> None:
    applied = dz.Cascade(first=[{"shrink": 0.3, "name": "few"}]).apply(dz.convert(net, [], SHAPE), context)
    assert any("not trained yet" in note and "few" in note for note in applied.notes)


def test_resolved_steps_are_plain_data() -> None:
    steps = Steps(size=(4, 4), share=0.5)
    member = Member(name="a", resolution=4, preprocess=steps)
    assert Member.model_validate(member.model_dump(mode="json")) == member
