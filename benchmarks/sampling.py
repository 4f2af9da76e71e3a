"""Seconds and memory for a picture of the embedded model, here and by diffusers' own pipelines, in one run:

    python -m benchmarks.sampling [--steps 20] [--repeats 5]

Each way is a process of its own, and they take turns. "First" holds all that a person waits for: imports, weights and
the picture.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

BEGAN = time.monotonic()
PROMPT, SEED, GUIDANCE = "red apple", 7, 4.0
UNITS = ("", "lineart", "lineart and ip-adapter")
WAYS = ("diffusers", "mahlstick")


def diffusers_way(units: str, steps: int) -> Callable[[], Any]:
    """A function that makes one picture as diffusers' documentation has it."""
    import torch
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
    from PIL import Image

    from mahlstick.pipelines.demo import examples_folder
    from mahlstick.pipelines.load import adapter_path, embedded_folder

    more: dict[str, Any] = {}
    if units:
        net = ControlNetModel.from_pretrained(adapter_path("lineart"))
        pipe = StableDiffusionControlNetPipeline.from_pretrained(embedded_folder(), controlnet=net)
        drawing = Image.open(examples_folder() / "apple-drawing.png").convert("RGB")
        side = pipe.unet.config.sample_size * pipe.vae_scale_factor
        more["image"] = drawing.resize((side, side))
    else:
        pipe = StableDiffusionPipeline.from_pretrained(embedded_folder())
    if "ip-adapter" in units:
        encoder, processor = pipe.image_encoder, pipe.feature_extractor
        pipe.load_ip_adapter(
            str(embedded_folder()), subfolder="ip-adapter", weight_name="ip_adapter.safetensors",
            image_encoder_folder=None,
        )  # fmt: skip
        pipe.register_modules(image_encoder=encoder, feature_extractor=processor)
        more["ip_adapter_image"] = Image.open(examples_folder() / "lotus-reference.png").convert("RGB")
    pipe.set_progress_bar_config(disable=True)
    return lambda: pipe(
        PROMPT,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(SEED),
        **more,
    ).images[0]


def mahlstick_way(units: str, steps: int) -> Callable[[], Any]:
    """A function that makes the same picture here."""
    import mahlstick as ms
    from mahlstick.pipelines.demo import examples_folder
    from mahlstick.pipelines.load import Loader

    more: dict[str, Any] = {}
    if units:
        more["controls"] = [{"adapter": "lineart", "image": examples_folder() / "apple-drawing.png"}]
    if "ip-adapter" in units:
        more["image_prompts"] = [{"images": [examples_folder() / "lotus-reference.png"]}]
    request, loader = ms.Request(prompt=PROMPT, seed=SEED, steps=steps, **more), Loader()
    return lambda: ms.generate(request, loader=loader, progress=False).images[0]


def serve(way: str, units: str, steps: int) -> None:
    """For each line that comes in make a picture, and write how long it took and the most memory so far."""
    draw = {"diffusers": diffusers_way, "mahlstick": mahlstick_way}[way](units, steps)
    first = True
    for _ in sys.stdin:
        began = time.monotonic()
        draw()
        seconds = time.monotonic() - (BEGAN if first else began)
        first = False
        megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        sys.stdout.write(json.dumps([seconds, megabytes]) + "\n")
        sys.stdout.flush()


def compare(units: str, steps: int, repeats: int) -> dict[str, list[list[float]]]:
    """(seconds, MiB) of each picture by way; the first is the process's first."""
    command = [sys.executable, "-m", "benchmarks.sampling", "--steps", str(steps), "--units", units, "--serve"]
    found: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    served = {}
    for way in WAYS:  # one after the other, so that neither start disturbs the other
        served[way] = subprocess.Popen([*command, way], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        found[way].append(ask(served[way]))
    for _ in range(repeats):
        for way in WAYS:
            found[way].append(ask(served[way]))
    for process in served.values():
        process.communicate()
    return found


def ask(process: subprocess.Popen[str]) -> list[float]:
    """One picture."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return [float(number) for number in json.loads(process.stdout.readline())]


def row(units: str, found: dict[str, list[list[float]]]) -> str:
    """A line of the table."""
    cells = []
    for way in WAYS:
        first, *later = found[way]
        cells += [
            f"{first[0]:.1f} s",
            f"{median(seconds for seconds, _ in later):.2f} s",
            f"{found[way][-1][1]:.0f} MiB",
        ]
    ratio = median(a[0] / b[0] for a, b in zip(found["diffusers"][1:], found["mahlstick"][1:], strict=True))
    return f"| {units or 'words'} | {' | '.join(cells)} | {ratio:.2f} |"


def main() -> None:
    """Print the table, or serve one way of it."""
    parser = argparse.ArgumentParser(
        description="The embedded model here and in diffusers' pipelines: time and memory."
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--units", choices=UNITS, help="only these")
    parser.add_argument("--serve", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve, given.units, given.steps)
        return
    columns = [f"{way}: {what}" for way in WAYS for what in ("first", "each", "memory")]
    print(f"| | {' | '.join(columns)} | times as fast |\n|{'---|' * (len(columns) + 2)}")
    for units in UNITS if given.units is None else [given.units]:
        print(row(units, compare(units, given.steps, given.repeats)), flush=True)


if __name__ == "__main__":
    main()
