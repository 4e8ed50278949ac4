"""`dynamize inspect` and `dynamize report`: looking at a network, and at what a run found out."""

from pathlib import Path
from typing import Annotated

import typer

from dynamize.cli.console import show, show_json
from dynamize.cli.options import Artifact, AsJson, Checkpoint, Part, TrustCode, shape, weights
from dynamize.errors import DynamizeError


def inspect(
    source: Annotated[str, typer.Argument(help="A network's source, or an artifact's folder.", show_default=False)],
    checkpoint: Checkpoint = None,
    part: Part = None,
    input_shape: Annotated[
        str | None, typer.Option("--input", metavar="C,H,W", help="By default what such networks are trained on.")
    ] = None,
    operators: Annotated[
        bool, typer.Option("--operators", help="MACs by module and by operator, beside those of fvcore and thop.")
    ] = False,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Show a network's stages, blocks and cut points, their MACs and parameters.

    A source given here is run if it names code; that of an artifact only with --trust-code.

    Example: dynamize inspect torchvision:resnet50 --input 3,224,224
    """
    wanted = shape(input_shape)
    from dynamize.sources import parse
    from dynamize.verbs.inspect import inspect_artifact, inspect_source

    if Path(source).is_dir():
        if wanted or checkpoint or part:
            raise DynamizeError(
                f"{source} is an artifact with input and weights: leave out --input, --checkpoint and --weights"
            )
        found = inspect_artifact(Path(source), trust_code=trust_code)
    else:
        found = inspect_source(parse(source, weights(checkpoint, part)), wanted, trust_code=trust_code or None)
    if as_json:
        show_json(found.to_dict(operators=operators))
        return
    from dynamize.cli import counters
    from dynamize.cli.tables import inspection

    show(inspection(found), *(counters.tables(found.counts) if operators else []), *counters.doubts(found.counts))


def report(
    out: Artifact,
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML page to this file.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the ledger of a run again, also of one that was stopped.

    Example: dynamize report runs/quickstart --html report.html
    """
    if sum([html is not None, markdown, as_json]) > 1:
        raise DynamizeError("--html, --markdown and --json are three faces of one report: give one of them")
    from dynamize.report.folder import read_report

    found = read_report(out)
    if as_json:
        show_json(found.model_dump(mode="json", exclude={"gallery"}))
    elif markdown:
        from dynamize.report import markdown as face

        typer.echo(face.render(found), nl=False)
    elif html is not None:
        from dynamize.files import write_text
        from dynamize.report import html as page

        write_text(html, page.render(found))
        typer.echo(f"Report: {html}")
    else:
        from dynamize.report import terminal

        show(terminal.render(found))
