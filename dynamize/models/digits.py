"""A residual network for scikit-learn's bundled digits (grey, 8x8, ten classes): trains in seconds on a CPU.

Same stages and parameter names as the CIFAR ResNets; widths are multiples of eight, for channel groups.
"""

from dynamize.models.cifar_resnet import CifarResNet


def digits_resnet(num_classes: int = 10, in_channels: int = 1) -> CifarResNet:
    """``(N, 1, 8, 8) -> (N, num_classes)``: nine residual blocks, 0.10 M parameters, 1.6 MMACs."""
    return CifarResNet((3, 3, 3), widths=(16, 24, 32), num_classes=num_classes, in_channels=in_channels)
