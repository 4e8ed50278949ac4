"""What a page shows of one operating point: everything that its slider moves, in words and as cells."""

import shlex
from dataclasses import dataclass, field
from typing import Any

from dynamize.report import cells
from dynamize.report.cells import Column
from dynamize.report.data import ReportData
from dynamize.report.drawing import Drawing, draw
from dynamize.report.standing import Classes, DecisionUse, Gallery, Standing

_GREY = 1 / 8  # cost of an option, as a share of the dearest one's, up to which it has no blue
_DARK = 0.9  # from which its blue takes white text
FEW_CLASSES = 12  # up to which a whole matrix is shown; of more, so many classes and pairs


@dataclass(frozen=True)
class Card:
    """A figure with what is to be said beside it."""

    title: str
    value: str
    notes: list[str]


@dataclass(frozen=True)
class Answering:
    """A place where images are answered: the condition in words, the share of the images, and of these rightly."""

    name: str
    condition: str
    share: float
    right: float | None


@dataclass(frozen=True)
class ByClass:
    """Accuracy on one class, of the static network and of this one, as shares."""

    name: str
    images: int
    static: float | None
    dynamic: float | None

    @property
    def change(self) -> float:
        """What is gained."""
        return 0.0 if self.static is None or self.dynamic is None else self.dynamic - self.static


@dataclass(frozen=True)
class Moving:
    """One operating point on the page."""

    name: str
    cards: list[Card]
    short: str
    answering: list[Answering] = field(default_factory=list)
    table: list[Column] = field(default_factory=list)
    drawing: Drawing | None = None
    gates: dict[str, Any] | None = None
    gallery: list[Gallery] = field(default_factory=list)
    by_class: list[ByClass] = field(default_factory=list)
    matrix: list[list[int]] = field(default_factory=list)
    confused: list[tuple[str, str, int, str]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)


def moving(report: ReportData) -> list[Moving]:
    """All operating points, the cheapest first."""
    return [_one(report, standing) for standing in report.stands]


def _one(report: ReportData, standing: Standing) -> Moving:
    names = report.exit_names()
    measured = bool(standing.reached)
    uses = [standing.use(place) for place in report.changing] if measured else []
    return Moving(
        name=standing.point,
        cards=_cards(report, standing),
        short=_short(report, standing),
        answering=_answering(standing, names) if len(names) > 1 else [],
        table=cells.answerer_columns(report, standing) if report.answerers and standing.right else [],
        drawing=draw(report.sections, standing, names) if measured and report.places else None,
        gates=_gates(uses, cells.routings(report, standing)) if uses else None,
        gallery=standing.gallery,
        by_class=_by_class(report, standing.classes),
        matrix=matrix(standing.classes),
        confused=_confused(report, standing.classes),
        commands=_commands(report, standing.point),
    )


def _cards(report: ReportData, standing: Standing) -> list[Card]:
    low, high = (f"{100 * end:.1f}" for end in standing.accuracy_ci)
    lost = cells.drop(standing.accuracy_drop).lstrip("+-")
    side = "below" if standing.accuracy_drop > 0 else "above"
    against = "as the static network" if lost == "0.00" else f"{lost} points {side} the static network"
    notes = [against, f"95 %: {low} to {high} on test images"]
    if (point := report.expected(standing.point)) is not None:
        what = "agreement" if point.labels == "none" else "expected"
        notes.append(f"{what} from calibration images: {100 * point.accuracy:.1f} %")
    first = report.ledger.rows[0]
    found = [
        Card("Accuracy", f"{cells.percent(standing.accuracy)} %", notes),
        Card(
            "MACs per image",
            cells.count(standing.macs),
            [f"{100 * standing.macs_ratio:.0f} % of the static {cells.count(first.macs)}"],
        ),
    ]
    for backend in report.ledger.backends()[:1]:
        for batch in report.ledger.batches(backend):
            gain, static = cells.speedup(standing, backend, batch), cells.latency(first, backend, batch)
            told = (
                [f"static: {static} ms"]
                if gain == cells.ABSENT
                else [f"{gain}x the speed of the static network: {static} ms"]
            )
            value = cells.latency(standing, backend, batch)
            shown = "not measured" if value == cells.ABSENT else f"{value} ms"
            found.append(Card("One image" if batch == "1" else f"{batch} images together", shown, [*told, backend]))
    if not report.ledger.backends():
        found.append(Card("Time", "not measured", []))
    return found


