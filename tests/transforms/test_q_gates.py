"""`q_gates`: what each phase trains, values it refuses, and how it fails."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import digit_splits
from gated_digits import GatedDigitNet, gated_digits, set_scores
from pydantic import ValidationError
from torch import Tensor

from dynamize.conversion import apply
from dynamize.errors import DynamizeError
from dynamize.nn.network import DynamicNetwork
from dynamize.training.policy import relative_costs
from dynamize.transform import Context
from dynamize.transforms import QGates

SHORT: dict[str, Any] = {
    "rounds": 2,
    "gate_epochs": 1,
    "network_epochs": 1,
    "batch_size": 32,
    "alpha": 0.0,
    "precision": "float32",
    "loss_scale": 1.0,
}


@pytest.fixture(scope="module")
def context() -> Context:
    return Context(data=digit_splits(), teacher=GatedDigitNet().eval())


def refined(context: Context, **fields: Any) -> DynamicNetwork:
    return apply(gated_digits(), QGates(**(SHORT | fields)), context)[0]


def is_gate(name: str) -> bool:
    return ".gate." in name


def phase(work: Path, position: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(work / f"phase-{position}" / "checkpoint.pt", weights_only=True)["network"]
    return {name: value for name, value in found.items() if not name.startswith("target_gates.")}


@pytest.mark.parametrize(
    "fields", [{"rounds": 0}, {"epsilon": [1.0, 1.5]}, {"discount": 0.0}, {"penalty": -1}, {"loss_scale": 0}]
)
def test_values_that_no_network_allows(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        QGates.model_validate(fields)


def test_phases_train_the_gates_or_the_network(context: Context, tmp_path: Path) -> None:
    start = gated_digits().state_dict()
    network = refined(replace(context, work=tmp_path), rounds=1)
    gates, whole = phase(tmp_path, 1), phase(tmp_path, 2)
    for name in start:
        if is_gate(name):
            assert torch.equal(gates[name], whole[name])
        else:
            assert torch.equal(start[name], gates[name])
    changed = {name for name in start if not torch.equal(gates[name], whole[name])}
    assert any("running_mean" in name for name in changed)
    assert any("linear.weight" in name for name in changed)
    labels = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert labels == ["q_gates, round 1, gates", "q_gates, round 1, network"]
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert network.state_dict().keys() == start.keys()  # the target copy is gone


def test_scores_are_values_by_the_share_of_each_unit(context: Context, tmp_path: Path) -> None:
    network = refined(replace(context, work=tmp_path), rounds=1, network_epochs=0)
    shares = [float(costs[-1]) for costs in relative_costs(network).values()]
    learnt, final = phase(tmp_path, 1), network.state_dict()
    names = [name for name in final if name.endswith("gate.linear.bias")]
    for name, share in zip(names, shares, strict=True):
        assert torch.allclose(final[name], learnt[name] / share)


def test_a_loss_that_is_not_finite_stops_and_leaves_no_target_copy(context: Context) -> None:
    network = gated_digits()
    set_scores(network, [[float("nan")] * 2] * 3)
    names = network.state_dict().keys()
    with pytest.raises(DynamizeError, match="q_gates, round 1, gates: the loss became .* Try a smaller learning rate"):
        apply(network, QGates(**SHORT), context)
    assert network.state_dict().keys() == names
