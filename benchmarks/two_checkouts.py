"""Is one checkout as fast as another? Both compile and run the same artifacts, in turns, each in a process of its own.

    pip install --no-deps --target runs/old PATH_OF_THE_OLD_CHECKOUT
    pip install --no-deps --target runs/new PATH_OF_THE_NEW_CHECKOUT
    python benchmarks/two_checkouts.py runs/old runs/new runs/cifar10 runs/skip
    python benchmarks/two_checkouts.py runs/old runs/old runs/cifar10 runs/skip     # what noise alone shows

Artifacts are those of the older checkout, at the operating points that they were saved at; their images are noise. A
process waits stopped while the other one runs, for its threads would spin on for a while after a call. Each round gives
one ratio of times, new over old, in alternating order; a row is their median with its bootstrapped 95 % interval. Where
that of OLD against OLD is as far from 1, there is nothing to see. Nothing else may run meanwhile.
"""

import json
import os
import signal
import sys
import time
from contextlib import closing
from itertools import product
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Annotated, Any

import numpy as np
import typer

CALLS, FEWEST = {1: 24, 8: 10}, 3  # of a turn, by batch size
WARM = 2  # calls that are not counted: the other process had the cache
IMAGES, INPUTS, BOOTSTRAPS = 64, 8, 2000


class Checkout:
    """A process that runs artifacts under the package of one folder, stopped unless it is asked."""

    def __init__(self, folder: Path) -> None:
        command, path = [sys.executable, __file__, "--worker"], {**os.environ, "PYTHONPATH": str(folder.resolve())}
        self.process: Any = Popen(command, env=path, stdin=PIPE, stdout=PIPE, text=True)
        found = Path(self._answer())
        if not found.is_relative_to(folder.resolve()):
            self.close()
            raise typer.BadParameter(f"{folder} holds no dynamize: {found} was imported")

    def seconds(self, artifact: Path, backend: str, batch: int) -> float:
        """Of a call, the mean without the slowest quarter."""
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps([str(artifact.resolve()), backend, batch]) + "\n")
        self.process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        line = self.process.stdout.readline()
        if not line:  # it has said why
            self.close()
            raise typer.Exit(1)
        self.process.send_signal(signal.SIGSTOP)
        return line.strip()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def work() -> None:
    """Answer each request on stdin with a time; runs under either checkout, so it asks for nothing that is new."""
    import torch

    import dynamize as dz

    print(dz.__file__, flush=True)
    compiled = {}
    for line in sys.stdin:
        artifact, backend, batch = json.loads(line)
        if (artifact, backend) not in compiled:
            compiled[artifact, backend] = dz.compile_network(dz.load(artifact), backend)
        run, shape = compiled[artifact, backend], json.loads((Path(artifact) / "manifest.json").read_text())["input"]
        noise = torch.randn(max(IMAGES, batch), *shape, generator=torch.Generator().manual_seed(0))
        inputs = [part for part in noise.split(batch) if len(part) == batch][:INPUTS]
        taken = []
        with torch.inference_mode():
            for i in range(WARM + CALLS.get(batch, FEWEST)):
                started = time.perf_counter()
                run(inputs[i % len(inputs)])
                taken.append(time.perf_counter() - started)
        print(np.mean(sorted(taken[WARM:])[: max(1, (len(taken) - WARM) * 3 // 4)]), flush=True)


def compare(old: Checkout, new: Checkout, artifact: Path, backend: str, batch: int, rounds: int) -> str:
    """One row: ms of a call of the old one, and the ratio."""
    pairs = []
    for turn in range(-1, rounds):  # the first compiles, and is not counted
        pair = {one: one.seconds(artifact, backend, batch) for one in ((old, new) if turn % 2 else (new, old))}
        pairs += [(pair[old], pair[new])] if turn >= 0 else []
    before, after = np.array(pairs).T
    ratios = after / before
    medians = np.median(np.random.default_rng(0).choice(ratios, (BOOTSTRAPS, rounds)), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    cells = f"{1e3 * np.median(before):.3f} | {np.median(ratios):.3f} | {low:.3f} to {high:.3f}"
    return f"| {artifact.name} | {backend} | {batch} | {cells} |"


def main(
    old: Annotated[Path, typer.Argument(help="folder with the older package")],
    new: Annotated[Path, typer.Argument(help="folder with the newer package; OLD again for the noise")],
    artifacts: Annotated[list[Path], typer.Argument(help="folders that the older package wrote")],
    backends: Annotated[str, typer.Option(help="comma-separated")] = "eager,onnxruntime,openvino",
    batches: Annotated[str, typer.Option(help="comma-separated")] = "1,8,64",
    rounds: int = 41,
) -> None:
    """Print one Markdown table."""
    sizes = [int(batch) for batch in batches.split(",")]
    print("| artifact | backend | batch | old ms | new / old | 95 % interval |\n|---|---|---|---|---|---|", flush=True)
    with closing(Checkout(old)) as first, closing(Checkout(new)) as second:
        for artifact, backend, batch in product(artifacts, backends.split(","), sizes):
            print(compare(first, second, artifact, backend, batch, rounds), flush=True)


if __name__ == "__main__":
    work() if sys.argv[1:] == ["--worker"] else typer.run(main)
