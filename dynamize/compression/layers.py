"""The layers of a dynamic network, by names that exits and gates do not change, and cutting their tensors smaller."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor, fx, nn

from dynamize.errors import DynamizeError
from dynamize.graph.replace import every_module
from dynamize.nn.network import DynamicNetwork

Sizes = dict[str, list[int]]
STATELESS = (nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)  # norms that may hold no tensors
_TENSORS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def layers(network: DynamicNetwork) -> dict[str, nn.Module]:
    """Modules that hold tensors themselves, and norms, by path in the original network, ``MEMBER/...`` in others of the
    row, or ``pieces.NAME...``."""
    found: dict[str, nn.Module] = {}
    for prefix, root in [*network.graphs.items(), ("pieces.", network.pieces)]:
        for path, module in root.named_modules():
            if isinstance(module, STATELESS) or any(True for _ in _tensors(module)):
                found[prefix + path] = module
    return found


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def can_shrink(module: nn.Module) -> bool:
    """Whether this is a layer whose channels can be left out by leaving out parts of its tensors."""
    kinds = (nn.Conv2d, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.PReLU, *STATELESS)
    return isinstance(module, kinds) and {name for name, _ in _tensors(module)} <= _TENSORS


def channels_of(module: nn.Module) -> int:
    """Of a layer that treats channels by themselves, or groups of them."""
    if isinstance(module, STATELESS):
        return module.num_channels if isinstance(module, nn.GroupNorm) else module.num_features
    return max(len(tensor) for _, tensor in _tensors(module) if tensor.ndim)


def is_depthwise(module: nn.Module) -> bool:
    """A convolution that treats each channel by itself."""
    return isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels == module.out_channels


def dimensions(module: nn.Module, side: str) -> list[tuple[str, int]]:
    """The tensors of a layer with a dimension for its channels on a side ("out", "in" or "each"), and which one."""
    if side == "in":
        return [("weight", 1)]
    return [(name, 0) for name, tensor in _tensors(module) if tensor.ndim]


def place(network: DynamicNetwork, path: str) -> tuple[nn.Module, str]:
    """The module that holds the tensor of this path itself, and the tensor's name in it."""
    holder, _, name = path.rpartition(".")
    module = layers(network).get(holder)
    if module is None or name not in dict(_tensors(module)):
        raise DynamizeError(
            f"the network has no tensor `{path}`: the step was made for another network. Apply it to the one it was "
            "made for, or let it decide again."
        )
    return module, name


def sizes(network: DynamicNetwork) -> Sizes:
    """[outputs, inputs] of each convolution and linear layer, [channels] of each layer that treats channels by
    themselves, and the shapes of tensors that no layer holds, by path."""
    found: Sizes = {}
    for path, module in layers(network).items():
        if isinstance(module, nn.Conv2d):
            found[path] = [module.out_channels, module.in_channels]
        elif isinstance(module, nn.Linear):
            found[path] = [module.out_features, module.in_features]
        elif can_shrink(module):
            found[path] = [channels_of(module)]
        elif type(module) is nn.Module or isinstance(module, fx.GraphModule):  # fx holds single tensors in these
            found.update({f"{path}.{name}".lstrip("."): list(tensor.shape) for name, tensor in _tensors(module)})
    return found


def resize(network: DynamicNetwork, wanted: Mapping[str, Sequence[int]]) -> None:
    """Give layers these sizes, as :func:`sizes` has them, in place: each keeps its first channels.

    Raises:
        DynamizeError: a name is unknown or a size is not from 1 to what the layer has. Nothing was changed.
    """
    known, has = layers(network), sizes(network)
    for path, size in wanted.items():
        fits = path in has and len(size) == len(has[path])
        if not fits or not all(1 <= new <= old for new, old in zip(size, has[path], strict=True)):
            raise DynamizeError(
                f"`{path}` cannot be given the size {list(size)}, it has {has.get(path, 'none')}: the step was made "
                "for another network. Apply it to the one it was made for, or let it decide again."
            )
    changed: dict[int, Tensor] = {}
    shrunk = []
    for path, size in wanted.items():
        if path not in known:
            module, name = place(network, path)
            changed[id(getattr(module, name))] = _first(getattr(module, name), size)
            continue
        module = known[path]
        shrunk.append((module, size[0]))
        for _, tensor in _tensors(module):
            if tensor.ndim:
                changed[id(tensor)] = _first(tensor, _shape(module, tensor, size))
    put_tensors(network, changed)
    for module, channels in shrunk:
        read_sizes(module, channels)


def _shape(module: nn.Module, tensor: Tensor, size: Sequence[int]) -> list[int]:
    if tensor.ndim == 1:
        return list(size[:1])
    grouped = isinstance(module, nn.Conv2d) and module.groups > 1  # its groups go whole
    return [size[0], tensor.shape[1] if grouped else size[1], *tensor.shape[2:]]


def _first(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    return tensor.detach()[tuple(slice(length) for length in shape)].clone()


def put_tensors(network: DynamicNetwork, changed: Mapping[int, Tensor]) -> None:
    """Put new tensors in the place of others, wherever the network holds them.

    Args:
        changed: by ``id`` of the tensor that goes.
    """
    for module in every_module(network):
        for name, old in list(_tensors(module)):
            if id(old) not in changed:
                continue
            new = changed[id(old)].contiguous()
            if isinstance(old, nn.Parameter):
                module._parameters[name] = nn.Parameter(new, old.requires_grad)
            else:
                module._buffers[name] = new
                module._non_persistent_buffers_set.discard(name)  # the source can make the old values only


def read_sizes(module: nn.Module, channels: int) -> None:
    """Make a layer's own account of its sizes agree with its tensors.

    Args:
        channels: that it has now: what a convolution or linear layer gives, or what a norm treats.
    """
    sized: Iterable[tuple[str, int]] = ()
    if isinstance(module, nn.Conv2d):
        inputs = module.weight.shape[1]
        groups = channels * module.groups // module.out_channels if module.groups > 1 else 1
        sized = (("out_channels", channels), ("in_channels", inputs * groups), ("groups", groups))
    elif isinstance(module, nn.Linear):
        sized = (("out_features", channels), ("in_features", module.weight.shape[1]))
    elif isinstance(module, nn.GroupNorm):
        sized = (("num_groups", channels * module.num_groups // module.num_channels), ("num_channels", channels))
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        sized = (("num_features", channels),)
    elif isinstance(module, nn.PReLU):
        sized = (("num_parameters", channels),)
    for name, size in sized:
        setattr(module, name, size)
