"""How results look in a terminal of 80 columns: trees and tables, no figures of their own."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from dynamize.report.cells import ABSENT, count, point_columns, shares, three_digits

if TYPE_CHECKING:
    from dynamize.calibration.operating import OperatingPoint
    from dynamize.graph.gateable import GateableBlock
    from dynamize.graph.tree import Block, NetworkTree, Stage
    from dynamize.report.cells import Column
    from dynamize.verbs.bench import Benchmark, Comparison
    from dynamize.verbs.inspect import DecisionFacts, Inspection
    from dynamize.verbs.predict import Prediction

_ALL = -1e300  # a threshold below which no score lies
_NAME_WIDTH = 34  # with the tree's own lines and the figures: 80 columns


def table(*columns: tuple[str, str]) -> Table:
    """An empty table from (title, justification) pairs."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for title, justify in columns:
        made.add_column(Text(title), justify=justify, overflow="fold")  # type: ignore[arg-type]
    return made


def inspection(found: "Inspection") -> Group:
    """The tree of a network; for an artifact also its steps, exits and operating points."""
    parts: list[RenderableType] = [network(found.tree, found.source)]
    if found.gates:
        parts += [Text("\nGates possible", style="bold"), _gates_possible(found.gates)]
        parts.append(Text("channels: hidden ones that `channel_gates` can split; skip: for `skip_gates`.", style="dim"))
    if found.history:
        parts += [Text("\nSteps", style="bold"), *(Text(_step(step)) for step in found.history)]
    exits = [one for one in found.decisions if one.effect == "leaves"]
    gates = [one for one in found.decisions if one.effect == "changes"]
    if exits:
        parts += [heading([one.kind for one in exits]), _exits(exits, found)]
        parts += [Text("MACs to leave: with all gates open.", style="dim")] if gates else []
    if gates:
        parts += [Text("\nGates", style="bold"), _gates(gates)]
    if found.operating_points is not None:
        parts += [Text("\nOperating points", style="bold"), _points(list(found.operating_points))]
        where = "none of them: all exits are off" + (", gates decide as trained" if gates else "")
        parts.append(Text(f"It stands at {found.operating_point or where}.", style="dim"))
    return Group(*parts)


def network(tree: "NetworkTree", source: str) -> Group:
    """Stages of one resolution, in them the blocks that end in cut points."""
    shape = _shape(tree.input_shape)
    cuts = sum(block.cut is not None for block in tree.blocks)
    head = f"{source}  {shape}  {count(tree.macs)} MACs  {count(tree.params)} parameters  {cuts} cut points"
    width = min(_NAME_WIDTH, max([10, *(len(block.cut or "") for block in tree.blocks)]))
    drawn = Tree(Text(head, style="bold"), guide_style="dim")
    for number, stage in enumerate(tree.stages, start=1):
        branch = drawn.add(_stage(stage, number, tree.macs, width))
        for block in stage.blocks:
            branch.add(_block(block, tree.macs, width))
    legend = "Each block ends in a cut point, which takes an exit."
    columns = "Columns: shape (C x H x W), MACs, their share, parameters."
    return Group(drawn, Text(f"{legend} {columns}", style="dim"))


def _stage(stage: "Stage", number: int, total: float, width: int) -> Text:
    if stage.blocks[-1].cut is None:
        return Text(f"{'answer':<{width + 4}} {_figures(stage, total)}", style="cyan")
    blocks = f"stage {number}, {len(stage.blocks)} block{'s' if len(stage.blocks) > 1 else ''}"
    return Text(f"{blocks:<{width + 4}} {_figures(stage, total)}", style="cyan")


def _block(block: "Block", total: float, width: int) -> Text:
    name = block.cut or "classifier"
    return Text(f"{name:<{width}} {_figures(block, total)}")


def _figures(part: "Stage | Block", total: float) -> str:
    share = f"{100 * part.macs / total:.1f}%" if total else ABSENT
    return f"{_shape(part.shape):>11} {count(part.macs):>6} {share:>6} {count(part.params):>6}"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _gates_possible(blocks: "Sequence[GateableBlock]") -> Table:
    """A row for each run of blocks of which the same can be said."""
    made = table(("blocks", "left"), ("", "right"), ("skip", "left"), ("channels", "left"))
    modules = [block.module or block.block for block in blocks]
    for (skip, channels), group in groupby(blocks, key=lambda block: (_skip(block), _channels(block))):
        same = list(group)
        ends = [one.module if modules.count(one.module) == 1 else one.block for one in (same[0], same[-1])]
        made.add_row(*map(Text, [" to ".join(dict.fromkeys(ends)), str(len(same)), skip, channels]))
    return made


def _skip(block: "GateableBlock") -> str:
    if block.why_not is not None:
        return f"no: {block.why_not}"
    if not block.bypass_macs:
        return "yes"
    return f"yes, but its shortcut runs: {100 * block.bypass_macs / block.macs:.0f} % of it"


def _channels(block: "GateableBlock") -> str:
    """Widths of its chains, neighbours of one width together: 64, 2 x 128."""
    groups = [(width, len(list(same))) for width, same in groupby(chain.channels for chain in block.chains)]
    return ", ".join(str(width) if many == 1 else f"{many} x {width}" for width, many in groups) or ABSENT


