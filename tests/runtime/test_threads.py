"""In a user's process sessions have threads of their own, so that the user's sessions go on working beside them."""

import subprocess
import sys

import pytest

MINE = """
import io, sys, torch, onnxruntime as ort, dynamize as dz
from torch import nn
from dynamize.conversion import wrap
net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7)).eval()
images, file = torch.randn(2, 3, 16, 16), io.BytesIO()
torch.onnx.export(net, (images,), file, dynamo=False, input_names=["x"])
def mine(): ort.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"]).run(None, {"x": images.numpy()})
def ours(threads=None): return dz.compile_network(wrap(net, (3, 16, 16)), "onnxruntime", threads=threads)(images)
"""
SHARES = "from dynamize.runtime.threads import share_threads; share_threads(); "


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", MINE + code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("code", ["ours(); mine(); ours(); mine(); ours('shared'); ours()"])
@pytest.mark.slow
def test_beside_sessions_of_the_user_s_own(code: str) -> None:
    done = run(code)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_a_shared_pool_is_there_for_good() -> None:
    done = run(f"{SHARES} ours('own'); ours()\ntry: ours('own')\nexcept dz.DynamizeError as e: print(e); sys.exit(3)")
    assert done.returncode == 3, done.stderr[-2000:]
    assert "compile with threads='own' before" in done.stdout
