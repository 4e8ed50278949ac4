"""What earlier versions wrote: artifacts of format 1 answer as they did, and runs that were stopped go on."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ledgers import ledger_of
from networks import close
from safetensors.torch import load_file
from torch import Tensor

from dynamize import artifact
from dynamize.checkpoints import read_state_dict
from dynamize.nn.network import DynamicNetwork, record_routing
from dynamize.recipe import load_recipe
from dynamize.run import run_recipe
from dynamize.runtime.compiled import compile_network
from dynamize.upgrade import upgraded_optimizer

V1 = Path(__file__).parent / "artifacts" / "v1"
NAMES = sorted(folder.parent.name for folder in V1.glob("*/expected.safetensors"))
FORMAT_1 = ("segments.", "heads.", "fusion.", "memory.", "temperatures")


def load(folder: Path) -> DynamicNetwork:
    manifest = json.loads((folder / "manifest.json").read_text())
    if manifest["source"]["source"].startswith("timm:"):
        pytest.importorskip("timm", reason="needs timm, whose network was converted")
    return artifact.load(folder)


def assert_as_expected(network: DynamicNetwork, expected: dict[str, Tensor]) -> None:
    images = expected["images"]
    with torch.no_grad(), record_routing(network) as routing:
        logits = network(images)
    assert torch.equal(routing.exits, expected["exits"])
    assert torch.equal(routing.choices, expected["choices"])
    assert torch.allclose(logits, expected["logits"], rtol=0, atol=1e-4)
    with torch.no_grad():
        every = torch.stack(network.all_exits(images))
    assert every.shape == expected["all_exits"].shape
    assert torch.allclose(every, expected["all_exits"], rtol=0, atol=1e-4)


def test_every_kind_of_artifact_is_there() -> None:
    assert len(NAMES) == 13
    routed = [load_file(V1 / name / "expected.safetensors") for name in NAMES]
    assert sum(len(one["exits"].unique()) > 1 for one in routed) >= 10
    assert sum(bool((one["choices"] == 0).any() and (one["choices"] > 0).any()) for one in routed) >= 5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.fast("chained_exits", "factorized", "quantized_gates", "recurrent_gates")
def test_answers_and_routes_as_it_did_and_again_once_saved(name: str, tmp_path: Path) -> None:
    old, expected = load(V1 / name), load_file(V1 / name / "expected.safetensors")
    assert not old.training
    assert_as_expected(old, expected)
    before = json.loads((V1 / name / "manifest.json").read_text())
    assert before["format"] == 1
    assert any(key.startswith(FORMAT_1) for key in read_state_dict(V1 / name / "weights.safetensors"))
    artifact.save(old, tmp_path)
    after = json.loads((tmp_path / "manifest.json").read_text())
    assert after["format"] == 2
    state = read_state_dict(tmp_path / "weights.safetensors")
    assert not any(key.startswith(FORMAT_1) for key in state)
    new = load(tmp_path)
    assert_as_expected(new, expected)
    assert [step["pass"] for step in new.history] == [step["pass"] for step in before["history"]]
    assert new.history == old.history
    assert new.operating_points == old.operating_points
    assert new.operating_point == old.operating_point
    assert [point.name for point in new.operating_points] == [point["name"] for point in before["operating_points"]]
    assert all(torch.equal(tensor, new.state_dict()[key]) for key, tensor in old.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.fast("chained_exits", "fused_gates")
def test_other_operating_points_are_those_of_then(name: str) -> None:
    old = load(V1 / name)
    for plain in json.loads((V1 / name / "manifest.json").read_text())["operating_points"]:
        old.set_operating_point(plain["name"])
        assert list(old.setting.thresholds.values()) == plain["thresholds"]
        assert list(old.setting.thresholds) == [piece.name for piece in old.leaving]
        assert old.setting.offset == (plain["gate_offset"] or 0.0)


@pytest.mark.parametrize("name", ["chained_exits", "fused_gates", "recurrent_gates", "channel_gates"])
@pytest.mark.fast("chained_exits", "recurrent_gates")
def test_compiles(name: str) -> None:
    network, expected = load(V1 / name), load_file(V1 / name / "expected.safetensors")
    found = compile_network(network, "onnxruntime").run(expected["images"])
    assert torch.equal(found.exits, expected["exits"])
    assert torch.equal(found.choices, expected["choices"])
    assert close(found.logits, expected["logits"], 1e-4)


@pytest.mark.parametrize("name", ["half_run", "half_run_training"])
@pytest.mark.fast("half_run")
def test_a_run_that_was_stopped_goes_on(name: str, tmp_path: Path) -> None:
    """One before its last step; the other in the second epoch of its training, 20 steps in, with its momentum."""
    pytest.importorskip("timm", reason="needs timm, whose network is converted")
    out = Path(shutil.copytree(V1 / name, tmp_path / name))
    before = {step: (out / "steps" / step / "weights.safetensors").read_bytes() for step in ("0", "1")}
    steps: list[tuple[str, int]] = []

    def progress(items: Any, label: str, total: int) -> Any:
        steps.append((label, total))
        yield from items

    assert run_recipe(load_recipe(V1 / f"{name}.yaml"), out, device="cpu", resume=True, progress=progress) is not None
    expected = json.loads((V1 / f"{name}_expected.json").read_text())
    row = ledger_of(out)[-1]
    early = [row["decisions"][exit_][0] for exit_ in row["leaving"]]
    assert [*early, 1 - sum(early)] == pytest.approx(expected.pop("exits"), abs=1e-9)
    assert {key: row[key] for key in expected} == {
        key: value if isinstance(value, str | int) else pytest.approx(value, rel=1e-9)
        for key, value in expected.items()
    }
    assert [row["step"] for row in ledger_of(out)] == [0, 1, 2, 3]
    assert {step: (out / "steps" / step / "weights.safetensors").read_bytes() for step in before} == before
    trained = [(label, total) for label, total in steps if label.startswith("distill: epoch")]
    whole = trained[-1][1] if trained else 0
    left = [("distill: epoch 2/3", whole - 20), ("distill: epoch 3/3", whole)]
    assert trained == ([] if name == "half_run" else left)


@pytest.mark.parametrize("trained", ["", "heads."])
def test_the_momentum_of_each_parameter_stays_its_own(trained: str) -> None:
    """An optimizer numbers what it trains; the momentum of each parameter is that parameter here."""
    network, state = load(V1 / "recurrent_gates"), read_state_dict(V1 / "recurrent_gates" / "weights.safetensors")
    network.requires_grad_(not trained)
    for piece in network.leaving:
        piece.requires_grad_(True)
    buffers = re.compile(r"running_|num_batches|temperatures")
    names = [name for name in state if name.startswith(trained) and not buffers.search(name)]
    optimizer = {"state": {number: {"momentum_buffer": state[name]} for number, name in enumerate(names)}}
    found = upgraded_optimizer(optimizer, state, network)["state"]
    learnt = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert len(names) == len(learnt) > 4
    assert sorted(found) == [*range(len(learnt))]
    assert all(torch.equal(found[number]["momentum_buffer"], one) for number, one in enumerate(learnt))
    assert upgraded_optimizer(optimizer, network.state_dict(), network) is optimizer
