"""Networks that nobody chose take what dynamize does to them, or refuse it in words."""

import pytest
import torch
from random_networks import random_network


@pytest.mark.parametrize("seed", range(8))
def test_a_seed_is_one_network_that_answers_each_image_by_itself(seed: int) -> None:
    drawn, again = random_network(seed), random_network(seed)
    images = torch.randn(3, *drawn.input_shape)
    answers = drawn.network(images)
    assert torch.equal(answers, again.network(images))
    alone = torch.cat([drawn.network(image[None]) for image in images])
    assert answers.shape == (3, 7)
    assert torch.allclose(alone, answers, rtol=1e-3, atol=1e-4 * float(answers.detach().abs().max()))
