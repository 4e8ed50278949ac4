"""What is exported answers as the compiled network does, image by image, where there is no torch."""

import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bare_environment import answers_of, bare_python, driver_of
from gated_networks import GATES, gated_resnet, split_exits
from gated_networks import images as resnet_images
from torch import Tensor, nn

import dynamize as dz
from dynamize.conversion import apply, convert, wrap
from dynamize.data import DataSpec, load_data
from dynamize.errors import DynamizeError
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting
from dynamize.runtime import export, exportable
from dynamize.runtime.compiled import compile_network
from dynamize.transform import Context
from dynamize.transforms import Cascade, Exits, Quantize, SkipGates

SHAPE = (3, 12, 12)
DIGITS = (1, 8, 8)
SMALL: dict[str, Any] = {"source": "dynamize:digits_resnet_small", "kwargs": {"pretrained": True}}
SAVED = Path(__file__).parents[1] / "artifacts" / "v1"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bare_python(tmp_path_factory.mktemp("bare") / "venv")


@pytest.fixture(scope="module")
def digits() -> Context:
    return Context(data=load_data(DataSpec(source="digits", normalize=((0.305,), (0.376,))), DIGITS, 10))


@pytest.fixture(scope="module")
def pictures(digits: Context) -> Tensor:
    """500 digits."""
    return torch.cat([images for images, _ in digits.data.train.batches(100)][:5])


def network(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        width = layer(torch.zeros(1, 8, 12, 12)).flatten(1).shape[1]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), layer, nn.Flatten(), nn.Linear(width, 7)).eval()


def cascade(
    pictures: Tensor, combine: str = "last", confidence: str = "top_probability", **main: Any
) -> DynamicNetwork:
    """Three networks, of which each answers about half of what it gets; the smallest has an exit of its own."""
    first = [SMALL, {"resolution": 7, "name": "coarse"}]
    steps: list[Any] = [Cascade(first=first, confidence=confidence), Exits(member="digits_resnet_small", count=1)]
    if main:
        steps.insert(0, SkipGates.model_validate(main))
    found = dz.convert(dz.source("dynamize:digits_resnet", pretrained=True), steps, DIGITS).eval()
    for piece, temperature in zip(found.scored, (0.9, 1.7, 0.6, 1.3), strict=True):
        piece.temperature.fill_(temperature)
    for piece in found.changing:
        nn.init.normal_(piece.gate.linear.weight, std=2.0)
    with torch.no_grad():
        scores = {name: score for name, _, score in found.run(pictures, everyone=True).seen if score is not None}
    thresholds = {piece.name: 0.5 if not piece.alone else middle(scores[piece.name]) for piece in found.leaving}
    found.setting = Setting(thresholds, offset=-0.5, combine=combine)
    return found


