"""Units that compute their region only where an image needs it: in tiles of its feature map."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dynamize.graph.macs import count_macs, counting_macs
from dynamize.graph.reach import Tiling
from dynamize.nn.flow import Flow, Options, put_rows, take_rows
from dynamize.nn.gates import OPEN, Gate, State
from dynamize.nn.piece import Call, Choose, Part, Run, Setting
from dynamize.nn.units import Unit


class TileGate(Gate):
    """Scores each tile: batch norm and a linear layer on its channel means, and one on those of the whole map (as the
    mask heads of Verelst & Tuytelaars 2020, DynConv, sec. 3.1, with tiles for positions). Starts open."""

    pooled = False

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.here = nn.Conv2d(channels, 1, 1)
        self.everywhere = nn.Conv2d(channels, 1, 1, bias=False)
        for layer in (self.here, self.everywhere):
            nn.init.zeros_(layer.weight)
        nn.init.constant_(self.here.bias, OPEN)  # type: ignore[arg-type]

    def forward(self, features_NCHW: Tensor) -> Tensor:
        """(N, C, H, W) -> scores of the tiles, row by row, (N, T)."""
        means = functional.avg_pool2d(features_NCHW, self.side, ceil_mode=True, count_include_pad=False)
        means = self.norm(means.to(self.here.weight.dtype))
        return (self.here(means) + self.everywhere(means.mean((2, 3), keepdim=True))).flatten(1)

    def decide(self, described_ND: Tensor, state: State = None) -> tuple[Tensor, State]:
        return described_ND, state


class TileUnit(Unit):
    """A residual block, or a run of them, that an image computes in some tiles of its map; elsewhere its input stays
    (SBNet, Ren et al. 2018; DynConv, Verelst & Tuytelaars 2020).

    The tiles of all images of a batch are gathered, each with a margin of what the region looks at around it, computed
    as one batch of small maps, and written back without the margin. An image that wants more than ``most`` of them
    computes the whole region, which takes less time then. The option of an image is the number of its tiles: those of
    the highest scores. Training computes everything and multiplies by masks.

    Args:
        body: the region; it does not write to its input. Its layers are the network's.
        tiling: of its map.
        most: tiles that an image computes one by one.
    """

    kind = "tiles"
    by_scores = False

    def __init__(self, label: str, gate: TileGate, body: nn.Module, tiling: Tiling, most: int) -> None:
        super().__init__(label, gate, most + 2)
        self.tiling, self.most = tiling, most
        self._tiles = tiling.tiles
        self._sharing = (body,)  # a tuple: its modules are the network's, which registers them

    def ways(self) -> Sequence[nn.Module | None]:
        """Nothing, the region on windows, nothing of its own for more of them, and the region on the whole map."""
        (body,) = self._sharing
        return [None, body, *[None] * (self.most - 1), body]

    def options(self) -> Sequence[str]:
        return "none", "1 tile", *(f"{count} tiles" for count in range(2, self.most + 1)), "whole"

    @property
    def binary(self) -> bool:
        return True

    def settles(self, option: int) -> bool:
        return option in (0, self.most + 1)

    def parts(self) -> list[Part]:
        return [replace(part, size=self.tiling.window) if part.name == "1" else part for part in super().parts()]

    def way_calls(self, calls: Mapping[str, Call]) -> list[Call | None]:
        def first(count: int, features: Tensor) -> tuple[Tensor, None]:
            return self._computed(features, [(0, tile) for tile in range(count)], calls), None

        return [None, *(partial(first, count) for count in range(1, self.most + 1)), calls[str(self.most + 1)]]

    def quick_calls(self) -> dict[str, Call]:
        return {"decide": lambda described, flow, offset: self._counted(described.numpy(), offset)}

    def decide(self, described: Tensor, flow: Flow, offset: float) -> list[int]:
        return self._counted(described, offset)

    def _counted(self, scores_NT: Any, offset: float) -> list[int]:
        """How many tiles are wanted, as options."""
        return [min(count, self.most + 1) for count in (scores_NT + offset > 0).sum(1).tolist()]

    def bind(self, calls: Mapping[str, Call]) -> Run:
        whole, describe, name = calls[str(self.most + 1)], calls["gate"], self.name
        decide = calls.get("decide") or self.decide

        def run(flow: Flow, setting: Setting) -> None:
            scores = describe(flow.features)
            taken = decide(scores, flow, setting.offset)
            if name in setting.forced:
                forced = setting.forced[name][torch.from_numpy(flow.rows)]
                taken = torch.where(forced < 0, self.most + 1, forced).tolist()
            flow.log.append((name, flow.rows, taken))
            all_of_it = np.flatnonzero(np.asarray(taken) > self.most)
            if len(all_of_it) == len(taken):
                flow.features, flow.means = whole(flow.own())
                return
            flow.means = None
            source = flow.own().clone() if torch.is_grad_enabled() else flow.own()
            chosen = [(row, tile) for row, tile in _best(scores, taken) if taken[row] <= self.most]
            if len(all_of_it):
                put_rows(source, all_of_it, whole(take_rows(source, all_of_it))[0])
            flow.features = self._computed(source, chosen, calls) if chosen else source

        return run

    def _computed(self, features: Tensor, chosen: Sequence[tuple[int, int]], calls: Mapping[str, Call]) -> Tensor:
        """Features with these tiles computed, in place.

        Args:
            chosen: row and tile.
        """
        grid = calls.get("grid") or _as_it_is
        windows = features.new_empty(len(chosen), features.shape[1], *self.tiling.window)
        source, target = _arrays(grid(features), grid(windows))
        for at, (row, tile) in enumerate(chosen):
            target[at] = source[row, :, *self._tiles[tile].window]
        found, _ = calls["1"](windows)
        target, source = _arrays(grid(features), grid(found))
        for at, (row, tile) in enumerate(chosen):
            target[row, :, *self._tiles[tile].place] = source[at, :, *self._tiles[tile].inside]
        return features

    def mix(self, flow: Flow, choose: Choose) -> None:
        scores_NT = self.read(flow)
        each = torch.stack([torch.zeros_like(scores_NT), scores_NT], -1).flatten(0, 1)
        mask_NT = choose(self.name, flow.features, each)[:, 1].view_as(scores_NT)
        counts_N = mask_NT.detach().round().sum(1)
        mask_NT = torch.where((counts_N > self.most)[:, None], mask_NT + (1 - mask_NT).detach(), mask_NT)
        flow.shares[self.name] = self._shares(counts_N, mask_NT.mean(1))
        flow.features = self._mixed(flow.features, mask_NT)

    def _shares(self, counts_N: Tensor, density_N: Tensor) -> Tensor:
        """One-hot rows (N, P) of the options taken, with the gradient of shares of none and the whole."""
        options = counts_N.clamp(max=self.most + 1).long()
        hard = functional.one_hot(options, self.most + 2).to(density_N)
        between = torch.zeros_like(hard[:, 1:-1])
        soft = torch.cat([1 - density_N[:, None], between, density_N[:, None]], 1)
        return hard + (soft - soft.detach())

    def blend(self, features_NCHW: Tensor, shares_NP: Tensor) -> Tensor:
        """Tiles of the highest scores, as many as the options with the highest shares say."""
        taken = shares_NP.argmax(1).tolist()
        scores_NT = self.gate(features_NCHW)
        mask_NT = torch.zeros_like(scores_NT)
        for row, tile in _best(scores_NT, [len(self._tiles) if one > self.most else one for one in taken]):
            mask_NT[row, tile] = 1
        return self._mixed(features_NCHW, mask_NT)

    def _mixed(self, features_NCHW: Tensor, mask_NT: Tensor) -> Tensor:
        """The region where the mask is 1, and what it was given where that is 0."""
        (body,) = self._sharing
        computed: Tensor = body(features_NCHW)
        each = mask_NT.to(computed.dtype).view(-1, 1, *self.tiling.grid)
        for dim in (2, 3):
            each = each.repeat_interleave(self.tiling.side, dim)
        mask = each[..., : self.tiling.height, : self.tiling.width]
        return mask * computed + (1 - mask) * features_NCHW

    def count(self, flow: Flow) -> None:
        with counting_macs() as counted:
            self.read(flow)
        self.macs = counted()
        _, window, *_, whole = self.paths()
        assert window is not None
        assert whole is not None
        rows, columns = self.tiling.window
        tile = count_macs(window, flow.features[..., :rows, :columns].clone())
        self.path_macs = (*(tile * count for count in range(self.most + 1)), count_macs(whole, flow.features.clone()))
        self.path_costs.copy_(torch.tensor(self.path_macs) / self.path_macs[-1])
        flow.features = whole(flow.features)


def _best(scores_NT: Tensor, counts: Options) -> list[tuple[int, int]]:
    """Row and tile of as many tiles of the highest scores as are asked for in each row."""
    order = np.argsort(-scores_NT.detach().float().cpu().numpy(), axis=1, kind="stable")
    return [(row, tile) for row, count in enumerate(counts) for tile in order[row, :count].tolist()]


def _as_it_is(features: Tensor) -> Tensor:
    return features


def _arrays(*values: Tensor) -> tuple[Any, ...]:
    """As numpy sees them, which slices faster, where it can."""
    plain = all(one.device.type == "cpu" and not one.requires_grad and one.dtype != torch.bfloat16 for one in values)
    return tuple(one.numpy() for one in values) if plain else values
