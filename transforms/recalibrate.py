"""`recalibrate`: batch-norm statistics estimated anew: for gates, for another resolution, or for each width."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from dynamize.data import Images, Splits
from dynamize.errors import DynamizeError
from dynamize.measure.accuracy import accuracy, everything
from dynamize.measure.costs import exit_costs
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.units import Unit
from dynamize.training.statistics import Estimated, Norms, estimate_statistics
from dynamize.transform import Applied, Context, Kind, Transform

Statistics = Literal["shared", "recalibrated", "widths"]
_NORMS: dict[Statistics, Norms] = {"recalibrated": "all", "widths": "widths"}
_NAMES = {"shared": "as they were", "recalibrated": "recalibrated", "widths": "for each width by itself"}


class Recalibrate(Transform):
    """Estimate batch-norm statistics again, where the calibration images are answered better for it.

    On train images, with the gates deciding: either all statistics anew, shared by all paths as in training, or those
    of each width of channel gates by itself from the images that take it (slimmable networks, Yu et al. 2019, sec. 3.3;
    Yu & Huang 2019, sec. 3.3); of paths that few images take, from all.

    Behind `cascade` and `glance_focus` it is for the networks that see images at another size than they were trained at
    (Touvron et al. 2019, Fixing the train-test resolution discrepancy), each by itself, unless ``member`` names one.

    Example:
        >>> net = dz.source("dynamize:digits_resnet", pretrained=True)
        >>> distill = dz.Distill(epochs=1, gate_budget=0.8)
        >>> steps = [dz.ChannelGates(groups=2), distill, dz.Recalibrate(images=64)]
        >>> dyn = dz.convert(net, steps, (1, 8, 8), context)  # a dz.Context
        >>> dyn.history[2]["statistics"] in ("shared", "recalibrated", "widths")
        True
    """

    pass_name: Literal["recalibrate"] = Field("recalibrate", alias="pass")
    images: PositiveInt = Field(4096, description="train images to estimate from; fewer if they do not fit into memory")
    augment: bool = Field(
        True, description="augment them as in training, which the weights count on; false: the test-time transform"
    )
    statistics: Literal["auto"] | Statistics = Field(
        "auto",
        description="shared: as training left them; recalibrated: all estimated anew; widths: each narrower path of "
        "channel gates has its own; auto: the highest accuracy on the calibration images, the first on a tie",
    )

    exact: ClassVar[bool] = False
    kind: ClassVar[Kind] = Kind.ESTIMATES | Kind.FITS_CALIBRATION

    def passes(self, data: Splits) -> float:
        return 3 * (self.images + len(data.calibration))

    def apply(self, network: DynamicNetwork, context: Context) -> Applied:
        units = [unit for unit in network.changing if unit.slices and not network.members]
        if self.statistics == "widths" and not units:
            raise DynamizeError(
                "recalibrate: the network has no channel gates, so there are no widths with statistics of their own: "
                "put `channel_gates` before, or use statistics: recalibrated"
            )
        if self.statistics == "shared" or (context.data is None and self.statistics != "auto"):
            for unit in units if self.statistics == "widths" else ():
                unit.own_statistics()  # the weights with the statistics are loaded next
            return Applied(network, self)
        tried: list[Statistics] = [self.statistics] if self.statistics != "auto" else ["recalibrated"]
        if self.statistics == "auto" and units:
            tried.append("widths")
        return self._best(network, units, tried, context)

    def _best(self, network: DynamicNetwork, units: list[Unit], tried: list[Statistics], context: Context) -> Applied:
        data = context.needs_data(self)
        without = [unit for unit in units if not unit.has_own]
        found: dict[Statistics, _Judgement] = {"shared": _judge(network, data.calibration, context.device)}
        states = {"shared": _copied(network)}
        sizes: Estimated | None = None
        for statistics in tried:
            sizes = estimate_statistics(
                network,
                data.train,
                context.device,
                count=self.images,
                seed=context.seed,
                norms=_NORMS[statistics],
                augmented=self.augment,
            )
            found[statistics] = _judge(network, data.calibration, context.device)
            states[statistics] = _copied(network)
            if statistics != tried[-1]:
                network.load_state_dict(states["shared"])
        assert sizes is not None
        allowed = tried if self.statistics != "auto" else list(found)
        chosen = max(allowed, key=lambda one: found[one].accuracy)
        if chosen != "widths":
            for unit in without:
                unit.shared_statistics()
        network.load_state_dict(states[chosen])
        judged = ", ".join(f"{judgement} {_NAMES[one]}" for one, judgement in found.items())
        notes = [
            f"calibration accuracy with batch-norm statistics from {sizes.images} train images: {judged}; kept "
            f"{_NAMES[chosen]}"
        ]
        if sizes.rare and chosen == "widths":
            notes.append(f"{sizes.rare} paths that few of these images take have their statistics from all of them")
        return Applied(network, self.model_copy(update={"statistics": chosen}), notes)


def _copied(network: DynamicNetwork) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


@dataclass(frozen=True)
class _Judgement:
    """Accuracy, mean over the exits, and the mean MACs as a share of those with all gates open."""

    accuracy: float
    macs_ratio: float

    def __str__(self) -> str:
        return f"{self.accuracy:.2%} at {self.macs_ratio:.3f} of the MACs"


def _judge(network: DynamicNetwork, images: Images, device: torch.device) -> _Judgement:
    seen, costs = everything(network, images, device), exit_costs(network)
    accuracies = [accuracy(one, seen.labels) for one in seen.logits]
    saved = sum(float(one.mean()) for one in costs.savings(seen.taken).values())
    return _Judgement(sum(accuracies) / len(accuracies), 1 - saved / float(costs.cumulative()[-1]))
