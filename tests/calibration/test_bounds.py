"""Limits hold in as many draws as they say, and the simulation that shows it would see if they did not."""

import math

import numpy as np
import pytest

from dynamize.calibration import bounds
from dynamize.calibration.bounds import fixed_sequence, images_needed, p_value, upper_limit

DELTA = 0.1
DRAWS = 1500
BY_CHANCE = DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / DRAWS)


def drawn(broken: float, mended: float, images: int, seed: int = 0) -> np.ndarray:
    """Draws of losses (DRAWS, images) of mean ``broken`` - ``mended``."""
    chances = [mended, 1 - broken - mended, broken]
    return np.random.default_rng(seed).choice([-1.0, 0.0, 1.0], (DRAWS, images), p=chances)


def violated(broken: float, mended: float, images: int) -> float:
    """In what share of draws a limit a hair below the true mean is certified."""
    limit = broken - mended - 1e-9
    return float(np.mean([p_value(one, limit, DELTA) <= DELTA for one in drawn(broken, mended, images)]))


@pytest.mark.parametrize(("broken", "mended", "images"), [(0.05, 0, 500), (0.1, 0, 500), (0.08, 0.05, 400)])
def test_a_limit_below_the_truth_is_certified_as_rarely_as_it_says(broken, mended, images):
    assert violated(broken, mended, images) <= BY_CHANCE


def test_the_simulation_sees_maxima_that_are_taken_in_two_halves(monkeypatch):
    whole = bounds._log_wealth

    def halves(losses, stakes, limit):
        middle = len(losses) // 2
        return whole(losses[:middle], stakes[:middle], limit) + whole(losses[middle:], stakes[middle:], limit)

    monkeypatch.setattr(bounds, "_log_wealth", halves)
    assert violated(0.1, 0, 500) > BY_CHANCE


def test_the_upper_limit_is_where_the_p_value_crosses_delta():
    for losses in drawn(0.06, 0.03, 600)[:20]:
        limit = upper_limit(losses, DELTA)
        assert p_value(losses, limit + 1e-9, DELTA) <= DELTA < p_value(losses, limit - 1e-6, DELTA)


def test_two_images_by_hand():
    """Stakes sqrt(2 ln(1/delta) / (n s)): s is 1/4 before the first image, then (1/4 + 1/16) / 2 after a loss of 0 from
    which a mean of 1/4 is taken."""
    stake = [min(1, math.sqrt(2 * math.log(10) / (2 * s))) for s in (1 / 4, (1 / 4 + 1 / 16) / 2)]
    gains = [1 + stake[0] * 0.2, 1 - stake[1] * (1 - 0.2)]
    assert p_value([0.0, 1.0], 0.2, 0.1) == pytest.approx(1 / max(1, gains[0], gains[0] * gains[1]))


def test_images_that_are_mended_count_and_certain_ruin_is_no_error():
    mostly = np.tile([0.0] * 18 + [1.0, -1.0], 50)
    assert upper_limit(mostly, DELTA) < upper_limit(np.maximum(mostly, 0), DELTA)
    assert p_value(np.ones(400), 0.0, DELTA) == 1
    assert upper_limit(np.ones(400), DELTA) == pytest.approx(1, abs=0.02)


def test_a_sequence_ends_before_the_first_that_fails_and_asks_for_no_more():
    asked = []

    def values():
        for value in (0.0, 0.05, 0.06, 0.0):
            asked.append(value)
            yield value

    assert fixed_sequence(values(), 0.05) == 2
    assert asked == [0.0, 0.05, 0.06]
    assert fixed_sequence([1.0], 0.05) == 0


@pytest.mark.parametrize(("broken", "mended", "limit"), [(0.01, 0.0, 0.03), (0.03, 0.02, 0.03), (0.0, 0.0, 0.02)])
def test_about_as_many_images_as_are_said_are_needed(broken, mended, limit):
    like = np.repeat(
        [1.0, -1.0, 0.0], [round(1e4 * broken), round(1e4 * mended), 10_000 - round(1e4 * (broken + mended))]
    )
    needed = images_needed(like, limit, DELTA)
    passes = np.mean([p_value(one, limit, DELTA) <= DELTA for one in drawn(broken, mended, needed)[:200]])
    assert passes > 0.6
    fewer = np.mean([p_value(one, limit, DELTA) <= DELTA for one in drawn(broken, mended, needed // 3)[:200]])
    assert fewer < 0.6


def test_no_number_of_images_certifies_what_is_not_so():
    assert images_needed([0.0, 1.0, 0.0, 0.0], 0.25, DELTA) is None
    assert images_needed([1.0] + [0.0] * 99, 0.0100001, DELTA) is None
