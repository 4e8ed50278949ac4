"""`distill`: from fields to training, and what it refuses."""

from pathlib import Path

import pytest
import torch
from digits import SHAPE, DigitNet, digit_network, digit_splits
from pydantic import ValidationError

from dynamize.conversion import apply, convert, wrap
from dynamize.errors import DynamizeError
from dynamize.transform import Context
from dynamize.transforms import Distill, Exits

SHORT = {"epochs": 1, "batch_size": 64, "precision": "float32"}


def test_without_data_it_says_what_to_give() -> None:
    with pytest.raises(DynamizeError, match="`distill` needs images: give the recipe a `data:` section"):
        convert(DigitNet(), [Exits(at=["a"], head="linear"), Distill()], SHAPE)


@pytest.mark.parametrize(
    ("step", "early", "message"),
    [
        (Distill(exit_weights=[1.0, 1.0]), True, "exit_weights has 2 entries, the network 3 exits"),
        (Distill(train="heads"), False, "train: heads, but the network has no exit heads: put an `exits` step"),
    ],
)
def test_fields_that_do_not_fit_the_network(step: Distill, early: bool, message: str) -> None:
    network = digit_network() if early else wrap(DigitNet(), SHAPE)
    with pytest.raises(DynamizeError, match=message):
        apply(network, step, Context(data=digit_splits()))


@pytest.mark.parametrize("fields", [{"epochs": 0}, {"alpha": 1.5}, {"lr": 0}, {"exit_weights": [0.0]}, {"epoch": 1}])
def test_values_that_no_network_allows(fields: dict) -> None:
    with pytest.raises(ValidationError):
        Distill.model_validate(fields)


def test_training_heads_towards_the_teacher_alone(tmp_path: Path) -> None:
    """With alpha 1 and one teacher for all, labels do not matter: shuffled ones give the same bits."""
    splits = digit_splits()
    found = []
    for shuffled in (False, True):
        if shuffled:
            splits.train.labels[:] = splits.train.labels.flip(0)
        network = digit_network()
        context = Context(data=splits, teacher=DigitNet().eval() if not found else found[0][1], work=tmp_path)
        step = Distill(**SHORT, alpha=1.0, train="heads", gradient_equilibrium=True)
        tuned, notes = apply(network, step, context)
        assert not tuned.gradient_equilibrium
        assert "accuracy of each exit on the calibration images: " in notes[0]
        found.append((tuned.state_dict(), context.teacher))
    assert all(torch.equal(found[0][0][name], found[1][0][name]) for name in found[0][0])
    assert (tmp_path / "metrics.jsonl").exists()


def test_auto_precision_is_resolved_in_the_history() -> None:
    context = Context(data=digit_splits(), teacher=DigitNet())
    tuned, _ = apply(digit_network(), Distill(epochs=1, batch_size=128), context)
    assert tuned.history[-1]["pass"] == "distill"
    assert tuned.history[-1]["precision"] in ("float32", "bfloat16")
    assert [step["pass"] for step in tuned.history] == ["exits", "distill"]
