"""What the reader must be told of each step: savings that the clock does not show, and costs that bought nothing."""

from collections.abc import Iterator

from dynamize.report.ledger import Ledger, Row

LEAST_SAVING = 0.02
"""Share of MACs or of the file below which a step is not said to change it: a head or a gate may do so by chance."""

LEAST_SHOWN = 0.5
"""Share of a MACs saving that the clock must show for the report to keep quiet about it."""

LEAST_TIME = 0.05
"""Share of the time below which a step is not said to cost or save any: timings vary by that much."""


def share_of_saving_shown(macs_ratio: float, speedup: float) -> float | None:
    """Part of the saved MACs that is saved time too: (1 - 1/speedup) / (1 - macs_ratio).

    1 means that time fell as MACs did, 0 that the clock shows nothing, below 0 that it got slower.
    None if no MACs were saved, for then there is nothing to show.
    """
    return None if macs_ratio >= 1 else (1 - 1 / speedup) / (1 - macs_ratio)


def verdicts(ledger: Ledger) -> list[str]:
    """A plain line for each step whose saving of MACs the clock does not show or that cost something and saved
    nothing, and for the run as a whole.

    A step is judged by what it changed since the row before it, its time since the one that was last timed on the same
    backend and batch. What it costs in time or size is forgiven if the run ends with a saving against the row before
    it: exits and gates save when they are calibrated. Accuracy is lost only below the 95 % interval of the row before,
    and if the run does not end inside it.
    """
    lines = []
    for index, row in enumerate(ledger.rows[1:], start=1):
        told = [*_step_verdicts(ledger, index), *_unpaid(ledger, index)]
        lines += [f"Step {row.step}, {row.transform}: {line}." for line in told]
    if len(ledger.rows) > 2:
        first, last = ledger.rows[0], ledger.rows[-1]
        whole = list(_hidden_savings(last, [(first, *key) for key in _timed(last)]))
        if not _saves(last, [first]) and (costs := [*_accuracy_lost(first, last), *_time_and_size(last, [first])]):
            whole.append(f"{' and '.join(costs)}, and {_saves_nothing(last)}")
        lines += [f"All steps together: {line}." for line in whole]
    return lines


def _step_verdicts(ledger: Ledger, index: int) -> Iterator[str]:
    row, before = ledger.rows[index], ledger.rows[:index]
    saved = 1 - row.macs / before[-1].macs if before[-1].macs else 0.0
    if saved < LEAST_SAVING:
        return
    if not _timed(row):
        yield f"saves {100 * saved:.0f} % of MACs, but its time was not measured"
        return
    yield from _hidden_savings(row, [(_last_timed(before, *key), *key) for key in _timed(row)])


def _unpaid(ledger: Ledger, index: int) -> Iterator[str]:
    """What a step costs, if it saves nothing by itself and the run does not make up for it."""
    row, before, last = ledger.rows[index], ledger.rows[:index], ledger.rows[-1]
    if _saves(row, before):
        return
    paid_later = _saves(last, before)
    costs = []
    if last.accuracy < before[-1].accuracy_ci[0]:
        costs += _accuracy_lost(before[-1], row)
    if not paid_later:
        costs += _time_and_size(row, before)
    if costs:
        yield f"{' and '.join(costs)}, and {_saves_nothing(row)}{' by itself' if paid_later else ''}"


def _saves(row: Row, before: list[Row]) -> bool:
    """Whether MACs, time or size are noticeably less than before."""
    base = before[-1]
    fewer = bool(base.macs) and row.macs <= (1 - LEAST_SAVING) * base.macs
    smaller = bool(base.size and row.size) and _growth(base, row) <= -LEAST_SAVING
    return fewer or smaller or any(1 - 1 / gain >= LEAST_TIME for _, _, gain in _gains(row, before))


def _saves_nothing(row: Row) -> str:
    """Only what was measured is said not to be saved."""
    *known, last = ["MACs", *(["time"] if row.speedup else []), *(["size"] if row.size else [])]
    return f"saves neither {', '.join(known)} nor {last}" if known else f"saves no {last}"


def _accuracy_lost(base: Row, row: Row) -> list[str]:
    lost = base.accuracy - row.accuracy
    return [f"loses {100 * lost:.2f} points of accuracy"] if row.accuracy < base.accuracy_ci[0] else []


def _time_and_size(row: Row, before: list[Row]) -> Iterator[str]:
    slower: dict[str, list[str]] = {}
    for backend, batch, gain in _gains(row, before):
        if 1 / gain - 1 >= LEAST_TIME:
            slower.setdefault(backend, []).append(f"{100 * (1 / gain - 1):.0f} % slower at batch {batch}")
    for backend, parts in slower.items():
        yield f"is {' and '.join(parts)} in {backend}"
    growth = _growth(before[-1], row)
    if growth >= LEAST_SAVING:
        yield f"is {100 * growth:.0f} % larger on disk"


def _growth(base: Row, row: Row) -> float:
    return row.size / base.size - 1 if base.size and row.size else 0.0


def _gains(row: Row, before: list[Row]) -> Iterator[tuple[str, str, float]]:
    """Backend, batch, and how many times faster than the row that was timed there last."""
    for backend, batch in _timed(row):
        yield backend, batch, _gain(row, _last_timed(before, backend, batch), backend, batch)


def _gain(row: Row, base: Row, backend: str, batch: str) -> float:
    return row.speedup[backend][batch] / base.speedup.get(backend, {}).get(batch, 1.0)


def _last_timed(before: list[Row], backend: str, batch: str) -> Row:
    """The first row is what all others were timed against."""
    timed = [earlier for earlier in before if batch in earlier.speedup.get(backend, {})]
    return timed[-1] if timed else before[0]


def _timed(row: Row) -> list[tuple[str, str]]:
    return [(backend, batch) for backend, ratios in row.speedup.items() for batch in sorted(ratios, key=int)]


def _hidden_savings(row: Row, bases: list[tuple[Row, str, str]]) -> Iterator[str]:
    """One line for each backend on which a saving against the base row is mostly not seen."""
    hidden: dict[tuple[str, str], list[str]] = {}
    for base, backend, batch in bases:
        ratio = row.macs / base.macs if base.macs else 1.0
        gain = _gain(row, base, backend, batch)
        shown = share_of_saving_shown(ratio, gain)
        if 1 - ratio >= LEAST_SAVING and shown is not None and shown < LEAST_SHOWN:
            saving = f"{100 * (1 - ratio):.0f} %"
            hidden.setdefault((backend, saving), []).append(f"{_time_change(gain)} at batch {batch}")
    for (backend, saving), parts in hidden.items():
        yield f"saves {saving} of MACs but {' and '.join(parts)} in {backend}"


def _time_change(speedup: float) -> str:
    percent = 100 * (1 - 1 / speedup)
    if percent <= -0.5:
        return f"is {-percent:.0f} % slower"
    return "none of the time" if percent < 0.5 else f"{percent:.0f} % of the time"
