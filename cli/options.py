"""Options that several verbs share, and values that need parsing."""

from pathlib import Path
from typing import Annotated

import typer

from dynamize.errors import DynamizeError
from dynamize.runtime.engine import backend_names

_DIGITS = 15  # of a whole number
BACKENDS = ", ".join(backend_names())

Artifact = Annotated[Path, typer.Argument(metavar="OUT", help="Folder that `dynamize run` wrote.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print the same facts as JSON.")]
Checkpoint = Annotated[Path | None, typer.Option(help="Weights of the network.")]
Data = Annotated[
    str | None, typer.Option(metavar="SOURCE", help="Where the images lie, if not where the run found them.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
TrustCode = Annotated[bool, typer.Option("--trust-code", help="Run the code that a source, recipe or artifact brings.")]
Part = Annotated[
    str | None,
    typer.Option("--weights", metavar="NAME", help="Which weights of the --checkpoint file, e.g. model_ema."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only results and errors, no progress.")]


def weights(checkpoint: Path | None, part: str | None) -> Path | dict[str, str] | None:
    """What a recipe would say of the checkpoint."""
    if part is None:
        return checkpoint
    if checkpoint is None:
        raise DynamizeError(f"--weights {part} chooses among those of a file: name it with --checkpoint FILE")
    return {"file": str(checkpoint), "weights": part}


def shape(text: str | None) -> tuple[int, int, int] | None:
    """`3,224,224` as (C, H, W)."""
    if text is None:
        return None
    numbers = text.replace("x", ",").split(",")
    channels, height, width = map(_count, numbers) if len(numbers) == 3 else (0, 0, 0)
    if not channels * height * width:
        raise DynamizeError(f"--input {text}: write channels, height and width, e.g. --input 3,224,224")
    return channels, height, width


def counts(text: str, option: str) -> list[int]:
    """`1,8,64` as whole numbers from 1 on."""
    numbers = [_count(number) for number in text.split(",")]
    if 0 in numbers:
        raise DynamizeError(f"{option} {text}: write whole numbers from 1 on with commas between, e.g. {option} 1,8,64")
    return numbers


def _count(text: str) -> int:
    """A whole number, 0 for what is none, or none that anything could be counted with."""
    text = text.strip()
    return int(text) if text.isdecimal() and len(text) <= _DIGITS else 0


def names(text: str | None) -> list[str]:
    """`eager,onnxruntime` as a list."""
    return [name.strip() for name in text.split(",")] if text else []
