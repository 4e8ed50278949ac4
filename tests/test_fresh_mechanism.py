"""Mechanisms that the house has never heard of go all the way; in a process of their own, for they are registered."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_two_fresh_mechanisms_go_all_the_way() -> None:
    tests = Path(__file__).with_name("fresh_mechanism.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tests)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tests.parents[1])
    assert found.returncode == 0, found.stdout[-4000:]
