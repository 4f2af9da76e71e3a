"""Killed or out of room at any moment, a run ends with the bits of one that was left alone.

The thorough version is ``python -m benchmarks.kill_resume``, whose figures are in docs/resume.md.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import mahlstick as ms
from benchmarks import kill_resume
from benchmarks.kill_resume import Case
from mahlstick.training.cache import FeatureCache
from mahlstick.training.checkpoint import Checkpoints
from mahlstick.training.config import TrainConfig
from mahlstick.training.data import read_dataset
from mahlstick.training.loop import Loop, new_accelerator
from mahlstick.training.run import train
from mahlstick.training.tasks import TASKS

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kill -9 is of Unix")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "pictures"
    kill_resume.draw_pictures(folder)
    return folder


def base() -> Any:
    """A tiny base of one's own: training changes it."""
    return copy.deepcopy(kill_resume.base())


def settings(task: str, pictures: Path, out: Path, **fields: Any) -> TrainConfig:
    known = json.loads(kill_resume.config(Case(task, 0), pictures).to_json())
    few = {"steps": 4, "held_out": 0.0, "validate_every": 0, "out": str(out), "cache": str(out.parent / "cache")}
    return TrainConfig(**known | few | fields)


def ready(task: str, pictures: Path, out: Path, **fields: Any) -> Loop:
    """A run that is ready to take its first step."""
    wanted = settings(task, pictures, out, **fields)
    examples = read_dataset(pictures)
    torch.manual_seed(0)
    learning = TASKS[task](wanted, base())
    cache = FeatureCache(wanted.cache_folder, learning.settings())
    cache.fill(examples, learning.encode, progress=False)
    return Loop(new_accelerator(wanted), learning, cache, examples, [])


# --- killed


