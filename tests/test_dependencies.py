"""What dynamize imports, `pip install dynamize` installs."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FOLDERS = [ROOT / name for name in ("dynamize", "cli", "recipes", "transforms")]
FILES = sorted({file.resolve() for folder in FOLDERS for file in folder.rglob("*.py")})
DISTRIBUTIONS = packages_distributions()


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def named(requirements: list[str]) -> set[str]:
    return {normal(re.split(r"[^\w.-]", one)[0]) for one in requirements}


ALWAYS = named(PROJECT["dependencies"])
ON_REQUEST = {
    name for extra, many in PROJECT["optional-dependencies"].items() if extra != "dev" for name in named(many)
}


def test_every_folder_of_code_is_in_the_wheel() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    elsewhere = {place: name for name, place in setup["package-dir"].items()}
    holding = {file.parent.relative_to(ROOT).as_posix() for file in FILES}
    assert {elsewhere.get(place, place.replace("/", ".")) for place in holding} == set(setup["packages"])


def test_what_the_owner_named_comes_with_a_plain_install() -> None:
    assert {"torch", "torchvision", "torch-pruning", "neural-compressor", "fvcore", "thop", "rich", "typer"} <= ALWAYS
    assert not {"prune", "quantize"} & set(PROJECT["optional-dependencies"])


def imports(node: ast.AST, later: bool = False) -> Iterator[tuple[str, bool]]:
    """Top-level names of what is imported, and whether only when a function is called."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name.split(".")[0], later) for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module and not child.level:
            yield child.module.split(".")[0], later
        elif isinstance(child, ast.Call) and re.fullmatch(r"(importlib\.)?import_module\('.*'\)", ast.unparse(child)):
            yield ast.literal_eval(child.args[0]).split(".")[0], later
        yield from imports(child, later or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_are_declared(file: Path) -> None:
    undeclared = []
    for name, later in imports(ast.parse(file.read_text())):
        if name == "dynamize" or name in sys.stdlib_module_names:
            continue
        packages = {normal(one) for one in DISTRIBUTIONS.get(name, [name])}
        if not packages & (ALWAYS | ON_REQUEST if later else ALWAYS):
            undeclared.append(name)
    assert not undeclared, f"pyproject.toml does not declare {undeclared}"
