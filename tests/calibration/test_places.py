"""Places are chosen by the curve that exits there give at the wanted budgets, not by how cheap they are."""

import numpy as np
import pytest

from dynamize.calibration.places import best_places

IMAGES = 1500
PLACES = np.array([0.02, 0.2, 0.35, 0.5, 0.7])


def chosen(accuracies: list[float], count: int = 1, budgets: tuple[float, ...] = (0.4, 0.6, 0.8)) -> list[int]:
    """With exits that answer so many images right, the easier ones, and are surer of easier ones; the network 95 %."""
    rng = np.random.default_rng(0)
    hardness = rng.random(IMAGES)
    right = np.stack([hardness < accuracy for accuracy in accuracies])
    scores = np.stack([-hardness + 0.2 * rng.standard_normal(IMAGES) for _ in accuracies])
    return best_places(
        right, scores, hardness < 0.95, PLACES, np.full(5, 0.03), classes=10, budgets=budgets, count=count
    )


def test_a_cheap_place_that_knows_little_is_left() -> None:
    assert chosen([0.3, 0.6, 0.65, 0.68, 0.7]) == [1]


def test_of_equals_the_cheaper_one() -> None:
    assert chosen([0.95] * 5) == [0]


@pytest.mark.parametrize(("budget", "late"), [(0.3, False), (0.75, True)])
def test_wanted_budgets_decide(budget: float, late: bool) -> None:
    (place,) = chosen([0.2, 0.55, 0.6, 0.9, 0.93], budgets=(budget,))
    assert (PLACES[place] >= 0.5) == late


def test_as_many_as_are_asked_for_in_order() -> None:
    found = chosen([0.3, 0.6, 0.7, 0.8, 0.85], count=3)
    assert len(set(found)) == 3
    assert found == sorted(found)
    assert found[0] > 0  # 0.3 is less than half of what the network knows


def test_where_no_place_knows_enough_those_that_know_most() -> None:
    assert chosen([0.15, 0.2, 0.3, 0.25, 0.12], count=2) == [2, 3]
