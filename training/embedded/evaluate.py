"""Assemble the trained nets into diffusers' folder layout, and measure what they can do.

``assemble`` writes assets/embedded; ``evaluate`` reads it back through diffusers' ordinary pipelines and writes the
figures into the model card. All drawings and references are of concepts that no stage was trained on.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPVisionModelWithProjection

from mahlstick.adapters.controlnet import ControlNet
from mahlstick.adapters.ip_adapter import IPAdapter
from mahlstick.pipelines.attach import attach
from mahlstick.pipelines.units import Control, ImagePrompt, Unit
from mahlstick.training.embedded import data, models, train
from mahlstick.training.metrics import edge_f1

log = logging.getLogger(__name__)

STEPS, GUIDANCE = 20, 4.0
SEED_OF_MOVES = 40
LIMIT = 60_000_000  # bytes of assets/ together


# ---- assemble


def assemble(pictures: data.Pictures, run: train.Run, out: Path) -> None:
    """The cache's nets → ``out/embedded``: a pipeline folder with a ControlNet and an IP-Adapter, in half precision."""
    from safetensors.torch import load_file, save_file

    folder = out / "embedded"
    processor = CLIPImageProcessor(
        size={"shortest_edge": data.SIZE},
        crop_size={"height": data.SIZE, "width": data.SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    scheduler = DPMSolverMultistepScheduler.from_config(
        models.make_scheduler().config, steps_offset=1, algorithm_type="dpmsolver++", solver_order=2
    )
    vae = AutoencoderKL.from_pretrained(run.cache / ("vae-decoder" if (run.cache / "vae-decoder").exists() else "vae"))
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel.from_pretrained(run.cache / "text"),
        tokenizer=train.tokenizer_of(pictures, run),
        unet=UNet2DConditionModel.from_pretrained(run.cache / "unet"),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=processor,
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(run.cache / "clip-image"),
        requires_safety_checker=False,
    )
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "feature_extractor", "image_encoder"):
        shutil.rmtree(folder / part, ignore_errors=True)
    pipe.to(dtype=torch.float16).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):  # transformers 5 writes tokenizer.json alone; older ones read these
        shutil.copy(run.cache / "tokenizer" / name, folder / "tokenizer" / name)
    if (run.cache / "controlnet").exists():
        controlnet = ControlNetModel.from_pretrained(run.cache / "controlnet").half()
        controlnet.save_pretrained(folder / "controlnet-lineart")
    if (run.cache / "ip_adapter.safetensors").exists():
        (folder / "ip-adapter").mkdir(exist_ok=True)
        weights = {k: v.half() for k, v in load_file(run.cache / "ip_adapter.safetensors").items()}
        save_file(weights, folder / "ip-adapter" / "ip_adapter.safetensors")
    portable(folder)
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    log.info("%s: %.1f MB with everything in %s", folder, size / 1e6, out)
    if size > LIMIT:
        raise RuntimeError(f"{out} takes {size / 1e6:.1f} MB, more than {LIMIT / 1e6:.0f} MB: make the nets smaller")


def portable(folder: Path) -> None:
    """Take paths and storage precision out of the configs, so that the nets load as float32 unless asked otherwise."""
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text())
        if not isinstance(config, dict) or path.name in ("vocab.json", "tokenizer.json"):
            continue
        for key in ("_name_or_path", "name_or_path"):
            config.pop(key, None)
        for key in ("dtype", "torch_dtype"):
            if key in config:
                config[key] = "float32"
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


# ---- measures


