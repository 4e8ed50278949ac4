"""What README and docs show: their blocks of code, and the lines of those that are typed into a shell."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, kind: str) -> list[str]:
    """The fenced blocks of a kind, such as ``bash``."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == kind]


def commands(page: Path) -> list[str]:
    """Every command, on one line and without its comment."""
    lines = "".join(blocks(page, "bash") + blocks(page, "console")).replace("\\\n", " ").splitlines()
    typed = [re.sub(r"\s+#\s.*", "", line.removeprefix("$ ")) for line in lines]
    return [" ".join(line.split()) for line in typed if line.strip()]


def words(line: str) -> list[str]:
    """A command as a shell splits it."""
    return shlex.split(line)
