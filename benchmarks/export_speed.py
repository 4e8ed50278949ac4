"""Exported drivers against compiled networks, image by image.

    python benchmarks/export_speed.py runs/quickstart runs/skip_gates

Each artifact is exported, and its `run.py` takes turns with `compile_network` on ONNX Runtime, in one process and with
threads of their own for each session. Images are random: who leaves where does not matter, since both decide alike.
"""

import importlib.util
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import dynamize as dz
from dynamize.measure.latency import interleave
from dynamize.runtime.export import export

CPU = torch.device("cpu")
IMAGES = 64


def main(
    artifacts: Annotated[list[Path], typer.Argument(help="folders of artifacts")],
    seconds: Annotated[float, typer.Option(help="for each artifact")] = 8.0,
) -> None:
    """Print one Markdown table."""
    print("| artifact | files | compiled ms | exported ms | exported / compiled |\n|---|---|---|---|---|")
    for artifact in artifacts:
        network = dz.load(artifact)
        compiled = dz.compile_network(network, "onnxruntime", threads="own")
        images = [image[None] for image in torch.randn(IMAGES, *network.input_shape)]
        with tempfile.TemporaryDirectory() as folder:
            files = export(network, Path(folder) / "deploy")
            exported = driver(Path(folder) / "deploy").Network()
            contenders = {"compiled": compiled, "exported": lambda image, run=exported.run: run(image.numpy())}
            times = interleave(contenders, images, CPU, seconds)
        ratio = 1 / times.speedup("compiled", "exported")
        both = f"{times.median_ms('compiled'):.3f} | {times.median_ms('exported'):.3f}"
        print(f"| {artifact.name} | {len(files)} | {both} | {ratio:.3f} |", flush=True)
        for warning in times.warnings():
            print(warning)


def driver(folder: Path) -> Any:
    """An exported `run.py` as a module."""
    spec = importlib.util.spec_from_file_location("run", folder / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    typer.run(main)
