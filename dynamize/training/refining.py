"""What the transforms that refine trained gates have in common: their place in a recipe, and how they train."""

from typing import ClassVar

from pydantic import Field, PositiveFloat, PositiveInt

from dynamize.training.loop import Precision
from dynamize.transform import Kind, Share, Transform


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
