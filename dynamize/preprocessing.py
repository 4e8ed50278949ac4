"""What a network wants its images to be: size, crop and normalisation, and how one wish is made of another."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from dynamize.data.spec import DataSpec
from dynamize.data.splits import resized_side
from dynamize.sources import SourceSpec

Size = tuple[int, int]
Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


class Preprocessing(BaseModel):
    """How a network's images are made, as far as it is known.

    Attributes:
        size: (H, W).
        crop: share of the shorter side that is kept, from the middle, before the rest gets this size.
        normalize: means and deviations of pixels in 0..1.
        interpolation: bilinear or bicubic.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: Size
    crop: float = 1.0
    normalize: Normalisation | None = None
    interpolation: str = "bilinear"


class Steps(BaseModel):
    """What makes one network's images of another's (:class:`dynamize.nn.preprocess.Preprocess`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: Size
    share: float = Field(1.0, gt=0, le=1)
    scale: tuple[float, ...] | None = None
    shift: tuple[float, ...] | None = None
    interpolation: str = "bilinear"


def of_images(spec: DataSpec | None, size: Size) -> Preprocessing:
    """How the images of a recipe are made, which have this size in the end."""
    if spec is None:
        return Preprocessing(size=size)
    return Preprocessing(size=size, crop=min(size) / resized_side(spec, min(size)), normalize=spec.normalize)


def published(source: SourceSpec, network: nn.Module) -> Preprocessing | None:
    """What the library that a network's weights come from says about their images; None where it says nothing."""
    if source.library == "torchvision" and source.kwargs.get("weights"):
        from torchvision import models

        name = str(source.kwargs["weights"]).rpartition(".")[2]
        return _of_torchvision(models.get_model_weights(source.target[1])[name].transforms())
    if source.library == "timm" and source.kwargs.get("pretrained"):
        return _of_timm(getattr(network, "pretrained_cfg", {}))
    return None


def steps_between(given: Preprocessing, wanted: Preprocessing) -> Steps | None:
    """What makes the images that are wanted of those given; None if they are the same, as far as is known.

    A crop that keeps more than the given images show is all of them.
    """
    share = min(1.0, wanted.crop / given.crop)
    scale, shift = _affine(given.normalize, wanted.normalize)
    if tuple(given.size) == tuple(wanted.size) and share > 1 - 1 / max(given.size):
        if scale is None:
            return None
        share = 1.0
    return Steps(size=wanted.size, share=share, scale=scale, shift=shift, interpolation=wanted.interpolation)


def _affine(given: Normalisation | None, wanted: Normalisation | None) -> tuple[Any, Any]:
    if given is None or wanted is None or given == wanted:
        return None, None
    channels = list(zip(*given, *wanted, strict=True))
    scale = [deviation / own for _, deviation, _, own in channels]
    shift = [(mean - own) / deviation for mean, _, own, deviation in channels]
    return tuple(scale), tuple(shift)


def _of_torchvision(transforms: Any) -> Preprocessing:
    (side,), (to,) = transforms.crop_size, transforms.resize_size
    return Preprocessing(
        size=(side, side),
        crop=side / to,
        normalize=(tuple(transforms.mean), tuple(transforms.std)),
        interpolation=_known(transforms.interpolation.value),
    )


def _of_timm(config: Any) -> Preprocessing | None:
    if not config or not config.get("input_size"):
        return None
    size: Sequence[int] = config.get("test_input_size") or config["input_size"]
    crop = config.get("test_crop_pct") or config.get("crop_pct") or 1.0
    return Preprocessing(
        size=(size[1], size[2]),
        crop=crop,
        normalize=(tuple(config["mean"]), tuple(config["std"])),
        interpolation=_known(str(config.get("interpolation"))),
    )


def _known(interpolation: str) -> str:
    return interpolation if interpolation in ("bilinear", "bicubic") else "bilinear"
