"""The thread that runs the jobs, and what is told of them."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Mapping
from threading import Event, Thread
from typing import Any

import torch

from mahlstick.nodes.builtin import loaders
from mahlstick.nodes.engine import Engine
from mahlstick.nodes.folders import Folders, using
from mahlstick.nodes.server.queue import History, Job, Queue
from mahlstick.nodes.server.sockets import Sockets, encoded, event, preview

_log = logging.getLogger(__name__)

_ENDS = {"execution_success", "execution_error", "execution_interrupted"}
_KEPT = _ENDS | {"execution_start", "execution_cached"}


class Worker(Thread):
    """Runs one job after the other until the queue is closed."""

    def __init__(self, engine: Engine, queue: Queue, history: History, sockets: Sockets, where: Folders) -> None:
        super().__init__(name="mahlstick-worker", daemon=True)
        self._engine = engine
        self._queue = queue
        self._history = history
        self._sockets = sockets
        self._folders = where
        self._freeing = Event()

    def free(self) -> None:
        """Forget what the cache has in memory, when no job runs."""
        self._freeing.set()
        self._queue.nudge()

    def run(self) -> None:
        with using(self._folders):
            while not self._queue.closed:
                job = self._queue.take()
                if job is not None:
                    self._work(job)
                elif self._freeing.is_set():
                    self._free()

    def _work(self, job: Job) -> None:
        report = Report(job, self._sockets)
        try:
            self._engine.run(job.graph, job.targets, listen=report, extra_pnginfo=job.extra_pnginfo, stop=job.stop)
        except Exception as error:  # no node's, of which the report would have heard
            _log.exception("Job %s failed outside its nodes.", job.id)
            report("execution_error", _failure(error))
        self._history.add(job.id, report.entry())
        self._queue.done()
        report.close()

    def _free(self) -> None:
        self._freeing.clear()
        if self._engine.cache is not None:
            self._engine.cache.free()
        loaders.forget()
        gc.collect()
        torch.cuda.empty_cache()


class Report:
    """Hears what a run tells: its client hears of it at once, and the history in the end.

    How it ended the client hears last, when the history has it and may be asked.
    """

    def __init__(self, job: Job, sockets: Sockets) -> None:
        self._job = job
        self._sockets = sockets
        self._kept: list[tuple[str, dict[str, Any]]] = []
        self._ends: list[str] = []
        self._outputs: dict[str, Any] = {}
        self._meta: dict[str, dict[str, Any]] = {}

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        if kind == "preview":
            if self._sockets.has(self._job.client):
                self._sockets.say(preview(data["image"]), self._job.client)
            return
        told = {**data, "prompt_id": self._job.id}
        if kind in _KEPT:
            told["timestamp"] = time.time_ns() // 1_000_000
        message = event(kind, told)
        if kind in _KEPT:
            self._kept.append((kind, told))
        if kind == "executing":
            self._job.node = told["node"]
        if kind == "executed":
            self._note(told["node"], told["display_node"], told["output"])
        if kind in _ENDS:
            self._ends.append(message)
        else:
            self._sockets.say(message, self._job.client)

    def entry(self) -> bytes:
        """The job in the history, as JSON."""
        done = bool(self._kept) and self._kept[-1][0] == "execution_success"
        status = {"status_str": "success" if done else "error", "completed": done, "messages": self._kept}
        rest = encoded({"outputs": self._outputs, "status": status, "meta": self._meta}).encode()
        return b'{"prompt":%b,%b' % (self._job.record, rest[1:])

    def close(self) -> None:
        """Tell how it ended."""
        for message in (*self._ends, event("executing", {"node": None, "prompt_id": self._job.id})):
            self._sockets.say(message, self._job.client)

    def _note(self, node: str, display: str, output: Any) -> None:
        self._outputs[node] = output
        parent = display if display != node else None
        self._meta[node] = {"node_id": node, "display_node": display, "parent_node": parent, "real_node_id": display}


def _failure(error: Exception) -> dict[str, Any]:
    """The fields of ComfyUI's ``execution_error`` for a failure that is no node's."""
    told = {"exception_type": type(error).__name__, "exception_message": str(error)}
    return {"node_id": "", "node_type": "", "executed": [], "traceback": [], **told}