def histogram(rgb: np.ndarray, bins: int = 4) -> np.ndarray:
    """Colour histogram of the pixels that are not background white, (bins³,), summing to 1."""
    pixels = rgb.reshape(-1, 3)[(rgb.reshape(-1, 3) < 240).any(1)].astype(int)
    counts = np.bincount((pixels * bins // 256) @ np.array([bins * bins, bins, 1]), minlength=bins**3)
    return np.asarray(counts / max(1, counts.sum()))


def colour_similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection of the two pictures' colour histograms, in [0, 1]."""
    return float(np.minimum(histogram(a), histogram(b)).sum())


def shape_similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of the two pictures' histograms of oriented gradients, in [0, 1]."""
    from skimage.feature import hog

    x, y = (hog(p, orientations=9, pixels_per_cell=(16, 16), cells_per_block=(2, 2), channel_axis=-1) for p in (a, b))
    return float(x @ y / max(1e-9, np.linalg.norm(x) * np.linalg.norm(y)))


# ---- evaluate


def generate(
    pipe: Any, prompts: list[str], unit: Callable[[slice], Unit] | None = None, batch: int = 16
) -> np.ndarray[Any, Any]:
    """Pictures (N, 64, 64, 3) uint8 for prompts, seeds 0, 1, 2 …; ``unit`` makes that of a slice of the prompts."""
    parts = []
    for start in range(0, len(prompts), batch):
        part = slice(start, min(start + batch, len(prompts)))
        with attach(pipe, *([unit(part)] if unit else [])):
            done = pipe(
                prompts[part],
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                height=data.SIZE,
                width=data.SIZE,
                generator=[torch.Generator().manual_seed(seed) for seed in range(part.start, part.stop)],
                output_type="np",
            )
        parts.append((done.images * 255).round().astype(np.uint8))
    return np.concatenate(parts)


def as_tensor(made: np.ndarray[Any, Any]) -> Tensor:
    """Pictures (N, 64, 64, 3) uint8 → (N, 3, 64, 64) in [−1, 1]."""
    return torch.from_numpy(made).permute(0, 3, 1, 2) / 127.5 - 1


@dataclass(frozen=True)
class Drawings:
    """Drawings (N, 3, 64, 64) in [0, 1] with the pictures they were made from, in [−1, 1], and their names."""

    lines: Tensor
    truth: Tensor
    prompts: list[str]


def unseen_drawings(pictures: data.Pictures) -> dict[str, Drawings]:
    """Drawings of held-out concepts, in three sets.

    Lines of the 3D pictures; the same after a random turn, scaling and shift; and the outlines of the black-and-white
    glyphs, which are another artist's hand: the 3D pictures themselves do not follow them to the pixel.
    """
    rng = random.Random(SEED_OF_MOVES)
    shaded, glyphs = pictures.of("3d", held_out=True), pictures.of("high-contrast", held_out=True)
    still, prompts = pictures.rgba[shaded], [pictures.concepts[int(pictures.concept[i])].label for i in shaded]
    moved = torch.stack([data.warp(picture, rng) for picture in still])
    outlines = np.stack([data.edges(data.to_uint8(glyph)) for glyph in data.on_white(pictures.rgba[glyphs])])
    of_glyphs = torch.from_numpy(outlines)[:, None].float().div(255).expand(-1, 3, -1, -1)
    return {
        "3d": Drawings(torch.stack([data.line_art(p) for p in still]), data.on_white(still), prompts),
        "moved": Drawings(torch.stack([data.line_art(p) for p in moved]), data.on_white(moved), prompts),
        "glyphs": Drawings(of_glyphs, data.on_white(still), prompts),
    }


def measure_control(
    pipe: StableDiffusionPipeline, pictures: data.Pictures, folder: Path, sheets: Path
) -> dict[str, Any]:
    """Edge F1 over the unseen drawings, without and with the ControlNet, by set and in all."""
    net = ControlNet.from_pretrained(folder / "controlnet-lineart")
    figures: dict[str, Any] = {}
    scores: list[np.ndarray[Any, Any]] = []
    for name, drawn in unseen_drawings(pictures).items():
        free = generate(pipe, drawn.prompts)
        held = generate(pipe, drawn.prompts, lambda part, lines=drawn.lines: Control(net, lines[part]))  # type: ignore[misc]
        true = np.stack([data.to_uint8(picture) for picture in drawn.truth])
        maps = (drawn.lines[:, 0].numpy() * 255).astype(np.uint8)
        found = [[edge_f1(m, data.edges(p)) for m, p in zip(maps, made, strict=True)] for made in (free, held, true)]
        scores.append(np.array(found))
        train.sheet(
            [drawn.lines[:16] * 2 - 1, as_tensor(free[:16]), as_tensor(held[:16])], sheets / f"control-{name}.png"
        )
        figures[name] = summary(scores[-1])
    return figures | {"all": summary(np.concatenate(scores, 1))}


def summary(scores: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Edge F1 (3, N), without, with and of the true pictures → their means; how many times without is with."""
    without, with_, true = scores.mean(1)
    return {
        "pairs": scores.shape[1],
        "without": round(float(without), 3),
        "with": round(float(with_), 3),
        "true": round(float(true), 3),
        "ratio": round(float(with_ / without), 2),
    }


def measure_reference(
    pipe: StableDiffusionPipeline, pictures: data.Pictures, folder: Path, sheets: Path
) -> dict[str, Any]:
    """Similarity to unseen references without and with the image prompt; no words, the same seeds."""
    references = data.on_white(pictures.rgba[pictures.of("3d", held_out=True)])
    adapter = IPAdapter.from_pretrained(folder / "ip-adapter" / "ip_adapter.safetensors")
    encoder = pipe.image_encoder
    with torch.no_grad():
        features = encoder(pixel_values=references).image_embeds
    prompts = [""] * len(references)
    free = generate(pipe, prompts)
    held = generate(pipe, prompts, lambda part: ImagePrompt(adapter, features=features[part]))
    truth = np.stack([data.to_uint8(r) for r in references])
    train.sheet([references[:16], as_tensor(free[:16]), as_tensor(held[:16])], sheets / "reference.png")
    result: dict[str, Any] = {"references": len(references)}
    for name, similarity in (("colour", colour_similarity), ("shape", shape_similarity)):
        result[name] = [
            round(float(np.mean([similarity(a, b) for a, b in zip(truth, p, strict=True)])), 3) for p in (free, held)
        ]
    with torch.no_grad():
        towers = [encoder(pixel_values=as_tensor(p)).image_embeds for p in (free, held)]
    result["image_tower"] = [round(float(F.cosine_similarity(t, features).mean()), 3) for t in towers]
    return result


def measure_words(pipe: StableDiffusionPipeline, pictures: data.Pictures, cache: Path, sheets: Path) -> dict[str, Any]:
    """Words alone: retrieval by our CLIP among all trained concepts, and the colour that was asked for."""
    known = [c for c in pictures.concepts if not c.held_out]
    asked = random.Random(1).sample(range(len(known)), min(64, len(known)))
    made = generate(pipe, [known[i].label for i in asked])
    text = CLIPTextModel.from_pretrained(cache / "clip-text")
    with torch.no_grad():
        words = torch.cat([text(models.encode(pipe.tokenizer, [c.label])).pooler_output for c in known])
        seen = pipe.image_encoder(pixel_values=as_tensor(made)).image_embeds
    ranks = (F.normalize(seen, dim=-1) @ F.normalize(words, dim=-1).T).argsort(descending=True)
    found = ranks == torch.tensor(asked)[:, None]
    things = ["penguin", "cat", "hamburger", "heart"]
    pairs = [(colour, thing) for colour in data.COLOURS for thing in things]
    coloured = generate(pipe, [f"{c} {t}" for c, t in pairs])
    opaque = np.where((coloured < 235).any(-1, keepdims=True), 255, 0).astype(np.uint8)
    right = [
        data.colour_of(np.concatenate([p, o], -1)) == c for p, o, (c, _) in zip(coloured, opaque, pairs, strict=True)
    ]
    train.sheet([as_tensor(generate(pipe, list(train.SAMPLES)))], sheets / "words.png")
    return {
        "concepts": len(known),
        "prompts": len(asked),
        "recall_at_1": round(float(found[:, :1].any(1).float().mean()), 3),
        "recall_at_5": round(float(found[:, :5].any(1).float().mean()), 3),
        "colour_prompts": len(pairs),
        "colour_right": round(float(np.mean(right)), 3),
    }


def evaluate(pictures: data.Pictures, run: train.Run, out: Path) -> dict[str, Any]:
    """Measure words, control and references on the assembled model; write figures.json and the model card beside it."""
    folder, sheets = out / "embedded", run.cache / "sheets"
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    y = train.reconstruct(pipe.vae, x := data.on_white(pictures.rgba[pictures.of("3d", held_out=True)]))
    figures = {
        "vae_psnr": round(float(-10 * ((y.clamp(-1, 1) - x) / 2).square().mean((1, 2, 3)).log10().mean()), 1),
        "control": measure_control(pipe, pictures, folder, sheets),
        "reference": measure_reference(pipe, pictures, folder, sheets),
        "words": measure_words(pipe, pictures, run.cache, sheets),
    }
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    (folder / "MODEL_CARD.md").write_text(card(pictures, run, folder, figures))
    log.info("%s", json.dumps(figures, indent=1))
    return figures


# ---- model card

LICENCES = {
    "@lobehub/fluent-emoji-3d": "MIT (Fluent Emoji by Microsoft)",
    "@iconify-json/fluent-emoji-flat": "MIT (Fluent Emoji by Microsoft)",
    "@iconify-json/fluent-emoji-high-contrast": "MIT (Fluent Emoji by Microsoft)",
    "@iconify-json/noto": "Apache-2.0 (Noto Emoji by Google)",
    "@iconify-json/twemoji": "CC-BY-4.0 (Twemoji by Twitter and contributors)",
    "emojibase-data": "MIT (labels and tags)",
}


def card(pictures: data.Pictures, run: train.Run, folder: Path, figures: dict[str, Any]) -> str:
    """MODEL_CARD.md, every number of it from this run."""
    from safetensors import safe_open

    sizes = []
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            count = sum(int(np.prod(file.get_slice(k).get_shape())) for k in file.keys())
        sizes.append(
            f"| `{path.parent.relative_to(folder)}` | {count / 1e6:.2f} M | {path.stat().st_size / 1e6:.1f} MB |"
        )
    stages = json.loads((run.cache / "training.json").read_text())
    remarks = "".join(f"- {remark}\n" for remark in stages.pop("remarks", []))
    trained = [
        f"| {k} | {v['steps']:,} | {v['batch']} | {v['lr']:g} | {v['minutes']} | {v['loss']} | {v['seed']} |"
        for k, v in stages.items()
    ]
    learned, held = data.split_counts(pictures)
    unseen = ", ".join(c.label for c in pictures.concepts if c.held_out)
    c, r, w = figures["control"], figures["reference"], figures["words"]
    sources = "\n".join(f"| `{name}` | {version} | {LICENCES[name]} |" for name, version in data.PACKAGES.items())
    sets = {
        "3d": "edge F1, 1 px tolerance: {pairs} drawings, lines of 3D pictures",
        "moved": "… {pairs} drawings, the same turned, scaled and shifted",
        "glyphs": "… {pairs} drawings, outlines of the high-contrast set",
        "all": "… all {pairs}",
    }
    rows = [
        *(
            (what.format(**c[name]), *(c[name][of] for of in ("without", "with", "true")))
            for name, what in sets.items()
        ),
        (
            f"colour histograms' intersection with the reference, {r['references']} unseen references, no words",
            *r["colour"],
            1,
        ),
        ("HOG cosine with the reference", *r["shape"], 1),
        ("cosine in the embedded image tower (the IP-Adapter's own encoder: not independent)", *r["image_tower"], 1),
    ]
    ratios = ", ".join(f"{c[name]['ratio']:g} ({name})" for name in sets)
    measured = "\n".join(f"| {what} | {without} | {with_} | {true} |" for what, without, with_, true in rows)
    return f"""# The embedded model

A tiny Stable Diffusion (64 × 64 px, v-prediction), with a line-art ControlNet and an IP-Adapter, trained from scratch
on emoji art so that everything in this project can be tried without a model hub. It is an ordinary
`StableDiffusionPipeline` folder.

| part | parameters | file (fp16) |
|---|---|---|
{chr(10).join(sizes)}

## Data
{learned} concepts in {len(data.STYLES)} styles; the base's, the ControlNet's and the IP-Adapter's targets are the
3D style only. Pictures recoloured in {len(data.COLOURS)} colours teach the colour words. The pictures themselves are
not part of this project.

| npm package | version | licence |
|---|---|---|
{sources}

Held out of every stage ({held} concepts): {unseen}.

The weights are released under this project's licence (MIT). Twemoji's pictures (CC-BY-4.0, © Twitter, Inc and other
contributors) trained the VAE, the CLIP towers and the IP-Adapter's references.

## How it was made
Two CPU cores without fast bf16, shared with other work: the minutes are wall-clock time under that load.
`python -m mahlstick.training.embedded all` runs every stage; each goes on from its checkpoint in
`.cache/embedded/`, and `python -m mahlstick.training.embedded base --minutes 120` extends one (then run the stages
after it again).

| stage | steps | batch | peak rate | minutes | last loss | seed |
|---|---|---|---|---|---|---|
{chr(10).join(trained)}

{remarks}
## Figures
`python -m mahlstick.training.embedded evaluate` measures these (DPM-Solver++, {STEPS} steps,
guidance {GUIDANCE:g}) with mahlstick's own units, each picture with the same prompt and seed without and with the
unit. None of the drawings and references was trained on.

| | without | with | the true pictures |
|---|---|---|---|
{measured}

- With the ControlNet the edge F1 is so many times that without: {ratios}.
- Words alone: of {w["prompts"]} trained concepts, drawn evenly from all, the CLIP towers find the right one
  among {w["concepts"]} in {w["recall_at_1"]:.0%} of the pictures (in their first five guesses: {w["recall_at_5"]:.0%}).
  Of {w["colour_prompts"]} "colour thing" prompts, {w["colour_right"]:.0%} show the colour that was asked for as the
  dominant one.
- VAE: {figures["vae_psnr"]} dB on the held-out 3D pictures.

## Limits
64 px, plain white background, one object, {learned} concepts: other words give something emoji-like at best. Animals,
plants, food, vehicles of the air and the sky were drawn three times as often as the rest and come out best. No people,
no flags, no text. Two objects, counts and positions are not understood. Prompts are cut after {models.TOKENS} tokens.
It has no safety checker: it has seen nothing but emoji. It is for demonstrations and tests.
"""
