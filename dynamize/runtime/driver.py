"""Answer images with the exported network beside this file; needs only numpy and onnxruntime.

python run.py IMAGES.npy [POINT]      IMAGES.npy: normalised float32 (N, C, H, W); POINT: an operating point
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

HERE = Path(__file__).resolve().parent
PLAN: dict[str, Any] = json.loads((HERE / "routing.json").read_text(encoding="utf-8"))
OPTIONS = ort.SessionOptions()
OPTIONS.add_session_config_entry("session.intra_op.allow_spinning", "0")  # sessions must not hold cores
SESSIONS: dict[str, ort.InferenceSession] = {}


def run(file: str, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All outputs of one stage, by name."""
    if file not in SESSIONS:
        SESSIONS[file] = ort.InferenceSession(str(HERE / file), OPTIONS, providers=["CPUExecutionProvider"])
    names = [output.name for output in SESSIONS[file].get_outputs()]
    return dict(zip(names, SESSIONS[file].run(names, feed), strict=True))


def thresholds_at(point: str) -> list[Any]:
    """Those of "chosen-0.48", or of "chosen", which is one point's beginning."""
    points: dict[str, list[Any]] = PLAN["operating_points"]
    named = [point] if point in points else [name for name in points if name.partition("-")[0] == point]
    if len(named) != 1:
        sys.exit(f"there is no operating point {point!r}: choose one of {', '.join(points)}")
    return points[named[0]]


def predict(images: np.ndarray, point: str = PLAN["operating_point"]) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, classes) and the exit each image left at (N,), counted from 0."""
    thresholds = [*thresholds_at(point), -np.inf]  # who reaches the last exit leaves there
    logits = np.zeros((len(images), PLAN["classes"]), np.float32)
    exits, waiting = np.zeros(len(images), int), np.arange(len(images))
    feed = {"features": np.asarray(images, np.float32)}
    for k, (stage, threshold) in enumerate(zip(PLAN["stages"], thresholds, strict=True)):
        if not len(waiting):
            break
        off = threshold is None
        found = run(stage["without_exit"] if off and stage["without_exit"] else stage["file"], feed)
        leaves = np.zeros(len(waiting), bool)
        if not off:
            leaves = found["score"].astype(np.float64) >= threshold if "score" in found else ~leaves
            logits[waiting[leaves]], exits[waiting[leaves]] = found["logits"][leaves], k
        feed = {name[5:]: found[name][~leaves] for name in ("next_features", "next_context") if name in found}
        waiting = waiting[~leaves]
    return logits, exits


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    answers, left_at = predict(np.load(sys.argv[1]), *sys.argv[2:])
    for row, exit_index in zip(answers, left_at, strict=True):
        print(json.dumps({"answer": int(row.argmax()), "exit": int(exit_index) + 1}))
