"""Training a ControlNet here and as diffusers' ``examples/controlnet/train_controlnet.py`` does it, side by side:
``python -m benchmarks.train_throughput [tiny] [sd15] [--resolution N] [--batch N] [--steps N] [--repeats N]``.

The peer is that script's loop in its published settings, written down anew: once as it stands, once with its
``--set_grads_to_none``, which takes less memory. All learn from the same files on the same random base in the same
precision, each in a fresh process. The tiny ones take their steps by turns; of SD 1.5 one is in memory at a time, and
the repeats go by turns. The table goes to docs/throughput.md when no shape and no size is chosen.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from PIL import Image, ImageDraw
from torchvision import transforms

from benchmarks import full_size, tiny
from mahlstick.training.cache import FeatureCache
from mahlstick.training.config import TrainConfig
from mahlstick.training.data import read_dataset
from mahlstick.training.loop import Loop, new_accelerator
from mahlstick.training.tasks import ControlNetTask

ROOT = Path(__file__).resolve().parents[1]
EPOCHS = 10  # over which the table spreads the cost of the cache
PUBLISHED: dict[str, Any] = {"rate": 5e-6, "weight_decay": 1e-2, "clip_norm": 1.0, "warmup": 0, "text_dropout": 0.0}


@dataclass(frozen=True)
class Shape:
    """A base, and how much of it is run. The first ``warm`` of the ``steps`` are not counted."""

    name: str
    parts: str
    widths: tuple[int, ...]  # of the ControlNet's hint encoder
    resolution: int
    batch: int
    steps: int
    warm: int
    by_turns: bool  # whether the contenders are in memory together


def sd15() -> dict[str, Any]:
    """Stable Diffusion 1.5's shapes with random weights: 860, 84 and 123 million of them."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    text = transformers.CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        bos_token_id=512, eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
    return tiny.components("sd1") | {
        "unet": full_size.random_unet("sd15", torch.float32),
        "vae": vae.eval(),
        "text_encoder": transformers.CLIPTextModel(text).eval(),
        "image_encoder": None,
        "feature_extractor": None,
    }


PARTS: dict[str, Callable[[], dict[str, Any]]] = {"tiny": partial(tiny.components, "sd1"), "sd15": sd15}

SHAPES = {
    "tiny": Shape("tiny", "tiny", (16, 32, 96, 256), tiny.SIZE, 4, 40, 5, True),
    "sd15": Shape("SD 1.5", "sd15", (16, 32, 96, 256), 256, 4, 3, 1, False),
}


