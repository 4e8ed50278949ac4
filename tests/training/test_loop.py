"""The training loop: what it may change, that it repeats and resumes to the bit, and how it fails."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import digit_network, digit_splits
from interrupter import Interrupter
from torch import Tensor

from dynamize.data import Splits
from dynamize.errors import DynamizeError
from dynamize.measure.accuracy import exit_accuracies
from dynamize.nn.network import DynamicNetwork
from dynamize.training import loop, state
from dynamize.training.loop import Plan, train
from dynamize.training.objectives import MultiExitLoss

PLAN = Plan(epochs=2, batch_size=32, lr=0.1, weight_decay=1e-4, bf16=False, seed=0)  # 10 steps each
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def splits() -> Splits:
    return digit_splits()


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the loss every two steps and write a checkpoint each time."""
    monkeypatch.setattr(loop, "_STEPS_BETWEEN_CHECKS", 2)
    monkeypatch.setattr(state, "_SECONDS_BETWEEN", -1.0)


def weights(network: DynamicNetwork) -> Weights:
    return {name: value.clone() for name, value in network.state_dict().items()}


def trained(splits: Splits, plan: Plan = PLAN, loss: Any = None, **kwargs: Any) -> tuple[DynamicNetwork, list]:
    network = digit_network()
    return network, train(network, splits, loss or MultiExitLoss(), plan, **kwargs)


def same(first: Weights, second: Weights) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_training_learns_and_says_how_well(splits: Splits) -> None:
    network, rows = trained(splits, replace(PLAN, epochs=8, lr=0.3))
    assert [row["epoch"] for row in rows] == list(range(1, 9))
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert rows[-1]["calibration_accuracy"] == exit_accuracies(network, splits.calibration, torch.device("cpu"))
    assert min(rows[-1]["calibration_accuracy"]) > 0.5
    assert not network.training
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_the_same_seed_gives_the_same_bits_and_another_does_not(splits: Splits) -> None:
    first, _ = trained(splits)
    torch.rand(7)  # the state of the global generator does not matter
    second, _ = trained(splits)
    other, _ = trained(splits, replace(PLAN, seed=1))
    assert same(weights(first), weights(second))
    assert not same(weights(first), weights(other))


@pytest.mark.parametrize(("steps", "epoch", "step"), [(7, 0, 6), (10, 1, 0), (17, 1, 6), (11, 1, 0)])
@pytest.mark.fast("7-0-6", "17-1-6")
def test_killed_and_resumed_gives_the_bits_of_an_uninterrupted_run(
    splits: Splits, tmp_path: Path, often: None, steps: int, epoch: int, step: int
) -> None:
    whole, rows = trained(splits)
    plan = replace(PLAN, work=tmp_path, resume=True)
    with pytest.raises(KeyboardInterrupt):
        trained(splits, plan, progress=Interrupter(steps))
    position = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["position"]
    assert (position["epoch"], position["step"]) == (epoch, step)
    seen: list[int] = []

    def counting(items: Iterable[Any], label: str, total: int) -> Iterator[Any]:
        seen.append(total)
        yield from items

    resumed, resumed_rows = trained(splits, plan, progress=counting)
    assert seen[0] == 10 - step
    assert len(seen) == 2 - epoch
    assert same(weights(resumed), weights(whole))
    unclocked = [{k: v for k, v in row.items() if k != "seconds"} for row in resumed_rows]
    assert unclocked == [
        {k: pytest.approx(v) if k == "loss" else v for k, v in row.items() if k != "seconds"} for row in rows
    ]


def test_killed_twice(splits: Splits, tmp_path: Path, often: None) -> None:
    whole, _ = trained(splits)
    plan = replace(PLAN, work=tmp_path, resume=True)
    for steps in (5, 9):
        with pytest.raises(KeyboardInterrupt):
            trained(splits, plan, progress=Interrupter(steps))
    assert same(weights(trained(splits, plan)[0]), weights(whole))


def test_a_finished_run_is_not_trained_again(splits: Splits, tmp_path: Path) -> None:
    plan = replace(PLAN, work=tmp_path, resume=True)
    whole, rows = trained(splits, plan)
    again, rows_again = trained(splits, plan, progress=Interrupter(0))
    assert same(weights(again), weights(whole))
    assert rows_again == rows
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_without_resume_a_checkpoint_is_not_read(splits: Splits, tmp_path: Path) -> None:
    whole, _ = trained(splits)
    trained(splits, replace(PLAN, work=tmp_path, seed=5))
    assert same(weights(trained(splits, replace(PLAN, work=tmp_path))[0]), weights(whole))


