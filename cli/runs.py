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
from dynamize.cli.options import AsJson, Device, Part, Quiet, TrustCode, shape, weights

if TYPE_CHECKING:
    from dynamize.run import Outcome


RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or a built-in recipe's name.", show_default=False)
]
Model = Annotated[str | None, typer.Option(metavar="SOURCE", help="Network; its code is run if it names code.")]
Weights = Annotated[Path | None, typer.Option(help="Weights of the network.")]
Images = Annotated[str | None, typer.Option(metavar="SOURCE", help="Images, e.g. imagefolder:PATH.")]
Input = Annotated[
    str | None, typer.Option("--input", metavar="C,H,W", help="Channels, height and width of the network's input.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Any field; steps count from 0.")
]
Seed = Annotated[int | None, typer.Option(help="Of everything random.")]


def run(
    recipe: RecipeName,
    out: Annotated[Path | None, typer.Option(help="Folder to write; by default runs/NAME of the recipe.")] = None,
    model: Model = None,
    checkpoint: Weights = None,
    part: Part = None,
    data: Images = None,
    input_shape: Input = None,
    settings: Settings = None,
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
        from dynamize.recipe import load_recipe
        from dynamize.run import run_recipe

        given = _overrides(model, checkpoint, part, data, input_shape, seed)
        folder = out or Path("runs") / Path(recipe).stem
        outcome = run_recipe(
            load_recipe(recipe, [*given, *(settings or [])], trust_code=trust_code),
            folder,
            device=device,
            resume=resume,
            overwrite=overwrite,
            trust_code=trust_code or (None if model is not None else False),
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
    checkpoint: Weights = None,
    part: Part = None,
    data: Images = None,
    input_shape: Input = None,
    settings: Settings = None,
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
        from dynamize.recipe import load_recipe
        from dynamize.run import plan_recipe

        given = _overrides(model, checkpoint, part, data, input_shape, seed)
        plan = plan_recipe(
            load_recipe(recipe, [*given, *(settings or [])], trust_code=trust_code),
            out or Path("runs") / Path(recipe).stem,
            device=device,
            resume=out is None,
            trust_code=trust_code or (None if model is not None else False),
            progress=progress,
        )
    if as_json:
        show_json(asdict(plan) | {"minutes": plan.minutes})
        return
    from dynamize.cli.plan_table import planned

    show(planned(plan))


def _overrides(
    model: str | None,
    checkpoint: Path | None,
    part: str | None,
    data: str | None,
    input_shape: str | None,
    seed: int | None,
) -> list[str]:
    """Options of their own, as `--set` would say them."""
    flags = {
        "model.source": model,
        "model.checkpoint": weights(checkpoint, part),
        "model.input": shape(input_shape),
        "data.source": data,
        "seed": seed,
    }
    return [f"{path}={json.dumps(value, default=os.fspath)}" for path, value in flags.items() if value is not None]


def _print(outcome: "Outcome", folder: Path, as_json: bool, quiet: bool) -> None:
    verdict = outcome.verdict
    if as_json:
        found = outcome.report.ledger.model_dump(mode="json", include={"rows", "rivals"})
        told = {"failures": [vars(one) for one in verdict.failures], "changes": [vars(one) for one in verdict.changes]}
        show_json({"out": str(folder), "ledger": found["rows"], "rivals": found["rivals"], **told})
        return
    if not quiet:
        from dynamize.report import terminal

        show(terminal.render(outcome.report))
        show(f"\nReport: {folder / 'report.html'}", f"Artifact: {folder}")
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
