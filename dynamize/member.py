"""What a recipe says of a network in front of its own, or beside it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, ValidationError, model_validator

from dynamize.data.spec import check_normalisation
from dynamize.errors import DynamizeError
from dynamize.nn.piece import MAIN
from dynamize.preprocessing import Normalisation, Steps
from dynamize.sections import Section
from dynamize.sources import Checkpoint, Scalar, SourceSpec

_NAME = re.compile(r"[A-Za-z_][\w-]*")
_RESERVED = (MAIN, "start", "verdict", "fusion")


class Member(Section):
    """A network in front of the recipe's own.

    One of ``source`` (with its checkpoint), ``resolution`` (the recipe's own network, on smaller images) and ``shrink``
    (a smaller copy of it, which a `distill` step behind trains); or none of them, with ``name``, for one that
    ``Context(members=...)`` brings from Python.
    """

    name: str | None = Field(None, description="how it is called; default: after its source")
    source: str | None = Field(None, description="as in `model`, e.g. torchvision:mobilenet_v3_large,weights=DEFAULT")
    kwargs: dict[str, Scalar] = Field(default_factory=dict, description="keyword arguments of the factory")
    checkpoint: Path | Checkpoint | None = Field(
        None, description=".pt, .pth, .th or .safetensors file, or {file, weights} as in `model`"
    )
    resolution: PositiveInt | None = Field(
        None, description="the recipe's own network on images of this height and width"
    )
    shrink: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="a smaller copy of the recipe's own network, of this share of its MACs"
    )
    size: PositiveInt | None = Field(
        None, description="height and width of its images; default: as published with its weights, or the recipe's"
    )
    crop: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="share of the shorter side that it sees; default: as published, or the recipe's"
    )
    normalize: Normalisation | None = Field(
        None, description="[[mean...], [std...]] of pixels in 0..1; default: as published, or the recipe's"
    )
    preprocess: Literal["auto"] | Steps | None = Field(
        "auto", description="what the step decided: how its images are made of the recipe's"
    )
    leave_out: list[tuple[str, str]] | None = Field(
        None, description="what the step decided for `shrink`: blocks left out, from one node to another"
    )
    widths: dict[str, list[int]] | None = Field(
        None, description="what the step decided for `shrink`: channels of each layer that is narrower"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        given = [name for name in ("source", "resolution", "shrink") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} say each what the network is; give one of them")
        if not given and self.name is None:
            raise ValueError("say what the network is: source (with checkpoint or weights), resolution or shrink")
        if (self.checkpoint is not None or self.kwargs) and self.source is None:
            raise ValueError("checkpoint and kwargs belong to a source, which is missing")
        if self.source is not None:
            try:
                self.spec()
            except ValidationError as error:
                raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error
        if self.normalize is not None:
            check_normalisation(self.normalize)
        if self.name is not None and (not _NAME.fullmatch(self.name) or self.name in _RESERVED):
            raise ValueError(
                f"name: {self.name!r} cannot be used: write letters, digits, _ and -, but none of "
                f"{', '.join(_RESERVED)}"
            )
        return self

    def spec(self) -> SourceSpec:
        """Its source as the recipe's own network has one."""
        assert self.source is not None
        return SourceSpec.model_validate({"source": self.source, "kwargs": self.kwargs, "checkpoint": self.checkpoint})

    def called(self) -> str:
        """Its name, or one after its source."""
        if self.name is not None:
            return self.name
        if self.source is not None:
            return re.sub(r"[^\w-]", "_", self.spec().target[1])
        return f"{MAIN}-{self.resolution}" if self.resolution else f"{MAIN}-{round(100 * (self.shrink or 0))}"


def names_of(members: Sequence[Member], taken: Sequence[str]) -> list[str]:
    """How each is called, none by a name that is ``taken``."""
    names: list[str] = []
    for member in members:
        name, number = member.called(), 2
        while member.name is None and name in names:
            name, number = f"{member.called()}-{number}", number + 1
        if name in names or name in taken:
            raise DynamizeError(f"cascade: '{name}' is the name of two; give one of them another `name`")
        names.append(name)
    return names
