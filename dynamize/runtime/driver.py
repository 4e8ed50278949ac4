"""Answer images with the exported network beside this file, each of them by the work that it needs.

    python run.py IMAGE... [--point NAME | --budget RATIO] [--json]

or from Python: ``Network().run(images)``, with images as :func:`read_image` makes them. Needs numpy and onnxruntime,
and pillow to read image files. `routing.json` says which parts run and what is decided between them.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

Array = NDArray[Any]
Values = dict[str, Array]  # what images carry, a row each, by name: "features", perhaps their channel "means", ...
HERE = Path(__file__).resolve().parent
PLAN: dict[str, Any] = json.loads((HERE / "routing.json").read_text(encoding="utf-8"))
BATCH = 64  # image files that are answered together


class Part:
    """A static part of the network: values -> values, of which "next_NAME" is what images carry on as NAME."""

    def __init__(self, file: str, options: ort.SessionOptions) -> None:
        self.session = ort.InferenceSession(str(HERE / file), options, providers=["CPUExecutionProvider"])
        self.takes = [value.name for value in self.session.get_inputs()]
        self.gives = [value.name for value in self.session.get_outputs()]

    def __call__(self, values: Mapping[str, Array]) -> Values:
        found = self.session.run(self.gives, {name: values[name] for name in self.takes})
        return dict(zip(self.gives, found, strict=True))


class Linear:
    """A linear layer that makes scores of a description."""

    def __init__(self, file: str) -> None:
        with np.load(HERE / file) as layer:
            self.weight, self.bias = layer["weight"], layer["bias"]

    def __call__(self, values: Mapping[str, Array]) -> Values:
        return {"scores": values["description"] @ self.weight + self.bias}


def carry(values: Values, found: Values) -> Values:
    """What images carry behind a part; channel means are those of its features, or not known."""
    kept = {name: one for name, one in values.items() if name != "means" or "next_features" not in found}
    given = {name[5:]: one for name, one in found.items() if name.startswith("next_")}
    if "means" in given:
        given["means"] = given["means"].reshape(len(given["means"]), -1)
    return kept | given


class Flow:
    """The images of a batch that are still on their way, at an operating point.

    Attributes:
        images: all of them, (N, C, H, W).
        rows: which of them these are, (n,).
        values: what these carry.
        taken: (decision, rows, option of each), in order.
        answered: (rows, place, logits) of those that have left.
        seek: lets these carry on where to look, for the first that asks.
    """

    def __init__(self, images: Array, point: Mapping[str, Any]) -> None:
        self.images, self.rows, self.point = images, np.arange(len(images)), point
        self.values: Values = {"features": images}
        self.taken: list[tuple[str, Array, Array]] = []
        self.answered: list[tuple[Array, str, Array]] = []
        self.seek: Callable[[], None] | None = None

    def through(self, part: Part) -> Values:
        """Let all go through a part; what it gives."""
        found = part(self.values)
        self.values = carry(self.values, found)
        return found

    def leave(self, leaves: Array, place: str, logits: Array) -> None:
        """Answer the rows for which ``leaves``, (n,), is true."""
        if leaves.any():
            self.answered.append((self.rows[leaves], place, logits[leaves]))
            self.rows = self.rows[~leaves]
            self.values = {name: values[~leaves] for name, values in self.values.items()}


def through(flow: Flow, part: Part) -> None:
    """All go through a part; if it answers, its logits are the features from here on."""
    found = flow.through(part)
    flow.values["features"] = found.get("logits", flow.values["features"])


def leave(flow: Flow, decision: str, part: Part) -> None:
    """Those leave whose score reaches the threshold."""
    found = flow.through(part)
    leave_with(flow, decision, found["logits"], found["score"])


def leave_joined(flow: Flow, decision: str, temperature: float, score: Part | None) -> None:
    """The same with the answers of all networks so far; without a score those leave on whom at least two agree."""
    logits, answer = flow.values["features"], joined(flow, temperature)
    if score is None:
        votes = [flow.values["votes"]] if "votes" in flow.values else []
        flow.values["votes"] = every = np.column_stack([*votes, logits.argmax(1)])
        scores = (every == every[:, -1:]).all(1) & bool(votes)
    else:
        scores = score({"answer": answer})["score"]
    if flow.point["combine"] != "last":
        logits = flow.values["evidence"] = answer
    leave_with(flow, decision, logits, scores)


def leave_with(flow: Flow, decision: str, logits: Array, scores: Array) -> None:
    threshold = flow.point["thresholds"][decision]
    leaves = scores.astype(np.float64) >= (np.inf if threshold is None else threshold)
    flow.taken.append((decision, flow.rows, 1 - leaves))
    flow.leave(leaves, decision, logits)


def joined(flow: Flow, temperature: float) -> Array:
    """The answers of all networks so far as logits of one; those of the last to run are the features."""
    how, before = flow.point["combine"], flow.values.get("evidence")
    added = flow.values["features"] / np.float32(temperature)
    if how == "mean":
        added = log_softmax(added)
    if how == "last" or before is None:
        return added
    return np.logaddexp(before, added) if how == "mean" else before + added


def join(flow: Flow, temperature: float) -> None:
    """The last network's answers are joined with those before it, if there are any."""
    if "evidence" in flow.values:
        flow.values["features"] = joined(flow, temperature)


