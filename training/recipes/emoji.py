"""Emoji in six styles as folders that ``mahlstick train`` reads, at 128 px.

A *concept* is one emoji with its words, a *style* one artist's hand, a *pair* both together. Kept out of all training
are whole concepts, and pairs of a known concept with a style that it is never shown in.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mahlstick.annotators import annotate
from mahlstick.training.embedded import data
from mahlstick.training.embedded.data import Concept

SIZE = 128
SHADED = "3d"  # the style that words without a style mean
LINES = "high-contrast"

# style → npm package with its drawings; the shaded one has pictures, the others are vectors
PACKAGES = {
    "gradient": "@iconify-json/fluent-emoji",
    "flat": "@iconify-json/fluent-emoji-flat",
    LINES: "@iconify-json/fluent-emoji-high-contrast",
    "noto": "@iconify-json/noto",
    "twemoji": "@iconify-json/twemoji",
}
VERSIONS = data.PACKAGES | {"@iconify-json/fluent-emoji": "1.2.7"}
STYLES = (SHADED, *PACKAGES)

# The word for a style, where it is not its name.
CALLED = {LINES: "black and white"}
# How often a control picture to learn from is of a kind: a drawing as people bring it, or what the annotator makes.
CONTROLS = {"drawing": 0.3, "canny": 0.25, "lineart": 0.1, "scribble": 0.1, "color": 0.15, "mask": 0.1}
HELD_OUT_PAIRS = 8  # of a known concept in another style than the shaded one: one in so many
SYLLABLES = tuple(f"{consonant}{vowel}" for consonant in "bdfgklmnprstvz" for vowel in "aeiou")


@dataclass
class Atlas:
    """All drawings: ``rgba`` (concepts, styles, 4, 128, 128) uint8, the colours not multiplied by alpha."""

    rgba: Tensor
    concepts: list[Concept]

    def held_out(self, concept: int, style: str) -> bool:
        """Whether no training may see this pair."""
        known = self.concepts[concept]
        if known.held_out or style == SHADED:
            return known.held_out
        return int(hashlib.sha1(f"{known.code} {style}".encode()).hexdigest(), 16) % HELD_OUT_PAIRS == 0

    def drawing(self, concept: int, style: str) -> Tensor:
        """(4, 128, 128) uint8."""
        return self.rgba[concept, STYLES.index(style)]

    def entry(self, concept: int, style: str) -> Concept:
        """The concept, with the colour that it has in this style."""
        return replace(
            self.concepts[concept], colour=data.colour_of(self.drawing(concept, style).permute(1, 2, 0).numpy())
        )

    def pairs(self, held_out: bool) -> list[tuple[int, str]]:
        """Those to train on, or those kept out of it."""
        every = product(range(len(self.concepts)), STYLES)
        return [(concept, style) for concept, style in every if self.held_out(concept, style) == held_out]

    def styles(self) -> dict[int, list[str]]:
        """For each known concept the styles that training may show it in."""
        found: dict[int, list[str]] = {}
        for concept, style in self.pairs(held_out=False):
            found.setdefault(concept, []).append(style)
        return found


def load(cache: Path) -> Atlas:
    """The atlas of ``cache``; drawn now from the packages, which npm fetches, where there is none yet."""
    path = cache / "atlas.pt"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        atlas = draw(cache / "packages")
        facts = [[c.code, c.label, list(c.tags), c.colour, c.held_out, c.subgroup] for c in atlas.concepts]
        torch.save({"rgba": atlas.rgba, "concepts": facts}, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
    raw = torch.load(path, weights_only=True)
    return Atlas(raw["rgba"], [Concept(c[0], c[1], tuple(c[2]), *c[3:]) for c in raw["concepts"]])


def draw(packages: Path) -> Atlas:
    """Every chosen concept in every style."""
    for package, version in VERSIONS.items():
        data.fetch(package, version, packages)
    chosen = data.choose(packages)
    painters: dict[str, Callable[[dict[str, str]], np.ndarray]] = {SHADED: _shaded(packages)}
    for style, package in PACKAGES.items():
        painters[style] = _vector(data.fetch(package, VERSIONS[package], packages), style)
    jobs = [(names, style) for _, names in chosen for style in STYLES]
    with ThreadPoolExecutor(2) as pool:
        drawn = list(tqdm(pool.map(lambda job: painters[job[1]](job[0]), jobs), "drawing", len(jobs)))
    rgba = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).unflatten(0, (-1, len(STYLES))).contiguous()
    concepts = []
    for (c, _), drawings in zip(chosen, rgba, strict=True):
        colour = data.colour_of(drawings[0].permute(1, 2, 0).numpy())
        concepts.append(Concept(c.code, c.label, c.tags, colour, c.held_out, c.subgroup))
    return Atlas(rgba, concepts)


def _shaded(packages: Path) -> Callable[[dict[str, str]], np.ndarray]:
    package = "@lobehub/fluent-emoji-3d"
    with tarfile.open(data.fetch(package, VERSIONS[package], packages)) as archive:
        members = (member for member in archive if member.name.endswith(".webp"))
        files = {m.name: archive.extractfile(m).read() for m in members}  # type: ignore[union-attr]
    return lambda names: data.shrink(Image.open(io.BytesIO(files[names[SHADED]])), SIZE)


def _vector(tarball: Path, style: str) -> Callable[[dict[str, str]], np.ndarray]:
    icons = data.member(tarball, "icons.json")
    width, height = icons.get("width", 16), icons.get("height", 16)
    # The gradient set's own table of code points is empty; its names are those of the flat set.
    name_of = "flat" if style == "gradient" else style
    return lambda names: data.rasterise(icons["icons"][names[name_of]], width, height, SIZE)


# ---- variants


@dataclass(frozen=True)
class Variant:
    """What becomes of a drawing: ``tint`` and ``ground`` are colours, the ``seed`` moves it, and None leaves it."""

    seed: int | None = None
    tint: str | None = None
    ground: str | None = None

    def place(self, rgba: Tensor) -> Tensor:
        """The drawing, moved: turned, scaled, shifted, stretched and perhaps mirrored."""
        return rgba if self.seed is None else data.warp(rgba, random.Random(self.seed))

    def paint(self, rgba: Tensor) -> np.ndarray:
        """The moved drawing on its ground: (4, H, W) → (H, W, 3) uint8."""
        rgba = self.place(rgba)
        if self.tint is not None:
            rgba = data.recolour(rgba[None], self.tint)[0]
        x = rgba.permute(1, 2, 0).numpy().astype(np.float32)
        ground = np.array((255, 255, 255) if self.ground is None else pale(self.ground), np.float32)
        alpha = x[..., 3:] / 255
        return np.asarray((x[..., :3] * alpha + ground * (1 - alpha)).round(), np.uint8)


def pale(colour: str) -> tuple[int, int, int]:
    """A ground's colour: half way to white."""
    red, green, blue = data.COLOURS[colour]
    return (red + 255) // 2, (green + 255) // 2, (blue + 255) // 2


