"""What a report shows beside the ledger: the curve of operating points, rivals, and example images."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from dynamize.report.ledger import Interval, Ledger, Positive, Share

Milliseconds = Positive | None


class Network(BaseModel):
    """A mark on the charts: a static network, or all images leaving at one exit. `macs` per image."""

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


class GalleryImage(BaseModel):
    """A small image with its label, the network's answer (class index or name) and confidence at its exit."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    png_base64: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]+={0,2}$", repr=False)]
    label: int | str
    answer: int | str
    confidence: float


class Gallery(BaseModel):
    """Images that leave at one exit (counted from 0): the surest ones, and those that nearly stayed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    exit: Annotated[int, Field(ge=0)]
    name: str
    first: list[GalleryImage] = []
    last: list[GalleryImage] = []


class ReportData(BaseModel):
    """All that a report shows; only the ledger is needed.

    `static` (row 0 of the ledger if not given) and the points should be judged on the same images, and all
    `latency_ms` taken in the same way, named by `latency_label` ("ms per image, batch 64, onnxruntime").
    `selected` names the operating point at which the network stands.
    """

    model_config = ConfigDict(extra="forbid")

    ledger: Ledger
    operating_points: list[Point] = []
    anytime: list[Network] = []
    static: Network | None = None
    rivals: list[Network] = []
    latency_label: str = "ms"
    selected: str | None = None
    gallery: list[Gallery] = []
    class_names: list[str] = []
    notes: list[str] = []

    def exit_names(self) -> list[str]:
        """A name for every exit that a point, a row or the gallery has; the last is the network's own."""
        shares = [point.exits for point in self.operating_points] + [row.exits for row in self.ledger.rows]
        count = max([0, *map(len, shares), *(shown.exit + 1 for shown in self.gallery)])
        names = [f"exit {number}" for number in range(1, count)] + ["last exit"][:count]
        for shown in self.gallery:
            names[shown.exit] = shown.name
        return names

    def class_name(self, label: int | str) -> str:
        """The name of a class given by index, or the given name itself."""
        known = isinstance(label, int) and 0 <= label < len(self.class_names)
        return self.class_names[label] if known and isinstance(label, int) else str(label)
