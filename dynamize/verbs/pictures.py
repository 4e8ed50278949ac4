"""Test images that a report shows: those at either end of what each exit or all gates decide."""

import base64
import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dynamize.data import ImageSet
from dynamize.evaluation import Judgement, gather
from dynamize.report import Gallery, GalleryImage, Glimpse

_SHOWN = 8
_LARGEST, _LOOKED_AT = 64, 96  # pixels of a side; of images on which crops are drawn

Looks = Callable[[Tensor], list[list[Glimpse]]]
"""Network input (N, C, H, W) -> what was looked at of each image."""


class Pictures:
    """Galleries of several operating points, which share their pictures.

    Args:
        images: the test split.
        large: whether crops are drawn on them.
    """

    def __init__(self, images: ImageSet, large: bool = False) -> None:
        self._images, self._side = images, _LOOKED_AT if large else _LARGEST
        self._numbers: dict[int, int] = {}

    def galleries(
        self, names: list[str], changes: bool, judged: Judgement, looks: Looks | None = None
    ) -> list[Gallery]:
        """Of one operating point.

        Args:
            names: of the places where images leave.
            changes: whether images cost more or less beside leaving sooner or later.
            looks: of a network that looks at parts.
        """
        found = []
        if len(names) > 1:
            found = [self._leaving_at(number, name, judged) for number, name in enumerate(names)]
        found += [self._cheapest_and_dearest(judged)] if changes else []
        return found if looks is None else self._with_glimpses(found, looks)

    def _with_glimpses(self, galleries: list[Gallery], looks: Looks) -> list[Gallery]:
        numbers = list(self._numbers)
        shown = sorted({image.picture for gallery in galleries for image in gallery.shown})
        inputs = self._images.prepare(self._images.__getitems__([numbers[picture] for picture in shown])[0])
        found = dict(zip(shown, looks(inputs), strict=True))

        def drawn(images: list[GalleryImage]) -> list[GalleryImage]:
            return [image.model_copy(update={"glimpses": found[image.picture]}) for image in images]

        return [
            one.model_copy(update={"first": drawn(one.first), "last": drawn(one.last), "wrong": drawn(one.wrong)})
            for one in galleries
        ]

    def base64(self) -> list[str]:
        """All pictures shown so far, as PNG."""
        if not self._numbers:
            return []
        normalize = self._images.normalize
        images = gather(self._images, torch.tensor(list(self._numbers)), torch.device("cpu"))
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (normalize.mean, normalize.std))
        pixels = ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return [_png(one, self._side) for one in pixels]

    def _leaving_at(self, number: int, name: str, judged: Judgement) -> Gallery:
        here = (judged.exits == number).nonzero().flatten()
        order = here[_sure(judged)[here].argsort(descending=True, stable=True)]
        wrong = order[judged.answers[order] != judged.labels[order]]
        chosen = (order[:_SHOWN], order[_SHOWN:][-_SHOWN:], wrong[:_SHOWN])
        first, last, surely_wrong = (self._show(index, judged) for index in chosen)
        return Gallery(exit=number, name=name, first=first, last=last, wrong=surely_wrong)

    def _cheapest_and_dearest(self, judged: Judgement) -> Gallery:
        order = judged.macs.argsort(stable=True)
        cheapest, dearest = order[:_SHOWN], order[_SHOWN:][-_SHOWN:].flip(0)
        first, last = (self._show(index, judged, judged.macs) for index in (cheapest, dearest))
        return Gallery(exit=None, name="all images", first=first, last=last)

    def _show(self, index: Tensor, judged: Judgement, macs_N: Tensor | None = None) -> list[GalleryImage]:
        """The images at ``index``, with what they cost if it is given."""
        return [
            GalleryImage(
                picture=self._numbers.setdefault(i, len(self._numbers)),
                label=int(judged.labels[i]),
                answer=int(judged.answers[i]),
                confidence=float(_sure(judged)[i]),
                macs=None if macs_N is None else float(macs_N[i]),
            )
            for i in index.tolist()
        ]


def _sure(judged: Judgement) -> Tensor:
    assert judged.sure is not None  # networks that are judged say how sure they are
    return judged.sure


def _png(pixels_HWC: np.ndarray, side: int) -> str:
    image = Image.fromarray(pixels_HWC.squeeze(2) if pixels_HWC.shape[2] == 1 else pixels_HWC)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
