"""`distill`: train the exits, or the whole network with them, from the labels and from the original network."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from accelerate.tracking import get_available_trackers
from pydantic import Field, PositiveFloat, PositiveInt
from torch import nn

from dynamize.data.image_files import check_folder_of_images, with_unlabelled
from dynamize.data.images import refuse_none
from dynamize.errors import DynamizeError
from dynamize.graph.macs import count_macs
from dynamize.graph.tracer import blank
from dynamize.measure.costs import exit_costs
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Choose
from dynamize.runtime.profile import option_latency
from dynamize.training.gating import BudgetLoss, GatedLoss, Noise
from dynamize.training.hints import HintLoss
from dynamize.training.loop import WEIGHT_DECAY, Plan, Precision, decide_precision, train
from dynamize.training.objectives import MultiExitLoss
from dynamize.training.parts import Trained, last_layers
from dynamize.transform import Applied, Context, Kind, Share, Transform, gates_are_fused

if TYPE_CHECKING:
    from dynamize.data import Splits

_DEFAULT_BUDGET = 0.6


class Distill(Transform):
    """Train with cross entropy and knowledge distillation (Hinton et al. 2015).

    On a network without exits this is plain fine-tuning towards the teacher; with ``alpha: 0``, towards labels. Train
    images labelled -1 are learnt from the teacher alone; with ``alpha: 1`` no label counts.

    Example:
        >>> net = dz.source("dynamize:digits_resnet", pretrained=True)
        >>> steps = [dz.Exits(count=1), dz.Distill(epochs=1)]
        >>> dyn = dz.convert(net, steps, (1, 8, 8), context)  # a dz.Context
        >>> [step["pass"] for step in dyn.history]
        ['exits', 'distill']
    """

    pass_name: Literal["distill"] = Field("distill", alias="pass")
    epochs: PositiveInt = Field(3, description="passes over the train split")
    train: Trained = Field(
        "all",
        description="heads: the network's own layers and batch-norm statistics stay as they are; last: but for its "
        "last layer and last batch norm, which is enough for images of another size (Touvron et al. 2019, FixRes)",
    )
    batch_size: PositiveInt = Field(128, description="over all processes")
    lr: PositiveFloat = Field(0.05, description="peak of the one-cycle schedule")
    weight_decay: Annotated[float, Field(ge=0)] = WEIGHT_DECAY
    alpha: Share = Field(0.5, description="share of each exit's loss that is distillation from the teacher")
    temperature: PositiveFloat = Field(2.0, description="of the distillation")
    features: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="weight of the distance of feature maps to the teacher's, at exits and at the end of each "
        "resolution, where both have one shape",
    )
    unlabelled: Path | None = Field(
        None, description="folder of images without labels, which are added to the train images"
    )
    from_last: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight of the distillation of early exits from the last exit"
    )
    joined: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="weight of the loss of the answers so far joined, of each exit behind the first; null: 1 for the "
        "looks of `glance_focus`, which complete each other, else 0",
    )
    exit_weights: list[PositiveFloat] | None = Field(None, description="one for each exit; null weighs all alike")
    gradient_equilibrium: bool = Field(
        False, description="rescale gradients so that each exit counts alike in the shared layers (IMTA, sec. 3.2)"
    )
    gate_budget: Share | None = Field(
        None,
        description="networks with gates: mean cost that the gates are trained towards, as a share of the original "
        "network's; null: 0.6 if there are gates",
    )
    gate_cost: Literal["macs", "ms"] = Field(
        "macs", description="what `gate_budget` counts; ms: times measured on the run's backend at batch 1"
    )
    gate_noise: Literal["auto", "falling", "long"] = Field(
        "auto",
        description="how gate decisions are drawn: falling: less and less at random from the start; long: at random "
        "for 60 % of the training; auto: long if all gates choose between two paths (skip or run)",
    )
    precision: Precision = "auto"
    trackers: list[str] = Field([], description="accelerate's trackers by name, e.g. tensorboard")

    structural: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    kind: ClassVar[Kind] = Kind.TRAINS
    not_after: ClassVar[Kind] = Kind.ESTIMATES
    added: ClassVar[tuple[str, ...]] = (*Transform.added, "joined")

    def passes(self, data: "Splits") -> float:
        return self.epochs * (len(data.train) * (4 if self.alpha else 3) + len(data.calibration))

    def check(self, network: DynamicNetwork, context: Context) -> None:
        data = context.needs_data(self)
        self._check(network)
        if self.unlabelled is None:
            refuse_none(len(data.train), data.train.name)
        else:
            check_folder_of_images(self.unlabelled)
        missing = sorted(set(self.trackers) - {str(one) for one in get_available_trackers()})
        if missing:
            raise DynamizeError(
                f"distill: trackers: {', '.join(missing)}: not installed, or no tracker of accelerate's: pip install "
                "it, or leave it out"
            )

    def check_budget(self, network: DynamicNetwork, context: Context) -> None:
        if network.changing and self.train == "all" and self.gate_cost == "macs":
            self._budget(network, context)

    def apply(self, network: DynamicNetwork, context: Context) -> Applied:
        data = context.needs_data(self)
        self._check(network)
        if self.unlabelled is not None:
            data = with_unlabelled(data, self.unlabelled)
        precision = decide_precision(self.precision, context.device)
        teacher = self._teacher(context)
        plan = Plan.of(
            context,
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            weight_decay=self.weight_decay,
            part=self.train,
            bf16=precision == "bfloat16",
            trackers=tuple(self.trackers),
            label=self.pass_name,
        )
        joined = float(any(piece.cuts for piece in network.row)) if self.joined is None else self.joined
        answers = MultiExitLoss(
            teacher,
            alpha=self.alpha,
            temperature=self.temperature,
            from_last=self.from_last,
            weights=self.exit_weights,
            joined=joined,
        )
        hints = HintLoss(answers, self.features, network, context.needs_teacher(self)) if self.features else None
        gated = bool(network.changing) and self.train == "all"  # heads alone are trained with the gates as they are
        loss: Any = hints or answers
        if gated:
            loss = GatedLoss(loss, self._budget(network, context))
        network.choose.equilibrium = self.gradient_equilibrium
        with hints.watching() if hints else nullcontext():
            rows = train(network, data, loss, plan, context.progress)
        network.choose = Choose()
        exits = ", ".join(f"{accuracy:.1%}" for accuracy in rows[-1]["calibration_accuracy"])
        found: dict[str, object] = {"precision": precision, "joined": joined}
        if gated:
            found |= {"gate_budget": self._target, "gate_noise": self._noise(network)}
        resolved = self.model_copy(update=found)
        notes = [f"accuracy of each exit on the calibration images: {exits}"]
        if self.gate_budget is not None and not gated:
            notes.append("gate_budget did nothing: `fuse_gates` left no gates")
        return Applied(network, resolved, notes)

    def _teacher(self, context: Context) -> nn.Module | None:
        """Who says what the logits should be, beside the labels."""
        wanted = self.alpha > 0 and (context.teacher is not None or self.alpha == 1 or self.unlabelled is not None)
        return context.needs_teacher(self) if wanted else None

    @property
    def _target(self) -> float:
        return _DEFAULT_BUDGET if self.gate_budget is None else self.gate_budget

    def _noise(self, network: DynamicNetwork) -> Noise:
        if self.gate_noise != "auto":
            return self.gate_noise
        return "long" if all(unit.binary for unit in network.changing) else "falling"

    def _budget(self, network: DynamicNetwork, context: Context) -> BudgetLoss:
        counted = exit_costs(network)
        opened = float(counted.cumulative()[-1])
        options: dict[str, list[float]] = {one.name: list(one.macs) for one in counted.changing}
        whole = sum(count_macs(net, blank(net, 1, *network.seen_by(name))) for name, net in network.graphs.items())
        if self.gate_cost == "ms":
            times = option_latency(network, context.backend, context.device)
            options, opened, whole = times.options, times.opened, times.static
        fixed = opened - sum(costs[-1] for costs in options.values())
        budget = BudgetLoss(network.choose, self._target, options, fixed, whole, self._noise(network))
        cheapest, dearest = budget.reachable
        if not cheapest < self._target <= dearest:
            raise DynamizeError(
                f"distill: gate_budget {self._target:g} cannot be reached: with all gates closed the network costs "
                f"{cheapest:.3f} of the original's {self.gate_cost}, with all open {dearest:.3f}. Ask for one between."
            )
        return budget

    def _check(self, network: DynamicNetwork) -> None:
        if self.exit_weights is not None and len(self.exit_weights) != network.exit_count:
            raise DynamizeError(
                f"distill: exit_weights has {len(self.exit_weights)} entries, the network {network.exit_count} exits "
                "(its own classifier is the last)"
            )
        if self.gate_budget is not None and not network.changing and not gates_are_fused(network):
            raise DynamizeError("distill: gate_budget, but the network has no gates: put `skip_gates` before")
        if self.gate_budget is not None and self.train != "all":
            raise DynamizeError(
                f"distill: gate_budget, but train: {self.train} leaves the gates as they are: use train: all"
            )
        if self.unlabelled is not None and self.alpha == 0:
            raise DynamizeError(
                "distill: unlabelled, but alpha: 0 takes nothing from the original network: give alpha above 0"
            )
        if self.features and self.train != "all":
            raise DynamizeError(
                f"distill: features, but train: {self.train} leaves the feature maps as they are: set one only"
            )
        if self.features and network.members:
            raise DynamizeError(
                "distill: features, but networks that see images in other sizes have no feature maps of the original "
                "network's to compare: set features: 0"
            )
        alone = any(True for piece in network.row if piece.trains_alone for _ in piece.parameters())
        if self.train == "heads" and not alone:
            raise DynamizeError("distill: train: heads, but the network has no exit heads: put an `exits` step before")
        if self.train == "last" and not last_layers(network):
            raise DynamizeError("distill: train: last, but the network has no linear layer or convolution of its own")
