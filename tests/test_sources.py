"""Sources: every form that a user may type, what is said of each that fails; nothing runs by itself."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from shared import shared_data
from torch import nn

from dynamize.errors import DynamizeError
from dynamize.models import REGISTRY, create
from dynamize.sources import SourceSpec, available, build, load_source, parse, source

FACTORY = """
from pathlib import Path
from torch import nn

Path(__file__).with_name("was_run").touch()

def net(width: int = 3, fail: bool = False):
    if fail:
        raise OSError("no such weights")
    return nn.Sequential(nn.Conv2d(3, width, 1), nn.Flatten(), nn.Linear(width, 2))

def text():
    return "net"

ready = nn.Linear(1, 1)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    path = list(sys.path)
    yield tmp_path
    assert sys.path == path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def _error(text: str, **kwargs: Any) -> str:
    with pytest.raises(DynamizeError) as caught:
        source(text, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "library", "target", "kwargs"),
    [
        ("torchvision:resnet50", "torchvision", ("torchvision", "resnet50"), {}),
        ("timm:resnet18.a1_in1k", "timm", ("timm", "resnet18.a1_in1k"), {}),
        ("timm:hf-hub:someone/net", "timm", ("timm", "hf-hub:someone/net"), {}),
        (
            "dynamize:digits_resnet,num_classes=4",
            "dynamize",
            ("dynamize", "digits_resnet"),
            {"num_classes": 4},
        ),
        ("a/b.py:net", None, ("a/b.py", "net"), {}),
        ("C:\\nets\\b.py:net", None, ("C:\\nets\\b.py", "net"), {}),
        ("a,b/c.py:net,x=1", None, ("a,b/c.py", "net"), {"x": 1}),
        ("my.package:Net", None, ("my.package", "Net"), {}),
        ("timm.models.resnet:resnet18", None, ("timm.models.resnet", "resnet18"), {}),
        ("m:f,a=true,b=None,c=-2,d=1e-3", None, ("m", "f"), {"a": True, "b": None, "c": -2, "d": 0.001}),
        ("m:f,e=relu,g=", None, ("m", "f"), {"e": "relu", "g": ""}),
    ],
)
def test_parses(text: str, library: str | None, target: tuple[str, str], kwargs: dict[str, object]) -> None:
    spec = parse(text)
    assert (spec.library, spec.target, spec.kwargs) == (library, target, kwargs)
    assert [type(value) for value in spec.kwargs.values()] == [type(value) for value in kwargs.values()]
    assert spec.names_code == (library is None)


@pytest.mark.parametrize("text", ["", "resnet", "torchvision:", "a b:c", "net.py", "net.py:", "m:1f", ":f", "a..b:f"])
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(DynamizeError, match="is not a source: write .*package.module:factory"):
        parse(text)


def test_bare_name_is_completed() -> None:
    assert "write torchvision:resnet50, or" in _error("resnet50")
    assert "write dynamize:cifar_resnet56, or" in _error("cifar_resnet56")


def test_argument_given_twice_is_refused() -> None:
    with pytest.raises(DynamizeError, match="given twice"):
        parse("m:f,a=1", kwargs={"a": 1})
    with pytest.raises(DynamizeError, match="given twice"):
        parse("m:f,a=1,a=2")


def test_arguments_that_are_not_plain_are_refused() -> None:
    with pytest.raises(DynamizeError, match="norm_layer .*not plain values"):
        source("torchvision:resnet18", norm_layer=nn.BatchNorm2d)  # type: ignore[arg-type]


def test_spec_is_frozen_closed_and_survives_json() -> None:
    spec = parse("torchvision:resnet18,num_classes=10,zero_init_residual=true", checkpoint="a/b.pt")
    assert SourceSpec.model_validate_json(spec.model_dump_json()) == spec
    with pytest.raises(ValidationError, match="frozen"):
        spec.source = "dynamize:digits_resnet"
    with pytest.raises(ValidationError, match="Extra inputs"):
        SourceSpec.model_validate({"source": "dynamize:digits_resnet", "trust_code": True})
    with pytest.raises(DynamizeError, match="is not a source"):
        SourceSpec(source="nothing")