def variants(style: str, rng: random.Random, copies: int) -> Iterator[Variant]:
    """The drawing as it is, then moved ones: one in four tinted, one in eight on a coloured ground."""
    yield Variant()
    colours = list(data.COLOURS)
    for _ in range(copies):
        tint = rng.choice(colours) if style != LINES and rng.random() < 0.25 else None
        ground = rng.choice(colours) if rng.random() < 0.125 else None
        yield Variant(rng.randrange(2**31), tint, ground)


def copies_of(concept: Concept, style: str) -> int:
    """How many moved copies of a pair are written: most of what people ask for first."""
    return (12 if style == SHADED else 3) if concept.subgroup in data.CORE else (5 if style == SHADED else 1)


def words(concept: Concept, style: str, variant: Variant, rng: random.Random) -> str:
    """A caption: the thing, its style, and the colours where they are not the thing's own."""
    return on_ground(in_style(data.caption(concept, rng, variant.tint), style, rng), variant)


def on_ground(said: str, variant: Variant) -> str:
    """The words with those for the ground."""
    return said if variant.ground is None else f"{said} on a {variant.ground} background"


def in_style(said: str, style: str, rng: random.Random) -> str:
    """The words with the style's before or after them; half of those for the shaded one do without."""
    called = CALLED.get(style, style)
    if style == SHADED and rng.random() < 0.5:
        return said
    if rng.random() < 0.5:
        return f"{said}, {called} style"
    article, bare = re.fullmatch("(an? )?(.*)", said).groups()  # type: ignore[union-attr]
    return f"{'a ' if article else ''}{called} {bare}"


