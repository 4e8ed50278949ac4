"""Files and folders that are written whole or not at all."""

import errno
import os
from pathlib import Path

import pytest

from dynamize import files
from dynamize.errors import DynamizeError
from dynamize.files import folder_at_once


def test_a_new_folder_that_cannot_be_placed_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, to: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(DynamizeError, match="No space left"), folder_at_once(tmp_path / "to") as new:
        (new / "one").touch()
    assert not list(tmp_path.iterdir())
