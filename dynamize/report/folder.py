"""A report read back from the folder of a run, also of one that was stopped; nothing is measured again."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dynamize.errors import DynamizeError
from dynamize.folders import LEDGER, MANIFEST, METRICS, REPORT_DATA, STATE, step_folders
from dynamize.report.data import ReportData
from dynamize.report.ledger import Ledger, Row

OF_OTHER_FILES = {"ledger", "operating_points", "selected", "metrics", "folder"}
"""Fields of a report that other files hold, or the folder itself, so that report.json leaves them out."""


def read_report(out: str | Path) -> ReportData:
    """What ``dynamize run`` found out, from the files it left in ``out``.

    Raises `DynamizeError` if the folder holds no run or one of its files is damaged.
    """
    out = Path(out)
    manifest = _json(out / MANIFEST) if (out / MANIFEST).is_file() else {}
    try:
        return _assemble(out, manifest)
    except (ValidationError, AttributeError, KeyError, TypeError) as error:
        raise DynamizeError(
            f"the files in {out} do not fit together or are of another version: {str(error).splitlines()[0]}. "
            "Run the recipe again with --resume."
        ) from error


def _assemble(out: Path, manifest: dict[str, Any]) -> ReportData:
    about = manifest.get("about") or {}
    header = Ledger(**(about.get("ledger") or {"title": str(out)})).model_dump(exclude={"rows"})
    chosen = manifest.get("operating_point") or {}
    extras = _json(out / REPORT_DATA) if (out / REPORT_DATA).is_file() else {}
    if (out / LEDGER).is_file():
        ledger = Ledger.read(out / LEDGER, **header)
    else:
        ledger, extras = Ledger(rows=_finished_rows(out), **header), {}
        extras["notes"] = [f"the run is not finished: {len(ledger.rows) - 1} steps are done, --resume goes on"]
    if about.get("recalibrated"):
        extras |= {"standings": []}  # they are the operating points of the run
        extras["notes"] = ["the operating points were solved again after the run; the rows show it as it ended"]
    points = manifest.get("operating_points") or []
    metrics = _lines(out / METRICS) if (out / METRICS).is_file() else []
    return ReportData(
        ledger=ledger,
        operating_points=points,
        selected=chosen.get("name"),
        metrics=metrics,
        folder=str(out),
        **extras,
    )


def _finished_rows(out: Path) -> list[Row]:
    states = [folder / STATE for folder in step_folders(out)]
    rows = [Row.model_validate(_json(state)["row"]) for state in states if state.is_file()]
    if not rows:
        raise DynamizeError(f"{out} holds no run: name the folder that `dynamize run --out` wrote")
    return rows


def _lines(file: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise DynamizeError(f"{file} is damaged: {error}. Run the recipe again with --resume.") from error


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DynamizeError(f"{file} is damaged: {error}. Run the recipe again with --resume.") from error
    if not isinstance(found, dict):
        raise DynamizeError(f"{file} is damaged: it holds a {type(found).__name__}. Run the recipe again.")
    return found
