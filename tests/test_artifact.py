"""What is saved comes back, in another process too; what is damaged is named; nobody's code runs unasked."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from digits import SHAPE, DigitNet, digit_network
from networks import exit_scores, set_temperatures, set_thresholds, temperatures, thresholds
from torch import Tensor

from dynamize import artifact
from dynamize.conversion import convert
from dynamize.data import DataSpec
from dynamize.errors import DynamizeError
from dynamize.models import create
from dynamize.nn.network import DynamicNetwork, record_routing
from dynamize.sources import SourceSpec
from dynamize.transforms import Exits

SOURCE = SourceSpec(source="dynamize:digits_resnet")


def network(seed: int = 0, chain: bool = False) -> DynamicNetwork:
    """With exits that split random images, temperatures that are no round numbers, and used batch norms."""
    torch.manual_seed(seed)
    step = Exits(at=["layer1.1", "layer2.1"], head="conv", chain=chain, share=1.0, size=[16, 16])
    made = convert(create("digits_resnet"), [step], SHAPE)
    made.train()(torch.randn(64, *SHAPE))
    set_temperatures(made.eval(), [0.7 / 3, 1.3 / 3])
    with torch.no_grad():
        logits = made.all_exits(torch.randn(200, *SHAPE))
    set_thresholds(made, [float(exit_scores(made, logits[k], k).quantile(0.5)) for k in range(2)])
    return made


def routed(one: DynamicNetwork, images: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), record_routing(one) as routing:
        return one(images), routing.exits


def save_at_its_thresholds(made: DynamicNetwork, folder: Path) -> None:
    """`save` stores an operating point, so the thresholds become one."""
    from dynamize.calibration.operating import OperatingPoint, OperatingPoints

    point = OperatingPoint(
        name="here", thresholds=made.setting.thresholds, accuracy=0.5, accuracy_ci=(0, 1), accuracy_drop=0.0,
        accuracy_drop_ci=(0, 0), macs=1.0, macs_ci=(1, 1), macs_ratio=0.5, exits=[0.5, 0.25, 0.25],
    )  # fmt: skip
    made.operating_points = OperatingPoints((point,))
    made.set_operating_point(point)
    spec = DataSpec(source="digits", normalize=((0.3,), (0.4,)))
    artifact.save(made, folder, source=SOURCE, data=spec, classes=list("0123456789"), about={"seed": 1})


@pytest.mark.slow
def test_fresh_process_gives_the_same_bits_and_routing(tmp_path: Path) -> None:
    plain, chained = network(), network(chain=True)
    save_at_its_thresholds(plain, tmp_path / "plain")
    save_at_its_thresholds(chained, tmp_path / "chained")
    images = torch.randn(50, *SHAPE)
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys, torch, dynamize as dz\n"
        "torch.set_num_threads(1)\n"
        "for name in ('plain', 'chained'):\n"
        "    network = dz.load(name)\n"
        "    with torch.no_grad(), dz.record_routing(network) as routing:\n"
        "        logits = network(torch.load('images.pt'))\n"
        "    torch.save((logits, routing.exits), name + '.pt')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    for name, made in (("plain", plain), ("chained", chained)):
        logits, exits = torch.load(tmp_path / f"{name}.pt")
        expected, left_at = routed(made, images)
        assert len(left_at.unique()) == 3
        assert torch.equal(exits, left_at)
        assert torch.equal(logits, expected)


def test_manifest_keeps_everything_beside_the_weights(tmp_path: Path) -> None:
    made = network()
    save_at_its_thresholds(made, tmp_path)
    manifest = artifact.read_manifest(tmp_path)
    loaded = artifact.load(tmp_path)
    assert manifest.data == DataSpec(source="digits", normalize=((0.3,), (0.4,)))
    assert manifest.about == {"seed": 1}
    assert torch.__version__.startswith(manifest.versions["torch"])
    assert loaded.history == made.history
    assert loaded.operating_points == made.operating_points
    assert loaded.operating_point == made.operating_point
    assert loaded.source == SOURCE
    assert not loaded.training
    assert loaded.setting == made.setting
    assert torch.equal(temperatures(loaded), temperatures(made))


def test_temperatures_of_the_manifest_win(tmp_path: Path) -> None:
    save_at_its_thresholds(network(), tmp_path)
    manifest = artifact.read_manifest(tmp_path)
    assert manifest.format == 2
    assert manifest.temperatures == pytest.approx({"exit.1": 0.7 / 3, "exit.2": 1.3 / 3})
    artifact.write_manifest(tmp_path, manifest.model_copy(update={"temperatures": {"exit.2": 3.0, "exit.1": 2.0}}))
    assert temperatures(artifact.load(tmp_path)).tolist() == [2.0, 3.0]
    for wrong in ({"exit.1": 2.0}, {"exit.1": 2.0, "exit.3": 2.0}):
        artifact.write_manifest(tmp_path, manifest.model_copy(update={"temperatures": wrong}))
        with pytest.raises(DynamizeError, match=r"temperatures for exit\.1.*, the network has exit\.1, exit\.2"):
            artifact.load(tmp_path)


def test_network_from_python_is_given_again(tmp_path: Path) -> None:
    made = digit_network()
    set_thresholds(made, [0.0, 0.0])
    artifact.save(made, tmp_path)
    assert artifact.read_manifest(tmp_path).source is None
    with pytest.raises(DynamizeError, match=r"network=YourNetwork\(\)"):
        artifact.load(tmp_path)
    loaded = artifact.load(tmp_path, network=DigitNet())
    images = torch.randn(20, *SHAPE)
    set_thresholds(loaded, thresholds(made))
    for ours, theirs in zip(routed(loaded, images), routed(made, images), strict=True):
        assert torch.equal(ours, theirs)


def test_code_needs_trust(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
        "from dynamize.models import create\ndef factory(): return create('digits_resnet')\n"
    )
    artifact.save(network(), tmp_path / "out", source=SourceSpec(source=f"{tmp_path / 'own.py'}:factory"))
    with pytest.raises(DynamizeError, match="--trust-code"):
        artifact.load(tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert artifact.load(tmp_path / "out", trust_code=True).exit_count == 3
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ("\xff", "damaged"),
        ('{"format": 3}', "format"),
        ('{"format": 1, "source": null, "input": [1, 8, 8]}', "history: Field required"),
        ('{"format": 2, "source": null, "input": [1, 8, 8]}', "history: Field required"),
    ],
)
def test_damaged_manifest(content: str, told: str, tmp_path: Path) -> None:
    save_at_its_thresholds(network(), tmp_path)
    (tmp_path / "manifest.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(DynamizeError, match=told) as refused:
        artifact.load(tmp_path)
    assert str(tmp_path / "manifest.json") in str(refused.value)


def test_missing_and_cut_files(tmp_path: Path) -> None:
    with pytest.raises(DynamizeError, match="holds no artifact"):
        artifact.load(tmp_path)
    save_at_its_thresholds(network(), tmp_path)
    weights = tmp_path / "weights.safetensors"
    whole = weights.read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:length])
        with pytest.raises(DynamizeError, match=r"weights\.safetensors"):
            artifact.load(tmp_path)
    weights.unlink()
    with pytest.raises(DynamizeError, match=r"weights\.safetensors"):
        artifact.load(tmp_path)


def test_weights_of_another_network(tmp_path: Path) -> None:
    save_at_its_thresholds(network(), tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["history"][0]["size"] = [16, 32]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DynamizeError, match="does not fit"):
        artifact.load(tmp_path)


@pytest.mark.parametrize(
    "step", [{"pass": "exitz"}, {"pass": "exits", "colour": 1}, {"pass": "exits", "version": 9}, {}]
)
@pytest.mark.fast("step0", "step1")
def test_history_that_this_version_does_not_know(step: dict[str, object], tmp_path: Path) -> None:
    save_at_its_thresholds(network(), tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["history"] = [step]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DynamizeError):
        artifact.load(tmp_path)


def test_nothing_is_pickled(tmp_path: Path) -> None:
    save_at_its_thresholds(network(), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"manifest.json", "weights.safetensors"}
    json.loads((tmp_path / "manifest.json").read_text())
