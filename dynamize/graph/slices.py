"""Some of the channels of one layer: which of its tensors have them, and the layer that has fewer."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

_PLAIN = (
    *(nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.PReLU),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm),
)
_TENSORS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
_SIZES = {
    "out": ("out_channels", "out_features"),
    "in": ("in_channels", "in_features"),
    "each": ("in_channels", "out_channels", "groups", "num_features", "num_parameters", "num_channels", "num_groups"),
}
_RELATIVE = 1e-4  # of the largest output


def blocks_of(module: nn.Module, channels: int) -> int | None:
    """Into how many blocks a layer with parameters or statistics for its channels divides them, of which each is by
    itself: the groups of a grouped convolution or norm, each channel of a batch norm. None for any other module."""
    if isinstance(module, nn.Conv2d):
        return module.groups if module.groups > 1 else None
    if isinstance(module, nn.GroupNorm):
        return module.num_groups
    several = isinstance(module, nn.PReLU) and module.num_parameters == channels
    norms = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
    return channels if several or isinstance(module, norms) else None


def scale_of(module: nn.Module) -> Tensor | None:
    """What a norm multiplies each channel by, (channels,)."""
    norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm)
    return module.weight if isinstance(module, norms) else None


def held(root: nn.Module, target: str, role: str) -> Iterator[tuple[nn.Module, str, int]]:
    """The tensors that have a layer's channels: who holds each, its name there, and the dimension.

    Args:
        target: path of a module, or of a tensor that no layer holds, (C,), (C, 1, 1) or (1, C, 1, 1).
        role: whether the channels are those that the layer makes ("out"), reads ("in"), or both ("each").
    """
    holder, _, name = target.rpartition(".")
    module = root.get_submodule(holder)
    layer = getattr(module, name)
    if isinstance(layer, Tensor):
        yield module, name, max(range(layer.ndim), key=lambda dim: layer.shape[dim])
    elif role == "in":
        yield layer, "weight", 1
    else:
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            if tensor.ndim:
                yield layer, name, 0


def taken(tensor: Tensor, dim: int, units: int, index: Tensor) -> Tensor:
    """A copy with those of its units that the index names, each some neighbouring channels of the dimension."""
    chosen = tensor.unflatten(dim, (units, -1)).index_select(dim, index.to(tensor.device))
    return chosen.flatten(dim, dim + 1).contiguous()


@torch.no_grad()
def keep_first(root: nn.Module, target: str, role: str, units: int, width: int) -> None:
    """Leave all but the first ``width`` of a layer's ``units`` out, in place."""
    for holder, name, dim in held(root, target, role):
        old = getattr(holder, name)
        new = taken(old, dim, units, torch.arange(width))
        setattr(holder, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
    parent, _, last = target.rpartition(".")
    layer = getattr(root.get_submodule(parent), last)
    for name in _SIZES[role] if isinstance(layer, nn.Module) else ():
        if hasattr(layer, name):
            setattr(layer, name, getattr(layer, name) * width // units)


def can_slice(module: nn.Module, role: str, units: int, shape: tuple[int, ...]) -> bool:
    """Whether leaving out input channels ("in"), output channels ("out") or both ("each") leaves the others alone.

    Subclasses are tried out: one that standardises its weights, as in timm's BiT, mixes what it is given.

    Args:
        units: into how many parts, of which some stay, the channels are divided.
        shape: of what the module is given.
    """
    names = {name for name, _ in [*module.named_parameters(), *module.named_buffers()]}
    return names <= _TENSORS and (type(module) in _PLAIN or _tried(module, role, units, shape))


@torch.no_grad()
def _tried(module: nn.Module, role: str, units: int, shape: tuple[int, ...]) -> bool:
    generator = torch.Generator().manual_seed(0)
    whole = copy.deepcopy(module).cpu().float().eval()
    for parameter in whole.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    images = torch.randn(shape, generator=generator)
    fewer = images[:, : shape[1] // units * (units // 2)] if role != "out" else images
    part = nn.Sequential(copy.deepcopy(whole))
    keep_first(part, "0", role, units, units // 2)
    try:
        found = part(fewer.clone())
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    if role == "in":
        images[:, fewer.shape[1] :] = 0
    wanted = whole(images)[:, : found.shape[1]]
    limit = _RELATIVE * float(wanted.abs().max())
    return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=0, atol=limit)
