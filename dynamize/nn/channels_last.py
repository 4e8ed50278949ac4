"""Channels-last memory, in which convolutions run faster, for what bears it: traced networks, but not just any module.

A traced network reshapes where it was written with ``view``, which channels-last values do not allow.
"""

from typing import TypeVar

import torch
from torch import Tensor, nn

from dynamize.nn.network import DynamicNetwork

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def images_for(network: nn.Module, images_NCHW: Tensor) -> Tensor:
    """The images as ``network`` takes them: channels last if it was traced, contiguous if it is somebody's module."""
    if isinstance(network, DynamicNetwork):
        return images_NCHW.contiguous(memory_format=torch.channels_last)
    return images_NCHW.contiguous()


def lay_out(network: AnyModule) -> AnyModule:
    """Lay out the weights of convolutions channels last, in place.

    Other tensors of four dimensions stay as they are, and so do the weights of subclasses: their code may call
    ``view``.
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and type(module).__module__ == nn.Conv2d.__module__:
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    return network
