"""A recipe: which network, which images, which steps, and what must hold in the end. Plain data, checked whole."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from dynamize.data.spec import DataSpec
from dynamize.errors import DynamizeError, closest
from dynamize.recipes import read_recipe
from dynamize.sources import SourceSpec
from dynamize.transform import Transform, check_order, registered

if TYPE_CHECKING:
    Step = Transform
else:
    Step = Annotated[Union[tuple(registered().values())], Field(discriminator="pass_name")]  # noqa: UP007


class ModelSection(SourceSpec):
    """The network: a source, its checkpoint and the shape of its input."""

    input: tuple[PositiveInt, PositiveInt, PositiveInt] = Field(description="channels, height, width")

    def spec(self) -> SourceSpec:
        """Without the input shape."""
        return SourceSpec(source=self.source, kwargs=self.kwargs, checkpoint=self.checkpoint)


class Bound(BaseModel):
    """A smallest and a largest value that a figure of the last row may have."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min: float | None = None
    max: float | None = None


class Expect(BaseModel):
    """What CI enforces about the last row of the ledger."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    accuracy: Bound | None = Field(None, description="in percent")
    accuracy_drop: Bound | None = Field(None, description="against the original network, in points")
    macs_ratio: Bound | None = Field(None, description="executed MACs as a share of the original network's")
    speedup: Bound | None = Field(None, description="on the first backend, the smallest over the batch sizes")
    agreement: Bound | None = Field(None, description="same answers as the original network, in percent")


class Recipe(BaseModel):
    """A whole run. ``backends`` is what latency is measured on, the main one first; empty means the fastest here."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1]
    description: str = ""
    model: ModelSection
    data: DataSpec
    seed: Annotated[int, Field(ge=0)] = 0
    backends: list[Literal["eager", "onnxruntime", "openvino", "openvino-bf16"]] = []
    batches: list[PositiveInt] = [1, 64]
    timing_seconds: PositiveFloat = Field(5.0, description="how long each comparison of times takes")
    steps: list[Step]
    expect: Expect = Expect()

    def transforms(self) -> list[Transform]:
        """The steps, whose order has been checked."""
        check_order(self.steps)
        return self.steps


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe, apply ``a.b=value`` overrides, and check everything.

    Args:
        path: a file, or the name of a built-in recipe such as ``quickstart``.
        overrides: dotted path and YAML value: ``steps.1.epochs=1``; steps count from 0.

    Raises:
        DynamizeError: no such file, not YAML, or fields that the schema refuses; all of them are named.
    """
    plain = read_recipe(path)
    for override in overrides:
        _override(plain, override)
    return parse_recipe(plain, str(path))


def parse_recipe(plain: dict[str, Any], name: str) -> Recipe:
    """A recipe from plain data; ``name`` is what error messages call it."""
    try:
        recipe = Recipe.model_validate(plain)
    except ValidationError as error:
        raise DynamizeError(f"{name} is no valid recipe:\n{explain(error)}") from error
    recipe.transforms()
    return recipe


def explain(error: ValidationError) -> str:
    """Every refused field on a line of its own: where, why, and what was given."""
    known = sorted(_field_names())
    lines = []
    for one in error.errors():
        where = ".".join(str(part) for part in one["loc"]) or "recipe"
        text = f"  {where}: {one['msg'].removeprefix('Value error, ')}"
        if one["type"] == "extra_forbidden":
            text = f"  {where}: no such field. {closest(str(one['loc'][-1]), known)}".rstrip()
        elif one["type"] == "missing":
            text = f"  {where}: missing"
        elif isinstance(one["input"], str | int | float | bool) and one["type"] != "value_error":
            text += f" (given: {one['input']!r})"
        lines.append(text)
    return "\n".join(lines)


def schema() -> dict[str, Any]:
    """JSON schema of recipes, for editors."""
    return Recipe.model_json_schema(by_alias=True)


def _field_names() -> set[str]:
    models: list[type[BaseModel]] = [Recipe, ModelSection, DataSpec, Expect, Bound, *registered().values()]
    return {field.alias or name for model in models for name, field in model.model_fields.items()}


def _override(plain: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise DynamizeError(f"--set {override}: write it as path=value, e.g. steps.1.epochs=1")
    *parents, last = path.split(".")
    target: Any = plain
    try:
        for part in parents:
            target = target[int(part)] if isinstance(target, list) else target.setdefault(part, {})
        value = yaml.safe_load(text)
        if isinstance(target, list):
            target[int(last)] = value
        else:
            target[last] = value
    except (ValueError, IndexError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise DynamizeError(
            f"--set {override}: the recipe has no place {path}; steps count from 0, e.g. steps.1.epochs=1"
        ) from error