def _gates(gates: "Sequence[DecisionFacts]") -> Table:
    """Each gate with the paths that it chooses from."""
    made = table(("block", "left"), ("MACs on each path", "left"), ("gate MACs", "right"))
    for one in gates:
        paths = ", ".join(f"{option.label} {count(option.macs)}" for option in one.options)
        made.add_row(*map(Text, [one.name, paths, count(one.always)]))
    return made


def _step(step: dict[str, Any]) -> str:
    fields = {name: value for name, value in step.items() if name not in ("pass", "version")}
    return f"  {step['pass']}  {_listed(fields)}"


def _listed(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {_plain(value)}" for name, value in fields.items() if _says_something(value))


def _plain(value: Any) -> str:
    """A value of a step as a recipe has it, without fields that say nothing."""
    if isinstance(value, Mapping):
        return f"{{{_listed(value)}}}"
    return f"[{', '.join(map(_plain, value))}]" if isinstance(value, list) else str(value)


def _says_something(value: Any) -> bool:
    return value is not None and value != {}


def heading(kinds: Sequence[str]) -> Text:
    """Above a table of places where images leave: `Exits` or `Members`, as they call themselves."""
    names = " and ".join(f"{kind}s" for kind in dict.fromkeys(kinds))
    return Text(f"\n{names.capitalize()}", style="bold")


def _exits(exits: "Sequence[DecisionFacts]", found: "Inspection") -> Table:
    made = table(("", "left"), ("after", "left"), ("head MACs", "right"), ("MACs to leave", "right"))
    made.add_column("ratio", justify="right")
    made.add_column("threshold", justify="right")
    rows = [(one.name, one.after, count(one.always), one.macs_to_leave, _threshold(one.threshold)) for one in exits]
    rows.append(("last", "the network's own", ABSENT, found.macs_to_end, ABSENT))
    for name, after, head, macs, threshold in rows:
        assert macs is not None  # known of every place where images leave
        made.add_row(*map(Text, [name, after, head, count(macs), f"{macs / found.tree.macs:.2f}", threshold]))
    return made


def _threshold(score: float | None) -> str:
    return "off" if score is None else f"{score:.4g}" if score > _ALL else "all leave"


def _points(points: "Sequence[OperatingPoint]") -> Table:
    columns = point_columns(points)
    made = table(*((column.title, "right" if column.right else "left") for column in columns))
    for row in zip(*(column.cells for column in columns), strict=True):
        made.add_row(*map(Text, row))
    return made


def benchmark(found: "Benchmark") -> Group:
    """Times per call and per image, speed-up, and how much of the saving in MACs the clock shows."""
    point = f" at {found.operating_point}" if found.operating_point else ""
    exits = f", exits {shares(found.exits)} %" if len(found.exits) > 1 else ""
    head = Text(f"{found.source}{point}: {found.macs_ratio:.3f} of the MACs{exits}", style="bold")
    parts: list[RenderableType] = [head]
    for backend in dict.fromkeys(one.backend for one in found.comparisons):
        parts += [Text(f"\n{backend}"), _times([one for one in found.comparisons if one.backend == backend])]
    legend = (
        "ms: median per call, timed in turns in one process. x: speed-up. saving shown: share of the saved MACs that "
        f"is saved time too. {found.device}, {found.threads} threads ({found.sessions}), {found.images} test images."
    )
    warnings = [Text(f"! {text}", style="yellow") for text in found.warnings]
    return Group(*parts, Text("\n" + legend, style="dim"), *warnings)


def _times(comparisons: "Sequence[Comparison]") -> Table:
    titles = ("batch", "static\nms", "p95", "dynamic\nms", "p95", "static\nms/image", "dynamic\nms/image", "x")
    made = table(*((title, "right") for title in (*titles, "saving\nshown")))
    for one in comparisons:
        times = [one.static_median_ms, one.static_p95_ms, one.dynamic_median_ms, one.dynamic_p95_ms]
        times += [one.static_ms_per_image, one.dynamic_ms_per_image]
        shown = ABSENT if one.saving_shown is None else f"{100 * one.saving_shown:.0f} %"
        made.add_row(*map(Text, [str(one.batch), *map(_milliseconds, times), f"{one.speedup:.2f}", shown]))
    return made


def _milliseconds(value: float) -> str:
    return three_digits(value) if value >= 0.0995 else f"{value:.4f}"


def predictions(found: Sequence["Prediction"]) -> Table:
    """A row for each image that could be read."""
    made = table(("file", "left"), ("class", "left"), ("conf.", "right"), ("answered by", "left"), ("MACs", "right"))
    for one in found:
        if one.confidence is None or one.macs is None:
            continue
        by = f"{one.by}{', cut' if one.cut else ''}"
        cells = [one.file, str(one.answer), f"{one.confidence:.3f}", by, count(one.macs)]
        made.add_row(*map(Text, cells))
    return made


def columns(found: "Sequence[Column]") -> Table:
    """A report's columns."""
    made = table(*((column.title, "right" if column.right else "left") for column in found))
    for row in zip(*(column.cells for column in found), strict=True):
        made.add_row(*map(Text, row))
    return made


def point(found: "OperatingPoint") -> Table:
    """One operating point as a table of one row."""
    return _points([found])


def named(found: dict[str, str], what: str) -> Table:
    """Names with a sentence each."""
    made = table((what, "left"), ("", "left"))
    for name, text in found.items():
        made.add_row(Text(name), Text(text))
    return made