def _short(report: ReportData, standing: Standing) -> str:
    """The figures in one line, beside the slider."""
    parts = [f"{cells.percent(standing.accuracy)} %", f"{cells.count(standing.macs)} MACs"]
    for backend in report.ledger.backends()[:1]:
        for batch in report.ledger.batches(backend):
            gain = cells.speedup(standing, backend, batch)
            parts += [] if gain == cells.ABSENT else [f"{gain}x at batch {batch}"]
    return " · ".join(parts)


def _answering(standing: Standing, names: list[str]) -> list[Answering]:
    shares = standing.exits or [*[0.0] * (len(names) - 1), 1.0]
    words = [*(standing.words.get(name, "") for name in standing.leaving), "all that are left"]
    rights = standing.right or [None] * len(names)
    every = zip(names, words, shares, rights, strict=False)
    return [Answering(*one) for one in every]


def _gates(uses: list[DecisionUse], routings: str) -> dict[str, Any]:
    """The bars of the gated units: pieces of (name, share, class, colour)."""
    costs = cells.option_names(uses)
    kinds = [(name, "path", shade(cost)) for name, cost in costs.items()]
    if any(use.left for use in uses):
        kinds.append((cells.LEFT, "gone", ""))
    units = [{"use": use, "pieces": _pieces(use, uses, costs)} for use in uses]
    return {"units": units, "kinds": kinds, "routings": routings}


def _pieces(use: DecisionUse, uses: list[DecisionUse], costs: dict[str, float]) -> list[tuple[str, float, str, str]]:
    """Each under the label of its own option, coloured as the options beside it."""
    pieces = []
    for name, option in zip(cells.names_of(use, uses), use.options, strict=True):
        look = "path pale" if costs[name] < _DARK else "path"
        pieces.append((option.label, option.share, look, shade(costs[name])))
    return [*pieces, (cells.LEFT, use.left, "gone pale", "")]


def shade(cost: float) -> str:
    """The dearer the option the darker its blue; the page's own grey for what costs little or nothing."""
    return f"hsl(225 {45 + 20 * cost:.0f}% {84 - 36 * cost:.0f}%)" if cost > _GREY else ""


def matrix(classes: Classes | None) -> list[list[int]]:
    """Test images by class (rows) and answer; empty where there are many classes."""
    if classes is None or len(classes.count) > FEW_CLASSES:
        return []
    found = [[0] * len(classes.count) for _ in classes.count]
    for label, right in enumerate(classes.right):
        found[label][label] = right
    for label, answer, images in classes.confused:
        found[label][answer] = images
    return found


def _by_class(report: ReportData, classes: Classes | None) -> list[ByClass]:
    """All classes, or those whose accuracy changes most where there are many."""
    static = report.classes
    if classes is None or static is None:
        return []
    every = [
        ByClass(report.class_name(label), count, static.accuracy(label), classes.accuracy(label))
        for label, count in enumerate(classes.count)
    ]
    return every if len(every) <= FEW_CLASSES else sorted(every, key=lambda one: -abs(one.change))[:FEW_CLASSES]


def _confused(report: ReportData, classes: Classes | None) -> list[tuple[str, str, int, str]]:
    """Where there are many classes, the pairs most often confused: class, answer, images here, and as text of the
    static network, of whose pairs not all are known."""
    if classes is None or report.classes is None or len(classes.count) <= FEW_CLASSES:
        return []
    static = {(label, answer): str(images) for label, answer, images in report.classes.confused}
    rarer = "0" if report.classes.complete else f"≤ {report.classes.confused[-1][2]}"
    return [
        (report.class_name(label), report.class_name(answer), images, static.get((label, answer), rarer))
        for label, answer, images in classes.confused[:FEW_CLASSES]
    ]


def _commands(report: ReportData, point: str) -> list[str]:
    """How to use the artifact at a point, on the command line and in Python."""
    if report.expected(point) is None or not report.folder:
        return []
    folder, name = shlex.quote(report.folder), shlex.quote(point)
    python = f"network = dz.load({report.folder!r}); network.set_operating_point({point!r})"
    return [f"dynamize predict {folder} IMAGES --point {name}", f"dynamize bench {folder} --point {name}", python]
