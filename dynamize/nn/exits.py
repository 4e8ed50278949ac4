"""Pieces that answer: exits, at which images leave, and what the network's own classifier adds of what they saw."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from dynamize.graph.macs import counting_macs
from dynamize.nn.confidence import CONFIDENCES, ConfidenceName, sure_words
from dynamize.nn.flow import NOBODY, ONLY, Flow, Indices, Options
from dynamize.nn.gradients import Rescale
from dynamize.nn.heads import ExitHead
from dynamize.nn.instructions import Instruction, Leave, Through
from dynamize.nn.piece import GOES_ON, LEAVES, Call, Choose, Decision, Part, Piece, Run, Setting
from dynamize.nn.scoring import Floats

CONTEXT = "context"  # (n, D), in what a flow carries: everything that heads so far have pooled, side by side


_BEYOND = 1e300  # no score is so large


class Answering(Piece):
    """A piece that is one head: ``forward`` gives what :meth:`decide` goes on with.

    It is bound by its "head", or by "both": the path before it and the head in one call.
    """

    answers = True
    trains_alone = True

    def parts(self) -> list[Part]:
        return [Part("head", "head", self)]

    def bind(self, calls: Mapping[str, Call]) -> Run:
        both, head = calls.get("both"), calls.get("head")

        def run_both(flow: Flow, setting: Setting) -> None:
            assert both is not None
            flow.features, *found = both(flow.features, flow.extra.get(CONTEXT))
            flow.means = None
            self.decide(flow, setting, *found)

        def run(flow: Flow, setting: Setting) -> None:
            assert head is not None
            self.decide(flow, setting, *head(flow.features, flow.extra.get(CONTEXT)))

        return run if both is None else run_both

    @abstractmethod
    def decide(self, flow: Flow, setting: Setting, logits: Tensor, *more: Tensor) -> None:
        """Go on with what the head has found for all rows."""

    def count(self, flow: Flow) -> None:
        with counting_macs() as counted:
            self.read(flow)
        self.macs = counted()


class Leaving(Answering):
    """A place where images whose score reaches a threshold are answered and leave.

    ``forward``: features (N, C, H, W) and, if it is ``chained``, the context (N, D) or None -> logits (N, classes),
    score (N,) and, if it is chained, the context for the next one.

    Attributes:
        temperature: of the logits before they are scored, a scalar.
        chained: whether later ones build on what it saw, so that it runs even while it is off.
        alone: whether its score is that of its own logits, whatever others answered before.
        needs: the name of another at which images may leave, without which this one is not asked.
    """

    effect = "leaves"
    scored = True
    kind: ClassVar[str] = "exit"
    alone = True
    needs: str | None = None
    temperature: Tensor

    def __init__(self, name: str, confidence: ConfidenceName = "top_probability", chained: bool = False) -> None:
        super().__init__()
        self._name, self.confidence, self.chained = name, confidence, chained
        self.register_buffer("temperature", torch.ones(()))

    @abstractmethod
    def classify(self, features_NCHW: Tensor, context_ND: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits (N, classes), and what later ones may build on (N, D'), if there is such."""

    def forward(self, features_NCHW: Tensor, context_ND: Tensor | None = None) -> tuple[Tensor, ...]:
        logits, seen = self.classify(features_NCHW, context_ND)
        score = self.score(logits, features_NCHW)
        return (logits, score, extend(context_ND, seen)) if self.chained and seen is not None else (logits, score)

    def score(self, logits: Tensor, features_NCHW: Tensor) -> Tensor:
        """How sure the answers are, (N,) in float32: larger is surer."""
        return CONFIDENCES[self.confidence](logits.float() / self.temperature.to(logits.device))

    @property
    def own_name(self) -> str:
        return self._name

    def condition(self, threshold: float | None) -> str:
        """In words, when an image is answered here."""
        if threshold is None:
            return "not used"
        if threshold < -_BEYOND:
            return "all that come here"
        return "nobody, but later answers build on it" if threshold > _BEYOND else self.sure(threshold)

    def sure(self, threshold: float) -> str:
        """In words, how sure an answer is from this score on."""
        return sure_words(self.confidence, threshold)

    @property
    def decision(self) -> Decision:
        return Decision(self.name, self.kind, ("leaves", "goes on"), (0.0, 0.0), self.macs, self.effect)

    @property
    def passes(self) -> bool:
        return True

    def idle(self, setting: Setting) -> bool:
        return not self.chained and setting.thresholds.get(self.name) is None and self.name not in setting.forced

    def instruct(self, files: Mapping[str, str]) -> Instruction:
        return Leave(self.name, _only(files))

    def decide(self, flow: Flow, setting: Setting, logits: Tensor, *more: Tensor) -> None:
        score, *context = more
        if context:
            (flow.extra[CONTEXT],) = context
        if flow.seen is not None:
            flow.seen.append((self.name, logits, score))
            return
        self.let_go(flow, setting, logits, score)

    def let_go(self, flow: Flow, setting: Setting, logits: Tensor, score_N: Tensor | Floats | float) -> None:
        """Answer the images that are sure enough; a single one's score may be a number."""
        leaving = self._leaving(flow, setting, score_N)
        if setting.ends is not None and setting.ends(self.name, np.delete(flow.rows, leaving)):
            leaving = np.arange(len(flow))
        flow.log.append((self.name, flow.rows, _options(len(flow), leaving)))
        flow.leave(leaving, logits)

    def _leaving(self, flow: Flow, setting: Setting, score_N: Tensor | Floats | float) -> Indices:
        if self.name in setting.forced:
            forced = setting.forced[self.name][torch.from_numpy(flow.rows)]
            return np.flatnonzero(forced.cpu().numpy() == LEAVES)
        threshold = setting.thresholds.get(self.name)
        if threshold is None:
            return NOBODY
        if isinstance(score_N, float) or len(flow) == 1:
            score = score_N if isinstance(score_N, float) else score_N.item()
            return ONLY if score >= threshold else NOBODY
        scores = score_N.detach().cpu().numpy() if isinstance(score_N, Tensor) else score_N
        return np.flatnonzero(scores.astype(np.float64) >= threshold)  # in float32 the threshold would be rounded

    def dense(self, flow: Flow, choose: Choose) -> None:
        features = flow.features
        if choose.equilibrium:
            left = flow.ahead
            features = Rescale.apply(flow.features, 1 / left)
            flow.features = Rescale.apply(flow.features, (left - 1) / left)
        flow.ahead -= 1
        logits, seen = self.classify(features, flow.extra.get(CONTEXT))
        assert flow.seen is not None
        flow.seen.append((self.name, logits, None))
        self._hand_on(flow, None if seen is None else seen.detach())

    def read(self, flow: Flow) -> Tensor:
        logits, seen = self.classify(flow.features, flow.extra.get(CONTEXT))
        self._hand_on(flow, seen)
        return logits

    def _hand_on(self, flow: Flow, seen: Tensor | None) -> None:
        if self.chained and seen is not None:
            flow.extra[CONTEXT] = extend(flow.extra.get(CONTEXT), seen)


