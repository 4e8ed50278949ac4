"""Runs of a script's own network and images: measured as a recipe's, gone on with, and refused in words."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import DigitNet, digit_splits
from ledgers import ledger_of
from torch import nn

import dynamize as dz
from dynamize.data import Splits
from dynamize.kept import KeptSteps
from dynamize.report.folder import read_report
from dynamize.run import Outcome, Runner
from dynamize.transform import Transform

QUICK: dict[str, Any] = {"backends": ["eager"], "batches": [1], "timing_seconds": 0.05, "device": "cpu"}
EXIT = dz.Exits(at=["a"], share=1.0, size=[8])


class Small(nn.Module):
    """Cheaper than ``DigitNet``."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.layer, self.linear = nn.Conv2d(1, 4, 3, stride=2), nn.Linear(4, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.layer(x).relu().mean((2, 3)))


def net() -> DigitNet:
    torch.manual_seed(0)
    return DigitNet().eval()


def images(**parts: Any) -> Splits:
    """Tensors; their labels are what the network answers, so that it is always right."""
    given: dict[str, Any] = {}
    for seed, (name, count) in enumerate({"train": 64, "calibration": 40, "test": 40}.items()):
        batch = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            given[name] = batch, net()(batch).argmax(1)
    return dz.splits(**(given | parts))


def run(out: Path, *steps: Any, **options: Any) -> Outcome:
    done = dz.run_steps(net(), steps, images(), out, **(QUICK | options))
    assert done is not None
    return done


def test_a_script_gets_what_a_recipe_writes(tmp_path: Path) -> None:
    original = net()
    before = copy.deepcopy(original.state_dict())
    steps = [EXIT, dz.Distill(epochs=1), dz.Calibrate(macs_ratio=1.0)]
    out = tmp_path / "out"
    expect = {"macs_ratio": {"max": 0.01}, "accuracy_drop": {"min": -100}}
    done = dz.run_steps(original, steps, images(), out, compare={"small": Small()}, expect=expect, **QUICK)
    assert done is not None
    assert [row.transform for row in done.ledger.rows] == ["static", "exits", "distill", "calibrate"]
    assert [row.transform for row in done.ledger.rivals] == ["rival: small", "rival: cascade"]
    assert done.ledger.rows[0].accuracy == 1
    assert done.ledger.rows[-1].speedup["eager"]["1"] > 0
    assert [one.figure for one in done.failures] == ["macs_ratio"]
    assert read_report(out).ledger.rows == done.ledger.rows
    assert "DigitNet" in (out / "report.html").read_text()
    assert "3 calibrate" in str(done)
    assert all(torch.equal(before[name], value) for name, value in original.state_dict().items())
    loaded, batch = dz.load(out, network=net()), torch.randn(9, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(batch), done.network.eval()(batch))


def test_images_of_a_recipe_and_a_network_of_a_name_make_an_artifact_for_the_command_line(tmp_path: Path) -> None:
    named = dz.source("dynamize:digits_resnet_small", pretrained=True)
    done = dz.run_steps(named, [dz.FoldBatchnorm()], digit_splits(), tmp_path / "out", **QUICK)
    assert done is not None
    assert done.ledger.rows[0].accuracy > 0.9
    assert dz.load(tmp_path / "out").source.source == "dynamize:digits_resnet_small"


@pytest.mark.slow
def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [EXIT, dz.Distill(epochs=1), dz.Calibrate(macs_ratio=1.0)]
    whole = run(tmp_path / "whole", *steps)
    with monkeypatch.context() as patch:
        patch.setattr(KeptSteps, "keep", stopping_at(2))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", *steps)
    measured: list[int] = []
    measure = Runner._measure
    monkeypatch.setattr(
        Runner, "_measure", lambda self, index, *rest: measured.append(index) or measure(self, index, *rest)
    )
    again = run(tmp_path / "out", *steps, resume=True)
    assert measured == [2, 3]
    assert ledger_of(tmp_path / "out") == ledger_of(tmp_path / "whole")
    assert again.network.setting.thresholds == whole.network.setting.thresholds


def stopping_at(step: int) -> Any:
    keep = KeptSteps.keep

    def stop(self: KeptSteps, index: int, *rest: Any) -> None:
        if index == step:
            raise KeyboardInterrupt
        keep(self, index, *rest)

    return stop


def test_runs_of_other_weights_or_images_are_not_gone_on_with(tmp_path: Path) -> None:
    run(tmp_path / "out", EXIT)
    other = net()
    with torch.no_grad():
        other.linear.bias[0] += 1
    few = images(test=(torch.randn(30, 1, 8, 8), torch.arange(30) % 10))
    for network, data in ((other, images()), (net(), few)):
        with pytest.raises(dz.DynamizeError, match="another network or other images.*overwrite=True"):
            dz.run_steps(network, [EXIT], data, tmp_path / "out", resume=True, **QUICK)
    with pytest.raises(dz.DynamizeError, match="already holds a run.*resume=True"):
        run(tmp_path / "out", EXIT)


