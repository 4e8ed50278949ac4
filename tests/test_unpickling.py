"""Files that are no checkpoints, damaged ones, and pickles that need code: refused, with the repair."""

import argparse
import collections
import os
import pickle
import re
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dynamize.checkpoints import read_state_dict
from dynamize.errors import DynamizeError
from dynamize.sources import load_source, parse


class Net(nn.Module):
    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, classes)


class Calls:
    """Pickles into a call: what a malicious checkpoint does."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def _state() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return Net().state_dict()


def _same(read: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return list(read) == list(expected) and all(torch.equal(read[k], expected[k]) for k in expected)


def _refused(file: Path) -> str:
    with pytest.raises(DynamizeError) as caught:
        read_state_dict(file)
    assert file.name in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>Sign in</html>", "web page"),
        (b"\n <html>404</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "git lfs pull"),
        (b"\x89HDF\r\n\x1a\n" + bytes(64), "is not a checkpoint"),
        (b"\x08\x00\x00\x00\x00\x00\x00\x00{broken}", "damaged"),
        (b"PK\x03\x04" + bytes(100), "damaged"),
        (b"\x80\x04garbage", "damaged"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "net.pt"
    file.write_bytes(content)
    assert said in _refused(file)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_cut_off_files(tmp_path: Path, kind: str, share: float) -> None:
    file = tmp_path / "net.pt"
    if kind == "safetensors":
        save_file(_state(), file)
    else:
        torch.save(_state(), file, _use_new_zipfile_serialization=kind == "zip")
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    assert "damaged or cut off" in _refused(file)


def test_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    torch.save(_state(), tmp_path / "resnet56.pt")
    assert "did you mean resnet56.pt?" in _refused(tmp_path / "resnet65.pt")
    assert "check the path" in _refused(tmp_path / "nowhere" / "a.pt")


def test_folder_is_refused(tmp_path: Path) -> None:
    assert "is a folder" in _refused(tmp_path)


def test_other_zip_archives_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("folder/readme.txt", "hello")
    assert "unpack it" in _refused(tmp_path / "all.zip")


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        ({}, "it is empty"),
        ([torch.ones(1)], "it is a list"),
        ({"epoch": 3, "best": 0.1}, "'epoch' (int)"),
        ({"one": {"w": torch.ones(1)}, "two": {"w": torch.ones(1)}}, "several state dicts, one, two: choose with"),
    ],
)
def test_no_state_dict_inside(tmp_path: Path, saved: object, said: str) -> None:
    torch.save(saved, tmp_path / "net.pt")
    assert said in _refused(tmp_path / "net.pt")


def _conversion(message: str) -> list[str]:
    lines = [line.strip() for line in message.splitlines() if line.startswith("    ")]
    assert len(lines) == 3
    return lines


def _run_conversion(message: str) -> None:
    exec("\n".join(_conversion(message)), {})  # the very lines that the user is told to run


@pytest.fixture
def their_module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("their_project")
    net = type("TheirNet", (Net,), {"__module__": "their_project"})
    meter = type("Meter", (), {"__module__": "their_project"})
    module.__dict__.update(TheirNet=net, Meter=meter)
    monkeypatch.setitem(sys.modules, "their_project", module)
    return module


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("form", ["module", "module in dict", "object beside"])
def test_pickle_that_needs_code_is_refused_and_the_conversion_works(
    tmp_path: Path, their_module: types.ModuleType, form: str, zipped: bool
) -> None:
    torch.manual_seed(3)
    model = their_module.TheirNet()
    saved = {"module": model, "module in dict": {"epoch": 1, "model": model}}.get(
        form, {"state_dict": model.state_dict(), "meter": their_module.Meter()}
    )
    file = tmp_path / "net.pth"
    torch.save(saved, file, _use_new_zipfile_serialization=zipped)
    message = _refused(file)
    blocked = "their_project.Meter" if form == "object beside" else "their_project.TheirNet"
    assert blocked in message
    _run_conversion(message)
    assert _same(read_state_dict(tmp_path / "net-weights.pt"), _state())


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_bare_pickles_are_refused_and_the_conversion_works(tmp_path: Path, protocol: int) -> None:
    file = tmp_path / "net.pkl"
    file.write_bytes(pickle.dumps({"state_dict": collections.OrderedDict(_state())}, protocol=protocol))
    message = _refused(file)
    assert "torch._utils" in message
    _run_conversion(message)
    assert _same(read_state_dict(tmp_path / "net-weights.pt"), _state())


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_malicious_pickle_runs_nothing_and_is_called_that(tmp_path: Path, form: str) -> None:
    victim = tmp_path / "created"
    file = tmp_path / "net.pt"
    saved = {"state_dict": _state(), "x": Calls(os.mkdir, str(victim))}
    if form == "bare":
        file.write_bytes(pickle.dumps({"x": Calls(os.mkdir, str(victim))}))
    else:
        torch.save(saved, file, _use_new_zipfile_serialization=form == "zip")
    message = _refused(file)
    assert re.search(r"needs (posix|nt)\.mkdir", message)
    assert "may be an attack" in message
    assert not victim.exists()


def test_numpy_arrays_of_objects_are_still_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": _state(), "log": np.array([object()])}, tmp_path / "net.pt")
    assert "numpy" in _refused(tmp_path / "net.pt")


@pytest.mark.parametrize("own", [[], [argparse.Namespace]])
def test_reading_leaves_the_allowed_types_as_they_were(tmp_path: Path, own: list[Any]) -> None:
    torch.save({"state_dict": _state(), "args": argparse.Namespace(a=1)}, tmp_path / "net.pt")
    with torch.serialization.safe_globals(own):
        before = set(torch.serialization.get_safe_globals())
        read_state_dict(tmp_path / "net.pt")
        assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused_and_the_conversion_works(tmp_path: Path) -> None:
    program = torch.jit.trace(nn.Conv2d(3, 4, 1), torch.zeros(1, 3, 2, 2))
    torch.jit.save(program, tmp_path / "net.pt")
    message = _refused(tmp_path / "net.pt")
    assert "TorchScript" in message
    _run_conversion(message)
    assert set(read_state_dict(tmp_path / "net-weights.pt")) == {"weight", "bias"}


def test_a_safetensors_header_of_any_length_is_not_taken_for_a_pickle(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    starts = set()
    for padding in range(0, 300, 8):  # the file begins with the header's length, and so do pickles with 0x80
        file = tmp_path / "weights.safetensors"
        save_file({"weight": torch.arange(3.0)}, file, metadata={"note": "x" * padding})
        starts.add(file.read_bytes()[:1])
        assert torch.equal(read_state_dict(file)["weight"], torch.arange(3.0))
    assert b"\x80" in starts


def test_a_whole_model_is_read_if_it_is_trusted(tmp_path: Path) -> None:
    torch.manual_seed(3)
    for name, saved in (("bare", Net()), ("wrapped", {"epoch": 1, "model": Net(), "ema": None})):
        expected = dict((saved if isinstance(saved, Net) else saved["model"]).state_dict())
        for zipped in (True, False):
            torch.save(saved, tmp_path / f"{name}.pt", _use_new_zipfile_serialization=zipped)
            assert "--trust-code" in _refused(tmp_path / f"{name}.pt")
            assert _same(read_state_dict(tmp_path / f"{name}.pt", trust_code=True), expected)
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(saved))
        assert _same(read_state_dict(tmp_path / f"{name}.pkl", trust_code=True), expected)


def test_classes_of_the_training_script_are_found_in_the_source(tmp_path: Path) -> None:
    script = "import torch\nfrom torch import nn\n\nclass Own(nn.Linear):\n    pass\n\n"
    (tmp_path / "train.py").write_text(f"{script}\nif __name__ == '__main__':\n    torch.save(Own(3, 2), 'own.pt')\n")
    subprocess.run([sys.executable, "train.py"], cwd=tmp_path, check=True)
    spec = parse(f"{tmp_path / 'train.py'}:Own", tmp_path / "own.pt", {"in_features": 3, "out_features": 2})
    with pytest.raises(DynamizeError, match="needs __main__.Own"):
        load_source(spec, trust_code=None)
    assert load_source(spec, trust_code=True).get_parameter("weight").shape == (2, 3)
    with pytest.raises(DynamizeError, match="cannot be unpickled: .*Own"):
        read_state_dict(tmp_path / "own.pt", trust_code=True)


def test_what_is_damaged_is_said_of_trusted_files_too(tmp_path: Path) -> None:
    torch.save(Net(), tmp_path / "net.pt")
    whole = (tmp_path / "net.pt").read_bytes()
    (tmp_path / "net.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DynamizeError, match="damaged"):
        read_state_dict(tmp_path / "net.pt", trust_code=True)
