"""`dynamize run`: flags, refusals and exit codes."""

import json
from pathlib import Path

import pytest
from commandline import Cli
from ledgers import TINY, ledger_of

ALL_FILES = {
    "manifest.json", "weights.safetensors", "ledger.json", "metrics.jsonl",
    "report.html", "report.md", "report.json", "steps",
}  # fmt: skip


def test_run_leaves_an_artifact_and_a_report(finished_run: Path) -> None:
    assert {file.name for file in finished_run.iterdir()} == ALL_FILES
    rows = ledger_of(finished_run)
    assert [row["transform"] for row in rows] == ["static", "exits", "distill", "calibrate"]
    assert rows[0]["accuracy"] > 0.9
    assert rows[-1]["macs_ratio"] < 1


def test_ledger_is_printed_within_80_columns(finished_run: Path, cli: Cli) -> None:
    result = cli("run", "digits_exits", "--out", finished_run, "--resume", *TINY)
    assert result.exit_code == 0
    assert "MACs" in result.stdout
    assert str(finished_run / "report.html") in result.stdout.replace("\n", "")
    assert max(map(len, result.stdout.split("Report:")[0].splitlines())) <= 80
    assert "step 3 calibrate" not in result.stderr  # nothing was done twice


@pytest.mark.slow
def test_json_is_all_that_stdout_holds(finished_run: Path, cli: Cli) -> None:
    result = cli("run", "digits_exits", "--out", finished_run, "--resume", "--json", *TINY)
    found = json.loads(result.stdout)
    assert found["failures"] == []
    assert [row["step"] for row in found["ledger"]] == [0, 1, 2, 3]


def test_failed_expectation_is_exit_code_1_and_a_table(finished_run: Path, cli: Cli) -> None:
    wanted = ["--set=expect.macs_ratio={max: 0.0001}", "--set=expect.accuracy={min: 1}"]
    result = cli("run", "digits_exits", "--out", finished_run, "--resume", "--quiet", *TINY, *wanted)
    assert result.exit_code == 1
    assert "macs_ratio" in result.stdout
    assert "0.0001" in result.stdout
    assert not any(line.lstrip().startswith("accuracy") for line in result.stdout.splitlines())
    assert "% fewer MACs; speed" in result.stdout.splitlines()[0]
    assert "1 of what the recipe expects does not hold" in result.stderr


@pytest.mark.slow
def test_what_changed_since_the_baseline_is_shown(finished_run: Path, tmp_path: Path, cli: Cli) -> None:
    baseline = tmp_path / "then.json"
    baseline.write_text((finished_run / "ledger.json").read_text())
    again = ["run", "digits_exits", "--out", finished_run, "--resume", *TINY, f"--set=expect.baseline={baseline}"]
    kept = cli(*again, "--set=expect.accuracy_drop={max: 0}")
    assert kept.exit_code == 0
    assert "speed-up, onnxruntime, batch 32" in kept.stdout
    missed = cli(*again, "--set=expect.macs_growth={max: 0.5}", "--json")
    assert missed.exit_code == 1
    found = json.loads(missed.stdout)
    assert [(one["figure"], one["against"]) for one in found["failures"]] == [("macs_growth", "baseline")]
    assert {one["figure"]: one["change"] for one in found["changes"]}["MACs"] == "1.000 x"
    assert "Missed: 1 of 1" in (finished_run / "expect.md").read_text()
    assert cli(*again[:-1]).exit_code == 0  # nothing is expected now, so that nothing is left of it
    assert not (finished_run / "expect.md").exists()


def test_existing_run_is_not_destroyed(artifact: Path, cli: Cli) -> None:
    before = {file: file.read_bytes() for file in artifact.rglob("*") if file.is_file()}
    result = cli("run", "digits_exits", "--out", artifact, *TINY)
    assert result.exit_code == 2
    assert "--resume" in result.stderr
    assert "--overwrite" in result.stderr
    assert {file: file.read_bytes() for file in artifact.rglob("*") if file.is_file()} == before


def test_foreign_folder_is_refused_even_with_overwrite(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for flags in ([], ["--overwrite"], ["--resume"]):
        result = cli("run", "digits_exits", "--out", tmp_path, *flags, *TINY)
        assert result.exit_code == 2
        assert "holds no run of dynamize" in result.stderr
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.slow
def test_overwrite_keeps_files_of_other_names_and_repeats_the_run(artifact: Path, cli: Cli) -> None:
    (artifact / "notes.txt").write_text("mine")
    before = ledger_of(artifact)
    result = cli("run", "digits_exits", "--out", artifact, "--overwrite", "--quiet", *TINY)
    assert result.exit_code == 0, result.output
    assert (artifact / "notes.txt").read_text() == "mine"
    assert ledger_of(artifact) == before


def test_resume_with_other_settings_is_refused(artifact: Path, cli: Cli) -> None:
    result = cli("run", "digits_exits", "--out", artifact, "--resume", "--seed", 7, *TINY)
    assert result.exit_code == 2
    assert "another network or other images" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["quickstrat"], "Did you mean quickstart"),
        (["digits_exits", "--set", "steps.1.epoks=3"], "epochs"),
        (["digits_exits", "--set", "steps.1.epochs=-3"], "steps.1.distill.epochs"),
        (["digits_exits", "--set", "steps.9.epochs=3"], "no place"),
        (["digits_exits", "--model", "dynamize:digits_resnt"], "digits_resnet"),
        (["digits_exits", "--data", "imagefolder:/nowhere"], "/nowhere"),
        (["digits_exits", "--device", "gpu"], "'gpu' is no device"),
        (["digits_exits", "--set", "steps=[{pass: calibrate}]"], "needs `cascade` or `exits`"),
    ],
)
def test_bad_input_is_one_error_and_exit_code_2(arguments: list[str], told: str, tmp_path: Path, cli: Cli) -> None:
    result = cli("run", *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") or "\nerror: " in result.stderr
    assert told in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_code_runs_if_named_on_the_command_line_only(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "own.py").write_text(
        "from dynamize.models import create\n"
        "def factory(pretrained=True): return create('digits_resnet', pretrained=pretrained)\n"
    )
    source = f"{tmp_path / 'own.py'}:factory"
    out = tmp_path / "out"
    quick = [*TINY, "--set=steps=[{pass: exits, head: linear}]", "--set=model.kwargs={}", "--quiet"]
    recipe = tmp_path / "own.yaml"
    recipe.write_text(cli("recipes", "show", "digits_exits").stdout)
    refused = cli("run", recipe, "--out", out, f"--set=model.source={source}", *quick)
    assert refused.exit_code == 2
    assert "--trust-code" in refused.stderr
    ran = cli("run", recipe, "--out", out, "--model", source, *quick)
    assert ran.exit_code == 0, ran.output
    assert cli("inspect", out).exit_code == 2
    assert cli("inspect", out, "--trust-code").exit_code == 0


def test_interrupt_is_one_line(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dynamize.run.run_recipe", stop)
    result = cli("run", "digits_exits", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr == "error: stopped; go on with --resume\n"


def test_full_disk_is_one_line(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "runs/x")

    monkeypatch.setattr("dynamize.run.run_recipe", full)
    result = cli("run", "digits_exits", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "No space left on device" in result.stderr
    assert result.stderr.count("\n") == 1


def test_unknown_exception_keeps_its_traceback(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("dynamize.run.run_recipe", bug)
    with pytest.raises(ZeroDivisionError):
        cli("run", "digits_exits", "--out", tmp_path / "out")