@pytest.mark.slow
def test_networks_from_python_stand_in_front_also_after_a_stop(tmp_path: Path) -> None:
    steps, small = [dz.Cascade(first=[{"name": "small"}]), dz.Calibrate(macs_ratio=1.5)], Small()
    run(tmp_path / "out", steps[0], members={"small": small})
    done = run(tmp_path / "out", *steps, members={"small": small}, resume=True)
    assert done.network.members == ["small"]
    with pytest.raises(dz.DynamizeError, match="another network"):
        run(tmp_path / "out", *steps, members={"small": Small()}, resume=True)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": [{"pass": "exits"}]}, r"is no step: write for example dz\.Exits"),
        ({"steps": [dz.Calibrate()]}, "needs .*before it"),
        ({"network": "torchvision:resnet18"}, r"dz\.run_steps takes a network and was given the text"),
        ({"network": Small(classes=1)}, "one score"),
        ({"data": [1, 2]}, r"\[1, 2\] \(list\) was given: write data=dz\.splits\("),
        ({"data": images(train=(), test=(torch.randn(30, 1, 8, 8), torch.arange(30)))}, "labels from 0 to 29"),
        ({"out": None}, "out is the folder to write, and None"),
        ({"compare": [Small()]}, "compare are networks by name.*compare={'small': network}"),
        ({"compare": {"small": "resnet"}}, "compare: small takes a network and was given the text"),
        ({"compare": {"a b": Small()}}, "'a b' cannot be used"),
        ({"compare": {"small": Small(classes=7)}}, "small tells 7 classes apart, and the run's own network 10"),
        ({"members": {"small": 3}}, "members: small takes a network"),
        ({"steps": [dz.Cascade(first=[{"name": "small"}])]}, r"members=\{'small': network\} to dz\.run_steps"),
        ({"backends": "onnx"}, r"^dz\.run_steps: backends\.0: 'onnx' is no backend\. Did you mean onnxruntime"),
        ({"batches": 8}, r"batches: .*valid list \(given: 8\)"),
        ({"timing_seconds": 0}, "timing_seconds: .*greater than 0"),
        ({"expect": {"acuracy": {"min": 1}}}, r"expect\.acuracy: no such field\. Did you mean accuracy"),
        ({"expect": {"accuracy": {"min": 0.9}}}, "percent are meant"),
        ({"device": "tpu"}, "'tpu' is no device"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_and_nothing_is_written(wrong: dict[str, Any], said: str, tmp_path: Path) -> None:
    given = {"network": net(), "steps": [EXIT], "data": images(), "out": tmp_path / "out", **QUICK}
    with pytest.raises(dz.DynamizeError, match=said):
        dz.run_steps(**(given | wrong))
    assert not (tmp_path / "out").exists()


def test_a_converted_network_and_names_of_too_few_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(dz.DynamizeError, match="give the original, and all steps"):
        dz.run_steps(dz.convert(net(), [EXIT], (1, 8, 8)), [EXIT], images(), tmp_path / "out", **QUICK)
    with pytest.raises(dz.DynamizeError, match=r"2 classes \(a, b, \.\.\.\) and the network answers 10"):
        dz.run_steps(net(), [EXIT], images(class_names=["a", "b"]), tmp_path / "out", **QUICK)


@pytest.mark.parametrize(
    "steps",
    [[dz.Exits(count=1)], [EXIT, dz.Calibrate()], [dz.Prune(macs_ratio=0.9, criterion="taylor", round_to=4)]],
)
def test_labels_of_no_class_are_told_by_every_step_that_reads_them(steps: list[Transform]) -> None:
    wrong = torch.randn(40, 1, 8, 8), torch.arange(40)
    data = images(train=wrong, calibration=(wrong[0] + 1, wrong[1]))
    with pytest.raises(dz.DynamizeError, match="labels from 0 to 39 do not fit the network's 10 classes"):
        dz.convert(net(), steps, (1, 8, 8), dz.Context(data=data))
    with pytest.raises(dz.DynamizeError, match=r"data=dz\.splits"):
        dz.convert(net(), [EXIT], (1, 8, 8), dz.Context(data=[wrong]))  # type: ignore[arg-type]


def test_a_network_that_guesses_is_told_of_in_words_for_scripts(tmp_path: Path) -> None:
    guessed = images(test=(torch.randn(60, 1, 8, 8), torch.arange(60) % 10))
    done = dz.run_steps(net(), [EXIT], guessed, tmp_path / "out", **QUICK)
    assert done is not None
    assert "was it trained" in done.warnings[0]
    assert "--" not in done.warnings[0]
