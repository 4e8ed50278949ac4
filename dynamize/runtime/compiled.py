"""A network on a backend: each static part compiled by itself, the decisions between them in Python."""

import copy
import math
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from dynamize.errors import DynamizeError
from dynamize.graph.tracer import blank
from dynamize.nn.executor import CACHE, Program, Routed, execute, program
from dynamize.nn.flow import Flow
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Call, Part, Piece, Point, Setting, setting_at
from dynamize.nn.row import needed
from dynamize.runtime.deadline import Deadlines, Timely
from dynamize.runtime.engine import Border, Engine, OneTorchThread, default_backend, engine_class
from dynamize.runtime.inputs import why_refused
from dynamize.runtime.maker import Maker
from dynamize.runtime.threads import Threads, chosen_threads

_GRAIN = 2**15  # numbers below which an operator of torch takes one thread anyway (at::internal::GRAIN_SIZE)


class CompiledNetwork:
    """A frozen copy of a network's weights on a backend; the operating point is read from the network at each call.

    ``compiled(images)`` takes (N, C, H, W) and returns (N, classes) as the network in eval mode does;
    ``compiled(images, deadline_ms=5)`` the best answers that there are by then (:meth:`within`). What any operating
    point of the network needs is compiled at once, so that switching takes no time.

    Attributes:
        row: the pieces of the copy.
        cache: bytes of the processor's last cache, by which images are grouped; no answer depends on it.
    """

    def __init__(self, network: DynamicNetwork, engine: Engine, cache: int = CACHE) -> None:
        self.network, self.engine, self.cache = network, engine, cache
        self.backend, self.device = engine.name, engine.device
        frozen = copy.deepcopy(network).eval()
        for piece in frozen.row:
            piece.fold()
        self._frozen = engine.prepare(frozen)
        self.row = self._frozen.row
        self._shape, self._dtype = torch.Size(network.input_shape), blank(self._frozen, 1).dtype
        self._largest = max(math.prod(shape) for shape in (self._shape, *self._frozen.shapes))
        self._maker = Maker(self._frozen, engine)
        self._parts: dict[str, list[Part]] = {}
        for part in self._frozen.parts():
            self._parts.setdefault(part.owner, []).append(part)
        self._made: dict[tuple[object, ...], Call | None] = {}
        self._programs: dict[tuple[bool, ...], Program] = {}
        self._last: tuple[Setting, Program] | None = None
        every = Setting({piece.name: 0.0 for piece in self.row})
        for setting in (every, network.setting, *map(setting_at, network.operating_points or [])):
            self._program(setting)
        self._deadlines = Deadlines(self.run, self.row, engine.device)

    @property
    def notes(self) -> list[str]:
        """Parts that the backend refuses or gets wrong, which torch computes therefore."""
        return self._maker.notes

    @property
    def in_torch(self) -> dict[str, str]:
        """These parts in words, and why."""
        return dict(self._maker.in_torch)

    def __call__(self, images_NCHW: Tensor, *, deadline_ms: float | None = None) -> Tensor:
        return self.run(images_NCHW).logits if deadline_ms is None else self.within(images_NCHW, deadline_ms).logits

    def set_operating_point(self, point: Point | str | None) -> None:
        """Switch the network, and with it this copy, to another operating point
        (:meth:`~dynamize.nn.network.DynamicNetwork.set_operating_point`); no batch waits for it."""
        self.network.set_operating_point(point)
        self._last = self.network.setting, self._program(self.network.setting)

    def run(self, images_NCHW: Tensor, setting: Setting | None = None) -> Routed:
        """Logits (N, classes) and the options that each image took, at a setting, by default the network's own.

        Raises:
            DynamizeError: images of another shape, type or device, or no tensor.
        """
        if not self._fits(images_NCHW):
            self._refuse(images_NCHW)
        setting = self.network.setting if setting is None else setting
        last = self._last  # read once: another thread may run at another setting
        if last is None or last[0] is not setting:
            last = self._last = setting, self._program(setting)
        found = last[1]
        one_thread = len(images_NCHW) * self._largest >= _GRAIN and self.engine.one_torch_thread
        one_thread = one_thread and not self._maker.path_in_torch
        with torch.inference_mode(), OneTorchThread() if one_thread else nullcontext():
            try:
                return execute(found, setting, images_NCHW, cache=self.cache)
            except Exception:
                self._refuse(images_NCHW)
                raise

    def within(self, images_NCHW: Tensor, deadline_ms: float, setting: Setting | None = None) -> Timely:
        """The best answers that there are when the time is up, for the whole batch together.

        At each place where images may leave, all do if what comes next would not be done in time, as measured on this
        machine, and get the answer of the last classifier that they passed. Nothing can be cut before the first one:
        what is returned says how late it was. The first call for more images than before rehearses first, which takes
        as long as some ten such batches and is not counted.

        Args:
            images_NCHW: the batch.
            deadline_ms: milliseconds from the call on.
            setting: by default the network's own.

        Raises:
            DynamizeError: the deadline is no positive number, or as :meth:`run`.

        Example:
            >>> import torch
            >>> net = dz.source("dynamize:digits_resnet", pretrained=True)
            >>> fast = dz.compile_network(dz.convert(net, [dz.Exits(count=2)], (1, 8, 8)), "onnxruntime")
            >>> fast.within(torch.randn(4, 1, 8, 8), deadline_ms=0.0001).cut.tolist()
            [True, True, True, True]
        """
        if not self._fits(images_NCHW):
            self._refuse(images_NCHW)
        return self._deadlines.answer(images_NCHW, self.network.setting if setting is None else setting, deadline_ms)

    def _fits(self, images: Any) -> bool:
        try:
            return bool(images.shape[1:] == self._shape and images.dtype == self._dtype)
        except AttributeError:
            return False

    def _refuse(self, images: Any) -> None:
        """Say what is wrong with images, if something is."""
        if reason := why_refused(images, tuple(self._shape), self._dtype, self.device):
            raise DynamizeError(reason)

    def calls(self, piece: Piece, following: Piece | None = None) -> dict[str, Call]:
        """The compiled parts of a piece by name; ``following`` may want to be handed channel means."""
        means = following is not None and following.reads_means
        parts = self._parts.get(piece.name, [])
        found = {part.name: self._call(part, means and part.size is None) for part in parts}
        if any(part.size is not None and self._taken(part).blocked for part in parts):
            found["grid"] = self.engine.grid
        return found | piece.quick_calls() if self.engine.one_torch_thread else found

    def ways(self, images_NCHW: Tensor) -> dict[str, tuple[list[Call | None], Tensor]]:
        """By decision that changes what comes after, the ways through its piece, None where one changes nothing, and
        the features that reach it by the dearest options."""
        found: dict[str, tuple[list[Call | None], Tensor]] = {}
        setting, flow = Setting(), Flow(images_NCHW)
        active = needed(self.row, setting)
        with torch.inference_mode():
            for piece, after in zip(active, [*active[1:], None], strict=True):
                calls = self.calls(piece, after)
                if piece.decision is None or piece.effect == "leaves":
                    piece.bind(calls)(flow, setting)
                    continue
                every = piece.way_calls(calls)
                found[piece.name] = every, flow.features.clone()
                dearest = every[-1]
                assert dearest is not None
                flow.features, flow.means = dearest(flow.features)
        return found

    def _call(self, part: Part, means: bool) -> Call:
        takes, gives = self._taken(part), self._border(part.after, part.size, means=means)
        key = id(part.module), takes, gives
        if key not in self._made:
            self._made[key] = self._maker.part(part, takes, gives)
        return cast(Call, self._made[key])

    def _taken(self, part: Part) -> Border:
        """What a part is given: nothing may write to the user's images."""
        return self._border(part.before, part.size, may_overwrite=part.before not in self._frozen.openings)

    def _border(self, number: int, size: tuple[int, int] | None = None, **facts: bool) -> Border:
        if number < 0:
            return Border(())
        shape = self._frozen.shapes[number]
        shape = shape if size is None else (shape[0], *size)
        dtype = torch.uint8 if number in self.engine.byte_borders else None
        return Border(shape, dtype, number not in self._frozen.openings and self.engine.blocks(shape), **facts)

    def _program(self, setting: Setting) -> Program:
        """What runs at a setting: pieces that are not needed are left out, so that no part of theirs is computed."""
        idle = tuple(piece.idle(setting) for piece in self.row)
        if idle not in self._programs:
            bound = [(piece, piece.bind(calls)) for piece, calls in self.called(setting)]
            self._programs[idle] = program(bound, self.row)
            self._maker.features.forget()
        return self._programs[idle]

    def called(self, setting: Setting) -> list[tuple[Piece, dict[str, Call]]]:
        """The pieces that run at a setting in order, each with the compiled parts that it is bound by."""
        found: list[tuple[Piece, dict[str, Call]]] = []
        waiting = needed(self.row, setting)
        opens = True  # whether whole batches come: nothing has parted images since some last left
        while waiting:
            piece = waiting.pop(0)
            after = waiting[0] if waiting else None
            both = self._fused(piece, after) if opens and after is not None else None
            if both is not None:
                found.append((waiting.pop(0), {"both": both}))
                continue
            found.append((piece, self.calls(piece, after)))
            opens = piece.effect == "leaves" or piece.restarts
        return found

    def _fused(self, piece: Piece, head: Piece) -> Call | None:
        """A path and the head behind it in one call, where the engine has such."""
        first, second = self._parts.get(piece.name, []), self._parts.get(head.name, [])
        roles = [part.role for part in (*first, *second)]
        if not piece.straight or not head.answers or roles != ["path", "head"]:
            return None
        path, reader = first[0], second[0]
        takes, gives = self._taken(path), self._border(path.after)
        key = id(path.module), id(reader.module), takes, gives
        if key not in self._made:
            self._made[key] = self._maker.both(path, reader, takes, gives)
        return self._made[key]