def _options(rows: int, leaving: Indices) -> Options:
    if rows == 1:  # a single image waits for every microsecond between two sessions
        return (LEAVES,) if len(leaving) else (GOES_ON,)
    options = np.full(rows, GOES_ON)
    options[leaving] = LEAVES
    return options


class Exit(Leaving):
    """An intermediate classifier (Huang et al. 2018, MSDNet, sec. 3; Teerapittayanon et al. 2016, BranchyNet).

    Args:
        name: of its decision: "exit.1".
        head: what answers.
        confidence: what the threshold is compared with.
        chained: whether later exits build on what its head saw.
    """

    def __init__(
        self, name: str, head: ExitHead, confidence: ConfidenceName = "top_probability", chained: bool = False
    ) -> None:
        super().__init__(name, confidence, chained)
        self.head = head

    def classify(self, features_NCHW: Tensor, context_ND: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits, pooled = self.head(features_NCHW, context_ND)
        return logits, pooled

    def parts(self) -> list[Part]:
        return [Part("head", "head", self, self.head.body, self._put, "head.body.")]

    def _put(self, body: nn.Module) -> None:
        self.head.body = body


class Fusion(Answering):
    """Adds what the exits saw to the logits of the network's own classifier.

    ``forward``: logits (N, classes) and context (N, D) -> logits, in a tuple as heads give them.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    @property
    def own_name(self) -> str:
        return "fusion"

    def forward(self, logits: Tensor, context_ND: Tensor) -> tuple[Tensor]:
        return (logits + self.linear(context_ND),)

    def instruct(self, files: Mapping[str, str]) -> Instruction:
        return Through(_only(files))

    def decide(self, flow: Flow, setting: Setting, logits: Tensor, *more: Tensor) -> None:
        flow.features = logits
        del flow.extra[CONTEXT]

    def dense(self, flow: Flow, choose: Choose) -> None:
        self.read(flow)

    def read(self, flow: Flow) -> Tensor:
        (flow.features,) = self(flow.features, flow.extra.pop(CONTEXT))
        return flow.features


def _only(files: Mapping[str, str]) -> str:
    """Of the head, alone or with the path before it."""
    (file,) = files.values()
    return file


def extend(context_ND: Tensor | None, pooled_NC: Tensor) -> Tensor:
    """What the next exit may build on: everything earlier heads pooled, side by side."""
    return pooled_NC if context_ND is None else torch.cat([context_ND, pooled_NC], dim=1)
