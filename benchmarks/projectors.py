"""Every projector trained on the embedded model with an equal budget, and what it is good for:

    python -m benchmarks.projectors --out FOLDER [--steps 4000] [--things 24] [--samples 6]

The pictures are the embedded model's own, of things in colours, so that its UNet can draw all that is asked for. A
third of the rows has the picture itself as reference and all words; a third has another thing of its colour as
reference, and words for the thing alone; a third has the thing in another colour, and the word for the colour alone. So
a reference shares one attribute with what is wanted, and only the words tell which.

Printed for each projector: its parameters; pictures learned a second; the likeness of a picture made without words to
its reference (cosine in the adapter's own image encoder, which flatters all alike); and, of pictures whose reference
shares one attribute, how many show that of the words, that of the reference, and both. Pairs of thing and colour for
these are held out. Everything is kept in FOLDER: a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from mahlstick.adapters.image_encoder import ImageEncoder
from mahlstick.adapters.ip_adapter import IPAdapter
from mahlstick.adapters.projectors import PROJECTORS
from mahlstick.pictures import save_png
from mahlstick.pipelines.generate import EMBEDDED_GUIDANCE
from mahlstick.pipelines.load import load_pipeline
from mahlstick.pipelines.units import ImagePrompt
from mahlstick.training.checkpoint import write_whole
from mahlstick.training.config import from_flags
from mahlstick.training.evaluate import draw
from mahlstick.training.recipes.drawings import COLOURS, colour_of
from mahlstick.training.run import train

THINGS = (
    "apple", "car", "heart", "star", "fish", "butterfly", "balloon", "book", "umbrella", "bird", "mushroom", "house",
    "cat", "hat", "key", "bus", "rocket", "flower", "bell", "guitar", "shoe", "cup", "clock", "leaf",
)  # fmt: skip
TINTS = tuple(colour for colour in COLOURS if colour != "brown")  # which on white is hardly told from orange
HELD_OUT = 5  # one pair of thing and colour in so many
TOLD = ("thing", "colour", "both")  # by the words
NOT_WHITE = 235  # of 255 in the darkest channel, from which on a pixel is background
AT_ONCE = 8


@dataclass(frozen=True)
class Wish:
    """A thing in a colour, the words for it, and the reference picture: its thing and colour."""

    thing: str
    colour: str
    words: str
    shown: tuple[str, str]

    @property
    def by_words(self) -> str:
        """Which attribute the words tell."""
        return "thing" if self.words == self.thing else "colour"

    @property
    def by_reference(self) -> str:
        """Which one the picture has to tell."""
        return "colour" if self.words == self.thing else "thing"


def held_out(thing: int, colour: int) -> bool:
    """Whether a pair is for the evaluation: of every thing and every colour some."""
    return (thing + colour) % HELD_OUT == 0


def wish_for(things: tuple[str, ...], i: int, j: int, told: str, lots: random.Random) -> Wish:
    """The i-th thing in the j-th colour, of which the words tell one attribute or both; the picture shows the other in
    a pair that is learned, or all of it."""
    thing, colour = things[i], TINTS[j]
    others = [k for k in range(len(things)) if k != i and not held_out(k, j)]
    tints = [k for k in range(len(TINTS)) if k != j and not held_out(i, k)]
    if told == "thing":
        return Wish(thing, colour, thing, (things[lots.choice(others)], colour))
    if told == "colour":
        return Wish(thing, colour, colour, (thing, TINTS[lots.choice(tints)]))
    return Wish(thing, colour, f"{colour} {thing}", (thing, colour))


def pairs(things: tuple[str, ...], learned: bool) -> list[tuple[int, int]]:
    every = itertools.product(range(len(things)), range(len(TINTS)))
    return [pair for pair in every if held_out(*pair) != learned]


def file_of(folder: Path, thing: str, colour: str, sample: int) -> Path:
    return folder / "pictures" / f"{colour} {thing} {sample}.png"


def draw_pictures(pipe: Any, folder: Path, things: tuple[str, ...], samples: int, steps: int) -> None:
    """Each thing in each colour, as often as asked for, where it is not there yet."""
    wanted = [(thing, colour, k) for thing in things for colour in TINTS for k in range(samples)]
    missing = [each for each in wanted if not file_of(folder, *each).exists()]
    for start in tqdm(range(0, len(missing), AT_ONCE), "pictures", disable=not missing):
        part = missing[start : start + AT_ONCE]
        seeds = [wanted.index(each) for each in part]
        made = draw(pipe, [f"{colour} {thing}" for thing, colour, _ in part], seeds, size_of(pipe), steps=steps,
                    guidance=EMBEDDED_GUIDANCE)  # fmt: skip
        for picture, each in zip(made, part, strict=True):
            save_png(picture, file_of(folder, *each), {})


def size_of(pipe: Any) -> tuple[int, int]:
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return side, side


def write_rows(folder: Path, things: tuple[str, ...], samples: int) -> None:
    """The rows to learn from, as a dataset in the pictures' folder."""
    lots, lines = random.Random(0), []
    for i, j in pairs(things, True):
        for k in range(samples):
            wish = wish_for(things, i, j, TOLD[k % len(TOLD)], lots)
            whole = wish.shown == (wish.thing, wish.colour)
            reference = file_of(folder, *wish.shown, k if whole else lots.randrange(samples))
            row = {"file_name": file_of(folder, wish.thing, wish.colour, k).name, "text": wish.words,
                   "reference_file_name": reference.name}  # fmt: skip
            lines.append(json.dumps(row))
    write_whole(folder / "pictures" / "metadata.jsonl", "\n".join(lines) + "\n")


