"""`dynamize suggest`: which pretrained networks to put one behind the other."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from dynamize.cli.console import show, show_json
from dynamize.cli.options import AsJson
from dynamize.errors import DynamizeError

if TYPE_CHECKING:
    from dynamize.verbs.suggest import Choice, Suggestion


def suggest(
    source: Annotated[str | None, typer.Argument(help="A pretrained network.", show_default=False)] = None,
    accuracy: Annotated[
        float | None, typer.Option(metavar="PERCENT", help="Wanted on ImageNet-1k, in the place of a network.")
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="Below the network's accuracy, 0 to 1 point; by default 0.")
    ] = None,
    timm_results: Annotated[
        list[Path] | None,
        typer.Option(metavar="CSV", help="Tables of timm's repository: results-imagenet and a benchmark-infer one."),
    ] = None,
    data: Annotated[
        str, typer.Option(metavar="SOURCE", help="Where the recipe looks for images.")
    ] = "imagefolder:imagenet",
    recipe: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the recipe to this new file.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Rows of each table.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Predict which two pretrained networks in a row give an accuracy for the fewest MACs.

    Figures are those that torchvision publishes with its weights, and timm in the tables of its repository.

    Example: dynamize suggest --accuracy 80
    """
    if recipe is not None and recipe.exists():
        raise DynamizeError(f"--recipe {recipe} exists already: name a new file, or delete this one")
    from dynamize.files import write_text
    from dynamize.sources import parse
    from dynamize.verbs import suggest as verb

    wanted = parse(source) if source is not None else None
    found = verb.suggest(wanted, accuracy=accuracy, max_drop=max_drop, timm_tables=timm_results or (), most=top)
    text = found.recipe(data)
    if recipe is not None and text is None:
        raise DynamizeError(f"--recipe {recipe}: there is no cascade to write a recipe of; {found.notes[-1]}")
    if recipe is not None and text is not None:
        write_text(recipe, text)
    if as_json:
        show_json(found.to_dict(data))
        return
    legend = (
        "Cascades are predictions, not measurements. x: times fewer MACs than the cheapest single network; at most: of "
        "an image that both see, and both stay in memory."
    )
    notes = (Text(f"- {note}.", style="dim") for note in found.notes)
    show(*_tables(found), Text(f"\n{legend} {verb.RULE}", style="dim"), *notes)
    if recipe is not None:
        typer.echo(f"\nRecipe: {recipe}; to measure it: dynamize run {recipe} --out runs/cascade")
    elif text is not None:
        typer.echo(f"\nThe recipe to measure it (--recipe FILE writes it):\n\n{text}", nl=False)


def _tables(found: "Suggestion") -> Iterator[RenderableType]:
    of = f" as {found.network.label} has" if found.network else ""
    yield Text(f"Cheapest for {found.wanted:.2f} % on ImageNet-1k{of}: {found.best.label}", style="bold")
    if found.network is not None and found.ahead:
        yield Text(f"\nCascades that end in {found.network.label}", style="bold")
        yield _table(found, found.ahead)
    yield Text("\nSingle networks", style="bold")
    yield _table(found, found.networks)
    if found.cascades:
        yield Text("\nCascades, the best for each last network", style="bold")
        yield _table(found, found.cascades)


def _table(found: "Suggestion", choices: "list[Choice]") -> Table:
    from dynamize.cli.tables import table
    from dynamize.report.cells import ABSENT, count

    titles = ("top-1", "deferred", "MACs", "at most", "x")
    made = table(("network", "left"), *((title, "right") for title in titles))
    for one in choices:
        deferred = f"{100 * one.deferred:.0f} %" if len(one.members) > 1 else ABSENT
        figures = [f"{one.accuracy:.2f}", deferred, count(one.macs), count(one.macs_worst)]
        made.add_row(*map(Text, [one.label, *figures, f"{found.saving(one):.2f}"]))
    return made
