"""What is refused is said in the user's own words: the place as they wrote it, the fields and names that there are."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from dynamize.errors import DynamizeError
from dynamize.faults import explain
from dynamize.recipe import load_recipe
from dynamize.transform import find_transform


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Round(Section):
    shape: Literal["round"]
    radius: PositiveInt = 1


class Square(Section):
    shape: Literal["square"] = "square"
    side: int | Literal["auto"] | list[PositiveInt] = 1


class Drawing(Section):
    shapes: list[Annotated[Round | Square, Field(discriminator="shape")]] = []
    sizes: Literal["auto"] | dict[str, PositiveInt] = "auto"
    inside: "Drawing | None" = None


def told(given: dict[str, Any]) -> list[str]:
    with pytest.raises(ValidationError) as refused:
        Drawing.model_validate(given)
    return explain(refused.value, Drawing, given).splitlines()


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"shapes": [{"shape": "sqare"}]}, "shapes.0: 'sqare' is no shape. Did you mean square? Known: round, square."),
        ({"shapes": [{}]}, "shapes.0: `shape` is missing, which says what the other fields are of"),
        (
            {"shapes": [{"shape": "square", "sid": 1}]},
            "shapes.0.square.sid: no such field. Did you mean side? Fields: shape, side.",
        ),
        ({"shapes": [{"shape": "round", "side": 1}]}, "shapes.0.round.side: no such field. Fields: shape, radius."),
        (
            {"shapes": [{"shape": "round", "radius": 0}]},
            "shapes.0.round.radius: Input should be greater than 0 (given: 0)",
        ),
        (
            {"shapes": [{"shape": "square", "side": "x"}]},
            "shapes.0.square.side: Input should be a valid integer, unable to parse string as an integer or 'auto' or "
            "a valid list (given: 'x')",
        ),
        ({"sizes": {"a": 1, "b": 0}}, "sizes.b: Input should be greater than 0 (given: 0)"),
        ({"sizes": 3}, "sizes: Input should be 'auto' or a valid dictionary (given: 3)"),
        (
            {"inside": {"size": 3}},
            "inside.size: no such field. Did you mean sizes, inside? Fields: shapes, sizes, inside.",
        ),
    ],
)
def test_one_fault_is_one_line(given: dict[str, Any], line: str) -> None:
    assert told(given) == [f" {line}"]


def test_faults_of_several_members_stay_apart() -> None:
    given = {"shapes": [{"shape": "round", "radius": 0}, {"shape": "square", "side": [1, 0]}], "sizes": "all"}
    assert told(given) == [
        "",
        "  shapes.0.round.radius: Input should be greater than 0 (given: 0)",
        "  shapes.1.square.side.1: Input should be greater than 0 (given: 0)",
        "  sizes: Input should be 'auto' or a valid dictionary (given: 'all')",
    ]


def test_a_recipe_answers_as_python_does() -> None:
    with pytest.raises(DynamizeError) as of_python:
        find_transform("exitz")
    with pytest.raises(DynamizeError) as of_recipe:
        load_recipe("digits_exits", ["steps.0.pass=exitz"])
    assert "Did you mean exits?" in str(of_python.value)
    assert str(of_recipe.value) == f"digits_exits is no valid recipe: steps.0: {of_python.value}"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data.sorce=x", "data.sorce: no such field. Did you mean source? Fields: source, calibration, "),
        ("steps.1.sed=1", "steps.1.distill.sed: no such field. Fields: pass, member, epochs, "),
        ("expect.speedup.maxi=1", "expect.speedup.maxi: no such field. Did you mean max, min? Fields: min, max."),
        ("steps.0.at=3", "steps.0.exits.at: Input should be 'auto' or a valid list (given: 3)"),
        ("steps.0=exits", "steps.0: 'exits' is no step: write `pass: NAME`, "),
        ("steps.0={at: [a]}", "steps.0: `pass` is missing, "),
        ("code=x", "code: Input should be a valid list (given: 'x')"),
        ("steps.0={pass: cascade, first: []}", "steps.0.cascade.first: give at least 1 (given: [])"),
    ],
)
def test_fields_are_those_of_the_section(override: str, line: str) -> None:
    with pytest.raises(DynamizeError) as refused:
        load_recipe("digits_exits", [override])
    (told,) = str(refused.value).splitlines()
    assert told.startswith(f"digits_exits is no valid recipe: {line}")
