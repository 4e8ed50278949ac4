"""A symbolic tracer that knows sizes: loops over chunks and questions about shapes are answered while it reads."""

import logging
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import StochasticDepth


class Whole(nn.Module):
    """A module of ours that stays one node when a network is traced."""


# Subclasses outside torch.nn (timm's BatchNormAct2d, Conv2dSame, ...) must stay modules: traced through, a
# batch norm freezes its training flag and disappears from the network.
_LEAF_TYPES: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.dropout._DropoutNd,
    StochasticDepth,
    Whole,
)
# Kept whole by timm because of an in-place `mul_` whose result nothing names; `annotate` puts it in order.
_TRACED_ALL_THE_SAME = ("NormFreeBlock",)
_CREATORS = ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "zeros")
TRACING = threading.RLock()
"""Held while a network is read, as that exchanges functions of torch for all threads."""
BATCHES = (2, 3)  # of the images on which sizes are found out: what is alike for both is a constant
_ASKING = (getattr, "size", "dim", "ndimension", "numel")
_KEEPING_SIZES = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd, nn.Identity, nn.ReLU)
_VALUES = (bool, int, float, str, tuple, torch.dtype, torch.device, type(None))


class SizedProxy(fx.Proxy):
    """A value whose sizes are known, where somebody asks for them.

    Attributes:
        found: the value for two and for three images, tensors without memory, once that was worked out; None where it
            is unknown.
        varies: whether it follows the number of images without being a tensor.
    """

    tracer: "NetworkTracer"
    found: tuple[Any, Any] | None = None
    varies = False

    @property
    def examples(self) -> tuple[Any, Any] | None:
        """``found``, worked out now where it was not yet."""
        self.tracer.catch_up()
        return self.found

    def known(self) -> Any:
        """A value that is the same for any images. Raises TypeError for any other."""
        if self.examples is None or self.varies or not isinstance(self.examples[0], _VALUES):
            raise TypeError("it is known only once the network runs")
        return self.examples[0]

    def __getattr__(self, k: str) -> Any:
        method = k.startswith("__") or callable(getattr(Tensor, k, None))
        value = None if method or self.examples is None else getattr(self.examples[0], k, None)
        if value is None or callable(value):
            return super().__getattr__(k)
        return self.tracer.create_proxy("call_function", getattr, (self, k), {})

    def __iter__(self) -> Iterator[Any]:
        count = _length(self)
        return super().__iter__() if count is None else (self[i] for i in range(count))  # type: ignore[index]

    def __len__(self) -> int:
        count = _length(self)
        return super().__len__() if count is None else count

    def __index__(self) -> int:
        return self.known().__index__()

    def __int__(self) -> int:
        return int(self.known())

    def __float__(self) -> float:
        return float(self.known())


def _length(proxy: SizedProxy) -> int | None:
    """How many things there are in a tuple, or along the first dimension of a tensor; None if that varies."""
    if proxy.examples is None:
        return None
    if all(isinstance(one, Tensor) for one in proxy.examples):
        lengths = {one.shape[0] for one in proxy.examples if one.ndim}
    else:
        lengths = {len(one) for one in proxy.examples if isinstance(one, (tuple, list))}
    return lengths.pop() if len(lengths) == 1 else None


