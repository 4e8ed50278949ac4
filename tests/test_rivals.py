"""Networks that a recipe compares with: measured beside the last step, alone and as a cascade, and told of first."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dynamize.data import DataSpec, load_data
from dynamize.errors import DynamizeError
from dynamize.member import Member
from dynamize.recipe import Recipe, load_recipe, parse_recipe
from dynamize.report import html, markdown
from dynamize.report.best import UNNAMED
from dynamize.report.folder import read_report
from dynamize.rivals import Rivals
from dynamize.run import Outcome, run_recipe
from dynamize.sources import SourceSpec, load_source
from dynamize.transform import Context

SMALL = {"source": "dynamize:digits_resnet_small,pretrained=true"}
CALIBRATED = [{"pass": "exits", "count": 1, "head": "linear"}, {"pass": "calibrate", "max_drop": 3}]
SHAPE = (1, 8, 8)


def recipe(steps: list[dict[str, Any]], compare: list[dict[str, Any]], **more: Any) -> Recipe:
    plain = {
        "version": 1,
        "model": {"source": "dynamize:digits_resnet,pretrained=true", "input": SHAPE},
        "data": {"source": "digits", "normalize": [[0.305], [0.376]], "test_limit": 100},
        "backends": ["eager"],
        "batches": [1],
        "timing_seconds": 0.05,
        "steps": steps,
        "compare": compare,
    }
    return parse_recipe(plain | more, "the test")


def run(out: Path, *args: Any, **options: Any) -> Outcome:
    outcome = run_recipe(recipe(*args), out, **options)
    assert outcome is not None
    return outcome


def second_paragraph(out: Path) -> str:
    return (out / "report.md").read_text().split("\n\n")[1]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compared") / "out"
    run(out, CALIBRATED, [SMALL])
    return out


def test_rivals_are_rows_of_the_same_form_measured_beside_the_last_step(compared: Path) -> None:
    ledger = read_report(compared).ledger
    assert [row.transform for row in ledger.rows] == ["static", "exits", "calibrate"]
    alone, cascade = ledger.rivals
    assert [alone.transform, cascade.transform] == ["rival: digits_resnet_small", "rival: cascade"]
    assert [alone.step, cascade.step] == [3, 4]
    assert alone.leaving == []
    assert cascade.leaving == ["digits_resnet_small"]
    assert alone.macs < cascade.macs_worst
    assert alone.params < ledger.rows[0].params < cascade.params
    for row in ledger.rivals:
        assert set(row.speedup["eager"]) == set(row.latency["eager"]) == {"1"}
        assert row.lead == pytest.approx(row.accuracy - ledger.rows[-1].accuracy)
        assert row.lead_ci[0] < row.lead < row.lead_ci[1]


def test_report_begins_with_who_is_best_and_shows_the_rivals(compared: Path) -> None:
    report = read_report(compared)
    first = second_paragraph(compared)
    assert "at this cost" in first.lower()
    assert first in markdown.render(report)
    assert "rival: digits_resnet_small" in markdown.render(report)
    assert UNNAMED not in markdown.render(report)
    page = html.render(report)
    assert page.index("this cost") < page.index("fewer MACs")
    assert page.index('"rivals"') < page.index('"name": "digits_resnet_small"') < page.index('"name": "cascade"')


def test_ledger_file_stays_a_list_of_the_steps(compared: Path) -> None:
    rows = json.loads((compared / "ledger.json").read_text())
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert "lead" not in rows[-1]


@pytest.mark.slow
def test_finished_run_goes_on_with_other_rivals_or_none(compared: Path, tmp_path: Path) -> None:
    states = {file: file.stat().st_mtime_ns for file in compared.rglob("state.json")}
    outcome = run(compared, CALIBRATED, [], resume=True)
    assert outcome.report.ledger.rivals == []
    assert UNNAMED in (compared / "report.md").read_text()
    assert "this cost" not in second_paragraph(compared)
    outcome = run(compared, CALIBRATED, [SMALL | {"name": "small"}], resume=True)
    assert outcome.report.ledger.rivals[0].transform == "rival: small"
    assert {file: file.stat().st_mtime_ns for file in compared.rglob("state.json")} == states


@pytest.mark.slow
def test_recipe_with_a_cascade_is_compared_with_single_networks_only(tmp_path: Path) -> None:
    steps = [{"pass": "cascade", "first": [SMALL]}, {"pass": "calibrate", "max_drop": 1}]
    ledger = run(tmp_path / "out", steps, [SMALL]).report.ledger
    assert [row.transform for row in ledger.rivals] == ["rival: digits_resnet_small"]


@pytest.mark.slow
def test_without_a_goal_the_cascade_stands_where_it_costs_nearest_to_the_network(tmp_path: Path) -> None:
    outcome = run(tmp_path / "out", [{"pass": "fold_batchnorm"}], [SMALL])
    ledger = outcome.report.ledger
    assert [row.transform for row in ledger.rivals] == ["rival: digits_resnet_small", "rival: cascade"]
    assert abs(ledger.rivals[1].macs_ratio - 1) < 0.5


def rivals_of(*members: dict[str, Any]) -> Rivals:
    teacher = load_source(SourceSpec(source="dynamize:digits_resnet,pretrained=true"), False)
    context = Context(data=load_data(DataSpec(source="digits", test_limit=50), SHAPE, 10), teacher=teacher)
    return Rivals([Member.model_validate(one) for one in members], teacher, SHAPE, context)


def test_rivals_that_cannot_be_compared_are_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(DynamizeError, match=r"^compare: digits_resnet_small tells 7 classes apart.*own network 10"):
        rivals_of({"source": "dynamize:digits_resnet_small,num_classes=7"})
    with pytest.raises(DynamizeError, match="^compare: 'cascade' is the name of two"):
        rivals_of(SMALL | {"name": "cascade"})
    with pytest.raises(DynamizeError, match=r"^compare: .*nowhere\.pt"):
        run(tmp_path / "out", CALIBRATED, [{"source": "dynamize:digits_resnet", "checkpoint": "/nowhere.pt"}])
    assert not (tmp_path / "out").exists()
    with pytest.raises(DynamizeError, match="trained already"):
        recipe(CALIBRATED, [{"shrink": 0.5}])


def test_dearer_networks_are_compared_but_stand_in_front_of_nothing() -> None:
    torch.manual_seed(0)
    assert rivals_of({"source": "dynamize:cifar_resnet20,in_channels=1"})._cheaper() == []
    both = rivals_of({"source": "dynamize:digits_resnet,num_classes=10", "name": "same"}, SMALL)._cheaper()
    assert [one.called() for one in both] == ["digits_resnet_small"]


@pytest.mark.slow
def test_a_rival_that_only_guesses_is_named(tmp_path: Path) -> None:
    untrained = {"source": "dynamize:digits_resnet_small", "name": "small"}
    run(tmp_path / "out", [{"pass": "fold_batchnorm"}], [untrained, SMALL])
    notes = {row.transform: " ".join(row.notes) for row in read_report(tmp_path / "out").ledger.rivals}
    assert "small is right on" in notes["rival: small"]
    assert "as by chance" in notes["rival: small"]
    assert "as by chance" not in notes["rival: digits_resnet_small"]


def test_paths_under_compare_are_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "small.pt").touch()
    (tmp_path / "own.py").touch()
    lines = [
        "version: 1",
        "model: {source: 'dynamize:digits_resnet', input: [1, 8, 8]}",
        "data: {source: digits}",
        "steps: []",
        "compare: [{source: 'own.py:make', checkpoint: small.pt}]",
    ]
    (tmp_path / "recipe.yaml").write_text("\n".join(lines))
    (found,) = load_recipe(tmp_path / "recipe.yaml").compare
    assert found.source == f"{tmp_path / 'own.py'}:make"
    assert found.checkpoint == tmp_path / "small.pt"