def line_art(atlas: Atlas, concept: int, style: str, variant: Variant, rng: random.Random | None = None) -> np.ndarray:
    """White lines on black, (H, W, 3) uint8: of the drawing and its contour, or one time in three of the
    black-and-white glyph where the style shows the same drawing. Without ``rng`` the plain lines of the drawing."""
    same = style in (SHADED, "gradient", "flat")
    glyph = rng is not None and same and rng.random() < 0.33
    glyph = glyph and not atlas.held_out(concept, LINES)
    lines = data.line_art(variant.place(atlas.drawing(concept, LINES if glyph else style)), rng)
    return np.asarray((lines.permute(1, 2, 0).numpy() * 255).round(), np.uint8)


def control(
    atlas: Atlas, concept: int, style: str, variant: Variant, picture: np.ndarray, rng: random.Random
) -> np.ndarray:
    """What one net for all controls learns to follow, (H, W, 3) uint8: one of CONTROLS, by lot."""
    (kind,) = rng.choices(list(CONTROLS), list(CONTROLS.values()))
    if kind == "drawing":
        return line_art(atlas, concept, style, variant, rng)
    if kind == "mask":
        return mask(atlas.drawing(concept, style), variant)
    low = rng.randint(40, 120)
    options = {"canny": {"low": low, "high": 2 * low}, "color": {"cells": rng.choice((8, 8, 16))}}
    return np.asarray(annotate(kind, Image.fromarray(picture), **options.get(kind, {})))


def mask(rgba: Tensor, variant: Variant) -> np.ndarray:
    """White where the drawing is, small gaps closed: (4, H, W) → (H, W, 3) uint8."""
    alpha = (variant.place(rgba)[3].numpy() > 127).astype(np.uint8) * 255
    return np.stack([cv2.morphologyEx(alpha, cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))] * 3, axis=-1)


# ---- folders


class _Folder:
    """A folder of pictures with their captions, and beside it one for each kind of partner; seen when it is whole."""

    def __init__(self, below: Path, name: str, partners: tuple[str, ...]) -> None:
        self.below, self.rows = below, list[str]()
        self.names = {"": name, **{partner: f"{name}-{partner}" for partner in partners}}
        for folder in self.names.values():
            shutil.rmtree(below / f".{folder}", ignore_errors=True)
            (below / f".{folder}").mkdir(parents=True)

    def add(
        self, name: str, picture: np.ndarray, captions: list[str], partners: Mapping[str, np.ndarray], **facts: str
    ) -> None:
        """Write a picture and its partners, all under one name; ``facts`` stand beside the captions, for the judges."""
        for partner, image in {"": picture, **partners}.items():
            Image.fromarray(image).save(self.below / f".{self.names[partner]}" / f"{name}.png", compress_level=1)
        self.rows.append(json.dumps({"file_name": f"{name}.png", "text": captions, **facts}))

    def close(self) -> None:
        """Write the captions, and put everything in the place of what was there."""
        (self.below / f".{self.names['']}" / "metadata.jsonl").write_text("".join(f"{row}\n" for row in self.rows))
        for folder in self.names.values():
            shutil.rmtree(self.below / folder, ignore_errors=True)
            (self.below / f".{folder}").rename(self.below / folder)


