"""`hybrid_gates`: what it needs, that it repeats and resumes to the bit, and what it gains."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import digit_splits
from gated_digits import GatedDigitNet, Interrupter, accuracy_and_macs, gated_digits, same, set_scores
from pydantic import ValidationError

from dynamize.conversion import apply
from dynamize.errors import DynamizeError
from dynamize.nn.network import DynamicNetwork
from dynamize.training import loop, state
from dynamize.training.loop import Plan, train
from dynamize.training.objectives import MultiExitLoss
from dynamize.transform import Context, check_order
from dynamize.transforms import Calibrate, Distill, HybridGates, SkipGates

SHORT: dict[str, Any] = {"epochs": 2, "batch_size": 32, "alpha": 0.0, "precision": "float32"}


@pytest.fixture(scope="module")
def context() -> Context:
    return Context(data=digit_splits(), teacher=GatedDigitNet().eval())


def refined(context: Context, **fields: Any) -> DynamicNetwork:
    network = gated_digits()
    set_scores(network, [[0.0, 1.0]] * 3)
    return apply(network, HybridGates(**(SHORT | fields)), context)[0]


def test_its_place_in_a_recipe() -> None:
    check_order([SkipGates(), Distill(), HybridGates(), Calibrate()])
    with pytest.raises(DynamizeError, match="`hybrid_gates` needs `skip_gates` or `channel_gates` before it"):
        check_order([HybridGates()])
    with pytest.raises(DynamizeError, match="move `hybrid_gates` above `calibrate`"):
        check_order([SkipGates(), Calibrate(), HybridGates()])
    with pytest.raises(DynamizeError, match="move `skip_gates` above `hybrid_gates`"):
        check_order([SkipGates(), HybridGates(), SkipGates()])


@pytest.mark.parametrize("fields", [{"cost": -0.1}, {"rl_weight": 0}, {"alpha": 1.5}, {"epochs": 0}])
def test_values_that_no_network_allows(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        HybridGates.model_validate(fields)


def test_without_data_or_teacher_it_says_what_to_give(context: Context) -> None:
    with pytest.raises(DynamizeError, match="`hybrid_gates` needs images"):
        apply(gated_digits(), HybridGates(), Context())
    with pytest.raises(DynamizeError, match="`hybrid_gates` needs the original network"):
        apply(gated_digits(), HybridGates(), Context(data=context.data))


def test_the_same_seed_gives_the_same_bits(context: Context) -> None:
    first = refined(context)
    torch.rand(7)
    assert same(first, refined(context))
    assert not same(first, refined(replace(context, seed=1)))
    assert all(segment.policy is None for segment in first.segments)
    assert first.history[-1] == HybridGates(**SHORT).describe()


def test_killed_and_resumed_gives_the_bits_of_an_uninterrupted_run(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_STEPS_BETWEEN_CHECKS", 2)
    monkeypatch.setattr(state, "_SECONDS_BETWEEN", -1.0)
    resuming = replace(context, work=tmp_path, resume=True)
    with pytest.raises(KeyboardInterrupt):
        refined(replace(resuming, progress=Interrupter(13)))
    assert same(refined(resuming), refined(context))


def test_a_loss_that_is_not_finite_stops(context: Context) -> None:
    with pytest.raises(DynamizeError, match="hybrid_gates: the loss became .* Try a smaller learning rate"):
        refined(context, lr=1e6)


def test_it_stays_accurate_and_saves_macs() -> None:
    data = digit_splits(None)
    network = gated_digits()
    plan = Plan(epochs=6, batch_size=64, lr=0.3, weight_decay=0.0, heads_only=False, bf16=False, seed=0)
    train(network, data, MultiExitLoss(), plan)
    set_scores(network, [[0.0, 0.2]] * 3)
    before = accuracy_and_macs(network, data)
    step = HybridGates(epochs=4, batch_size=64, lr=0.05, cost=1.0, rl_weight=4.0, alpha=0.0, precision="float32")
    after = accuracy_and_macs(apply(network, step, Context(data=data))[0], data)
    assert after[0] > before[0] - 0.05
    assert after[1] < 0.9 * before[1]
