"""From a network and a list of transforms to a dynamic network, and the same again without data."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from dynamize.arguments import given_data, given_network, given_shape, given_steps, trained_network
from dynamize.data import Splits
from dynamize.errors import DynamizeError, closest
from dynamize.graph.given import own_copy, unwrapped
from dynamize.graph.trace import trace
from dynamize.measure.accuracy import judgeable
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import MAIN
from dynamize.sources import origin
from dynamize.transform import Context, Kind, Transform, check_order, parse_step
from dynamize.upgrade import upgraded_names

_LEARNS = Kind.TRAINS | Kind.ESTIMATES


def wrap(network: nn.Module, input_shape: Sequence[int], *, check: bool = True) -> DynamicNetwork:
    """The traced network as one static piece; ``network`` itself is left alone.

    Args:
        network: a classifier, (N, C, H, W) -> (N, classes); one that is wrapped already is only copied.
        input_shape: (C, H, W).
        check: whether its answers have to be those of a trained classifier (:func:`dynamize.graph.trace.trace`).

    Raises:
        DynamizeError: it is no network that can be read and traced, or the shape is none.
    """
    network = unwrapped(given_network(network, "a conversion"))
    given_shape(input_shape)
    if isinstance(network, DynamicNetwork):
        return copy.deepcopy(network)
    traced = trace(network, input_shape, check=check)
    wrapped = DynamicNetwork(traced, input_shape=input_shape)
    wrapped.source = origin(network)
    return wrapped.train(network.training)


def convert(
    network: nn.Module,
    transforms: Sequence[Transform],
    input_shape: Sequence[int],
    context: Context | None = None,
) -> DynamicNetwork:
    """Apply transforms in order to a copy of ``network``.

    Args:
        network: a trained classifier, also inside ``torch.compile``, data parallelism or averaging; it becomes the
            teacher unless ``context`` names another one.
        transforms: for example ``[Exits(count=2)]``.
        input_shape: (C, H, W).
        context: data, device and seed for transforms that need them.

    Raises:
        DynamizeError: the network cannot be traced, the order is wrong or a transform refuses.

    Example:
        >>> net = dz.source("dynamize:digits_resnet", pretrained=True)
        >>> dyn = dz.convert(net, [dz.Exits(count=2), dz.SkipGates(group=1)], (1, 8, 8))
        >>> [step["pass"] for step in dyn.history]
        ['exits', 'skip_gates']
    """
    network = trained_network(unwrapped(given_network(network, "dz.convert")), "dz.convert")
    given_steps(transforms, Transform)
    if context is not None and not isinstance(context, Context):
        raise DynamizeError(f"context is a dz.Context, and a {type(context).__name__} was given: dz.Context(data=...)")
    check_order(list(transforms), network.history if isinstance(network, DynamicNetwork) else [])
    converted = wrap(network, input_shape)
    if context is None or context.teacher is None:
        teacher = own_copy(network).requires_grad_(False)
        teacher.eval()
        context = Context(teacher=teacher) if context is None else replace(context, teacher=teacher)
    if context.data is not None and context.teacher is not None:
        data = judgeable(given_data(context.data, Splits), context.teacher, context.device)
        context = replace(context, data=data)
    for transform in transforms:
        converted = apply(converted, transform, context)[0]
    return converted


def apply(network: DynamicNetwork, transform: Transform, context: Context) -> tuple[DynamicNetwork, list[str]]:
    """Apply one transform and write its resolved form into the history. Returns the network and notes."""
    history, source, training = network.history, network.source, network.training
    notes: list[str] = []
    for members in _meant(network, transform):
        network, resolved, more = _apply(network.eval(), transform, context, members)
        history = [*history, resolved.describe()]
        notes += [f"{', '.join(members)}: {note}" for note in more] if network.members and members else more
    network.history, network.source = history, source
    return network.train(training), notes


def _apply(
    network: DynamicNetwork, transform: Transform, context: Context, members: Sequence[str]
) -> tuple[DynamicNetwork, Transform, list[str]]:
    """One transform, on the whole row or on some of its networks."""
    if not members or not network.members:
        applied = transform.apply(network, context)
        return applied.network, applied.resolved, applied.notes
    taken = _take(network, transform, members)
    (member,) = members if len(members) == 1 else (None,)
    work = context.work if context.work is None or member is None else context.work / member
    applied = transform.apply(taken, replace(context, work=work))
    network.put(members, applied.network)
    return network, applied.resolved.model_copy(update={"member": member}), applied.notes


def alone(network: DynamicNetwork, transform: Transform) -> Iterator[DynamicNetwork]:
    """What a step is going to be given: the whole row, or one after the other the networks in it that it is for.

    Raises:
        DynamizeError: it names none of them.
    """
    for members in _meant(network, transform):
        if not members or not network.members:
            yield network
            continue
        taken = _take(network, transform, members)
        yield taken
        network.put(members, taken)


def _take(network: DynamicNetwork, transform: Transform, members: Sequence[str]) -> DynamicNetwork:
    """Networks of the row by themselves, with the steps that they have behind them."""
    _refuse_other_images(network, transform, members[0])
    _refuse_half(network, transform, members[0])
    taken = network.take(members)
    taken.history = [step for step in network.history if step.get("member", MAIN) in members]
    return taken


def _refuse_other_images(network: DynamicNetwork, transform: Transform, member: str) -> None:
    """Refuse to show the recipe's images to a network that sees parts of them."""
    seen = network.sizes[member]
    if seen != network.input_shape and transform.kind & _LEARNS:
        together = any(member in group for group in network.made) and transform.kind & Kind.TRAINS
        instead = "leave out member: all looks learn together" if together else "do this before crops are taken"
        raise DynamizeError(
            f"{transform.pass_name}: member: {member} sees crops of {seen[1]} x {seen[2]} pixels, and the images are "
            f"whole: {instead}"
        )


