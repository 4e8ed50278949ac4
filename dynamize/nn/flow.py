"""The images of a batch that are still on their way, and what became of each."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Indices = NDArray[np.int64]
Options = Sequence[int] | Indices

NOBODY = np.zeros(0, np.int64)
ONLY = np.zeros(1, np.int64)  # the row of a single image


class Flow:
    """Images that go from piece to piece together; what it records is indexed by image, whatever leaves before.

    Attributes:
        images: (N, C, H, W), the whole batch: read through ``rows``, never compacted, never written to.
        features: (n, C, H, W).
        means: of their channels, (n, C), where the piece before has handed them on.
        extra: what else pieces hand on (context, memory), (n, ...) each.
        rows: (n,), which image of the batch each row is.
        log: (decision, rows, option of each row), in order of execution; shared by all flows of a batch.
        chosen: (network, rows, top and left of each row, height and width): which part of an image it sees; shared too.
        answered: (rows, logits) of images that have left; shared too.
        seen: while nobody leaves: (decision, logits, score) of all images; None otherwise.
        shares: training: by decision, (N, P).
        seek: what says where to look in images, for the first that asks; None where nobody says, or it was asked.
        ahead: training: how many answers are still to come, the network's own counted.
        owned: whether the features are known not to lie in the user's images; whoever goes back to those says so.
    """

    __slots__ = (
        "ahead",
        "answered",
        "chosen",
        "extra",
        "features",
        "images",
        "log",
        "means",
        "owned",
        "rows",
        "seek",
        "seen",
        "shares",
    )

    def __init__(self, images_NCHW: Tensor, everyone: bool = False) -> None:
        self.images = self.features = images_NCHW
        self.means: Tensor | None = None
        self.extra: dict[str, Tensor] = {}
        self.rows: Indices = ONLY if len(images_NCHW) == 1 else np.arange(len(images_NCHW))
        self.log: list[tuple[str, Indices, Options]] = []
        self.chosen: list[tuple[str, Indices, Indices, tuple[int, int]]] = []
        self.answered: list[tuple[Indices, Tensor]] = []
        self.seen: list[tuple[str, Tensor, Tensor | None]] | None = [] if everyone else None
        self.shares: dict[str, Tensor] = {}
        self.seek: Callable[[Flow], None] | None = None
        self.ahead = 1
        self.owned = False

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def size(self) -> int:
        """Bytes of an image's features."""
        return self.features.shape[1:].numel() * self.features.element_size()

    @property
    def foreign(self) -> bool:
        """Whether the features are the user's images, some of them or a part of each, which nothing may write to."""
        if not self.owned:
            self.owned = self.features.untyped_storage().data_ptr() != self.images.untyped_storage().data_ptr()
        return not self.owned

    def own(self) -> Tensor:
        """The features, which may be written over: the user's images are copied first."""
        if self.foreign:
            self.features, self.owned = self.features.clone(), True
        return self.features

    def leave(self, leaving: Indices, logits: Tensor) -> None:
        """Let these rows go with their answers, ``logits`` of all rows.

        Rows from the end take their places: at most min(leaving, staying) rows are copied, so this is cheaper than any
        piece that it shortens, whatever the share that leaves. The order of the images is kept in ``rows``.
        """
        if not len(leaving):
            return
        if len(leaving) == len(self.rows):
            self.answered.append((self.rows, logits))
            self.rows = NOBODY
            return
        self.answered.append((self.rows[leaving], logits[torch.from_numpy(leaving)]))
        staying = len(self.rows) - len(leaving)
        stays = np.ones(len(self.rows), bool)
        stays[leaving] = False
        holes = leaving[leaving < staying]
        fillers = np.flatnonzero(stays[staying:]) + staying
        kept = np.arange(staying)
        kept[holes] = fillers
        self.rows = self.rows[kept]
        self.means = None
        if torch.is_grad_enabled() or self.foreign:  # even of frozen features a head keeps the rows
            chosen = torch.from_numpy(kept)
            self.features = self.features[chosen]
            self.extra = {name: values[chosen] for name, values in self.extra.items()}
            return
        self.features = _compacted(self.features, holes, fillers, staying)
        self.extra = {name: _compacted(values, holes, fillers, staying) for name, values in self.extra.items()}

    def split(self, rows: int) -> "list[Flow]":
        """The same images in flows of at most ``rows``."""
        return [self._slice(start, start + rows) for start in range(0, len(self), rows)]

    def _slice(self, start: int, stop: int) -> "Flow":
        part = Flow.__new__(Flow)
        part.images, part.log, part.answered, part.seen = self.images, self.log, self.answered, self.seen
        part.shares, part.ahead, part.owned, part.chosen = self.shares, self.ahead, self.owned, self.chosen
        part.seek = self.seek
        part.features = self.features[start:stop]
        part.means = None if self.means is None else self.means[start:stop]
        part.extra = {name: values[start:stop] for name, values in self.extra.items()}
        part.rows = self.rows[start:stop]
        return part


def join(flows: Sequence[Flow]) -> Flow:
    """All images in one flow."""
    if len(flows) == 1:
        return flows[0]
    first = flows[0]
    whole = first._slice(0, 0)
    whole.rows = np.concatenate([flow.rows for flow in flows])
    whole.features = torch.cat([flow.features for flow in flows])
    means = [flow.means for flow in flows if flow.means is not None]
    whole.means = torch.cat(means) if len(means) == len(flows) else None
    whole.extra = {name: torch.cat([flow.extra[name] for flow in flows]) for name in first.extra}
    return whole


def _compacted(values: Tensor, holes: Indices, fillers: Indices, staying: int) -> Tensor:
    if len(holes):
        move_rows(values, holes, fillers)
    return values[:staying]


def move_rows(values: Tensor, targets: Indices, sources: Indices) -> None:
    """Copy rows within a tensor. Contiguous ones on the CPU are copied by numpy: a parallel region of torch would leave
    its threads spinning against those of ONNX Runtime, which costs more than the copy."""
    if values.device.type == "cpu" and values.is_contiguous() and values.dtype != torch.bfloat16:
        array = values.numpy()
        array[targets] = array[sources]
    else:
        values[torch.from_numpy(targets)] = values[torch.from_numpy(sources)]


def take_rows(values: Tensor, rows: Indices) -> Tensor:
    """Copies of these rows, by numpy where it can."""
    if _by_numpy(values):
        return torch.from_numpy(values.numpy().take(rows, axis=0))
    return values[torch.from_numpy(rows)]


def put_rows(values: Tensor, rows: Indices, found: Tensor) -> None:
    """Write rows in place."""
    if _by_numpy(values) and _by_numpy(found):
        values.numpy()[rows] = found.numpy()
    else:
        values[torch.from_numpy(rows)] = found


def _by_numpy(values: Tensor) -> bool:
    cpu = values.device.type == "cpu" and not values.requires_grad
    return cpu and values.is_contiguous() and values.dtype in (torch.float32, torch.float64)
