"""Networks one behind the other: a small one answers the images that it is sure of, the next one gets the others.

A row ``small, Answer, Restart, big, Verdict`` is a cascade (Wang et al. 2020, Wisdom of Committees; Lebovitz et al.
2023, Efficient Inference With Model Cascades). A network whose place to leave is off does not run at all.
"""

from collections.abc import Container, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dynamize.nn import single
from dynamize.nn.confidence import CONFIDENCES, ConfidenceName
from dynamize.nn.exits import Leaving
from dynamize.nn.flow import Flow, take_rows
from dynamize.nn.instructions import Instruction, Join, LeaveJoined, Rows
from dynamize.nn.instructions import Restart as StartAgain
from dynamize.nn.joining import Joining
from dynamize.nn.piece import Call, Choose, Part, Piece, Run, Setting
from dynamize.nn.scoring import SCORES, Floats, agreement, join, weigh

EVIDENCE = "evidence"  # (n, classes), in what a flow carries: the joined answers so far, as logits
VOTES = "votes"  # (n, M), int64: what each network so far would have answered alone
PLACES = "places"  # (n, 2 * crops): top and left of each crop, from 0 to 1 of where it may lie
KEPT = (EVIDENCE, VOTES, PLACES)

MemberConfidence = ConfidenceName | Literal["agreement"]