def test_structure_needs_neither_checkpoint_nor_download() -> None:
    spec = parse("torchvision:inception_v3,weights=DEFAULT,num_classes=1000")
    assert spec.structure().kwargs == {"num_classes": 1000, "transform_input": True}
    plain = parse("torchvision:resnet18,weights=DEFAULT", checkpoint="a.pt").structure()
    assert (plain.kwargs, plain.checkpoint) == ({}, None)
    assert parse("timm:resnet18,pretrained=true").structure().kwargs == {}
    assert parse("m:f,weights=7").structure().kwargs == {"weights": 7}


@pytest.mark.parametrize("name", REGISTRY)
def test_builds_dynamize(name: str) -> None:
    model = source(f"dynamize:{name}", num_classes=3)
    assert not model.training
    assert model(torch.zeros(1, 1 if name.startswith("digits") else 3, 8, 8)).shape == (1, 3)


def test_builds_torchvision() -> None:
    model = build(parse("torchvision:resnet18,num_classes=3"), trust_code=False)
    assert model.training
    assert model.get_parameter("fc.weight").shape == (3, 512)


def test_builds_timm() -> None:
    pytest.importorskip("timm")
    assert source("timm:resnet10t", num_classes=3)(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize(
    ("text", "close"),
    [
        ("torchvision:resnet51", "resnet50"),
        ("torchvision:ResNet50", "resnet50"),
        ("timm:mobilenetv3_lage_100", "mobilenetv3_large_100"),
        ("dynamize:cifar_resnet18", "cifar_resnet110"),
    ],
)
def test_unknown_name_offers_close_ones_and_the_list(text: str, close: str) -> None:
    library = text.partition(":")[0]
    if library == "timm":
        pytest.importorskip("timm")
    message = _error(text)
    assert close in message.partition("All names")[0]
    assert f"available('{library}')" in message


def test_available_lists_classification_networks() -> None:
    assert available("dynamize") == list(REGISTRY)
    assert "resnet50" in available("torchvision")
    assert "fcos_resnet50_fpn" not in available("torchvision")
    with pytest.raises(DynamizeError, match="No library 'keras'"):
        available("keras")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["torchvision:resnet18,depth=1", "timm:resnet10t,depht=1", "dynamize:digits_resnet,depth=1"]
)
def test_unaccepted_argument_is_named(text: str) -> None:
    if text.startswith("timm"):
        pytest.importorskip("timm")
    message = _error(text)
    assert "cannot be built with dep" in message
    assert "unexpected keyword argument" in message


def test_torchvision_sizes_that_cannot_be_are_refused() -> None:
    assert "num_classes=-1" in _error("torchvision:resnet18,num_classes=-1")
    assert "num_classes='ten'" in _error("torchvision:resnet18,num_classes=ten")