def compile_network(
    network: DynamicNetwork,
    backend: str | None = None,
    device: torch.device | str = "cpu",
    threads: Threads | None = None,
) -> CompiledNetwork:
    """Compile every static part of ``network`` for ``backend``, and compare each with torch.

    A part that the backend refuses or gets wrong is computed by torch; ``notes`` of what is returned names it.

    Args:
        network: a converted network, or a static one from :func:`dynamize.conversion.wrap`.
        backend: ``eager`` (batch norms folded, channels last), ``onnxruntime``, ``openvino`` (float32) or
            ``openvino-bf16``; by default the one that was measured to be the fastest on such a device.
        threads: "own": sessions of ONNX Runtime have threads of their own, beside those of any other session in this
            process. "shared": they share one pool, which is about a twentieth faster, and from then on ONNX Runtime
            refuses every session in this process that is not made to share it. By default "own", and "shared" in the
            `dynamize` command.

    Raises:
        DynamizeError: unknown backend, one that does not run on the device, in the network's type or with these
            threads.

    Example:
        >>> import torch
        >>> net = dz.source("dynamize:digits_resnet", pretrained=True)
        >>> dyn = dz.convert(net, [dz.Exits()], (1, 8, 8))
        >>> fast, images = dz.compile_network(dyn, "eager"), torch.randn(2, 1, 8, 8)
        >>> torch.allclose(fast(images), dyn(images), atol=1e-4)
        True
    """
    where = torch.device(device)
    engine = engine_class(default_backend(where) if backend is None else backend)(where)
    engine.threads = chosen_threads(threads)
    return CompiledNetwork(network, engine)