def test_killed_at_random_moments() -> None:
    """In a process of its own, which forks: the threads of other tests do not survive a fork."""
    words = "--tasks vae lora --seeds 1 --moments 2 --jobs 1".split()
    run = subprocess.run([sys.executable, "-m", "benchmarks.kill_resume", *words], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "| vae | 2 | 2 |" in run.stdout and "| lora | 2 | 2 |" in run.stdout


def test_the_log_is_the_same_where_its_lines_fall_between_checkpoints(pictures: Path, tmp_path: Path) -> None:
    fields = {"log_every": 3, "checkpoint_every": 2}
    whole = train(settings("vae", pictures, tmp_path / "whole", **fields), base())
    loop = ready("vae", pictures, tmp_path / "parts", **fields)
    for step in range(2):
        loop.losses.append(loop.step(loop.rows[step])[0])
    loop.save()
    parts = train(settings("vae", pictures, tmp_path / "parts", **fields), base())
    assert kill_resume.lines(parts / "log.jsonl") == kill_resume.lines(whole / "log.jsonl")


def test_a_log_is_never_half_written(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = train(settings("vae", pictures, tmp_path / "out", log_every=1), base())
    before = (out / "log.jsonl").read_text()

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        train(settings("vae", pictures, tmp_path / "out", log_every=1), base())
    assert (out / "log.jsonl").read_text() == before


def test_what_kills_left_among_the_checkpoints_is_removed(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (1, 2):
        checkpoints.write(step, lambda folder: (folder / "a").write_text("x") and None)
    for left in (".in-the-making", "step-00000001"):  # being written; being removed, its manifest already gone
        (tmp_path / left).mkdir()
        (tmp_path / left / "a").write_text("x")
    checkpoints.tidy()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


# --- out of room


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file grows beyond ``size`` bytes: a real lack of room, in this process and for any user."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes file systems of so many KiB, where mounting is allowed."""
    mounted = []

    def make(kibibytes: int) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", folder], capture_output=True
        )
        if done.returncode:
            pytest.skip("mounting a small file system needs root")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
def test_the_disk_fills_up_in_a_checkpoint(
    share: float, pictures: Path, tmp_path: Path, small_disk: Callable[[int], Path]
) -> None:
    """Early, late and at the end: the checkpoint before survives."""
    loop = ready("vae", pictures, tmp_path / "out")
    loop.step(loop.rows[0])
    loop.save()
    needed = size(loop.out / "checkpoints")
    disk = small_disk(int(needed * (1 + share)) // 1024 + 24)
    loop.checkpoints.folder = disk / "checkpoints"
    loop.save()
    loop.step(loop.rows[1])
    with pytest.raises(ms.MahlstickError, match=r"the disk is full, and the checkpoint of step 1 is whole; make room"):
        loop.save()
    assert loop.checkpoints.newest() == 1
    assert [path.name for path in loop.checkpoints.folder.iterdir()] == ["step-00000001"]


def test_a_file_too_big_for_the_disk_leaves_the_checkpoint_before(pictures: Path, tmp_path: Path) -> None:
    loop = ready("vae", pictures, tmp_path / "out")
    loop.step(loop.rows[0])
    loop.save()
    biggest = max(path.stat().st_size for path in loop.checkpoints.path(1).iterdir())
    loop.step(loop.rows[1])
    for limit in (1000, biggest // 2, biggest - 100):
        with (
            small_files(limit),
            pytest.raises(ms.MahlstickError, match="the disk is full, and the checkpoint of step 1"),
        ):
            loop.save()
        assert loop.checkpoints.newest() == 1
        assert [path.name for path in loop.checkpoints.folder.iterdir()] == ["step-00000001"]
    loop.save()
    assert loop.checkpoints.newest() == 2


def test_the_disk_fills_up_in_the_result(pictures: Path, tmp_path: Path) -> None:
    """The result of before stays, and the same command with room ends as it would have."""
    whole = train(settings("vae", pictures, tmp_path / "whole"), base())
    loop = ready("vae", pictures, tmp_path / "out")
    result = loop.out / "diffusion_pytorch_model.safetensors"
    loop.save()
    result.write_text("of before")
    with small_files(1000), pytest.raises(ms.MahlstickError, match="the disk is full, and the checkpoint of step 0"):
        loop.finish()
    assert result.read_text() == "of before" and not (loop.out / ".result").exists()
    train(settings("vae", pictures, tmp_path / "out"), base())
    assert result.read_bytes() == (whole / result.name).read_bytes()


def test_the_disk_fills_up_in_the_cache(pictures: Path, tmp_path: Path) -> None:
    wanted = settings("vae", pictures, tmp_path / "out")
    with small_files(1000), pytest.raises(ms.MahlstickError, match="the disk is full: the cache"):
        train(wanted, base())
    assert not list(wanted.cache_folder.rglob("*.tmp")) and not list(wanted.cache_folder.rglob("features*"))
    train(wanted, base())


# --- trackers


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio"])
def test_a_missing_tracker_is_one_sentence(
    tracker: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == tracker else real(name, *more))
    with pytest.raises(ms.MahlstickError, match=f"tracker: needs {tracker}; pip install {tracker}, or leave"):
        train(settings("vae", pictures, tmp_path / "out", tracker=tracker), base())
    assert not (tmp_path / "out").exists()


def in_two_parts(tracker: str, pictures: Path, out: Path) -> Path:
    """Stopped after the third step, whose log is not in a checkpoint, and gone on with."""
    loop = ready("vae", pictures, out, tracker=tracker, log_every=1)
    loop._start_log()
    for step in range(3):
        loop.losses = [loop.step(loop.rows[step])[0]]
        loop._log(loss=float(loop.losses[0]))
        if step == 1:
            loop.save()
    loop.accelerator.end_training()
    train(settings("vae", pictures, out, tracker=tracker, log_every=1), base())
    assert [line["step"] for line in kill_resume.lines(out / "log.jsonl")] == [1, 2, 3, 4]
    return out


@pytest.mark.skipif(not has("tensorboard"), reason="tensorboard is not installed")
def test_tensorboard_has_each_step_once(pictures: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = in_two_parts("tensorboard", pictures, tmp_path / "out")
    events = EventAccumulator(str(out / "mahlstick")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert all(path.is_file() for path in (out / "mahlstick").iterdir())


@pytest.mark.skipif(not has("trackio"), reason="trackio is not installed")
def test_trackio_has_one_run(pictures: Path, tmp_path: Path) -> None:
    os.environ["TRACKIO_DIR"] = str(tmp_path)  # read once, when it is imported
    import trackio

    in_two_parts("trackio", pictures, tmp_path / "out")
    runs = trackio.Api().runs("mahlstick")
    assert [run.name for run in runs] == ["out"]


# --- a LoRA of the text encoder


def test_a_lora_of_the_text_encoder_loads_in_diffusers(pictures: Path, tmp_path: Path) -> None:
    wanted = settings("lora", pictures, tmp_path / "out", steps=12, rate=0.05, train_text=True, ema=0.0)
    learned = base()
    out = train(wanted, learned)
    theirs, ids = base(), torch.arange(8)[None]
    with torch.no_grad():
        plain = theirs.text_encoder(ids)[0]
        theirs.load_lora_weights(out)
        changed = theirs.text_encoder(ids)[0]
        ours = learned.text_encoder.to("cpu")(ids)[0]
    assert (changed - plain).abs().max() > 1e-3
    torch.testing.assert_close(changed, ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_text_encoded_in_the_step_is_the_pipelines(family: str, pictures: Path, tmp_path: Path) -> None:
    """Before it has learned, the loss is that of cached text, and so are the empty caption's features."""
    from diffusers import StableDiffusionXLPipeline

    from benchmarks import tiny

    pipe = {
        "sd1": base,
        "sdxl": lambda: StableDiffusionXLPipeline(**copy.deepcopy(tiny.components("sdxl"))),
    }
    examples, losses = read_dataset(pictures)[:2], []
    for train_text in (False, True):
        task = TASKS["lora"](settings("lora", pictures, tmp_path, train_text=train_text), pipe[family]())
        task.to_learn(torch.device("cpu"), torch.float32)
        rows = [task.draw(row, torch.Generator().manual_seed(0)) for row in task.encode(examples)]
        rows[1] |= task.empty
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]} | {"u": torch.tensor([0.3, 0.7])}
        losses.append(task(batch))
    torch.testing.assert_close(losses[0], losses[1])
    losses[1].sum().backward()
    assert all(p.grad is not None for p in task.parameters())
    assert any(p.grad.any() for name, p in task.lora.named_parameters() if name.startswith("text_encoder"))
