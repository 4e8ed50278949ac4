"""A residual network for scikit-learn's bundled digits (grey, 8x8, ten classes): trains in seconds on a CPU.

Same stages and parameter names as the CIFAR ResNets; widths are multiples of eight, for channel groups.
"""

from pathlib import Path

from dynamize.checkpoints import load_into, read_state_dict
from dynamize.models.cifar_resnet import CifarResNet

TRAINED = Path(__file__).with_name("digits_resnet.safetensors")
"""Weights from ``scripts/train_digits.py``; images normalised with mean 0.305 and deviation 0.376."""


def digits_resnet(num_classes: int = 10, in_channels: int = 1, pretrained: bool = False) -> CifarResNet:
    """``(N, 1, 8, 8) -> (N, num_classes)``: nine residual blocks, 0.10 M parameters, 1.6 MMACs.

    ``pretrained`` loads the weights that come with dynamize.
    """
    network = CifarResNet((3, 3, 3), widths=(16, 24, 32), num_classes=num_classes, in_channels=in_channels)
    if pretrained:
        load_into(network, read_state_dict(TRAINED), "dynamize:digits_resnet", TRAINED)
    return network