class Answer(Leaving):
    """The end of a network that is not the last of its row.

    Its score is that of the answers joined so far; or, for ``agreement``, whether all networks so far answer alike.

    Attributes:
        classes: how many logits the network gives.
        needs: the name of a network before without which this one is not asked.

    Args:
        chained: whether later networks build on what this one saw, so that it always runs.
    """

    kind = "member"
    rank = 1
    links = True

    def __init__(
        self, confidence: MemberConfidence = "top_probability", needs: str | None = None, chained: bool = False
    ) -> None:
        super().__init__("answer", "top_probability" if confidence == "agreement" else confidence, chained)
        self.alone = confidence != "agreement"
        self.classes = 0
        self.needs = needs

    @property
    def name(self) -> str:
        return self.member

    def classify(self, features_NCHW: Tensor, context_ND: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return features_NCHW, None

    def parts(self) -> list[Part]:
        return []

    def count(self, flow: Flow) -> None:
        super().count(flow)
        self.classes = flow.features.shape[1]

    def sure(self, threshold: float) -> str:
        if self.alone:
            return super().sure(threshold)
        if threshold <= 0:
            return "all that come here"
        return "all networks so far agree" if threshold <= 1 else "nobody, but later answers build on it"

    def rated(self, answer_NC: Floats, votes_NM: NDArray[np.int64] | None) -> Floats:
        """How sure an answer is, (N,), from its logits, weighed, or from what each network would have answered."""
        return SCORES[self.confidence](answer_NC) if votes_NM is None else agreement(votes_NM)

    def bind(self, calls: Mapping[str, Call]) -> Run:
        temperature: float = self.temperature.item()

        def run(flow: Flow, setting: Setting) -> None:
            logits = flow.features
            if flow.seen is not None:
                score = self.rated(weigh("last", numbers(logits), temperature), None)
                flow.seen.append((self.name, logits, torch.from_numpy(score)))
            elif self.alone and single.is_single(logits):
                said = weighed_single(flow, setting.combine, temperature)
                if setting.combine != "last":
                    logits = flow.extra[EVIDENCE] = single.as_logits(said, logits.device)
                self.let_go(flow, setting, logits, single.SCORES[self.confidence](said))
            else:
                own = numbers(logits)
                answer = weighed(flow, setting.combine, own, temperature)
                if setting.combine != "last":
                    flow.extra[EVIDENCE] = torch.from_numpy(answer)
                    logits = flow.extra[EVIDENCE].to(logits.device)
                self.let_go(flow, setting, logits, self.rated(answer, self._votes(flow, own)))

        return run

    def instruct(self, files: Mapping[str, str]) -> Instruction:
        rated = Rows(_Rated(self.confidence), {"answer": self.classes}, ("score",)) if self.alone else None
        return LeaveJoined(self.name, self.temperature.item(), rated)

    def _votes(self, flow: Flow, own_NC: Floats) -> NDArray[np.int64] | None:
        """With this network's own, if they are what decides."""
        if self.alone:
            return None
        own = torch.from_numpy(own_NC.argmax(axis=1, keepdims=True))
        before = flow.extra.get(VOTES)
        flow.extra[VOTES] = own if before is None else torch.cat([before, own], 1)
        return flow.extra[VOTES].numpy()


class _Rated(nn.Module):
    """How sure answers (N, classes) are, (N,)."""

    def __init__(self, confidence: ConfidenceName) -> None:
        super().__init__()
        self.confidence = confidence

    def forward(self, logits_NC: Tensor) -> Tensor:
        return CONFIDENCES[self.confidence](logits_NC)


class Restart(Piece):
    """Back to the images, for those that are still on their way.

    Args:
        keeps: names of what they carry on besides what was answered so far.
    """

    rank = -1
    links = True
    restarts = True

    def __init__(self, keeps: Sequence[str] = ()) -> None:
        super().__init__()
        self.keeps = (*KEPT, *keeps)

    @property
    def own_name(self) -> str:
        return "start"

    def parts(self) -> list[Part]:
        return []

    def go_back(self, flow: Flow) -> None:
        """Let the images come in again."""
        restart(flow, self.keeps)

    def bind(self, calls: Mapping[str, Call]) -> Run:
        def run(flow: Flow, setting: Setting) -> None:
            self.go_back(flow)

        return run

    def instruct(self, files: Mapping[str, str]) -> Instruction:
        return StartAgain(self.keeps)

    def dense(self, flow: Flow, choose: Choose) -> None:
        self.go_back(flow)

    def count(self, flow: Flow) -> None:
        self.go_back(flow)


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
        temperature: float = self.temperature.item()

        def run(flow: Flow, setting: Setting) -> None:
            logits = flow.features
            if EVIDENCE not in flow.extra or not len(flow):
                return
            if single.is_single(logits):
                flow.features = single.as_logits(weighed_single(flow, setting.combine, temperature), logits.device)
            else:
                answer = weighed(flow, setting.combine, numbers(logits), temperature)
                flow.features = torch.from_numpy(answer).to(logits.device)

        return run

    def instruct(self, files: Mapping[str, str]) -> Instruction:
        return Join(self.temperature.item())

    def dense(self, flow: Flow, choose: Choose) -> None:
        """Each network learns by itself."""

    def count(self, flow: Flow) -> None:
        """Nothing that multiplies."""


def restart(flow: Flow, keeps: Container[str] = KEPT) -> None:
    """Let the images that are left come in again; of what they carry only ``keeps`` is kept."""
    everyone = len(flow.rows) == len(flow.images)
    flow.features = flow.images if everyone else take_rows(flow.images, flow.rows)
    flow.means, flow.owned = None, False
    flow.extra = {name: values for name, values in flow.extra.items() if name in keeps}


def numbers(logits: Tensor) -> NDArray[np.float32]:
    """As numpy has them, in float32."""
    plain = logits.dtype == torch.float32 and logits.is_cpu and not logits.requires_grad
    found: NDArray[np.float32] = (logits if plain else logits.detach().float().cpu()).numpy()
    return found


def weighed(flow: Flow, how: Joining, own_NC: Floats, temperature: float) -> Floats:
    """The answers of the networks so far as logits of one, with a network's own logits added."""
    added = weigh(how, own_NC, temperature)
    before = flow.extra.get(EVIDENCE)
    return added if before is None else join(how, numbers(before), added)


def weighed_single(flow: Flow, how: Joining, temperature: float) -> list[float]:
    """The same for the only image of a flow, whose features are the network's logits."""
    added = single.weigh(how, flow.features.tolist()[0], temperature)
    before = flow.extra.get(EVIDENCE)
    return added if before is None else single.join(how, before.tolist()[0], added)
