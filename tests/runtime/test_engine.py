"""Backends by name, and what they refuse."""

import pytest
import torch
from networks import with_exits
from pydantic import TypeAdapter, ValidationError

from dynamize.errors import DynamizeError
from dynamize.recipe import Recipe
from dynamize.runtime.compiled import compile_network
from dynamize.runtime.engine import backend_names, default_backend


def test_unknown_backend_is_refused_with_a_near_one() -> None:
    with pytest.raises(DynamizeError, match="'onnxruntme' is no backend. Did you mean onnxruntime.*Known: eager"):
        compile_network(with_exits(), "onnxruntme")


def test_onnxruntime_is_refused_elsewhere_than_on_the_cpu() -> None:
    with pytest.raises(DynamizeError, match="runs on the CPU here, not on cuda: use --backend eager"):
        compile_network(with_exits(), "onnxruntime", "cuda")


def test_default_backends() -> None:
    assert default_backend(torch.device("cpu")) in backend_names()
    assert default_backend(torch.device("cuda")) == "eager"


def test_recipes_know_every_backend() -> None:
    schema = Recipe.model_json_schema()["properties"]["backends"]
    assert set(schema["items"]["enum"]) == set(backend_names())
    field = TypeAdapter(Recipe.model_fields["backends"].annotation)
    assert list(field.validate_python(backend_names())) == backend_names()
    with pytest.raises(ValidationError, match="'onnxruntme' is no backend. Did you mean onnxruntime"):
        field.validate_python(["onnxruntme"])
