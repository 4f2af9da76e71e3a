"""Training a ControlNet here and as diffusers' ``examples/controlnet/train_controlnet.py`` does it, side by side:
``python -m benchmarks.train_throughput [tiny] [sd15] [--repeats N] [--precision no|bf16]``.

The peer is that script's loop in its default settings, written down anew, and with ``--set_grads_to_none``, which
takes less memory. Both learn from the same files, on the same random base, in the same precision, each time in a fresh
process and by turns, so that other work on the machine slows both. The table goes to docs/throughput.md.
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
from dataclasses import dataclass
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
    parts: Callable[[], dict[str, Any]]
    widths: tuple[int, ...]  # of the ControlNet's hint encoder
    resolution: int
    batch: int
    steps: int
    warm: int


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


SHAPES = {
    "tiny": Shape("tiny", lambda: tiny.components("sd1"), (16, 32, 96, 256), tiny.SIZE, 4, 60, 10),
    "sd15": Shape("SD 1.5", sd15, (16, 32, 96, 256), 256, 4, 4, 1),
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


def peer(shape: Shape, data: Path, out: Path, precision: str) -> Iterator[float]:
    accelerator = Accelerator(mixed_precision=precision)
    parts = shape.parts()
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
            optimiser.zero_grad(set_to_none=True)
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
    pipe = diffusers.StableDiffusionPipeline(**shape.parts())
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


CONTENDERS = {"peer": peer, "ours": ours}


# Measuring -----------------------------------------------------------------------------------------------------------


def peak_memory() -> int:
    """Bytes: the most that CUDA's allocator or, without CUDA, this process ever held."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name: str, shape: Shape, data: Path, out: Path, precision: str) -> dict[str, float]:
    """One contender's steps, in this process."""
    libraries = peak_memory()
    run = CONTENDERS[name](shape, data, out, precision)
    encode, *seconds = [next(run) for _ in range(shape.steps + 1)]
    speed = shape.batch / median(seconds[shape.warm :])
    return {"encode": encode, "speed": speed, "peak": peak_memory(), "libraries": libraries}


def in_fresh_process(name: str, shape: str, data: Path, precision: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", __spec__.name, "--one", name, shape, str(data), out, precision]
        told = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=dict(os.environ))
    return json.loads(told.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        logging.getLogger("diffusers").setLevel(logging.ERROR)
        name, shape, data, out, precision = sys.argv[2:]
        print(json.dumps(measure(name, SHAPES[shape], Path(data), Path(out), precision)))
        return
    flags = argparse.ArgumentParser(prog="python -m benchmarks.train_throughput", description=__doc__)
    flags.add_argument("shapes", nargs="*", choices=[*SHAPES, []], default=[])
    flags.add_argument("--repeats", type=int, default=3)
    flags.add_argument("--precision", choices=["no", "bf16"], default="no")
    given = flags.parse_args()
    for name in given.shapes or SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "data"
            write_pictures(data, SHAPES[name].resolution, 4 * SHAPES[name].batch)
            for _ in range(given.repeats):
                for contender in CONTENDERS:
                    print(name, contender, in_fresh_process(contender, name, data, given.precision), flush=True)


if __name__ == "__main__":
    main()
