"""What a network answers to fixed noise, by which an artifact notices that it is loaded into other code.

The weights come from the artifact, so that whatever differs is code, a constant, or a buffer that is not saved.
"""

import copy
from typing import Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from dynamize.graph.tracer import blank
from dynamize.nn.gates import ALL_OPEN
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting

_IMAGES, _CLASSES = 2, 16
_EXACT = "float64"
_TOLERANCE = {_EXACT: 1e-4}  # in it, machines and backends differ by less than 1e-9
_ROUNDED = 0.02  # bytes that round to the other side on another machine, and float32


class Answers(BaseModel):
    """Logits of some classes at every exit, on two images of noise: all images reach all exits, and all gates are open.

    ``dtype`` is what they were computed in: float64, or the network's own type where it does not run in that.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: str
    logits: list[list[list[float]]]  # exit, image, class

    @classmethod
    def of(cls, network: DynamicNetwork) -> Self | None:
        """The answers of a network, which is left alone; None where they are not finite."""
        try:
            dtype, logits = _answers(network, exact=True)
        except (RuntimeError, TypeError, ValueError):  # a layer of one type only
            dtype, logits = _answers(network, exact=False)
        finite = all(bool(one.isfinite().all()) for one in logits)
        return cls(dtype=dtype, logits=[one.tolist() for one in logits]) if finite else None

    def distance(self, network: DynamicNetwork) -> float:
        """How far those of another network lie from these, relative to how these spread.

        Raises:
            RuntimeError, TypeError, ValueError: it does not run in the type of these.
        """
        given = [torch.tensor(one, dtype=torch.float64) for one in self.logits]
        return _distance(given, _answers(network, self.dtype == _EXACT)[1])

    @property
    def tolerance(self) -> float:
        """The largest distance that a network of the same code has."""
        return _TOLERANCE.get(self.dtype, _ROUNDED)


def _answers(network: DynamicNetwork, exact: bool) -> tuple[str, list[Tensor]]:
    """What they were computed in, and the logits of each exit (images, classes)."""
    alone = copy.deepcopy(network).cpu().eval()
    if exact:
        alone.double()
    like = blank(alone, 1)
    noise = np.random.RandomState(0).standard_normal((_IMAGES, *network.input_shape))  # the same in every version
    with torch.no_grad():
        routed = alone.run(torch.from_numpy(noise).to(like), Setting(offset=ALL_OPEN), everyone=True)
    logits = [*(logits for _, logits, _ in routed.seen), routed.logits]
    return str(like.dtype).removeprefix("torch."), [one.double()[:, :_CLASSES] for one in logits]


def _distance(given: list[Tensor], found: list[Tensor]) -> float:
    if [one.shape for one in given] != [one.shape for one in found]:
        return float("inf")
    worst = 0.0
    for one, other in zip(given, found, strict=True):
        spread, apart = float((one - one.mean()).square().mean().sqrt()), float((other - one).square().mean().sqrt())
        least = max(1e-3 * float(one.abs().max()), 1e-12)  # exits may answer alike everywhere
        worst = max(worst, apart / max(spread, least) if apart == apart else float("inf"))
    return worst
