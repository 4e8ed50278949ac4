"""Residual networks for scikit-learn's bundled digits (grey, 8x8, ten classes): they train in seconds on a CPU.

Same stages and parameter names as the CIFAR ResNets; widths are multiples of eight, for channel groups.
"""

from pathlib import Path

from dynamize.checkpoints import load_into, read_state_dict
from dynamize.models.cifar_resnet import CifarResNet

TRAINED = {name: Path(__file__).with_name(f"{name}.safetensors") for name in ("digits_resnet", "digits_resnet_small")}
"""Weights from ``scripts/train_digits.py``; images normalised with mean 0.305 and deviation 0.376."""


def digits_resnet(num_classes: int = 10, in_channels: int = 1, pretrained: bool = False) -> CifarResNet:
    """``(N, 1, 8, 8) -> (N, num_classes)``: nine residual blocks, 0.10 M parameters, 1.6 MMACs.

    ``pretrained`` loads the weights that come with dynamize.
    """
    network = CifarResNet((3, 3, 3), widths=(16, 24, 32), num_classes=num_classes, in_channels=in_channels)
    return _trained(network, "digits_resnet") if pretrained else network


def digits_resnet_small(num_classes: int = 10, in_channels: int = 1, pretrained: bool = False) -> CifarResNet:
    """``(N, 1, 8, 8) -> (N, num_classes)``: three residual blocks, 2,518 parameters, 0.04 MMACs.

    ``pretrained`` loads the weights that come with dynamize.
    """
    network = CifarResNet((1, 1, 1), widths=(4, 8, 8), num_classes=num_classes, in_channels=in_channels)
    return _trained(network, "digits_resnet_small") if pretrained else network


def _trained(network: CifarResNet, name: str) -> CifarResNet:
    load_into(network, read_state_dict(TRAINED[name]), f"dynamize:{name}", TRAINED[name])
    return network
