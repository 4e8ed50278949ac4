"""`dynamize bench`, `calibrate`, `predict` and `export` on a finished run."""

import json
import sys
from pathlib import Path

import pytest
from bare_environment import bare_python, json_of, printed_by
from commandline import Cli

from dynamize import artifact as artifacts
from dynamize.artifact import read_manifest
from dynamize.report import Row, share_of_saving_shown


def test_bench_compares_on_every_backend_and_batch(finished_run: Path, cli: Cli) -> None:
    flags = ["--batches", "1,8", "--backends", "eager,onnxruntime", "--seconds", "0", "--json"]
    found = json.loads(cli("bench", finished_run, *flags).stdout)
    tried = [(one["backend"], one["batch"]) for one in found["comparisons"]]
    assert tried == [("eager", 1), ("eager", 8), ("onnxruntime", 1), ("onnxruntime", 8)]
    last = json.loads((finished_run / "ledger.json").read_text())[-1]
    assert found["macs_ratio"] == pytest.approx(last["macs_ratio"])
    assert found["exits"] == pytest.approx(Row.model_validate(last).exits)
    assert found["accuracy"] == last["accuracy"]
    for one in found["comparisons"]:
        assert one["static_ms_per_image"] == one["static_median_ms"] / one["batch"]
        assert one["saving_shown"] == share_of_saving_shown(found["macs_ratio"], one["speedup"])


def test_bench_table_fits_and_takes_batches_larger_than_the_split(finished_run: Path, cli: Cli) -> None:
    result = cli("bench", finished_run, "--batches", "512", "--seconds", "0")
    assert result.exit_code == 0, result.stderr
    assert "ms/image" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--batches", "1,x"], "--batches 1,x"),
        (["--backends", "tensorrt"], "'tensorrt' is no backend"),
        (["--data", "imagefolder:/nowhere"], "/nowhere"),
        (["--data", "flickr:cats"], "unknown data source"),
    ],
)
def test_bench_refuses(finished_run: Path, flags: list[str], told: str, cli: Cli) -> None:
    result = cli("bench", finished_run, *flags)
    assert result.exit_code == 2
    assert told in result.stderr


def test_calibrate_replaces_the_manifest_only(artifact: Path, cli: Cli) -> None:
    before = {file: file.read_bytes() for file in artifact.rglob("*") if file.is_file()}
    result = cli("calibrate", artifact, "--macs-ratio", "0.5", "--json")
    assert result.exit_code == 0, result.stderr
    chosen = json.loads(result.stdout)["chosen"]
    assert chosen["macs_ratio"] <= 0.5 * (1 + 1e-6)
    after = {file: file.read_bytes() for file in artifact.rglob("*") if file.is_file()}
    assert {file.name for file in after if after[file] != before.get(file)} == {"manifest.json"}
    network = artifacts.load(artifact)
    assert network.setting.thresholds == chosen["thresholds"]
    assert [step["pass"] for step in network.history] == ["exits", "distill", "calibrate"]
    assert network.history[-1]["macs_ratio"] == 0.5
    assert "solved again" in " ".join(cli("report", artifact).stdout.split())


@pytest.mark.slow
def test_calibrate_again_for_the_same_budget_changes_nothing_but_times(artifact: Path, cli: Cli) -> None:
    first = read_manifest(artifact).operating_point
    assert cli("calibrate", artifact, "--max-drop", "5").exit_code == 0
    again = read_manifest(artifact).operating_point
    assert first is not None
    assert again is not None
    assert again.thresholds == first.thresholds
    assert again.macs == first.macs


@pytest.mark.slow
def test_infeasible_budget_leaves_the_artifact_alone(artifact: Path, cli: Cli) -> None:
    before = (artifact / "manifest.json").read_bytes()
    result = cli("calibrate", artifact, "--macs-ratio", "0.0001")
    assert result.exit_code == 2
    assert (artifact / "manifest.json").read_bytes() == before
    for option, value in (("--macs", "1e30"), ("--macs", "nan"), ("--macs-ratio", "inf"), ("--latency-ms", "inf")):
        assert cli("calibrate", artifact, option, value).exit_code == 2
    assert cli("calibrate", artifact, "--macs", "5", "--max-drop", "1").exit_code == 2
    assert "--max-drop and --macs are" in cli("calibrate", artifact, "--macs", "5", "--max-drop", "1").stderr
    assert "max_drop" in cli("calibrate", artifact, "--max-drop", "-1").stderr


