"""Ends training runs with SIGKILL, starts them again, and compares them with a run that was left alone.

``python -m benchmarks.kill_resume`` does so at random moments, for every task and several seeds, and prints a table.
A moment is uniform over the whole run: reading, encoding, steps, validation, checkpoints, and writing the result. It is
measured in the first process's processor time, which other work on the machine does not stretch.
``--writes`` kills instead before each single change of a file that the run makes. ``--processes 2`` trains in two
processes on gloo, of which the first, the second or both are killed.

Equal means: the result, the newest checkpoint with its average and optimiser, and the pictures have the same bits,
the log has the same lines but for the speed, and no other file is there.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import psutil
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw
from safetensors import safe_open

from benchmarks import tiny
from mahlstick.training import tasks
from mahlstick.training.config import TaskName, TrainConfig
from mahlstick.training.run import train

OnWrite = Callable[[int], Any] | None

TASKS = get_args(TaskName)
STEPS = 6
TRIES = 3  # starts after a kill before a run counts as stuck
UNET = {
    "block_out_channels": (8, 16), "layers_per_block": 1, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A run, and where it is killed: after a share of its duration, or before one of its writes."""

    task: str
    seed: int
    moment: float = 0.0
    write: int | None = None
    victims: tuple[int, ...] = (0,)


def draw_pictures(folder: Path, count: int = 8) -> None:
    """Shapes with two captions each."""
    folder.mkdir(parents=True)
    lots = random.Random(0)
    for i in range(count):
        picture = Image.new("RGB", (tiny.SIZE, tiny.SIZE), "white")
        left, top = lots.randrange(4, 24), lots.randrange(4, 24)
        colour = tuple(lots.randrange(200) for _ in range(3))
        ImageDraw.Draw(picture).ellipse((left, top, left + 30, top + 30), fill=colour)
        picture.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"shape {i}\na round thing\n")


def base() -> Any:
    """A tiny base. Training changes it: each run has its own by its fork."""
    return tiny.quiet(StableDiffusionPipeline(**tiny.components("sd1", **UNET)))


def config(case: Case, pictures: Path) -> TrainConfig:
    """Three checkpoints and two validations, and log lines that fall between checkpoints."""
    return TrainConfig(
        task=case.task, seed=case.seed, data=str(pictures), out="out", resolution=tiny.SIZE, steps=STEPS, batch=2,
        warmup=2, rate=1e-3, schedule="cosine", ema=0.9, held_out=0.2, log_every=3, checkpoint_every=2,
        validate_every=4, keep=2, annotator="canny" if case.task == "controlnet" else None, depth=1, heads=1,
    )  # fmt: skip


# --- running


def start(
    case: Case, pictures: Path, folder: Path, rank: int = 0, world: int = 1, port: int = 0, write: Any = None
) -> int:
    """Fork a process that trains in ``folder``; → its id. A fork costs nothing, importing torch costs seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    if pid := os.fork():
        return pid
    code = 1
    try:
        told = os.open(folder / f"told-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(told, 1)
        os.dup2(told, 2)
        os.chdir(folder)
        if world > 1:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            os.environ.update({name: str(value) for name, value in names.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
        if write is not None:
            on_writes(write)
        train(config(case, pictures), base())
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
    raise AssertionError


def on_writes(act: Callable[[int], None]) -> None:
    """Call ``act`` with 0, 1, … before each change of a file that Python makes below the working folder."""
    here, count = os.getcwd(), iter(range(2**31))
    changes = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in changes) and not isinstance(arguments[0], int):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            if path.startswith(f"{here}/") or not os.path.isabs(os.fsdecode(arguments[0])):
                act(next(count))

    sys.addaudithook(hook)


def kill_before(write: int, current: int) -> None:
    if current == write:
        os.kill(os.getpid(), signal.SIGKILL)


def together(case: Case, pictures: Path, folder: Path, world: int, write: OnWrite = None) -> list[int]:
    """Start the processes of a run; → their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(case, pictures, folder, rank, world, port, write if rank == 0 else None) for rank in range(world)]


