"""A recipe: which network, which images, which steps, and what must hold in the end. Plain data, checked whole."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    Field,
    GetJsonSchemaHandler,
    PlainValidator,
    PositiveInt,
    SerializeAsAny,
    ValidationError,
    field_validator,
)

from dynamize.data.spec import DataSpec
from dynamize.errors import DynamizeError
from dynamize.expect import Expect
from dynamize.faults import explain
from dynamize.member import Member
from dynamize.paths import beside, from_here, located
from dynamize.recipes import builtin_recipes, find_recipe, read_recipe, read_value
from dynamize.runtime.engine import backend_names, unknown_backend
from dynamize.sections import Section
from dynamize.sources import SourceSpec
from dynamize.transform import Transform, any_step, check_order, upgraded
from dynamize.usercode import import_file


def _read_step(step: Any) -> Transform:
    """A step of any transform that there is when the recipe is read; one that names no version is of the newest."""
    if isinstance(step, Transform):
        return step
    if not isinstance(step, dict):
        raise ValueError(f"{step!r} is no step: write `pass: NAME`, with the fields of that transform below it")
    try:
        return any_step().validate_python(upgraded(step) if "version" in step else step)
    except DynamizeError as error:
        raise ValueError(str(error)) from error


class _SchemaOfAnyStep:
    """The JSON schema of a step: one of all transforms that there are when it is asked for."""

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return handler(any_step().core_schema)


Step = Annotated[SerializeAsAny[Transform], PlainValidator(_read_step), _SchemaOfAnyStep()]


def _known_backend(name: str) -> str:
    if name not in backend_names():
        raise ValueError(unknown_backend(name))
    return name


Backend = Annotated[str, AfterValidator(_known_backend), Field(json_schema_extra={"enum": [*backend_names()]})]


class ModelSection(SourceSpec):
    """The network: a source, its checkpoint and the shape of its input."""

    input: tuple[PositiveInt, PositiveInt, PositiveInt] = Field(description="channels, height, width")

    def spec(self) -> SourceSpec:
        """Without the input shape."""
        return SourceSpec(source=self.source, kwargs=self.kwargs, checkpoint=self.checkpoint)


class Settings(Section):
    """A run, whatever network and images it is about: which steps, how it is measured and what must hold in the end.

    ``backends`` is what latency is measured on, the main one first; empty means the fastest here.
    """

    description: str = Field("", description="title of the report")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="of everything random")
    backends: list[Backend] = Field([], description="what is timed, the main one first; empty: the fastest here")
    batches: list[PositiveInt] = Field([1, 64], description="sizes of the batches that are timed")
    timing_seconds: Literal["auto"] | Annotated[float, Field(gt=0, le=86400)] = Field(
        "auto", description="how long each comparison of times takes; auto: up to 5, a tenth of the run in all"
    )
    steps: list[Step] = Field(description="what is done, in this order")
    compare: list[Member] = Field(
        [],
        description="other networks, which are judged and timed beside the last step's, alone and as a cascade in "
        "front of the recipe's own: each a source with its checkpoint, or the own one at another `resolution`",
    )
    expect: Expect = Field(Expect(), description="what has to hold in the end; exit code 1 where it does not")

    def transforms(self) -> list[Transform]:
        """The steps, whose order has been checked."""
        check_order(self.steps)
        return self.steps


class Recipe(Settings):
    """A whole run, with its network and its images.

    ``code`` are Python files with transforms of the user's own. :func:`load_recipe` imports them, if they are trusted.
    """

    version: Literal[1] = Field(description="of the format")
    model: ModelSection = Field(description="the network")
    data: DataSpec = Field(description="the images")
    code: list[Path] = Field(
        [], description="Python files that define transforms, relative to the recipe; run only with --trust-code"
    )

    @field_validator("compare")
    @classmethod
    def _trained(cls, members: list[Member]) -> list[Member]:
        for member in members:
            if member.source is None and member.resolution is None:
                raise ValueError("a network to compare with has to be trained already: give its source and checkpoint")
        return members


def as_yaml(settings: Settings) -> str:
    """What differs from the defaults, as a recipe says it."""
    plain = settings.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    steps = [
        {"pass": step.pass_name, **step.model_dump(mode="json", by_alias=True, exclude_defaults=True)}
        for step in settings.steps
    ]
    return str(yaml.safe_dump(plain | {"steps": steps}, sort_keys=False, allow_unicode=True, default_flow_style=None))


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = (), *, trust_code: bool = False) -> Recipe:
    """Read a YAML recipe, apply ``a.b=value`` overrides, and check everything.

    A path in the file is one beside it, or else in the working folder; one in an override is in the working folder.

    Args:
        path: a file, or the name of a built-in recipe such as ``quickstart``.
        overrides: dotted path and YAML value: ``steps.1.epochs=1``; steps count from 0.
        trust_code: whether the files that its ``code`` names may be run.

    Raises:
        DynamizeError: no such file, not YAML, code that is not trusted, or fields that the schema refuses; all of them
            are named.
    """
    plain, file = read_recipe(path), find_recipe(path)
    of_code = [one for one in overrides if one.replace(".", "=").partition("=")[0] == "code"]
    for override in of_code:
        _override(plain, override)
    code = plain.pop("code", [])
    if isinstance(code, list) and all(isinstance(file, str) for file in code):
        code = _import_code(code, file, trust_code)
    plain = located(plain, Recipe, from_here if file in builtin_recipes().values() else beside(file))
    for override in overrides:
        if override not in of_code:
            _override(plain, override)
    return parse_recipe(located(plain, Recipe, from_here) | {"code": code}, str(path))


def parse_recipe(plain: dict[str, Any], name: str) -> Recipe:
    """A recipe from plain data; ``name`` is what error messages call it."""
    try:
        recipe = Recipe.model_validate(plain)
    except ValidationError as error:
        raise DynamizeError(f"{name} is no valid recipe:{explain(error, Recipe, plain)}") from error
    recipe.transforms()
    return recipe


def schema() -> dict[str, Any]:
    """JSON schema of recipes, for editors: with all transforms that there are now."""
    found = Recipe.model_json_schema(by_alias=True)
    for section in found["$defs"].values():
        if "pass" in section["properties"]:
            section["required"] = ["pass", *section.get("required", [])]
            section["properties"]["version"] = {"type": "integer", "minimum": 1, "description": "by default the newest"}
        if "description" in section:
            section["description"] = section["description"].partition("\n\nExample:")[0]  # in Python
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def _import_code(names: list[str], recipe: Path, trust_code: bool) -> list[str]:
    """Run the files with the user's transforms, and return where they are."""
    files = [(recipe.parent / Path(name).expanduser()).resolve() for name in names]
    if len({file.name for file in files}) < len(files):
        raise DynamizeError(
            f"{recipe}: code: {', '.join(names)}: two of these have one name: name each file differently"
        )
    for name, file in zip(names, files, strict=True):
        if not file.is_file():
            raise DynamizeError(f"{recipe}: code: there is no file {name} beside the recipe (looked for {file})")
    if files and not trust_code:
        raise DynamizeError(
            f"{recipe} has transforms of its own in {', '.join(names)}, and running it would run that code. Read it, "
            "then add --trust-code (in Python: load_recipe(..., trust_code=True))."
        )
    for file in files:
        import_file(file)
    return [str(file) for file in files]


def _override(plain: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise DynamizeError(f"--set {override}: write it as path=value, e.g. steps.1.epochs=1")
    *parents, last = path.split(".")
    target: Any = plain
    try:
        for part in parents:
            target = target[int(part)] if isinstance(target, list) else target.setdefault(part, {})
        value = read_value(text)
        if isinstance(target, list):
            target[int(last)] = value
        else:
            target[last] = value
    except (ValueError, IndexError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise DynamizeError(
            f"--set {override}: the recipe has no place {path}; steps count from 0, e.g. steps.1.epochs=1"
        ) from error
