"""A recipe is checked whole: every fault is named, overrides go through the same schema."""

from pathlib import Path

import pytest

from dynamize.errors import DynamizeError
from dynamize.recipe import Recipe, load_recipe, parse_recipe, schema
from dynamize.recipes import builtin_recipes, describe, find_recipe, read_recipe
from dynamize.transforms import Distill, Exits


def write(folder: Path, text: str) -> Path:
    file = folder / "mine.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("name", builtin_recipes())
def test_builtin_recipes_are_valid_and_described(name: str) -> None:
    assert load_recipe(name).steps
    assert describe(find_recipe(name))


def test_steps_are_the_python_transforms() -> None:
    recipe = load_recipe("digits_exits")
    steps = recipe.transforms()
    assert steps[0] == Exits(at=["layer1.1", "layer2.1"], head="conv", share=0.15)
    assert isinstance(steps[1], Distill)
    assert parse_recipe(recipe.model_dump(mode="json", by_alias=True), "again") == recipe


def test_a_step_may_be_one_of_an_artifact() -> None:
    recipe = load_recipe("digits_exits", ["steps.0.version=2"])
    assert recipe == load_recipe("digits_exits")


def test_a_step_of_a_recipe_is_of_the_newest_version_unless_it_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Exits, "version", 3)
    monkeypatch.setattr(Exits, "upgrade", lambda step, version: step | {"count": 7})
    read = [
        load_recipe("digits_exits", [f"steps.0={step}"]).steps[0]
        for step in ("{pass: exits, version: 1}", "{pass: exits}")
    ]
    assert read == [Exits(count=7), Exits()]


def test_overrides_go_through_the_schema() -> None:
    recipe = load_recipe(
        "digits_exits",
        ["steps.1.epochs=1", "seed=3", "data.test_limit=50", "expect.speedup={min: 1.5}", 'model.checkpoint="a b.pt"'],
    )
    assert isinstance(recipe.steps[1], Distill)
    assert recipe.steps[1].epochs == 1
    assert (recipe.seed, recipe.data.test_limit) == (3, 50)
    assert recipe.expect.speedup is not None
    assert recipe.expect.speedup.min == 1.5
    assert recipe.model.spec().checkpoint == Path("a b.pt")


def test_a_power_of_ten_is_a_number_without_a_point() -> None:
    step = load_recipe("digits_exits", ["steps.1.lr=1e-3"]).steps[1]
    assert isinstance(step, Distill)
    assert step.lr == 0.001


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("epochs", "path=value"),
        ("=3", "path=value"),
        ("steps.9.epochs=1", "no place steps.9.epochs"),
        ("steps.x.epochs=1", "no place steps.x.epochs"),
        ("seed.a=1", "seed: Input should be a valid integer"),
        ("seed=[", "no place seed"),
        ("seed=-1", "seed: Input should be greater than or equal to 0 (given: -1)"),
        ("sed=1", "sed: no such field. Did you mean seed"),
        ("steps.1.epoch=1", "Did you mean epochs"),
        ("steps.0.pass=exit", "Did you mean exits"),
        ("steps.0.version=3", "steps.0: `exits`: the step is of version 3"),
        ("model.source=resnet50", "torchvision:resnet50"),
        ("data.normalize=[[2], [1]]", "pixels in 0..1"),
        ("version=2", "version"),
        ("steps.1.epochs='3'", "epochs: a number is expected, without quotes (given: '3')"),
        ("steps.1.epochs=true", "epochs: a number is expected (given: true)"),
        ("steps.1.lr=.inf", "finite"),
        ("batches=[1, '8']", "batches: a number is expected, without quotes"),
        ("data.normalize=[['0.5'], [1]]", "normalize: a number is expected, without quotes"),
    ],
)
def test_refused_override_names_the_place(override: str, told: str) -> None:
    with pytest.raises(DynamizeError) as refused:
        load_recipe("digits_exits", [override])
    assert told in str(refused.value)


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    file = write(tmp_path, "version: 1\nmodel: {source: 'torchvision:resnet18'}\nsteps: [{pass: exits, count: 0}]\n")
    with pytest.raises(DynamizeError) as refused:
        load_recipe(file)
    lines = str(refused.value).splitlines()
    assert lines[0] == f"{file} is no valid recipe:"
    assert "  model.input: missing" in lines
    assert "  data: missing" in lines
    assert any(line.startswith("  steps.0.exits.count:") and "(given: 0)" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [1", "line 1"),
        ("a: 1\nb: c: d\n", "line 2"),
        ("- 1\n", "holds no recipe"),
        ("", "holds no recipe"),
        ("\x00", "cannot be read as YAML"),
    ],
)
def test_what_is_no_recipe(text: str, told: str, tmp_path: Path) -> None:
    file = write(tmp_path, text)
    with pytest.raises(DynamizeError, match=told) as refused:
        read_recipe(file)
    assert str(file) in str(refused.value)


def test_unknown_name_lists_the_builtin_ones() -> None:
    with pytest.raises(DynamizeError, match=r"Did you mean quickstart\?.*Built in: .*quickstart"):
        load_recipe("quikstart")


def test_yaml_cannot_make_objects(tmp_path: Path) -> None:
    file = write(tmp_path, f"!!python/object/apply:pathlib.Path.touch [{tmp_path / 'made'}]\n")
    with pytest.raises(DynamizeError):
        read_recipe(file)
    assert not (tmp_path / "made").exists()


def test_schema_tells_every_step_by_its_pass() -> None:
    found = schema()
    steps = found["properties"]["steps"]["items"]
    assert steps["discriminator"]["propertyName"] == "pass"
    assert {"exits", "distill", "calibrate"} <= set(steps["discriminator"]["mapping"])
    for place in steps["oneOf"]:
        step = found["$defs"][place["$ref"].rpartition("/")[2]]
        assert "pass" in step["required"]  # else every step without a name would fit
        assert ">>>" not in step["description"]
    assert found["title"] == Recipe.__name__
