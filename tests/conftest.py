"""Every test runs on one thread from the same seed, so that it fails or passes for the same reason everywhere, and
compares times for a moment only: none judges how long something takes."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that a test starts

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from built import read_once
from quick import slow_besides

from dynamize import conversion, evaluation
from dynamize.calibration import collect
from dynamize.transforms import fuse_gates

torch.set_num_threads(1)  # before fixtures of a whole session, which are made ahead of those of a test


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow_besides(items, whole=not any("[" in argument for argument in config.args))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What there is by now stays: garbage is looked for in what tests make, and less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True)
def same_start() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def short_timing() -> Iterator[None]:
    """Few images are timed, and calibration times exits and gates for a moment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "_INPUTS", 2)
        for module, name in ((collect, "exit_latency"), (collect, "option_latency"), (fuse_gates, "option_latency")):
            patch.setattr(module, name, partial(getattr(module, name), seconds=0.02))
        yield


@pytest.fixture(scope="session", autouse=True)
def fewer_readings() -> Iterator[None]:
    """What a conversion begins with is the same again and again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "trace", read_once(conversion.trace))
        yield
