"""What pydantic refuses, said as dynamize says it: where, why, and what to write instead."""

import re
from collections.abc import Iterator, Mapping, Sequence
from inspect import isabstract, isclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from dynamize.errors import closest, unknown

Place = tuple[int | str, ...]
_SHOULD_BE = "Input should be "


class FieldError(ValueError):
    """What a section as a whole refuses about one of its fields.

    Attributes:
        field: the name that the user wrote.
    """

    def __init__(self, field: str, text: str) -> None:
        super().__init__(text)
        self.field = field


def explain(error: ValidationError, model: type[BaseModel], given: Mapping[str, Any]) -> str:
    """What follows a colon: one refused field, or several on a line of their own: where, why, and what was given.

    Args:
        error: what validating ``given`` as ``model`` raised.
    """
    whole: dict[Place, list[str]] = {}
    members: dict[Place, list[str]] = {}  # each says that the value is not what one member of a union allows
    for one in error.errors():
        place = _place(given, one)
        found = whole if place[-1:] == one["loc"][-1:] else members
        found.setdefault(place, []).append(_why(one, model))
    deepest = {place: why for place, why in members.items() if not _has_below(place, [*whole, *members])}
    faults = whole | {place: [_joined(why)] for place, why in deepest.items()}
    lines = [f"{'.'.join(map(str, place)) or 'recipe'}: {text}" for place, texts in faults.items() for text in texts]
    return f" {lines[0]}" if len(lines) == 1 else "".join(f"\n  {line}" for line in lines)


def _place(given: Any, one: Mapping[str, Any]) -> Place:
    """The place as the user wrote it: without what pydantic calls the members of a union, with the names of steps."""
    place: list[int | str] = []
    for part in one["loc"]:
        try:
            given = given[part]
        except (LookupError, TypeError):  # a name that pydantic put there
            if not (isinstance(given, Mapping) and part in given.values()):
                continue
        place.append(part)
    if isinstance(raised := one.get("ctx", {}).get("error"), FieldError):
        place.append(raised.field)
    return (*place, one["loc"][-1]) if one["type"] == "missing" else tuple(place)


def _has_below(place: Place, places: Sequence[Place]) -> bool:
    return any(len(one) > len(place) and one[: len(place)] == place for one in places)


def _why(one: Mapping[str, Any], model: type[BaseModel]) -> str:
    text, context = one["msg"].removeprefix("Value error, "), one.get("ctx", {})
    if one["type"] == "extra_forbidden":
        names = [name for cls in _sections(model, one["loc"][:-1]) for name in _fields(cls)]
        return f"no such field. {closest(str(one['loc'][-1]), names)}Fields: {', '.join(names)}."
    if one["type"] in ("model_type", "dict_type") and (found := _sections(model, one["loc"])) != [model]:
        names = [name for cls in found for name in _fields(cls)]
        return f"one value stands where fields are expected: {', '.join(names)} (given: {one['input']!r})"
    if one["type"] == "too_short":
        return f"give at least {context['min_length']} (given: {one['input']!r})"
    if one["type"] == "path_type":
        return f"a path is expected (given: {one['input']!r})"
    if one["type"] == "missing":
        return "missing"
    if one["type"] in ("union_tag_invalid", "union_tag_not_found"):
        *_, key = _quoted(context["discriminator"])
        what = "transform" if key == "pass" else key
        if one["type"] == "union_tag_not_found":
            return f"`{key}` is missing, which says what the other fields are of"
        return unknown(context["tag"], what, _quoted(context["expected_tags"]))
    if isinstance(one["input"], str | int | float | bool) and one["type"] != "value_error":
        return f"{text} (given: {one['input']!r})"
    return text


def _quoted(text: str) -> list[str]:
    return re.findall("'(.*?)'", text)


def _joined(members: list[str]) -> str:
    """One sentence for a value that no member of a union allows."""
    given = re.search(r" \(given: .*\)$", members[0])
    end = given[0] if given else ""
    texts = [text.removesuffix(end) for text in members]
    return " or ".join([texts[0], *(text.removeprefix(_SHOULD_BE) for text in texts[1:])]) + end


def _sections(model: type[BaseModel], place: Place) -> list[type[BaseModel]]:
    """What may stand at a place: one section, or one of several where no name says which."""
    here = [model]
    for part in place:
        named = [cls for cls in here if part in _tags(cls)] if len(here) > 1 else []
        kinds = [field.annotation for cls in here for name, field in _fields(cls).items() if name == part]
        here = named or [cls for kind in kinds for cls in _models(kind)] or here
    return here


def _fields(cls: type[BaseModel]) -> dict[str, FieldInfo]:
    """By the names that a user writes."""
    return {field.alias or name: field for name, field in cls.model_fields.items()}


def _tags(cls: type[BaseModel]) -> list[Any]:
    """What names this section among the members of a union."""
    kinds = [field.annotation for field in cls.model_fields.values()]
    return [name for kind in kinds if get_origin(kind) is Literal for name in get_args(kind)]


def _models(kind: Any) -> Iterator[type[BaseModel]]:
    """The sections that an annotation speaks of."""
    if isclass(kind) and issubclass(kind, BaseModel):
        yield from kind.choices() if isabstract(kind) else (kind,)  # type: ignore[attr-defined]
    for inner in get_args(kind):
        yield from _models(inner)
