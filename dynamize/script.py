"""A run from a script: its own network, its own images, and what a recipe would say besides."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import nn

from dynamize.arguments import given_folder, given_networks, given_steps
from dynamize.data import Splits
from dynamize.errors import DynamizeError
from dynamize.faults import explain
from dynamize.recipe import Settings
from dynamize.run import Outcome, Runner
from dynamize.subject import Given
from dynamize.transform import Progress, Transform, quiet


def run_steps(
    network: nn.Module,
    steps: Sequence[Transform],
    data: Splits,
    out: str | os.PathLike[str],
    *,
    compare: Mapping[str, nn.Module] | None = None,
    members: Mapping[str, nn.Module] | None = None,
    backends: str | Sequence[str] = (),
    batches: Sequence[int] = (1, 64),
    timing_seconds: float | Literal["auto"] = "auto",
    expect: Mapping[str, Any] | None = None,
    description: str = "",
    seed: int = 0,
    device: str | torch.device = "auto",
    resume: bool = False,
    overwrite: bool = False,
    trust_code: bool = False,
    progress: Progress = quiet,
) -> Outcome | None:
    """What ``dynamize run`` does, with a network and images of your own: steps in order, each judged and timed.

    ``out`` then holds ``report.html``, ``report.md``, ``ledger.json`` and the artifact (:func:`dynamize.load`).

    Args:
        network: a trained classifier; a copy is converted, and what is drawn at random follows from ``seed``.
        steps: for example ``[Exits(count=2), Distill(epochs=3), Calibrate(max_drop=0.5)]``; drops are in points.
        data: :func:`dynamize.splits`; its images have the shape that the network is converted for.
        out: folder to write.
        compare: what the result is compared with, alone and as a cascade: smaller trained networks, by name.
        members: networks that a ``Cascade`` step names.
        backends: what latency is measured on, the main one first; by default the fastest here.
        batches: sizes of the batches that are timed.
        timing_seconds: that each comparison of times takes; auto: up to 5, a tenth of the run in all.
        expect: what must hold in the end, as in a recipe: ``{"accuracy_drop": {"max": 1.0}}``, in points; what does not
            is in ``failures``.
        description: title of the report.
        seed: of everything random.
        device: auto, cpu, cuda or mps.
        resume: go on from the steps that are finished in ``out``.
        overwrite: replace a run that ``out`` holds.
        trust_code: whether sources that steps name may be imported.
        progress: wraps long loops: (items, label, total) -> items.

    Returns:
        The network in eval mode at its operating point, the ledger, and the report when it is printed. None in every
        process but the main one.

    Raises:
        DynamizeError: something given cannot be used, or a step refuses; most is said before anything is trained.

    Example:
        >>> import torch
        >>> net = dz.source("dynamize:digits_resnet_small", pretrained=True)
        >>> images, labels = torch.randn(80, 1, 8, 8), torch.randint(10, (80,))
        >>> data = dz.splits(calibration=(images[:40], labels[:40]), test=(images[40:], labels[40:]))
        >>> done = dz.run_steps(net, [dz.FoldBatchnorm()], data, "out", backends=["eager"], timing_seconds=0.1)
        >>> [row.transform for row in done.ledger.rows]
        ['static', 'fold_batchnorm']
    """
    given_steps(steps, Transform)
    rivals = given_networks({} if compare is None else compare, "compare")
    plain = {
        "steps": list(steps),
        "compare": [{"name": name} for name in rivals],
        "backends": [backends] if isinstance(backends, str) else backends,
        "batches": batches,
        "timing_seconds": timing_seconds,
        "expect": {} if expect is None else expect,
        "description": description,
        "seed": seed,
    }
    try:
        settings = Settings.model_validate(plain)
    except ValidationError as error:
        raise DynamizeError(f"dz.run_steps:{explain(error, Settings, plain)}") from error
    settings.transforms()
    named = given_networks({} if members is None else members, "members")
    subject = Given(network, data, members=named, rivals=rivals, trust_code=trust_code)
    runner = Runner(
        settings, subject, given_folder(out), device=str(device), resume=resume, overwrite=overwrite, progress=progress
    )
    return runner.run()
