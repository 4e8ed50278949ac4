"""`hybrid_gates`: refine trained gates, and the network with them, by the reward of sampled decisions."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from dynamize.nn.network import DynamicNetwork
from dynamize.training.loop import WEIGHT_DECAY, Plan, decide_precision, train
from dynamize.training.objectives import MultiExitLoss
from dynamize.training.policy import HybridLoss, deciding, relative_costs
from dynamize.training.refining import RefinesGates
from dynamize.transform import NOTHING_TO_REFINE, Applied, Context, has_gates_to_refine


class HybridGates(RefinesGates):
    """Hybrid reinforcement learning (SkipNet, Wang et al. 2018, sec. 3.3; baseline of BlockDrop, Wu et al. 2018).

    The network learns from labels and teacher as in `distill`, the gates from the reward of decisions sampled from
    their scores: minus the cross entropy, minus ``cost`` times the executed share of the original network's MACs. Each
    step takes two forwards. It refines gates that `distill` has trained.

    Example:
        >>> net = dz.source("dynamize:digits_resnet", pretrained=True)
        >>> steps = [dz.SkipGates(group=1), dz.Distill(epochs=1), dz.HybridGates(epochs=1)]
        >>> dyn = dz.convert(net, steps, (1, 8, 8), context)  # a dz.Context
        >>> [step["pass"] for step in dyn.history]
        ['skip_gates', 'distill', 'hybrid_gates']
    """

    pass_name: Literal["hybrid_gates"] = Field("hybrid_gates", alias="pass")
    epochs: PositiveInt = Field(3, description="passes over the train split")
    lr: PositiveFloat = Field(0.005, description="peak of the one-cycle schedule")
    cost: Annotated[float, Field(ge=0)] = Field(
        0.5, description="what the original network's MACs are worth in cross entropy; more skips more"
    )
    rl_weight: PositiveFloat = Field(1.0, description="weight of the policy gradient")

    @property
    def all_epochs(self) -> int:
        return self.epochs

    def apply(self, network: DynamicNetwork, context: Context) -> Applied:
        if not has_gates_to_refine(self, network):
            return Applied(network, self, [NOTHING_TO_REFINE])
        data = context.needs_data(self)
        precision = decide_precision(self.precision, context.device)
        teacher = context.needs_teacher(self) if self.alpha > 0 else None
        answers = MultiExitLoss(teacher, alpha=self.alpha, temperature=self.temperature)
        costs = relative_costs(network)
        loss = HybridLoss(network, answers, costs, cost=self.cost, rl_weight=self.rl_weight)
        plan = Plan.of(
            context,
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            weight_decay=WEIGHT_DECAY,
            bf16=precision == "bfloat16",
            label=self.pass_name,
        )
        with deciding(network, loss.recorder):
            rows = train(network, data, loss, plan, context.progress)
        exits = ", ".join(f"{accuracy:.1%}" for accuracy in rows[-1]["calibration_accuracy"])
        resolved = self.model_copy(update={"precision": precision})
        notes = [
            f"accuracy of each exit on the calibration images: {exits}",
            f"decisions sampled from seed {context.seed}",
        ]
        return Applied(network, resolved, notes)
