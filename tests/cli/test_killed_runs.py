"""Runs that are killed at any moment end, resumed, with the ledger of one that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commandline import FEW_EPOCHS, ON_DIGITS
from ledgers import TINY, ledger_of

OPTIONS = {"digits_exits": TINY, "gates_and_exits": [*ON_DIGITS, *FEW_EPOCHS["gates_and_exits"]]}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(recipe: str, out: Path) -> list[str]:
    return [sys.executable, "-m", "dynamize", "run", recipe, "--out", str(out), *OPTIONS[recipe]]


def finish(recipe: str, out: Path, *flags: str) -> list[dict[str, object]]:
    ran = subprocess.run([*command(recipe, out), *flags], env=ENVIRONMENT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ledger_of(out)


@pytest.fixture(scope="module")
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list]:
    recipe: str = request.param
    return recipe, finish(recipe, tmp_path_factory.mktemp("runs") / recipe)


@pytest.mark.slow
@pytest.mark.parametrize("undisturbed", OPTIONS, indirect=True)
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment_resumes_to_the_same_ledger(
    seed: int, undisturbed: tuple[str, list], tmp_path: Path
) -> None:
    (recipe, ledger), out = undisturbed, tmp_path / "killed"
    begun = subprocess.Popen(
        command(recipe, out), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (out / "steps" / "0" / "state.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(random.Random(seed).uniform(0, 1.5))
    begun.send_signal(signal.SIGKILL)
    begun.wait()
    assert not (out / "manifest.json").exists() or (out / "weights.safetensors").exists()
    assert finish(recipe, out, "--resume") == ledger
