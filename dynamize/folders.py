"""The folder of a run: whether it may be written, and emptying it of what an earlier run left, nothing else."""

import os
import shutil
from pathlib import Path

from dynamize.errors import DynamizeError

MANIFEST, WEIGHTS = "manifest.json", "weights.safetensors"
CODE = "code"  # with the files that define the user's own transforms
LEDGER, METRICS, STEPS, STATE = "ledger.json", "metrics.jsonl", "steps", "state.json"
REPORT_PAGE, REPORT_TEXT, REPORT_DATA = "report.html", "report.md", "report.json"
VERDICT = "expect.md"  # what the recipe expected and what came out, for a pull request
_FILES = (MANIFEST, WEIGHTS, LEDGER, METRICS, REPORT_PAGE, REPORT_TEXT, REPORT_DATA, VERDICT)


def check_folder(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder whose content a new run would destroy or mix with.

    Raises:
        DynamizeError: it holds another run and neither ``resume`` nor ``overwrite`` is given, or it holds
            something else.
    """
    if resume and overwrite:
        raise DynamizeError("resume goes on with a run and overwrite replaces it: give one of them")
    if out.exists() and not out.is_dir():
        raise DynamizeError(f"{out} is a file: give another folder with --out")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not holds_run(out):
        raise DynamizeError(
            f"{out} is not empty and holds no run of dynamize: give another folder with --out. Nothing was changed."
        )
    if not resume and not overwrite:
        raise DynamizeError(
            f"{out} already holds a run: add --resume to go on with it, --overwrite to replace it, or give another "
            "folder with --out (in Python: resume=True, overwrite=True, out=...). Nothing was changed."
        )


def holds_run(out: Path) -> bool:
    """Whether the folder is an artifact, or a run finished or not."""
    return (out / MANIFEST).is_file() or (out / LEDGER).is_file() or (out / STEPS / "0").is_dir()


def step_folders(out: Path) -> list[Path]:
    """``steps/0``, ``steps/1``, ... as far as a run has come."""
    found = [folder for folder in (out / STEPS).glob("*") if folder.name.isdecimal() and folder.is_dir()]
    return sorted(found, key=lambda folder: int(folder.name))


def code_files(out: Path) -> list[Path]:
    """What the artifact brings of the user's code."""
    return sorted((out / CODE).glob("*.py"))


def clear(out: Path) -> None:
    """Delete what a run wrote; files of other names stay. ``steps/0`` goes last: it marks the folder as a run."""
    for name in _FILES:
        (out / name).unlink(missing_ok=True)
    for file in code_files(out):
        file.unlink()
    for folder in reversed(step_folders(out)):
        shutil.rmtree(folder)
    for name in (CODE, STEPS):
        if (out / name).is_dir() and not os.listdir(out / name):
            (out / name).rmdir()


def check_space(out: Path, size: int) -> None:
    """Refuse a folder on a disk that is too full, or where none can be made.

    Args:
        size: bytes that will be written.

    Raises:
        DynamizeError: less is free, or something on the way there is a file or may not be written.
    """
    here = out.absolute()
    while not here.exists():
        here = here.parent
    if not here.is_dir():
        raise DynamizeError(f"{here} is a file, so {out} cannot lie in it: give another folder with --out")
    if not os.access(here, os.W_OK):
        raise DynamizeError(f"{here} may not be written to: give another folder with --out")
    free = shutil.disk_usage(here).free
    if free < size:
        raise DynamizeError(
            f"{out} needs about {size / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free there: free some space, or give "
            "another folder with --out"
        )
