"""What a network wants its images to be, made of those that another one takes, inside its graph.

So each network of a row keeps the size, crop and normalisation that it was trained with, and is exported with them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from dynamize.graph.tracer import Whole


class Preprocess(Whole):
    """Crops to the middle, resizes and normalises anew: (N, C, H, W) -> (N, C, H', W').

    Resizing, with antialiasing, is two matrix products, which give the same on every backend.

    Args:
        given: (H, W) of the images.
        size: (H', W').
        share: of each side that is kept, from the middle.
        scale: values are multiplied by it, one for each channel.
        shift: and this is added to them.
        interpolation: bilinear or bicubic.
    """

    rows: Tensor
    columns: Tensor
    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        given: tuple[int, int],
        size: tuple[int, int],
        share: float = 1.0,
        scale: Sequence[float] | None = None,
        shift: Sequence[float] | None = None,
        interpolation: str = "bilinear",
    ) -> None:
        super().__init__()
        self.resizes = tuple(given) != tuple(size) or share < 1
        self.normalizes = scale is not None and shift is not None
        if self.resizes:
            rows, columns = (
                resizing(before, after, share, interpolation) for before, after in zip(given, size, strict=True)
            )
            self.register_buffer("rows", rows, persistent=False)
            self.register_buffer("columns", columns.T.contiguous(), persistent=False)
        if self.normalizes:
            self.register_buffer("scale", torch.tensor(scale)[:, None, None], persistent=False)
            self.register_buffer("shift", torch.tensor(shift)[:, None, None], persistent=False)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        if self.resizes:
            images_NCHW = self.rows @ (images_NCHW @ self.columns)
        return images_NCHW * self.scale + self.shift if self.normalizes else images_NCHW


def resizing(before: int, after: int, share: float, interpolation: str) -> Tensor:
    """The matrix (after, before) that resizes one side of an image, of which ``share`` in the middle is kept."""
    kept = max(1, round(before * share))
    start = (before - kept) // 2
    inner = torch.eye(kept)[None, None]
    resized = interpolate(inner, size=(after, kept), mode=interpolation, antialias=True, align_corners=False)
    matrix = torch.zeros(after, before)
    matrix[:, start : start + kept] = resized[0, 0]
    return matrix
