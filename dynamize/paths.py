"""Where the files that a recipe names lie: beside the recipe, or else in the working folder."""

import types
from collections.abc import Callable, Mapping
from inspect import isclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel

from dynamize.data.canvas_spec import parted
from dynamize.data.spec import DataSpec
from dynamize.transform import Transform, registered

Find = Callable[[str], str]
_IN_DATA, _CANVAS = ("imagefolder:", "npz:"), "canvas:"


def beside(recipe: Path) -> Find:
    """Finds what a recipe in this file means by a path: what lies beside it, else what lies in the working folder."""

    def find(name: str) -> str:
        path = Path(name).expanduser()
        near = recipe.parent / path
        return str(path if path.exists() and not near.exists() else near)

    return find


def from_here(name: str) -> str:
    """What the command line means by a path."""
    return str(Path(name).expanduser())


def located(plain: Any, kind: Any, find: Find) -> Any:
    """Plain data with all paths in it as ``find`` says: fields that are paths, and what sources name.

    What does not fit ``kind`` stays as it is, for validation to refuse.

    Args:
        kind: the annotation that ``plain`` is of: a section, a list of sections, ...
    """
    if isinstance(plain, Mapping):
        return _located_fields(plain, kind, find)
    if isinstance(plain, list):
        inner = [one for of in _members(kind) if get_origin(of) is list for one in get_args(of)]
        return [located(one, inner[0], find) for one in plain] if inner else plain
    return find(plain) if isinstance(plain, str) and Path in _members(kind) else plain


def _located_fields(plain: Mapping[str, Any], kind: Any, find: Find) -> dict[str, Any]:
    cls = next((one for one in _members(kind) if isclass(one) and issubclass(one, BaseModel)), None)
    if cls is Transform:
        cls = registered().get(str(plain.get("pass")))
    if cls is None:
        return dict(plain)
    fields = {field.alias or name: field.annotation for name, field in cls.model_fields.items()}
    found = {name: located(value, fields.get(name), find) for name, value in plain.items()}
    if "source" in fields and isinstance(found.get("source"), str):
        found["source"] = (
            _in_data(found["source"], find) if issubclass(cls, DataSpec) else _in_source(found["source"], find)
        )
    return found


def _in_source(source: str, find: Find) -> str:
    """``own.py:factory,width=2``."""
    file, ending, factory = source.partition(".py:")
    return find(file + ".py") + ":" + factory if ending else source


def _in_data(source: str, find: Find) -> str:
    if source.startswith(_CANVAS):
        inner, options = parted(source.removeprefix(_CANVAS))
        return ",".join([_CANVAS + _in_data(inner, find), *options])
    kind = next((kind for kind in _IN_DATA if source.startswith(kind)), None)
    if kind is not None and source != kind:
        return kind + find(source.removeprefix(kind))
    name, at, root = source.partition("@")
    return f"{name}@{find(root)}" if source.startswith("torchvision:") and root else source


def _members(kind: Any) -> list[Any]:
    """What an annotation allows: the members of a union, without what pydantic is told about them."""
    if hasattr(kind, "__metadata__"):
        return _members(kind.__origin__)
    if get_origin(kind) in (Union, types.UnionType):
        return [one for member in get_args(kind) for one in _members(member)]
    return [kind]
