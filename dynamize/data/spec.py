"""The `data:` section of a recipe: where images come from and how they are divided, sized and augmented.

Importing this module does not import torch, so that a recipe can be checked in a fraction of a second.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from dynamize.data.canvas_spec import FORM, CanvasSpec
from dynamize.sections import InWords, Section

SOURCE_FORMS = {
    "imagefolder": "imagefolder:PATH",
    "torchvision": "torchvision:NAME@ROOT",
    "npz": "npz:PATH",
    "digits": "digits",
    "canvas": FORM,
}

Share = Annotated[float, Field(strict=True, gt=0, lt=1)]
Count = Annotated[int, Field(strict=True, ge=1)]


def check_normalisation(normalize: tuple[tuple[float, ...], tuple[float, ...]]) -> None:
    """Refuse means and deviations that are not of the channels of pixels in 0..1, with a ValueError."""
    mean, std = normalize
    if len(mean) != len(std) or len(mean) not in (1, 3):
        raise ValueError(
            f"{len(mean)} means and {len(std)} deviations: give one of each per channel, 1 or 3, "
            "as in [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]"
        )
    if min(std) <= 0 or max(mean) > 1 or min(mean) < 0 or max(std) > 1:
        raise ValueError(
            f"mean {list(mean)} and std {list(std)} must be of pixels in 0..1, std above 0: "
            "divide values meant for 0..255 by 255"
        )


class DataSpec(Section, metaclass=InWords):
    """What a recipe says about its images; the same object from YAML and from Python.

    `calibration` is a number of images or a share of the part that `calibration_from` names. With
    `calibration_from="test"`, item `i` of a class (files in sorted order) goes to calibration where
    `i % folds == fold` and to test otherwise, so that every test image can serve once on each side; a
    smaller `calibration` leaves the rest of the fold unused.
    """

    source: str = Field(
        description="imagefolder:PATH, torchvision:NAME@ROOT, npz:PATH or digits; canvas:SOURCE,size=128 for each "
        "image of one of these somewhere on a canvas of that many pixels, among fragments of others (options: "
        "object=32-53, the side of the image on it, clutter=41 fragments, seed=0)"
    )
    calibration: Count | Share | None = Field(
        None, description="images (5000) or share (0.1); default: 0.1 of train, all of a fold or of val"
    )
    calibration_from: Literal["train", "val", "test"] = Field(
        "train", description="the part that calibration images are taken out of"
    )
    fold: int = Field(0, ge=0, description="which fold calibrates, with calibration_from: test")
    folds: int = Field(2, ge=2, description="number of folds, with calibration_from: test")
    train_limit: int | None = Field(None, ge=1, description="a class-balanced subset, for quick runs")
    test_limit: int | None = Field(None, ge=1, description="a class-balanced subset, for quick runs")
    normalize: tuple[tuple[float, ...], tuple[float, ...]] | None = Field(
        None, description="[[mean...], [std...]] of pixels in 0..1; default: computed on the train split"
    )
    augment: Literal["none", "crop", "crop_flip"] = Field("crop_flip", description="for training images only")
    image_size: int | None = Field(None, ge=4, description="height and width; default: the network's input")
    resize: int | None = Field(
        None,
        ge=4,
        description="shorter side before the centre crop; default: size * 256 / 224 from 96 pixels on, "
        "below that images are resized exactly",
    )
    memory_gb: float = Field(4.0, ge=0, description="decode images into memory up to this, else stream them")
    download: bool = Field(False, description="let torchvision download what ROOT does not hold")
    seed: int = Field(0, ge=0, description="of the splits and subsets")

    @field_validator("source")
    @classmethod
    def _known_source(cls, source: str) -> str:
        split_source(source)
        return source

    @field_validator("normalize")
    @classmethod
    def _usable_normalize(
        cls, normalize: tuple[tuple[float, ...], tuple[float, ...]] | None
    ) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        if normalize is not None:
            check_normalisation(normalize)
        return normalize

    @model_validator(mode="after")
    def _fold_exists(self) -> DataSpec:
        if self.fold >= self.folds:
            raise ValueError(f"fold {self.fold} of {self.folds} does not exist: use 0 to {self.folds - 1}")
        return self


def split_source(source: str) -> tuple[str, str]:
    """`"npz:a/b.npz"` -> `("npz", "a/b.npz")`. Raises ValueError with the nearest known form."""
    kind, _, rest = source.partition(":")
    known = ", ".join(SOURCE_FORMS.values())
    if kind not in SOURCE_FORMS:
        near = difflib.get_close_matches(kind.lower(), SOURCE_FORMS, n=1)
        hint = f"did you mean {SOURCE_FORMS[near[0]]}?" if near else f"use one of {known}"
        raise ValueError(f"unknown data source {source!r}: {hint}")
    if kind == "digits":
        if rest:
            raise ValueError(f"data source {source!r}: digits takes nothing after it; write 'digits'")
    elif not rest or (kind == "torchvision" and not all(rest.partition("@")[::2])):
        raise ValueError(f"data source {source!r} is incomplete: write {SOURCE_FORMS[kind]}")
    if kind == "canvas":
        inner, _ = CanvasSpec.read(rest)
        if split_source(inner)[0] == "canvas":
            raise ValueError(f"data source {source!r}: a canvas on canvases; write {FORM} with another source in it")
    return kind, rest
