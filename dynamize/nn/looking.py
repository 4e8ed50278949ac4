"""Where to look: pieces that read a glance at the whole image and say where crops of it lie, and the crop itself.

A row ``glance, Map, Look, Answer, Crop, focus, Answer, ..., Restart, whole, Verdict`` is glance and focus (Wang et al.
2020, GFNet), with the original network on the whole image behind the last crop. A policy is the pieces that write
``PLACES``; where none did, crops are from the middle.
"""

import copy
from collections.abc import Mapping
from functools import reduce
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from dynamize.graph.macs import counting_macs
from dynamize.nn.cascade import KEPT, PLACES, Restart, restart
from dynamize.nn.flow import Flow
from dynamize.nn.instructions import Carry, Describe, Draw, Instruction, Rows
from dynamize.nn.instructions import Crop as CutOut
from dynamize.nn.piece import Call, Choose, Part, Piece, Run, Setting

MAP = "map"  # (n, C * h * w), in what a flow carries: the last feature map of the glance
Policy = Literal["activation", "centre", "random"]
_SUREST = 3  # classes whose evidence is added up
_DRAWN = 997  # places that random crops are drawn from


class Passing(Piece):
    """A piece that only reads what passes, and notes what it finds among what images carry."""

    @property
    def passes(self) -> bool:
        return True

    def parts(self) -> list[Part]:
        return []

    def note(self, flow: Flow) -> None:
        """What it does, in torch."""

    def bind(self, calls: Mapping[str, Call]) -> Run:
        def run(flow: Flow, setting: Setting) -> None:
            self.note(flow)

        return run

    def dense(self, flow: Flow, choose: Choose) -> None:
        with torch.no_grad():
            self.note(flow)

    def count(self, flow: Flow) -> None:
        with counting_macs() as counted:
            self.note(flow)
        self.macs = counted()


class Map(Passing):
    """Keeps the feature map that passes."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Flatten()

    @property
    def own_name(self) -> str:
        return MAP

    def parts(self) -> list[Part]:
        return [Part("gate", "gate", self.flat)]

    def bind(self, calls: Mapping[str, Call]) -> Run:
        describe = calls["gate"]

        def run(flow: Flow, setting: Setting) -> None:
            flow.extra[MAP] = describe(flow.features)

        return run

    def note(self, flow: Flow) -> None:
        flow.extra[MAP] = self.flat(flow.features.detach())

    def instruct(self, files: Mapping[str, str]) -> Instruction:
        return Describe(files["gate"], MAP)


class Look(Passing):
    """Crops at the peaks of the class activation map (Zhou et al. 2016) of the surest classes of a glance.

    Args:
        linear: the network's classifier, which registers it; it reads channel means of the map. Steps behind may put
            a product of linear layers in its place, and take channels out of it and the map.
        size: of the map, (h, w).
        crops: how many.
        share: of each side of the image that a crop holds, of height and width.
    """

    def __init__(self, linear: nn.Module, size: tuple[int, int], crops: int, share: tuple[float, float]) -> None:
        super().__init__()
        self.peaks = Peaks(linear, size, crops, share)

    @property
    def own_name(self) -> str:
        return "look"

    def note(self, flow: Flow) -> None:
        flow.extra[PLACES] = self.peaks(flow.features, flow.extra.pop(MAP))

    def freeze(self) -> None:
        self.peaks.hold()

    def instruct(self, files: Mapping[str, str]) -> Instruction:
        classes, channels = self.peaks.matrices[-1].shape[0], self.peaks.matrices[0].shape[1]
        takes = {"features": classes, MAP: channels * len(self.peaks.ys)}
        alone = copy.deepcopy(self.peaks)
        alone.hold()
        return Carry(Rows(alone, takes, (f"next_{PLACES}",)))


class Peaks(nn.Module):
    """Logits (n, classes) and a map (n, C * h * w) -> places (n, 2 * crops)."""

    ys: Tensor
    xs: Tensor
    weight: Tensor | None

    def __init__(self, linear: nn.Module, size: tuple[int, int], crops: int, share: tuple[float, float]) -> None:
        super().__init__()
        self._linear = (linear,)
        self.crops, self.share = crops, share
        height, width = size
        ys, xs = ((torch.arange(count) + 0.5) / count for count in (height, width))
        self.register_buffer("ys", ys.repeat_interleave(width), persistent=False)
        self.register_buffer("xs", xs.repeat(height), persistent=False)
        self.register_buffer("weight", None)

    @property
    def matrices(self) -> list[Tensor]:
        """Whose product maps channel means to logits, but for the bias; the first is applied first."""
        if self.weight is not None:
            return [self.weight]
        return [one.weight.detach() for one in self._linear[0].modules() if isinstance(one, nn.Linear)]

    def hold(self) -> None:
        """Keep the classifier's weights, where they are about to be rounded."""
        self.weight = reduce(lambda product, matrix: matrix @ product, self.matrices).clone()

    def forward(self, logits_NC: Tensor, map_ND: Tensor) -> Tensor:
        *before, last = self.matrices
        top = logits_NC.topk(min(_SUREST, last.shape[0]), dim=1)
        rows = (top.values.softmax(1)[:, :, None].to(last.dtype) * last[top.indices]).sum(1)
        for matrix in reversed(before):
            rows = rows @ matrix
        maps = map_ND.reshape(-1, rows.shape[1], len(self.ys)).to(rows.dtype)
        evidence = torch.bmm(rows[:, None], maps)[:, 0]
        places: list[Tensor] = []
        for _ in range(self.crops):
            peak = evidence.argmax(1)
            y, x = self.ys[peak][:, None], self.xs[peak][:, None]
            places += [_start(y, self.share[0]), _start(x, self.share[1])]
            near = ((self.ys - y).abs() < self.share[0] / 2) & ((self.xs - x).abs() < self.share[1] / 2)
            span = evidence.amax(1, keepdim=True) - evidence.amin(1, keepdim=True) + 1
            evidence = evidence - near.to(evidence.dtype) * span  # seen already: looked at again last of all
        return torch.cat(places, 1).to(logits_NC.dtype)


