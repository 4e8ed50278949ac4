"""The layers of a dynamic network, by names that exits and gates do not change, and cutting their tensors smaller."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor, fx, nn

from dynamize.errors import DynamizeError
from dynamize.graph.replace import every_module
from dynamize.nn.network import DynamicNetwork

Sizes = dict[str, list[int]]
_TENSORS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def layers(network: DynamicNetwork) -> dict[str, nn.Module]:
    """Modules that hold tensors themselves, by path in the original network, or ``pieces.NAME...``."""
    found: dict[str, nn.Module] = {}
    for prefix, root in (("", network.plain), ("pieces.", network.pieces)):
        for path, module in root.named_modules():
            if any(True for _ in _tensors(module)):
                found[prefix + path] = module
    return found


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def can_shrink(module: nn.Module) -> bool:
    """Whether this is a layer whose channels can be left out by leaving out parts of its tensors."""
    kinds = (nn.Conv2d, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.PReLU)
    return isinstance(module, kinds) and {name for name, _ in _tensors(module)} <= _TENSORS


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
            found[path] = [max(len(tensor) for _, tensor in _tensors(module) if tensor.ndim)]
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
        shrunk.append(module)
        for _, tensor in _tensors(module):
            if tensor.ndim:
                changed[id(tensor)] = _first(tensor, _shape(module, tensor, size))
    put_tensors(network, changed)
    for module in shrunk:
        read_sizes(module)


def _shape(module: nn.Module, tensor: Tensor, size: Sequence[int]) -> list[int]:
    if tensor.ndim == 1:
        return list(size[:1])
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    inputs = 1 if is_depthwise(module) else size[1] // groups
    return [size[0], inputs, *tensor.shape[2:]]


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


def read_sizes(module: nn.Module) -> None:
    """Make a layer's own account of its sizes agree with its tensors."""
    sized: Iterable[tuple[str, int]] = ()
    if isinstance(module, nn.Conv2d):
        outputs, inputs = module.weight.shape[:2]
        groups = outputs if is_depthwise(module) else module.groups
        sized = (("out_channels", outputs), ("in_channels", inputs * groups), ("groups", groups))
    elif isinstance(module, nn.Linear):
        sized = (("out_features", module.weight.shape[0]), ("in_features", module.weight.shape[1]))
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        held = module.running_mean if module.weight is None else module.weight
        assert held is not None
        sized = (("num_features", len(held)),)
    elif isinstance(module, nn.PReLU):
        sized = (("num_parameters", len(module.weight)),)
    for name, size in sized:
        setattr(module, name, size)