def test_torchvision_weights_are_named() -> None:
    assert "use one of IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT" in _error("torchvision:resnet50,weights=best")
    assert "pass weights=DEFAULT" in _error("torchvision:resnet50,pretrained=true")
    assert "num_classes=10" in _error("torchvision:resnet18,weights=DEFAULT,num_classes=10")


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1"])
@pytest.mark.parametrize(
    "failure",
    [URLError("no route"), TimeoutError("timed out"), RuntimeError('invalid hash value (expected "f3")')],
)
@pytest.mark.fast("failure0-DEFAULT", "failure1-IMAGENET1K_V1", "failure2-ResNet18_Weights.IMAGENET1K_V1")
def test_failed_torchvision_download_says_what_to_fetch(
    monkeypatch: pytest.MonkeyPatch, weights: str, failure: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    message = _error("torchvision:resnet18", weights=weights)
    assert "https://download.pytorch.org/models/resnet18-f37072fd.pth" in message
    assert "checkpoint=FILE" in message


def test_failed_timm_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")

    def fail(name: str, **_: object) -> nn.Module:
        raise ConnectionError(f"offline, no {name}")

    monkeypatch.setattr(timm, "create_model", fail)
    message = _error("timm:resnet18,pretrained=true")
    assert "offline, no resnet18" in message
    assert "checkpoint=FILE" in message
    assert "timm cannot build resnet18" in _error("timm:resnet18")


def test_timm_may_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install 'dynamize[timm]'" in _error("timm:resnet18")


def test_timm_reads_no_checkpoint_by_itself(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    assert "pass the file as checkpoint" in _error("timm:resnet18", checkpoint_path=str(tmp_path / "a.pt"))


@pytest.mark.parametrize(("name", "heads"), [("googlenet", ("aux1", "aux2")), ("inception_v3", ("AuxLogits",))])
@pytest.mark.fast("googlenet-heads0")
def test_auxiliary_heads_are_left_out(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    heads: tuple[str, ...],
) -> None:
    full = build(parse(f"torchvision:{name},aux_logits=true,init_weights=false"), trust_code=False)
    assert all(getattr(full, head) is not None for head in heads)
    torch.save(full.state_dict(), tmp_path / "net.pt")
    with caplog.at_level(logging.INFO):
        model = source(f"torchvision:{name}", checkpoint=tmp_path / "net.pt")
    assert all(getattr(model, head) is None for head in heads)
    assert f"{heads[0]}." in caplog.text
    assert "transform_input=True" in caplog.text
    assert torch.equal(model.get_parameter("fc.weight"), full.get_parameter("fc.weight"))

    state = full.state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: state)
    pretrained = source(f"torchvision:{name}", weights="DEFAULT")
    assert all(getattr(pretrained, head) is None for head in heads)
    assert pretrained.transform_input is True
    rebuilt = build(parse(f"torchvision:{name},weights=DEFAULT").structure(), trust_code=False)
    rebuilt.load_state_dict(pretrained.state_dict())
    assert rebuilt.transform_input is True


def test_checkpoint_and_pretrained_weights_exclude_each_other(tmp_path: Path) -> None:
    torch.save(create("digits_resnet").state_dict(), tmp_path / "a.pt")
    assert "keep one of them" in _error("torchvision:resnet18", checkpoint=tmp_path / "a.pt", weights="DEFAULT")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".safetensors"])
def test_loads_a_checkpoint(tmp_path: Path, suffix: str) -> None:
    trained = create("digits_resnet", num_classes=5).eval()
    file = tmp_path / f"net{suffix}"
    if suffix == ".safetensors":
        save_file(trained.state_dict(), file)
    else:
        torch.save({"state_dict": nn.DataParallel(trained).state_dict()}, file)
    model = load_source(parse("dynamize:digits_resnet,num_classes=5", file), trust_code=False)
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(model(images), trained(images))


@pytest.mark.parametrize(
    "text",
    ["dynamize:cifar_resnet20", "torchvision:squeezenet1_1", "torchvision:mobilenet_v2", "timm:resnet10t"],
)
def test_wrong_class_count_says_what_to_type(tmp_path: Path, text: str) -> None:
    if text.startswith("timm"):
        pytest.importorskip("timm")
    torch.save(source(text, num_classes=17).state_dict(), tmp_path / "net.pt")
    message = _error(text, checkpoint=tmp_path / "net.pt", num_classes=12)
    assert "has 17 classes, the network has 12" in message
    assert "pass num_classes=17" in message
    assert source(text, checkpoint=tmp_path / "net.pt", num_classes=17)


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("resnet20-12fca82f.th", 20),
        ("resnet32-d509ac18.th", 32),
        ("resnet56-4bfd9763.th", 56),
        ("resnet56-cifar10-jpeg.pt", 56),
    ],
)
def test_real_checkpoints_fit(name: str, depth: int) -> None:
    model = source(f"dynamize:cifar_resnet{depth}", checkpoint=shared_data() / name)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_real_checkpoint_in_the_wrong_depth_lists_blocks() -> None:
    message = _error("dynamize:cifar_resnet20", checkpoint=shared_data() / "resnet32-d509ac18.th")
    assert "unexpected in the checkpoint (60)" in message
    assert "layer1.3.conv1.weight" in message


