"""Steps from ranges, by hand and by properties."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from dynamize.compression.steps import Observer, Steps, steps_between
from dynamize.nn.quantized import Quantizer

finite = some.floats(-1e4, 1e4, width=32)


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0.0, 25.5, Steps(0.1, 0)),
        (-1.0, 1.55, Steps(0.01, 100)),
        (3.0, 5.1, Steps(0.02, 0)),  # 0 is always among the steps
        (-5.1, -3.0, Steps(0.02, 255)),
        (0.0, 0.0, Steps(1.0, 0)),
    ],
)
def test_by_hand(low: float, high: float, wanted: Steps) -> None:
    found = steps_between(low, high)
    assert found.scale == pytest.approx(wanted.scale)
    assert found.zero_point == wanted.zero_point


@given(some.lists(finite, min_size=1, max_size=20))
def test_minmax_rounds_every_value_to_its_nearest_step(values: list[float]) -> None:
    tensor = torch.tensor(values)
    found = seen(tensor).steps("minmax", 100)
    assert 0 <= found.zero_point <= 255
    error = (Quantizer(*found)(tensor) - tensor).abs().max()
    assert float(error) <= 1.01 * found.scale + 1e-6  # half a step, and half a step of the zero point at the ends


def seen(values: torch.Tensor) -> Observer:
    observer = Observer()
    for see in (observer.see_range, observer.see_values):
        for part in values.split(7):
            see(part)
    return observer


def test_outliers_are_clipped_where_that_is_better() -> None:
    values = torch.cat([torch.rand(200_000, generator=torch.Generator().manual_seed(0)), torch.tensor([60.0])])
    observer = seen(values)
    assert observer.images == 200_001
    whole = observer.steps("minmax", 100)
    assert whole.scale == pytest.approx(60 / 255)
    nearly = observer.steps("percentile", 99.9)
    assert nearly.scale == pytest.approx(1 / 255, rel=0.05)
    least = observer.steps("mse", 100)
    errors = [float((Quantizer(*one)(values) - values).square().sum()) for one in (whole, nearly, least)]
    assert least.scale < whole.scale
    assert errors[2] == min(errors)
    assert {one.zero_point for one in (whole, nearly, least)} == {0}


def test_nothing_seen() -> None:
    assert Observer().steps("mse", 99.9) == Steps(1.0, 0)
