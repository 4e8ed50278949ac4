"""`hybrid_gates`: values it refuses, and how it fails."""

from typing import Any

import pytest
from digits import digit_splits
from gated_digits import gated_digits
from pydantic import ValidationError

from dynamize.conversion import apply
from dynamize.errors import DynamizeError
from dynamize.transform import Context
from dynamize.transforms import HybridGates


@pytest.mark.parametrize("fields", [{"cost": -0.1}, {"rl_weight": 0}, {"alpha": 1.5}, {"epochs": 0}])
def test_values_that_no_network_allows(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        HybridGates.model_validate(fields)


def test_a_loss_that_is_not_finite_stops() -> None:
    step = HybridGates(epochs=2, batch_size=32, alpha=0.0, precision="float32", lr=1e6)
    with pytest.raises(DynamizeError, match="hybrid_gates: the loss became .* Try a smaller learning rate"):
        apply(gated_digits(), step, Context(data=digit_splits()))
