"""Answers of an artifact on image files: class, confidence, the exit each image left at and what that cost."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dynamize import artifact
from dynamize.calibration.temperature import answer_temperature
from dynamize.data import ImageSet
from dynamize.data.image_files import files_as_images
from dynamize.data.storage import UnreadableImage
from dynamize.errors import DynamizeError
from dynamize.measure.costs import Costs, exit_costs
from dynamize.nn.executor import Routed
from dynamize.nn.network import DynamicNetwork
from dynamize.runtime.compiled import CompiledNetwork, compile_network
from dynamize.runtime.deadline import Timely, deadline_notes, seconds_of
from dynamize.runtime.engine import ANYWHERE
from dynamize.verbs.telling import answerer_names

_BATCH = 64


@dataclass(frozen=True)
class Prediction:
    """The answer for one file, or why there is none.

    ``exit`` counts from 1, and ``by`` is what it is called: of a cascade, which network answered; ``macs`` are those
    executed for this image; ``confidence`` is the probability of the answer after the exit's temperature; ``paths`` are
    the indexes of the paths taken through the gated units, the cheapest being 0, up to the exit; ``cut`` says, where
    there is a deadline, whether it was answered at that exit for want of time. With an ``error`` all are None.
    """

    file: str
    answer: str | None = None
    confidence: float | None = None
    exit: int | None = None
    by: str | None = None
    macs: float | None = None
    paths: list[int] | None = None
    cut: bool | None = None
    error: str | None = None


class Predictor:
    """An artifact, ready to answer.

    Args:
        path: folder of the artifact.
        backend: one of :func:`dynamize.runtime.engine.backend_names`.
        trust_code: whether a source that names code may be imported.
    """

    def __init__(
        self,
        path: Path,
        *,
        backend: str = ANYWHERE,
        device: torch.device | str = "cpu",
        trust_code: bool = False,
    ) -> None:
        self.manifest = artifact.read_manifest(path)
        self.path, self.backend, self.device = path, backend, torch.device(device)
        self.network: DynamicNetwork = artifact.load(path, trust_code=trust_code)
        self.names = answerer_names(self.network)
        self._timely: list[Timely] = []
        self._deadline_ms: float | None = None

    def choose(
        self, *, point: str | None = None, macs_ratio: float | None = None, max_drop: float | None = None
    ) -> None:
        """Switch to another operating point; with nothing given it stays where calibration put it.

        Args:
            point: its name.
            macs_ratio: the most accurate one that costs at most this share of the original network's MACs.
            max_drop: the cheapest one expected to lose at most this accuracy, in points.

        Raises:
            DynamizeError: more than one is given, the network was not calibrated, or no point is within the limit.
        """
        given = [value for value in (point, macs_ratio, max_drop) if value is not None]
        if len(given) > 1:
            raise DynamizeError("--point, --budget and --max-drop each choose the operating point: give one of them")
        if not given:
            return
        points = self.network.operating_points
        if points is None:
            path = shlex.quote(str(self.path))
            raise DynamizeError(f"{self.path} has no operating points yet: run `dynamize calibrate {path}`")
        if point is not None:
            self.network.set_operating_point(point)
        elif macs_ratio is not None:
            self.network.set_operating_point(points.at(macs_ratio=macs_ratio))
        elif max_drop is not None:
            self.network.set_operating_point(points.at(max_drop=max_drop))

    @property
    def notes(self) -> list[str]:
        """What a deadline made of the answers given so far."""
        return [] if self._deadline_ms is None else deadline_notes(self._timely, self._deadline_ms)

    def predict(self, files: Sequence[str], deadline_ms: float | None = None) -> Iterator[Prediction]:
        """One prediction a file, in order; a file that cannot be read gets one with an ``error``.

        Args:
            files: paths of images.
            deadline_ms: by which each batch of up to 64 images is answered, counted from when they are read.

        Raises:
            DynamizeError: the artifact does not say how images are normalised, or the deadline is no positive number.
        """
        self._deadline_ms, self._timely = deadline_ms, []
        if deadline_ms is not None:
            seconds_of(deadline_ms)
        spec = self.manifest.data
        if spec is None:
            raise DynamizeError(
                f"{self.path} does not say how images are sized and normalised: save it again with "
                "artifact.save(network, path, data=DataSpec(source=..., normalize=...))"
            )
        channels, height, width = self.manifest.input
        images = files_as_images(files, spec, (channels, height, width))
        compiled = compile_network(self.network, self.backend, self.device)
        costs = exit_costs(self.network)
        for start in range(0, len(files), _BATCH):
            yield from self._batch(images, range(start, min(start + _BATCH, len(files))), compiled, costs)

    def _batch(self, images: ImageSet, index: range, compiled: CompiledNetwork, costs: Costs) -> Iterator[Prediction]:
        paths = images.keys
        read: dict[int, Tensor] = {}
        failed: dict[int, str] = {}
        for i in index:
            try:
                read[i] = images.prepare(images.__getitems__([i])[0])[0]
            except UnreadableImage as error:
                failed[i] = str(error)
        answers: dict[int, Prediction] = {}
        if read:
            routed, cut = self._answered(compiled, torch.stack(list(read.values())).to(self.device))
            macs = costs.executed(routed.taken, routed.images)
            options = routed.choices.tolist()
            rows = zip(read, routed.logits.cpu(), routed.exits, macs, options, cut, strict=True)
            answers = {
                i: self._prediction(paths[i], one, int(k), float(cost), [way for way in ways if way >= 0], ends)
                for i, one, k, cost, ways, ends in rows
            }
        for i in index:
            yield answers[i] if i in answers else Prediction(paths[i], error=failed[i])

    def _answered(self, compiled: CompiledNetwork, images: Tensor) -> tuple[Routed, Sequence[bool | None]]:
        """The outcome of a batch, and which images were cut short."""
        if self._deadline_ms is None:
            return compiled.run(images), [None] * len(images)
        self._timely.append(compiled.within(images, self._deadline_ms))
        return self._timely[-1].routed, self._timely[-1].cut.tolist()

    def _prediction(
        self, file: str, logits: Tensor, index: int, macs: float, taken: list[int], cut: bool | None
    ) -> Prediction:
        confidence, answer = (logits.float() / answer_temperature(self.network, index)).softmax(0).max(0)
        names = self.manifest.classes
        name = names[int(answer)] if int(answer) < len(names) else str(int(answer))
        by = self.names[index]
        return Prediction(file, name, round(float(confidence), 6), index + 1, by, macs, taken, cut)