def restart(flow: Flow, keeps: Sequence[str]) -> None:
    """Images come in again and keep only some of what they carry."""
    images = flow.images if len(flow.rows) == len(flow.images) else flow.images[flow.rows]
    flow.values = {"features": images} | {name: flow.values[name] for name in keeps if name in flow.values}


def keep(flow: Flow, part: Part, name: str) -> None:
    """Images carry on, as ``name``, what a part describes of the features."""
    flow.values[name] = part(flow.values)["description"]


def add(flow: Flow, part: Part, name: str) -> None:
    """The features become what a part makes of them and of what images carry as ``name``, for the last time."""
    flow.values = carry(flow.values, part(flow.values | {"context": flow.values.pop(name)}))


def look(flow: Flow, part: Part, places: Part) -> None:
    """Keep the features, of which a part says where to look, for the first crop."""
    flow.values["map"] = flow.values["features"]

    def seek() -> None:
        features = {"features": flow.values["map"]}
        flow.values["places"] = places(part(features))["places"]

    flow.seek = seek


def draw(flow: Flow, table: Sequence[Array]) -> None:
    """Each image carries on one row of a table, by its own pixels."""
    middle = flow.images[flow.rows, :, flow.images.shape[2] // 2]
    flow.values["places"] = np.stack(table)[middle.view(np.uint32).sum(axis=(1, 2), dtype=np.uint64) % len(table)]


def crop(flow: Flow, keeps: Sequence[str], number: int, side: Sequence[int]) -> None:
    """Images come in again, each with one of its crops, from the middle where nobody said where."""
    if flow.seek is not None:
        flow.seek()
        flow.seek = None
    restart(flow, keeps)
    images, (height, width) = flow.values["features"], side
    free = np.array([images.shape[2] - height, images.shape[3] - width])
    starts = np.tile(free // 2, (len(images), 1))
    if "places" in flow.values:
        places = flow.values["places"][:, 2 * number : 2 * number + 2]
        starts = np.floor(places * free.astype(np.float32) + np.float32(0.5)).astype(int)
    flow.values["features"] = np.stack(
        [one[:, top : top + height, left : left + width] for one, (top, left) in zip(images, starts, strict=True)]
    )


def choose(
    flow: Flow,
    decision: str,
    ways: Sequence[Part | None],
    gate: Part,
    means: bool,
    costs: Array,
    scores: Part | Linear,
) -> None:
    """Each image takes the way with the best score, after the offset times its cost is added."""
    described = flow.values.get("means") if means else None
    if described is None:
        described = gate(flow.values)["description"]
    found = scores(flow.values | {"description": described})
    options = (found["scores"] + np.float32(flow.point["offset"]) * costs).argmax(1)
    flow.taken.append((decision, flow.rows, options))
    values = carry(flow.values, found)
    values.pop("means", None)
    given = {"features": values["features"]} | ({"means": described} if means else {})
    flow.values = values | parted(options, ways, given)


def parted(options: Array, ways: Sequence[Part | None], given: Values) -> Values:
    """What becomes of values when each row goes its own way; None changes nothing."""
    first = int(options[0])
    if (options == first).all():
        return passed(ways[first], given)
    groups = {option: np.flatnonzero(options == option) for option in set(options.tolist())}
    found = {
        option: passed(ways[option], {name: values[rows] for name, values in given.items()})
        for option, rows in groups.items()
    }
    after = {
        name: np.empty((len(options), *values.shape[1:]), values.dtype)
        for name, values in found[first].items()
        if all(name in one for one in found.values())
    }
    for name, values in after.items():
        for option, rows in groups.items():
            values[rows] = found[option][name]
    return after


def passed(way: Part | None, values: Values) -> Values:
    return values if way is None else carry(values, way(values))


WORDS: dict[str, Callable[..., None]] = {
    word.__name__: word for word in (through, leave, leave_joined, join, restart, choose, keep, add, look, draw, crop)
}


@dataclass(frozen=True)
class Answers:
    """Of N images: logits (N, classes), the place at which each was answered, and the option that it took of each
    decision (N,), -1 where it did not come there."""

    logits: Array
    places: list[str]
    taken: dict[str, Array]


class Network:
    """The network at an operating point, by default the one that it was exported at."""

    def __init__(self, point: str | None = None) -> None:
        self.point: dict[str, Any] = PLAN["operating_points"][point or PLAN["operating_point"]]
        options = session_options()

        def made(value: Any) -> Any:
            if isinstance(value, list):
                numbers = all(isinstance(one, float) for one in value)
                return np.array(value, np.float32) if numbers else [made(one) for one in value]
            if isinstance(value, str) and value.endswith(".onnx"):
                return Part(value, options)
            return Linear(value) if isinstance(value, str) and value.endswith(".npz") else value

        self.steps: list[Callable[[Flow], None]] = []
        for number in self.point["runs"]:
            word, *fields = PLAN["steps"][number].items()
            self.steps.append(partial(WORDS[word[1]], **{name: made(value) for name, value in fields}))

    def run(self, images: Array) -> Answers:
        """Answer float32 images (N, C, H, W), sized and normalised."""
        flow = Flow(np.ascontiguousarray(images, np.float32), self.point)
        for step in self.steps:
            if len(flow.rows):
                step(flow)
        flow.leave(np.ones(len(flow.rows), bool), "end", flow.values["features"])
        logits = np.empty((len(images), PLAN["classes"]), np.float32)
        places = [""] * len(images)
        taken = {name: np.full(len(images), -1) for name in PLAN["decisions"]}
        for rows, place, found in flow.answered:
            logits[rows] = found
            for row in rows.tolist():
                places[row] = place
        for decision, rows, options in flow.taken:
            taken[decision][rows] = options
        return Answers(logits, places, taken)

    def answer(self, images: Sequence[Array]) -> Iterator[dict[str, Any]]:
        """Class, probability, who answered and the options taken, of each of some images (C, H, W)."""
        answers = self.run(np.stack(images)) if images else Answers(np.empty((0, 1)), [], {})
        for i, (logits, end) in enumerate(zip(answers.logits, answers.places, strict=True)):
            place, names = PLAN["places"][end], PLAN["class_names"]
            warm = 1.0 if place["joins"] and self.point["combine"] != "last" else place["temperature"]
            probabilities = np.exp(log_softmax(logits[None] / np.float32(warm)))[0]
            best = int(probabilities.argmax())
            yield {
                "answer": names[best] if best < len(names) else str(best),
                "confidence": round(float(probabilities[best]), 6),
                "by": place["name"],
                "options": {name: int(taken[i]) for name, taken in answers.taken.items() if taken[i] >= 0},
            }


def log_softmax(logits: Array) -> Array:
    logits = logits - logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def session_options() -> ort.SessionOptions:
    """Threads that do not spin against the next session, and memory that all sessions share."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg(0, -1, -1, -1))
    options.add_session_config_entry("session.use_env_allocators", "1")
    return options


def read_image(path: str) -> Array:
    """An image file as the network wants it: cut, sized and normalised, (C, H, W).

    Raises:
        OSError, ValueError, SyntaxError: it cannot be read.
    """
    from PIL import Image

    wanted = PLAN["images"]
    try:
        with Image.open(path) as opened:
            image = eight_bits(opened).convert("L" if wanted["channels"] == 1 else "RGB")
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
    height, width = to = tuple(wanted["size"])
    if wanted["cover"]:  # is covered by the image, of which the middle is cut out
        rows, columns = wanted["cover"]
        upright = rows * image.width < columns * image.height
        to = (max(rows, int(columns * image.height / image.width)), columns)
        to = to if upright else (rows, max(columns, int(rows * image.width / image.height)))
    image = image.resize(to[::-1], Image.Resampling[wanted["interpolation"].upper()])
    top, left = round((to[0] - height) / 2), round((to[1] - width) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32).reshape(height, width, -1)
    mean, deviation = np.array(wanted["mean"]), np.array(wanted["deviation"])
    pixels = pixels * (1 / (255 * deviation)).astype(np.float32) + (-mean / deviation).astype(np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def eight_bits(image: Any) -> Any:
    """An image; 16-bit grey and floats are scaled to 0..255."""
    from PIL import Image

    if not image.mode.startswith(("I", "F")):
        return image
    levels = np.asarray(image).astype(np.float64)
    if image.mode.startswith("I"):
        levels = levels / 257 if levels.max() > 255 else levels
    elif levels.max() <= 1:
        levels = levels * 255
    return Image.fromarray(np.clip(np.rint(levels), 0, 255).astype(np.uint8))


def predictions(network: Network, paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One for each file, in order; with an error for one that cannot be read."""
    for start in range(0, len(paths), BATCH):
        batch, images, errors = paths[start : start + BATCH], {}, {}
        for path in batch:
            try:
                images[path] = read_image(path)
            except (OSError, ValueError, SyntaxError) as error:
                errors[path] = f"cannot read the image {path}: {error}"
        found = dict(zip(images, network.answer(list(images.values())), strict=True))
        for path in batch:
            yield {"file": path, "error": errors.get(path)} | found.get(path, {})


def chosen_point(name: str | None, budget: float | None) -> str:
    """An operating point by its name or the beginning of it, or the most accurate one within a share of the original
    network's MACs.

    Raises:
        ValueError: there is none, or several.
    """
    points: dict[str, Any] = PLAN["operating_points"]
    if name is None and budget is None:
        return str(PLAN["operating_point"])
    if budget is not None:
        known = [one for one, point in points.items() if point["macs_ratio"] is not None]
        found = [one for one in known if points[one]["macs_ratio"] <= budget * (1 + 1e-9)]
        found = sorted(found, key=lambda one: (-points[one]["accuracy"], points[one]["macs_ratio"]))[:1]
    else:
        found = [one for one in points if one == name] or [one for one in points if one.partition("-")[0] == name]
    if len(found) != 1:
        told = ", ".join(f"{one} ({point['macs_ratio'] or 0:.3f} of the MACs)" for one, point in points.items())
        raise ValueError(f"no operating point {f'within {budget}' if name is None else name}; there are {told}")
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Classify image files: class, probability, and who answered.")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--point", metavar="NAME", help="an operating point of routing.json")
    which.add_argument("--budget", type=float, metavar="RATIO", help="mean MACs at most this share of the original's")
    parser.add_argument("--json", action="store_true", help="everything that is known, as JSON")
    given = parser.parse_args()
    if PLAN["images"] is None:
        parser.error("the artifact did not say how images are sized and normalised: call Network().run from Python")
    try:
        point = chosen_point(given.point, given.budget)
    except ValueError as error:
        parser.error(str(error))
    found = list(predictions(Network(point), given.images))
    if given.json:
        print(json.dumps(found, indent=1))
    for one in found:
        if one["error"] is not None:
            print(f"error: {one['error']}", file=sys.stderr)
        elif not given.json:
            print(f"{one['file']}  {one['answer']}  {one['confidence']:.3f}  {one['by']}")
    sys.exit(2 if any(one["error"] for one in found) else 0)


if __name__ == "__main__":
    main()
