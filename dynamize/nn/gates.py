"""Gates: small modules that score, for each image, the ways through a unit of the network."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dynamize.nn.instructions import Rows

ALL_OPEN = 1e6  # an offset that no score outweighs; finite, so that it survives JSON
OPEN = 3.0  # initial advantage of the original path: every gate is open, and a gradient still reaches it
_SAMPLED = 28  # rows and columns that a mean is taken over, and up to twice as many
_MEMORY = 10  # size of the recurrent gate's state (SkipNet, sec. 4.1)

State = tuple[Tensor, Tensor] | None
Paths = Callable[[Tensor, object, float], list[int]]
"""Description (N, D), the flow and offset -> the path of each image."""


class Gate(nn.Module, ABC):
    """Scores P paths, the cheapest first and the original last, in two halves.

    ``forward`` reads the feature map and is the part that a backend compiles; ``decide`` is a few small products, the
    last of them ``linear``. A gate that is ``pooled`` describes a map by its channel means, which an image that skipped
    a unit keeps. One with a ``memory``, which all such gates of a network share, hands a state to the next one.
    """

    pooled = True
    linear: nn.Linear
    memory: nn.LSTMCell | None

    def __init_subclass__(cls) -> None:
        """A class that decides in another way than the one above it does not say how until it has a scorer itself."""
        super().__init_subclass__()
        if min(_home(cls, "decide"), _home(cls, "score")) < _home(cls, "scorer"):
            cls.scorer = Gate.scorer  # type: ignore[method-assign]

    def __init__(self) -> None:
        super().__init__()
        self.memory = None

    @property
    def alone(self) -> bool:
        """Whether it hands nothing to the next gate."""
        return self.memory is None

    def forward(self, features_NCHW: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, D)."""
        return pool(features_NCHW)

    @abstractmethod
    def decide(self, described_ND: Tensor, state: State = None) -> tuple[Tensor, State]:
        """(N, D) and the state that the gate before left -> scores (N, P) and the next state."""

    def score(self, described_ND: Tensor, carried: dict[str, Tensor], fresh: bool) -> Tensor:
        """Scores (N, P); the state is read from what images carry with them and left there.

        Args:
            fresh: whether the state starts anew.
        """
        scores, _ = self.decide(described_ND)
        return scores

    def fold(self) -> None:
        """Fold what can be folded, for execution only."""

    def quick_paths(self, costs_P: Tensor) -> Paths | None:
        """Decisions of a folded gate on the CPU in numpy, which between two sessions costs half of what torch does.

        None for a gate that decides in another way than by one linear layer.
        """
        scorer = self.scorer(fresh=True)
        return _linear_paths(scorer, costs_P) if isinstance(scorer, nn.Linear) else None

    def scorer(self, fresh: bool) -> nn.Linear | Rows | None:
        """What makes scores (N, P) of a description, of a folded gate: the linear layer, if it decides by that alone,
        or all of :meth:`decide`; None if it does not say, as of a subclass that overrides ``decide`` or ``score`` and
        not this: it is then decided in torch, and cannot be exported.

        Args:
            fresh: whether the state starts anew.
        """
        return None


def _home(gate: type[Gate], method: str) -> int:
    """How far up the class is that a method comes from."""
    return next(i for i, one in enumerate(gate.__mro__) if method in vars(one))


def _linear_paths(linear: nn.Linear, costs_P: Tensor) -> Paths:
    weight, bias = (value.detach().numpy().T.copy() for value in (linear.weight, linear.bias))
    costs = costs_P.numpy()
    shifted = cache(lambda offset: bias + np.float32(offset) * costs)

    def paths(described: Tensor, flow: object, offset: float) -> list[int]:
        scores = described.numpy() @ weight + shifted(offset)
        if len(scores) == 1:  # plain Python is faster than another call of numpy
            (row,) = scores.tolist()
            return [row.index(max(row))]
        found: list[int] = scores.argmax(1).tolist()
        return found

    return paths


class LinearGate(Gate):
    """Batch norm and a linear layer on pooled features; starts open (Veit & Belongie 2018, ConvNet-AIG, sec. 3.2)."""

    def __init__(self, channels: int, paths: int) -> None:
        super().__init__()
        self.norm: nn.Module = nn.BatchNorm1d(channels, affine=False)
        self.linear = open_linear(channels, paths)

    def decide(self, described_ND: Tensor, state: State = None) -> tuple[Tensor, State]:
        return self.linear(_normalised(self.norm, described_ND.to(self.linear.weight.dtype))), state

    def fold(self) -> None:
        self.norm, self.linear = nn.Identity(), _folded(self.norm, self.linear)

    def scorer(self, fresh: bool) -> nn.Linear | Rows | None:
        return self.linear


