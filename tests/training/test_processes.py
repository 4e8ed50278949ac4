"""Two processes on accelerate train the same network as one, up to noise."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from digits import digit_network, digit_splits
from dynamize.training.loop import Plan, train
from dynamize.training.objectives import MultiExitLoss
from accelerate import PartialState
work = Path(sys.argv[1])
plan = Plan(epochs=6, batch_size=64, lr=0.1, weight_decay=1e-4, part=sys.argv[2], bf16=False, seed=0,
            work=work)
network, steps = digit_network(), []
def progress(items, label, total):
    steps.append(total)
    yield from items
rows = train(network, digit_splits(960), MultiExitLoss(), plan, progress)
torch.save(network.state_dict(), work / f"weights{{PartialState().process_index}}.pt")
if PartialState().is_main_process:
    found = {{"processes": PartialState().num_processes, "steps": steps, "rows": rows}}
    (work / "found.json").write_text(json.dumps(found))
"""


def run(folder: Path, processes: int, train: str) -> dict:
    folder.mkdir()
    script = folder / "train.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parents[1])))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    launch += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(folder)}
    finished = subprocess.run(
        [*launch, str(script), str(folder), train], env=environment, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("train", ["all", "heads"])
def test_two_processes_take_the_same_steps_to_a_similar_result(tmp_path: Path, train: str) -> None:
    import torch

    one, two = run(tmp_path / "one", 1, train), run(tmp_path / "two", 2, train)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["steps"] == two["steps"] == [15] * 6
    assert two["rows"][-1]["loss"] == pytest.approx(one["rows"][-1]["loss"], rel=0.25)
    for alone, together in zip(
        one["rows"][-1]["calibration_accuracy"], two["rows"][-1]["calibration_accuracy"], strict=True
    ):
        assert together == pytest.approx(alone, abs=0.12)
    first, second = (torch.load(tmp_path / "two" / f"weights{i}.pt", weights_only=True) for i in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
