"""A network at one of its operating points: a row of figures, and what was decided for the test images there."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from dynamize.report.ledger import Row, Share

Macs = Annotated[float, Field(ge=0)]
_FIXED = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Place(BaseModel):
    """Where something is decided for each image; the cheapest option first.

    `kind` is for people only. `macs` are those of each option and `always` what deciding costs, per image.
    """

    model_config = _FIXED

    name: str
    kind: str
    effect: Literal["leaves", "changes"]
    options: Annotated[list[str], Field(min_length=2)]
    macs: list[Macs]
    always: Macs


class Section(BaseModel):
    """A piece of the network as it is drawn, in the order in which it runs.

    `macs`, per image, of a piece that is the same for all; `place` of one that decides. `member` names the network that
    it is part of, and `restarts` says that images come in anew.
    """

    model_config = _FIXED

    name: str
    member: str
    macs: Macs = 0.0
    place: Place | None = None
    restarts: bool = False

    @property
    def dearest(self) -> float:
        """MACs of an image for which everything here runs."""
        return self.macs if self.place is None else self.place.always + max(self.place.macs)


class OptionUse(BaseModel):
    """One option of a decision, and the share of the images that took it; `macs` per image."""

    model_config = _FIXED

    label: str
    macs: Macs
    share: Share


class DecisionUse(BaseModel):
    """What was decided in one place; the cheapest option first."""

    model_config = _FIXED

    name: str
    kind: str
    options: Annotated[list[OptionUse], Field(min_length=2)]

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


class Glimpse(BaseModel):
    """What one network of a row saw of an image, and what was answered after it.

    `box` is the part of the picture, in shares of its longer side: left, top, width and height; None is all of it.
    """

    model_config = _FIXED

    name: str
    box: tuple[float, float, float, float] | None = None
    answer: int | str
    confidence: float


class GalleryImage(BaseModel):
    """A test image, by its number among the pictures of the report, with its label, the network's answer (class index
    or name) and confidence where it left.

    `macs`, where given, are shown instead of the confidence. `glimpses` say, one after the other, where a network
    looked that looks at parts.
    """

    model_config = _FIXED

    picture: Annotated[int, Field(ge=0)]
    label: int | str
    answer: int | str
    confidence: float
    macs: Macs | None = None
    glimpses: list[Glimpse] = []


class Gallery(BaseModel):
    """Images that leave at one exit (counted from 0): the surest ones, those that nearly stayed, and the surest of
    those whose answer is wrong.

    Without an exit: the cheapest and the dearest of all images, in executed MACs.
    """

    model_config = _FIXED

    exit: Annotated[int, Field(ge=0)] | None
    name: str
    first: list[GalleryImage] = []
    last: list[GalleryImage] = []
    wrong: list[GalleryImage] = []

    @property
    def shown(self) -> list[GalleryImage]:
        """All of its images."""
        return [*self.first, *self.last, *self.wrong]

    @property
    def rows(self) -> list[tuple[str, list[GalleryImage]]]:
        """The rows of images that there are, with headings."""
        if self.exit is None:
            headings = ["the cheapest, in executed MACs", "the dearest"]
        else:
            headings = ["first to leave: the surest", "last to leave: the least sure", "wrong, the surest first"]
        every = zip(headings, (self.first, self.last, self.wrong), strict=False)
        return [(heading, images) for heading, images in every if images]


class Classes(BaseModel):
    """How answers fall on classes: `count` test images of each class, `right` of them answered rightly; `confused`
    lists (class, other answer, images), the most frequent first."""

    model_config = _FIXED

    count: list[Annotated[int, Field(ge=0)]]
    right: list[Annotated[int, Field(ge=0)]]
    confused: list[tuple[int, int, int]]

    def accuracy(self, label: int) -> float | None:
        """Of one class; None if there is no image of it."""
        return self.right[label] / self.count[label] if self.count[label] else None

    @property
    def complete(self) -> bool:
        """Whether all pairs that were confused are listed, and not only the most frequent ones."""
        return sum(self.right) + sum(images for *_, images in self.confused) == sum(self.count)


class Standing(Row):
    """The network at an operating point, judged on the test images and timed in the same rounds as everything else that
    a report shows.

    `words` say by decision when an image leaves there. `reached` is the share of the images that each section of the
    network ran for. `right` is, for each place where images are answered, the share of those answered there that is
    right; None where nobody was. `routings` counts the different ways through the network.
    """

    point: str
    words: dict[str, str] = {}
    reached: list[Share] = []
    right: list[Share | None] = []
    routings: int | None = None
    classes: Classes | None = None
    gallery: list[Gallery] = []

    def use(self, place: Place) -> DecisionUse:
        """What was decided in one place."""
        shares = self.decisions[place.name]
        options = zip(place.options, place.macs, shares, strict=True)
        uses = [OptionUse(label=label, macs=macs, share=min(1.0, share)) for label, macs, share in options]
        return DecisionUse(name=place.name, kind=place.kind, options=uses)
