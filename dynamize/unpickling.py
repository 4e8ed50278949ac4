"""What a checkpoint file is, found out from its bytes, and its content read without running anything in it.

A pickle that would need code is refused; the error names the class and shows how its owner converts it.
"""

import argparse
import collections
import difflib
import io
import pickle
import pickletools
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dynamize.errors import DynamizeError
from dynamize.usercode import importable

Container = Literal["safetensors", "zip", "legacy", "pickle"]

_LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
_BLOCKED = re.compile(r"GLOBAL (\S+) (?:was not an allowed|whose module)")
_ZIP_MAGIC = b"PK\x03\x04"
_COMMANDS = ("posix", "nt", "os", "sys", "subprocess", "shutil", "socket", "runpy", "builtins", "__builtin__")
_LFS_MAGIC = b"version https://git-lfs"


def _plain_types() -> list[Any]:
    """Passive types that scripts save beside the weights: numpy numbers (a best accuracy), arguments."""
    scalar = np.float64(0).__reduce__()[0]
    spellings = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]  # numpy 1 and 2
    numbers = [np.dtype(kind) for kind in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "?")]
    types = [argparse.Namespace, *spellings, np.dtype, *map(type, numbers)]
    allowed = torch.serialization.get_safe_globals()  # the caller's own stay allowed after torch's clean-up
    return [entry for entry in types if entry not in allowed]