@pytest.mark.slow
def test_calibrate_without_the_original_checkpoint(artifact: Path, cli: Cli) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    weights = Path(artifacts.__file__).parent / "models" / "digits_resnet.safetensors"
    manifest["about"]["recipe"]["model"] |= {"kwargs": {}, "checkpoint": "gone.pt"}
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    refused = cli("calibrate", artifact, "--max-drop", "5")
    assert refused.exit_code == 2
    assert "gone.pt" in refused.stderr
    assert "--checkpoint" in refused.stderr
    del manifest["about"]["recipe"]
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    refused = cli("calibrate", artifact, "--max-drop", "5")
    assert refused.exit_code == 2
    assert "does not record the checkpoint" in refused.stderr
    assert cli("calibrate", artifact, "--max-drop", "5", "--checkpoint", weights).exit_code == 0


def test_predict_answers_files_and_folders(finished_run: Path, pictures: Path, cli: Cli) -> None:
    result = cli("predict", finished_run, pictures, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [Path(one["file"]).name[0] for one in found] == list("01234")
    right = sum(one["answer"] == Path(one["file"]).stem[-1] for one in found)
    assert right >= 4
    assert all(0 < one["confidence"] <= 1 and one["error"] is None for one in found)
    text = cli("predict", finished_run, pictures / "0-is-0.png").stdout
    assert "last exit" in text or "exit 1" in text or "exit 2" in text
    assert {(one["exit"], one["by"]) for one in found} <= {(1, "exit 1"), (2, "exit 2"), (3, "last exit")}


def test_bench_without_end_is_refused(finished_run: Path, cli: Cli) -> None:
    refused = cli("bench", finished_run, "--seconds", "inf")
    assert refused.exit_code == 2
    assert "--seconds inf would hardly end" in refused.stderr


def test_predict_by_a_deadline(finished_run: Path, pictures: Path, cli: Cli) -> None:
    hurried = cli("predict", finished_run, pictures, "--point", "full", "--deadline-ms", "0.0001", "--json")
    assert [(one["exit"], one["cut"]) for one in json.loads(hurried.stdout)] == [(1, True)] * 5
    assert "5 of 5 images" in hurried.stderr
    assert "missed the deadline of 0.0001 ms" in hurried.stderr
    free, long = (cli("predict", finished_run, pictures, *flags) for flags in ([], ["--deadline-ms", "60000"]))
    assert free.stdout == long.stdout
    for value in ("0", "-5", "nan", "inf", "soon"):
        refused = cli("predict", finished_run, pictures, "--deadline-ms", value)
        assert refused.exit_code == 2
        assert refused.stderr.count("\n") == 1


def test_predict_at_other_operating_points(finished_run: Path, pictures: Path, cli: Cli) -> None:
    full = json.loads(cli("predict", finished_run, pictures, "--point", "full", "--json").stdout)
    assert {one["exit"] for one in full} == {3}
    cheapest = json.loads(cli("predict", finished_run, pictures, "--point", "cheapest", "--json").stdout)
    assert {one["exit"] for one in cheapest} == {1}
    assert cheapest[0]["macs"] < full[0]["macs"]
    onnx = cli("predict", finished_run, pictures, "--budget", "0.6", "--backend", "onnxruntime", "--json")
    eager = cli("predict", finished_run, pictures, "--budget", "0.6", "--json")
    for a, b in zip(json.loads(onnx.stdout), json.loads(eager.stdout), strict=True):
        assert (a["answer"], a["exit"]) == (b["answer"], b["exit"])
        assert a["confidence"] == pytest.approx(b["confidence"], abs=1e-3)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--point", "fastest"], "'fastest'"),
        (["--budget", "0.00001"], "0.00001"),
        (["--budget", "0.5", "--point", "full"], "give one of them"),
        (["--max-drop", "-50"], "max_drop"),
        (["--budget", "50"], "write 0.5 for 50 %"),
        (["--backend", "tensorrt"], "no backend"),
    ],
)
def test_predict_refuses(finished_run: Path, pictures: Path, flags: list[str], told: str, cli: Cli) -> None:
    result = cli("predict", finished_run, pictures, *flags)
    assert result.exit_code == 2
    assert told in result.stderr or told.replace("0.00001", "1e-05") in result.stderr