def wait(pids: list[int], enough: Callable[[], bool] = lambda: False) -> list[int | None]:
    """The exit codes, negative for signals, None for what still runs when it is ``enough``."""
    codes: dict[int, int] = {}
    while len(codes) < len(pids) and not enough():
        for pid in set(pids) - set(codes):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return [codes.get(pid) for pid in pids]


def after(seconds: float) -> Callable[[], bool]:
    """Whether so much time has gone by."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def spent(pid: int) -> float:
    """Seconds of the processor; infinitely many of a process that is gone."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return math.inf
    return float(times.user + times.system)


def whole_run(case: Case, pictures: Path, folder: Path, world: int = 1) -> float:
    """A run that is left alone; → the processor's seconds of each of its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    codes = wait(together(case, pictures, folder, world))
    if any(codes):
        raise RuntimeError(f"{case}: {(folder / 'told-0.txt').read_text()}")
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (now.ru_utime - before.ru_utime + now.ru_stime - before.ru_stime) / world


def killed_run(case: Case, pictures: Path, folder: Path, seconds: float, world: int = 1) -> str:
    """Kill a run, start it again until it ends; → where it was killed. Raises RuntimeError where it does not end."""
    moment = case.moment * seconds
    act = None if case.write is None else partial(kill_before, case.write)
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        pids = together(case, pictures, folder, world, act)
        codes = wait(pids) if act else wait(pids, lambda: spent(pids[0]) >= moment)  # noqa: B023
        if None in codes or -signal.SIGKILL in codes:
            break
        moment *= 0.9  # it had ended already
    where = place(folder / "out")
    for rank in case.victims:
        if codes[rank] is None:
            os.kill(pids[rank], signal.SIGKILL)
    left = [pid for pid, code in zip(pids, codes, strict=True) if code is None]
    # What lost its peer ends by itself in time, or, as a launcher would have it, is ended.
    for pid, code in zip(left, wait(left, after(5.0)), strict=True):
        if code is None:
            os.kill(pid, signal.SIGKILL)
            wait([pid])
    for _ in range(TRIES):
        if not any(wait(together(case, pictures, folder, world))):
            return where
    raise RuntimeError(f"does not go on after a kill while {where}: {(folder / 'told-0.txt').read_text()}")


def place(out: Path) -> str:
    """What a run was doing, from what lies in its folder."""
    if not (out / "training.json").exists():
        return "reading and encoding"
    if (out / "checkpoints" / ".in-the-making").exists():
        return "writing a checkpoint"
    done = (out / "checkpoints" / f"step-{STEPS:08d}").exists()
    return "writing the result" if done else "steps and validation"


# --- comparing


def difference(whole: Path, other: Path) -> str | None:
    """The first thing in which two results differ, or None."""
    names, found = (
        {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} for out in (whole, other)
    )
    if names != found:
        return f"{min(names ^ found)} is on one side only"
    return next((name for name in sorted(names) if not same(whole / name, other / name)), None)


def same(one: Path, other: Path) -> bool:
    if one.name.startswith("random_states") or one.name == "manifest.json":
        return True  # other libraries' random states, which nothing draws from, and the hashes of these
    if one.suffix == ".bin":
        return equal(*(torch.load(path, weights_only=True) for path in (one, other)))
    if one.suffix == ".safetensors":
        return equal(*map(content, (one, other)))
    if one.name == "log.jsonl":
        return lines(one) == lines(other)
    if one.name == "README.md":
        texts = ([line for line in path.read_text().splitlines() if "_per_" not in line] for path in (one, other))
        return next(texts) == next(texts)
    return one.read_bytes() == other.read_bytes()


def content(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """The metadata, which safetensors writes in any order, and the tensors."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}


