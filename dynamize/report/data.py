"""What a report shows beside the ledger: the curve of operating points, rivals, and example images."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

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


class Point(BaseModel):
    """An operating point as the report needs it; an object with these attributes is taken as well as a dict.

    Values are expected ones, the intervals 95 % prediction intervals. A threshold None switches its exit off.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", from_attributes=True)

    name: str
    thresholds: list[float | None]
    accuracy: Share
    accuracy_ci: Interval
    accuracy_drop: float
    accuracy_drop_ci: Interval
    macs: Annotated[float, Field(ge=0)]
    macs_ci: Interval
    macs_ratio: Annotated[float, Field(ge=0)]
    latency_ms: Milliseconds = None
    latency_ci: Interval | None = None
    exits: list[Share]


class PathUse(BaseModel):
    """One way through a gated unit, and the share of the images that took it.

    `width` is the share of the unit's channels that it computes, 0 where the unit is skipped; `macs` per image.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    width: Share
    macs: Annotated[float, Field(ge=0)]
    share: Share


class UnitUse(BaseModel):
    """How the images passed a gated unit; the cheapest path first, the original one last."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str
    paths: Annotated[list[PathUse], Field(min_length=2)]

    @property
    def left(self) -> float:
        """Share of the images that had left the network before."""
        rest = 1 - sum(path.share for path in self.paths)
        return rest if rest > 1e-9 else 0.0

    @property
    def executed(self) -> float:
        """Share of the unit's MACs that was executed, over all images."""
        return sum(path.share * path.macs for path in self.paths) / self.paths[-1].macs


class GateUse(BaseModel):
    """What the gates decided for some test images, and how many different ways through the network came of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    units: Annotated[list[UnitUse], Field(min_length=1)]
    images: Annotated[int, Field(ge=1)]
    routings: Annotated[int, Field(ge=1)]


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
    """Images that leave at one exit (counted from 0): the surest ones, and those that nearly stayed.

    Without an exit: the cheapest and the dearest of all images, in executed MACs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    exit: Annotated[int, Field(ge=0)] | None
    name: str
    first: list[GalleryImage] = []
    last: list[GalleryImage] = []

    @property
    def headings(self) -> tuple[str, str]:
        """Of both rows of images."""
        if self.exit is None:
            return "the cheapest, in executed MACs", "the dearest"
        return "first to leave: the surest", "last to leave: the least sure"


class ReportData(BaseModel):
    """All that a report shows; only the ledger is needed.

    `static` (row 0 of the ledger if not given) and the points should be judged on the same images, and all
    `latency_ms` taken in the same way, named by `latency_label` ("ms per image, batch 64, onnxruntime").
    `anytime` and `budgeted` are the protocols of Huang et al. 2018 (MSDNet, sec. 5), judged on test images.
    `selected` names the operating point at which the network stands, and at which `gates` and `gallery` show it.
    """

    model_config = ConfigDict(extra="forbid")

    ledger: Ledger
    operating_points: list[Point] = []
    anytime: list[Network] = []
    budgeted: list[Network] = []
    static: Network | None = None
    rivals: list[Network] = []
    latency_label: str = "ms"
    selected: str | None = None
    gates: GateUse | None = None
    gallery: list[Gallery] = []
    class_names: list[str] = []
    notes: list[str] = []

    def exit_names(self) -> list[str]:
        """A name for every exit that a point, a row or the gallery has; the last is the network's own."""
        shares = [point.exits for point in self.operating_points] + [row.exits for row in self.ledger.rows]
        named = {shown.exit: shown.name for shown in self.gallery if shown.exit is not None}
        count = max([0, *map(len, shares), *(index + 1 for index in named)])
        names = [f"exit {number}" for number in range(1, count)] + ["last exit"][:count]
        return [named.get(index, name) for index, name in enumerate(names)]

    def class_name(self, label: int | str) -> str:
        """The name of a class given by index, or the given name itself."""
        known = isinstance(label, int) and 0 <= label < len(self.class_names)
        return self.class_names[label] if known and isinstance(label, int) else str(label)
