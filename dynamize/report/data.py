"""What a report shows beside the ledger: the curve of operating points, rivals, and example images."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dynamize.calibration.operating import OperatingPoint
from dynamize.report import older
from dynamize.report.ledger import Interval, Ledger, Positive, Share

Milliseconds = Positive | None


class Network(BaseModel):
    """A mark on the charts: a static network, all images leaving at one exit, or a budget of MSDNet's sweep.

    `macs` per image.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = ""
    macs: Annotated[float, Field(ge=0)]
    accuracy: Share
    accuracy_ci: Interval | None = None
    latency_ms: Milliseconds = None


class OptionUse(BaseModel):
    """One option of a decision, and the share of the images that took it; `macs` per image."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    label: str
    macs: Annotated[float, Field(ge=0)]
    share: Share


class DecisionUse(BaseModel):
    """What was decided in one place; the cheapest option first.

    `kind` is for people only. `always` is what deciding costs, in MACs per image; older reports do not have it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    kind: str
    effect: Literal["leaves", "changes"]
    options: Annotated[list[OptionUse], Field(min_length=2)]
    always: Annotated[float, Field(ge=0)] | None = None

    @property
    def left(self) -> float:
        """Share of the images that had left the network before."""
        rest = 1 - sum(option.share for option in self.options)
        return rest if rest > 1e-9 else 0.0

    @property
    def costs(self) -> list[float]:
        """What each option costs, as a share of the dearest."""
        dearest = self.options[-1].macs
        return [option.macs / dearest if dearest else 0.0 for option in self.options]

    @property
    def executed(self) -> float:
        """Share of the dearest option's MACs that was executed, over all images."""
        return sum(option.share * cost for option, cost in zip(self.options, self.costs, strict=True))


class Usage(BaseModel):
    """What was decided for some test images, and how many different ways through the network came of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    decisions: Annotated[list[DecisionUse], Field(min_length=1)]
    images: Annotated[int, Field(ge=1)]
    routings: Annotated[int, Field(ge=1)]

    @property
    def changing(self) -> list[DecisionUse]:
        """The decisions on what comes after; where images leave is told with the operating points."""
        return [use for use in self.decisions if use.effect == "changes"]


class Answerer(BaseModel):
    """One of those that answer in a row: a place where images leave, or the network's own classifier.

    `share` of the images was answered there, `right` of these; None where nobody was. `alone` is its accuracy if it
    answers all images by itself, and `alike` the share of images on which it then answers as each of the row does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    share: Share
    right: Share | None
    alone: Share
    alike: Annotated[list[Share], Field(min_length=2)]


class GalleryImage(BaseModel):
    """A small image with its label, the network's answer (class index or name) and confidence at its exit.

    `macs`, where given, are shown instead of the confidence.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    png_base64: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]+={0,2}$", repr=False)]
    label: int | str
    answer: int | str
    confidence: float
    macs: Annotated[float, Field(ge=0)] | None = None


class Gallery(BaseModel):
    """Images that leave at one exit (counted from 0): the surest ones, those that nearly stayed, and the surest of
    those whose answer is wrong.

    Without an exit: the cheapest and the dearest of all images, in executed MACs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    exit: Annotated[int, Field(ge=0)] | None
    name: str
    first: list[GalleryImage] = []
    last: list[GalleryImage] = []
    wrong: list[GalleryImage] = []

    @property
    def rows(self) -> list[tuple[str, list[GalleryImage]]]:
        """The rows of images that there are, with headings."""
        if self.exit is None:
            headings = ["the cheapest, in executed MACs", "the dearest"]
        else:
            headings = ["first to leave: the surest", "last to leave: the least sure", "wrong, the surest first"]
        every = zip(headings, (self.first, self.last, self.wrong), strict=False)
        return [(heading, images) for heading, images in every if images]


class ReportData(BaseModel):
    """All that a report shows; only the ledger is needed.

    `static` (row 0 of the ledger if not given) and the points should be judged on the same images, and all
    `latency_ms` taken in the same way, named by `latency_label` ("ms per image, batch 64, onnxruntime").
    `anytime` and `budgeted` are the protocols of Huang et al. 2018 (MSDNet, sec. 5), judged on test images.
    `selected` names the operating point at which the network stands, and at which `usage`, `answerers` and `gallery`
    show it.
    """

    model_config = ConfigDict(extra="forbid")

    ledger: Ledger
    operating_points: list[OperatingPoint] = []
    anytime: list[Network] = []
    budgeted: list[Network] = []
    static: Network | None = None
    rivals: list[Network] = []
    latency_label: str = "ms"
    selected: str | None = None
    usage: Usage | None = None
    answerers: list[Answerer] = []
    gallery: list[Gallery] = []
    class_names: list[str] = []
    notes: list[str] = []

    @model_validator(mode="before")
    @classmethod
    def _upgraded(cls, given: Any) -> Any:
        return older.report(given)

    @property
    def leaving(self) -> list[str]:
        """Names of the decisions at which images leave, of the row or point that has the most."""
        known = [*(row.leaving for row in self.ledger.rows), *([*point.thresholds] for point in self.operating_points)]
        return max(known, key=len, default=[])

    def exit_names(self) -> list[str]:
        """What every place where images leave is called, by who answers there or the gallery if these are known."""
        if self.answerers:
            return [one.name for one in self.answerers]
        named = {shown.exit: shown.name for shown in self.gallery if shown.exit is not None}
        return [named.get(index, name) for index, name in enumerate(exit_names(self.leaving))]

    def class_name(self, label: int | str) -> str:
        """The name of a class given by index, or the given name itself."""
        known = isinstance(label, int) and 0 <= label < len(self.class_names)
        return self.class_names[label] if known and isinstance(label, int) else str(label)


def exit_names(leaving: Sequence[str], last: str = "last exit") -> list[str]:
    """What the places where images leave are called, by the decisions taken there, and the end."""
    return [*(name.replace(".", " ") for name in leaving), last]