def write(atlas: Atlas, folder: Path, seed: int = 20) -> None:
    """Folders of pictures with captions, and beside each what a control or a reference needs.

    ``learn`` all pairs to train on, with ``learn-control`` (see `control`) and ``learn-reference`` (the same concept,
    perhaps by another hand, moved, and tinted alike); ``unseen`` the shaded pictures of concepts that no training
    sees, with ``unseen-lineart``, ``unseen-glyph`` (outlines of the black-and-white glyphs) and ``unseen-mask``;
    ``pairs`` known concepts in a style that they were never shown in; ``seen`` each known concept in one of its styles,
    and ``colours`` fifty of them in a colour that they do not have.
    """
    _write_learn(atlas, folder, random.Random(seed))
    _write_unseen(atlas, folder)
    _write_seen(atlas, folder, random.Random(seed))


def _write_learn(atlas: Atlas, below: Path, rng: random.Random) -> None:
    strange = data.UnknownWords(SYLLABLES, atlas.concepts)
    folder, known = _Folder(below, "learn", ("control", "reference")), atlas.pairs(held_out=False)
    styles = atlas.styles()
    for concept, style in tqdm(known, "learn"):
        entry, drawing = atlas.entry(concept, style), atlas.drawing(concept, style)
        for number, variant in enumerate(variants(style, rng, copies_of(entry, style))):
            captions = [words(entry, style, variant, rng) for _ in range(4)]
            if number:  # a moved one is also drawn for a word that nothing is called
                unknown = in_style(strange.draw(rng, variant.tint or entry.colour), style, rng)
                captions[-1] = on_ground(unknown, variant)
            name, picture = f"{entry.code}-{style}-{number:02}", variant.paint(drawing)
            moved = Variant(rng.randrange(2**31), variant.tint)
            partners = {
                "control": control(atlas, concept, style, variant, picture, random.Random(name)),
                "reference": moved.paint(atlas.drawing(concept, rng.choice(styles[concept]))),
            }
            facts = {"concept": entry.label, "style": CALLED.get(style, style), "colour": variant.tint or entry.colour}
            folder.add(name, picture, captions, partners, **facts)
    folder.close()


def _write_unseen(atlas: Atlas, below: Path) -> None:
    concepts, pairs = _Folder(below, "unseen", ("lineart", "glyph", "mask")), _Folder(below, "pairs", ())
    plain = Variant()
    for concept, style in atlas.pairs(held_out=True):
        entry, drawing = atlas.entry(concept, style), atlas.drawing(concept, style)
        if not entry.held_out:
            pairs.add(f"{entry.code}-{style}", plain.paint(drawing), [asked(entry, style)], {})
        elif style == SHADED:
            partners = {
                "lineart": line_art(atlas, concept, style, plain),
                "glyph": np.stack([data.edges(plain.paint(atlas.drawing(concept, LINES)))] * 3, axis=-1),
                "mask": mask(drawing, plain),
            }
            concepts.add(entry.code, plain.paint(drawing), [entry.label], partners)
    concepts.close()
    pairs.close()


def _write_seen(atlas: Atlas, below: Path, rng: random.Random) -> None:
    seen, colours = _Folder(below, "seen", ()), _Folder(below, "colours", ())
    styles = atlas.styles()
    for concept, known in styles.items():
        style = rng.choice(known)
        entry, drawing = atlas.entry(concept, style), atlas.drawing(concept, style)
        seen.add(f"{entry.code}-{style}", Variant().paint(drawing), [asked(entry, style)], {})
    seen.close()
    plain = [c for c in styles if not set(atlas.concepts[c].label.split()) & {*data.COLOURS, *data.GREYS}]
    plain = [c for c in plain if atlas.concepts[c].subgroup in data.CORE]
    for concept in rng.sample(plain, min(50, len(plain))):
        entry = atlas.concepts[concept]
        tint = rng.choice([colour for colour in data.COLOURS if colour != entry.colour])
        picture = Variant(tint=tint).paint(atlas.drawing(concept, SHADED))
        colours.add(f"{entry.code}-{tint}", picture, [f"{tint} {entry.label}"], {})
    colours.close()


def asked(entry: Concept, style: str) -> str:
    """A plain prompt for a pair."""
    return f"{CALLED.get(style, style)} {entry.label}"
