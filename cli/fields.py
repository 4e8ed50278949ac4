"""Fields of a section or a step in words, read from its JSON schema."""

import inspect
import json
import re
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dynamize.cli.tables import named, table

if TYPE_CHECKING:
    from dynamize.transform import Transform

_LIMITS = {"minimum": "from {}", "exclusiveMinimum": "above {}", "maximum": "to {}", "exclusiveMaximum": "below {}"}


def transforms(found: "dict[str, type[Transform]]") -> Table:
    """Every transform with the first sentence of its documentation."""
    return named({name: sentence(cls.__doc__ or "") for name, cls in sorted(found.items())}, "transform")


def transform(cls: "type[Transform]") -> Group:
    """A transform's documentation and fields, then the fields of what stands in these."""
    facts = cls.model_json_schema(by_alias=True)
    prose, *_ = inspect.cleandoc(cls.__doc__ or "").partition("\n\nExample:")  # in Python
    told: list[RenderableType] = [Text(" ".join(one.split()) + "\n") for one in _plain(prose).split("\n\n")]
    told.append(_fields(facts))
    for name, section in facts.get("$defs", {}).items():
        told += [Text(f"\n{name}: {sentence(section.get('description', ''))}\n"), _fields(section)]
    return Group(*told)


def _fields(facts: dict[str, Any]) -> Table:
    made = table(("field", "left"), ("type", "left"), ("default", "left"), ("", "left"))
    for name, one in facts["properties"].items():
        if name != "pass":
            made.add_row(*map(Text, [name, typed(one), default(name, facts), one.get("description", "")]))
    return made


def sentence(prose: str) -> str:
    """The first sentence of a documentation, over as many lines as it takes."""
    paragraph = " ".join(_plain(inspect.cleandoc(prose)).partition("\n\n")[0].split())
    return re.split(r"(?<=\.)\s+(?=[A-Z`])", paragraph)[0]


def _plain(prose: str) -> str:
    return re.sub(":[a-z]+:`", "`", prose).replace("``", "`")


def typed(facts: dict[str, Any]) -> str:
    """The kind of a field, with the range of a number."""
    return " ".join([kind(facts), *(text.format(facts[name]) for name, text in _LIMITS.items() if name in facts)])


def default(name: str, facts: dict[str, Any]) -> str:
    """What field ``name`` of a schema is where it is not given: ``required``, a value as in JSON, or nothing."""
    if name in facts.get("required", []):
        return "required"
    value = facts["properties"][name].get("default")
    return "" if value in (None, "", [], {}) or isinstance(value, dict) else json.dumps(value)


def kind(facts: dict[str, Any]) -> str:
    """A JSON schema in a few words: whole number, list of texts, auto or text, ..."""
    if "anyOf" in facts:
        return " or ".join(said for one in facts["anyOf"] if (said := kind(one)) != "null")
    if "$ref" in facts:
        return str(facts["$ref"]).rpartition("/")[2]
    if "enum" in facts or "const" in facts:
        return " | ".join(str(value) for value in facts.get("enum", [facts.get("const")]))
    if "oneOf" in facts:
        return "step"
    if "prefixItems" in facts:
        return f"[{', '.join(map(kind, facts['prefixItems']))}]"
    if facts.get("type") == "array":
        return f"list of {kind(facts.get('items', {}))}"
    names = {"integer": "whole number", "string": "text", "boolean": "true | false"}
    return names.get(facts.get("type", ""), facts.get("type", "any"))