def equal(one: Any, other: Any) -> bool:
    """Whether nested states are the same, tensors to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def lines(log: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in log.read_text().splitlines()]
    return [{name: value for name, value in line.items() if "_per_" not in name} for line in found]


# --- all of it


def wholes(options: argparse.Namespace) -> list[Case]:
    return [Case(task, seed) for task in options.tasks for seed in range(options.seeds)]


def left_alone(root: Path, world: int, case: Case) -> tuple[tuple[str, int], float]:
    """→ the run, and its seconds, which a benchmark that was itself stopped finds again."""
    folder = root / f"whole-{case.task}-{case.seed}"
    known = folder / "seconds.txt"
    if not known.exists():
        shutil.rmtree(folder, ignore_errors=True)
        known.write_text(str(whole_run(case, root / "pictures", folder, world)))
    return (case.task, case.seed), float(known.read_text())


def judge(root: Path, world: int, seconds: dict[tuple[str, int], float], case: Case) -> tuple[Case, str, str | None]:
    """→ the case, where it was killed, and how its end differs from that of the run left alone, if it does."""
    folder = root / f"{case.task}-{case.seed}-{case.moment}-{case.write}"
    try:
        where = killed_run(case, root / "pictures", folder, seconds[case.task, case.seed], world)
        fault = difference(root / f"whole-{case.task}-{case.seed}" / "out", folder / "out")
    except RuntimeError as error:
        return case, "", str(error)
    if fault is None:
        shutil.rmtree(folder)
    return case, where, fault


def count_writes(case: Case, root: Path) -> int:
    """How often a whole run changes files."""
    folder, tally = root / f"tally-{case.task}-{case.seed}", root / f"tally-{case.task}-{case.seed}.txt"
    mark = os.open(tally, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    wait(together(case, root / "pictures", folder, 1, lambda _: os.write(mark, b".")))
    return tally.stat().st_size


def cases(options: argparse.Namespace, root: Path) -> Iterator[Case]:
    victims = [(0,), (options.processes - 1,), tuple(range(options.processes))]
    for whole in wholes(options):
        if options.writes:
            yield from (replace(whole, write=n) for n in range(count_writes(whole, root)))
            continue
        lots = random.Random(f"{whole.task} {whole.seed} {options.processes}")
        for i in range(options.moments):
            yield replace(whole, moment=lots.random(), victims=victims[i % 3])


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    flags.add_argument("--seeds", type=int, default=2)
    flags.add_argument("--moments", type=int, default=20, help="kills for each task and seed")
    flags.add_argument("--processes", type=int, default=1, help="of one run")
    flags.add_argument("--writes", action="store_true", help="kill before each change of a file instead")
    flags.add_argument("--minutes", type=float, default=1e9, help="after which no further run is judged")
    flags.add_argument("--root", type=Path, help="folder of the runs, whose whole ones are used again")
    flags.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    options = flags.parse_args()
    torch.set_num_threads(1)  # a fork takes no threads along
    tasks.SAMPLE_STEPS = 4
    base()  # builds what all forks share
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    end = time.monotonic() + 60 * options.minutes
    root = options.root or Path(tempfile.mkdtemp(prefix="kill-resume-"))
    if not (root / "pictures").exists():
        draw_pictures(root / "pictures")
    tally: Counter[tuple[str, str]] = Counter()
    faults = []
    with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
        seconds = dict(pool.imap_unordered(partial(left_alone, root, options.processes), wholes(options)))
        asked = list(cases(options, root))
        random.Random(0).shuffle(asked)  # a part of them is then a fair part
        for case, where, fault in pool.imap_unordered(partial(judge, root, options.processes, seconds), asked):
            tally[case.task, "equal" if fault is None else "different"] += 1
            tally[case.task, where] += 1
            print(f"{tally.total() // 2} of {len(asked)}: {case.task}, killed while {where}", file=sys.stderr)
            faults += [] if fault is None else [f"{case}, killed while {where}: {fault}"]
            if time.monotonic() > end:
                break
    report(options, tally)
    if faults:
        raise SystemExit("\n".join([*faults, f"The folders of these runs are kept in {root}."]))
    shutil.rmtree(root, ignore_errors=True)  # runs that were not waited for may still write


PLACES = ("reading and encoding", "steps and validation", "writing a checkpoint", "writing the result")


def report(options: argparse.Namespace, tally: Counter[tuple[str, str]]) -> None:
    """A Markdown table."""
    print(f"| task | kills | equal | {' | '.join(PLACES)} |")
    print(f"|---|{'---:|' * (2 + len(PLACES))}")
    for task in options.tasks:
        kills = tally[task, "equal"] + tally[task, "different"]
        print(f"| {task} | {kills} | {tally[task, 'equal']} | {' | '.join(str(tally[task, p]) for p in PLACES)} |")


if __name__ == "__main__":
    main()
