"""Where to look, learnt: gradients of what crops answer reach the places that they are at."""

import torch
from torch import Tensor, fx, nn

from dynamize.nn.gradients import Rescale
from dynamize.nn.heads import LoneNorm
from dynamize.nn.where import ClassMap, Share, Where, cell_centres, start

_WIDTH = 64
_SHARP = 3.0  # at first: how much surer than the others a cell that stands out by one deviation is
_FAR = 1e4
_SLOWER = 0.1  # than all else, which has to learn from where crops are at that moment; AdaFocus V2: 0.01
_ANYWHERE = 0.25  # of the images in training


class Proposal(Where):
    """A map (n, C, h, w) -> places (n, 2 * crops), by a small network on it, as in AdaFocus V2 (Wang et al. 2022).

    The middle of a crop is the mean of all cells, weighed by the softmax of their scores. These start as ``evidence``
    has them, or alike, so that crops start in the middle; each is where none before has looked.

    Args:
        shape: of the map.
        crops: how many.
        share: of each side of the image that a crop holds.
        evidence: of each cell of the map, if the network says so cheaply.
    """

    learns = True
    centres: Tensor
    share: Tensor

    def __init__(self, shape: tuple[int, int, int], crops: int, share: Share, evidence: ClassMap | None) -> None:
        super().__init__()
        self.crops, self.evidence = crops, evidence
        self.body = nn.Sequential(nn.Conv2d(shape[0], _WIDTH, 1, bias=False), LoneNorm(_WIDTH), nn.Tanh())
        self.score = nn.Conv2d(_WIDTH, crops, 1)
        for parameter in self.score.parameters():
            nn.init.zeros_(parameter)
        self.cells = shape[1] * shape[2]
        self.register_buffer("centres", cell_centres(shape[1:]), persistent=False)
        self.register_buffer("share", torch.tensor(share), persistent=False)

    @property
    def described(self) -> int:
        return 2 * self.crops

    def settle(self, plain: fx.GraphModule, node: str) -> None:
        if self.evidence is not None:
            self.evidence.settle(plain, node)

    def hold(self) -> None:
        if self.evidence is not None:
            self.evidence.hold()

    def scores(self, map_NCHW: Tensor) -> Tensor:
        """Of each cell for each crop, (n, crops, h, w), as they are learnt."""
        found: Tensor = self.score(self.body(map_NCHW))
        return found

    def forward(self, map_NCHW: Tensor) -> Tensor:
        learnt = self.scores(map_NCHW).reshape(-1, self.crops, self.cells)
        given = torch.zeros_like(learnt[:, 0])
        if self.evidence is not None:
            with torch.no_grad():
                found = self.evidence(map_NCHW)
                apart = found - found.mean(1, keepdim=True)
                given = _SHARP * apart / (apart.square().mean(1, keepdim=True).sqrt() + 1e-6)
        places: list[Tensor] = []
        for number in range(self.crops):
            centre = (given + learnt[:, number]).softmax(1) @ self.centres
            places.append(start(centre, self.share))
            near = ((centre.detach()[:, None] - self.centres).abs() < self.share / 2).all(2)
            given = given - _FAR * near.to(given.dtype)
        return torch.cat(places, 1)

    def tried(self, map_NCHW: Tensor) -> Tensor:
        """The same for training: those of some images are drawn at random, so that crops are learnt from everywhere."""
        places: Tensor = Rescale.apply(self(map_NCHW), _SLOWER)
        drawn = torch.rand(len(places), 1, device=places.device) < _ANYWHERE
        return torch.where(drawn, torch.rand_like(places), places)
