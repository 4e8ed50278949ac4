"""Modules that say where in an image to look, from the last feature map (n, C, h, w) of a glance at all of it.

:class:`ClassMap` and :class:`Occlusion` say how much of the glance's answer hangs on each cell of the map, and
:class:`Peaks` makes places of that. A place is where a crop begins, from 0 to 1 of where it may.
"""

import copy
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import linear

from dynamize.graph.evidence import classifier
from dynamize.graph.extract import extract

Share = tuple[float, float]  # of each side of the image that a crop holds, of height and width
_SUREST = 3  # classes whose evidence is added up


class Where(nn.Module):
    """A map (n, C, h, w) -> what places are made of, (n, D).

    Attributes:
        learns: whether it is trained by gradients that reach places.
    """

    learns: ClassVar[bool] = False

    @property
    @abstractmethod
    def described(self) -> int:
        """D."""

    def settle(self, plain: fx.GraphModule, node: str) -> None:
        """Take from the network whose ``node`` gives the map what makes logits of it."""

    def hold(self) -> None:
        """Keep that as it is now, where it is about to be compiled or rounded."""


class Evidence(Where):
    """By how much the logits of the surest classes, weighed by how likely these are, would fall without each cell of
    the map, (n, P).

    Attributes:
        grid: rows and columns of cells, whose product is P.
    """

    grid: tuple[int, int]

    @property
    def described(self) -> int:
        return self.grid[0] * self.grid[1]


class ClassMap(Evidence):
    """Evidence in a network that ends in the mean of the map and a linear layer: its class activation map (Zhou et al.
    2016), which costs no more than the linear layer. Steps behind may put a product of linear layers in its place.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.grid = size
        self._linear: tuple[nn.Module, ...] = ()
        self.register_buffer("weight", None)
        self.register_buffer("bias", None)

    def settle(self, plain: fx.GraphModule, node: str) -> None:
        self._linear = (classifier(plain),)

    def hold(self) -> None:
        if self.weight is None:
            layers = self._layers
            self.weight = reduce(lambda product, layer: layer.weight @ product, layers[1:], layers[0].weight).detach()
            self.bias = self._linear[0](torch.zeros_like(self.weight[:1])).detach()[0]

    @property
    def _layers(self) -> list[nn.Linear]:
        return [one for one in self._linear[0].modules() if isinstance(one, nn.Linear)]

    def forward(self, map_NCHW: Tensor) -> Tensor:
        means = map_NCHW.mean((2, 3))
        if self.weight is None:
            logits = self._linear[0](means)
            *before, last = [layer.weight.detach() for layer in self._layers]
        else:
            logits = linear(means, self.weight, self.bias)
            before, last = [], self.weight
        top = logits.topk(min(_SUREST, len(last)), dim=1)
        rows = torch.bmm(top.values.softmax(1)[:, None].to(last.dtype), last[top.indices])[:, 0]
        for matrix in reversed(before):
            rows = rows @ matrix
        cells = map_NCHW.reshape(-1, map_NCHW.shape[1], self.described)
        return torch.bmm(rows[:, None], cells.to(rows.dtype))[:, 0]


class Occlusion(Evidence):
    """Evidence in any network: what makes logits of the map is run again without each cell (Zeiler & Fergus 2014, on
    the map in the place of the image). In a network of means and a linear layer this is the class activation map.

    Args:
        shape: of the map, (C, h, w).
        share: cells are no larger than a crop, so that there are few.
    """

    keeps: Tensor
    tail: nn.Module | None

    def __init__(self, shape: tuple[int, int, int], share: Share) -> None:
        super().__init__()
        self.grid = tuple(min(side, ceil(1 / part)) for side, part in zip(shape[1:], share, strict=True))  # type: ignore
        rows, columns = (torch.arange(side) * cells // side for side, cells in zip(shape[1:], self.grid, strict=True))
        cells = rows[:, None] * self.grid[1] + columns
        numbers = torch.arange(-1, self.grid[0] * self.grid[1])  # the first keeps all
        self.register_buffer("keeps", (cells[None] != numbers[:, None, None]).float()[:, None], persistent=False)
        self._tail: tuple[nn.Module, ...] = ()
        self.tail = None

    def settle(self, plain: fx.GraphModule, node: str) -> None:
        self._tail = (extract(plain, node, None),)

    def hold(self) -> None:
        if self.tail is None:
            self.tail = copy.deepcopy(self._tail[0])

    def forward(self, map_NCHW: Tensor) -> Tensor:
        tail, count = self.tail or self._tail[0], len(self.keeps)
        occluded = map_NCHW[:, None] * self.keeps.to(map_NCHW.dtype)
        with evaluating(tail):
            logits = tail(occluded.reshape(-1, *map_NCHW.shape[1:]))
        every = logits.reshape(-1, count, logits.shape[1])
        top = every[:, 0].topk(min(_SUREST, logits.shape[1]), dim=1)
        without = every[:, 1:].gather(2, top.indices[:, None].expand(-1, count - 1, -1))
        fallen = top.values[:, None] - without
        return torch.bmm(fallen, top.values.softmax(1)[:, :, None])[:, :, 0]


class Peaks(nn.Module):
    """Evidence (n, P) -> places (n, 2 * crops): crops around the cells with most of it, each next one where no crop
    before has looked.

    Args:
        grid: rows and columns of cells.
        crops: how many.
        share: of each side of the image that a crop holds.
    """

    starts: Tensor
    near: Tensor

    def __init__(self, grid: tuple[int, int], crops: int, share: Share) -> None:
        super().__init__()
        self.crops = crops
        centres = cell_centres(grid)
        self.register_buffer("starts", start(centres, torch.tensor(share)), persistent=False)
        apart = (centres[:, None] - centres).abs()
        self.register_buffer("near", (apart < torch.tensor(share) / 2).all(2).float(), persistent=False)

    def forward(self, evidence_NP: Tensor) -> Tensor:
        peak = evidence_NP.argmax(1)
        places = [self.starts[peak]]
        for _ in range(1, self.crops):  # what was looked at is looked at again last of all
            span = evidence_NP.amax(1, keepdim=True) - evidence_NP.amin(1, keepdim=True) + 1
            evidence_NP = evidence_NP - self.near[peak] * span
            peak = evidence_NP.argmax(1)
            places.append(self.starts[peak])
        return torch.cat(places, 1)


def cell_centres(grid: tuple[int, int]) -> Tensor:
    """Of an image cut into cells, (P, 2): y and x from 0 to 1."""
    ys, xs = ((torch.arange(count) + 0.5) / count for count in grid)
    return torch.cartesian_prod(ys, xs)


def start(centres: Tensor, sides: Tensor) -> Tensor:
    """Where crops around these centres (..., 2) begin, from 0 to 1 of where they may; ``sides`` are their shares."""
    return ((centres - sides / 2) / (1 - sides).clamp(min=1e-6)).clamp(0, 1)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """A module in eval mode inside the block, whatever it is in outside."""
    training = [one for one in module.modules() if one.training]
    for one in training:
        one.training = False
    try:
        yield
    finally:
        for one in training:
            one.training = True
