"""Pictures and words for the embedded model: npm packages in, cached uint8 tensors and captions out.

A *concept* is one emoji (a code point sequence) with a label and tags; a *picture* shows a concept in one style.
All pictures are straight-alpha RGBA at 64 × 64, so a background, a mask and a contour are there for free.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import random
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

log = logging.getLogger(__name__)

SIZE = 64
SEED = 20

# npm package → version. The style's name is the key of STYLES below.
PACKAGES = {
    "@lobehub/fluent-emoji-3d": "1.1.0",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/fluent-emoji-high-contrast": "1.2.6",
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/twemoji": "1.2.5",
    "emojibase-data": "17.0.0",
}
STYLES = ("3d", "flat", "high-contrast", "noto", "twemoji")
STYLE_PACKAGES = {
    "flat": "@iconify-json/fluent-emoji-flat",
    "high-contrast": "@iconify-json/fluent-emoji-high-contrast",
    "noto": "@iconify-json/noto",
    "twemoji": "@iconify-json/twemoji",
}

# emojibase's subgroups to learn from: things with a shape of their own. People, flags, signs and clock faces stay out.
SUBGROUPS = (
    "heart face-costume animal-mammal animal-bird animal-amphibian animal-reptile animal-marine animal-bug "
    "plant-flower plant-other food-fruit food-vegetable food-prepared food-asian food-sweet drink dishware "
    "place-building transport-ground transport-water transport-air sky-weather sport game clothing "
    "musical-instrument lock tool "
    "household geometric"
).split()
# Learned first: the base sees these more often than clothing, tools and household.
CORE = frozenset(
    "heart face-costume animal-mammal animal-bird animal-amphibian animal-reptile animal-marine animal-bug "
    "plant-flower plant-other food-fruit food-vegetable food-prepared food-sweet drink "
    "transport-air sky-weather".split()
)
UNWANTED = re.compile(
    r"moon|medium|small square|small (blue|orange) diamond|button|post office|hotel|hospital|bank|school|station|"
    r"clock|Japanese|oncoming|stop sign|motorway|ticket|suit|playing|mahjong|joker|notebook|department|convenience|"
    r"woman|man’s|bikini|briefs|sari|thong|arrow$|with arrow|love letter|heart exclamation|decoration|diamond with|"
    r"wedding|foggy|cityscape|night|fireworks|water wave|arrival|departure|low battery|optical|dvd|trackball|wired|"
    r"locked with|unlocked|hourglass|two-hump|service dog|guide dog|closed umbrella|umbrella on|umbrella with|"
    r"sun behind (small|large|rain)|snowman without|bus stop|construction|minibus|trolleybus|railway|seat|derelict|"
    r"water closet|identification|level slider|control knobs|revolving|growing|beating|mending|triangle|poo|traffic",
    re.IGNORECASE,
)
# Words that the first demo, the documentation and the tests rely on: never held out.
PROTECTED = re.compile(
    r"apple|penguin|cactus|hamburger|heart|circle|square|diamond|^dog|^cat|fox|butterfly|rose|^fish|pizza|rocket|"
    r"banana|owl|^house$|evergreen|star|sun$|^bird$|tiger|^lion|panda|frog|automobile|mushroom|strawberry",
    re.IGNORECASE,
)
HELD_OUT_SHARE = 12  # one in so many of the other concepts is kept out of all training

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 40, 44),
    "orange": (245, 130, 30),
    "yellow": (250, 205, 45),
    "green": (50, 165, 65),
    "blue": (40, 115, 225),
    "purple": (135, 70, 205),
    "pink": (245, 120, 175),
    "brown": (130, 80, 45),
}
GREYS = ("black", "grey", "white")


@dataclass(frozen=True)
class Concept:
    """One thing that can be drawn: what it is called and whether training may see it."""

    code: str
    label: str
    tags: tuple[str, ...]
    colour: str
    held_out: bool
    subgroup: str = ""

    @property
    def weight(self) -> float:
        """How often training draws this concept: what people ask for first comes three times as often."""
        return 1.0 if self.subgroup in CORE else 0.33


@dataclass
class Pictures:
    """All pictures: ``rgba`` (N, 4, 64, 64) uint8; ``concept`` and ``style`` (N,) index ``concepts`` and STYLES."""

    rgba: Tensor
    concept: Tensor
    style: Tensor
    concepts: list[Concept]

    def of(self, style: str, held_out: bool = False) -> Tensor:
        """Indices of the pictures in one style, either of the training or of the held-out concepts."""
        held = torch.tensor([c.held_out for c in self.concepts])[self.concept]
        return ((self.style == STYLES.index(style)) & (held == held_out)).nonzero()[:, 0]

    def training(self) -> Tensor:
        """Indices of all pictures of training concepts, any style but the black-and-white one."""
        held = torch.tensor([c.held_out for c in self.concepts])[self.concept]
        return (~held & (self.style != STYLES.index("high-contrast"))).nonzero()[:, 0]


# ---- packages


def fetch(package: str, version: str, folder: Path) -> Path:
    """The package's tarball in ``folder``, fetched with ``npm pack`` when it is not there yet."""
    tarball = folder / f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if tarball.exists():
        return tarball
    if shutil.which("npm") is None:
        raise FileNotFoundError(
            f"npm is not installed, so {package}@{version} cannot be fetched; "
            f"install Node.js, or put {tarball.name} into {folder}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    log.info("fetching %s@%s", package, version)
    done = subprocess.run(["npm", "pack", f"{package}@{version}"], cwd=folder, capture_output=True, text=True)
    if done.returncode or not tarball.exists():
        raise RuntimeError(f"npm pack {package}@{version} failed: {done.stderr.strip().splitlines()[-1:]}")
    return tarball


def member(tarball: Path, name: str) -> Any:
    """A JSON file of an npm tarball, parsed."""
    with tarfile.open(tarball) as archive:
        file = archive.extractfile(f"package/{name}")
        assert file is not None
        return json.load(file)


def bare(code: str) -> str:
    """A code point sequence without variation selectors: the key that all packages agree on."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


# ---- pictures


def shrink(picture: Image.Image, size: int = SIZE) -> np.ndarray:
    """An RGBA picture as (size, size, 4) uint8; Pillow weighs colours by alpha, so no fringe appears."""
    return np.asarray(picture.convert("RGBA").resize((size, size), Image.Resampling.BOX, reducing_gap=None))


def rasterise(icon: dict[str, Any], width: float, height: float, size: int = SIZE) -> np.ndarray:
    """An iconify icon as (size, size, 4) uint8; the drawing's ``currentColor`` is black."""
    import resvg_py

    w, h = icon.get("width", width), icon.get("height", height)
    body = icon["body"].replace("currentColor", "#000")
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = f'<svg {names} viewBox="0 0 {w} {h}">{body}</svg>'
    data = resvg_py.svg_to_bytes(svg_string=svg, width=2 * size, height=2 * size)
    return shrink(Image.open(io.BytesIO(bytes(data))), size)


def colour_of(rgba: np.ndarray) -> str:
    """A picture's dominant colour, by vote of its opaque pixels; (64, 64, 4) uint8 → one of COLOURS or GREYS."""
    hsv = cv2.cvtColor(np.ascontiguousarray(rgba[..., :3]), cv2.COLOR_RGB2HSV)[rgba[..., 3] > 127].astype(int)
    if not len(hsv):
        return "white"
    hue, saturation, value = hsv[:, 0] * 2, hsv[:, 1], hsv[:, 2]
    bins = np.select(
        [
            value < 60,
            (saturation < 45) & (value > 200),
            saturation < 45,
            ((hue < 45) | (hue >= 340)) & (value < 170) & (saturation < 200),
            (hue < 12) | (hue >= 345),
            hue < 38,
            hue < 68,
            hue < 165,
            hue < 255,
            hue < 300,
        ],
        ["black", "white", "grey", "brown", "red", "orange", "yellow", "green", "blue", "purple"],
        default="pink",
    )
    names, votes = np.unique(bins, return_counts=True)
    return str(names[votes.argmax()])


def choose(folder: Path) -> list[tuple[Concept, dict[str, str]]]:
    """The concepts to learn, each with its file or icon name per style: those drawn in every style and in SUBGROUPS."""
    tarballs = {name: fetch(name, version, folder) for name, version in PACKAGES.items()}
    with tarfile.open(tarballs["@lobehub/fluent-emoji-3d"]) as archive:
        names = [n for n in archive.getnames() if n.endswith(".webp")]
    files = {"3d": {bare(Path(n).stem): n for n in names}}
    for style, package in STYLE_PACKAGES.items():
        files[style] = {bare(code): name for code, name in member(tarballs[package], "chars.json").items()}
    subgroups = member(tarballs["emojibase-data"], "meta/groups.json")["subgroups"]
    chosen = []
    for entry in member(tarballs["emojibase-data"], "en/data.json"):
        code, label = bare(entry["hexcode"]), entry["label"]
        subgroup = subgroups.get(str(entry.get("subgroup")), "")
        wanted = subgroup in SUBGROUPS and not UNWANTED.search(label)
        if not wanted or any(code not in style for style in files.values()):
            continue
        lot = int(hashlib.sha1(code.encode()).hexdigest(), 16) % HELD_OUT_SHARE
        held_out = lot == 0 and not PROTECTED.search(label)
        concept = Concept(code, label.lower(), tuple(t.lower() for t in entry.get("tags", ())), "", held_out, subgroup)
        chosen.append((concept, {style: table[code] for style, table in files.items()}))
    return chosen


def build(folder: Path) -> Pictures:
    """Fetch the packages and draw every chosen concept in every style."""
    chosen = choose(folder)
    drawings: dict[str, Callable[[str], np.ndarray]] = {}
    with tarfile.open(fetch("@lobehub/fluent-emoji-3d", PACKAGES["@lobehub/fluent-emoji-3d"], folder)) as archive:
        wanted = {names["3d"] for _, names in chosen}
        webp = {m.name: archive.extractfile(m).read() for m in archive if m.name in wanted}  # type: ignore[union-attr]
    drawings["3d"] = lambda name: shrink(Image.open(io.BytesIO(webp[name])))
    for style, package in STYLE_PACKAGES.items():
        icons = member(fetch(package, PACKAGES[package], folder), "icons.json")
        table, w, h = icons["icons"], icons.get("width", 16), icons.get("height", 16)
        drawings[style] = lambda name, table=table, w=w, h=h: rasterise(table[name], w, h)  # type: ignore[misc]

    jobs = [(i, s, names[style]) for i, (_, names) in enumerate(chosen) for s, style in enumerate(STYLES)]
    with ThreadPoolExecutor(2) as pool:
        drawn = list(
            tqdm(pool.map(lambda job: drawings[STYLES[job[1]]](job[2]), jobs), total=len(jobs), desc="drawing")
        )
    concepts = []
    for i, (c, _) in enumerate(chosen):
        colour = colour_of(drawn[i * len(STYLES)])
        concepts.append(Concept(c.code, c.label, c.tags, colour, c.held_out, c.subgroup))
    return Pictures(
        rgba=torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous(),
        concept=torch.tensor([i for i, _, _ in jobs]),
        style=torch.tensor([s for _, s, _ in jobs]),
        concepts=concepts,
    )


def load(cache: Path) -> Pictures:
    """The pictures, from ``cache/data.pt`` when they are there, else drawn now and kept."""
    path = cache / "data.pt"
    if not path.exists():
        pictures = build(cache / "packages")
        cache.mkdir(parents=True, exist_ok=True)
        save(pictures, path)
    raw = torch.load(path, weights_only=True)
    concepts = [Concept(c[0], c[1], tuple(c[2]), *c[3:]) for c in raw["concepts"]]
    return Pictures(
        raw["rgba"],
        raw["concept"],
        raw["style"],
        concepts,
    )


def save(pictures: Pictures, path: Path) -> None:
    """Write the pictures as plain tensors, strings and lists (loadable with ``weights_only``)."""
    concepts = [[c.code, c.label, list(c.tags), c.colour, c.held_out, c.subgroup] for c in pictures.concepts]
    torch.save(
        {"rgba": pictures.rgba, "concept": pictures.concept, "style": pictures.style, "concepts": concepts}, path
    )


# ---- from RGBA to training


def on_white(rgba: Tensor) -> Tensor:
    """(B, 4, H, W) uint8 → (B, 3, H, W) float in [−1, 1], composed over white."""
    x = rgba.float() / 255
    rgb, alpha = x[:, :3], x[:, 3:]
    return (rgb * alpha + 1 - alpha) * 2 - 1


def recolour(rgba: Tensor, colour: str) -> Tensor:
    """The same pictures in one colour: lightness kept (compressed), hue replaced. (B, 4, H, W) uint8 → the same.

    This is what lets words such as "red" combine with any concept: the colour never comes with the drawing's own hue.
    """
    rgb = rgba[:, :3].float() / 255
    target = torch.tensor(COLOURS[colour]).float().view(1, 3, 1, 1) / 255
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    lightness = 0.12 + 0.62 * (rgb * weights).sum(1, keepdim=True)
    dark = target * (2 * lightness).clamp(max=1)
    tinted = dark + (1 - target) * (2 * lightness - 1).clamp(min=0)
    mixed = (0.88 * tinted + 0.12 * rgb).clamp(0, 1) * 255
    return torch.cat([mixed.round().to(torch.uint8), rgba[:, 3:]], 1)


def warp(rgba: Tensor, rng: random.Random) -> Tensor:
    """One picture (4, H, W) uint8 under a random flip, turn, scale and shift: a drawing not seen before."""
    size = rgba.shape[-1]
    angle, scale = rng.uniform(-18, 18), rng.uniform(0.72, 1.05)
    stretch = rng.uniform(0.85, 1.15)
    matrix = cv2.getRotationMatrix2D((size / 2 - 0.5, size / 2 - 0.5), angle, scale)
    matrix[:, 0] *= stretch
    shift = 5 * size / 64
    matrix[:, 2] += [(1 - stretch) * size / 2 + rng.uniform(-shift, shift), rng.uniform(-shift, shift)]
    x = rgba.permute(1, 2, 0).numpy().astype(np.float32)
    x[..., :3] *= x[..., 3:] / 255
    x = cv2.warpAffine(x, matrix, (size, size), flags=cv2.INTER_AREA)
    x[..., :3] *= 255 / np.maximum(x[..., 3:], 1)
    out = torch.from_numpy(x.clip(0, 255).round().astype(np.uint8)).permute(2, 0, 1)
    return out.flip(-1) if rng.random() < 0.5 else out


def edges(rgb: np.ndarray, low: int = 60, high: int = 140) -> np.ndarray:
    """Canny edges, white on black: (H, W, 3) uint8 → (H, W) uint8 of 0 and 255, lines one pixel wide."""
    return cv2.Canny(np.ascontiguousarray(rgb), low, high, L2gradient=True)


def to_uint8(x: Tensor) -> np.ndarray:
    """One picture (3, H, W) in [−1, 1] → (H, W, 3) uint8."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


def line_art(rgba: Tensor, rng: random.Random | None = None) -> Tensor:
    """White lines on black for one picture: (4, H, W) uint8 → (3, H, W) float in [0, 1].

    Without ``rng`` the plain, reproducible drawing: Canny edges of the picture and of its contour. With ``rng`` what a
    user may bring instead: other thresholds, contours alone, thicker, softer, broken or faint lines.
    """
    rgb = to_uint8(on_white(rgba[None])[0])
    contour = cv2.Canny(np.ascontiguousarray(rgba[3].numpy()), 100, 200)
    if rng is None:
        lines = np.maximum(edges(rgb), contour)
        return torch.from_numpy(lines).float().div(255).expand(3, -1, -1)
    low = rng.randint(25, 110)
    lines = contour if rng.random() < 0.1 else np.maximum(edges(rgb, low, low * 2 + 20), contour)
    if rng.random() < 0.35:
        lines = cv2.dilate(lines, np.ones((2, 2), np.uint8))
    x = lines.astype(np.float32) / 255
    if rng.random() < 0.15:  # broken lines
        hole = cv2.resize(
            np.random.RandomState(rng.randrange(2**31)).rand(8, 8), lines.shape[::-1], interpolation=cv2.INTER_LINEAR
        )
        x = x * (hole > 0.3)
    if rng.random() < 0.4:
        x = cv2.GaussianBlur(x, (0, 0), rng.uniform(0.35, 0.8))
        x = x / max(float(x.max()), 1e-3)
    return torch.from_numpy(np.clip(x * rng.uniform(0.8, 1.1), 0, 1).astype(np.float32)).expand(3, -1, -1)


# ---- captions


def caption(concept: Concept, rng: random.Random, colour: str | None = None) -> str:
    """Words for a picture of ``concept``; ``colour`` where it was recoloured, so that the words must say so."""
    words = concept.label
    named = [w for w in words.split() if w in COLOURS or w in GREYS]
    if colour:
        words = re.sub(rf"\b{named[0]}\b", colour, words) if named else f"{colour} {words}"
    elif not named and rng.random() < 0.25:
        words = f"{concept.colour} {words}"
    if rng.random() < 0.3:
        words = ("an " if words[0] in "aeiou" else "a ") + words
    if concept.tags and rng.random() < 0.4:
        own = [t for t in concept.tags if not any(c in t.split() for c in COLOURS)]
        words = ", ".join([words, *rng.sample(own, min(len(own), rng.randint(1, 3)))])
    return words


class UnknownWords:
    """Names that nothing has, put together from short ``pieces`` of words.

    People ask for more than the few hundred things that this model knows. Trained on such names with any picture, it
    draws some thing in the colour that they say; untrained, it makes blotches of them.
    """

    def __init__(self, pieces: Iterable[str], concepts: Sequence[Concept]) -> None:
        self.pieces = sorted(pieces)
        self.known = {word for c in concepts for words in (c.label, *c.tags) for word in words.split()}

    def draw(self, rng: random.Random, colour: str) -> str:
        """One or two names, half of the time after ``colour``."""
        names = [self._name(rng) for _ in range(rng.randint(1, 2))]
        return " ".join([colour, *names] if rng.random() < 0.5 else names)

    def _name(self, rng: random.Random) -> str:
        while (name := "".join(rng.choices(self.pieces, k=rng.randint(1, 3)))) in self.known:
            pass
        return name


def corpus(pictures: Pictures, copies: int = 20) -> list[str]:
    """Captions of all training concepts, for the tokenizer."""
    rng = random.Random(SEED)
    known = [c for c in pictures.concepts if not c.held_out]
    lines = [caption(c, rng, rng.choice([None, None, *COLOURS])) for c in known for _ in range(copies)]
    return lines + [
        f"a picture of a {colour} thing, drawing, emoji, icon, photo, on a white background" for colour in COLOURS
    ]


def split_counts(pictures: Pictures) -> tuple[int, int]:
    """How many concepts are trained on, and how many are held out."""
    held = sum(c.held_out for c in pictures.concepts)
    return len(pictures.concepts) - held, held


def export(pictures: Pictures, folder: Path, copies: int = 8) -> None:
    """Write the 3D pictures as folders that ``mahlstick train`` and ``mahlstick evaluate`` read.

    ``folder/learn``: each concept as it is and ``copies`` of it warped, one in four recoloured. ``folder/unseen``: the
    held-out concepts as they are.
    """
    rng = random.Random(SEED)
    for name, held_out, count in (("learn", False, copies), ("unseen", True, 0)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        rows = []
        for i in tqdm(pictures.of("3d", held_out=held_out).tolist(), desc=name):
            concept = pictures.concepts[int(pictures.concept[i])]
            for copy in range(count + 1):
                rgba = warp(pictures.rgba[i], rng) if copy else pictures.rgba[i]
                colour = rng.choice(list(COLOURS)) if copy and rng.random() < 0.25 else None
                rgba = recolour(rgba[None], colour)[0] if colour else rgba
                file = f"{concept.code}-{copy}.png"
                Image.fromarray(to_uint8(on_white(rgba[None])[0])).save(folder / name / file)
                rows.append({"file_name": file, "text": caption(concept, rng, colour) if count else concept.label})
        (folder / name / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
