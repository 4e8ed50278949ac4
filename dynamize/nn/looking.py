"""Where to look: pieces that read a glance at the whole image and say where crops of it lie, and the crop itself.

A row ``glance, Look, Answer, Crop, focus, Answer, ..., Restart, whole, Verdict`` is glance and focus (Wang et al. 2020,
GFNet), with the original network on the whole image behind the last crop. A policy is a piece that writes ``PLACES``;
where none did, crops are from the middle.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import affine_grid, grid_sample

from dynamize.graph.macs import counting_macs
from dynamize.nn.cascade import KEPT, PLACES, Restart, restart
from dynamize.nn.flow import Flow
from dynamize.nn.instructions import Crop as CutOut
from dynamize.nn.instructions import Draw, Instruction, Rows
from dynamize.nn.instructions import Look as LookThere
from dynamize.nn.piece import Call, Choose, Part, Piece, Run, Setting
from dynamize.nn.proposal import Proposal
from dynamize.nn.where import Where

MAP = "map"  # (n, C, h, w), in what a flow carries: the last feature map of the glance
Policy = Literal["activation", "learned", "centre", "random"]
_DRAWN = 997  # places that random crops are drawn from


class Passing(Piece):
    """A piece that only reads what passes, and notes something among what images carry: where crops are."""

    @property
    def own_name(self) -> str:
        return "look"

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


class Look(Passing):
    """Crops where the last feature map of a glance says, which is asked when the first one is cut.

    Args:
        where: describes the map.
        places: makes places of the description.
    """

    waits = True

    def __init__(self, where: Where, places: nn.Module) -> None:
        super().__init__()
        self.where, self.places = where, places

    @property
    def reads(self) -> bool:
        return self.where.learns

    def settle(self, plain: fx.GraphModule) -> None:
        self.where.settle(plain, self.place[0])

    def parts(self) -> list[Part]:
        return [Part("gate", "gate", self.where)]

    def bind(self, calls: Mapping[str, Call]) -> Run:
        describe, places = calls["gate"], self.places

        def seek(flow: Flow) -> None:
            found = flow.extra.pop(MAP)
            if len(flow):
                flow.extra[PLACES] = places(describe(found))

        def run(flow: Flow, setting: Setting) -> None:
            flow.extra[MAP] = flow.features.clone()  # layers behind may write over it
            flow.seek = seek

        return run

    def note(self, flow: Flow) -> None:
        flow.extra[PLACES] = self.places(self.where(flow.features.detach()))

    def fold(self) -> None:
        self.where.hold()

    def freeze(self) -> None:
        self.fold()

    def instruct(self, files: Mapping[str, str]) -> Instruction:
        return LookThere(files["gate"], Rows(self.places, {"description": self.where.described}, (PLACES,)))


class LearntLook(Look):
    """The same, of a proposal that learns where crops are from what they answer; the glance does not."""

    where: Proposal

    def __init__(self, proposal: Proposal) -> None:
        super().__init__(proposal, nn.Identity())

    def dense(self, flow: Flow, choose: Choose) -> None:
        features = flow.features.detach()
        flow.extra[PLACES] = self.where.tried(features) if self.training else self.where(features)

    def read(self, flow: Flow) -> Tensor:
        return self.where.scores(flow.features)


class Anywhere(Passing):
    """Crops at random places, the same for the same image: the control of every policy.

    Args:
        crops: how many.
        seed: of the places.
    """

    def __init__(self, crops: int, seed: int = 0) -> None:
        super().__init__()
        self.table = np.random.RandomState(seed).random_sample((_DRAWN, 2 * crops)).astype(np.float32)

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
        if flow.seek is not None:
            flow.seek(flow)
            flow.seek = None
        restart(flow)
        places = flow.extra.get(PLACES)
        free = (flow.images.shape[2] - self.side[0], flow.images.shape[3] - self.side[1])
        known = None if places is None else places.detach().float().cpu().numpy()
        found = corners(known, self.number, len(flow), free)
        flow.chosen.append((self.member, flow.rows, found, self.side))
        flow.features = cut(flow.images, flow.rows, found, self.side)

    def dense(self, flow: Flow, choose: Choose) -> None:
        restart(flow)
        places = flow.extra.get(PLACES)
        if places is not None and places.requires_grad:
            flow.features = sampled(flow.images, places, self.number, self.side)
        else:
            flow.features = windows(flow.images, places, self.number, self.side)

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


def sampled(images_NCHW: Tensor, places: Tensor, number: int, side: tuple[int, int]) -> Tensor:
    """The same between pixels too, by interpolation, so that gradients reach the places (Wang et al. 2022, AdaFocus V2,
    sec. 3.1)."""
    sizes = images_NCHW.shape[2:]
    starts = places[:, 2 * number : 2 * number + 2].float().T
    y, x = ((2 * at * (whole - part) + part) / whole - 1 for at, whole, part in zip(starts, sizes, side, strict=True))
    none, height, width = torch.zeros_like(x), side[0] / sizes[0], side[1] / sizes[1]
    theta = torch.stack([none + width, none, x, none, none + height, y], 1).reshape(-1, 2, 3)
    grid = affine_grid(theta, [len(places), images_NCHW.shape[1], *side], align_corners=False)
    return grid_sample(images_NCHW, grid.to(images_NCHW.dtype), padding_mode="border", align_corners=False)


def cut(images: Tensor, rows: np.ndarray, corners_N2: np.ndarray, side: tuple[int, int]) -> Tensor:
    """One crop (n, C, *side) of each image in ``rows``, from its top and left."""
    height, width = side
    found = images.new_empty(len(rows), images.shape[1], height, width)
    for one, row, (top, left) in zip(found, rows.tolist(), corners_N2.tolist(), strict=True):
        one.copy_(images[row, :, top : top + height, left : left + width])
    return found
