"""Files that are written whole or not at all."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dynamize.errors import DynamizeError


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Write to the yielded name; it becomes ``path`` when the block ends, and vanishes when the block fails.

    Raises:
        DynamizeError: the folder cannot be written or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise DynamizeError(
            f"Cannot write {path} ({error.strerror or error}): nothing was changed there. Free some space, or name a "
            "folder that you may write to."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def folder_at_once(folder: Path) -> Iterator[Path]:
    """Fill the yielded new folder; it takes the place of ``folder``, and of all that lies there, when the block ends,
    and vanishes when the block fails.

    Raises:
        DynamizeError: it cannot be written or the disk is full.
    """
    target = Path(os.path.realpath(folder))
    new, old = (target.with_name(f".{target.name}.{uuid.uuid4().hex}.{kind}") for kind in ("tmp", "old"))
    try:
        new.mkdir(parents=True)
        yield new
        if target.exists():
            os.replace(target, old)
        try:
            os.replace(new, target)
        except OSError:
            if old.exists():
                os.replace(old, target)
            raise
    except OSError as error:
        raise DynamizeError(
            f"Cannot write {folder} ({error.strerror or error}): nothing was changed there. Free some space, or name a "
            "folder that you may write to."
        ) from error
    finally:
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json_lines(path: Path, rows: Sequence[Any]) -> None:
    """Write one JSON value a line, atomically."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
