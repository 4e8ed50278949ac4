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


def report(given: Any) -> Any:
    """A report: it knew gates only, and of their paths the width."""
    if not isinstance(given, dict) or "gates" not in given:
        return given
    rest = {name: value for name, value in given.items() if name != "gates"}
    return {"usage": _usage(given["gates"]), **rest}


def _usage(gates: dict[str, Any] | None) -> dict[str, Any] | None:
    if gates is None:
        return None
    decisions = [_decision(unit) for unit in gates["units"]]
    return {"decisions": decisions, "images": gates["images"], "routings": gates["routings"]}


def _decision(unit: dict[str, Any]) -> dict[str, Any]:
    paths = unit["paths"]
    options = [{"label": _label(path["width"]), "macs": path["macs"], "share": path["share"]} for path in paths]
    kind = "channels" if paths[0]["width"] else "skip"
    return {"name": unit["label"], "kind": kind, "effect": "changes", "options": options}


def _label(width: float) -> str:
    return {0.0: "skipped", 1.0: "whole"}.get(width, f"{100 * width:.0f} % wide")
