"""The only loop: it takes any task through its steps on accelerate, and goes on with the same bits where it stopped.

Everything random is a function of seed, step and row (:mod:`~mahlstick.training.objective`), and so are the order of
the examples and the rate. A checkpoint is then weights, optimiser, average and the step's number.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import logging
import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from mahlstick.errors import MahlstickError
from mahlstick.training import optimisers
from mahlstick.training.cache import FeatureCache
from mahlstick.training.checkpoint import Checkpoints, making, write_whole
from mahlstick.training.config import TrainConfig
from mahlstick.training.data import Example, Plan
from mahlstick.training.objective import generator, strata
from mahlstick.training.tasks import SCORE, Features, Task

log = logging.getLogger(__name__)

PATIENCE = 3  # steps in a row without a finite gradient
PATIENCE_OF_A_SCALER = 20  # which finds its scale by leaving steps out
HELD_OUT = 256  # held-out examples at most over which the loss is taken
MOST_REPEATED = 0.2  # share of rows that fill up batches, above which it is worth a word
SAMPLES = 8  # held-out examples in a validation's picture grid
MOST_PRODUCTS = 1024  # positions of a latent up to which attention's whole matrix is small
LARGE = 2**30  # bytes of weights from which on memory is worth more than time
M_MMAP_THRESHOLD = -3  # malloc.h's name for the size from which a block is mapped on its own
AVERAGE, PROGRESS = "average.safetensors", "progress.json"


@dataclass
class Progress:
    """How far a run is: what a checkpoint keeps beside the tensors."""

    step: int = 0
    bad: int = 0
    skipped: int = 0
    losses: list[float] = field(default_factory=list)  # of the steps since the last line of the log


class Rows(torch.utils.data.Dataset[Features]):
    """This process's rows of each step: item ``step`` is its whole share of the global batch, all draws made."""

    def __init__(
        self, task: Task, cache: FeatureCache, digests: Sequence[str], plan: Plan, rank: int = 0, world: int = 1
    ) -> None:
        self.cache, self.digests, self.plan, self.rank, self.world = cache, digests, plan, rank, world
        self.draw, self.seed = task.draw, task.config.seed

    def __len__(self) -> int:
        return 2**31 - 1

    def __getitem__(self, step: int) -> Features:
        chosen = self.plan.batch_at(step)
        share = len(chosen) // self.world
        mine = range(self.rank * share, (self.rank + 1) * share)
        rows = [self.draw(self.cache[self.digests[chosen[i]]], generator(self.seed, step, i, "row")) for i in mine]
        return stacked(rows) | {"u": strata(self.seed, step, len(chosen))[mine.start : mine.stop]}


