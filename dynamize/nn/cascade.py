"""Networks one behind the other: a small one answers the images that it is sure of, the next one gets the others.

A row ``small, Answer, Restart, big, Verdict`` is a cascade (Wang et al. 2020, Wisdom of Committees; Lebovitz et al.
2023, Efficient Inference With Model Cascades). A network whose place to leave is off does not run at all.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from dynamize.nn.confidence import CONFIDENCES, ConfidenceName
from dynamize.nn.exits import Leaving
from dynamize.nn.flow import Flow, take_rows
from dynamize.nn.joining import Joining
from dynamize.nn.piece import Call, Choose, Part, Piece, Run, Setting

EVIDENCE = "evidence"  # (n, classes), in what a flow carries: the joined answers so far, as logits
VOTES = "votes"  # (n, M), int64: what each network so far would have answered alone

MemberConfidence = ConfidenceName | Literal["agreement"]


class Answer(Leaving):
    """The end of a network that is not the last of its row.

    Its score is that of the answers joined so far; or, for ``agreement``, 1 where all networks so far answer alike and
    0 elsewhere (Kolawole et al. 2025, Agreement-Based Cascading), which is never so for the first.

    ``forward``: the network's logits (N, classes) -> the same, score (N,) of them alone.
    """

    kind = "member"
    rank = 1
    links = True

    def __init__(self, confidence: MemberConfidence = "top_probability") -> None:
        self.by_agreement = confidence == "agreement"
        super().__init__("answer", "top_probability" if confidence == "agreement" else confidence)

    @property
    def name(self) -> str:
        return self.member

    def classify(self, features_NCHW: Tensor, context_ND: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return features_NCHW, None

    def score(self, logits: Tensor, features_NCHW: Tensor) -> Tensor:
        return logits[:, 0].float() * 0 if self.by_agreement else super().score(logits, features_NCHW)

    def rated(self, logits: Tensor, votes: Sequence[Tensor], joined: bool) -> Tensor:
        """The score (N,) of an answer, from what each network asked so far would have answered alone, (N,) each.

        Args:
            logits: of the answer, this network's own or ``joined`` with those before.
        """
        if self.by_agreement:
            alike = torch.stack(list(votes)) == votes[-1]
            return (alike.all(0) if len(votes) > 1 else alike[0] & False).float()
        return CONFIDENCES[self.confidence](logits if joined else logits.float() / self.temperature.cpu())

    def decide(self, flow: Flow, setting: Setting, logits: Tensor, *more: Tensor) -> None:
        (score,) = more
        if self.by_agreement:
            score = _agreement(flow, logits)
        joins = setting.combine != "last" and flow.seen is None
        before = flow.extra.get(EVIDENCE) if joins else None
        if before is not None:
            logits = flow.features = flow.extra[EVIDENCE] = join(setting.combine, before, logits, self.temperature)
            score = score if self.by_agreement else CONFIDENCES[self.confidence](logits)
        super().decide(flow, setting, logits, score)
        if joins and before is None and len(flow):
            flow.extra[EVIDENCE] = log_probabilities(flow.features, self.temperature)


class Restart(Piece):
    """Back to the images, for those that are still on their way."""

    rank = -1
    links = True
    restarts = True

    @property
    def own_name(self) -> str:
        return "start"

    def parts(self) -> list[Part]:
        return []

    def bind(self, calls: Mapping[str, Call]) -> Run:
        def run(flow: Flow, setting: Setting) -> None:
            restart(flow)

        return run

    def dense(self, flow: Flow, choose: Choose) -> None:
        restart(flow)

    def count(self, flow: Flow) -> None:
        restart(flow)


class Verdict(Piece):
    """Joins the last network's answers with those of the networks before."""

    rank = 1
    links = True
    scored = True
    temperature: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("temperature", torch.ones(()))

    @property
    def own_name(self) -> str:
        return "verdict"

    @property
    def passes(self) -> bool:
        return True

    def idle(self, setting: Setting) -> bool:
        return setting.combine == "last"

    def parts(self) -> list[Part]:
        return []

    def bind(self, calls: Mapping[str, Call]) -> Run:
        def run(flow: Flow, setting: Setting) -> None:
            before = flow.extra.get(EVIDENCE)
            if before is not None and len(flow):
                flow.features = join(setting.combine, before, flow.features, self.temperature)

        return run

    def dense(self, flow: Flow, choose: Choose) -> None:
        """Each network learns by itself."""

    def count(self, flow: Flow) -> None:
        """Nothing that multiplies."""


def restart(flow: Flow) -> None:
    """Let the images that are left come in again; only what their answers so far say is kept."""
    everyone = len(flow.rows) == len(flow.images)
    flow.features = flow.images if everyone else take_rows(flow.images, flow.rows)
    flow.means, flow.owned = None, False
    flow.extra = {name: values for name, values in flow.extra.items() if name in (EVIDENCE, VOTES)}


def log_probabilities(logits: Tensor, temperature: Tensor | float) -> Tensor:
    """Of softmax(logits / temperature), in float32."""
    return (logits.float() / temperature).log_softmax(1)


def join(how: Joining, before: Tensor, logits: Tensor, temperature: Tensor | float) -> Tensor:
    """Answers so far (n, classes) and those of one network more as one, but for a constant that all classes share."""
    if how == "last":
        return logits
    added = log_probabilities(logits, temperature)
    return before + added if how == "product" else torch.logaddexp(before, added)


def _agreement(flow: Flow, logits: Tensor) -> Tensor:
    own = logits.argmax(1, keepdim=True)
    votes = flow.extra.get(VOTES)
    flow.extra[VOTES] = own if votes is None else torch.cat([votes, own], 1)
    return torch.zeros(len(own), device=own.device) if votes is None else (votes == own).all(1).float()
