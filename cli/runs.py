"""`dynamize run`: a recipe from beginning to end."""

import json
import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynamize.cli.console import complain, reporting, show, show_json, warn
from dynamize.cli.options import AsJson, Checkpoint, Device, Part, Quiet, TrustCode, shape, weights

if TYPE_CHECKING:
    from dynamize.recipe import Recipe
    from dynamize.run import Outcome


RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or a built-in recipe's name.", show_default=False)
]
Model = Annotated[str | None, typer.Option(metavar="SOURCE", help="Network; its code is run if it names code.")]
Images = Annotated[str | None, typer.Option(metavar="SOURCE", help="Images, e.g. imagefolder:PATH.")]
Input = Annotated[
    str | None, typer.Option("--input", metavar="C,H,W", help="Channels, height and width of the network's input.")
]
Fields = Annotated[list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Any field; steps count from 0.")]
Seed = Annotated[int | None, typer.Option(help="Of everything random.")]


def run(
    recipe: RecipeName,
    out: Annotated[Path | None, typer.Option(help="Folder to write; by default runs/NAME of the recipe.")] = None,
    model: Model = None,
    checkpoint: Checkpoint = None,
    part: Part = None,
    data: Images = None,
    input_shape: Input = None,
    fields: Fields = None,
    device: Device = "auto",
    seed: Seed = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last finished step.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in the folder.")] = False,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Convert, train, calibrate and measure as a recipe says.

    Flags override the file. Exit code 1 if the last row misses what the recipe expects, 2 on an error.

    Example: dynamize run quickstart --out runs/digits --set steps.1.max_drop=1
    """
    with reporting(quiet) as progress:
        from dynamize.run import run_recipe

        made, trusted = _recipe(recipe, model, checkpoint, part, data, input_shape, fields, seed, trust_code)
        folder = out or _usual_folder(recipe)
        outcome = run_recipe(
            made,
            folder,
            device=device,
            resume=resume,
            overwrite=overwrite,
            trust_code=trusted,
            progress=progress,
            command=shlex.join(["dynamize", *sys.argv[1:]]),
        )
    if outcome is None:  # not the first of several processes
        return
    _print(outcome, folder, as_json, quiet)
    if outcome.failures:
        raise typer.Exit(1)


def check(
    recipe: RecipeName,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; by default it is not looked at.")] = None,
    model: Model = None,
    checkpoint: Checkpoint = None,
    part: Part = None,
    data: Images = None,
    input_shape: Input = None,
    fields: Fields = None,
    device: Device = "auto",
    seed: Seed = None,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Say what a run would do, or why it cannot work; nothing is trained or written.

    Takes what `run` takes, and refuses what `run` would refuse before it trains.

    Example: dynamize check early_exit --model torchvision:resnet50 --checkpoint mine.pt --data imagefolder:DIR
    """
    with reporting(quiet) as progress:
        from dynamize.run import plan_recipe

        made, trusted = _recipe(recipe, model, checkpoint, part, data, input_shape, fields, seed, trust_code)
        plan = plan_recipe(
            made,
            out or _usual_folder(recipe),
            device=device,
            resume=out is None,
            trust_code=trusted,
            progress=progress,
        )
    if as_json:
        show_json(asdict(plan) | {"minutes": plan.minutes})
        return
    from dynamize.cli.plan_table import planned

    show(planned(plan))


def _recipe(
    recipe: str,
    model: str | None,
    checkpoint: Path | None,
    part: str | None,
    data: str | None,
    input_shape: str | None,
    fields: list[str] | None,
    seed: int | None,
    trust_code: bool,
) -> tuple["Recipe", bool | None]:
    """The recipe with what was typed in the place of what it says, and which code may run: True all that it names, None
    that of the network, False none."""
    from dynamize.recipe import load_recipe

    typed = {
        "model.source": model,
        "model.checkpoint": weights(checkpoint, part),
        "model.input": shape(input_shape),
        "data.source": data,
        "seed": seed,
    }
    given = [f"{path}={json.dumps(value, default=os.fspath)}" for path, value in typed.items() if value is not None]
    made = load_recipe(recipe, [*given, *(fields or [])], trust_code=trust_code)
    return made, trust_code or (None if model is not None else False)


def _usual_folder(recipe: str) -> Path:
    return Path("runs") / Path(recipe).stem


def _print(outcome: "Outcome", folder: Path, as_json: bool, quiet: bool) -> None:
    verdict = outcome.verdict
    if as_json:
        found = outcome.report.ledger.model_dump(mode="json", include={"rows", "rivals"})
        told = {"failures": [vars(one) for one in verdict.failures], "changes": [vars(one) for one in verdict.changes]}
        show_json({"out": str(folder), "ledger": found["rows"], "rivals": found["rivals"], **told})
        return
    from dynamize.report import terminal

    if quiet:
        show(*terminal.summary(outcome.report), f"Artifact: {folder}")
    else:
        show(terminal.render(outcome.report), f"\nReport: {folder / 'report.html'}", f"Artifact: {folder}")
    for warning in [*outcome.warnings, *verdict.notes]:
        warn(warning)
    if verdict.failures or (verdict.changes and not quiet):
        from dynamize.cli.tables import columns
        from dynamize.report.changes import change_columns, finding_columns

        if verdict.changes:
            show("", columns(change_columns(verdict.changes)))
        if verdict.failures:
            complain(f"{len(verdict.failures)} of what the recipe expects does not hold")
        shown = verdict.failures if quiet or not verdict.changes else verdict.findings
        show("", columns(finding_columns(shown)))
