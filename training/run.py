"""From a config to a trained adapter: read, split, encode, estimate, learn, and say what was done."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from mahlstick.errors import MahlstickError
from mahlstick.training.cache import FeatureCache
from mahlstick.training.checkpoint import write_whole
from mahlstick.training.config import TrainConfig
from mahlstick.training.data import Example, repeated, split
from mahlstick.training.loop import Loop, new_accelerator, out_of_memory
from mahlstick.training.tasks import TASKS, Task, task_of

NO_MEMORY = (
    "out of memory; try a smaller --micro-batch, --gradient-checkpointing, --precision bf16, a smaller --resolution, "
    "or --optimiser adamw8bit"
)

log = logging.getLogger(__name__)

CONFIG = "training.json"
PACKAGES = ("mahlstick", "torch", "diffusers", "transformers", "accelerate", "safetensors", "peft")
# Fields that a run may change when it goes on: none of them changes what an earlier step did. (Folders may have moved;
# what is in them may not have changed.)
FREE = {"data", "control", "reference", "out", "cache", "steps", "micro_batch", "workers", "keep", "checkpoint_every",
        "validate_every", "log_every", "tracker"}  # fmt: skip


def train(config: TrainConfig, pipe: Any = None) -> Path:
    """Train what ``config`` says, going on where an earlier run of it stopped; returns the result's folder.

    ``pipe`` serves instead of the base that the config names. Raises ``MahlstickError`` for bad data or settings,
    before anything is learned.
    """
    examples = TASKS[config.task].read(config)
    learned, held_out = split(examples, config.held_out, config.seed)
    rows = repeated(learned)
    check_folder(config, rows)
    torch.manual_seed(config.seed)  # fresh layers start from random weights
    task = task_of(config)(config, pipe)
    unet = task.frozen_unet()
    check_unet(config, unet)
    accelerator = new_accelerator(config)
    rank, world = accelerator.process_index, accelerator.num_processes
    cache = FeatureCache(config.cache_folder, task.settings())
    task.to_encode(accelerator.device)
    cache.fill(examples, task.encode, rank=rank, world=world, progress=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    cache.refresh()
    loop = Loop(accelerator, task, cache, cache.select(rows), cache.select(held_out))
    if loop.accelerator.is_main_process:
        write_config(config, rows, unet)
    loop.resume()
    if loop.progress.step < config.steps:
        log.info("%s", estimate(loop))
    try:
        out = loop.run()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise MahlstickError(
            f"step {loop.progress.step}: {NO_MEMORY}; the command goes on from the last checkpoint"
        ) from error
    if loop.accelerator.is_main_process:
        skipped = len(examples) - len(cache.select(examples))
        write_whole(out / "README.md", card(config, task, len(learned), len(held_out), skipped, loop))
    return out


def data_fingerprint(examples: Sequence[Example]) -> str:
    """What can be read of a dataset, as a short text."""
    digests = []
    for example in examples:
        with suppress(MahlstickError):  # reported and skipped where it is encoded
            digests.append(example.digest())
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]


def facts(config: TrainConfig, examples: Sequence[Example]) -> dict[str, Any]:
    return {"config": json.loads(config.to_json()), "data": data_fingerprint(examples)}


def check_folder(config: TrainConfig, examples: Sequence[Example]) -> None:
    """Raise ``MahlstickError`` where ``out`` holds the run of another config or other data."""
    path = Path(config.out) / CONFIG
    if not path.exists():
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        was, now = before["config"], facts(config, examples)
        free = FREE if config.schedule == "constant" else FREE - {"steps"}  # on which the rates of earlier steps depend
        # A field that this version has and that one had not was as it is by default.
        was = {name: field.get_default() for name, field in TrainConfig.model_fields.items()} | was
        changed = [name for name, value in now["config"].items() if name not in free and was[name] != value]
    except (ValueError, KeyError, TypeError) as error:
        raise MahlstickError(f"{path}: is damaged ({error}); give another --out, or remove the folder") from error
    if changed:
        name = changed[0]
        raise MahlstickError(
            f"out: {config.out} holds a run with {name} = {was[name]!r}, not {now['config'][name]!r}; "
            "give the same settings to go on with it, or another --out"
        )
    if before["data"] != now["data"]:
        raise MahlstickError(
            f"out: {config.out} holds a run on other data than {config.data} now is; give another --out"
        )


def check_unet(config: TrainConfig, unet: str | None) -> None:
    """Raise ``MahlstickError`` where ``out`` holds a run on another UNet: a base's folder may have got another one."""
    path = Path(config.out) / CONFIG
    if path.exists() and unet != (was := json.loads(path.read_text(encoding="utf-8")).get("unet")) and was is not None:
        raise MahlstickError(
            f"out: {config.out} holds a run on another UNet than {config.base} now has; give another --out"
        )


