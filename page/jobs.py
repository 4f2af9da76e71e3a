"""Whatever needs the models is done one job at a time, in a thread that can be watched and stopped."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

from mahlstick.errors import MahlstickError
from mahlstick.pipelines.generate import Result, generate
from mahlstick.pipelines.load import Loader
from mahlstick.pipelines.preview import preview
from mahlstick.pipelines.request import Request

WAITING_LIMIT = 200  # jobs

Work = Callable[..., Any]  # takes the job, the loader, and device and dtype by name


class Cancelled(Exception):
    """The person does not want it any more."""


class Job:
    """Work on its way, such as a request for pictures. What is public may be read from any thread, at any time."""

    def __init__(self, work: Work, owner: str | None = None, is_training: bool = False) -> None:
        self.owner = owner
        self.is_training = is_training  # a process of its own, which takes long
        self.step = 0
        self.total = 0  # steps of all that is made; 0 until the first one
        self.preview: Image.Image | None = None
        self.future: Future[Any] = Future()
        self._work: Work | None = work
        self._cancelled = threading.Event()
        self._began = 0.0

    @property
    def seconds_left(self) -> float | None:
        """From the steps so far; None before the second."""
        if self.step < 2:
            return None
        return (time.monotonic() - self._began) / (self.step - 1) * (self.total - self.step)

    def tell(self, step: int, total: int, preview: Image.Image | None = None) -> None:
        """How far it has come. Raises :class:`Cancelled` where it need not go on."""
        if self._cancelled.is_set():
            raise Cancelled
        if self.step == 0:
            self._began = time.monotonic()
        self.step, self.total = min(step, total), total
        self.preview = preview or self.preview

    @property
    def is_cancelled(self) -> bool:
        """Whether it is not wanted any more, be it that it is still in the queue."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Stops before the next layer of whichever network is at work; what waits lets go of what it holds."""
        self._cancelled.set()
        self._work = None

    def run(self, loader: Loader, where: dict[str, Any]) -> Any:
        """What the work returns. Raises :class:`Cancelled`."""
        work = self._work
        if work is None:
            raise Cancelled
        with nullcontext() if self.is_training else _interruptible(self._cancelled):
            return work(self, loader, **where)


def pictures(request: Request, save: Callable[[Result], list[Path]]) -> Work:
    """The work that makes a request's pictures, and returns the files that ``save`` writes."""

    def work(job: Job, loader: Loader, **where: Any) -> list[Path]:
        watched = steps(job, calls=-(-request.images // request.batch))
        return save(generate(request, loader=loader, progress=False, callback=watched, **where))

    return work


def steps(job: Job, calls: int = 1) -> Callable[..., dict[str, Any]]:
    """A callback for a pipeline that is called ``calls`` times: tells the job of each step, and shows the picture as
    far as it has come."""
    seen = 0

    def on_step(pipe: Any, i: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        nonlocal seen
        seen += 1
        job.tell(seen, pipe.num_timesteps * calls, forming(pipe, state["latents"]))
        return state

    return on_step


def forming(pipe: Any, latents: torch.Tensor) -> Image.Image:
    """The first picture of a pipeline's latents, as far as it has come; small."""
    config = pipe.vae.config
    return preview(latents[:1] / config.scaling_factor + (getattr(config, "shift_factor", None) or 0), pipe.vae)


class Jobs:
    """The queue, and the one thread that works it off with one set of loaded models."""

    def __init__(self, device: str | None = None, dtype: str | None = None) -> None:
        self._loader = Loader(bases=2)
        self._where = {"device": device, "dtype": dtype}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mahlstick")
        self._line: list[Job] = []
        self._lock = threading.Lock()  # of the line

    def submit(self, work: Work, owner: str | None = None, is_training: bool = False) -> Job:
        """Puts work in the queue; ``owner`` is who may cancel it. Raises :class:`MahlstickError` where that is full."""
        job = Job(work, owner, is_training)
        with self._lock:
            self._line = [each for i, each in enumerate(self._line) if i == 0 or not each.is_cancelled]
            if len(self._line) >= WAITING_LIMIT:
                raise MahlstickError("too many pictures are waiting; try again in a minute")
            self._line.append(job)
        job.future = self._thread.submit(self._work, job)
        return job

    def cancel(self, owner: str) -> None:
        """Stops what this owner has in the queue."""
        for job in self._line.copy():
            if job.owner == owner:
                job.cancel()

    def works_on(self, job: Job) -> bool:
        """Whether it is its turn."""
        return self._line[:1] == [job]

    def ahead(self, job: Job) -> int:
        """How many are made before it: the one at work, and those that are not cancelled while they wait."""
        line = self._line.copy()
        if job not in line:
            return 0
        return sum(i == 0 or not other.is_cancelled for i, other in enumerate(line[: line.index(job)]))

    @property
    def trains(self) -> bool:
        """Whether a training is at work, for whose end all others wait."""
        return any(job.is_training for job in self._line[:1])

    def warm_up(self, base: str = "embedded") -> None:
        """Loads a base in the worker's thread, so that the first picture comes sooner."""
        self._thread.submit(lambda: self._loader.pipeline(base, **self._where))

    def close(self) -> None:
        """Cancels everything and ends the thread."""
        for job in self._line.copy():
            job.cancel()
        self._thread.shutdown()

    def _work(self, job: Job) -> Any:
        try:
            return job.run(self._loader, self._where)
        finally:
            with self._lock:
                self._line = [each for each in self._line if each is not job]


@contextmanager
def _interruptible(cancelled: threading.Event) -> Iterator[None]:
    """Inside, every layer that this thread is about to run raises :class:`Cancelled` once the event is set.

    A callback of the pipeline would come only between steps, and one step of a large model on a CPU takes a minute.
    """
    worker = threading.get_ident()

    def check(module: torch.nn.Module, inputs: Any) -> None:
        if cancelled.is_set() and threading.get_ident() == worker:
            raise Cancelled

    handle = register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()
