"""Layers in the place of operators whose channels torch-pruning cannot follow, in a copy of the graph that it reads.

What stands in computes something else; it has as many channels on either side, and says which of them go together.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from dynamize.compression.layers import STATELESS, is_depthwise
from dynamize.compression.ties import Tie
from dynamize.errors import DynamizeError
from dynamize.graph.channelwise import PRODUCTS, SUMS, constants, is_scalar, is_value_per_channel, operator_name
from dynamize.graph.extract import extract
from dynamize.graph.nodes import placeholder

Held = tuple[str, int | None]  # path of a layer, or of a tensor that no layer holds and its dimension

_REDUCTIONS = {"mean", "sum", "amax", "amin", "max", "min", "norm", "std", "var", "prod", "logsumexp", "argmax"}
_CHUNKS = {"chunk", "split", "tensor_split"}
_SHUFFLES = {"pixel_shuffle": nn.PixelShuffle, "pixel_unshuffle": nn.PixelUnshuffle}


@dataclass(frozen=True)
class Stand:
    """What a module of the copy stands for.

    Attributes:
        key: its name among places (:mod:`dynamize.compression.ties`).
        held: by side ("out", "in", "each"), the layers and tensors in which its channels are cut; none on a side where
            nothing has to be cut.
        ties: which of its channels go together.
        opaque: whether all channels that it has on either side must stay.
    """

    key: str
    held: Mapping[str, tuple[Held, ...]] = field(default_factory=dict)
    ties: Tie = field(default_factory=dict)
    opaque: bool = False


class _Mixing(nn.Conv2d):
    """A 1x1 convolution from a map to one of another size."""

    def __init__(self, inputs: int, outputs: int, shape: tuple[int, ...]) -> None:
        super().__init__(inputs, outputs, 1)
        self.shape = shape

    def forward(self, features: Tensor) -> Tensor:
        pooled = functional.adaptive_avg_pool2d(features.to(self.weight), cast(Any, self.shape[-2:]))
        return super().forward(pooled).to(features)  # a mask stays one


def put_stand_ins(traced: fx.GraphModule) -> dict[nn.Module, Stand]:
    """Change an annotated graph in place; what stands in it now, and for what."""
    return _Places(traced).put()


class _Places:
    def __init__(self, traced: fx.GraphModule) -> None:
        self.traced, self.graph = traced, traced.graph
        self.constants = constants(traced.graph)
        self.stands: dict[nn.Module, Stand] = {}

    def put(self) -> dict[nn.Module, Stand]:
        for node in list(self.graph.nodes):
            if node.op in ("call_module", "call_function", "call_method"):
                self._consider(node)
        self.graph.eliminate_dead_code()
        self.traced.recompile()
        return self.stands

    def _consider(self, node: fx.Node) -> None:
        module = self.traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        if node.kwargs.get("inplace"):
            node.update_kwarg("inplace", False)  # torch-pruning loses whose output it was
        if isinstance(module, STATELESS) and len(node.meta["shape"]) == 4:
            self._norm(node, str(node.target), module)
        elif isinstance(module, nn.Conv2d) and module.groups > 1 and not is_depthwise(module):
            self._grouped(node, str(node.target), module.groups)
        elif node.target is functional.conv2d:
            self._bare_convolution(node)
        elif node.target is functional.batch_norm:
            self._per_channel(node, [one for one in node.all_input_nodes if one.op == "get_attr"])
        elif isinstance(module, nn.PReLU) and module.num_parameters == 1:
            self._replace(node, node.all_input_nodes[0], nn.LeakyReLU(), Stand(f"#{node.name}"))
        elif node.target in (torch.cat, torch.concat) and len(node.meta["shape"]) == 4:
            self._joined(node)
        elif self._shuffle(node, module) or self._scaled(node) or self._pieces(node) or self._rearranged(node):
            return
        elif single := list(self._broadcast(node)):
            self._spread(node, single)
        elif sources := [*self._cut(node), *self._hidden(node)]:
            self._opaque(node, sources)

    # each kind

    def _grouped(self, node: fx.Node, path: str, groups: int) -> None:
        source: fx.Node = node.all_input_nodes[0]
        inputs, outputs = source.meta["shape"][1], node.meta["shape"][1]
        blocks = {side: [c * groups // size for c in range(size)] for side, size in (("in", inputs), ("out", outputs))}
        self._mixing(node, source, path, blocks, {"out": ((path, None),)})

    def _bare_convolution(self, node: fx.Node) -> None:
        """A convolution with tensors of the network (an option-A shortcut)."""
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        weight, bias = given.get("weight"), given.get("bias")
        tensors = [one for one in (weight, bias) if isinstance(one, fx.Node)]
        if given.get("groups", 1) != 1 or any(one.op != "get_attr" for one in tensors):
            self._opaque(node, [cast(fx.Node, given["input"])])
            return
        path = str(cast(fx.Node, weight).target)
        out = tuple((str(one.target), 0) for one in tensors)
        self._mixing(node, node.all_input_nodes[0], path, {}, {"out": out, "in": ((path, 1),)})

    def _per_channel(self, node: fx.Node, leaves: Iterable[fx.Node]) -> None:
        """Something with a value for each channel, held by tensors of the network."""
        held = [(str(leaf.target), _longest(leaf.meta["shape"])) for leaf in leaves]
        source = next(one for one in node.all_input_nodes if one not in self.constants)
        keys = "+".join(sorted(path for path, _ in held))
        self._replace(node, source, nn.BatchNorm2d(node.meta["shape"][1]), Stand(keys, {"each": tuple(held)}))

    def _norm(self, node: fx.Node, path: str, norm: nn.Module) -> None:
        """A norm of groups of channels, which only go together, or of each by itself."""
        channels: int = node.meta["shape"][1]
        blocks = norm.num_groups if isinstance(norm, nn.GroupNorm) else channels
        ties = {(path, "each"): [c * blocks // channels for c in range(channels)]}
        self._replace(
            node,
            node.all_input_nodes[0],
            nn.BatchNorm2d(channels),
            Stand(path, {"each": ((path, None),)}, ties if blocks < channels else {}),
        )

    def _joined(self, node: fx.Node) -> None:
        """A concatenation: torch-pruning has to see how many channels come from where."""
        for i, source in enumerate(node.all_input_nodes):
            if self._is_still(source):
                self._opaque(source, [placeholder(self.graph)])
            else:
                self._mark(source, node, f"_{node.name}_counted_{i}")
        self._mark(node, None, f"_{node.name}_counted_all")

    def _mark(self, node: fx.Node, reader: fx.Node | None, name: str) -> None:
        """Let a reader, or all of them, read a map through a layer with as many channels."""
        layer = nn.BatchNorm2d(node.meta["shape"][1])
        self.traced.add_module(name, layer)
        self.stands[layer] = Stand(f"#{name}")
        with self.graph.inserting_after(node):
            marked = self.graph.call_module(name, (node,))
        marked.meta.update(node.meta)
        users = [reader] if reader is not None else [user for user in node.users if user is not marked]
        for user in users:
            user.replace_input_with(node, marked)

    def _pieces(self, node: fx.Node) -> bool:
        """Chunks of the channels: of each of them the same channel goes, so that they stay of one size."""
        name = _name(node)
        users = list(node.users)
        if name not in _CHUNKS or not users or not all(_is_piece(user) for user in users):
            return False
        source = node.all_input_nodes[0]
        channels, size = source.meta["shape"][1], users[0].meta["shape"][1]
        if channels % size or size == channels or any(user.meta["shape"][1] != size for user in users):
            return False
        keys = [f"#{user.name}" for user in users]
        tie = {(key, "in"): [c % size for c in range(channels)] for key in keys}
        tie |= {(key, "out"): list(range(size)) for key in keys}
        for key, user in zip(keys, users, strict=True):
            stand = Stand(key, ties=tie if key == keys[0] else {})
            self._replace(user, source, _Mixing(channels, size, user.meta["shape"]), stand)
        return True

    def _rearranged(self, node: fx.Node) -> bool:
        """Channels in rows, of each of which the same one goes, handed on in another order (a channel shuffle)."""
        before = [one for one in node.all_input_nodes if len(one.meta.get("shape") or ()) == 5]
        maps = _maps_behind(node) if before and len(node.meta["shape"] or ()) == 4 else []
        if len(maps) != 1 or maps[0].meta["shape"] != node.meta["shape"]:
            return False
        rows = _rows(before[0])
        order = _order(self.traced, maps[0], node) if rows else None
        if order is None:
            return False
        size = len(order) // rows
        ties = {"in": [c % size for c in range(len(order))], "out": [c % size for c in order]}
        self._mixing(node, maps[0], f"#{node.name}", ties, {})
        return True

    def _shuffle(self, node: fx.Node, module: nn.Module | None) -> bool:
        """Positions become channels, or channels become positions."""
        name = operator_name(node) or _name(node)
        kind = next((one for one, cls in _SHUFFLES.items() if name == one or isinstance(module, cls)), None)
        if kind is None or len(node.meta["shape"] or ()) != 4:
            return False
        inputs, outputs = node.all_input_nodes[0].meta["shape"][1], node.meta["shape"][1]
        few = min(inputs, outputs)
        ties = {side: [c * few // size for c in range(size)] for side, size in (("in", inputs), ("out", outputs))}
        self._mixing(node, node.all_input_nodes[0], f"#{node.name}", ties, {})
        return True

    def _scaled(self, node: fx.Node) -> bool:
        tensors = [one for one in node.all_input_nodes if one not in self.constants]
        values = [one for one in node.all_input_nodes if one in self.constants and not is_scalar(one)]
        if operator_name(node) not in (*PRODUCTS, *SUMS) or len(tensors) != 1 or not values:
            return False
        if node.meta["shape"] != tensors[0].meta["shape"] or len(node.meta["shape"]) != 4:
            return False
        if not all(is_value_per_channel(one, self.constants[one], tensors[0]) for one in values):
            return False
        leaves = {leaf for one in values for leaf in self.constants[one] if not is_scalar(leaf)}
        self._per_channel(node, sorted(leaves))
        return True

    def _broadcast(self, node: fx.Node) -> Iterator[fx.Node]:
        """The maps of one channel that an operator reads beside a map of as many channels as it gives."""
        maps = [one for one in node.all_input_nodes if one not in self.constants and len(_shape(one)) == 4]
        if node.op == "call_module" or len(_shape(node)) != 4 or _shape(node)[1] == 1:
            return
        if any(_shape(one)[1] == _shape(node)[1] for one in maps):
            yield from (one for one in maps if _shape(one)[1] == 1)

    def _cut(self, node: fx.Node) -> Iterator[fx.Node]:
        """The map that is split into pieces of sizes that are written down, of which this is one."""
        if _is_piece(node) and not _shape(node.all_input_nodes[0]) and _name(node.all_input_nodes[0]) in _CHUNKS:
            yield node.all_input_nodes[0].all_input_nodes[0]

    def _hidden(self, node: fx.Node) -> Iterator[fx.Node]:
        """The maps that an operator reads whose channels are no channels of what it gives."""
        shape = node.meta.get("shape")
        if shape is None or len(shape) not in (3, 4):
            return
        sources = [one for one in node.all_input_nodes if one.meta.get("shape")]
        if any(len(one.meta["shape"]) > 4 for one in sources):
            yield from _maps_behind(node)
            return
        call = node
        if operator_name(node) == "getitem" and node.args[1] == 0 and not sources:
            call = node.all_input_nodes[0]
        read = [one for one in call.all_input_nodes if len(one.meta.get("shape") or ()) == 4]
        name = _name(call)
        if len(read) == 1 and name in _REDUCTIONS and shape[1] != read[0].meta["shape"][1]:
            yield read[0]

    def _is_still(self, node: fx.Node) -> bool:
        """Whether a map does not depend on the images."""
        waiting, seen = [node], {node}
        while waiting:
            one = waiting.pop()
            if one.op == "placeholder":
                return False
            new = [source for source in one.all_input_nodes if source not in seen and source.meta.get("shape")]
            seen |= set(new)
            waiting += new
        return len(node.meta["shape"]) == 4

    # exchanging nodes

    def _mixing(
        self,
        node: fx.Node,
        source: fx.Node,
        key: str,
        blocks: Mapping[str, list[int]],
        held: Mapping[str, tuple[Held, ...]],
    ) -> None:
        shape = node.meta["shape"]
        stand = Stand(key, held, {(key, side): labels for side, labels in blocks.items()})
        self._replace(node, source, _Mixing(source.meta["shape"][1], shape[1], shape), stand)

    def _spread(self, node: fx.Node, single: list[fx.Node]) -> None:
        """Let an operator read maps of one channel as maps with a channel for each of its own."""
        for i, source in enumerate(single):
            name = f"_{node.name}_spread_{i}"
            layer = _Mixing(1, node.meta["shape"][1], source.meta["shape"])
            self.traced.add_module(name, layer)
            self.stands[layer] = Stand(f"#{name}")
            with self.graph.inserting_before(node):
                spread = self.graph.call_module(name, (source,))
            spread.meta.update(source.meta)
            node.replace_input_with(source, spread)

    def _opaque(self, node: fx.Node, sources: list[fx.Node]) -> None:
        shape = node.meta["shape"]
        maps = [one for one in sources if len(one.meta["shape"]) == 4]
        if not maps:
            return
        outputs = shape[1] if len(shape) == 4 else 1
        made = []
        for i, source in enumerate(maps):
            name = f"_{node.name}_stands_in_{i}"
            layer = _Mixing(source.meta["shape"][1], outputs, shape)
            self.traced.add_module(name, layer)
            self.stands[layer] = Stand(f"#{name}", opaque=True)
            with self.graph.inserting_before(node):
                made.append(self.graph.call_module(name, (source,)))
        with self.graph.inserting_before(node):
            total = made[0]
            for other in made[1:]:
                total = self.graph.call_function(torch.add, (total, other))
            if len(shape) == 3:
                total = self.graph.call_method("squeeze", (total, 1))
        self._put(node, total)

    def _replace(self, node: fx.Node, source: fx.Node, layer: nn.Module, stand: Stand) -> None:
        name = f"_{node.name}_stands_in"
        self.traced.add_module(name, layer)
        self.stands[layer] = stand
        with self.graph.inserting_before(node):
            self._put(node, self.graph.call_module(name, (source,)))

    def _put(self, node: fx.Node, other: fx.Node) -> None:
        other.meta.update(node.meta)
        node.replace_all_uses_with(other)


def _shape(node: fx.Node) -> tuple[int, ...]:
    return node.meta.get("shape") or ()


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def _longest(shape: tuple[int, ...]) -> int:
    return max(range(len(shape)), key=lambda dim: shape[dim])


def _maps_behind(node: fx.Node) -> list[fx.Node]:
    """The feature maps (N, C, H, W) of which tensors with more dimensions were made."""
    found: dict[fx.Node, None] = {}
    waiting = [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            shape = source.meta.get("shape") or ()
            if len(shape) > 4:
                waiting.append(source)
            elif len(shape) == 4:
                found[source] = None
    return list(found)


def _is_piece(node: fx.Node) -> bool:
    return operator_name(node) == "getitem" and len(node.meta.get("shape") or ()) == 4


def _rows(node: fx.Node) -> int:
    """The second of five dimensions where they were first made; 0 for none."""
    shape: tuple[int, ...] = node.meta["shape"]
    source = node.all_input_nodes[0]
    if len(source.meta.get("shape") or ()) == 5:
        return _rows(source)
    return shape[1] if shape[1] * shape[2] == source.meta["shape"][1] else 0


@torch.no_grad()
def _order(traced: fx.GraphModule, source: fx.Node, node: fx.Node) -> list[int] | None:
    """Which channel each one was, if a region does nothing but put channels in another order."""
    channels = source.meta["shape"][1]
    try:
        region = extract(traced, source.name, node.name)
        found = [_moved(region, numbers) for numbers in (torch.arange(channels), torch.arange(channels).flip(0))]
    except (RuntimeError, ValueError, DynamizeError):
        return None
    first, second = found
    return first if first is not None and first == second and sorted(first) == list(range(channels)) else None


def _moved(region: fx.GraphModule, numbers: Tensor) -> list[int] | None:
    """The place in ``numbers`` (C,) of what each channel of a region's answer holds."""
    shape = placeholder(region.graph).meta["shape"]
    answer = region(numbers.float().view(1, -1, 1, 1).expand(shape).contiguous())
    if answer.shape != shape or not torch.equal(answer, answer[:, :, :1, :1].expand(shape)):
        return None
    places = {int(number): place for place, number in enumerate(numbers)}
    return [places.get(int(one), -1) for one in answer[0, :, 0, 0]]