def write_config(config: TrainConfig, examples: Sequence[Example], unet: str | None) -> None:
    """The resolved config, the data's and the frozen UNet's fingerprints and the versions, beside the result."""
    known = {package: version(package) for package in PACKAGES}
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / CONFIG, json.dumps(facts(config, examples) | {"unet": unet, "versions": known}, indent=1))


def estimate(loop: Loop) -> str:
    """Time and memory of the run, from one step that is taken back; micro-batches that do not fit are halved first.

    Raises ``MahlstickError`` where not even one picture at a time fits.
    """
    device = loop.accelerator.device
    batch = {name: value.to(device) for name, value in loop.rows[loop.progress.step].items()}
    try:
        loop.gradients(batch)  # the first step pays for warming up
        began = time.monotonic()
        loop.gradients(batch)
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise MahlstickError(f"with {loop.micro} pictures at once: {NO_MEMORY}") from error
    finally:
        loop.optimiser.zero_grad(set_to_none=True)
    seconds = (time.monotonic() - began) * (loop.config.steps - loop.progress.step)
    states = 2 * sum(p.numel() * p.element_size() for p in loop.parameters)
    if device.type == "cuda":
        used, there = (
            torch.cuda.max_memory_allocated(device) + states,
            torch.cuda.get_device_properties(device).total_memory,
        )
    else:
        used, there = psutil.Process().memory_info().rss + states, psutil.virtual_memory().total
    weights = states // 2
    kept = (loop.config.keep + 1) * 3 * weights
    free = shutil.disk_usage(loop.out if loop.out.exists() else loop.out.parent).free
    told = (
        f"about {_minutes(seconds)} for {loop.config.steps - loop.progress.step} steps; "
        f"memory {used / 2**30:.1f} of {there / 2**30:.0f} GiB; "
        f"checkpoints {kept / 2**30:.2f} of {free / 2**30:.0f} GiB"
    )
    if used > there:
        told += "; it will hardly fit: try --gradient-checkpointing, a smaller --micro-batch or --optimiser adamw8bit"
    if kept > free:
        told += "; the disk is too small: give a smaller --keep, or another --out"
    return told


def _minutes(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{max(1, round(seconds / 60))} minutes"


def _best(scores: dict[int, float]) -> str:
    if not scores:
        return ""
    step = max(scores, key=lambda known: scores[known])
    return f"`best/` holds the weights of step {step}, which scored highest of {len(scores)} validations.\n\n"


def card(config: TrainConfig, task: Task, learned: int, held_out: int, skipped: int, loop: Loop) -> str:
    """The result's README.md: what was learned, from what, how, and how well."""
    lines = (loop.out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    last: dict[str, float] = {}
    for line in lines:
        last |= json.loads(line)
    figures = "\n".join(
        f"| {name} | {value:.4g} |" for name, value in sorted(last.items()) if name != "step" and value is not None
    )
    count = sum(p.numel() for p in task.parameters() if p.requires_grad)
    settings = json.dumps(json.loads(config.to_json()), indent=1)
    return f"""# {Path(config.out).name}

A {config.task} for `{config.base}`, {count / 1e6:.2f} M parameters, trained with mahlstick on {learned} {task.kind}
({held_out} held out, {skipped} could not be read) for {loop.progress.step} steps of {config.batch};
{loop.progress.skipped} steps were left out because a gradient was not finite.

| last measured | |
|---|---|
{figures}

{_best(loop.scores)}
Say here where the {task.kind} came from and under which licence the weights may be used.

```json
{settings}
```
"""
