"""What a report shows beside the ledger: the network at its operating points, and how it became so."""

from collections.abc import Sequence
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dynamize.calibration.operating import OperatingPoint
from dynamize.report import older
from dynamize.report.ledger import Ledger, Share
from dynamize.report.standing import Classes, Place, Section, Standing


class Mark(BaseModel):
    """A mark on the chart of MACs: all images leaving at one exit, or a budget of MSDNet's sweep. `macs` per image."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    macs: Annotated[float, Field(ge=0)]
    accuracy: Share


class Answerer(BaseModel):
    """One of those that answer in a row: a place where images leave, or the network's own classifier.

    `alone` is its accuracy if it answers all test images by itself, and `alike` the share of them on which it then
    answers as each of the row does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    alone: Share
    alike: Annotated[list[Share], Field(min_length=2)]


class ReportData(BaseModel):
    """All that a report shows; only the ledger is needed.

    `standings` are the operating points as measured on test images, in the rounds that also timed the last row of the
    ledger and the rivals; `operating_points` what calibration images let expect of them. `selected` names the one at
    which the network stands. `anytime` and `budgeted` are the protocols of Huang et al. 2018 (MSDNet, sec. 5), judged
    on test images. `sections` are the network in the order in which it runs. `pictures` are PNGs of test images.
    `classes` is how the static network's answers fall on classes. `metrics` are those of training, `recipe` is YAML,
    and `folder` is where the artifact is.
    """

    model_config = ConfigDict(extra="forbid")

    ledger: Ledger
    operating_points: list[OperatingPoint] = []
    standings: list[Standing] = []
    selected: str | None = None
    anytime: list[Mark] = []
    budgeted: list[Mark] = []
    answerers: list[Answerer] = []
    sections: list[Section] = []
    images: int | None = None
    pictures: list[Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]+={0,2}$")]] = []
    class_names: list[str] = []
    classes: Classes | None = None
    metrics: list[dict[str, Any]] = []
    recipe: str = ""
    folder: str = ""
    versions: dict[str, str] = {}
    notes: list[str] = []

    @model_validator(mode="before")
    @classmethod
    def _upgraded(cls, given: Any) -> Any:
        return older.report(given)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for one in self.standings:
            shown = [image for gallery in one.gallery for image in gallery.shown]
            if any(image.picture >= len(self.pictures) for image in shown):
                raise ValueError(f"the gallery of {one.point} names a picture that is not there")
            if one.reached and len(one.reached) != len(self.sections):
                raise ValueError(f"{one.point} knows {len(one.reached)} sections of {len(self.sections)}")
        return self

    @property
    def stands(self) -> list[Standing]:
        """The operating points as measured, the cheapest first; where none were, the last row stands for one."""
        last = self.ledger.rows[-1]
        name = f"step {last.step}, {last.transform}"
        measured = sorted(self.standings, key=lambda one: one.macs)
        return measured or [Standing(**{**dict(last), "notes": []}, point=name)]

    @property
    def here(self) -> int:
        """Which of `stands` the network stands at: the named one, or that which costs what the last row does."""
        names = [one.point for one in self.stands]
        if self.selected in names:
            return names.index(self.selected)
        last = self.ledger.rows[-1].macs
        return min(range(len(names)), key=lambda index: abs(self.stands[index].macs - last))

    @property
    def places(self) -> list[Place]:
        """Where something is decided, in order."""
        return [section.place for section in self.sections if section.place is not None]

    @property
    def changing(self) -> list[Place]:
        """The decisions on what comes after."""
        return [place for place in self.places if place.effect == "changes"]

    def expected(self, name: str) -> OperatingPoint | None:
        """What calibration images let expect of an operating point."""
        return next((point for point in self.operating_points if point.name == name), None)

    @property
    def leaving(self) -> list[str]:
        """Names of the decisions at which images leave, of the row or point that has the most."""
        known = [*(row.leaving for row in self.ledger.rows), *([*point.thresholds] for point in self.operating_points)]
        return max(known, key=len, default=[])

    def exit_names(self) -> list[str]:
        """What every place where images leave is called, by who answers there if that is known."""
        return [one.name for one in self.answerers] or exit_names(self.leaving)

    def class_name(self, label: int | str) -> str:
        """The name of a class given by index, or the given name itself."""
        known = isinstance(label, int) and 0 <= label < len(self.class_names)
        return self.class_names[label] if known and isinstance(label, int) else str(label)


def exit_names(leaving: Sequence[str], last: str = "last exit") -> list[str]:
    """What the places where images leave are called, by the decisions taken there, and the end."""
    return [*(name.replace(".", " ") for name in leaving), last]
