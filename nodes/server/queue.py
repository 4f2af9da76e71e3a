"""The jobs that wait, the one that runs, and what became of those that ran."""

from __future__ import annotations

import json
from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from threading import Condition, Event, Lock
from typing import Any

from mahlstick.errors import MahlstickError
from mahlstick.nodes.graph import Graph
from mahlstick.nodes.server.guard import Limits


@dataclass(eq=False)
class Job:
    """A workflow to run for a client, who hears of it. ``record`` is its JSON as ComfyUI's queue and history show it:
    number, id, prompt, extra data, outputs. ``node`` is the one that runs."""

    id: str
    number: float
    graph: Graph
    targets: list[str]
    record: bytes
    client: str | None = None
    extra_pnginfo: dict[str, Any] | None = None
    stop: Event = field(default_factory=Event)
    node: str | None = None


class Queue:
    """Jobs in the order of their numbers; of two with one number, the one that came first.

    ``changed`` is called after every change.
    """

    def __init__(self, limits: Limits, changed: Callable[[], None]) -> None:
        self._limits = limits
        self._changed = changed
        self._condition = Condition()
        self._waiting: list[Job] = []
        self._running: Job | None = None
        self._nudged = False
        self.closed = False

    @property
    def running(self) -> Job | None:
        return self._running

    @property
    def remaining(self) -> int:
        with self._condition:
            return len(self._waiting) + (self._running is not None)

    def listed(self) -> bytes:
        """JSON as of ComfyUI's ``/queue``."""
        with self._condition:
            running = [] if self._running is None else [self._running]
            waiting = list(self._waiting)
        return b'{"queue_running":%b,"queue_pending":%b}' % (_array(running), _array(waiting))

    def put(self, job: Job) -> None:
        """Raises :class:`MahlstickError` where too much waits already."""
        with self._condition:
            size = sum(len(each.record) for each in self._waiting) + len(job.record)
            if len(self._waiting) >= self._limits.waiting or size > self._limits.memory:
                raise MahlstickError(f"{len(self._waiting)} jobs wait already; send this one again when some are done.")
            insort(self._waiting, job, key=lambda each: each.number)
            self._condition.notify()
        self._changed()

    def take(self) -> Job | None:
        """The next job, which runs from now on, as soon as there is one; None where there is something else to do."""
        with self._condition:
            self._condition.wait_for(lambda: self._waiting or self._nudged)
            if self._nudged:
                self._nudged = False
                return None
            job = self._running = self._waiting.pop(0)
        self._changed()
        return job

    def nudge(self) -> None:
        """Have :meth:`take` return without a job."""
        with self._condition:
            self._nudged = True
            self._condition.notify()

    def done(self) -> None:
        """The running job has ended."""
        with self._condition:
            self._running = None
        self._changed()

    def delete(self, ids: Iterable[str] | None = None) -> None:
        """Take these jobs out, or all, where they still wait."""
        gone = None if ids is None else set(ids)
        with self._condition:
            self._waiting = [each for each in self._waiting if gone is not None and each.id not in gone]
        self._changed()

    def interrupt(self, id: str | None = None) -> None:
        """Stop the running job, where it is this one."""
        with self._condition:
            if self._running is not None and id in (None, self._running.id):
                self._running.stop.set()

    def close(self) -> None:
        """Stop the running job and hand out no other."""
        self.closed = True
        self.nudge()
        self.interrupt()


class History:
    """What became of the last jobs, as JSON by id, the oldest first. Limited in number and in bytes."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lock = Lock()
        self._entries: dict[str, bytes] = {}
        self._size = 0

    def add(self, id: str, entry: bytes) -> None:
        with self._lock:
            self._drop(id)
            self._entries[id] = entry
            self._size += len(entry)
            while len(self._entries) > self._limits.history or self._size > self._limits.memory:
                self._drop(next(iter(self._entries)))

    def page(self, most: int | None = None, offset: int | None = None) -> bytes:
        """``most`` entries from ``offset`` on, counted from the oldest; without an offset the last ones."""
        with self._lock:
            start = max(0, offset if offset is not None else len(self._entries) - most if most is not None else 0)
            stop = None if most is None else start + max(0, most)
            found = list(self._entries.items())[start:stop]
        return _object(found)

    def get(self, id: str) -> bytes:
        with self._lock:
            entry = self._entries.get(id)
        return _object([] if entry is None else [(id, entry)])

    def delete(self, ids: Iterable[str] | None = None) -> None:
        """Forget these jobs, or all."""
        with self._lock:
            for each in list(self._entries) if ids is None else ids:
                self._drop(each)

    def _drop(self, id: str) -> None:
        self._size -= len(self._entries.pop(id, b""))


def _array(jobs: Iterable[Job]) -> bytes:
    return b"[%b]" % b",".join(each.record for each in jobs)


def _object(entries: Iterable[tuple[str, bytes]]) -> bytes:
    return b"{%b}" % b",".join(b"%b:%b" % (json.dumps(key).encode(), entry) for key, entry in entries)
