"""`suggest`: the rule by hand, published figures as the libraries have them, recipes that can be read."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dynamize.errors import DynamizeError, InfeasibleError
from dynamize.recipe import parse_recipe
from dynamize.sources import SourceSpec, parse
from dynamize.verbs import suggest as verb
from dynamize.verbs.published import Published, timm_networks, torchvision_networks
from dynamize.verbs.suggest import Suggestion, suggest

TIMM = "needs timm, which knows its networks' preprocessing"
RESULTS = """model,img_size,top1,top1_err,top5,top5_err,param_count,crop_pct,interpolation
efficientnet_b0.ra4_e3600_r224_in1k,256,79.364,20.6,94.7,5.3,5.29,1.000,bicubic
mobilenetv3_large_100.ra4_e3600_r224_in1k,224,76.310,23.7,92.9,7.1,5.48,0.875,bicubic
resnet50.a1_in1k,224,80.2,19.8,94.6,5.4,25.56,0.950,bicubic
vit_base_patch16_224.augreg_in21k,224,84.5,15.5,97.3,2.7,86.57,0.900,bicubic
caformer_s18.sail_in1k,224,83.7,16.3,96.5,3.5,26.34,1.000,bicubic
gone_since.in1k,224,90.0,10.0,99.0,1.0,1.00,1.000,bicubic
"""
SPEEDS = """model,infer_img_size,infer_samples_per_sec,infer_gmacs
efficientnet_b0,224,8794.71,0.40
efficientnet_b0,256,7035.98,0.52
mobilenetv3_large_100,256,11450.74,0.29
vit_base_patch16_224,224,1000,16.9
caformer_s18,224,1000,4.13
"""


def network(name: str, accuracy: float, giga: float) -> Published:
    normalize = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    return Published(f"torchvision:{name}", name, f"torchvision:{name}", accuracy, giga * 1e9, 224, 256, normalize)


def among(patch: pytest.MonkeyPatch, *networks: Published, **wanted: Any) -> Suggestion:
    """The answer where there are no other networks than these."""
    patch.setattr(verb, "torchvision_networks", lambda: list(networks))
    return suggest(**wanted)


@pytest.mark.parametrize(
    ("wanted", "share", "drop"),
    [
        (75.0, 0.075, 0.0),
        (74.75, 0.065, 0.25),
        (74.5, 0.055, 0.5),
        (74.0, 0.045, 1.0),
        (73.0, 0.045, 1.0),  # nothing is known of larger drops
    ],
)
def test_the_rule(wanted: float, share: float, drop: float, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = network("small", 71.0, 0.3), network("large", 75.0, 4.0)
    found = among(monkeypatch, small, large, accuracy=wanted)
    (cascade,) = found.cascades
    assert cascade.members == (small, large)
    assert cascade.deferred == pytest.approx(4 * share)
    assert cascade.macs == pytest.approx(0.3e9 + 4 * share * 4e9)
    assert cascade.macs_worst == pytest.approx(4.3e9)
    assert (cascade.accuracy, cascade.drop) == pytest.approx((75 - drop, drop))
    assert [one.members for one in found.networks] == [(large,)]
    assert found.saving(cascade) == pytest.approx(4e9 / cascade.macs)
    assert found.best == cascade


def test_pairs_too_near_too_far_or_too_dear_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    large = network("large", 80.0, 4.0)
    firsts = [network("near", 78.5, 0.1), network("far", 70.0, 0.1), network("dear", 76.0, 3.9)]
    found = among(monkeypatch, *firsts, large, accuracy=80.0)
    assert found.cascades == []
    assert found.best.members == (large,)
    assert found.recipe("digits") is None
    assert any("no cascade for 80 %" in note for note in found.notes)


def test_the_single_network_wins_where_it_is_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    modern, small = network("modern", 77.0, 0.4), network("small", 72.0, 0.3)
    old = replace(network("resnet50", 76.0, 4.0), source="torchvision:resnet50,weights=IMAGENET1K_V2")
    found = among(monkeypatch, modern, old, small, source=parse("torchvision:resnet50"))
    assert found.best.members[-1] == modern
    assert [one.members for one in found.ahead] == [(small, old)]
    assert found.saving(found.ahead[0]) < 1


@pytest.fixture(scope="module")
def of_torchvision() -> list[Published]:
    return torchvision_networks()


def test_torchvisions_own_figures(of_torchvision: list[Published]) -> None:
    known = {one.source: one for one in of_torchvision}
    one = known["torchvision:efficientnet_b1,weights=IMAGENET1K_V2"]
    assert (one.accuracy, one.macs, one.size, one.resize) == (79.838, pytest.approx(0.687e9), 240, 255)
    assert one.normalize == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert all(math.isfinite(each.accuracy) and each.macs > 0 for each in of_torchvision)
    assert not any(name in one.source for one in of_torchvision for name in ("vit_", "swin_", "maxvit"))


def test_the_best_weights_of_a_network_count() -> None:
    found = suggest(accuracy=80, most=1000)
    sources = [one.members[0].source for one in found.networks]
    assert "torchvision:resnet50,weights=IMAGENET1K_V2" in sources
    assert len({source.partition(",")[0] for source in sources}) >= len(sources) - 3  # but for other sizes
    assert [one.macs for one in found.networks] == sorted(one.macs for one in found.networks)
    assert all(one.accuracy >= 80 for one in (*found.networks, *found.cascades))
    assert found.saving(found.cascades[0]) > 1.5


def test_a_named_network_comes_last() -> None:
    found = suggest(parse("torchvision:convnext_tiny"), max_drop=0.5)
    assert found.wanted == pytest.approx(82.02)
    assert {one.members[1].source for one in found.ahead} == {"torchvision:convnext_tiny,weights=IMAGENET1K_V1"}
    assert found.saving(found.ahead[0]) == pytest.approx(3.27, abs=0.01)
    old = suggest(parse("torchvision:resnet50,weights=ResNet50_Weights.IMAGENET1K_V1"))
    assert old.network is not None
    assert (old.network.accuracy, old.wanted) == (76.13, 76.13)


@pytest.mark.parametrize("source", [None, "torchvision:convnext_tiny", "torchvision:regnet_y_16gf"])
def test_recipes_can_be_read(source: str | None) -> None:
    found = suggest(None if source is None else parse(source), accuracy=None if source else 80)
    text = found.recipe("imagefolder:a folder")
    assert text is not None
    assert found.to_try is not None
    plain = yaml.safe_load(text)
    cascade, _ = plain["steps"]
    assert cascade["pass"] == "cascade"
    first, last = found.to_try.members
    (member,) = cascade["first"]
    assert SourceSpec.model_validate(member).kwargs == {"weights": first.source.rpartition("=")[2]}
    recipe = parse_recipe(plain, "suggested")
    assert [step.pass_name for step in recipe.steps] == ["cascade", "calibrate"]
    assert recipe.model.kwargs == {"weights": last.source.rpartition("=")[2]}
    assert recipe.model.input == (3, last.size, last.size)
    assert recipe.data.source == "imagefolder:a folder"
    assert (recipe.data.resize, recipe.data.normalize) == (last.resize, last.normalize)


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ({}, "Give an accuracy or a network"),
        ({"accuracy": 80, "source": "torchvision:resnet50"}, "Give an accuracy or a network"),
        ({"accuracy": 0.8}, "in percent"),
        ({"accuracy": float("nan")}, "in percent"),
        ({"accuracy": 101}, "in percent"),
        ({"accuracy": 80, "max_drop": 0.5}, "--max-drop is of a network"),
        ({"source": "torchvision:resnet50", "max_drop": 3}, "0 to 1 points"),
        ({"source": "torchvision:resnet51"}, "Did you mean torchvision:resnet50"),
        ({"source": "torchvision:vit_b_16"}, "No accuracy and MACs"),
        ({"source": "dynamize:cifar_resnet56"}, "say --accuracy"),
        ({"source": "torchvision:resnet50,num_classes=10"}, "with num_classes=10"),
        ({"source": "torchvision:resnet50,weights=V9"}, "use one of IMAGENET1K_V1, IMAGENET1K_V2"),
    ],
)
def test_refusals(wanted: dict[str, Any], told: str) -> None:
    source = parse(wanted.pop("source")) if "source" in wanted else None
    with pytest.raises(DynamizeError, match=told):
        suggest(source, **wanted)


def test_an_accuracy_that_nobody_has() -> None:
    with pytest.raises(InfeasibleError, match="the best is torchvision:regnet_y_128gf.*88.2 or less") as refused:
        suggest(accuracy=95)
    assert refused.value.nearest == pytest.approx(88.228)


@pytest.fixture
def tables(tmp_path: Path) -> list[Path]:
    pytest.importorskip("timm", reason=TIMM)
    (tmp_path / "results.csv").write_text(RESULTS)
    (tmp_path / "speeds.csv").write_text(SPEEDS)
    return [tmp_path / "speeds.csv", tmp_path / "results.csv"]


def test_timms_tables(tables: list[Path]) -> None:
    found, notes = timm_networks(tables)
    known = {one.network: one for one in found}
    assert set(known) == {
        "timm:efficientnet_b0.ra4_e3600_r224_in1k",
        "timm:mobilenetv3_large_100.ra4_e3600_r224_in1k",
    }  # no transformers, none without MACs, none that this timm does not have
    big, small = known.values()
    assert (big.macs, big.size, big.resize) == (pytest.approx(0.52e9), 256, 256)
    assert (small.macs, small.size, small.resize) == (pytest.approx(0.29e9 * (224 / 256) ** 2), 224, 256)
    assert len(big.normalize[0]) == 3
    assert notes == ["1 timm networks are left out: the tables have no infer_gmacs of theirs"]

    cascade = suggest(parse("timm:efficientnet_b0.ra4_e3600_r224_in1k"), timm_tables=tables, most=99)
    names = [one.members[0].network for one in cascade.ahead]
    assert "timm:mobilenetv3_large_100.ra4_e3600_r224_in1k" in names
    assert "torchvision:mobilenet_v3_large" in names
    recipe = yaml.safe_load(cascade.recipe("digits") or "")
    assert SourceSpec.model_validate({"source": recipe["model"]["source"]}).kwargs == {"pretrained": True}


def test_timms_own_choice_of_weights(tables: list[Path]) -> None:
    timm = pytest.importorskip("timm", reason=TIMM)
    tag = timm.get_pretrained_cfg("efficientnet_b0").tag
    tables[1].write_text(RESULTS.replace("ra4_e3600_r224_in1k", tag))
    found = suggest(parse("timm:efficientnet_b0"), timm_tables=tables)
    assert found.network is not None
    assert found.network.network == f"timm:efficientnet_b0.{tag}"


@pytest.mark.parametrize(
    ("text", "told"), [("a,b\n1,2\n", "lacks the columns model"), ("", "lacks the columns"), (None, "Cannot read")]
)
def test_other_files_are_refused(text: str | None, told: str, tmp_path: Path) -> None:
    pytest.importorskip("timm", reason=TIMM)
    file = tmp_path / "x.csv"
    if text is not None:
        file.write_text(text)
    with pytest.raises(DynamizeError, match=told):
        suggest(accuracy=80, timm_tables=[file])


def test_timm_has_the_files_that_are_named() -> None:
    pytest.importorskip("timm", reason=TIMM)
    from timm.models import list_modules

    from dynamize.verbs.published import TIMM_CNNS

    assert set(list_modules()) >= TIMM_CNNS
