"""Where to look: pieces that read a glance at the whole image and say where crops of it lie, and the crop itself.

A row ``glance, Look, Answer, Crop, focus, Answer, ..., Restart, whole, Verdict`` is glance and focus (Wang et al. 2020,
GFNet), with the original network on the whole image behind the last crop. A policy is a piece that writes ``PLACES``;
where none did, crops are from the middle.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor, fx

from dynamize.graph.macs import counting_macs
from dynamize.nn.cascade import KEPT, PLACES, Restart, restart
from dynamize.nn.flow import Flow
from dynamize.nn.instructions import Crop as CutOut
from dynamize.nn.instructions import Draw, Instruction, Rows
from dynamize.nn.instructions import Look as LookThere
from dynamize.nn.piece import Call, Choose, Part, Piece, Run, Setting
from dynamize.nn.where import Evidence, Peaks, Share

MAP = "map"  # (n, C, h, w), in what a flow carries: the last feature map of the glance
Policy = Literal["activation", "centre", "random"]
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
    """Crops where the last feature map of a glance has most evidence for its answer, sought when the first is cut.

    Args:
        evidence: of each cell of the map.
        crops: how many.
        share: of each side of the image that a crop holds, of height and width.
    """

    waits = True

    def __init__(self, evidence: Evidence, crops: int, share: Share) -> None:
        super().__init__()
        self.evidence, self.peaks = evidence, Peaks(evidence.grid, crops, share)

    def settle(self, plain: fx.GraphModule) -> None:
        self.evidence.settle(plain, self.place[0])

    def parts(self) -> list[Part]:
        return [Part("gate", "gate", self.evidence)]

    def bind(self, calls: Mapping[str, Call]) -> Run:
        describe, peaks = calls["gate"], self.peaks

        def seek(flow: Flow) -> None:
            found = flow.extra.pop(MAP)
            if len(flow):
                flow.extra[PLACES] = peaks(describe(found))

        def run(flow: Flow, setting: Setting) -> None:
            flow.extra[MAP] = flow.features.clone()  # layers behind may write over it
            flow.seek = seek

        return run

    def note(self, flow: Flow) -> None:
        flow.extra[PLACES] = self.peaks(self.evidence(flow.features.detach()))

    def fold(self) -> None:
        self.evidence.hold()

    def freeze(self) -> None:
        self.fold()

    def instruct(self, files: Mapping[str, str]) -> Instruction:
        rows, columns = self.evidence.grid
        return LookThere(files["gate"], Rows(self.peaks, {"description": rows * columns}, (PLACES,)))


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
