"""Every public name has an example in its docstring that runs as it stands."""

import doctest
from pathlib import Path
from typing import Any

import pytest
from quick import only

import dynamize as dz


def example(name: str, names: dict[str, Any]) -> doctest.DocTest:
    """That of a public name, which knows ``names``."""
    found = getattr(dz, name)
    return doctest.DocTestParser().get_doctest(found.__doc__ or "", names, name, found.__module__, None)


def run(test: doctest.DocTest) -> dict[str, Any]:
    """What the example defines; what it prints has to be what it says."""
    told: list[str] = []
    failed = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=told.append, clear_globs=False)[0]
    assert not failed, "".join(told)
    return test.globs


@pytest.fixture(scope="module")
def context() -> dz.Context:
    """As the docstring of `Context` makes it."""
    return run(example("Context", {"dz": dz}))["context"]


LONG = {"Calibrate", "Controller", "FuseGates", "Prune", "Quantize", "Recalibrate"}


@pytest.mark.parametrize("name", only(set(dz.__all__) - LONG, dz.__all__))
def test_example(name: str, context: dz.Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    test = example(name, {"dz": dz, "context": context})
    assert test.examples, f"the docstring of {name} has no example"
    run(test)
