"""Ends ``mahlstick caption`` with SIGKILL at random moments, gives it again, and compares it with a run left alone.

``python -m benchmarks.caption_resume --data FOLDER --model CAPTIONER --filter CLIP`` captions and filters 1,000 of the
folder's pictures that way. Nothing is lost: ``metadata.jsonl`` has the bytes of the run left alone. Nothing is
repeated: the journal has each picture's captions and each picture's scores once. A moment is measured in the process's
own processor time, which other work on the machine does not stretch.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

from benchmarks.kill_resume import spent
from mahlstick.training.captions.run import CaptionConfig, caption
from mahlstick.training.data import read_dataset


def gather(data: Path, folder: Path, count: int) -> None:
    """Copies of the first pictures, without their captions."""
    folder.mkdir(parents=True)
    for i, example in enumerate(read_dataset(data)[:count]):
        (folder / f"{i:05d}{Path(example.name).suffix}").write_bytes(example.picture.read())


def start(config: CaptionConfig, told: Path) -> int:
    """The command in a fork, which costs no import; → its id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        log = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        caption(config, device="cpu", progress=False)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid: int, seconds: float = float("inf")) -> bool:
    """Whether it came to its end before it had so much of the processor; killed where it did not."""
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            if code := os.waitstatus_to_exitcode(status):
                raise RuntimeError(f"the command failed with {code}")
            return True
        if spent(pid) >= seconds:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return False
        time.sleep(0.02)


def journal(folder: Path) -> list[tuple[str, str]]:
    """(key, picture) of each whole line."""
    found = []
    for line in (folder / ".captions.jsonl").read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # cut off by a kill
            continue
        found.append((row["key"], row["picture"]))
    return found


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--data", type=Path, required=True, help="a folder of pictures")
    flags.add_argument("--model", default="embedded", help="a captioner")
    flags.add_argument("--filter", default="embedded", help="a CLIP")
    flags.add_argument("--count", type=int, default=1000)
    flags.add_argument("--captions", type=int, default=2)
    flags.add_argument("--batch", type=int, default=8)
    flags.add_argument("--seconds", type=float, default=8.0, help="of the processor until a kill, at most")
    flags.add_argument("--root", type=Path, help="folder of the runs")
    options = flags.parse_args()
    torch.set_num_threads(1)  # a fork takes no threads along
    root = options.root or Path(tempfile.mkdtemp(prefix="caption-resume-"))
    folders = {name: root / name for name in ("alone", "killed")}
    gather(options.data, folders["alone"], options.count)
    shutil.copytree(folders["alone"], folders["killed"])
    lots, kills = random.Random(0), 0
    for name, folder in folders.items():
        config = CaptionConfig(data=str(folder), model=options.model, captions=options.captions, filter=options.filter,
                               quantile=0.2, batch=options.batch, report=str(root / f"report-{name}"))  # fmt: skip
        while not ended(
            start(config, root / f"{name}.txt"), float("inf") if name == "alone" else lots.uniform(0, options.seconds)
        ):
            kills += 1
    same = len({(folder / "metadata.jsonl").read_bytes() for folder in folders.values()}) == 1
    lines, wanted = journal(folders["killed"]), journal(folders["alone"])
    again = sum(count - 1 for count in Counter(lines).values())
    lost = len({*wanted} - {*lines})
    print("| pictures | kills | same metadata.jsonl | lines of the journal | lost | repeated |")
    print("|---:|---:|---|---:|---:|---:|")
    print(f"| {options.count} | {kills} | {'yes' if same else 'no'} | {len(lines)} | {lost} | {again} |")
    if not same or lost or again:
        raise SystemExit(f"The folders are kept in {root}.")
    shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