def write_pictures(folder: Path, size: int, count: int) -> None:
    """Discs with captions, and their outlines as control pictures."""
    (folder / "control").mkdir(parents=True)
    for i in range(count):
        box = (i % 7 * size // 16, i % 5 * size // 16, size // 2 + i % 7 * size // 16, size // 2 + i % 5 * size // 16)
        picture, control = Image.new("RGB", (size, size), "white"), Image.new("RGB", (size, size))
        ImageDraw.Draw(picture).ellipse(box, fill=(i * 37 % 256, i * 91 % 256, i * 53 % 256))
        ImageDraw.Draw(control).ellipse(box, outline="white")
        picture.save(folder / f"{i:03}.png")
        control.save(folder / "control" / f"{i:03}.png")
        (folder / f"{i:03}.txt").write_text(f"disc number {i} on white\n")


# The two contenders. Each yields the seconds of a step, and before the first one those that a picture took to encode.


class Folder(torch.utils.data.Dataset[dict[str, Any]]):
    """The peer's examples: decoded, sized and tokenised whenever they are asked for."""

    def __init__(self, folder: Path, resolution: int, tokenizer: Any) -> None:
        self.files, self.tokenizer = sorted(folder.glob("*.png")), tokenizer
        self.to_size = transforms.Compose(
            [transforms.Resize(resolution), transforms.CenterCrop(resolution), transforms.ToTensor()]
        )
        self.to_range = transforms.Normalize([0.5], [0.5])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file = self.files[index]
        words = self.tokenizer(
            file.with_suffix(".txt").read_text().strip(), max_length=self.tokenizer.model_max_length,
            padding="max_length", truncation=True, return_tensors="pt",
        )  # fmt: skip
        return {
            "pixels": self.to_range(self.to_size(Image.open(file).convert("RGB"))),
            "control": self.to_size(Image.open(file.parent / "control" / file.name).convert("RGB")),
            "words": words.input_ids[0],
        }


def peer(shape: Shape, data: Path, out: Path, precision: str, set_to_none: bool = False) -> Iterator[float]:
    accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision)
    parts = PARTS[shape.parts]()
    vae, text_encoder, unet = (parts[name].requires_grad_(False) for name in ("vae", "text_encoder", "unet"))
    noises = diffusers.DDPMScheduler.from_config(parts["scheduler"].config)
    net = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=shape.widths).train()
    optimiser = torch.optim.AdamW(net.parameters(), lr=5e-6, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    rates = get_scheduler("constant", optimiser)
    examples = Folder(data, shape.resolution, parts["tokenizer"])
    loader = torch.utils.data.DataLoader(examples, batch_size=shape.batch, shuffle=True)
    net, optimiser, loader, rates = accelerator.prepare(net, optimiser, loader, rates)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for module in (vae, text_encoder, unet):
        module.to(accelerator.device, dtype)

    def step(batch: dict[str, torch.Tensor]) -> float:
        with accelerator.accumulate(net):
            z = vae.encode(batch["pixels"].to(dtype)).latent_dist.sample() * vae.config.scaling_factor
            noise = torch.randn_like(z)
            t = torch.randint(0, noises.config.num_train_timesteps, (len(z),), device=z.device)
            noised = noises.add_noise(z, noise, t)
            text = text_encoder(batch["words"])[0]
            down, mid = net(noised, t, text, controlnet_cond=batch["control"].to(dtype), return_dict=False)
            residuals = {
                "down_block_additional_residuals": [residual.to(dtype) for residual in down],
                "mid_block_additional_residual": mid.to(dtype),
            }
            loss = F.mse_loss(unet(noised, t, text, **residuals).sample.float(), noise.float())
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
            rates.step()
            optimiser.zero_grad(set_to_none=set_to_none)
        return loss.item()

    yield 0.0
    batches = (batch for _ in iter(int, 1) for batch in loader)
    while True:
        began = time.perf_counter()
        step(next(batches))
        yield time.perf_counter() - began


def ours(shape: Shape, data: Path, out: Path, precision: str) -> Iterator[float]:
    config = TrainConfig(
        task="controlnet", data=str(data), out=str(out), resolution=shape.resolution, batch=shape.batch,
        precision=precision, held_out=0.0, **PUBLISHED,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(**PARTS[shape.parts]())
    task = ControlNetTask(config, tiny.quiet(pipe))
    accelerator, examples = new_accelerator(config), read_dataset(data)
    cache = FeatureCache(config.cache_folder, task.settings())
    task.to_encode(accelerator.device)
    began = time.perf_counter()
    cache.fill(examples, task.encode, progress=False)
    yield (time.perf_counter() - began) / len(examples)
    loop = Loop(accelerator, task, cache, examples, [])
    while True:
        began = time.perf_counter()
        loop.step(loop.rows[loop.progress.step])
        yield time.perf_counter() - began


CONTENDERS = {"mahlstick": ours, "diffusers": peer, "diffusers, lean": partial(peer, set_to_none=True)}


# Measuring -----------------------------------------------------------------------------------------------------------


def peak_memory() -> int:
    """Bytes: the most that CUDA's allocator or, without CUDA, this process ever held."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def serve(name: str, shape: Shape, data: str, out: str, precision: str) -> None:
    """One contender in this process: takes a step for each line that comes in, and tells what it took."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    libraries = peak_memory()
    run = CONTENDERS[name](shape, Path(data), Path(out), precision)
    for _ in sys.stdin:
        before = time.process_time()
        wall = next(run)
        told = {"wall": wall, "cpu": time.process_time() - before, "peak": peak_memory(), "libraries": libraries}
        print(json.dumps(told), flush=True)


@contextmanager
def served(name: str, shape: Shape, data: Path, precision: str) -> Iterator[Callable[[], dict[str, float]]]:
    """A contender in a fresh process, as a function that has it take a step."""
    with tempfile.TemporaryDirectory() as out:
        told = json.dumps([name, asdict(shape), str(data), out, precision])
        command = [sys.executable, "-m", "benchmarks.train_throughput", "--serve", told]
        alone = os.environ | {"OMP_NUM_THREADS": "1"}  # two threads on busy cores wait for each other
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=alone)
        assert child.stdin is not None and child.stdout is not None

        def step() -> dict[str, float]:
            child.stdin.write("\n")
            child.stdin.flush()
            return json.loads(child.stdout.readline())

        try:
            yield step
        finally:
            child.stdin.close()
            child.wait()


def compare(shape: Shape, repeats: int, precision: str) -> dict[str, list[dict[str, float]]]:
    """For each contender a record of each repeat: seconds a picture by the clock and the processor, and memory."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        write_pictures(data, shape.resolution, 4 * shape.batch)
        together = [list(CONTENDERS)] if shape.by_turns else [[name] for name in CONTENDERS]
        for _, names in product(range(repeats), together):
            with ExitStack() as stack:
                steps = {name: stack.enter_context(served(name, shape, data, precision)) for name in names}
                taken = {name: [step()] for name, step in steps.items()}  # builds, and encodes
                for _, (name, step) in product(range(shape.steps), steps.items()):
                    taken[name].append(step())
            for name in names:
                found[name].append(record(taken[name], shape))
                print(name, found[name][-1], flush=True)
    return found


def record(taken: list[dict[str, float]], shape: Shape) -> dict[str, float]:
    first, counted = taken[0], taken[1 + shape.warm :]
    seconds = {clock: median(step[clock] for step in counted) / shape.batch for clock in ("wall", "cpu")}
    return seconds | {"encode": first["wall"], "peak": taken[-1]["peak"], "libraries": first["libraries"]}


def rows(shape: Shape, found: dict[str, list[dict[str, float]]], precision: str) -> Iterator[str]:
    """The table's lines: a contender's medians, and how mahlstick's are to them."""
    mine = found["mahlstick"]
    for name, theirs in found.items():

        def share(measure: Callable[[dict[str, float]], float], theirs: list[dict[str, float]] = theirs) -> float:
            return median(measure(a) / measure(b) for a, b in zip(mine, theirs, strict=True))

        one = {key: median(record[key] for record in theirs) for key in theirs[0]}
        cells = [
            f"{shape.name}, {shape.resolution} px, batch {shape.batch}, {PRECISIONS[precision]}", name,
            f"{1 / one['wall']:.3g}", f"{1 / share(lambda r: r['wall']):.2f}", f"{1 / share(lambda r: r['cpu']):.2f}",
            f"{1 / share(lambda r: r['wall'] + r['encode'] / EPOCHS):.2f}",
            f"{one['peak'] / 2**20:.0f}", f"{(one['peak'] - one['libraries']) / 2**20:.0f}",
            f"{share(lambda r: r['peak']):.2f}", f"{share(lambda r: r['peak'] - r['libraries']):.2f}",
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"


PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}

HEAD = f"""# Training throughput

Made by `python -m benchmarks.train_throughput`: a ControlNet trained by mahlstick and by the loop of diffusers'
`examples/controlnet/train_controlnet.py` in its published settings (as it stands, and *lean*: with
`--set_grads_to_none`). Random weights of the real shapes, the same files, batch and precision, each loop in a fresh
process of one thread on a machine of two CPU cores that other work shares.

The ratios are mahlstick's to that line: speed by the clock, by the processor's time, and by the clock with the
encoding of the pictures, which mahlstick does once, spread over {EPOCHS} epochs. The pictures have the size that is
trained on, so nothing is scaled. Memory is the process' largest resident size; *beyond* leaves out what the libraries
take before there is a model. Validation and checkpoints are not in it.

| base | loop | pictures/s | speed | by processor | with encoding | peak MiB | beyond | ratio | beyond |
|---|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        name, shape, *rest = json.loads(sys.argv[2])
        serve(name, Shape(**shape), *rest)
        return
    flags = argparse.ArgumentParser(prog="python -m benchmarks.train_throughput", description=__doc__)
    flags.add_argument("shapes", nargs="*", help=f"of {', '.join(SHAPES)}; left out, all")
    for name in ("resolution", "batch", "steps"):
        flags.add_argument(f"--{name}", type=int)
    flags.add_argument("--repeats", type=int, default=3)
    flags.add_argument("--precision", choices=[*PRECISIONS], default="fp32")
    given = flags.parse_args()
    changes = {name: value for name in ("resolution", "batch", "steps") if (value := getattr(given, name)) is not None}
    table = [HEAD]
    for name in given.shapes or SHAPES:
        shape = replace(SHAPES[name], **changes)
        table += rows(shape, compare(shape, given.repeats, given.precision), given.precision)
    print("\n".join(table))
    if not given.shapes and not changes:
        (ROOT / "docs" / "throughput.md").write_text("\n".join(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
