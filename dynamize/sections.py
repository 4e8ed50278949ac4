"""What sections of a recipe are when they are written in Python: calls whose mistakes are told in a sentence."""

from typing import TYPE_CHECKING, Any, cast

from pydantic import BaseModel, ValidationError

from dynamize.errors import DynamizeError
from dynamize.faults import explain

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)


class InWords(ModelMetaclass):
    """The metaclass of pydantic's models, with DynamizeError for a call with wrong fields or values."""

    def __call__(cls, *values: Any, **fields: Any) -> Any:
        model = cast(type[BaseModel], cls)
        if values:
            names = ", ".join(f"{name}=..." for name in model.model_fields if name != "pass_name")
            raise DynamizeError(f"{cls.__name__} takes its fields by name: {cls.__name__}({names})")
        try:
            return super().__call__(**fields)
        except ValidationError as error:
            why = explain(error, model, fields).strip()
            raise DynamizeError(f"{cls.__name__}: {why.removeprefix('recipe: ')}") from error