def read_checkpoint_file(file: Path, wrapper_keys: Sequence[str]) -> object:
    """Whatever the file holds, tensors on the CPU.

    Args:
        wrapper_keys: where a checkpoint usually keeps its weights, for the conversion shown in errors.

    Raises:
        DynamizeError: the file is missing, empty, damaged, not a checkpoint, or a pickle that needs code.
    """
    container = _container(file)
    if container == "safetensors":
        try:
            return load_file(file)
        except SafetensorError as error:
            raise _damaged(file, str(error)) from error
    if container == "pickle":
        raise _needs_code(file, container, None, wrapper_keys)
    if container == "zip":
        _check_archive(file)
    try:
        # from a stream: given a path, torch would trust the suffix before the content
        with file.open("rb") as stream, torch.serialization.safe_globals(_plain_types()):
            return torch.load(stream, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DynamizeError(f"Cannot read {file} ({error.strerror or error}).") from error
    except Exception as error:  # a damaged pickle can fail in any way
        blocked = _BLOCKED.search(str(error))
        if blocked:
            raise _needs_code(file, container, blocked[1], wrapper_keys) from error
        raise _damaged(file, str(error)) from error


def unpickle(file: Path, main: ModuleType | None = None) -> object | None:
    """Whatever a pickle holds, tensors on the CPU: this runs the code that it names. Only for trusted files.

    Args:
        main: where classes of ``__main__`` are looked for: those of the script that wrote the file.

    Returns:
        None for a file that is no pickle.

    Raises:
        DynamizeError: the file is missing, damaged, or names code that is not here.
    """
    container = _container(file)
    if container == "safetensors":
        return None
    if container == "zip":
        _check_archive(file)
    reader = ModuleType("pickle_of_source")
    reader.Unpickler, reader.load = _unpickler(main), pickle.load  # type: ignore[attr-defined]
    try:
        with file.open("rb") as stream, importable(file.resolve().parent), importable(Path.cwd()):
            if container == "pickle":
                return reader.Unpickler(stream).load()
            return torch.load(stream, map_location="cpu", weights_only=False, pickle_module=reader)
    except (AttributeError, ImportError) as error:
        raise DynamizeError(
            f"{file} cannot be unpickled: {error}. Run this in the folder that its code lies in, or where it is "
            "installed; save model.state_dict() to need no code."
        ) from error
    except Exception as error:  # a damaged pickle can fail in any way, and so can the code that it runs
        raise _damaged(file, f"{type(error).__name__}: {error}") from error


def _unpickler(main: ModuleType | None) -> type[pickle.Unpickler]:
    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module == "__main__" and main is not None and hasattr(main, name):
                return getattr(main, name)
            return super().find_class(module, name)

    return Unpickler


def _container(file: Path) -> Container:
    head = _head(file)
    start = head.lstrip().lower()
    if head.startswith(_ZIP_MAGIC):
        return "zip"
    if head.startswith(_LEGACY_MAGIC):
        return "legacy"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000:
        return "safetensors"  # before pickle: one header length in 32 ends in 0x80 as well
    if head[:1] == b"\x80":
        return "pickle"
    if not head:
        reason = "is empty: copy or download it again"
    elif start.startswith(_LFS_MAGIC):
        reason = "is a git-lfs pointer, not the weights: run `git lfs pull` in its repository"
    elif start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        reason = "is a web page, not weights (the download met a login or an error): download the file itself"
    else:
        reason = f"is not a checkpoint (it starts with {head[:8]!r}): pass one of torch.save or safetensors"
    raise DynamizeError(f"{file} {reason}.")


def _head(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(512)
    except FileNotFoundError as error:
        beside = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
        close = difflib.get_close_matches(file.name, beside, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "check the path (nothing is downloaded)."
        raise DynamizeError(f"There is no checkpoint {file}: {hint}") from error
    except IsADirectoryError as error:
        raise DynamizeError(f"{file} is a folder: pass the checkpoint file inside it.") from error
    except OSError as error:
        raise DynamizeError(f"Cannot read {file} ({error.strerror or error}).") from error


def _damaged(file: Path, detail: str) -> DynamizeError:
    size = file.stat().st_size
    first_line = next(iter(detail.strip().splitlines()), "") or "it ends too early"
    facts = f"{size:,} bytes; {first_line.rstrip('.')}"
    return DynamizeError(f"{file} is damaged or cut off ({facts}): copy or download it again.")


def _check_archive(file: Path) -> None:
    """Refuses zip archives that ``torch.save`` did not write."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise _damaged(file, str(error)) from error
    if any(name.endswith("/constants.pkl") for name in names):
        target = str(_converted(file))
        raise DynamizeError(
            f"{file} is a TorchScript program, not weights. If you trust its author, convert it once:\n\n"
            f"    import torch\n    program = torch.jit.load({str(file)!r}, map_location='cpu')\n"
            f"    torch.save(program.state_dict(), {target!r})\n\nthen pass {target}."
        )
    if not any(name.endswith("/data.pkl") for name in names):
        raise DynamizeError(f"{file} is a zip archive, not a checkpoint: unpack it and pass the file inside.")


@dataclass(frozen=True)
class _Pickle:
    """What a pickle says about itself without being run."""

    is_dict: bool
    strings: frozenset[str]
    globals: tuple[str, ...]


def _needs_code(file: Path, container: Container, blocked: str | None, wrapper_keys: Sequence[str]) -> DynamizeError:
    """The refusal of a pickle, with the three lines that convert it."""
    try:
        content = _scan(_pickle_bytes(file, container))
    except (ValueError, IndexError, KeyError, zipfile.BadZipFile) as error:
        return _damaged(file, str(error))
    load = f"torch.load({str(file)!r}, map_location='cpu', weights_only=False)"
    if container == "pickle":
        load = f"__import__('pickle').load(open({str(file)!r}, 'rb'))"
        blocked = next((name for name in content.globals if not name.startswith("collections.")), None)
    part = "saved"
    if content.is_dict:
        part = next((f"saved[{key!r}]" for key in wrapper_keys if key in content.strings), "saved")
    needs = "it is a bare pickle, not of torch.save"
    if blocked:
        needs = f"it needs {blocked}, and unpickling that runs code"
    if blocked and blocked.partition(".")[0] in _COMMANDS:
        needs += ". No network needs that: the file may be an attack"
    target = str(_converted(file))
    return DynamizeError(
        f"{file} is refused: {needs}. If you trust its author, add --trust-code (in Python: trust_code=True), "
        f"or convert it once, where its code is installed:\n\n    import torch\n    saved = {load}\n"
        f"    torch.save(getattr({part}, 'state_dict', lambda: {part})(), {target!r})\n\nthen pass {target}."
    )


def _converted(file: Path) -> Path:
    return file.with_name(f"{file.stem}-weights.pt")


def _pickle_bytes(file: Path, container: Container) -> io.BytesIO:
    """The pickle that holds the saved object, positioned at its start."""
    if container == "zip":
        with zipfile.ZipFile(file) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            return io.BytesIO(archive.read(name))
    stream = io.BytesIO(file.read_bytes())
    if container == "legacy":
        for _ in range(3):  # magic number, protocol version, system information
            collections.deque(pickletools.genops(stream), maxlen=0)
    return stream


def _scan(stream: io.BytesIO) -> _Pickle:
    """Reads opcodes only. ``STACK_GLOBAL`` takes the two strings pushed last, directly or from the memo."""
    pushed: list[str] = []
    memo: dict[int, str | None] = {}
    names: list[str] = []
    top: str | None = None
    first = ""
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name == "GLOBAL":
            names.append(str(argument).replace(" ", "."))
        elif name == "STACK_GLOBAL":
            names.append(".".join(pushed[-2:]))
        if name not in ("PROTO", "FRAME") and not first:
            first = f"{name} {argument}"
        if name in ("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"):
            memo[len(memo) if argument is None else int(str(argument))] = top
            continue
        top = memo.get(int(str(argument))) if name in ("BINGET", "LONG_BINGET", "GET") else None
        if "UNICODE" in name or name.endswith("STRING"):
            top = str(argument)
        if top is not None:
            pushed.append(top)
    is_dict = first.startswith("EMPTY_DICT") or "collections OrderedDict" in first
    return _Pickle(is_dict, frozenset(pushed), tuple(names))
