"""The network as a river of images: its pieces stand in a row, each as wide as what it costs and as high as the share
of the images that it runs for, so that the coloured area is what was executed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from dynamize.report.standing import Section, Standing

_HEIGHT = 96.0  # pixels of a river of all images
_LINE = 19.0  # pixels between two labels below it
_GAP = 1.2  # per cent of the width between two networks
_LEAST = 0.35  # per cent of the width of what costs nothing, where images leave


@dataclass(frozen=True)
class Block:
    """A rectangle: `x` and `width` in per cent of the drawing, `y` and `height` in pixels. `cost` shades it, from 0 to
    1; of `exit` it has the colour, where images leave there."""

    x: float
    width: float
    y: float
    height: float
    title: str
    cost: float = 1.0
    exit: int | None = None


@dataclass(frozen=True)
class Label:
    """Who answers: the line goes down from (`x` per cent, `top` pixels) to `y`, where the text stands."""

    x: float
    top: float
    y: float
    exit: int
    name: str
    share: float
    idle: bool

    @property
    def anchor(self) -> str:
        """On which side of the line there is room."""
        return "start" if self.x < 50 else "end"


@dataclass
class Drawing:
    """What is drawn for one operating point; `bed` are the pieces if all of them ran for all images."""

    bed: list[Block] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    river: float = _HEIGHT

    @property
    def height(self) -> float:
        """Of all in pixels."""
        return self.river + _LINE * len(self.labels) + 8


def draw(sections: Sequence[Section], standing: Standing, names: Sequence[str]) -> Drawing:
    """The network at an operating point.

    Args:
        sections: all pieces in order.
        standing: at which `reached` is known.
        names: of the places where images are answered.
    """
    drawing, here, number = Drawing(), 1.0, 0
    scale = _scale(sections)
    x = 0.0
    for section, reached in zip(sections, standing.reached, strict=True):
        x += _GAP if section.restarts else 0.0
        width = scale * section.dearest
        if width:
            drawing.bed.append(Block(x, width, 0, _HEIGHT, ""))
        drawing.blocks += _blocks(section, standing, reached, x, width, scale)
        x += width
        if section.place is not None and section.place.effect == "leaves":
            share = standing.decisions[section.place.name][0]
            drawing.blocks += _leaving(section.place.name, number, share, x, (here - share) * _HEIGHT)
            drawing.labels.append(_label(drawing, x, here, number, names[number], share, not reached))
            x, here, number = x + _LEAST, max(0.0, here - share), number + 1
    drawing.blocks += _leaving("the end", number, here, x, 0.0)
    drawing.labels.append(_label(drawing, x, here, number, names[number], here, False))
    return drawing


def _scale(sections: Sequence[Section]) -> float:
    """Per cent of the width for each multiply-accumulate."""
    exits = 1 + sum(section.place is not None and section.place.effect == "leaves" for section in sections)
    free = 100 - _GAP * sum(section.restarts for section in sections) - _LEAST * exits
    return free / max(1e-9, sum(section.dearest for section in sections))


def _blocks(
    section: Section, standing: Standing, reached: float, x: float, width: float, scale: float
) -> Iterator[Block]:
    """What a piece executed."""
    if not reached or not width:
        return
    runs = f"runs for {100 * reached:.1f} % of the images"
    if section.place is None:
        yield Block(x, width, 0, reached * _HEIGHT, f"{section.name}: {runs}")
        return
    place = section.place
    deciding = scale * place.always
    if deciding:
        yield Block(x, deciding, 0, reached * _HEIGHT, f"{place.name}, deciding: {runs}", 0.6)
    if place.effect == "leaves":
        return
    y, dearest = 0.0, max(place.macs)
    for label, macs, share in reversed(
        list(zip(place.options, place.macs, standing.decisions[place.name], strict=True))
    ):
        if macs and share:
            title = f"{place.name}, {label}: {100 * share:.1f} % of the images"
            yield Block(x + deciding, scale * macs, y, share * _HEIGHT, title, macs / dearest)
        y += share * _HEIGHT


def _leaving(name: str, number: int, share: float, x: float, y: float) -> Iterator[Block]:
    if share > 0:
        yield Block(x, _LEAST, y, share * _HEIGHT, f"{name}: {100 * share:.1f} % of the images leave", exit=number)


def _label(drawing: Drawing, x: float, here: float, number: int, name: str, share: float, idle: bool) -> Label:
    y = _HEIGHT + _LINE * (len(drawing.labels) + 1)
    return Label(x + _LEAST / 2, here * _HEIGHT, y, number, name, share, idle)
