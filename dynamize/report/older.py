"""What earlier versions wrote of a run, in today's form; anything else is handed on as it is."""

from typing import Any


def row(given: Any) -> Any:
    """A row of the ledger: of decisions it knew the share of the images that left at each exit."""
    exits = given.get("exits") if isinstance(given, dict) else None
    if not isinstance(exits, list) or "decisions" in given or not all(isinstance(one, int | float) for one in exits):
        return given
    leaving = [f"exit.{number}" for number in range(1, len(exits))]
    decisions = {name: [exits[k], round(sum(exits[k + 1 :]), 9)] for k, name in enumerate(leaving)}
    rest = {name: value for name, value in given.items() if name != "exits"}
    return {**rest, "decisions": decisions, "leaving": leaving}


_GONE = ("gates", "usage", "gallery", "static", "rivals", "latency_label")  # known for one operating point only


def report(given: Any) -> Any:
    """A report: it showed one operating point, timed apart from the others, and of these what calibration expects."""
    if not isinstance(given, dict) or not any(name in given for name in _GONE):
        return given
    answerers = [
        {name: value for name, value in one.items() if name not in ("share", "right")}
        for one in given.get("answerers", [])
    ]
    marks = {
        kind: [{name: mark[name] for name in ("name", "macs", "accuracy")} for mark in given.get(kind, [])]
        for kind in ("anytime", "budgeted")
    }
    told = "an earlier version made this run: --resume measures all operating points and fills the page"
    kept = {name: value for name, value in given.items() if name not in _GONE}
    return {**kept, **marks, "answerers": answerers, "notes": [*given.get("notes", []), told]}
