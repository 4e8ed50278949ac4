"""An artifact against the static network it was made from, timed in turns on the same images."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dynamize import artifact
from dynamize.conversion import wrap
from dynamize.data import load_data
from dynamize.devices import choose_device
from dynamize.evaluation import Evaluator, Judgement, busy
from dynamize.measure.accuracy import judgeable
from dynamize.nn.network import DynamicNetwork
from dynamize.report import share_of_saving_shown
from dynamize.runtime.engine import default_backend
from dynamize.runtime.threads import Threads, chosen_threads
from dynamize.sources import build
from dynamize.transform import Progress, quiet


@dataclass(frozen=True)
class Comparison:
    """Static against dynamic on one backend at one batch size; times are of a call on the whole batch.

    ``saving_shown`` is the share of the saved MACs that the clock shows (:func:`share_of_saving_shown`); None where
    no MACs are saved.
    """

    backend: str
    batch: int
    static_median_ms: float
    static_p95_ms: float
    dynamic_median_ms: float
    dynamic_p95_ms: float
    static_ms_per_image: float
    dynamic_ms_per_image: float
    speedup: float
    saving_shown: float | None


@dataclass(frozen=True)
class Benchmark:
    """What was compared: mean MACs per image, the share of test images that leave at each exit, and times.

    ``sessions`` had "own" threads, as in a user's process, or a "shared" pool.
    """

    source: str
    operating_point: str | None
    device: str
    threads: int
    images: int
    accuracy: float
    exits: list[float]
    macs: float
    static_macs: float
    macs_ratio: float
    comparisons: list[Comparison]
    sessions: Threads
    warnings: list[str] = field(default_factory=list)


def benchmark(
    path: Path,
    *,
    data: str | None = None,
    point: str | None = None,
    batches: Sequence[int] = (1, 8, 64),
    backends: Sequence[str] = (),
    device: str = "auto",
    seconds: float = 5.0,
    trust_code: bool = False,
    progress: Progress = quiet,
    threads: str | None = None,
) -> Benchmark:
    """Time an artifact at an operating point, by default that at which it stands.

    The static network is built from the artifact's source without its weights, on which time does not depend. The
    images timed leave at each exit in the shares that the whole test split does.

    Args:
        path: folder of the artifact.
        data: where the images lie now, if not where the run found them.
        point: name of an operating point.
        batches: batch sizes.
        backends: none means the fastest one here.
        seconds: for each backend and batch size.
        threads: of sessions, "own" or "shared" (:func:`dynamize.compile_network`).
    """
    sessions = chosen_threads(threads)
    manifest = artifact.read_manifest(path)
    network = artifact.load(path, trust_code=trust_code)
    assert manifest.source is not None  # load refuses an artifact without one
    if point is not None:
        network.set_operating_point(point)
    torch.manual_seed(0)
    static = wrap(build(manifest.source, trust_code=trust_code).eval(), manifest.input)
    chosen = choose_device(device)
    channels, height, width = manifest.input
    spec = artifact.image_spec(manifest, path, data)
    splits = load_data(spec, (channels, height, width), len(manifest.classes) or None, decoded=("test",))
    images = judgeable(splits, network, chosen).test
    names = tuple(backends) or (default_backend(chosen),)
    evaluator = Evaluator(static, images, chosen, names, batches, seconds, progress, sessions)
    judged = evaluator.judge(network)
    shares = judged.shares(network.exit_count)
    macs = float(judged.macs.mean())
    ratio = macs / evaluator.static_macs
    comparisons, warnings = _compare(evaluator, network, judged, ratio)
    stands = network.operating_point
    return Benchmark(
        source=manifest.source.source,
        operating_point=stands.name if stands else None,
        device=str(chosen),
        threads=torch.get_num_threads(),
        images=len(judged.labels),
        accuracy=judged.accuracy,
        exits=shares,
        macs=macs,
        static_macs=evaluator.static_macs,
        macs_ratio=ratio,
        comparisons=comparisons,
        sessions=sessions,
        warnings=warnings,
    )


def _compare(
    evaluator: Evaluator, network: DynamicNetwork, judged: Judgement, macs_ratio: float
) -> tuple[list[Comparison], list[str]]:
    times = evaluator.times(network, judged)
    comparisons = []
    for (backend, batch), one in times.items():
        speedup = one.speedup("static", "dynamic")
        medians = {name: one.median_ms(name) for name in ("static", "dynamic")}
        comparisons.append(
            Comparison(
                backend=backend,
                batch=batch,
                static_median_ms=medians["static"],
                static_p95_ms=one.p95_ms("static"),
                dynamic_median_ms=medians["dynamic"],
                dynamic_p95_ms=one.p95_ms("dynamic"),
                static_ms_per_image=medians["static"] / batch,
                dynamic_ms_per_image=medians["dynamic"] / batch,
                speedup=speedup,
                saving_shown=share_of_saving_shown(macs_ratio, speedup),
            )
        )
    return comparisons, [*evaluator.notes, *busy(times)]
