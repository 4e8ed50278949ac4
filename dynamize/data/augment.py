"""Training-time augmentation and normalisation of whole uint8 batches, without a loop over images.

Random numbers are always drawn on the generator's device (the CPU), so that a batch is augmented in the
same way wherever it lies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class Normalize:
    """`(pixel / 255 - mean) / std` per channel, for uint8 images (N, C, H, W) on any device -> float32."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = tuple(mean), tuple(std)
        deviation = torch.tensor(self.std, dtype=torch.float64).view(1, -1, 1, 1)
        self._scale = (1 / (255 * deviation)).float()
        self._shift = (-torch.tensor(self.mean, dtype=torch.float64).view(1, -1, 1, 1) / deviation).float()

    def __call__(self, images_NCHW: Tensor) -> Tensor:
        scale, shift = self._scale.to(images_NCHW.device), self._shift.to(images_NCHW.device)
        return images_NCHW.float().mul_(scale).add_(shift)


def augment(images_NCHW: Tensor, generator: torch.Generator, kind: str, padding: int) -> Tensor:
    """Pad uint8 images (N, C, H, W) with black, cut a random window of the old size, flip half of them.

    `kind`: "none" returns the images, "crop" shifts, "crop_flip" also flips left-right. As RandomCrop and
    RandomHorizontalFlip of torchvision do before normalisation (He et al. 2016, sec. 4.2).
    """
    if kind == "none":
        return images_NCHW
    n, _, height, width = images_NCHW.shape
    device = images_NCHW.device
    down_N = _integers(2 * padding + 1, n, generator, device)
    right_N = _integers(2 * padding + 1, n, generator, device)
    padded = F.pad(images_NCHW, (padding,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    cut = windows[torch.arange(n, device=device), :, down_N, right_N]
    if kind == "crop_flip":
        cut = torch.where(_coins(n, generator, device), cut.flip(3), cut)
    return cut


def random_resized_crop(images_NCHW: Tensor, generator: torch.Generator, size: tuple[int, int], flip: bool) -> Tensor:
    """Cut a random box of 8 to 100 % of the area, ratio 3/4 to 4/3, resize it bilinearly to `size`.

    uint8 (N, C, H', W') -> uint8 (N, C, *size); half of the images are flipped if `flip`. The distribution
    is that of torchvision's RandomResizedCrop (Szegedy et al. 2015), except that a box which does not fit is
    shortened instead of drawn again.
    """
    n, _, height, width = images_NCHW.shape
    draws = torch.rand(4, n, generator=generator, device=generator.device).to(images_NCHW.device)
    area = height * width * (0.08 + 0.92 * draws[0])
    ratio = torch.exp((2 * draws[1] - 1) * math.log(4 / 3))
    box_width = (area * ratio).sqrt().clamp(max=width) / width
    box_height = (area / ratio).sqrt().clamp(max=height) / height
    theta = torch.zeros(n, 2, 3, device=images_NCHW.device)
    theta[:, 0, 0], theta[:, 1, 1] = box_width, box_height
    theta[:, 0, 2] = (2 * draws[2] - 1) * (1 - box_width)
    theta[:, 1, 2] = (2 * draws[3] - 1) * (1 - box_height)
    if flip:
        coins = _coins(n, generator, images_NCHW.device).view(n)
        theta[:, 0, 0] = torch.where(coins, -theta[:, 0, 0], theta[:, 0, 0])
    grid = F.affine_grid(theta, [n, images_NCHW.shape[1], *size], align_corners=False)
    cut = F.grid_sample(images_NCHW.float(), grid, padding_mode="border", align_corners=False)
    return cut.round_().clamp_(0, 255).to(torch.uint8)


def _integers(below: int, count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.randint(below, (count,), generator=generator, device=generator.device).to(device)


def _coins(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    heads = torch.rand(count, generator=generator, device=generator.device) < 0.5
    return heads.view(-1, 1, 1, 1).to(device)
