"""What a recipe may expect, and what it is told where it expects nonsense."""

import re
from pathlib import Path

import pytest

from dynamize.errors import DynamizeError
from dynamize.recipe import load_recipe


@pytest.mark.parametrize(
    ("expect", "told"),
    [
        ("{accuracy: 50}", r"expect\.accuracy: .*smallest or the largest.*\{min: 50\} or \{max: 50\}"),
        ("{speedup: 1.2}", r"expect\.speedup: .*\{min: 1\.2\}"),
        ("{accuracy: high}", r"expect\.accuracy: one value stands where fields are expected: min, max"),
        ("{accuracy: [90]}", "one value stands where fields are expected: min, max"),
        ("{accuracy: {}}", "neither a smallest nor a largest value"),
        ("{accuracy: {min: .nan}}", r"expect\.accuracy\.min: .*finite"),
        ("{accuracy: {min: 0.9}}", "write 90 for 90 %"),
        ("{accuracy: {min: 91, max: 90}}", "exchange them"),
        ("{slowdown: {max: 1.1}}", r"slowdown compares with an earlier run.*baseline: ledger\.json"),
        ("{macs_growth: {max: 1.1}}", "macs_growth compares with an earlier run"),
        ("{baseline: a.json, slowdown: {max: -1}}", "a quotient is meant"),
        ("{baseline: 5}", r"expect\.baseline: a path is expected \(given: 5\)"),
        ("50", "expect: one value stands where fields are expected: baseline, accuracy"),
        ("{slowdwon: {max: 1}}", "Did you mean slowdown"),
    ],
)
def test_nonsense_is_refused_in_words(expect: str, told: str) -> None:
    with pytest.raises(DynamizeError) as caught:
        load_recipe("quickstart", [f"expect={expect}"])
    assert re.search(told, str(caught.value))
    assert "Bound" not in str(caught.value)


def test_a_baseline_lies_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ci").mkdir()
    (tmp_path / "ci" / "ledger.json").write_text("[]")
    recipe = tmp_path / "ci" / "mine.yaml"
    recipe.write_text(
        "version: 1\nmodel: {source: 'dynamize:digits_resnet', input: [1, 8, 8]}\ndata: {source: digits}\n"
        "steps: []\nexpect: {baseline: ledger.json}\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_recipe(recipe).expect.baseline == tmp_path / "ci" / "ledger.json"
    assert load_recipe(recipe, ["expect.baseline=other.json"]).expect.baseline == Path("other.json")
