"""How the figures of three counters look beside each other."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from dynamize.cli.tables import table
from dynamize.report.cells import ABSENT, count

if TYPE_CHECKING:
    from dynamize.measure.counters import Count, Counts

_DEPTH = 2  # of the modules listed; --json lists all


def tables(found: "Counts") -> Iterator[RenderableType]:
    """MACs by module and by kind of operator, and what the others have no rule for."""
    yield Text("\nMACs by module", style="bold")
    yield _by_module(found)
    yield Text("\nMACs by operator", style="bold")
    yield _by_kind(found)
    for one in found.others:
        if one.unsupported:
            names = ", ".join(f"{name} ({calls})" for name, calls in one.unsupported.items())
            yield Text(f"{one.counter} has no rule for: {names}.", style="dim")


def doubts(found: "Counts") -> Iterator[RenderableType]:
    """Where the counters disagree, and why; nothing where they do not."""
    said = found.disagreements()
    if said:
        yield Text("\nOther counters", style="bold")
    yield from (Text(f"- {text}.") for text in said)


def _by_module(found: "Counts") -> Table:
    made = _table("module", found)
    for path in found.classes:
        depth = path.count(".") + 1 if path else 0
        macs = [sum(one.modules.get(path, {}).values()) for one in found.every]
        if depth <= _DEPTH and any(macs):
            name = f"{'  ' * depth}{path.rpartition('.')[2]}" if path else "the network"
            made.add_row(Text(name), *_cells(found, macs))
    return made


def _by_kind(found: "Counts") -> Table:
    made = _table("operator", found)
    for kind in dict.fromkeys(kind for one in found.every for kind in one.kinds):
        made.add_row(Text(kind), *_cells(found, [one.kinds.get(kind, 0.0) for one in found.every]))
    return made


def _table(title: str, found: "Counts") -> Table:
    return table((title, "left"), *((one.counter, "right") for one in found.every))


def _cells(found: "Counts", macs: list[float]) -> list[Text]:
    return [Text(_cell(one, value)) for one, value in zip(found.every, macs, strict=True)]


def _cell(one: "Count", macs: float) -> str:
    return ABSENT if one.failure else count(macs)