def test_predict_names_bad_files_and_answers_the_others(
    finished_run: Path, pictures: Path, tmp_path: Path, cli: Cli
) -> None:
    bad, good = tmp_path / "bad.png", pictures / "1-is-1.png"
    bad.write_bytes(good.read_bytes()[:40])
    result = cli("predict", finished_run, bad, good, tmp_path / "absent.png", "--json")
    assert result.exit_code == 2
    found = json.loads(result.stdout)
    assert [one["error"] is None for one in found] == [False, True, False]
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert str(bad) in errors[0]
    assert "absent.png" in errors[1]
    (tmp_path / "empty").mkdir()
    assert "holds no image" in cli("predict", finished_run, tmp_path / "empty").stderr


@pytest.mark.slow
def test_the_driver_answers_image_files_as_predict_does(
    finished_run: Path, pictures: Path, tmp_path: Path, cli: Cli
) -> None:
    to = tmp_path / "deploy"
    listed = json.loads(cli("export", finished_run, "--to", to, "--json").stdout)
    assert sorted(Path(file).name for file in listed) == sorted(file.name for file in to.iterdir())
    python, files = bare_python(tmp_path / "venv"), sorted(pictures.rglob("*.png"))
    for flags in ([], ["--point", "full"], ["--budget", "0.6"]):
        wanted = json.loads(cli("predict", finished_run, *files, *flags, "--json").stdout)
        found = json_of(python, to, *files, *flags)
        for one, other in zip(found, wanted, strict=True):
            assert one["confidence"] == pytest.approx(other["confidence"], abs=1e-5)
            assert {name: one[name] for name in ("file", "answer", "by", "error")} == {
                name: other[name] for name in ("file", "answer", "by", "error")
            }
        shown = printed_by(python, to, files[0], *flags).stdout
        assert shown == f"{files[0]}  {found[0]['answer']}  {found[0]['confidence']:.3f}  {found[0]['by']}\n"


def test_what_the_driver_cannot_answer(finished_run: Path, pictures: Path, tmp_path: Path, cli: Cli) -> None:
    to, good = tmp_path / "deploy", sorted(pictures.rglob("*.png"))[0]
    cli("export", finished_run, "--to", to)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    python = Path(sys.executable)
    huge = tmp_path / "huge.pgm"
    huge.write_bytes(b"P5 20000 20000 255\n")
    done = printed_by(python, to, bad, good, tmp_path / "absent.png", huge, "--json")
    assert done.returncode == 2
    assert [one["error"] is None for one in json.loads(done.stdout)] == [False, True, False, False]
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["error"] * 3
    for flags, told in ([["--point", "none"], "no operating point none"], [["--budget", "0.01"], "within 0.01"]):
        done = printed_by(python, to, good, *flags)
        assert done.returncode == 2
        assert told in done.stderr
        assert "chosen" in done.stderr


def test_an_earlier_export_is_replaced_when_that_is_asked_for(finished_run: Path, tmp_path: Path, cli: Cli) -> None:
    to = tmp_path / "deploy"
    assert cli("export", finished_run, "--to", to).exit_code == 0
    first = {file.name: file.read_bytes() for file in to.iterdir()}
    refused = cli("export", finished_run, "--to", to)
    assert refused.exit_code == 2
    assert "--overwrite" in refused.stderr
    (to / "left-over.onnx").write_bytes(b"of another network")
    assert cli("export", finished_run, "--to", to, "--overwrite").exit_code == 0
    assert {file.name: file.read_bytes() for file in to.iterdir()} == first
    assert [file.name for file in tmp_path.iterdir()] == ["deploy"]
    (to / "mine.txt").write_text("keep")
    assert cli("export", finished_run, "--to", to, "--overwrite").exit_code == 2
    assert (to / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("verb", [["inspect"], ["bench"], ["calibrate"], ["predict", "."], ["export", "--to", "x"]])
def test_every_verb_refuses_what_is_no_artifact(verb: list[str], tmp_path: Path, cli: Cli) -> None:
    result = cli(verb[0], tmp_path, *verb[1:])
    assert result.exit_code == 2
    assert "holds no artifact" in result.stderr
