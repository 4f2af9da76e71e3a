"""The model card: every number of it from the figures, the runs and the files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from mahlstick.errors import MahlstickError
from mahlstick.training.recipes import emoji, models, packages

LICENCES = {
    "@lobehub/fluent-emoji-3d": "MIT (Fluent Emoji by Microsoft)",
    "@iconify-json/fluent-emoji": "MIT (Fluent Emoji by Microsoft)",
    "@iconify-json/fluent-emoji-flat": "MIT (Fluent Emoji by Microsoft)",
    "@iconify-json/fluent-emoji-high-contrast": "MIT (Fluent Emoji by Microsoft)",
    "@iconify-json/noto": "Apache-2.0 (Noto Emoji by Google)",
    "@iconify-json/twemoji": "CC-BY-4.0 (Twemoji by Twitter and contributors)",
    packages.WORDS: "MIT (labels and tags)",
    **dict.fromkeys(packages.CLIPS, "MIT (Fluent Emoji by Microsoft)"),
}

# What is told of each evaluation: its name, the measure, and a sentence
TOLD = (
    ("concepts", "named_at_1", "{n} things that it learned, each in one style: the judge names the thing"),
    ("concepts", "named_at_5", "… among its first five guesses"),
    ("styles", "named_at_1", "… the judge names the style that was asked for"),
    ("colours", "named_at_1", "{n} things in a colour that they do not have: the judge names the colour"),
    ("many", "frechet_distance", "FID over the judge's features, {n} pictures against held-out ones"),
    ("unseen", "psnr", "VAE, PSNR in dB, {n} things that no training saw"),
    ("pairs", "psnr", "… {n} things in a style that they were never shown in"),
    ("pairs", "image_recall_at_1", "CLIP: of {n} of those, the words find the picture (true pictures)"),
    ("lineart", "edge_f1", "edge F1, {n} drawings of unseen things"),
    ("glyph", "edge_f1", "… outlines by another artist's hand"),
    ("canny", "edge_f1", "edge F1, canny"),
    ("mask", "mask_iou", "mask IoU"),
    ("color", "rmse", "colour grid, RMSE (less is better)"),
    ("ip-adapter", "likeness", "IP-Adapter: cosine with an unseen reference, in the judge's features"),
    ("ip-adapter-plus", "likeness", "… plus"),
    ("other", "text_wins", "IP-Adapter at 0.4, a reference of another thing: the words win"),
    ("other-plus", "text_wins", "… plus"),
)


def card(folder: Path, figures: Mapping[str, Any], judges: Mapping[str, float], concepts: Sequence[packages.Concept],
         runs: Path, remarks: str) -> str:  # fmt: skip
    """MODEL_CARD.md. ``figures`` and ``judges`` are their stages' files; ``runs`` the folder of the trainings;
    ``remarks`` what a person saw in the pictures."""
    for name, measure, _ in TOLD:
        if measure not in figures.get(name, {}):
            raise MahlstickError(f"the figures lack {measure} of {name}; do the stage figures --only {name} first")
    sources = [f"| `{name}` | {version} | {LICENCES[name]} |" for name, version in packages.VERSIONS.items()]
    unseen = [concept.label for concept in concepts if concept.held_out]
    commands = dict.fromkeys(figures[name]["command"] for name, _, _ in TOLD)
    return f"""# The embedded model

A small Stable Diffusion, {emoji.SIZE} × {emoji.SIZE} px, v-prediction, with a ControlNet for five kinds of control,
two IP-Adapters, a motion module, a CLIP and a captioner. It was trained from scratch on emoji, so that everything in
this project can be tried without a model hub. It is an ordinary `StableDiffusionPipeline` folder.
[The gallery](../../docs/gallery.md) shows what it does.

| part | parameters | file (fp16) |
|---|---|---|
{_lines(sizes(folder))}

## Data
{len(concepts)} things in {len(packages.STYLES)} styles, {len(concepts) - len(unseen)} of them to learn from. Of those,
one in {emoji.HELD_OUT_PAIRS} pairs of thing and style (other than 3D) was kept out too. Pictures are moved, some are
tinted, and some have a coloured ground. The pictures themselves are not part of this project.

| npm package | version | licence |
|---|---|---|
{_lines(sources)}

Kept out of every training: {", ".join(unseen)}.

The weights are released under this project's licence (MIT). Twemoji's pictures are CC-BY-4.0, © Twitter, Inc and other
contributors.

## How it was made
`python -m mahlstick.training.recipes --help` gives the commands in their order. Two CPU cores, bfloat16 and float32,
shared with other work; hours are what the logs of the steps add up to.

| training | steps | batch | rate | hours | seed |
|---|---|---|---|---|---|
{_lines(trainings(runs))}

{remarks.strip()}

## Figures
By `mahlstick evaluate`, 20 steps, guidance 4. The judges are MobileNetV2s with ImageNet's weights and linear heads that
learned real pictures only, and for styles all layers did; of real pictures that they had not seen they name
{judges["concepts"]:.0%} of the things, {judges["styles"]:.0%} of the styles and {judges["colours"]:.0%} of the colours.
3D and gradient are the same drawings, shaded by two programs, and count as one style.

| | without | with | true pictures |
|---|---|---|---|
{_lines(rows(figures))}

Without: the base alone. True pictures: the same measure of the real ones; for FID, of one half of them to the other.

```sh
{_lines(commands)}
```

## Limits
{emoji.SIZE} px, one thing in the middle, a plain ground. Words that it does not know give some thing. Numbers, scenes,
letters and people are beyond it. Prompts are cut after {models.TOKENS} tokens. It has no safety checker: it has seen
nothing but emoji. It is for demonstrations, tests and play.
"""


def _lines(lines: Any) -> str:
    return "\n".join(lines)


def sizes(folder: Path) -> list[str]:
    """A row for each file of weights."""
    found = []
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            count = sum(int(np.prod(file.get_slice(key).get_shape())) for key in file.keys())
        name, size = path.parent.relative_to(folder), path.stat().st_size
        found.append(f"| `{name}` | {count / 1e6:.2f} M | {size / 1e6:.1f} MB |")
    return found


def trainings(runs: Path) -> list[str]:
    """A row for each run, in the order of their names."""
    found = []
    for log in sorted(runs.glob("*/log.jsonl")):
        logged = [json.loads(line) for line in log.read_text().splitlines()]
        config = json.loads((log.parent / "training.json").read_text())["config"]
        found.append(
            f"| {log.parent.name} | {logged[-1]['step']:,} | {config['batch']} | {config['rate']:g}"
            f" | {hours(logged, config['batch']):.1f} | {config['seed']} |"
        )
    return found


def hours(logged: Sequence[Mapping[str, Any]], batch: int) -> float:
    """What the steps took, by their logged rates."""
    seconds, before = 0.0, 0
    for row in logged:
        if rate := row.get("pictures_per_second"):
            seconds, before = seconds + (row["step"] - before) * batch / rate, row["step"]
    return seconds / 3600


def rows(figures: Mapping[str, Any]) -> list[str]:
    """A row for each figure that is told."""
    found = []
    for name, measure, text in TOLD:
        of = figures[name][measure]
        cells = [f"{of[column]:.3g}" if column in of else "" for column in ("without", "with", "true")]
        found.append(f"| {text.format(n=figures[name]['pictures'])} | {' | '.join(cells)} |")
    return found
