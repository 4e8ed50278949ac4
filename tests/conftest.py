"""Every test runs on one thread from the same seed, so that it fails or passes for the same reason everywhere."""

import pytest
import torch

torch.set_num_threads(1)  # before fixtures of a whole session, which are made ahead of those of a test


@pytest.fixture(autouse=True)
def same_start() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