class NetworkTracer(fx.Tracer):
    """``fx.Tracer`` with the leaf lists of torchvision and, where it is installed, timm.

    Args:
        input_shape: (C, H, W). With it the nodes' ``meta`` says what they give for two and for three images: ``sizes``
            of tensors, ``fact`` of anything else.
        buffers: record what is computed of buffers too, instead of computing it once.
        whole: paths of further modules that stay one node.

    Attributes:
        visiting: path of the module that is being read.
        drawing: path of the module that drew random numbers by itself while it was read, or None.
    """

    def __init__(
        self, input_shape: Sequence[int] | None = None, *, buffers: bool = False, whole: frozenset[str] = frozenset()
    ) -> None:
        functions, self._timm_leaves = _timm_leaves()
        super().__init__(autowrap_functions=functions)
        self.proxy_buffer_attributes = buffers
        self.visiting = ""
        self.drawing: str | None = None
        self._input_shape, self._whole = input_shape, whole
        self._evaluating = False

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        with TRACING:
            return self._trace(root, concrete_args)

    def _trace(self, root: Any, concrete_args: dict[str, Any] | None) -> fx.Graph:
        self._thread = threading.get_ident()
        self._images: list[Any] = []
        self._waiting: list[tuple[SizedProxy, str, Any, tuple, dict]] = []
        if self._input_shape is not None:
            from torch._subclasses.fake_tensor import FakeTensorMode

            self._fake = FakeTensorMode(allow_non_fake_inputs=True)
            shapes = [(count, *self._input_shape) for count in BATCHES]
            self._images = [self._fake.from_tensor(blank(root, *shape)) for shape in shapes]
        with self._recording_creation(), _Draws() as self._draws:
            before = self._drawn()
            graph = super().trace(root, concrete_args)
            if self.drawing is None and self._drawn() != before:
                self.drawing = ""
        if any(node.target in _ASKING for node in graph.nodes):
            self.catch_up()
        return graph

    @property
    def lost(self) -> bool:
        """Whether sizes were asked for and, at the end, are not known."""
        values = self.graph.output_node().all_input_nodes
        return bool(self._images) and not self._waiting and not any("sizes" in value.meta for value in values)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, _LEAF_TYPES + self._timm_leaves) or "DropPath" in type(m).__name__:
            return True
        return module_qualified_name in self._whole or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return SizedProxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        try:
            return bool(obj.known())
        except (AttributeError, TypeError):
            return super().to_bool(obj)

    def create_proxy(self, kind: str, target: Any, args: tuple, kwargs: dict, *rest: Any, **more: Any) -> Any:
        if kind == "placeholder" and args and self.graph.find_nodes(op="placeholder"):
            return args[0]  # forward(images, mask=None): a classifier is called with the images only
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        if self._images and isinstance(proxy, SizedProxy):
            now = map_aggregate((args, kwargs), lambda one: one)  # lists may grow later
            self._waiting.append((proxy, kind, target, *now))
        return proxy

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        if self._evaluating or threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        try:
            path = self.path_of_module(m)
        except NameError:  # made while the network runs, as a slice of nn.Sequential is
            return forward(*args, **kwargs)
        outer, self.visiting = self.visiting, path
        before = self._drawn()
        result = super().call_module(m, forward, args, kwargs)
        if self.drawing is None and self._drawn() != before:
            self.drawing = self.visiting
        self.visiting = outer  # not restored on an error: it then names the module that failed
        return result

    def _drawn(self) -> tuple[Any, ...]:
        """What changes when random numbers are drawn."""
        numpy = sys.modules.get("numpy")
        arrays = numpy.random.get_state(legacy=False)["state"] if numpy else {}
        return (self._draws.count, random.getstate(), str(arrays.get("pos")), bytes(arrays.get("key", b"")))

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if self._evaluating or threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def catch_up(self) -> None:
        """Work out what all nodes give that were recorded so far."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        state, failures = torch.get_rng_state(), logging.getLogger("torch._subclasses.fake_tensor")
        level = failures.level
        failures.setLevel(logging.CRITICAL)  # it logs operators that fail, with their tracebacks
        self._evaluating = True
        drawn = self._draws.count
        try:
            with self._fake, torch.no_grad():
                for proxy, kind, target, args, kwargs in waiting:
                    proxy.found = self._both(kind, target, args, kwargs)
                    if proxy.found is not None:
                        proxy.varies = _varies(target, (*args, *kwargs.values()), proxy.found)
                        _write(proxy)
        finally:
            self._evaluating = False
            self._draws.count = drawn
            failures.setLevel(level)
            torch.set_rng_state(state)

    def _both(self, kind: str, target: Any, args: tuple, kwargs: dict) -> tuple[Any, Any] | None:
        """What a node gives for both batches; None where that cannot be known."""
        try:
            if kind == "call_module" and isinstance(self.root.get_submodule(str(target)), _KEEPING_SIZES):
                return cast(SizedProxy, args[0]).found
            first, second = (self._run(which, kind, target, args, kwargs) for which in range(len(BATCHES)))
        except Exception:  # whatever it is: a network that does not run is refused where it is run
            return None
        return first, second

    def _run(self, which: int, kind: str, target: Any, args: tuple, kwargs: dict) -> Any:
        def example(one: Any) -> Any:
            if not isinstance(one, fx.Proxy):
                return one
            if not isinstance(one, SizedProxy) or one.found is None:
                raise LookupError
            return one.found[which]

        if kind == "placeholder":
            return self._images[which]
        if kind == "get_attr":
            return attribute(self.root, str(target))
        given, named = map_aggregate(args, example), map_aggregate(kwargs, example)
        if kind == "call_method":
            if target == "view" and not any(isinstance(one, torch.dtype) for one in given):
                target = "reshape"  # as memory lies otherwise here
            return getattr(given[0], target)(*given[1:], **named)
        called = self.root.get_submodule(str(target)) if kind == "call_module" else target
        return called(*given, **named)

    @contextmanager
    def _recording_creation(self) -> Iterator[None]:
        """Record ``torch.zeros(n, ...)`` and the like where a size is read from the images."""
        originals = {name: getattr(torch, name) for name in _CREATORS}

        def recording(original: Callable) -> Callable:
            def call(*args: Any, **kwargs: Any) -> Any:
                found: list[fx.Proxy] = []
                map_aggregate((args, kwargs), lambda one: found.append(one) if isinstance(one, fx.Proxy) else None)
                if found:
                    return self.create_proxy("call_function", original, args, kwargs)
                return original(*args, **kwargs)

            return call

        for name, original in originals.items():
            setattr(torch, name, recording(original))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(torch, name, original)


def blank(module: nn.Module, *shape: int) -> Tensor:
    """Zeros on the device and of the floating type that ``module`` computes with."""
    tensors = [*module.parameters(), *module.buffers()]
    floating = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
    return torch.zeros(shape, device=tensors[0].device if tensors else "cpu", dtype=floating)


def attribute(root: nn.Module, target: str) -> Any:
    path, _, name = target.rpartition(".")
    return getattr(root.get_submodule(path), name)


def _varies(target: Any, given: Sequence[Any], examples: tuple[Any, Any]) -> bool:
    if not all(isinstance(one, _VALUES) for one in examples):
        return False
    if _differ(*examples):
        return True
    found: list[bool] = []
    map_aggregate(tuple(given), lambda one: found.append(one.varies) if isinstance(one, SizedProxy) else None)
    if getattr(target, "__name__", "") in ("eq", "ne") and all(found) and len(found) == len(given):
        return False  # two that follow the number of images alike
    if target is getattr or getattr(target, "__name__", "") == "getitem":
        return False  # one size of several: it would differ
    return any(found)


def _differ(first: Any, second: Any) -> bool:
    """Whether two values that may hold tensors are different ones; tensors themselves are not compared."""
    if isinstance(first, tuple):
        return len(first) != len(second) or any(_differ(*pair) for pair in zip(first, second, strict=True))
    return not isinstance(first, Tensor) and bool(first != second)


def _write(proxy: SizedProxy) -> None:
    assert proxy.found is not None
    if all(isinstance(one, Tensor) for one in proxy.found):
        proxy.node.meta["sizes"] = tuple(tuple(one.shape) for one in proxy.found)
    elif all(isinstance(one, _VALUES) for one in proxy.found):
        proxy.node.meta["fact"] = proxy.found


class _Draws(TorchDispatchMode):
    """Counts operators that draw random numbers, in this thread: the state of the generator, which all threads share,
    would not tell who drew."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


def _timm_leaves() -> tuple[tuple, tuple[type[nn.Module], ...]]:
    try:
        from timm.models._features_fx import get_notrace_functions, get_notrace_modules
    except ImportError:
        return (), ()
    modules = [module for module in get_notrace_modules() if module.__name__ not in _TRACED_ALL_THE_SAME]
    return tuple(get_notrace_functions()), tuple(modules)