def _start(centre: Tensor, share: float) -> Tensor:
    """Where a crop around ``centre`` begins, from 0 to 1 of where it may."""
    return ((centre - share / 2) / max(1e-6, 1 - share)).clamp(0, 1)


class Anywhere(Passing):
    """Crops at random places, the same for the same image: the control of every policy.

    Args:
        crops: how many.
        seed: of the places.
    """

    def __init__(self, crops: int, seed: int = 0) -> None:
        super().__init__()
        self.table = np.random.RandomState(seed).random_sample((_DRAWN, 2 * crops)).astype(np.float32)

    @property
    def own_name(self) -> str:
        return "look"

    def note(self, flow: Flow) -> None:
        middle = flow.images[torch.from_numpy(flow.rows), :, flow.images.shape[2] // 2].float().cpu().numpy()
        drawn = middle.view(np.uint32).sum(axis=(1, 2), dtype=np.uint64) % _DRAWN
        flow.extra[PLACES] = torch.from_numpy(self.table[drawn]).to(flow.features)

    def instruct(self, files: Mapping[str, str]) -> Instruction:
        return Draw([row.tolist() for row in self.table])


class Crop(Restart):
    """Back to the images, of which each that is still on its way shows one crop.

    Args:
        number: which of the places it is at, from 0.
        side: (H, W) of the crop in pixels.
    """

    cuts = True

    def __init__(self, number: int, side: tuple[int, int]) -> None:
        super().__init__()
        self.number, self.side = number, side

    @property
    def own_name(self) -> str:
        return "crop"

    def go_back(self, flow: Flow) -> None:
        restart(flow)
        places = flow.extra.get(PLACES)
        free = (flow.images.shape[2] - self.side[0], flow.images.shape[3] - self.side[1])
        known = None if places is None else places.detach().float().cpu().numpy()
        found = corners(known, self.number, len(flow), free)
        flow.chosen.append((self.member, flow.rows, found, self.side))
        flow.features = cut(flow.images, flow.rows, found, self.side)

    def dense(self, flow: Flow, choose: Choose) -> None:
        restart(flow)
        flow.features = windows(flow.images, flow.extra.get(PLACES), self.number, self.side)

    def instruct(self, files: Mapping[str, str]) -> Instruction:
        return CutOut(KEPT, self.number, self.side)


def corners(places: np.ndarray | None, number: int, count: int, free: tuple[int, int]) -> np.ndarray:
    """Top and left in pixels of a crop of each of ``count`` images, (n, 2); ``free`` is how far it may move."""
    if places is None:
        return np.tile(np.array(free) // 2, (count, 1))
    found: np.ndarray = np.floor(places[:, 2 * number : 2 * number + 2] * np.array(free, np.float32) + 0.5).astype(int)
    return found


def windows(images_NCHW: Tensor, places: Tensor | None, number: int, side: tuple[int, int]) -> Tensor:
    """One crop (N, C, *side) of each image, where :func:`corners` has it, without a loop over images."""
    free = [have - want for have, want in zip(images_NCHW.shape[2:], side, strict=True)]
    if places is None:
        y, x = free[0] // 2, free[1] // 2
        return images_NCHW[:, :, y : y + side[0], x : x + side[1]]
    chosen = places[:, 2 * number : 2 * number + 2].detach().float()
    top, left = (chosen * chosen.new_tensor(free) + 0.5).floor().long().T
    every = images_NCHW.unfold(2, side[0], 1).unfold(3, side[1], 1)
    found: Tensor = every[torch.arange(len(top), device=top.device), :, top, left]
    return found


def cut(images: Tensor, rows: np.ndarray, corners_N2: np.ndarray, side: tuple[int, int]) -> Tensor:
    """One crop (n, C, *side) of each image in ``rows``, from its top and left."""
    height, width = side
    found = images.new_empty(len(rows), images.shape[1], height, width)
    for one, row, (top, left) in zip(found, rows.tolist(), corners_N2.tolist(), strict=True):
        one.copy_(images[row, :, top : top + height, left : left + width])
    return found
