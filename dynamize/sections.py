"""What all sections of a recipe have in common: fields that are what they look like, and, where a section is written in
Python, calls whose mistakes are told in a sentence."""

from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from dynamize.errors import DynamizeError
from dynamize.faults import FieldError, explain

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)


class InWords(ModelMetaclass):
    """The metaclass of pydantic's models, with DynamizeError for a call with wrong fields or values."""

    def __call__(cls, *values: Any, **fields: Any) -> Any:
        model = cast(type[BaseModel], cls)
        if values:
            names = ", ".join(f"{name}=..." for name in model.model_fields if name != "pass_name")
            raise DynamizeError(f"{cls.__name__} takes its fields by name: {cls.__name__}({names})")
        try:
            return super().__call__(**fields)
        except ValidationError as error:
            why = explain(error, model, fields).strip()
            raise DynamizeError(f"{cls.__name__}: {why.removeprefix('recipe: ')}") from error


class Section(BaseModel):
    """Fixed fields with nothing besides. A number is one: neither in quotes nor `true`, not infinite, and not NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _are_what_they_look_like(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            for name, field in cls.model_fields.items():
                for key in {name, field.alias} & given.keys():
                    _refuse_quotes(given[key], field.annotation, str(key))
        return given


def _refuse_quotes(value: Any, kind: Any, name: str) -> None:
    """FieldError for a text where only numbers or truth values may stand, or one of these in the other's place."""
    kinds = list(_kinds(kind))
    if isinstance(value, list | tuple):
        inner = [get_args(one) for one in kinds if get_origin(one) in (list, tuple)]
        if len(inner) == 1:
            items = [one for one in inner[0] if one is not ...]
            for index, item in enumerate(value):
                _refuse_quotes(item, items[min(index, len(items) - 1)], name)
        return
    allowed = [one for one in kinds if one is not NoneType]
    if not allowed or any(one not in (bool, int, float) and get_origin(one) is not Literal for one in allowed):
        return
    if any(value in get_args(one) for one in allowed if get_origin(one) is Literal):
        return
    numbers, truths = int in allowed or float in allowed, bool in allowed
    if isinstance(value, str) and (numbers or truths):
        wanted = "a number" if numbers else "true or false"
        raise FieldError(name, f"{wanted} is expected, without quotes (given: {value!r})")
    if isinstance(value, bool) and numbers and not truths:
        raise FieldError(name, f"a number is expected (given: {str(value).lower()})")
    if isinstance(value, int | float) and not isinstance(value, bool) and truths and not numbers:
        raise FieldError(name, f"true or false is expected (given: {value!r})")


def _kinds(kind: Any) -> Iterator[Any]:
    """The members of a union, and of those in it."""
    origin, members = get_origin(kind), get_args(kind)
    if origin is Annotated:
        yield from _kinds(members[0])
    elif origin in (Union, UnionType):
        for member in members:
            yield from _kinds(member)
    else:
        yield kind