class ConvGate(Gate):
    """A stride-2 convolution before the pooling: FFGate-II of SkipNet (Wang et al. 2018, sec. 4.1), narrower."""

    pooled = False

    def __init__(self, channels: int, paths: int) -> None:
        super().__init__()
        width = max(8, channels // 4)
        self.conv = nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.linear = open_linear(width, paths)

    def forward(self, features_NCHW: Tensor) -> Tensor:
        return pool(torch.relu(_normalised(self.norm, self.conv(features_NCHW))))

    def decide(self, described_ND: Tensor, state: State = None) -> tuple[Tensor, State]:
        return self.linear(described_ND.to(self.linear.weight.dtype)), state

    def scorer(self, fresh: bool) -> nn.Linear | Rows | None:
        return self.linear


def make_memory() -> nn.LSTMCell:
    """What all recurrent gates of a network share."""
    return nn.LSTMCell(_MEMORY, _MEMORY)


class RecurrentGate(Gate):
    """SkipNet's recurrent gate (Wang et al. 2018, sec. 4.1): pooled features, projected, through a shared LSTM.

    The last layer, which SkipNet shares as well, is each gate's own: all gates would open and close together. The state
    starts anew behind each exit, so that it need not be carried through one.
    """

    memory: nn.LSTMCell

    def __init__(self, channels: int, paths: int, memory: nn.LSTMCell) -> None:
        super().__init__()
        self.norm: nn.Module = nn.BatchNorm1d(channels, affine=False)
        self.project = nn.Linear(channels, _MEMORY)
        self.linear = open_linear(_MEMORY, paths)
        self.memory = memory

    def decide(self, described_ND: Tensor, state: State = None) -> tuple[Tensor, State]:
        normalised_ND = _normalised(self.norm, described_ND.to(self.project.weight.dtype))
        state = self.memory(self.project(normalised_ND), state)
        assert state is not None
        return self.linear(state[0]), state

    def score(self, described_ND: Tensor, carried: dict[str, Tensor], fresh: bool) -> Tensor:
        state = None if fresh else (carried["hidden"], carried["cell"])
        scores, state = self.decide(described_ND, state)
        assert state is not None
        carried["hidden"], carried["cell"] = state
        return scores

    def scorer(self, fresh: bool) -> nn.Linear | Rows | None:
        carried = {} if fresh else dict.fromkeys(("hidden", "cell"), self.memory.hidden_size)
        described = {"description": self.project.in_features}
        return Rows(_Scores(self), described | carried, ("scores", "next_hidden", "next_cell"))

    def fold(self) -> None:
        self.norm, self.project = nn.Identity(), _folded(self.norm, self.project)


class _Scores(nn.Module):
    """What a recurrent gate makes of a description and of the state that the one before left."""

    def __init__(self, gate: RecurrentGate) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, described_ND: Tensor, *carried: Tensor) -> tuple[Tensor, ...]:
        scores, state = self.gate.decide(described_ND, (carried[0], carried[1]) if carried else None)
        assert state is not None
        return scores, *state


def pool(features_NCHW: Tensor) -> Tensor:
    """Channel means, (N, C, H, W) -> (N, C)."""
    return pool_map(features_NCHW).flatten(1)


def pool_map(features_NCHW: Tensor) -> Tensor:
    """Channel means as a map of one pixel: of large maps, which only memory's speed limits, over some pixels."""
    step = min(features_NCHW.shape[-2:]) // _SAMPLED
    if step > 1:  # a pool of one pixel is the stride that ONNX Runtime computes in its blocked layout
        features_NCHW = functional.max_pool2d(features_NCHW, 1, step)
    return functional.adaptive_avg_pool2d(features_NCHW, 1)


def open_linear(inputs: int, paths: int) -> nn.Linear:
    """A linear layer that prefers the last path whatever it sees, until it is trained."""
    linear = nn.Linear(inputs, paths)
    nn.init.zeros_(linear.weight)
    with torch.no_grad():
        linear.bias.zero_()[-1] = OPEN
    return linear


def _normalised(norm: nn.Module, values: Tensor) -> Tensor:
    """``norm(values)``; one value for each channel has no statistics, so in train mode the running ones stand in."""
    if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.training and values.numel() == values.shape[1]:
        return functional.batch_norm(values, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    return cast(Tensor, norm(values))


def _folded(norm: nn.Module, linear: nn.Linear) -> nn.Linear:
    """The linear layer with the normalisation before it, in eval mode."""
    if not isinstance(norm, nn.BatchNorm1d):
        return linear
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    folded = copy.deepcopy(linear)
    with torch.no_grad():
        folded.weight.copy_(linear.weight * scale)
        folded.bias.copy_(linear.bias - linear.weight @ (norm.running_mean * scale))
    return folded


def sample_paths(scores_NP: Tensor, noise: float) -> Tensor:
    """One path for each image as a one-hot row with the gradient of a softmax (straight-through).

    The path is the best one after ``noise`` times Gumbel noise is added to the scores: at 1 a draw from their softmax
    (Jang et al. 2017; Verelst & Tuytelaars 2020, DynConv, sec. 3.2), at 0 the decision of eval mode.
    """
    scores = scores_NP.float()
    if noise:
        scores = scores - noise * torch.empty_like(scores).exponential_().log()
    soft = scores.softmax(1)
    hard = functional.one_hot(soft.argmax(1), scores.shape[1]).to(soft)
    return hard + (soft - soft.detach())  # in this order exactly one-hot


def choose(scores_NP: Tensor, costs_P: Tensor, offset: float) -> Tensor:
    """Path index of each image, (N,): the best score after ``offset`` times the path's relative cost is added."""
    return (scores_NP.float() + offset * costs_P.float() if offset else scores_NP).argmax(1)


def make_gate(kind: str, channels: int, paths: int, memory: nn.LSTMCell | None) -> Gate:
    """A gate of a kind: linear, conv or recurrent, which needs the memory."""
    if kind == "recurrent":
        assert memory is not None
        return RecurrentGate(channels, paths, memory)
    return (LinearGate if kind == "linear" else ConvGate)(channels, paths)