def middle(scores: Tensor) -> float:
    """A threshold that half of the scores reach, none of them by rounding."""
    ranked = scores.double().sort().values
    upper = ranked[len(ranked) // 2 :]
    gap = int((upper[1:21] - upper[:20]).argmax())
    return float(upper[gap] + upper[gap + 1]) / 2


def the_same(made: DynamicNetwork, images: Tensor, python: Path, folder: Path, points: tuple[str, ...] = ()) -> None:
    """Whether the driver gives the same answers by the same options as the network, at operating points."""
    export.export(made, folder / "deploy")
    compiled = compile_network(made, "onnxruntime")
    for point in points or ("",):
        if point:
            compiled.set_operating_point(point)
        wanted = compiled.run(images)
        found = answers_of(python, folder / "deploy", images.numpy(), folder, point)
        for name, options in wanted.taken.items():
            assert found[name].tolist() == options.tolist(), name
        ends = [*made.decision_names[0], export.END]
        assert [ends.index(place) for place in found["places"]] == wanted.exits.tolist()
        np.testing.assert_allclose(found["logits"], wanted.logits.numpy(), rtol=1e-5, atol=1e-5)


def sized(pictures: Tensor, made: DynamicNetwork) -> Tensor:
    """As the network takes them."""
    channels, *size = made.input_shape
    return nn.functional.interpolate(pictures, size, mode="bilinear").expand(-1, channels, -1, -1).contiguous()


def parts_images(taken: dict[str, Tensor]) -> bool:
    """Whether every decision sends images more than one way."""
    return all(len(set(options.tolist()) - {-1}) > 1 for options in taken.values())


@pytest.mark.parametrize("name", ["skip_gates", "quantized"])
@pytest.mark.fast("skip_gates")
def test_artifacts_answer_without_torch_as_with_it(name: str, pictures: Tensor, python: Path, tmp_path: Path) -> None:
    made = dz.load(SAVED / name)
    assert made.operating_points is not None
    points = [point.name for point in made.operating_points]
    the_same(made, sized(pictures, made), python, tmp_path, (points[0], points[-1]))


@pytest.mark.slow  # many exports and processes, half a minute
@pytest.mark.parametrize(
    "name",
    ["chained_exits", "channel_gates", "expanded", "factorized", "folded", "fused", "fused_gates", "pruned"]
    + ["pruned_gates", "quantized_gates", "recurrent_gates"],
)
def test_the_other_artifacts_too(name: str, pictures: Tensor, python: Path, tmp_path: Path) -> None:
    made = dz.load(SAVED / name)
    the_same(made, sized(pictures, made), python, tmp_path)


@pytest.mark.parametrize("fields", GATES[1:], ids=lambda fields: fields["gate"])
@pytest.mark.fast("recurrent")
def test_gates_of_all_kinds_with_exits_between(fields: dict[str, Any], python: Path, tmp_path: Path) -> None:
    made, images = gated_resnet({}, **fields).eval(), resnet_images(64)
    split_exits(made, images)
    with torch.no_grad():
        assert parts_images(made.run(images).taken)
    the_same(made, images, python, tmp_path)


@pytest.mark.parametrize(
    ("combine", "confidence"),
    [
        ("mean", "entropy"),
        pytest.param("last", "margin", marks=pytest.mark.slow),  # as long again
        pytest.param("product", "top_probability", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_cascades_whose_members_have_exits(
    combine: str, confidence: str, pictures: Tensor, python: Path, tmp_path: Path
) -> None:
    the_same(cascade(pictures, combine, confidence), pictures, python, tmp_path)


@pytest.mark.slow  # a network in bytes
@pytest.mark.parametrize("combine", ["last", "mean", "product"])
def test_cascades_in_bytes_that_go_on_until_networks_agree(
    combine: str, pictures: Tensor, digits: Context, python: Path, tmp_path: Path
) -> None:
    made = cascade(pictures, combine, "agreement", gate="linear")
    made.operating_points = None
    in_bytes, _ = apply(made, Quantize(max_drop=None), digits)
    the_same(in_bytes.eval(), pictures, python, tmp_path)


def test_the_work_that_an_image_does_not_need_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way is run for just as many images as take it."""
    made, images = gated_resnet({}, gate="linear").eval(), resnet_images(64)
    split_exits(made, images)
    export.export(made, tmp_path / "deploy")
    driver, ran = driver_of(tmp_path / "deploy"), Counter[str]()

    class Counting(driver.Part):  # type: ignore[name-defined,misc]
        def __init__(self, file: str, options: Any) -> None:
            super().__init__(file, options)
            self.file = file

        def __call__(self, values: Any) -> Any:
            ran[self.file] += len(values["features"])
            return super().__call__(values)

    monkeypatch.setattr(driver, "Part", Counting)
    answers = driver.Network().run(images.numpy())
    for decision in made.decisions():
        taken = answers.taken[decision.name]
        ways = [sum(ran[file] for file in ran if file.startswith(f"{decision.name}-{way}")) for way in (0, 1)]
        if decision.effect == "changes":
            computes = any((tmp_path / "deploy").glob(f"{decision.name}-0*.onnx"))  # a projection, or nothing
            assert ways == [(taken == 0).sum() * computes, (taken == 1).sum()]
        else:
            assert sum(ran[file] for file in ran if file.startswith(f"{decision.name}-")) == (taken >= 0).sum()


def test_thresholds_without_a_number_in_json(tmp_path: Path) -> None:
    made = dz.convert(dz.source("dynamize:digits_resnet"), [Exits(at=["layer1.1"])], DIGITS).eval()
    (exit_name,) = made.decision_names[0]
    images = torch.randn(2, *DIGITS)
    for number, (threshold, place) in enumerate(
        [(math.inf, export.END), (-math.inf, exit_name), (math.nan, export.END)]
    ):
        made.setting = Setting({exit_name: threshold})
        folder = tmp_path / str(number) / "deploy"
        export.export(made, folder)
        driver = driver_of(folder)
        assert driver.Network().run(images.numpy()).places == [place, place]
    with pytest.raises(ValueError, match="no operating point within inf"):
        driver.chosen_point(None, math.inf)


def test_what_came_into_the_folder_meanwhile_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, copyfile = tmp_path / "deploy" / "mine.txt", shutil.copyfile

    def copied(source: Path, to: Path) -> None:
        mine.parent.mkdir()
        mine.write_text("keep")
        copyfile(source, to)

    monkeypatch.setattr(export.shutil, "copyfile", copied)
    with pytest.raises(DynamizeError, match="is no empty folder"):
        export.export(wrap(network(nn.Identity()), SHAPE), mine.parent)
    assert [*tmp_path.rglob("*")] == [mine.parent, mine]


@pytest.mark.parametrize("layer", [nn.CrossMapLRN2d(3), nn.Softplus(threshold=0.1)])
def test_a_part_that_differs_or_has_no_form_in_onnx_is_refused(
    layer: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exportable, "_WRITTEN", {})  # so that the exporter drops the threshold
    with pytest.raises(DynamizeError, match="the path of 'upto.output' cannot be exported: .*Use `dynamize predict`"):
        export.export(wrap(network(layer), SHAPE), tmp_path / "deploy")
    assert not (tmp_path / "deploy").exists()
    assert not list(tmp_path.iterdir())


def test_parts_with_layers_that_are_written_otherwise(python: Path, tmp_path: Path) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same", dilation=2), nn.Softplus(threshold=0.1), *network(nn.Identity())
    )
    net[2] = nn.Conv2d(8, 8, 3, padding=1)
    dynamic = convert(net.eval(), [Exits(at=["1"], share=0.9, head="linear")], SHAPE).eval()
    images = torch.randn(8, *SHAPE)
    dynamic.setting = Setting({"exit.1": 0.0})
    the_same(dynamic, images, python, tmp_path)