@pytest.mark.parametrize("damage", ["truncated", "other network"])
def test_a_checkpoint_that_does_not_fit_is_refused(splits: Splits, tmp_path: Path, damage: str) -> None:
    trained(splits, replace(PLAN, work=tmp_path, epochs=1))
    path = tmp_path / "checkpoint.pt"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        found = torch.load(path, weights_only=True)
        del found["network"]["pieces.exit__1.head.classifier.2.bias"]
        torch.save(found, path)
    with pytest.raises(DynamizeError, match=r"checkpoint\.pt cannot be continued from .*delete it"):
        trained(splits, replace(PLAN, work=tmp_path, resume=True))


def failing_at(step: int, value: float) -> Callable[..., Tensor]:
    """A loss that becomes ``value`` at its ``step``-th call, counted from one."""
    calls = [0]

    def loss(logits: list[Tensor], images: Tensor, labels: Tensor) -> Tensor:
        calls[0] += 1
        return MultiExitLoss()(logits, images, labels) * (value if calls[0] == step else 1.0)

    return loss


@pytest.mark.parametrize(("step", "value", "epoch", "at"), [(1, float("nan"), 1, 1), (13, float("inf"), 2, 3)])
def test_a_loss_that_is_not_finite_stops_with_its_step(
    splits: Splits, step: int, value: float, epoch: int, at: int
) -> None:
    with pytest.raises(DynamizeError) as stopped:
        trained(splits, loss=failing_at(step, value))
    message = str(stopped.value)
    assert f"became {value} at epoch {epoch}, step {at} of 10" in message
    assert "lr: 0.02" in message
    assert "checkpoint" not in message


def test_the_last_good_checkpoint_is_named_and_good(splits: Splits, tmp_path: Path, often: None) -> None:
    with pytest.raises(DynamizeError, match=r"at epoch 2, step 4 of 10. The last good state is in .*checkpoint\.pt"):
        trained(splits, replace(PLAN, work=tmp_path), loss=failing_at(14, float("nan")))
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert (kept["position"]["epoch"], kept["position"]["step"]) == (1, 2)
    assert all(bool(torch.isfinite(value).all()) for value in kept["network"].values())


def test_heads_only_leaves_the_network_to_the_bit(splits: Splits) -> None:
    before = weights(digit_network())
    network, _ = trained(splits, replace(PLAN, part="heads"))
    after = weights(network)
    own = {name for name in before if name.startswith("nets.main.")}
    assert any("running_mean" in name for name in own)
    assert all(torch.equal(after[name], before[name]) for name in own)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    temperatures = {f"pieces.exit__{k}.temperature" for k in (1, 2)}
    assert changed == before.keys() - own - temperatures
    assert all(".head." in name for name in changed)
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_parameters_that_were_frozen_stay_frozen(splits: Splits) -> None:
    network = digit_network()
    static = network.row[0]
    static.module.requires_grad_(False)
    before = weights(network)
    train(network, splits, MultiExitLoss(), replace(PLAN, epochs=1))
    own = {id(p) for p in static.module.parameters()}
    parameters = [n for n, p in network.named_parameters() if id(p) in own]
    assert len(parameters) == 3
    assert all(torch.equal(network.state_dict()[name], before[name]) for name in parameters)
    assert not any(p.requires_grad for n, p in network.named_parameters() if n in parameters)


def test_the_learning_rate_follows_one_cycle_over_all_epochs(splits: Splits, tmp_path: Path) -> None:
    trained(splits, replace(PLAN, work=tmp_path))
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert kept["schedule"]["total_steps"] == 20
    assert kept["schedule"]["last_epoch"] == 20
    assert kept["optimizer"]["param_groups"][0]["max_lr"] == 0.1


def test_fewer_images_than_a_batch_are_one_step(splits: Splits) -> None:
    _, rows = trained(splits, replace(PLAN, batch_size=512, epochs=1))
    assert rows[0]["loss"] > 0


def test_bfloat16_stays_close_to_float32(splits: Splits) -> None:
    _, exact = trained(splits, replace(PLAN, epochs=1))
    _, rough = trained(splits, replace(PLAN, epochs=1, bf16=True))
    assert rough[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.05)
