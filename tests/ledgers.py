"""Quick settings for runs inside tests, rows of a ledger, and ledgers without what differs between two equal runs."""

import json
from pathlib import Path
from typing import Any

TINY = [
    "--set=steps.1.epochs=2",
    "--set=steps.2.max_drop=5",
    "--set=steps.2.points=3",
    "--set=timing_seconds=0.01",
    "--set=batches=[32]",
    "--set=expect={}",
]


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a ledger less latency, speed-up, seconds and the warning that timing was disturbed."""
    timeless = []
    for row in rows:
        kept = {key: value for key, value in row.items() if key not in ("latency", "speedup", "seconds")}
        kept["notes"] = [note for note in row["notes"] if "while latency was measured" not in note]
        timeless.append(kept)
    return timeless


def ledger_of(out: Path) -> list[dict[str, Any]]:
    """The timeless rows of a finished run."""
    return without_times(json.loads((out / "ledger.json").read_text()))


def leaving(*shares: float) -> dict[str, object]:
    """Fields of a row of which these shares of the images leave at its exits."""
    names = [f"exit.{number}" for number in range(1, len(shares) + 1)]
    decisions = {name: [shares[k], 1 - sum(shares[: k + 1])] for k, name in enumerate(names)}
    return {"decisions": decisions, "leaving": names}