def test_a_module_of_the_users_own(tmp_path: Path) -> None:
    trained = nn.Linear(2, 2)
    torch.save(trained.state_dict(), tmp_path / "a.pt")
    model = nn.Linear(2, 2)
    assert source(model, checkpoint=tmp_path / "a.pt") is model
    assert torch.equal(model.weight, trained.weight)
    assert not source(nn.Linear(2, 2)).training
    with pytest.raises(DynamizeError, match="takes no arguments, got num_classes"):
        source(model, num_classes=2)
    with pytest.raises(DynamizeError, match="does not fit Linear"):
        source(nn.Linear(3, 2), checkpoint=tmp_path / "a.pt")


@pytest.mark.parametrize("form", ["nets.py:net", "nets:net"])
def test_code_runs_only_when_trusted(folder: Path, form: str) -> None:
    (folder / "nets.py").write_text(FACTORY)
    spec = parse(form, kwargs={"width": 5})
    for refused in (lambda: build(spec, trust_code=False), lambda: load_source(spec, False)):
        with pytest.raises(DynamizeError, match="--trust-code"):
            refused()
    assert not (folder / "was_run").exists()
    model = build(spec, trust_code=True)
    assert (folder / "was_run").exists()
    assert model.get_parameter("0.weight").shape == (5, 3, 1, 1)


def test_code_is_not_run_for_a_checkpoint_that_is_refused(folder: Path) -> None:
    (folder / "nets.py").write_text(FACTORY)
    assert "There is no checkpoint" in _error("nets.py:net", checkpoint="none.pt")
    assert not (folder / "was_run").exists()


def test_file_imports_its_neighbours_from_any_folder(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "neighbour_layers.py").write_text("from torch.nn import Linear as Layer\n")
    text = "from dataclasses import dataclass\n@dataclass\nclass C:\n    n: 'int' = 2\n"
    text += "def net():\n    from neighbour_layers import Layer\n    return Layer(C().n, 2)\n"
    (folder / "sub" / "nets.py").write_text(text)
    assert isinstance(source("sub/nets.py:net"), nn.Linear)
    os.chdir(folder / "sub")
    assert isinstance(source(f"{folder}/sub/nets.py:net"), nn.Linear)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("none.py:net", "There is no file none.py"),
        ("no_such_package.nets:net", "There is no module 'no_such_package'"),
        ("nets.py:nett", "did you mean net"),
        ("nets.py:ready", "is a network, not a function"),
        ("nets.py:text", "returned a str"),
        ("nets.py:net,depth=3", "it takes (width: int = 3, fail: bool = False)"),
        ("nets.py:net,fail=true", "OSError: no such weights at"),
        ("broken.py:net", "ZeroDivisionError: division by zero at"),
        ("syntax.py:net", "SyntaxError"),
        ("lacks.py:net", "ModuleNotFoundError: No module named 'no_such_dependency'"),
        ("lacks:net", "ModuleNotFoundError: No module named 'no_such_dependency'"),
        ("hollow.py:net", "it defines no function"),
    ],
)
def test_failing_code_is_explained(folder: Path, text: str, said: str) -> None:
    (folder / "nets.py").write_text(FACTORY)
    (folder / "broken.py").write_text("x = 1\ny = x / 0\n")
    (folder / "syntax.py").write_text("def net(:\n")
    (folder / "lacks.py").write_text("import no_such_dependency\n")
    (folder / "hollow.py").write_text("x = 1\n")
    message = _error(text)
    assert said in message
    if text.startswith("broken"):
        assert "broken.py:2" in message
    assert "_dynamize_source_broken" not in sys.modules