def stacked(rows: Sequence[Features]) -> Features:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class Loop:
    """One run of a task over cached examples."""

    def __init__(
        self,
        accelerator: Accelerator,
        task: Task,
        cache: FeatureCache,
        train: Sequence[Example],
        held_out: Sequence[Example],
    ) -> None:
        self.config = config = task.config
        self.accelerator = a = accelerator
        if task.size_of_weights > LARGE:
            give_back_freed_memory()
        check_processes(config, task, a)
        self.task, self.cache, self.held_out = task, cache, list(held_out)
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
        task.to_learn(a.device, self.dtype)
        if config.gradient_checkpointing:
            task.checkpoint_blocks()
        digests = [example.digest() for example in train]
        plan = Plan([task.alike(cache.shapes(digest)) for digest in digests], config.batch, config.seed)
        if plan.repeated > MOST_REPEATED:
            log.warning("%.0f%% of the rows repeat a picture, because few share its size; a smaller --batch or "
                        "--no-buckets avoids it", 100 * plan.repeated)  # fmt: skip
        self.rows = Rows(task, cache, digests, plan, a.process_index, a.num_processes)
        self.share = config.batch // a.num_processes
        self.micro = min(config.micro_batch or self.share, self.share)
        optimiser = optimisers.build(config, task.train())
        self.model, self.optimiser = a.prepare(task, optimiser)
        if config.optimiser == "schedule-free":
            self.optimiser.train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.average = optimisers.Average(self.parameters, config.ema) if config.ema else None
        self.progress = Progress()
        self.losses: list[Tensor] = []  # of this process, since the last line of the log
        self.scores: dict[int, float] = {}  # of the validations, by step
        self.out = Path(config.out)
        self.checkpoints = Checkpoints(self.out / "checkpoints", config.keep, a.is_main_process, a.wait_for_everyone)

    # ---- running

    def run(self) -> Path:
        """Take every step that is left, and write the result; returns its folder. Ctrl-C leaves a checkpoint."""
        self._start_log()
        try:
            self._learn()
        except KeyboardInterrupt:
            step = self.progress.step
            if self.accelerator.num_processes == 1 and step and step not in self.checkpoints.steps():
                self.save()  # of several processes none knows where the others stand
            raise
        return self.finish()

    def _learn(self) -> None:
        if self._validation_is_due():  # a kill came between this step's checkpoint and its validation
            self.validate()
        ahead = self._batches()
        config, progress = self.config, self.progress
        bar = tqdm(
            total=config.steps, initial=progress.step, desc=config.task, disable=not self.accelerator.is_main_process
        )
        began, seen = time.monotonic(), 0
        while progress.step < config.steps:
            batch = next(ahead)
            with finished_first():
                loss, norm = self.step(batch)
                self.losses.append(loss)
                seen += config.batch
                bar.update()
                step = progress.step
                if step % config.log_every == 0 or step == config.steps:
                    speed = seen / (time.monotonic() - began)
                    mean = float(self._shared_losses().nanmean())
                    self._log(loss=mean, norm=norm, rate=optimisers.rate(config, step - 1), pictures_per_second=speed)
                    bar.set_postfix_str(f"loss {mean:.4f}, {speed:.1f} pictures/s")
                    self.losses = []
            if step % config.checkpoint_every == 0 or step == config.steps:
                self.save()
            if self._validation_is_due():
                self.validate()
                began, seen = time.monotonic(), 0
        bar.close()

    def step(self, batch: Features) -> tuple[Tensor, float]:
        """One optimiser step; → the loss and the gradient's length before it was clipped. After an out-of-memory
        error the micro-batch is halved and the step taken again; a gradient that is not finite changes nothing."""
        config, progress, a = self.config, self.progress, self.accelerator
        torch.manual_seed(_fold(config.seed, progress.step, a.process_index))
        for group in self.optimiser.param_groups:
            group["lr"] = optimisers.rate(config, progress.step)
        batch = {name: value.to(a.device, non_blocking=True) for name, value in batch.items()}
        loss = self.gradients(batch)
        norm = float(a.clip_grad_norm_(self.parameters, config.clip_norm))
        finite = math.isfinite(norm)
        if finite or a.scaler is not None:  # a scaler leaves the step out by itself, and learns from it
            self.optimiser.step()
        if finite and not self.optimiser.step_was_skipped:
            progress.bad = 0
            self.task.stepped()
            if self.average is not None:
                self.average.update(progress.step)
        else:
            progress.bad += 1
            progress.skipped += 1
            log.warning("step %d: the gradient is not finite; the step is left out", progress.step)
        self.optimiser.zero_grad(set_to_none=True)
        progress.step += 1
        if progress.bad >= (PATIENCE if a.scaler is None else PATIENCE_OF_A_SCALER):
            self._give_up()
        return loss, norm

    def _give_up(self) -> NoReturn:
        last = self.checkpoints.newest()
        back = f"the last good checkpoint is {self.checkpoints.path(last)}" if last else "there is no checkpoint yet"
        best = self.out / "best"  # a run's own rate may not change, so that what it learned can be told
        way = f"give --start {best}" if best.is_dir() else "begin again"
        raise MahlstickError(
            f"step {self.progress.step}: {self.progress.bad} steps in a row without a finite gradient; {back}; "
            f"{way} in another --out, with a smaller --rate or --precision fp32"
        )

    def gradients(self, batch: Features) -> Tensor:
        """Gradients of the mean loss over this process's rows, micro-batch by micro-batch; → that loss."""
        while True:
            try:
                return self._accumulate(batch)
            except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or self.micro == 1 or self.task.whole_batch:
                    raise
                if self.accelerator.num_processes > 1:
                    raise MahlstickError(
                        f"out of memory with {self.micro} pictures at once; give --micro-batch {self.micro // 2}"
                    ) from error
            self.optimiser.zero_grad(set_to_none=True)
            self.micro = max(1, self.micro // 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            log.warning("out of memory: from here on %d pictures at once, gradients accumulated", self.micro)

    def _accumulate(self, batch: Features) -> Tensor:
        parts = list(zip(*(value.split(self.micro) for value in batch.values()), strict=True))
        total = torch.zeros((), device=self.accelerator.device)
        for i, values in enumerate(parts):
            last = i == len(parts) - 1
            alone: AbstractContextManager[Any] = nullcontext() if last else self.accelerator.no_sync(self.model)
            with alone:
                with self.accelerator.autocast(), self._attention(batch):
                    losses = self.model(dict(zip(batch, values, strict=True)))
                loss = losses.float().sum() / self.share
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _attention(self, batch: Features) -> AbstractContextManager[Any]:
        """Plain matrix products for the attention of small pictures in half precision on a CPU: the backward pass of
        torch's flash kernel there takes a fifth of a step of the embedded UNet (a profile of torch 2.15)."""
        latents = batch.get("latents")
        small = latents is None or latents.shape[-2:].numel() <= MOST_PRODUCTS
        if self.accelerator.device.type == "cpu" and self.dtype != torch.float32 and small:
            return sdpa_kernel(SDPBackend.MATH)
        return nullcontext()

    def _batches(self) -> Iterator[Features]:
        """The rows of this step and all that follow, read ahead by workers where the config has any."""
        steps = range(self.progress.step, self.config.steps)
        loader: Any = torch.utils.data.DataLoader(
            self.rows, batch_size=None, sampler=steps, num_workers=self.config.workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )  # fmt: skip
        return iter(loader)

    # ---- knowing

    def _validation_is_due(self) -> bool:
        every, step = self.config.validate_every, self.progress.step
        now = bool(every and step) and (step % every == 0 or step == self.config.steps)
        return now and bool(self.held_out) and step not in self.scores

    def validate(self) -> None:
        """Loss on held-out examples with draws that never change, the task's own figures, and a picture grid. The best
        so far is written to ``out/best``, before the log says so: a kill between the two has it made again."""
        step, score = self.progress.step, 0.0
        if self.accelerator.is_main_process:
            with self._learned(), torch.no_grad():
                figures = {"held_out_loss": self._held_out_loss()} | self._samples()
                score = figures.setdefault(SCORE, -figures["held_out_loss"])
                if score > max(self.scores.values(), default=-math.inf):
                    self._write_result(self.out / "best")
            self._log(**figures)
        self.scores[step] = score
        self.accelerator.wait_for_everyone()

    def _samples(self) -> dict[str, float]:
        """The task's own figures. A run does not end because its pictures could not be made."""
        self.task.to_encode(self.accelerator.device)
        try:
            figures, rows = self.task.sample(self.held_out[:SAMPLES])
        except Exception as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            log.warning("step %d: no samples (%s)", self.progress.step, reason)
            return {}
        finally:
            self.task.to_learn(self.accelerator.device, self.dtype)
        if rows:
            save_grid(rows, self.out / "samples" / f"step-{self.progress.step:08d}.png")
        return figures

    @contextmanager
    def _learned(self) -> Iterator[None]:
        """The weights inside are those that would be saved: the average, or the schedule-free optimiser's."""
        self.task.eval()
        free = self.config.optimiser == "schedule-free"
        average = self.average.applied() if self.average is not None else nullcontext()
        with optimisers.applied(self.optimiser.optimizer, self.parameters) if free else average:
            yield
        self.task.train()

    def _held_out_loss(self) -> float:
        """The mean over at most ``HELD_OUT`` rows, in batches of one size each."""
        by_bucket: dict[tuple[Any, ...], list[int]] = {}
        digests = [example.digest() for example in self.held_out[:HELD_OUT]]
        for i, digest in enumerate(digests):
            by_bucket.setdefault(self.task.alike(self.cache.shapes(digest)), []).append(i)
        most, losses = self.config.batch if self.task.whole_batch else self.micro, []
        for indices in by_bucket.values():
            for part in torch.tensor(indices).tensor_split(math.ceil(len(indices) / most)):
                rows = [self._held_out_row(i, digests) for i in part.tolist()]
                batch = {name: value.to(self.accelerator.device) for name, value in stacked(rows).items()}
                with self.accelerator.autocast():
                    losses.append(self.task(batch).float())
        return float(torch.cat(losses).mean())

    def _held_out_row(self, i: int, digests: Sequence[str]) -> Features:
        row = self.task.draw(self.cache[digests[i]], generator(self.config.seed, i, "held out"))
        return row | {"u": torch.tensor((i + 0.5) / len(digests))}

    # ---- keeping

    def save(self) -> None:
        """A checkpoint of this step."""
        if self.losses:
            self.losses = list(self._shared_losses())
        self.progress.losses = [float(loss) for loss in self.losses]
        self.checkpoints.write(self.progress.step, self._write_state)

    def _shared_losses(self) -> Tensor:
        """The mean over all processes, for each step since the last line of the log."""
        return self.accelerator.reduce(torch.stack(self.losses), "mean")

    def _write_state(self, folder: Path) -> None:
        from safetensors.torch import save_file

        self.accelerator.save_state(str(folder))
        if not self.accelerator.is_main_process:
            return
        if self.average is not None:
            save_file({k: v.contiguous() for k, v in self.average.state_dict().items()}, folder / AVERAGE)
        (folder / PROGRESS).write_text(json.dumps(asdict(self.progress) | {"micro": self.micro}))

    def resume(self) -> None:
        """Go back to the newest whole checkpoint, if there is one."""
        from safetensors.torch import load_file

        step = self.checkpoints.newest()
        if step is None:
            return
        folder = self.checkpoints.path(step)
        self.accelerator.load_state(str(folder))
        known = json.loads((folder / PROGRESS).read_text())
        micro = known.pop("micro")  # as an out-of-memory error may have left it, unless the config says otherwise
        self.micro = self.micro if self.config.micro_batch else min(self.micro, micro)
        self.progress = Progress(**known)
        self.losses = [torch.tensor(loss, device=self.accelerator.device) for loss in self.progress.losses]
        if self.average is not None:
            self.average.load_state_dict(load_file(folder / AVERAGE))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.checkpoints.tidy(step)
        log.info("goes on from step %d", step)

    def finish(self) -> Path:
        """Write the result, whole or not at all."""
        sharded = self.accelerator.distributed_type == DistributedType.FSDP
        state = self.accelerator.get_state_dict(self.model) if sharded else None  # all processes take part
        if self.accelerator.is_main_process:
            task = self.task if state is None else type(self.task)(self.config)
            if state is not None:
                task.load_state_dict(state)
            beside = self.out / ".result"
            with self._learned():
                self._write_result(beside, task)
            for path in sorted(beside.iterdir()):
                target = self.out / path.name
                if target.is_dir():
                    shutil.rmtree(target)
                path.replace(target)
            beside.rmdir()
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return self.out

    def _write_result(self, folder: Path, task: Task | None = None) -> None:
        """What was learned, in a folder that is there whole or not at all."""
        beside = folder.with_name(f".{folder.name}.new")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        with making(beside, self.checkpoints.told):
            (task or self.task).save(beside)
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)

    # ---- telling

    def _start_log(self) -> None:
        """Keep of an earlier log what happened before this step, and read the scores from it."""
        path = self.out / "log.jsonl"
        if self.accelerator.is_main_process:
            self.out.mkdir(parents=True, exist_ok=True)
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            kept = [line for line in lines if _step_of(line) <= self.progress.step]
            write_whole(path, "".join(f"{line}\n" for line in kept))
            if self.config.tracker != "none":
                self.accelerator.init_trackers("mahlstick", init_kwargs=self._tracker_options())
        self.accelerator.wait_for_everyone()
        told = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        self.scores = {line["step"]: line[SCORE] for line in told if SCORE in line}

    def _tracker_options(self) -> dict[str, dict[str, Any]]:
        """A run that goes on is the same run in the tracker, without what came after its checkpoint."""
        step, fields = self.progress.step, json.loads(self.config.to_json())
        resume = "allow" if step else "never"
        return {
            "tensorboard": {"purge_step": step + 1},
            "trackio": {"name": self.out.resolve().name, "resume": resume, "config": fields, "embed": False},
        }

    def _log(self, **values: float) -> None:
        if not self.accelerator.is_main_process:
            return
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            file.write(json.dumps({"step": self.progress.step, **finite}) + "\n")
        self.accelerator.log(values, step=self.progress.step)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line that a kill cut off
        return math.inf


