"""Assemble the trained nets into diffusers' folder layout, and measure what they can do.

``assemble`` writes assets/embedded; ``evaluate`` reads it back through diffusers' ordinary pipelines and writes the
figures into the model card. All drawings and references are of concepts that no stage was trained on.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DPMSolverMultistepScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPVisionModelWithProjection

from mahlstick.training.embedded import data, models, train

log = logging.getLogger(__name__)

STEPS, GUIDANCE = 20, 4.0
GAIN = 1.5  # of the ControlNet: trained for minutes, it says the right thing too softly
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
        controlnet = ControlNetModel.from_pretrained(run.cache / "controlnet")
        strengthen(controlnet, GAIN)
        controlnet.half().save_pretrained(folder / "controlnet-lineart")
    if (run.cache / "ip_adapter.safetensors").exists():
        (folder / "ip-adapter").mkdir(exist_ok=True)
        weights = {k: v.half() for k, v in load_file(run.cache / "ip_adapter.safetensors").items()}
        save_file(weights, folder / "ip-adapter" / "ip_adapter.safetensors")
    portable(folder)
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    log.info("%s: %.1f MB with everything in %s", folder, size / 1e6, out)
    if size > LIMIT:
        raise RuntimeError(f"{out} takes {size / 1e6:.1f} MB, more than {LIMIT / 1e6:.0f} MB: make the nets smaller")


def strengthen(controlnet: ControlNetModel, gain: float) -> None:
    """Fold ``gain`` into the zero convolutions, in place, so that scale 1 acts as ``gain`` did before."""
    with torch.no_grad():
        for layer in [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]:
            layer.weight *= gain
            layer.bias *= gain


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


def edge_f1(drawing: np.ndarray, result: np.ndarray, tolerance: int = 1) -> float:
    """F1 of two edge maps (H, W); a pixel counts as found when the other map has one within ``tolerance``."""
    kernel = np.ones((2 * tolerance + 1,) * 2, np.uint8)
    a, b = (drawing > 127).astype(np.uint8), (result > 127).astype(np.uint8)
    if not a.any() or not b.any():
        return 0.0
    precision = float(cv2.dilate(a, kernel)[b > 0].mean())
    recall = float(cv2.dilate(b, kernel)[a > 0].mean())
    return 2 * precision * recall / max(precision + recall, 1e-9)


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


def generate(pipe: Any, prompts: list[str], seeds: list[int], batch: int = 16, **conditions: list[Any]) -> np.ndarray:
    """Pictures (N, 64, 64, 3) uint8 for prompts, one seed each; ``conditions`` are lists with one item a prompt."""
    parts = []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        extra: dict[str, Any] = {
            k: torch.stack(v[part]) if isinstance(v[0], Tensor) else v[part] for k, v in conditions.items()
        }
        if "ip_adapter_image_embeds" in extra:  # one adapter: (2B, 1, features), the unconditional half first
            features = extra["ip_adapter_image_embeds"]
            extra["ip_adapter_image_embeds"] = [torch.cat([torch.zeros_like(features), features])]
        done = pipe(
            prompts[part],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            height=data.SIZE,
            width=data.SIZE,
            generator=[torch.Generator().manual_seed(s) for s in seeds[part]],
            output_type="np",
            **extra,
        )
        parts.append((done.images * 255).round().astype(np.uint8))
    return np.concatenate(parts)


def measure_control(
    pipe: StableDiffusionPipeline, pictures: data.Pictures, folder: Path, sheets: Path
) -> dict[str, Any]:
    """Edge F1 with and without the ControlNet over unseen drawings: edges of 3D pictures, and outlines of glyphs."""
    net = ControlNetModel.from_pretrained(folder / "controlnet-lineart")
    controlled = StableDiffusionControlNetPipeline(**pipe.components, controlnet=net, requires_safety_checker=False)
    controlled.set_progress_bar_config(disable=True)
    shaded, glyphs = pictures.of("3d", held_out=True), pictures.of("high-contrast", held_out=True)
    drawn = [data.line_art(pictures.rgba[i]) for i in shaded]
    drawn += [
        torch.from_numpy(data.edges(data.to_uint8(data.on_white(pictures.rgba[i][None])[0])))
        .float()
        .div(255)
        .expand(3, -1, -1)
        for i in glyphs
    ]
    prompts = [pictures.concepts[int(pictures.concept[i])].label for i in [*shaded, *glyphs]]
    seeds = list(range(len(prompts)))
    free = generate(pipe, prompts, seeds)
    held = generate(controlled, prompts, seeds, image=drawn)
    maps = [(line[0].numpy() * 255).astype(np.uint8) for line in drawn]
    scores = np.array([[edge_f1(m, data.edges(p)) for m, p in zip(maps, pair, strict=True)] for pair in (free, held)])
    rows = [
        torch.stack(drawn)[:16] * 2 - 1,
        *(torch.from_numpy(p[:16]).permute(0, 3, 1, 2) / 127.5 - 1 for p in (free, held)),
    ]
    train.sheet(rows, sheets / "control.png")
    n = len(shaded)
    return {
        "pairs": len(prompts),
        "edge_f1_without": round(float(scores[0].mean()), 3),
        "edge_f1_with": round(float(scores[1].mean()), 3),
        "ratio": round(float(scores[1].mean() / scores[0].mean()), 2),
        "edge_f1_3d_edges": [round(float(s[:n].mean()), 3) for s in scores],
        "edge_f1_glyph_outlines": [round(float(s[n:].mean()), 3) for s in scores],
    }


def measure_reference(
    pipe: StableDiffusionPipeline, pictures: data.Pictures, folder: Path, sheets: Path
) -> dict[str, Any]:
    """Similarity to unseen references without and with the image prompt; no words, the same seeds."""
    index = pictures.of("3d", held_out=True)
    references = data.on_white(pictures.rgba[index])
    prompts, seeds = [""] * len(index), list(range(len(index)))
    free = generate(pipe, prompts, seeds)
    encoder, processor = pipe.image_encoder, pipe.feature_extractor
    pipe.load_ip_adapter(
        str(folder), subfolder="ip-adapter", weight_name="ip_adapter.safetensors", image_encoder_folder=None
    )
    pipe.set_ip_adapter_scale(1.0)
    with torch.no_grad():
        features = encoder(pixel_values=references).image_embeds
    held = generate(pipe, prompts, seeds, ip_adapter_image_embeds=list(features[:, None]))
    pipe.unload_ip_adapter()  # takes the pipeline's own encoder off with it
    pipe.register_modules(image_encoder=encoder, feature_extractor=processor)
    truth = np.stack([data.to_uint8(r) for r in references])
    train.sheet(
        [references[:16], *(torch.from_numpy(p[:16]).permute(0, 3, 1, 2) / 127.5 - 1 for p in (free, held))],
        sheets / "reference.png",
    )
    with torch.no_grad():
        towers = [
            encoder(pixel_values=torch.from_numpy(p).permute(0, 3, 1, 2) / 127.5 - 1).image_embeds for p in (free, held)
        ]
    result: dict[str, Any] = {"references": len(index)}
    for name, similarity in (("colour", colour_similarity), ("shape", shape_similarity)):
        result[name] = [
            round(float(np.mean([similarity(a, b) for a, b in zip(truth, p, strict=True)])), 3) for p in (free, held)
        ]
    result["image_tower"] = [round(float(F.cosine_similarity(t, features).mean()), 3) for t in towers]
    return result


def measure_words(pipe: StableDiffusionPipeline, pictures: data.Pictures, cache: Path, sheets: Path) -> dict[str, Any]:
    """Words alone: retrieval by our CLIP among all trained concepts, and the colour that was asked for."""
    known = [c for c in pictures.concepts if not c.held_out]
    asked = random.Random(1).sample(range(len(known)), min(40, len(known)))
    made = generate(pipe, [known[i].label for i in asked], list(range(len(asked))))
    text = CLIPTextModel.from_pretrained(cache / "clip-text")
    with torch.no_grad():
        words = torch.cat([text(models.encode(pipe.tokenizer, [c.label])).pooler_output for c in known])
        seen = pipe.image_encoder(pixel_values=torch.from_numpy(made).permute(0, 3, 1, 2) / 127.5 - 1).image_embeds
    ranks = (F.normalize(seen, dim=-1) @ F.normalize(words, dim=-1).T).argsort(descending=True)
    found = ranks == torch.tensor(asked)[:, None]
    things = ["penguin", "cat", "hamburger", "heart"]
    pairs = [(colour, thing) for colour in data.COLOURS for thing in things]
    coloured = generate(pipe, [f"{c} {t}" for c, t in pairs], list(range(len(pairs))))
    opaque = np.where((coloured < 235).any(-1, keepdims=True), 255, 0).astype(np.uint8)
    right = [
        data.colour_of(np.concatenate([p, o], -1)) == c for p, o, (c, _) in zip(coloured, opaque, pairs, strict=True)
    ]
    shown = generate(pipe, list(train.SAMPLES), list(range(len(train.SAMPLES))))
    train.sheet([torch.from_numpy(shown).permute(0, 3, 1, 2) / 127.5 - 1], sheets / "words.png")
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
    rows = [
        (
            f"edge F1, 1 px tolerance, {c['pairs']} unseen drawings × their names",
            (c["edge_f1_without"], c["edge_f1_with"]),
        ),
        ("… edges of 3D pictures", c["edge_f1_3d_edges"]),
        ("… outlines of the high-contrast set", c["edge_f1_glyph_outlines"]),
        (
            f"colour histograms' intersection with the reference, {r['references']} unseen references, no words",
            r["colour"],
        ),
        ("HOG cosine with the reference", r["shape"]),
        ("cosine in the embedded image tower (the IP-Adapter's own encoder: not independent)", r["image_tower"]),
    ]
    goal = "met" if c["ratio"] >= 2 else "not met"
    measured = "\n".join(f"| {what} | {without} | {with_} |" for what, (without, with_) in rows)
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
guidance {GUIDANCE:g}; the same seeds with and without the unit). None of the drawings and references was trained on.

| | without | with |
|---|---|---|
{measured}

- With the ControlNet the edge F1 is {c["ratio"]} times that without; the goal of 2 is {goal}.
  Its zero convolutions are stored {GAIN:g} times as strong as trained: so a scale of 1 acts as that.
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