def colour_in(picture: Image.Image) -> str:
    """The dominant colour of what stands on white."""
    rgb = np.asarray(picture.convert("RGB"))
    alpha = np.where(rgb.min(axis=2) < NOT_WHITE, 255, 0).astype(np.uint8)
    return colour_of(np.dstack([rgb, alpha]))


class Namer:
    """Which thing a picture shows: the nearest of the things' mean features over all of their pictures."""

    def __init__(self, encoder: ImageEncoder, folder: Path, things: tuple[str, ...], samples: int) -> None:
        self.encoder, self.things = encoder, things
        of_each = [
            [Image.open(file_of(folder, thing, colour, k)) for colour in TINTS for k in range(samples)]
            for thing in things
        ]
        self.means = torch.stack([self._vectors(pictures).mean(dim=0) for pictures in of_each])

    @torch.no_grad()
    def _vectors(self, pictures: list[Image.Image]) -> torch.Tensor:
        return torch.nn.functional.normalize(self.encoder.features(pictures).float(), dim=-1)

    def names(self, pictures: list[Image.Image]) -> list[str]:
        return [self.things[i] for i in (self._vectors(pictures) @ self.means.T).argmax(dim=1).tolist()]

    def likeness(self, pictures: list[Image.Image], references: list[Image.Image]) -> float:
        return float((self._vectors(pictures) * self._vectors(references)).sum(dim=1).mean())


def judge(pipe: Any, adapter: IPAdapter, namer: Namer, folder: Path, given: argparse.Namespace) -> dict[str, float]:
    """Likeness to a reference without words; and which attributes are kept where each side gives one."""
    lots = random.Random(1)
    asked = [wish_for(given.named, i, j, told, lots) for i, j in pairs(given.named, False) for told in TOLD[:2]]
    asked = lots.sample(asked, min(given.count or len(asked), len(asked)))
    references = [Image.open(file_of(folder, *wish.shown, 0)).convert("RGB") for wish in asked]

    def made(prompts: list[str]) -> list[Image.Image]:
        found: list[Image.Image] = []
        for start in tqdm(range(0, len(asked), AT_ONCE), "judged", leave=False):
            part = slice(start, start + AT_ONCE)
            unit = ImagePrompt(adapter, [[each] for each in references[part]], prompt=prompts[part])
            seeds = range(10_000 + start, 10_000 + start + len(prompts[part]))
            found += draw(pipe, prompts[part], list(seeds), size_of(pipe), [unit], steps=given.sampling_steps,
                          guidance=EMBEDDED_GUIDANCE)  # fmt: skip
        return found

    alone, together = made([""] * len(asked)), made([wish.words for wish in asked])
    kept = [
        {"thing": name == wish.thing, "colour": colour_in(picture) == wish.colour}
        for name, picture, wish in zip(namer.names(together), together, asked, strict=True)
    ]
    words = [right[wish.by_words] for right, wish in zip(kept, asked, strict=True)]
    shown = [right[wish.by_reference] for right, wish in zip(kept, asked, strict=True)]
    both = [all(right.values()) for right in kept]
    return {"likeness": namer.likeness(alone, references), "words": float(np.mean(words)),
            "reference": float(np.mean(shown)), "both": float(np.mean(both)), "count": len(asked)}  # fmt: skip