def _fold(*key: int) -> int:
    """One seed from several numbers, for what draws from torch's own state (dropout)."""
    return int(torch.randint(2**62, (), generator=generator(*key, "torch")))


def new_accelerator(config: TrainConfig) -> Accelerator:
    """accelerate's view of this process, for one run: an earlier run's precision must not stick.

    Raises ``MahlstickError`` where the tracker's package is missing.
    """
    if config.tracker != "none" and importlib.util.find_spec(config.tracker) is None:
        raise MahlstickError(f"tracker: needs {config.tracker}; pip install {config.tracker}, or leave tracker out")
    AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        dynamo_backend="inductor" if config.compile else None,
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=config.out,
    )


@contextmanager
def finished_first() -> Iterator[None]:
    """A block that Ctrl-C does not break off: it takes effect when the block is done."""
    if threading.current_thread() is not threading.main_thread():  # where no signal arrives
        yield
        return
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: asked.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        signal.raise_signal(signal.SIGINT)


def give_back_freed_memory() -> None:
    """Have glibc return large blocks to the system as soon as they are freed. Small nets would be slower by a tenth.

    It does so at first, but raises the size from which it does up to 32 MiB as such blocks come and go. Activations
    then come from a heap full of holes, and the process holds memory that nothing uses.
    """
    with suppress(OSError, AttributeError):  # another system, another allocator
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 4 * 2**20)


