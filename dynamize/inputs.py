"""Which images networks are usually given: (C, H, W)."""

from collections.abc import Sequence

from torch import nn

from dynamize.sources import SourceSpec

_KNOWN_SIZES = {"cifar_": 32, "digits": 8, "inception_v3": 299}
_USUAL_SIZE = 224


def known_input(spec: SourceSpec, network: nn.Module) -> tuple[int, int, int] | None:
    """What a network of this name was made for, where its library says so; the channels are those of its first
    convolution."""
    configured = getattr(network, "pretrained_cfg", None) or {}  # timm
    if "input_size" in configured:
        _, height, width = configured["input_size"]
    else:
        size = next((size for part, size in _KNOWN_SIZES.items() if part in spec.target[1]), None)
        if size is None or spec.names_code:
            return None
        height = width = size
    return _channels(network), height, width


def usual_input(spec: SourceSpec, network: nn.Module) -> tuple[int, int, int]:
    """The same, or 224 pixels where nothing is known."""
    return known_input(spec, network) or (_channels(network), _USUAL_SIZE, _USUAL_SIZE)


def other_size(spec: SourceSpec, network: nn.Module, given: Sequence[int]) -> list[str]:
    """What to say where a network is given images of another size than it was made for."""
    known = known_input(spec, network)
    if known is None or tuple(given) == known:
        return []
    told = " x ".join(map(str, known))
    return [
        f"{spec.source} was made for {told} images and is given {' x '.join(map(str, given))}: if that is not meant, "
        f"write --input {','.join(map(str, known))} (model.input)"
    ]


def _channels(network: nn.Module) -> int:
    first = next((one for one in network.modules() if isinstance(one, nn.Conv2d)), None)
    return first.in_channels if first else 3
