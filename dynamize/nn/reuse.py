"""What one pass over the images has seen, brought into the next one at another size (Yang et al. 2020, RANet).

A row ``small, Keep, small, Answer, Restart, big, Fuse, big, Verdict`` adds a feature map of the small network, through
a 1 x 1 projection that starts at zero and interpolated to the larger size, to that of the big one at the same point.
The images that are left at the Restart carry their maps there; the small network always runs.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from dynamize.errors import DynamizeError
from dynamize.graph.macs import counting_macs
from dynamize.nn.flow import Flow
from dynamize.nn.instructions import Add, Instruction
from dynamize.nn.instructions import Keep as KeepIt
from dynamize.nn.looking import Passing
from dynamize.nn.piece import Call, Choose, Part, Piece, Run, Setting

Shape = tuple[int, ...]


def carried(number: int) -> str:
    """Under which name images carry the map of a point to the next network."""
    return f"maps.{number}"


class Keep(Passing):
    """Keeps a copy of the feature map that passes, for a network behind.

    Args:
        number: of the point.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.copied = number, _Copied()

    @property
    def own_name(self) -> str:
        return f"keep.{self.number}"

    def parts(self) -> list[Part]:
        return [Part("gate", "gate", self.copied)]

    def bind(self, calls: Mapping[str, Call]) -> Run:
        name, copy = carried(self.number), calls["gate"]

        def run(flow: Flow, setting: Setting) -> None:
            flow.extra[name] = copy(flow.features)

        return run

    def instruct(self, files: Mapping[str, str]) -> Instruction:
        return KeepIt(files["gate"], carried(self.number))

    def note(self, flow: Flow) -> None:
        flow.extra[carried(self.number)] = self.copied(flow.features)

    def dense(self, flow: Flow, choose: Choose) -> None:
        """Whoever uses the map trains it, too."""
        self.note(flow)


class Fuse(Piece):
    """Adds what a network before has kept to the feature map that passes; nothing where no such network has run.

    Args:
        number: of the point; images do not carry its map any longer.
        given: (C, H, W) of what is carried.
        shape: (C, H, W) of the features here.
    """

    rank = -1
    continues = True
    trains_alone = True

    def __init__(self, number: int, given: Shape, shape: Shape) -> None:
        super().__init__()
        self.number, self.given, self.shape = number, given, shape
        self.sum = _Sum(given, shape)

    @property
    def own_name(self) -> str:
        return f"fuse.{self.number}"

    @property
    def passes(self) -> bool:
        return True

    def parts(self) -> list[Part]:
        return [Part("path", "path", self.sum, beside=self.sum.width)]

    def bind(self, calls: Mapping[str, Call]) -> Run:
        add = calls["path"]

        def run(flow: Flow, setting: Setting) -> None:
            maps = flow.extra.pop(carried(self.number), None)
            if maps is not None:
                flow.features, flow.means = add(flow.features, maps)

        return run

    def instruct(self, files: Mapping[str, str]) -> Instruction:
        return Add(files["path"], carried(self.number))

    def dense(self, flow: Flow, choose: Choose) -> None:
        maps = flow.extra.pop(carried(self.number), None)
        if maps is not None:
            flow.features = self.sum(flow.features, maps)

    def count(self, flow: Flow) -> None:
        self._check(flow.features, flow.extra.get(carried(self.number)))
        with counting_macs() as counted:
            self.dense(flow, Choose())
        self.macs = counted()

    def _check(self, features: Tensor, maps: Tensor | None) -> None:
        if features.shape[1:] != self.shape or (maps is not None and maps.shape[1] != self.sum.width):
            raise DynamizeError(
                f"{self.name} adds maps of {_told(self.given)} to maps of {_told(self.shape)}, and a step has changed "
                "one of them: do that before the networks are put in a row, or in other layers"
            )


class _Copied(nn.Module):
    """(n, C, H, W) -> (n, C * H * W) in memory of its own, which nothing behind writes over."""

    def forward(self, features_NCHW: Tensor) -> Tensor:
        return features_NCHW.clone(memory_format=torch.contiguous_format).flatten(1)


class _Sum(nn.Module):
    """Features (n, C, H, W) and a map (n, c * h * w) -> their sum (n, C, H, W); at first the features alone.

    A 1 x 1 projection and an interpolation are interchangeable, and on the smaller map the projection costs less.
    """

    def __init__(self, given: Shape, shape: Shape) -> None:
        super().__init__()
        self.given, self.size = given, tuple(shape[1:])
        self.project = nn.Conv2d(given[0], shape[0], 1, bias=False)
        nn.init.zeros_(self.project.weight)

    @property
    def width(self) -> int:
        """Of what is carried."""
        channels, height, width = self.given
        return channels * height * width

    def forward(self, features_NCHW: Tensor, maps_ND: Tensor) -> Tensor:
        maps = self.project(maps_ND.reshape(-1, *self.given))
        return features_NCHW + interpolate(maps, self.size, mode="bilinear", align_corners=False)


def _told(shape: Shape) -> str:
    channels, height, width = shape
    return f"{channels} channels of {height} x {width}"
