"""What docs/ says of every field of a recipe, made from the classes that read it.

python docs/recipe_fields.py            # writes docs/recipe.schema.json, and docs/recipes.md below its mark
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dynamize.cli.fields import default, typed
from dynamize.files import write_text
from dynamize.recipe import schema
from dynamize.report.markdown import plain

HERE = Path(__file__).parent
MARK = "<!-- Below: python docs/recipe_fields.py -->\n"
SECTIONS = {  # of the file, in this order: titles by the names of their classes
    "ModelSection": "`model`",
    "DataSpec": "`data`",
    "Member": "A network of `compare`, or of a cascade",
    "Checkpoint": "`checkpoint`, where a file holds several",
    "Expect": "`expect`",
    "Bound": "A bound",
}


def main(folder: str = str(HERE)) -> None:
    found, page = schema(), (HERE / "recipes.md").read_text(encoding="utf-8")
    write_text(Path(folder) / "recipe.schema.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    written_by_hand = page.partition(MARK)[0]
    write_text(Path(folder) / "recipes.md", written_by_hand + MARK + "\n" + "\n".join(fields(found)) + "\n")


def fields(found: dict[str, Any]) -> Iterator[str]:
    """A table for the file, its sections, and each step."""
    classes = found["$defs"]
    steps = {name: section for name, section in classes.items() if "pass" in section["properties"]}
    yield from section("## Every field of a recipe", found)
    for name, title in SECTIONS.items():
        yield from section(f"## {title} ({name})", classes[name])
    yield "## Steps\n"
    for step in sorted(steps.values(), key=lambda one: one["properties"]["pass"]["const"]):
        yield from section(f"### `{step['properties']['pass']['const']}`", step)
    for name in sorted(classes.keys() - SECTIONS.keys() - steps.keys()):
        yield from section(f"### What `{name}` is in fields above", classes[name])


def section(title: str, facts: dict[str, Any]) -> Iterator[str]:
    yield title + "\n"
    prose = re.sub(":[a-z]+:`", "`", facts.get("description", "")).replace("``", "`").replace("<", "&lt;")
    for paragraph in prose.split("\n\n"):
        yield " ".join(paragraph.split()) + "\n"
    yield "| field | type | default | |\n|---|---|---|---|"
    for name, one in facts["properties"].items():
        if name not in ("pass", "version") or facts.get("title") == "Recipe":
            told = plain(one.get("description", ""))
            yield f"| `{name}` | {plain(typed(one))} | {code(default(name, facts))} | {told} |"
    yield ""


def code(value: str) -> str:
    return f"`{value}`" if value not in ("", "required") else value


if __name__ == "__main__":
    main(*sys.argv[1:])
