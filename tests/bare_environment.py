"""An interpreter that has nothing but numpy, onnxruntime and pillow, and what an exported driver answers there."""

import importlib.util
import json
import re
import subprocess
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ALLOWED = ("numpy", "onnxruntime", "pillow")
_ABSENT = ("torch", "onnx", "dynamize", "scipy")
_ANSWER = """
import importlib.util, sys
import numpy as np
for name in {absent!r}:
    assert importlib.util.find_spec(name) is None, name
spec = importlib.util.spec_from_file_location("run", sys.argv[1])
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)
answers = run.Network(sys.argv[4] or None).run(np.load(sys.argv[2]))
np.savez(sys.argv[3], logits=answers.logits, places=np.array(answers.places), **answers.taken)
"""


def bare_python(folder: Path) -> Path:
    """A new virtual environment in which these packages, as they are here, are linked; its interpreter."""
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    for name in _with_requirements(_ALLOWED):
        for top in {file.parts[0] for file in distribution(name).files or []} - {"..", "__pycache__"}:
            target = Path(str(distribution(name).locate_file(top)))
            if not (site / top).exists():
                (site / top).symlink_to(target)
    return folder / "bin" / "python"


def _with_requirements(names: tuple[str, ...]) -> list[str]:
    found: list[str] = []
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        try:
            requires = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        found.append(name)
        needed = [re.split(r"[^\w.-]", one)[0] for one in requires if "extra ==" not in one]
        waiting += [one for one in needed if one not in found]
    return found


def driver_of(exported: Path) -> Any:
    """The driver as a module of this process."""
    spec = importlib.util.spec_from_file_location(f"run_{exported.parent.name}", exported / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answers_of(
    python: Path, exported: Path, images: NDArray[np.float32], folder: Path, point: str = ""
) -> dict[str, NDArray[Any]]:
    """Logits, places and options of images (N, C, H, W), from the driver."""
    np.save(folder / "images.npy", images)
    files = [exported / "run.py", folder / "images.npy", folder / "answers.npz", point]
    code = _ANSWER.format(absent=_ABSENT)
    done = subprocess.run([python, "-I", "-c", code, *map(str, files)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    with np.load(folder / "answers.npz") as found:
        return dict(found)


def printed_by(python: Path, exported: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """What ``run.py`` prints."""
    return subprocess.run([python, "-I", exported / "run.py", *map(str, arguments)], capture_output=True, text=True)


def json_of(python: Path, exported: Path, *arguments: object) -> list[dict[str, Any]]:
    """Its answers with ``--json``, of files that can all be read."""
    done = printed_by(python, exported, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found
