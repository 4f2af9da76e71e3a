"""Training runs of a session. Each is a process of its own, and all that is known of it lies on disk."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from mahlstick.errors import MahlstickError
from mahlstick.page.jobs import Cancelled, Job, Work
from mahlstick.pipelines.load import choose_device
from mahlstick.training.checkpoint import write_whole
from mahlstick.training.config import TrainConfig

State = Literal["waiting", "running", "stopped", "done", "failed"]

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,59}")
REFRESH = 0.5  # seconds between two looks at a process
TAIL = 1 << 16  # bytes of a process's words, and of its log.jsonl, that are looked at

# `mahlstick`, which Ctrl-C stops even where the page's own shell has it ignored.
_TRAIN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from mahlstick.cli import main
sys.exit(main())
"""

_OF_LEARNING = {"step", "loss", "norm", "rate", "pictures_per_second"}
_OF_HELD_OUT = {"held_out_loss", "score"}


@dataclass(frozen=True)
class Run:
    """One run below a session's folder of results: ``folder/name`` is the result's folder."""

    folder: Path
    name: str

    @property
    def out(self) -> Path:
        return self.folder / self.name

    @property
    def config(self) -> TrainConfig:
        return TrainConfig(**json.loads(self._beside("config.json").read_text(encoding="utf-8")))

    @property
    def state(self) -> State:
        """As the page that watches over the run noted it. A run whose page is gone may still be at work."""
        kept = self._kept()
        state: State = kept["state"]
        if state in ("waiting", "running") and not _lives(kept.get("page")):
            return "running" if _lives(kept.get("process")) else "stopped"
        return state

    @property
    def is_live(self) -> bool:
        return self.state in ("waiting", "running")

    @property
    def began(self) -> float:
        """When it was first asked for, in seconds since 1970."""
        return self._beside("config.json").stat().st_mtime

    def begin(self, config: TrainConfig) -> None:
        """Note what is asked for. Raises :class:`MahlstickError` where the name is taken."""
        if self.out.exists() or self._beside("config.json").exists():
            raise MahlstickError(f"name: {self.name} is taken; choose another")
        self._beside("config.json").parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._beside("config.json"), config.to_json())

    def wait(self) -> None:
        """Note that the run is in this page's queue."""
        self._keep("waiting")

    def leave(self) -> None:
        """Note that nobody watches over it any more, be it that it never began."""
        if self._kept()["state"] in ("waiting", "running"):
            self._keep("stopped")

    def figures(self) -> list[dict[str, float]]:
        """The lines of its log so far, each with its ``step``."""
        path = self.out / "log.jsonl"
        return list(_lines(path.read_text(encoding="utf-8"))) if path.is_file() else []

    @property
    def step(self) -> int:
        """The last one of its log."""
        for line in reversed(_end(self.out / "log.jsonl")):
            for figures in _lines(line):  # none where it is being written
                return int(figures["step"])
        return 0

    def losses(self) -> list[tuple[int, str, float]]:
        """Step, which loss, value."""
        return self._measures({"loss", "held_out_loss"})

    def fidelities(self) -> list[tuple[int, str, float]]:
        """Step, measure and value of all that validations found but the loss."""
        names = {name for line in self.figures() for name in line}
        return self._measures(names - _OF_LEARNING - _OF_HELD_OUT)

    def samples(self) -> Path | None:
        """The newest sheet of samples."""
        return max((self.out / "samples").glob("*.png"), default=None)

    def estimate(self) -> str:
        """What the run says of the time and memory that it takes; empty until it does."""
        told = [line for line in self._words() if line.startswith("about ")]
        return told[-1] if told else ""

    def reason(self) -> str:
        """What it said last, or that it could not say any more."""
        if (code := self._kept().get("code", 0)) < 0:
            return f"its process was killed (signal {-code}); there may have been too little memory"
        words = [line for line in self._words() if line.strip()]
        return words[-1].removeprefix("mahlstick: ").replace(f"{self.folder}{os.sep}", "") if words else ""

    def work(self) -> Work:
        """The work that begins the run, or goes on with it, and watches over it. Cancelled, it lets the run end as
        Ctrl-C does."""

        def work(job: Job, loader: Any, *, device: str | None = None, **_: Any) -> None:
            on_cpu = choose_device(device) == "cpu"
            if not on_cpu:  # whose memory the run needs
                from mahlstick.nodes.builtin import loaders

                loader.forget()
                loaders.forget()
            process = self._start(on_cpu)
            self._keep("running", psutil.Process(process.pid))
            total, asked = self.config.steps, False
            while (code := process.poll()) is None:
                try:
                    job.tell(self.step, total)
                except Cancelled:
                    if not asked:
                        process.send_signal(signal.SIGINT)
                    asked = True
                time.sleep(REFRESH)
            self._keep("done" if code == 0 else "stopped" if asked else "failed", code=code)
            if asked and code:
                raise Cancelled

        return work

    def stop(self) -> None:
        """Have a run that a page left behind end as Ctrl-C does. One of this page's is stopped by its job."""
        kept = self._kept()
        if _lives(kept.get("process")):
            os.kill(kept["process"]["pid"], signal.SIGINT)

    def remove(self) -> None:
        """Delete the result, its checkpoints, and all that is known of the run. Raises :class:`MahlstickError` while it
        is at work."""
        if self.is_live:
            raise MahlstickError(f"name: {self.name} is at work; stop it first")
        shutil.rmtree(self.out, ignore_errors=True)
        for what in ("config.json", "state.json", "log"):
            self._beside(what).unlink(missing_ok=True)

    def reads(self, folder: Path) -> bool:
        """Whether it learns from what is in a folder."""
        config = self.config
        given = (config.data, config.control, config.reference)
        return any(Path(each).is_relative_to(folder) for each in given if each is not None)

    def _start(self, on_cpu: bool) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "TQDM_MININTERVAL": "5"}
        if on_cpu:
            environment["ACCELERATE_USE_CPU"] = "true"
        command = [sys.executable, "-c", _TRAIN, "train", "--config", str(self._beside("config.json"))]
        with self._beside("log").open("ab") as log:
            # A session of its own: Ctrl-C at the page's shell is the page's to pass on.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        if on_cpu:  # pictures are made beside it, and come first
            psutil.Process(process.pid).nice(10)
        return process

    def _measures(self, names: set[str]) -> list[tuple[int, str, float]]:
        found = [(line, name) for line in self.figures() for name in sorted(names & line.keys())]
        return [(int(line["step"]), name, line[name]) for line, name in found if line[name] is not None]

    def _words(self) -> list[str]:
        """The end of what the process said."""
        return _end(self._beside("log"))

    def _kept(self) -> dict[str, Any]:
        path = self._beside("state.json")
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"state": "stopped"}

    def _keep(self, state: State, process: psutil.Process | None = None, code: int = 0) -> None:
        """Note the state, this page, and the run's process or how it ended."""
        known = {"page": psutil.Process()} | ({} if process is None else {"process": process})
        told = {name: {"pid": each.pid, "since": each.create_time()} for name, each in known.items()}
        write_whole(self._beside("state.json"), json.dumps({"state": state, "code": code, **told}))

    def _beside(self, what: str) -> Path:
        return self.folder / ".runs" / f"{self.name}.{what}"


def runs(folder: Path) -> list[Run]:
    """The runs of a session, the newest first."""
    found = [Run(folder, path.name.removesuffix(".config.json")) for path in (folder / ".runs").glob("*.config.json")]
    return sorted(found, key=lambda run: run.began, reverse=True)


def _lives(noted: dict[str, Any] | None) -> bool:
    """Whether the process that was noted is still there; another one may have got its number."""
    if noted is None:
        return False
    try:
        process = psutil.Process(noted["pid"])
        return bool(process.create_time() == noted["since"] and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _end(path: Path) -> list[str]:
    """The last lines of a file, the first of them perhaps cut; none where there is no file."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        return file.read().decode("utf-8", errors="replace").splitlines()


def _lines(text: str) -> Iterator[dict[str, float]]:
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # is being written
            return
