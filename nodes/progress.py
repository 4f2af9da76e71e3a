"""How a running node tells of its progress, and how it is interrupted.

Outside a run a node may report as well; nobody hears it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol


class Interrupted(Exception):
    """The run was stopped by the person who asked for it."""


class Listener(Protocol):
    """Hears of a node's progress. Raises :class:`Interrupted` to stop it."""

    def __call__(self, value: int, total: int, preview: Any = None) -> None: ...


_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def report(value: int, total: int, preview: Any = None) -> None:
    """Tell that ``value`` of ``total`` parts are done; ``preview`` is a PIL picture of how it looks.

    Raises :class:`Interrupted` where the run was stopped, so long nodes should report often.
    """
    listener = _listener.get()
    if listener is not None:
        listener(value, total, preview)


def heard() -> bool:
    """Whether anybody hears what is reported: for nobody no picture need be made."""
    return _listener.get() is not None


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within the block ``listener`` hears what is reported."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
