"""What `canvas:SOURCE,size=128` says: the options of cluttered canvases. Importing it does not import torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dynamize.errors import closest

FORM = "canvas:SOURCE,size=128"
_OPTION = re.compile(r"[A-Za-z_]+=[^,=]*")
_NAMES = ("size", "object", "clutter", "seed")
_LARGEST = 1024
_AREA = 400  # pixels of a canvas for each fragment on it, by default


@dataclass(frozen=True)
class CanvasSpec:
    """Cluttered canvases of the images of a source.

    Attributes:
        size: height and width of a canvas in pixels.
        object: the smallest and the largest side of the image on it.
        clutter: how many fragments of other images lie around it.
        seed: of all that is drawn.
    """

    size: int
    object: tuple[int, int]
    clutter: int
    seed: int

    @classmethod
    def read(cls, rest: str) -> tuple[str, CanvasSpec]:
        """``"imagefolder:cifar,size=96,object=24-40"`` -> ``("imagefolder:cifar", CanvasSpec(...))``.

        Raises:
            ValueError: an option is unknown, given twice or out of range; in words.
        """
        inner, given = parted(rest)
        options: dict[str, str] = {}
        for one in given:
            name, _, value = one.partition("=")
            if name not in _NAMES:
                raise ValueError(f"canvas: no option {name!r}: {closest(name, [*_NAMES])}use {', '.join(_NAMES)}")
            if name in options:
                raise ValueError(f"canvas: {name} is given twice")
            options[name] = value
        return inner, cls._of(options)

    @classmethod
    def _of(cls, options: dict[str, str]) -> CanvasSpec:
        size = _number("size", options.get("size", "128"), 16, _LARGEST)
        smallest, largest = _range(options.get("object", f"{size // 4}-{size * 5 // 12}"), size)
        clutter = _number("clutter", options.get("clutter", str(round(size * size / _AREA))), 0, 10_000)
        return cls(size, (smallest, largest), clutter, _number("seed", options.get("seed", "0"), 0, 2**32 - 1))

    @property
    def fragments(self) -> tuple[int, int]:
        """The smallest and the largest side of a fragment: a third to two thirds of the smallest object."""
        return max(2, self.object[0] // 3), max(2, self.object[0] * 2 // 3)


def parted(rest: str) -> tuple[str, list[str]]:
    """``"npz:a,b.npz,size=96"`` -> ``("npz:a,b.npz", ["size=96"])``."""
    parts = rest.split(",")
    count = len(parts)
    while count > 1 and _OPTION.fullmatch(parts[count - 1]):
        count -= 1
    return ",".join(parts[:count]), parts[count:]


def _number(name: str, given: str, least: int, most: int) -> int:
    if not re.fullmatch(r"\d{1,12}", given) or not least <= int(given) <= most:
        raise ValueError(f"canvas: {name}={given} is no whole number from {least} to {most}")
    return int(given)


def _range(given: str, size: int) -> tuple[int, int]:
    first, dash, second = given.partition("-")
    smallest = _number("object", first, 4, size)
    largest = _number("object", second if dash else first, 4, size)
    if largest < smallest:
        raise ValueError(f"canvas: object={given}: write the smallest side first, as in object={second}-{first}")
    return smallest, largest
