"""A run in a folder: what it may delete, where it goes on, what it hands over to the next step."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ledgers import TINY, ledger_of, without_times

from dynamize.checkpoints import read_state_dict
from dynamize.errors import DynamizeError
from dynamize.evaluation import Evaluator
from dynamize.folders import check_folder, clear, holds_run, step_folders
from dynamize.kept import fingerprint
from dynamize.recipe import Recipe, load_recipe
from dynamize.report.ledger import Row
from dynamize.run import Outcome, Runner, run_recipe
from dynamize.subject import Named
from dynamize.training import loop


def recipe(*overrides: str) -> Recipe:
    quick = [flag.removeprefix("--set=") for flag in TINY]
    return load_recipe("digits_exits", [*quick, "backends=[eager]", "data.test_limit=100", *overrides])


def run(out: Path, *overrides: str, **options: Any) -> Outcome:
    outcome = run_recipe(recipe(*overrides), out, **options)
    assert outcome is not None
    return outcome


class Killed(Exception):
    """Stands for SIGKILL: nothing of the run gets to clean up."""


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "out"
    run(out)
    return out


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.fast("2")
def test_run_stopped_after_a_step_goes_on_to_the_same_ledger(
    step: int, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Runner._measure

    def stop(self: Runner, index: int, *rest: Any) -> Row:
        if index == step:
            raise Killed
        return measure(self, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "_measure", stop)
        with pytest.raises(Killed):
            run(tmp_path / "out")
    measured: list[int] = []

    def record(self: Runner, index: int, *rest: Any) -> Row:
        measured.append(index)
        return measure(self, index, *rest)

    monkeypatch.setattr(Runner, "_measure", record)
    outcome = run(tmp_path / "out", resume=True)
    assert measured == list(range(step, 4))
    assert ledger_of(tmp_path / "out") == ledger_of(reference)
    expected = json.loads((reference / "manifest.json").read_text())["operating_point"]
    assert outcome.network.setting.thresholds == expected["thresholds"]
    assert list(outcome.network.setting.thresholds) == [piece.name for piece in outcome.network.leaving]


@pytest.mark.slow
def test_run_stopped_between_epochs_goes_on_from_the_checkpoint(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = loop._Run._save
    epochs: list[int] = []

    def stop(self: Any) -> None:
        save(self)
        epochs.append(self.position.epoch)
        if len(epochs) == 1:
            raise Killed

    monkeypatch.setattr(loop._Run, "_save", stop)
    with pytest.raises(Killed):
        run(tmp_path / "out")
    assert (tmp_path / "out" / "steps" / "2" / "checkpoint.pt").exists()
    run(tmp_path / "out", resume=True)
    assert epochs == [1, 2]
    assert ledger_of(tmp_path / "out") == ledger_of(reference)
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]


@pytest.mark.slow
def test_training_of_one_network_in_a_row_is_written_down(tmp_path: Path) -> None:
    steps = "steps=[{pass: cascade, first: [{shrink: 0.5, name: small}]}, {pass: distill, epochs: 1}]"
    run(tmp_path / "out", steps, "data.train_limit=64")
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["member"], line["epoch"]) for line in lines] == [("small", 1)]


@pytest.mark.slow
def test_source_without_checkpoint_is_the_same_network_after_resume(tmp_path: Path) -> None:
    first = run(tmp_path / "a", "model.kwargs={}", "steps=[{pass: fold_batchnorm}]")
    torch.manual_seed(99)
    second = run(tmp_path / "b", "model.kwargs={}", "steps=[{pass: fold_batchnorm}]")
    assert without_times([row.model_dump() for row in first.report.ledger.rows]) == without_times(
        [row.model_dump() for row in second.report.ledger.rows]
    )


def test_as_many_images_are_timed_as_the_seconds_given_allow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hurried: list[float] = []
    monkeypatch.setattr(Evaluator, "hurry", lambda self, seconds, image_seconds: hurried.append(seconds))
    run(tmp_path / "out", "steps=[{pass: fold_batchnorm}]", "timing_seconds=0.03")
    assert hurried == [0.03]


def test_resume_refuses_damaged_or_other_states(reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "steps" / "0").mkdir(parents=True)
    (out / "steps" / "0" / "state.json").write_text("{")
    with pytest.raises(DynamizeError, match="damaged"):
        run(out, resume=True)
    with pytest.raises(DynamizeError, match="another network or other images"):
        run(reference, "seed=5", resume=True)


@pytest.mark.slow
def test_changed_step_is_done_again_and_those_before_it_are_not(reference: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(reference, tmp_path / "out"))
    before = [(out / "steps" / str(step) / "state.json").read_bytes() for step in range(4)]
    outcome = run(out, "steps.2.max_drop=null", "steps.2.macs_ratio=0.7", resume=True)
    after = [(out / "steps" / str(step) / "state.json").read_bytes() for step in range(4)]
    assert [a == b for a, b in zip(after, before, strict=True)] == [True, True, True, False]
    assert outcome.network.history[-1]["macs_ratio"] == 0.7


def test_expectations_may_change_on_resume(reference: Path) -> None:
    outcome = run(reference, "expect={macs_ratio: {max: 0.001}, speedup: {min: 1000}}", resume=True)
    assert {(one.figure, one.least, one.most) for one in outcome.failures} == {
        ("speedup", 1000.0, None),
        ("macs_ratio", None, 0.001),
    }


def test_folders(tmp_path: Path) -> None:
    check_folder(tmp_path / "new", resume=False, overwrite=False)
    check_folder(tmp_path, resume=False, overwrite=False)
    with pytest.raises(DynamizeError, match="give one of them"):
        check_folder(tmp_path, resume=True, overwrite=True)
    for number in (0, 1, 10, 2):
        (tmp_path / "steps" / str(number)).mkdir(parents=True)
        (tmp_path / "steps" / str(number) / "state.json").touch()
    (tmp_path / "manifest.json").touch()
    (tmp_path / "steps" / "mine").mkdir()
    (tmp_path / "mine.txt").touch()
    assert holds_run(tmp_path)
    assert [folder.name for folder in step_folders(tmp_path)] == ["0", "1", "2", "10"]
    with pytest.raises(DynamizeError, match="--overwrite"):
        check_folder(tmp_path, resume=False, overwrite=False)
    check_folder(tmp_path, resume=False, overwrite=True)
    check_folder(tmp_path, resume=True, overwrite=False)
    clear(tmp_path)
    left = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*"))
    assert left == ["mine.txt", "steps", "steps/mine"]
    assert not holds_run(tmp_path)
    with pytest.raises(DynamizeError, match="is a file"):
        check_folder(tmp_path / "mine.txt", resume=False, overwrite=False)


def test_failure_before_the_first_step_leaves_the_old_run(reference: Path, tmp_path: Path) -> None:
    before = sorted(file.name for file in reference.iterdir())
    with pytest.raises(DynamizeError):
        run(reference, 'model.checkpoint="/nowhere.pt"', "model.kwargs={}", overwrite=True)
    assert sorted(file.name for file in reference.iterdir()) == before


@pytest.mark.slow
def test_distill_trains_the_whole_network_and_heads_only_the_heads(reference: Path, tmp_path: Path) -> None:
    run(tmp_path / "out", "steps.1.train=heads")
    for out, trained in ((reference, True), (tmp_path / "out", False)):
        before, after = (read_state_dict(out / "steps" / str(step) / "weights.safetensors") for step in (1, 2))
        own = [name for name in before if name.startswith("nets.main.") and "num_batches" not in name]
        heads = [name for name in before if ".head." in name and name.endswith("weight")]
        assert own
        assert {name.split(".")[1] for name in heads} == {"exit__1", "exit__2"}
        assert any(not torch.equal(before[name], after[name]) for name in own) is trained
        assert all(not torch.equal(before[name], after[name]) for name in heads)
    before, after = (read_state_dict(reference / "steps" / str(step) / "weights.safetensors") for step in (1, 2))
    convolutions = [name for name in before if name.startswith("nets.main.") and before[name].ndim == 4]
    assert all(not torch.equal(before[name], after[name]) for name in convolutions)


def test_half_finished_runs_of_earlier_versions_go_on() -> None:
    """The fingerprint of a recipe without code of its own is what it was before recipes could have any."""
    recipe = load_recipe("digits_exits")
    wanted = "515ed729edf2ba0b95026f1bb28dc1b0676e1bb9ace48cf48e3ab4ac3325ba25"
    assert fingerprint(recipe, Named(recipe), 3) == wanted


def test_steps_of_changed_code_are_not_gone_on_with(tmp_path: Path) -> None:
    found = set()
    for text in ("a = 1", "a = 2"):
        (tmp_path / "own.py").write_text(text)
        recipe = load_recipe("digits_exits").model_copy(update={"code": [tmp_path / "own.py"]})
        found.add(fingerprint(recipe, Named(recipe), 3))
    assert len(found) == 2


def test_clearing_takes_the_code_away(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "own.py").touch()
    clear(tmp_path)
    assert not (tmp_path / "code").exists()
