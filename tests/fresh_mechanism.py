"""A proof that the house takes new mechanisms: two that it has never heard of, in this file alone, go all the way.

An image leaves if it is dark, before the first layer; and blocks have a third way, half of the network's own block.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch
from backends import FLOAT32
from commandline import call
from networks import close
from pydantic import Field
from torch import Tensor, nn

import dynamize as dz
from dynamize.graph.extract import extract
from dynamize.graph.macs import counting_macs
from dynamize.graph.nodes import placeholder
from dynamize.graph.residual import residual_blocks
from dynamize.measure.costs import exit_costs
from dynamize.nn.exits import Leaving
from dynamize.nn.gates import LinearGate
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting
from dynamize.nn.units import Unit
from dynamize.transform import Applied, Context, Kind, Transform


class Darkness(Leaving):
    kind = "darkness"

    def __init__(self, classes: int) -> None:
        super().__init__("dark")
        self.guess = nn.Parameter(torch.zeros(classes))

    def classify(self, features_NCHW: Tensor, context_ND: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return features_NCHW.flatten(1)[:, :1] * 0 + self.guess, None

    def score(self, logits: Tensor, features_NCHW: Tensor) -> Tensor:
        return -features_NCHW.mean((1, 2, 3))


class ThreeWays(Unit):
    kind = "three"

    def __init__(self, label: str, channels: int, body: nn.Module) -> None:
        super().__init__(label, LinearGate(channels, 3), 3)
        self.middle = nn.Conv2d(channels, channels, 1)
        self._body = (body,)  # in a tuple: its layers are the network's

    def ways(self) -> Sequence[nn.Module | None]:
        return None, self.middle, self._body[0]

    def options(self) -> Sequence[str]:
        return "nothing", "half", "all"

    def blend(self, features_NCHW: Tensor, shares_NP: Tensor) -> Tensor:
        computed = torch.stack([features_NCHW, self.middle(features_NCHW), self._body[0](features_NCHW.clone())], 1)
        return (computed * shares_NP[:, :, None, None, None]).sum(1)


class Fresh(Transform):
    """Dark images leave at once; blocks have three ways."""

    pass_name: Literal["fresh"] = Field("fresh", alias="pass")
    kind: ClassVar[Kind] = Kind.ADDS_EXITS | Kind.ADDS_GATES

    def apply(self, network: DynamicNetwork, context: Context) -> Applied:
        plain, classes = network.plain, network.shapes[-1][0]
        blocks = [block for block in residual_blocks(plain) if block.identity]
        units = {
            (block.after, block.upto): ThreeWays(block.module, block.shape[0], extract(plain, block.after, block.upto))
            for block in blocks
        }
        network.insert({placeholder(plain.graph).name: Darkness(classes), **units})
        return Applied(network, self)


# Above: two mechanisms and their transform, and no other file knows of them. Below: what they go through.
RECIPE = """
version: 1
model: {source: "dynamize:digits_resnet", kwargs: {pretrained: true}, input: [1, 8, 8]}
data: {source: digits, augment: crop, train_limit: 200, test_limit: 100, normalize: [[0.305], [0.376]]}
timing_seconds: 0.05
steps:
  - {pass: fresh}
  - {pass: distill, epochs: 1, gate_budget: 0.8}
  - {pass: calibrate, macs_ratio: 0.8}
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fresh")
    (folder / "fresh.yaml").write_text(RECIPE)
    assert call("run", folder / "fresh.yaml", "--out", folder / "run", "--quiet").exit_code == 0
    return folder / "run"


@pytest.fixture(scope="module")
def network(out: Path) -> DynamicNetwork:
    return dz.load(out)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def splitting(network: DynamicNetwork, images: Tensor) -> Setting:
    """A third of the images leaves, and the others take all ways."""
    options = torch.arange(len(images))
    forced = {unit.name: (options + u) % 3 for u, unit in enumerate(network.changing)}
    return Setting({"dark": float((-images.mean((1, 2, 3))).quantile(0.67))}, forced=forced)


def test_ledger_report_and_inspection_speak_of_it(out: Path, network: DynamicNetwork) -> None:
    row = json.loads((out / "ledger.json").read_text())[-1]
    names = [decision.name for decision in network.decisions()]
    assert list(row["decisions"]) == names
    assert row["leaving"] == ["dark"]
    assert row["macs_ratio"] <= 0.85
    assert "half" in (out / "report.html").read_text()
    assert "half" in (out / "report.md").read_text()
    shown = json.loads(call("inspect", out, "--json").stdout)["decisions"]
    assert [one["name"] for one in shown] == names
    assert [option["label"] for option in shown[1]["options"]] == ["nothing", "half", "all"]
    assert "dark" in call("inspect", out).stdout


def test_what_it_skips_is_not_executed(network: DynamicNetwork, images: Tensor) -> None:
    setting = splitting(network, images)
    with torch.no_grad(), counting_macs() as counted:
        routed = network.run(images, setting)
    executed = exit_costs(network).executed(routed.taken, routed.images)
    assert counted() == pytest.approx(executed.sum())
    assert 0 < int((routed.exits == 0).sum()) < len(images)
    assert set(routed.choices.unique().tolist()) == {-1, 0, 1, 2}


def test_masked_is_skipped(network: DynamicNetwork, images: Tensor) -> None:
    setting = splitting(network, images)
    routed = network.run(images, setting)
    features = images
    with torch.no_grad():
        for piece in network.row[1:]:
            if piece.effect == "changes":
                shares = torch.nn.functional.one_hot(setting.forced[piece.name], 3).float()
                features = piece.blend(features, shares)
            else:
                features = piece.module(features)
        answers = torch.where((routed.exits == 0)[:, None], network.leaving[0].guess, features)
    assert close(routed.logits, answers)


@pytest.mark.parametrize("backend", FLOAT32)
def test_every_backend_answers_alike(network: DynamicNetwork, images: Tensor, backend: str) -> None:
    setting = splitting(network, images)
    wanted = network.run(images, setting)
    compiled = dz.compile_network(network, backend)
    for some in (slice(0, 24), slice(3, 4)):
        here = Setting(setting.thresholds, forced={name: each[some] for name, each in setting.forced.items()})
        found = compiled.run(images[some], here)
        assert close(found.logits, wanted.logits[some])
        assert torch.equal(found.exits, wanted.exits[some])


def test_a_deadline_ends_at_it(network: DynamicNetwork, images: Tensor) -> None:
    found = dz.compile_network(network, "eager").within(images, 1e-6, Setting({"dark": float("inf")}))
    assert found.place == "dark"
    assert found.cut.all()
    assert close(found.logits, network.leaving[0].guess.expand(len(images), -1))


def test_it_is_saved_and_loaded(network: DynamicNetwork, images: Tensor, tmp_path: Path) -> None:
    dz.save(network, tmp_path)
    with torch.no_grad():
        assert torch.equal(dz.load(tmp_path)(images), network(images))