def _refuse_half(network: DynamicNetwork, transform: Transform, member: str) -> None:
    """Refuse to train a network without what it goes on with."""
    if transform.kind & _LEARNS and any(piece.continues for piece in network.row if piece.member == member):
        raise DynamizeError(
            f"{transform.pass_name}: member: {member} goes on with what the network before it has seen, and would "
            "learn without that: leave out member, so that they learn together"
        )


def _meant(network: DynamicNetwork, transform: Transform) -> Sequence[Sequence[str]]:
    """The networks of the row that a step is for, in groups that it takes together; an empty one is the whole row.

    Raises:
        DynamizeError: none of this name, or a training step could mean only networks that were given trained.
    """
    name = transform.member
    if transform.whole:
        return [()]
    if name is not None and name not in (*network.members, MAIN):
        known = ", ".join([*network.members, MAIN])
        raise DynamizeError(
            f"{transform.pass_name}: member: {name} is no network of this row. {closest(name, known.split(', '))}"
            f"Known: {known}."
        )
    if name is None and network.resized and transform.kind & Kind.ESTIMATES:
        return network.resized
    if name is None and network.members and transform.kind & Kind.TRAINS and not transform.kind & Kind.REFINES_GATES:
        if not network.made:
            raise DynamizeError(
                f"{transform.pass_name}: all networks of the row came trained, and stay as they are: name the one to "
                f"train, with member: {MAIN} or {' or '.join(network.members)}, or leave the step out"
            )
        return network.made
    return [(name or MAIN,)]


def replay(
    network: nn.Module,
    history: Sequence[dict[str, Any]],
    input_shape: Sequence[int],
    context: Context | None = None,
) -> DynamicNetwork:
    """Rebuild the structure that a history describes on a fresh source network, without data or training.

    Its own history is of the current versions. ``context`` says which code is trusted, and has the networks made in
    Python.
    """
    context = Context() if context is None else context
    rebuilt = wrap(network, input_shape, check=False).eval()
    steps: list[Transform] = []
    for plain in history:
        step = parse_step(plain if "version" in plain else upgraded_names(plain, rebuilt))
        if step.structural:
            rebuilt = _apply(rebuilt, step, context, () if step.whole else (step.member or MAIN,))[0]
        steps.append(step)
    rebuilt.history = [step.describe() for step in steps]
    return rebuilt.train(network.training)
