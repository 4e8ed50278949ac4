"""The command line as a user types it, on a terminal of 80 columns: in this process, or in one of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from typer.testing import CliRunner, Result

from dynamize.cli import app

Cli = Callable[..., Result]
ON_DIGITS = [  # options with which `run` takes a recipe for images of your own to the digits, with hardly any timing
    "--model=dynamize:digits_resnet",
    "--data=digits",
    "--set=model.kwargs={pretrained: true}",
    "--set=model.input=[1, 8, 8]",
    "--set=data.normalize=[[0.305], [0.376]]",
    "--set=data.test_limit=100",
    "--set=backends=[eager]",
    "--set=batches=[32]",
    "--set=timing_seconds=0.01",
    "--quiet",
]


def _at_budget(step: int) -> list[str]:
    return [f"--set=steps.{step}.{field}" for field in ("max_drop=null", "macs_ratio=0.9", "points=3")]


_FEW = ["--set=data.train_limit=400", "--set=data.calibration=200"]
FEW_EPOCHS = {  # for recipes with gates; after so little training the budget that calibration asks for closes them
    "skip_gates": [*_FEW, "--set=steps.0.group=1", "--set=steps.1.epochs=1", *_at_budget(2)],
    "spatial_sampling": [*_FEW, "--set=steps.0.group=1", "--set=steps.1.epochs=1", *_at_budget(2)],
    "channel_gates": [
        "--set=data.calibration=200",
        "--set=steps.0.multiple=4",
        "--set=steps.1.epochs=1",
        *_at_budget(3),
    ],
    "gates_and_exits": [
        *_FEW,
        "--set=steps.1.group=1",
        "--set=steps.2.epochs=1",
        *_at_budget(3),
    ],
}


def call(*arguments: object) -> Result:
    """The command in this process, on a terminal of 80 columns; unknown exceptions are raised."""
    runner = CliRunner(env={"COLUMNS": "80", "TERM": "dumb"})
    return runner.invoke(app, [str(one) for one in arguments], prog_name="dynamize", catch_exceptions=False)


def process(*arguments: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """``python -m dynamize``, in ``folder``."""
    command = [sys.executable, "-m", "dynamize", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=folder)
