"""Running a row of pieces, each for the images that need it: rows are gathered, computed and written back in place."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dynamize.devices import cache_bytes
from dynamize.nn.gates import State

_LARGE = 2**20  # bytes of an image's feature maps from which it goes by itself
_TOGETHER = cache_bytes() // 8  # bytes of feature maps that are gathered and computed together
_CACHE = cache_bytes() // 2  # bytes of feature maps that a piece takes in turn

Run = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""Features, which it may write over -> features and their channel means, if asked for."""
Chooser = Callable[[Tensor, State, float], tuple[list[int], State]]
"""Description (N, D), state and offset -> the path of each image and the next state."""


@dataclass(frozen=True)
class Piece:
    """A piece as a backend runs it: one way for everybody, or, with a gate, several."""

    ways: list[Run | None]
    pooled: bool = False  # whether the gate reads nothing but channel means
    describe: Callable[[Tensor], Tensor] | None = None  # reads the gate's description from features
    choose: Chooser | None = None


@dataclass
class _Flow:
    """Images that go from piece to piece together.

    Attributes:
        features: (n, C, H, W).
        means: of their channels, (n, C), if known.
        state: that the last gate left.
        taken: the path of each image through each unit so far.
        forced: paths to take whatever the gates say, (n, U).
    """

    features: Tensor
    means: Tensor | None
    state: State
    taken: list[list[int]]
    forced: Tensor | None

    def __len__(self) -> int:
        return len(self.features)

    @property
    def size(self) -> int:
        """Bytes of an image's features."""
        return self.features.shape[1:].numel() * self.features.element_size()

    def rows(self, start: int, stop: int) -> "_Flow":
        return _Flow(
            self.features[start:stop],
            None if self.means is None else self.means[start:stop],
            None if self.state is None else (self.state[0][start:stop], self.state[1][start:stop]),
            [paths[start:stop] for paths in self.taken],
            None if self.forced is None else self.forced[start:stop],
        )

    def run(self, piece: Piece, offset: float) -> None:
        """Send the images through a piece."""
        if piece.choose is None:
            assert piece.ways[0] is not None
            self.features, self.means = piece.ways[0](self.features)
            return
        assert piece.describe is not None
        described = self.means if self.means is not None and piece.pooled else piece.describe(self.features)
        paths, self.state = piece.choose(described, self.state, offset)
        if self.forced is not None:
            paths = self.forced[:, len(self.taken)].tolist()
        self.features, self.means = _dispatch(piece.ways, paths, self.features, described if piece.pooled else None)
        self.taken.append(paths)


def run_pieces(
    pieces: Sequence[Piece], offset: float, features_NCHW: Tensor, forced_NU: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run each piece for the images that need it, where its gate or ``forced_NU`` says so.

    Images with large feature maps go by themselves, for then nothing is gathered; of smaller ones a few go together. A
    piece takes as many of these groups in turn as a cache holds before the next piece does: its weights are there.

    Returns:
        features, and the path that each image took through each unit, (N, U), int64. The features given may be
        written to, but not under autograd.
    """
    whole = _Flow(features_NCHW, None, None, [], forced_NU)
    if len(whole) <= 1:  # nothing to split, and sessions between two gates that take microseconds
        for piece in pieces:
            whole.run(piece, offset)
    else:
        whole = _join(_run(pieces, offset, [whole]))
    return whole.features, torch.from_numpy(np.array(whole.taken, np.int64).reshape(len(whole.taken), len(whole)).T)


def _run(pieces: Sequence[Piece], offset: float, flows: Sequence[_Flow]) -> Sequence[_Flow]:
    """Run all pieces; where feature maps get twice or half as large, other numbers of images suit them."""
    flows = _split(flows)
    size, ran = flows[0].size, len(pieces)
    in_turn = max(1, _CACHE // max(1, size * len(flows[0])))
    found: list[_Flow] = []
    for start in range(0, len(flows), in_turn):
        some = flows[start : start + in_turn]
        for count, piece in enumerate(pieces[:ran], start=1):
            for flow in some:
                flow.run(piece, offset)
            if not size < 2 * some[0].size < 4 * size:
                ran = count
                break
        larger = some[0].size > size  # then these images go on before the next come, which would fill the cache
        found += _run(pieces[ran:], offset, some) if larger and ran < len(pieces) else some
    return found if larger or ran == len(pieces) else _run(pieces[ran:], offset, found)


def _split(flows: Sequence[_Flow]) -> Sequence[_Flow]:
    """The same images in flows of the size that suits their features."""
    size = flows[0].size
    rows = 1 if size >= _LARGE else max(1, _TOGETHER // max(1, size))
    if max(map(len, flows)) <= rows and (rows == 1 or len(flows) == 1):
        return flows
    whole = _join(flows)
    return [whole.rows(start, start + rows) for start in range(0, len(whole), rows)]


def _join(flows: Sequence[_Flow]) -> _Flow:
    """All images in one flow."""
    if len(flows) == 1:
        return flows[0]
    means = [flow.means for flow in flows if flow.means is not None]
    states = [flow.state for flow in flows if flow.state is not None]
    forced = [flow.forced for flow in flows if flow.forced is not None]
    return _Flow(
        torch.cat([flow.features for flow in flows]),
        torch.cat(means) if len(means) == len(flows) else None,
        (torch.cat([one for one, _ in states]), torch.cat([two for _, two in states])) if states else None,
        [sum(paths, []) for paths in zip(*(flow.taken for flow in flows), strict=True)],
        torch.cat(forced) if forced else None,
    )


def _dispatch(
    ways: Sequence[Run | None], taken: Sequence[int], features: Tensor, means: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Send each image the way it has taken. Rows are gathered, computed and written back in place; nothing is
    concatenated."""
    if len(set(taken)) < 2:
        way = ways[taken[0] if taken else -1]
        return (features, means) if way is None else way(features)
    if torch.is_grad_enabled():
        features, means = features.clone(), None if means is None else means.clone()
    source = features
    target = features if None in ways else None
    target_means = means if None in ways else None
    known = means is not None or None not in ways  # else the means of those who pass unchanged are missing
    for path in sorted(set(taken)):
        way = ways[path]
        if way is None:
            continue
        rows = torch.tensor([row for row, one in enumerate(taken) if one == path])
        found, found_means = way(take_rows(source, rows))
        if target is None:
            target = source if found.shape[1:] == source.shape[1:] else found.new_empty(len(taken), *found.shape[1:])
        put_rows(target, rows, found)
        if found_means is not None and known:
            if target_means is None:
                target_means = found_means.new_empty(len(taken), found_means.shape[1])
            put_rows(target_means, rows, found_means)
    assert target is not None
    return target, target_means if known else None


def take_rows(values: Tensor, rows: Tensor) -> Tensor:
    """Copies of these rows. numpy where it can: a parallel region of torch would leave its threads spinning against
    those of ONNX Runtime."""
    if _by_numpy(values):
        return torch.from_numpy(values.numpy().take(rows.numpy(), axis=0))
    return values[rows]


def put_rows(values: Tensor, rows: Tensor, found: Tensor) -> None:
    """Write rows in place."""
    if _by_numpy(values) and _by_numpy(found):
        values.numpy()[rows.numpy()] = found.numpy()
    else:
        values[rows] = found


def _by_numpy(values: Tensor) -> bool:
    cpu = values.device.type == "cpu" and not values.requires_grad
    return cpu and values.is_contiguous() and values.dtype in (torch.float32, torch.float64)
