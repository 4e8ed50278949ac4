"""What the transforms that refine trained gates have in common: their place in a recipe, and how they train."""

from abc import abstractmethod
from typing import ClassVar

from pydantic import Field, PositiveFloat, PositiveInt

from dynamize.data import Splits
from dynamize.data.images import refuse_none
from dynamize.nn.network import DynamicNetwork
from dynamize.training.loop import Precision
from dynamize.transform import Context, Kind, Share, Transform


class RefinesGates(Transform):
    """Base of transforms that train gates further, and the network with them from labels and teacher."""

    batch_size: PositiveInt = Field(128, description="over all processes")
    alpha: Share = Field(0.5, description="share of the network's loss that is distillation from the teacher")
    temperature: PositiveFloat = Field(2.0, description="of the distillation")
    precision: Precision = "auto"

    structural: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    kind: ClassVar[Kind] = Kind.TRAINS | Kind.REFINES_GATES
    needs: ClassVar[Kind] = Kind.ADDS_GATES
    not_after: ClassVar[Kind] = Kind.ESTIMATES

    @property
    @abstractmethod
    def all_epochs(self) -> int:
        """Passes over the train split."""

    def passes(self, data: Splits) -> float:
        return self.all_epochs * 4 * len(data.train)

    def check(self, network: DynamicNetwork, context: Context) -> None:
        train = context.needs_data(self).train
        refuse_none(len(train), train.name)