def check_processes(config: TrainConfig, task: Task, accelerator: Accelerator) -> None:
    """Raise ``MahlstickError`` where the config does not go with the number or kind of processes."""
    if config.batch % accelerator.num_processes:
        raise MahlstickError(
            f"batch: {config.batch} pictures do not divide among {accelerator.num_processes} processes"
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise MahlstickError(
            "DeepSpeed takes its step inside of backward, where nothing can be checked or taken back; train with DDP "
            "or FSDP2, see docs/distributed"
        )
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if sharded and config.ema:
        raise MahlstickError("ema: is not kept under FSDP; leave it out, or train with DDP")
    if sharded and config.validate_every:
        raise MahlstickError("validate_every: one process alone cannot run a sharded model; give 0, or train with DDP")
    if sharded and config.optimiser == "muon":
        raise MahlstickError(
            "optimiser: muon needs whole matrices, and FSDP cuts them up; take adamw, or train with DDP"
        )
    if sharded and config.task == "lora":
        raise MahlstickError("lora: its few weights lie inside of the UNet and are not sharded; train with DDP")
    if task.whole_batch and config.micro_batch not in (None, config.batch // accelerator.num_processes):
        raise MahlstickError(f"micro_batch: {config.task} compares all pictures of a batch; leave micro_batch out")


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception is a device's or the machine's lack of memory."""
    words = str(error).lower()
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in words or "can't allocate" in words
    )


def save_grid(rows: Sequence[Sequence[Image.Image]], path: Path) -> None:
    """Rows of pictures of any sizes as one PNG."""
    width, height = (max(getattr(p, side) for row in rows for p in row) for side in ("width", "height"))
    sheet = Image.new("RGB", (width * max(map(len, rows)), height * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * width, y * height))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
