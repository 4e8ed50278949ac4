"""What a run is about: the network and the images that a recipe names, or those that a script has."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynamize.arguments import given_data, given_network, trained_network
from dynamize.data import Splits, load_data
from dynamize.data.splits import SPLITS
from dynamize.errors import DynamizeError
from dynamize.graph.given import own_copy, unwrapped
from dynamize.inputs import other_size
from dynamize.nn.network import DynamicNetwork
from dynamize.recipe import Recipe
from dynamize.sources import SourceSpec, load_source, origin

_CALL = "dz.run_steps"
_PRETRAINED = {"torchvision": "weights: DEFAULT", "timm": "pretrained: true", "dynamize": "pretrained: true"}


class Subject(ABC):
    """A network and its images, which are there once they are asked for.

    Attributes:
        name: of the network, for reports.
        source: what an artifact rebuilds the network from; None for a module from Python.
        input_shape: (C, H, W).
        members: networks from Python that steps put in front of it, by name.
        rivals: networks from Python that the result is compared with, by name.
        trust_code: whether sources that steps name may be imported.
        code: files with transforms of the user's own.
    """

    name: str
    source: SourceSpec | None
    input_shape: tuple[int, int, int]
    members: Mapping[str, nn.Module] = {}
    rivals: Mapping[str, nn.Module] = {}
    trust_code: bool = False
    code: Sequence[Path] = ()

    @abstractmethod
    def network(self) -> nn.Module:
        """The untouched network in eval mode, the run's own."""

    @abstractmethod
    def images(self, classes: int, seed: int) -> Splits:
        """The splits, for a network that tells so many classes apart."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What else, besides the settings of a run, its steps depend on, as plain data."""

    def warnings(self, network: nn.Module) -> list[str]:
        """What is to be said of the network and its images before anything is done."""
        return []

    @abstractmethod
    def forgotten(self) -> str:
        """What to ask or to say where the network does no better than guessing."""


class Named(Subject):
    """What a recipe names.

    Args:
        trust_code: True runs the code that source and checkpoint name, None that of the source only, False none.
    """

    def __init__(self, recipe: Recipe, trust_code: bool | None = False) -> None:
        self._recipe, self._trust = recipe, trust_code
        self.source: SourceSpec = recipe.model.spec()
        self.name, self.input_shape = recipe.model.source, recipe.model.input
        self.trust_code, self.code = bool(trust_code), recipe.code

    def network(self) -> nn.Module:
        return load_source(self.source, self._trust)

    def images(self, classes: int, seed: int) -> Splits:
        spec = self._recipe.data.model_copy(update={"seed": self._recipe.data.seed or seed})
        learns = any(step.learns for step in self._recipe.steps)
        decoded = SPLITS if learns else [name for name in SPLITS if name != "train"]
        return load_data(
            spec.model_copy(update={"seed": spec.seed or seed}), self.input_shape, classes, decoded=decoded
        )

    def identity(self) -> dict[str, Any]:
        return {"code": [hashlib.sha256(file.read_bytes()).hexdigest() for file in self.code]} if self.code else {}

    def warnings(self, network: nn.Module) -> list[str]:
        return other_size(self.source, network, self.input_shape)

    def forgotten(self) -> str:
        spec = self.source
        if spec.checkpoint is not None or any(spec.kwargs.get(key) for key in ("weights", "pretrained")):
            return "are data.normalize, model.input and the order of classes those that it was trained with?"
        other = f", or model.kwargs: {{{_PRETRAINED[spec.library]}}}" if spec.library else ""
        return f"no checkpoint was given, so its weights are random: add --checkpoint FILE{other}"


class Given(Subject):
    """What a script has; the network is copied.

    Raises:
        DynamizeError: one of them is something else, or the network or its images cannot be used.
    """

    def __init__(
        self,
        network: nn.Module,
        data: Splits,
        *,
        members: Mapping[str, nn.Module],
        rivals: Mapping[str, nn.Module],
        trust_code: bool = False,
    ) -> None:
        module = trained_network(unwrapped(given_network(network, _CALL)), _CALL)
        if isinstance(module, DynamicNetwork):
            raise DynamizeError(
                f"{_CALL} measures every step against the original network, and was given a converted one: give the "
                "original, and all steps"
            )
        self._module, self._data = module, given_data(data, Splits)
        self.source, self.name = origin(module), type(module).__name__
        self.input_shape = data.calibration.shape
        self.members, self.rivals, self.trust_code = members, rivals, trust_code

    def network(self) -> nn.Module:
        return own_copy(self._module).eval()

    def images(self, classes: int, seed: int) -> Splits:
        names = self._data.classes or tuple(map(str, range(classes)))
        if len(names) != classes:
            raise DynamizeError(
                f"the images have {len(names)} classes ({', '.join(names[:5])}, ...) and the network answers "
                f"{classes}: give the network that was trained on them, or the names of its classes in its order"
            )
        return replace(self._data, classes=names)

    @cached_property
    def _identity(self) -> dict[str, Any]:
        networks = {"network": self._module, **self.members}
        splits = {"calibration": self._data.calibration, "test": self._data.test}
        return {
            "networks": {name: _digest([*one.state_dict().values()]) for name, one in networks.items()},
            "images": {name: (len(one), _digest(next(iter(one.batches(1))))) for name, one in splits.items()},
        }

    def identity(self) -> dict[str, Any]:
        return self._identity

    def forgotten(self) -> str:
        return "was it trained, are the images normalised as they were then, and is the order of classes the same?"


def _digest(tensors: Iterable[Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
