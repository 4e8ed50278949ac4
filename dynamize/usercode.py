"""Importing the user's own code that the caller has declared trusted: factories of networks, and transforms.

Whatever that code raises becomes one readable line that names the place.
"""

import difflib
import functools
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from torch import nn

from dynamize.errors import DynamizeError

T = TypeVar("T")


def call_factory(target: str, name: str, kwargs: Mapping[str, object]) -> nn.Module:
    """Imports ``target`` and returns ``name(**kwargs)``. This runs the code: only for trusted sources.

    While it runs, modules beside ``file.py`` (for a module name: in the working folder) can be imported.

    Args:
        target: ``path/file.py`` or ``package.module``.

    Raises:
        DynamizeError: no such file, module or factory, unaccepted arguments, an exception inside it, or a
            result that is not a ``torch.nn.Module``.
    """
    is_file = target.endswith(".py")
    file = Path(target).expanduser()
    with importable(file.resolve().parent if is_file else Path.cwd()):
        module = _import_file(file) if is_file else _import_module(target)
        factory = _factory(module, target, name)
        _check_arguments(factory, f"{target}:{name}", kwargs)
        model = _run(functools.partial(factory, **kwargs), f"{target}:{name}")
    if not isinstance(model, nn.Module):
        raise DynamizeError(f"{target}:{name} returned a {type(model).__name__}: it must return a torch.nn.Module.")
    return model


def import_file(file: Path) -> None:
    """Runs a file, which may import what lies beside it. Only for trusted files.

    Raises:
        DynamizeError: no such file, or an exception inside it.
    """
    with importable(file.resolve().parent):
        _import_file(file)


def load_entry_points(group: str) -> None:
    """Imports what installed packages offer under the entry point ``group``.

    Raises:
        DynamizeError: one of them cannot be imported.
    """
    for entry in entry_points(group=group):
        package = entry.dist.name if entry.dist else "a package"
        _run(entry.load, f"the entry point {entry.name} = {entry.value} of {package}")


def defining(target: str) -> ModuleType | None:
    """The module that a factory was taken from, once it has been imported."""
    return sys.modules.get(_module_name(Path(target)) if target.endswith(".py") else target)


def _module_name(file: Path) -> str:
    return f"_dynamize_source_{file.stem}"


def _check_arguments(factory: Callable[..., object], source: str, kwargs: Mapping[str, object]) -> None:
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # built without a readable signature; the call itself will tell
        return
    try:
        signature.bind(**kwargs)
    except TypeError as error:
        given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items()) or "no arguments"
        raise DynamizeError(f"{source} cannot be called with {given}: {error}; it takes {signature}.") from error


def _factory(module: ModuleType, target: str, name: str) -> Callable[..., object]:
    factory = getattr(module, name, None)
    if isinstance(factory, nn.Module):
        raise DynamizeError(f"{target}:{name} is a network, not a function: write `def build(): return {name}`.")
    if callable(factory):
        return factory
    names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    close = difflib.get_close_matches(name, names, n=4, cutoff=0.5) or names[:8]
    has = f"did you mean {', '.join(close)}?" if close else "it defines no function."
    raise DynamizeError(f"{target} has no function or class {name!r}: {has}")


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Lets trusted code import what lies beside it, as ``python file.py`` would."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _import_file(file: Path) -> ModuleType:
    if not file.is_file():
        raise DynamizeError(f"There is no file {file} (looked in {Path.cwd()}): write PATH/file.py:factory.")
    name = _module_name(file)
    spec = importlib.util.spec_from_file_location(name, file.resolve())
    if spec is None or spec.loader is None:
        raise DynamizeError(f"{file} cannot be imported as Python: write PATH/file.py:factory.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        _run(functools.partial(spec.loader.exec_module, module), str(file))
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _import_module(name: str) -> ModuleType:
    importlib.invalidate_caches()
    try:
        return _run(functools.partial(importlib.import_module, name), name)
    except DynamizeError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and cause.name and f"{name}.".startswith(f"{cause.name}."):
            raise DynamizeError(
                f"There is no module {cause.name!r}: install it, or change to the folder that holds it "
                f"(now {Path.cwd()})."
            ) from cause
        raise


def _run(call: Callable[[], T], what: str) -> T:
    """``call()``; whatever the user's code raises becomes one readable line with its place."""
    try:
        return call()
    except DynamizeError:
        raise
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
        place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames[1:] else ""
        problem = f"{type(error).__name__}: {error}{place}"
        raise DynamizeError(f"{what} failed with {problem}. Repair that code.") from error
