"""What `hybrid_gates` and `q_gates` have in common: their place, what they need, that they repeat and resume to the
bit, and that they save."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import SHAPE, digit_splits
from gated_digits import GatedDigitNet, accuracy_and_macs, gated_digits, same, set_scores
from interrupter import Interrupter

from dynamize.conversion import apply, wrap
from dynamize.errors import DynamizeError
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Choose
from dynamize.training import loop, state
from dynamize.training.loop import Plan, train
from dynamize.training.objectives import MultiExitLoss
from dynamize.training.refining import RefinesGates
from dynamize.transform import Context, Transform, check_order
from dynamize.transforms import Calibrate, Distill, FuseGates, HybridGates, QGates, SkipGates

BRIEF: dict[str, Any] = {"batch_size": 32, "alpha": 0.0, "precision": "float32"}
SHORT: list[Transform] = [
    HybridGates(epochs=2, **BRIEF),
    QGates(rounds=2, gate_epochs=1, network_epochs=1, loss_scale=1.0, **BRIEF),
]
LONGER: list[Transform] = [
    HybridGates(epochs=4, cost=1.0, rl_weight=4.0, **(BRIEF | {"batch_size": 64, "lr": 0.05})),
    QGates(penalty=1.0, **(BRIEF | {"batch_size": 64, "lr": 0.05})),
]

both = pytest.mark.parametrize("step", SHORT, ids=lambda step: step.pass_name)


@pytest.fixture(scope="module")
def context() -> Context:
    return Context(data=digit_splits(), teacher=GatedDigitNet().eval())


def refined(step: Transform, context: Context) -> DynamicNetwork:
    network = gated_digits()
    set_scores(network, [[0.0, 1.0]] * 3)
    return apply(network, step, context)[0]


@both
def test_what_they_have_in_common_is_written_once(step: Transform) -> None:
    assert isinstance(step, RefinesGates)
    assert not vars(type(step))["__annotations__"].keys() & vars(RefinesGates)["__annotations__"].keys()


@both
def test_their_place_in_a_recipe(step: Transform) -> None:
    name = step.pass_name
    check_order([SkipGates(), Distill(), step, Calibrate()])
    with pytest.raises(DynamizeError, match=f"`{name}` needs `skip_gates` or .* or `channel_gates` before it"):
        check_order([step])
    with pytest.raises(DynamizeError, match=f"move `{name}` above `calibrate`"):
        check_order([SkipGates(), Calibrate(), step])
    with pytest.raises(DynamizeError, match=f"move `skip_gates` above `{name}`"):
        check_order([SkipGates(), step, SkipGates()])


@both
def test_without_data_or_teacher_they_say_what_to_give(step: Transform, context: Context) -> None:
    with pytest.raises(DynamizeError, match=f"`{step.pass_name}` needs images"):
        apply(gated_digits(), step, Context())
    with pytest.raises(DynamizeError, match=f"`{step.pass_name}` needs the original network"):
        apply(gated_digits(), step.model_copy(update={"alpha": 0.5}), Context(data=context.data))


@both
@pytest.mark.fast("hybrid_gates")
def test_without_gates_they_say_so_or_leave_alone_what_was_fused(step: Transform, context: Context) -> None:
    with pytest.raises(DynamizeError, match=f"{step.pass_name}: the network has no gates: put `skip_gates`"):
        apply(wrap(GatedDigitNet().eval(), SHAPE), step, context)
    fused, _ = apply(gated_digits(), FuseGates(time=False), context)
    assert not fused.changing
    again, notes = apply(copy.deepcopy(fused), step, context)
    assert notes == ["nothing to refine: `fuse_gates` left no gates"]
    assert same(again, fused)


@both
@pytest.mark.fast("hybrid_gates")
def test_the_same_seed_gives_the_same_bits(step: Transform, context: Context) -> None:
    first = refined(step, context)
    torch.rand(7)
    assert same(first, refined(step, context))
    assert not same(first, refined(step, replace(context, seed=1)))
    assert type(first.choose) is Choose
    assert first.history[-1] == step.describe()


@pytest.mark.parametrize(("step", "steps"), [(SHORT[0], 13), (SHORT[1], 7), (SHORT[1], 14), (SHORT[1], 33)])
@pytest.mark.fast("step0-13", "step2-14")
def test_killed_and_resumed_gives_the_bits_of_an_uninterrupted_run(
    step: Transform, steps: int, context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`q_gates` in the first phase of the gates, the first of the network, and the last, of 10 steps each."""
    monkeypatch.setattr(loop, "_STEPS_BETWEEN_CHECKS", 2)
    monkeypatch.setattr(state, "_SECONDS_BETWEEN", -1.0)
    resuming = replace(context, work=tmp_path, resume=True)
    with pytest.raises(KeyboardInterrupt):
        refined(step, replace(resuming, progress=Interrupter(steps)))
    assert same(refined(step, resuming), refined(step, context))


@pytest.mark.parametrize("step", LONGER, ids=lambda step: step.pass_name)
@pytest.mark.slow
def test_they_stay_accurate_and_save_macs(step: Transform) -> None:
    data = digit_splits(None)
    network = gated_digits()
    plan = Plan(epochs=6, batch_size=64, lr=0.3, weight_decay=0.0, bf16=False, seed=0)
    train(network, data, MultiExitLoss(), plan)
    if step.pass_name == "hybrid_gates":  # decisions that are sampled have to differ to begin with
        set_scores(network, [[0.0, 0.2]] * 3)
    before = accuracy_and_macs(network, data)
    network, _ = apply(network, step, Context(data=data))
    after = accuracy_and_macs(network, data)
    assert "auto" not in network.history[-1].values()
    assert after[0] > before[0] - 0.05
    assert after[1] < 0.9 * before[1]