def measure(name: str, pipe: Any, namer: Namer, given: argparse.Namespace) -> dict[str, float]:
    """Train a projector, unless that was done, and judge it."""
    folder, out = Path(given.out), Path(given.out) / name
    figures = out / "projector.json"
    settings = {"steps": given.steps, "asked": given.count, "sampling_steps": given.sampling_steps}
    if figures.exists() and settings.items() <= (found := json.loads(figures.read_text())).items():
        return dict(found)
    flags = ["ip-adapter", "--data", folder / "pictures", "--out", out, "--projector", name, "--steps", given.steps,
             "--batch", given.batch, "--tokens", given.tokens, "--depth", given.depth, "--heads", given.heads,
             "--rate", given.rate, "--held-out", 0, "--validate-every", 0, "--no-buckets", "--cache",
             folder / "cache"]  # fmt: skip
    train(from_flags([str(flag) for flag in flags]))
    adapter = IPAdapter.from_pretrained(out)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    speeds = [line["pictures_per_second"] for line in lines if "pictures_per_second" in line]
    parameters = sum(p.numel() for p in adapter.image_proj.parameters())
    found = settings | {"parameters": parameters, "speed": float(np.median(speeds))}
    found |= judge(pipe, adapter, namer, folder, given)
    write_whole(figures, json.dumps(found, indent=1))
    return found


def table(rows: dict[str, dict[str, float]]) -> str:
    lines = ["| projector | parameters | pictures/s | likeness | words kept | reference kept | both |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, row in rows.items():
        shares = " | ".join(f"{row[column]:.2f}" for column in ("likeness", "words", "reference", "both"))
        lines.append(f"| {name} | {row['parameters'] / 1e6:.2f} M | {row['speed']:.1f} | {shares} |")
    return "\n".join(lines)


def options() -> argparse.Namespace:
    flags = argparse.ArgumentParser(prog="python -m benchmarks.projectors", description=(__doc__ or "").split("\n")[0])
    flags.add_argument("--out", required=True, help="folder for everything")
    flags.add_argument("--projectors", nargs="*", default=[name for name in PROJECTORS if name != "video"],
                       choices=[name for name in PROJECTORS if name != "video"], metavar="NAME",
                       help="left out, all but video, which learns from clips")  # fmt: skip
    flags.add_argument("--steps", type=int, default=4000, help="of training, each")
    flags.add_argument("--batch", type=int, default=16)
    flags.add_argument("--rate", type=float, default=3e-4)
    flags.add_argument("--tokens", type=int, default=16)
    flags.add_argument("--depth", type=int, default=2)
    flags.add_argument("--heads", type=int, default=3, help="of 64 channels each")
    flags.add_argument("--things", type=int, default=len(THINGS), choices=range(3, len(THINGS) + 1), metavar="N",
                       help=f"of {len(THINGS)}, in {len(TINTS)} colours")  # fmt: skip
    flags.add_argument("--samples", type=int, default=6, help="pictures of each pair, at least 3")
    flags.add_argument("--count", type=int, default=None, help="wishes judged; left out, all that are held out")
    flags.add_argument("--sampling-steps", type=int, default=20, help="for each picture")
    given = flags.parse_args()
    given.named = THINGS[: given.things]
    return given


def main() -> None:
    given = options()
    folder = Path(given.out)
    pipe = load_pipeline("embedded", device="cpu", dtype="float32")
    draw_pictures(pipe, folder, given.named, given.samples, given.sampling_steps)
    write_rows(folder, given.named, given.samples)
    namer = Namer(ImageEncoder(pipe.image_encoder, pipe.feature_extractor), folder, given.named, given.samples)
    rows = {name: measure(name, pipe, namer, given) for name in given.projectors}
    print(table(rows))


if __name__ == "__main__":
    main()
