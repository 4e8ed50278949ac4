"""`q_gates`: refine trained gates by Q-learning, in turns with the network."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any, Literal

from accelerate import PartialState
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from dynamize.files import write_json_lines
from dynamize.nn.network import DynamicNetwork
from dynamize.training.loop import WEIGHT_DECAY, Plan, decide_precision, train
from dynamize.training.objectives import MultiExitLoss
from dynamize.training.policy import FollowBest, deciding, relative_costs
from dynamize.training.q_learning import (
    QLearning,
    all_but_gates,
    all_gates,
    copy_gates,
    find_loss_scale,
    scale_scores,
)
from dynamize.training.refining import RefinesGates
from dynamize.transform import NOTHING_TO_REFINE, Applied, Context, Share, has_gates_to_refine

_SEEDS_BETWEEN = 7919  # of two phases, so that they do not see the same batches in the same order
_FOLLOW = 0.05  # of the target copy, in each step


class QGates(RefinesGates):
    """Q-learning of the gates (Runtime Neural Pruning, Lin et al. 2017, sec. 3.2 and 3.3).

    In each round the gates are trained with the network frozen, then the network with the gates frozen. A path costs
    ``penalty`` times its share of the original network's MACs; the cross entropy of an image is scaled to 1 on average.
    Afterwards scores are scaled so that a gate offset of 1 means a penalty that is smaller by 1. It refines gates that
    `distill` has trained.

    Example:
        >>> net = dz.source("dynamize:digits_resnet", pretrained=True)
        >>> q_gates = dz.QGates(rounds=1, gate_epochs=1, network_epochs=0)
        >>> steps = [dz.SkipGates(group=1), dz.Distill(epochs=1), q_gates]
        >>> dyn = dz.convert(net, steps, (1, 8, 8), context)  # a dz.Context
        >>> [step["pass"] for step in dyn.history]
        ['skip_gates', 'distill', 'q_gates']
    """

    pass_name: Literal["q_gates"] = Field("q_gates", alias="pass")
    rounds: PositiveInt = Field(2, description="of training the gates, then the network")
    gate_epochs: PositiveInt = Field(3, description="passes over the train split with the network frozen, each round")
    network_epochs: Annotated[int, Field(ge=0)] = Field(
        3, description="passes over the train split with the gates frozen, each round"
    )
    gate_lr: PositiveFloat = Field(0.2, description="peak of the one-cycle schedule of the gates")
    lr: PositiveFloat = Field(0.02, description="peak of the one-cycle schedule of the network")
    penalty: Annotated[float, Field(ge=0)] = Field(
        0.5, description="cost of the original network's MACs, against a cross entropy of 1; more skips more"
    )
    epsilon: tuple[Share, Share] = Field(
        (0.5, 0.05), description="probability of a random path, at the beginning and at the end of all rounds"
    )
    discount: Annotated[float, Field(gt=0, le=1)] = Field(0.999, description="of the value of later units")
    loss_scale: Literal["auto"] | PositiveFloat = Field(
        "auto", description="of the cross entropy; auto: makes it 1 on average when paths are random"
    )

    @property
    def all_epochs(self) -> int:
        return self.rounds * (self.gate_epochs + self.network_epochs)

    def apply(self, network: DynamicNetwork, context: Context) -> Applied:
        if not has_gates_to_refine(self, network):
            return Applied(network, self, [NOTHING_TO_REFINE])
        resolved = self._resolve(network, context)
        costs = relative_costs(network)
        shares = [float(each[-1]) for each in costs.values()]
        scale_scores(network, shares)
        rows: list[dict[str, Any]] = []
        for index in range(self.rounds):
            rows += resolved._train_gates(network, costs, index, context)
            if self.network_epochs:
                rows += resolved._train_network(network, index, context)
            if context.work is not None and PartialState().is_main_process:
                write_json_lines(context.work / "metrics.jsonl", rows)
        scale_scores(network, [1 / share for share in shares])
        exits = ", ".join(f"{accuracy:.1%}" for accuracy in rows[-1]["calibration_accuracy"])
        notes = [
            f"accuracy of each exit on the calibration images: {exits}",
            f"decisions explored from seed {context.seed}",
        ]
        return Applied(network, resolved, notes)

    def _resolve(self, network: DynamicNetwork, context: Context) -> "QGates":
        """With all that is `auto` decided."""
        data = context.needs_data(self)
        found: dict[str, object] = {"precision": decide_precision(self.precision, context.device)}
        if self.loss_scale == "auto":
            found["loss_scale"] = find_loss_scale(network, data.train, context.device, context.seed)
        return self.model_copy(update=found)

    def _train_gates(
        self, network: DynamicNetwork, costs: dict[str, Tensor], index: int, context: Context
    ) -> list[dict[str, Any]]:
        assert self.loss_scale != "auto"
        first, last = self.epsilon
        with _target_of(network) as target:
            learning = QLearning(
                network,
                target,
                costs,
                penalty=self.penalty,
                loss_scale=self.loss_scale,
                discount=self.discount,
                epsilon=(
                    first + (last - first) * index / self.rounds,
                    first + (last - first) * (index + 1) / self.rounds,
                ),
                follow=_FOLLOW,
            )
            plan = replace(
                self._plan(f"round {index + 1}, gates", 2 * index, context),
                epochs=self.gate_epochs,
                lr=self.gate_lr,
                weight_decay=0.0,
                frozen=(*all_but_gates(network), target),
            )
            with deciding(network, learning.recorder):
                return train(network, context.needs_data(self), learning, plan, context.progress)

    def _train_network(self, network: DynamicNetwork, index: int, context: Context) -> list[dict[str, Any]]:
        teacher = context.needs_teacher(self) if self.alpha > 0 else None
        plan = replace(self._plan(f"round {index + 1}, network", 2 * index + 1, context), frozen=(all_gates(network),))
        loss = MultiExitLoss(teacher, alpha=self.alpha, temperature=self.temperature)
        with deciding(network, FollowBest()):
            return train(network, context.needs_data(self), loss, plan, context.progress)

    def _plan(self, phase: str, position: int, context: Context) -> Plan:
        """Of the phase that is the ``position``-th: its own seed, and its own folder to resume from."""
        return Plan.of(
            context,
            epochs=self.network_epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            weight_decay=WEIGHT_DECAY,
            bf16=self.precision == "bfloat16",
            seed=context.seed + _SEEDS_BETWEEN * position,
            work=None if context.work is None else context.work / f"phase-{position + 1}",
            label=f"q_gates, {phase}",
        )


@contextmanager
def _target_of(network: DynamicNetwork) -> Iterator[nn.ModuleList]:
    """A copy of the gates, part of the network inside the block, so that checkpoints hold it."""
    network.target_gates = copy_gates(network)
    try:
        yield network.target_gates
    finally:
        del network.target_gates
