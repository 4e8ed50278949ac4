"""The recipes that come with dynamize, as YAML files beside this one; finding them imports no torch."""

import os
import re
from pathlib import Path
from typing import Any

import yaml

from dynamize.errors import DynamizeError, closest


def builtin_recipes() -> dict[str, Path]:
    """The recipes that come with dynamize, by name."""
    return {file.stem: file for file in sorted(Path(__file__).parent.glob("*.yaml"))}


def find_recipe(path: str | os.PathLike[str]) -> Path:
    """The file of a recipe given by path or built-in name.

    Raises:
        DynamizeError: it is neither.
    """
    file = Path(path)
    if file.is_file():
        return file
    found = builtin_recipes()
    if str(path) in found:
        return found[str(path)]
    raise DynamizeError(
        f"there is no recipe '{path}': neither a file nor a built-in one. {closest(str(path), list(found))}"
        f"Built in: {', '.join(found)}."
    )


class _Reader(yaml.SafeLoader):
    """Plain data only, in which no key stands twice: the first one would be lost without a word. 1e-3 is a number, as
    in YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} stands twice in one section", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Reader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_value(text: str) -> Any:
    """A value as recipes write it. Raises YAMLError."""
    return yaml.load(text, _Reader)  # a SafeLoader


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A recipe as plain data, not yet checked.

    Raises:
        DynamizeError: no such recipe, it cannot be read, or it is not YAML with keys.
    """
    file = find_recipe(path)
    try:
        plain = read_value(file.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        place = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise DynamizeError(f"{file}{place}: not YAML that can be used: {error.problem}. Correct that line.") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise DynamizeError(f"{file} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(plain, dict):
        raise DynamizeError(f"{file} holds no recipe: expected keys such as version, model, data and steps")
    return plain


def describe(file: Path) -> str:
    """The recipe's own description."""
    return str(read_recipe(file).get("description", ""))
