"""What is made from the classes that read a recipe: the schema for editors, and the page of every field."""

import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As they would be written now; in a process of its own, where no test has registered transforms."""
    folder = tmp_path_factory.mktemp("docs")
    subprocess.run([sys.executable, str(DOCS / "recipe_fields.py"), str(folder)], check=True)
    return folder


@pytest.mark.parametrize("name", ["recipe.schema.json", "recipes.md"])
def test_pages_are_current(name: str, made: Path) -> None:
    assert (DOCS / name).read_text() == (made / name).read_text(), "run: python docs/recipe_fields.py"
