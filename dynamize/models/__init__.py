"""Small reference networks that torchvision and timm lack, by name.

The names map to (module, factory) so that listing them imports nothing.
"""

from importlib import import_module

from torch import nn

from dynamize.errors import DynamizeError

_CIFAR = ("cifar_resnet20", "cifar_resnet32", "cifar_resnet44", "cifar_resnet56", "cifar_resnet110")
REGISTRY: dict[str, tuple[str, str]] = {
    **{name: ("dynamize.models.cifar_resnet", name) for name in _CIFAR},
    "anynet": ("dynamize.models.regnet", "anynet"),
    "regnet": ("dynamize.models.regnet", "regnet"),
    "digits_resnet": ("dynamize.models.digits", "digits_resnet"),
    "digits_resnet_small": ("dynamize.models.digits", "digits_resnet_small"),
}

__all__ = ["REGISTRY", "create"]


def create(name: str, **kwargs: object) -> nn.Module:
    """A freshly initialised network from ``REGISTRY``.

    Raises:
        DynamizeError: the name is unknown.
        TypeError: the factory does not take one of the keyword arguments.
    """
    if name not in REGISTRY:
        raise DynamizeError(f"dynamize has no network {name!r}: use one of {', '.join(REGISTRY)}.")
    module, factory = REGISTRY[name]
    network: nn.Module = getattr(import_module(module), factory)(**kwargs)
    return network
