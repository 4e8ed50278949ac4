"""What must be fast to import does not import torch, and public names lead where they say."""

import json
import subprocess
import sys

import pytest

import dynamize

HEAVY = {"torch", "torchvision", "onnxruntime", "accelerate", "sklearn", "timm", "matplotlib", "openvino"}
HEAVY |= {"torch_pruning", "neural_compressor", "fvcore", "thop"}


def imported_by(statement: str) -> set[str]:
    """Top-level names in ``sys.modules`` after a statement in a fresh process."""
    code = f"import sys, json; {statement}; print(json.dumps([name.split('.')[0] for name in sys.modules]))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(found.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "statement",
    [
        "import dynamize",
        "import dynamize.errors",
        "import dynamize.report",
        "from dynamize import DynamizeError; dir(__import__('dynamize'))",
        "import dynamize.data",
    ],
)
def test_no_heavy_import(statement: str) -> None:
    found = imported_by(statement)
    assert "dynamize" in found
    assert not found & HEAVY


@pytest.mark.slow
def test_backends_are_imported_when_they_are_used() -> None:
    assert not imported_by("import dynamize.runtime.compiled") & {"onnxruntime", "openvino"}
    found = imported_by("from dynamize.runtime.engine import engine_class; engine_class('onnxruntime')")
    assert "onnxruntime" in found
    assert "openvino" not in found


@pytest.mark.slow
def test_using_a_name_does_import_torch() -> None:
    assert "torch" in imported_by("from dynamize import convert")


@pytest.mark.parametrize("name", dynamize.__all__)
def test_public_names_are_what_they_say(name: str) -> None:
    found = getattr(dynamize, name)
    assert callable(found)
    assert found.__name__ == name
    assert name in dir(dynamize)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Exit'.*Exits"):
        _ = dynamize.Exit
