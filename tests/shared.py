"""Where the real checkpoints and images are; tests that need them skip where they are absent."""

import os
from pathlib import Path

import pytest


def shared_data() -> Path:
    """``$DYNAMIZE_SHARED/data``, or ``shared/data`` beside the checkout; skips the test if there is none."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    data = Path(os.environ.get("DYNAMIZE_SHARED", beside)) / "data"
    if not data.is_dir():
        pytest.skip(f"no shared data at {data}: set DYNAMIZE_SHARED to the folder that holds data/")
    return data
