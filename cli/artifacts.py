"""`dynamize bench`, `calibrate`, `predict` and `export`: what is done with an artifact."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dynamize.cli.console import complain, reporting, show, show_json, warn
from dynamize.cli.options import (
    BACKENDS,
    Artifact,
    AsJson,
    Data,
    Device,
    Part,
    Quiet,
    TrustCode,
    counts,
    names,
    weights,
)
from dynamize.errors import DynamizeError
from dynamize.runtime.engine import ANYWHERE

_DAY = 86400  # seconds


def bench(
    out: Artifact,
    data: Data = None,
    point: Annotated[
        str | None, typer.Option(metavar="NAME", help="An operating point; by default that of the artifact.")
    ] = None,
    batches: Annotated[str, typer.Option(metavar="N,...", help="Batch sizes.")] = "1,8,64",
    backends: Annotated[
        str | None, typer.Option(metavar="NAME,...", help=f"{BACKENDS}; by default onnxruntime on a CPU.")
    ] = None,
    device: Device = "auto",
    seconds: Annotated[float, typer.Option(min=0.0, help="For each backend and batch size.")] = 5.0,
    threads: Annotated[
        str | None,
        typer.Option(
            metavar="KIND", help="Of ONNX Runtime's sessions: shared, as here, or own, as in a user's own process."
        ),
    ] = None,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Time an artifact against the static network it was made from, in turns.

    Example: dynamize bench runs/quickstart --batches 1,64 --backends eager,onnxruntime
    """
    sizes = counts(batches, "--batches")
    if not seconds <= _DAY:
        raise DynamizeError(f"--seconds {seconds:g} would hardly end: give at most {_DAY}, e.g. --seconds 5")
    with reporting(quiet) as progress:
        from dynamize.verbs.bench import benchmark

        found = benchmark(
            out,
            data=data,
            point=point,
            batches=sizes,
            backends=names(backends),
            device=device,
            seconds=seconds,
            trust_code=trust_code,
            progress=progress,
            threads=threads,
        )
    if as_json:
        show_json(asdict(found))
        return
    from dynamize.cli import tables

    show(tables.benchmark(found))


def calibrate(
    out: Artifact,
    max_drop: Annotated[float | None, typer.Option(help="Largest expected accuracy drop, in points.")] = None,
    macs_ratio: Annotated[float | None, typer.Option(help="Mean MACs as a share of the original's.")] = None,
    macs: Annotated[float | None, typer.Option(help="Mean MACs per image.")] = None,
    latency_ms: Annotated[float | None, typer.Option(help="Mean milliseconds per image.")] = None,
    labels: Annotated[
        str | None, typer.Option(metavar="given|none", help="none: judge by agreement with the original network.")
    ] = None,
    certain: Annotated[
        float | None, typer.Option(help="Confidence with which the budget is kept, such as 0.95.")
    ] = None,
    data: Data = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Of the original network, against which drops are judged; by default the run's.")
    ] = None,
    part: Part = None,
    device: Device = "auto",
    trust_code: TrustCode = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Solve an artifact's thresholds again for another budget, without training.

    Give one budget; none means a drop of 0.2 points. Only the artifact's manifest is replaced.

    Example: dynamize calibrate runs/quickstart --macs-ratio 0.5
    """
    with reporting(quiet):
        from dynamize.verbs.solve import budget, recalibrate

        step = budget(
            max_drop=max_drop,
            macs_ratio=macs_ratio,
            macs=macs,
            latency_ms=latency_ms,
            labels=labels,
            certain=certain,
        )
        file = weights(checkpoint, part)
        network, notes = recalibrate(out, step, data=data, checkpoint=file, device=device, trust_code=trust_code)
    chosen = network.operating_point
    assert chosen is not None  # what calibration ends with
    if as_json:
        points = [point.model_dump(mode="json") for point in network.operating_points or []]
        show_json({"chosen": chosen.model_dump(mode="json"), "operating_points": points, "notes": notes})
        return
    from dynamize.cli import tables

    show(tables.point(chosen), *(f"- {note}" for note in notes))


def predict(
    out: Artifact,
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.", show_default=False)],
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget", "--macs-ratio", metavar="RATIO", help="Mean MACs at most this share of the original's."
        ),
    ] = None,
    point: Annotated[str | None, typer.Option(metavar="NAME", help="An operating point.")] = None,
    max_drop: Annotated[float | None, typer.Option(help="Largest expected accuracy drop, in points.")] = None,
    deadline_ms: Annotated[
        float | None,
        typer.Option(help="Milliseconds for each batch of 64, once read: then the best answers that there are count."),
    ] = None,
    backend: Annotated[str, typer.Option(help=f"{BACKENDS}.")] = ANYWHERE,
    device: Device = "auto",
    trust_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Classify image files: class, confidence, the exit or network that answered, and MACs.

    A file that cannot be read is named on stderr; the others are answered, and the exit code is 2.

    Example: dynamize predict runs/quickstart photos/ --budget 0.5
    """
    with reporting(quiet=False):
        from dynamize.data.image_files import find_images
        from dynamize.devices import choose_device
        from dynamize.verbs.predict import Predictor

        where = choose_device("cpu" if backend != ANYWHERE and device == "auto" else device)
        predictor = Predictor(out, backend=backend, device=where, trust_code=trust_code)
        predictor.choose(point=point, macs_ratio=budget, max_drop=max_drop)
        found = list(predictor.predict(find_images(images), deadline_ms))
    if as_json:
        show_json([asdict(one) for one in found])
    else:
        from dynamize.cli import tables

        show(tables.predictions(found))
    for note in predictor.notes:
        warn(note)
    errors = [one.error for one in found if one.error is not None]
    for error in errors:
        complain(error)
    if errors:
        raise typer.Exit(2)


def export(
    out: Artifact,
    to: Annotated[Path, typer.Option(metavar="DIR", help="A new or empty folder.", show_default=False)],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export in that folder.")] = False,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Write every part as ONNX, the routing as JSON, and run.py, which needs only numpy and onnxruntime.

    `python DIR/run.py IMAGE...` answers as `dynamize predict` does; it needs pillow to read image files.

    Example: dynamize export runs/digits_exits --to deploy
    """
    with reporting(quiet=False):
        from dynamize.verbs.export import export_artifact

        files = export_artifact(out, to, overwrite=overwrite, trust_code=trust_code)
    if as_json:
        show_json([str(file) for file in files])
    else:
        for file in files:
            typer.echo(f"{file}  {file.stat().st_size / 1000:.0f} kB")
