"""What is said of something that a compiled network cannot answer."""

from typing import Any

import torch
from torch import Tensor


def why_refused(images: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str | None:
    """What is wrong with images for a network that takes (N, *shape), and what to give; None if nothing is."""
    wanted = f"({', '.join(map(str, ('N', *shape)))})"
    if not isinstance(images, Tensor):
        tensor = "torch.from_numpy(images)" if type(images).__module__ == "numpy" else "a torch.Tensor"
        return f"a compiled network takes a tensor {wanted}, and this is a {type(images).__name__}: give it {tensor}"
    given = f"({', '.join(map(str, images.shape))})"
    if tuple(images.shape) == shape:
        return f"the network takes batches {wanted}, and this is one image {given}: give it images[None]"
    if tuple(images.shape[1:]) != shape:
        if tuple(images.shape[2:]) == shape[1:]:
            return f"the network takes {shape[0]} channels, and these images have {images.shape[1]}: {wanted}"
        if tuple(images.shape[1:]) == (*shape[1:], shape[0]):
            return (
                f"the network takes channels first, {wanted}, and these have them last: give it images.movedim(-1, 1)"
            )
        return f"the network was compiled for images {wanted}, and these are {given}: resize them, or compile it anew"
    if images.dtype != dtype:
        name = str(dtype).rpartition(".")[2]
        more = " and normalise them" if not images.dtype.is_floating_point else ""
        return f"the network takes {name}, and these images are {images.dtype}: give it images.to({dtype}){more}"
    if images.device.type != device.type or (device.index is not None and images.device != device):
        return (
            f"the network was compiled for {device}, and these images are on {images.device}: give it "
            f"images.to('{device}')"
        )
    return None
