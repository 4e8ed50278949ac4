"""Whose threads the sessions of a process compute on.

ONNX Runtime has one pool for a whole process or one for each session, and refuses the second once there is the first.
So sessions have their own wherever somebody else may make some, and share one where the process is all ours.
"""

from typing import Literal

from dynamize.errors import DynamizeError

Threads = Literal["own", "shared"]
_SHARED: set[str] = set()  # "wanted", once this process is known to be ours; "made", once there is a pool


def share_threads() -> None:
    """Say that nobody else makes sessions in this process: they share threads unless asked otherwise."""
    _SHARED.add("wanted")


def note_pool() -> bool:
    """Note that this process has a pool from now on; whether it had none."""
    had = "made" in _SHARED
    _SHARED.add("made")
    return not had


def chosen_threads(wanted: str | None) -> Threads:
    """Those asked for, or what suits the process.

    Raises:
        DynamizeError: no such kind, or the process has a shared pool already.
    """
    if wanted not in ("own", "shared", None):
        raise DynamizeError(f"threads={wanted!r}: sessions have their 'own', or a 'shared' pool")
    if wanted == "own" and "made" in _SHARED:
        raise DynamizeError(
            "this process has a shared pool of threads already, beside which ONNX Runtime lets no session have its "
            "own: compile with threads='own' before anything is compiled with threads='shared', or in another process"
        )
    if wanted is None:
        return "shared" if _SHARED else "own"
    return "own" if wanted == "own" else "shared"
