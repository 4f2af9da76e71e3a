"""Emoji in six styles as folders that ``mahlstick train`` reads, at 128 px.

A *concept* is one emoji with its words, a *style* one artist's hand, a *pair* both together. Kept out of all training
are whole concepts, and pairs of a known concept with a style that it is never shown in.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mahlstick.annotators import annotate
from mahlstick.training.recipes import captions, drawings, packages
from mahlstick.training.recipes.captions import CALLED, asked
from mahlstick.training.recipes.packages import LINES, SHADED, STYLES, Concept

SIZE = 128
# How often a control picture to learn from is of a kind: a drawing as people bring it, or what the annotator makes.
CONTROLS = {"drawing": 0.3, "canny": 0.25, "lineart": 0.1, "scribble": 0.1, "color": 0.15, "mask": 0.1}
OFTEN, OFTEN_SHADED = 12, 20  # times that a base sees a drawing as it is for once that it sees a moved one
MANY = 2000  # held-out pictures for a distance of distributions
HELD_OUT_PAIRS = 8  # of a known concept in another style than the shaded one: one in so many


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
            self.concepts[concept], colour=drawings.colour_of(self.drawing(concept, style).permute(1, 2, 0).numpy())
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


def draw(folder: Path) -> Atlas:
    """Every chosen concept in every style, from the packages in ``folder``."""
    chosen = packages.choose(folder)
    painters = {style: _shaded(folder) if style == SHADED else _vector(folder, style) for style in STYLES}
    jobs = [(names, style) for _, names in chosen for style in STYLES]
    with ThreadPoolExecutor(2) as pool:
        drawn = list(tqdm(pool.map(lambda job: painters[job[1]](job[0][job[1]]), jobs), "drawing", len(jobs)))
    rgba = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).unflatten(0, (-1, len(STYLES))).contiguous()
    concepts = [
        replace(concept, colour=drawings.colour_of(shown[0].permute(1, 2, 0).numpy()))
        for (concept, _), shown in zip(chosen, rgba, strict=True)
    ]
    return Atlas(rgba, concepts)


def _shaded(folder: Path) -> Callable[[str], np.ndarray]:
    files = packages.shaded(folder)
    return lambda code: drawings.shrink(Image.open(io.BytesIO(files[code])), SIZE)


def _vector(folder: Path, style: str) -> Callable[[str], np.ndarray]:
    icons = packages.member(packages.fetch(packages.PACKAGES[style], folder), "icons.json")
    width, height = icons.get("width", 16), icons.get("height", 16)
    return lambda name: drawings.rasterise(icons["icons"][name], width, height, SIZE)


# ---- variants


@dataclass(frozen=True)
class Variant:
    """What becomes of a drawing: ``tint`` and ``ground`` are colours, the ``seed`` moves it, and None leaves it."""

    seed: int | None = None
    tint: str | None = None
    ground: str | None = None
    mirror: bool = True

    def place(self, rgba: Tensor) -> Tensor:
        """The drawing, moved: turned, scaled, shifted, stretched and perhaps mirrored."""
        return rgba if self.seed is None else drawings.warp(rgba, random.Random(self.seed), self.mirror)

    def paint(self, rgba: Tensor) -> np.ndarray:
        """The moved drawing on its ground: (4, H, W) → (H, W, 3) uint8."""
        rgba = self.place(rgba)
        if self.tint is not None:
            rgba = drawings.recolour(rgba[None], self.tint)[0]
        x = rgba.permute(1, 2, 0).numpy().astype(np.float32)
        ground = np.array((255, 255, 255) if self.ground is None else pale(self.ground), np.float32)
        alpha = x[..., 3:] / 255
        return np.asarray((x[..., :3] * alpha + ground * (1 - alpha)).round(), np.uint8)


def pale(colour: str) -> tuple[int, int, int]:
    """A ground's colour: half way to white."""
    red, green, blue = drawings.COLOURS[colour]
    return (red + 255) // 2, (green + 255) // 2, (blue + 255) // 2


def variants(concept: Concept, style: str, rng: random.Random, copies: int) -> Iterator[Variant]:
    """The drawing as it is, then moved ones: one in four tinted, one in eight on a coloured ground."""
    yield Variant()
    colours, mirror = list(drawings.COLOURS), not packages.ONE_WAY.search(concept.label)
    for _ in range(copies):
        tint = rng.choice(colours) if style != LINES and rng.random() < 0.25 else None
        ground = rng.choice(colours) if rng.random() < 0.125 else None
        yield Variant(rng.randrange(2**31), tint, ground, mirror)


def copies_of(concept: Concept, style: str) -> int:
    """How many moved copies of a pair are written: most of what people ask for first."""
    return (12 if style == SHADED else 6) if concept.subgroup in packages.CORE else (6 if style == SHADED else 3)


def line_art(atlas: Atlas, concept: int, style: str, variant: Variant, rng: random.Random | None = None) -> np.ndarray:
    """White lines on black, (H, W, 3) uint8: of the drawing and its contour, or one time in three of the
    black-and-white glyph where the style shows the same drawing. Without ``rng`` the plain lines of the drawing."""
    same = style in (SHADED, "gradient", "flat")
    glyph = rng is not None and same and rng.random() < 0.33
    glyph = glyph and not atlas.held_out(concept, LINES)
    lines = drawings.line_art(variant.place(atlas.drawing(concept, LINES if glyph else style)), rng)
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
        self, name: str, picture: np.ndarray, said: list[str], partners: Mapping[str, np.ndarray], **facts: str
    ) -> None:
        """Write a picture and its partners, all under one name; ``facts`` stand beside the captions, for the judges."""
        for partner, image in {"": picture, **partners}.items():
            Image.fromarray(image).save(self.below / f".{self.names[partner]}" / f"{name}.png", compress_level=1)
        self.rows.append(json.dumps({"file_name": f"{name}.png", "text": said, **facts}))

    def close(self) -> None:
        """Write the captions, and put everything in the place of what was there."""
        (self.below / f".{self.names['']}" / "metadata.jsonl").write_text("".join(f"{row}\n" for row in self.rows))
        for folder in self.names.values():
            shutil.rmtree(self.below / folder, ignore_errors=True)
            (self.below / f".{folder}").rename(self.below / folder)


def write(atlas: Atlas, folder: Path, seed: int = 20) -> None:
    """Folders of pictures with captions, and beside each what a control or a reference needs.

    ``learn`` all pairs to train on, with ``learn-control`` (see `control`) and ``learn-reference`` (the same concept,
    perhaps by another hand, moved, and tinted alike), and ``drawn`` and ``named``, the same for a base
    (see `write_drawn`) and for a CLIP and a captioner (see `write_named`);
    ``unseen`` the shaded pictures of concepts that no training sees, with ``unseen-lineart``, ``unseen-glyph``
    (outlines of the black-and-white glyphs) and ``unseen-mask``; ``pairs`` known concepts in a style that they were
    never shown in, and ``many`` MANY of them, moved as those to learn from; ``seen`` each known concept in one of its
    styles, with ``seen-other`` (another concept); and ``colours`` fifty of them in a colour that they do not have.
    """
    _write_learn(atlas, folder, random.Random(seed))
    write_drawn(folder)
    write_named(folder)
    _write_unseen(atlas, folder)
    _write_many(atlas, folder, random.Random(seed))
    _write_seen(atlas, folder, random.Random(seed))


def _write_learn(atlas: Atlas, below: Path, rng: random.Random) -> None:
    strange = captions.UnknownWords(atlas.concepts)
    folder, known = _Folder(below, "learn", ("control", "reference")), atlas.pairs(held_out=False)
    styles = atlas.styles()
    for concept, style in tqdm(known, "learn"):
        entry, drawing = atlas.entry(concept, style), atlas.drawing(concept, style)
        for number, variant in enumerate(variants(entry, style, rng, copies_of(entry, style))):
            said = [captions.words(entry, style, rng, variant.tint, variant.ground) for _ in range(4)]
            if number:  # a moved one is also drawn for a word that nothing is called
                unknown = captions.in_style(strange.draw(rng, variant.tint or entry.colour), style, rng)
                said[-1] = captions.on_ground(unknown, variant.ground)
            name, picture = f"{entry.code}-{style}-{number:02}", variant.paint(drawing)
            moved = Variant(rng.randrange(2**31), variant.tint, mirror=variant.mirror)
            partners = {
                "control": control(atlas, concept, style, variant, picture, random.Random(name)),
                "reference": moved.paint(atlas.drawing(concept, rng.choice(styles[concept]))),
            }
            facts = {"concept": entry.label, "style": CALLED.get(style, style), "colour": variant.tint or entry.colour}
            folder.add(name, picture, said, partners, **facts)
    folder.close()


def write_drawn(below: Path) -> None:
    """The folder ``drawn`` beside ``learn``: its pictures where they lie, a drawing as it is many times and a moved one
    once. For a base: what people ask for is the thing itself, and in ``learn`` one picture in seven shows it."""
    rows = _learned(below)
    for row in filter(is_plain, rows):
        row["repeats"] = OFTEN_SHADED if row["style"] == SHADED else OFTEN
    _write_rows(below, "drawn", rows)


def write_named(below: Path) -> None:
    """The folder ``named`` beside ``learn``: its pictures where they lie, without the captions in words that nothing is
    called. For a CLIP, which finds nothing in them, and a captioner, which must not learn to write them."""
    _write_rows(
        below, "named", [row | {"text": row["text"][: None if is_plain(row) else -1]} for row in _learned(below)]
    )


def _learned(below: Path) -> list[dict[str, Any]]:
    """The rows of ``learn``, for a folder beside it."""
    rows = [json.loads(line) for line in (below / "learn" / "metadata.jsonl").read_text().splitlines()]
    return [row | {"file_name": f"../learn/{row['file_name']}"} for row in rows]


def is_plain(row: Mapping[str, Any]) -> bool:
    """Whether a row of ``learn`` shows a drawing as it is."""
    return str(row["file_name"]).endswith("-00.png")


def _write_rows(below: Path, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    folder = _Folder(below, name, ())
    folder.rows = [json.dumps(row) for row in rows]
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
                "glyph": np.stack([drawings.edges(plain.paint(atlas.drawing(concept, LINES)))] * 3, axis=-1),
                "mask": mask(drawing, plain),
            }
            concepts.add(entry.code, plain.paint(drawing), [entry.label], partners)
    concepts.close()
    pairs.close()


def _write_many(atlas: Atlas, below: Path, rng: random.Random) -> None:
    many = _Folder(below, "many", ())
    pairs = [(c, style) for c, style in atlas.pairs(held_out=True) if not atlas.concepts[c].held_out]
    for number in range(MANY if pairs else 0):
        concept, style = pairs[number % len(pairs)]
        entry = atlas.entry(concept, style)
        _, variant = variants(entry, style, rng, 1)
        said = captions.words(entry, style, rng, variant.tint, variant.ground)
        many.add(f"{number:04}-{entry.code}-{style}", variant.paint(atlas.drawing(concept, style)), [said], {})
    many.close()


def _write_seen(atlas: Atlas, below: Path, rng: random.Random) -> None:
    seen, colours = _Folder(below, "seen", ("other",)), _Folder(below, "colours", ())
    styles = atlas.styles()
    for concept, known in styles.items():
        style, other = rng.choice(known), rng.choice([c for c in styles if c != concept])
        entry, picture = atlas.entry(concept, style), Variant().paint(atlas.drawing(concept, style))
        partners = {"other": Variant().paint(atlas.drawing(other, SHADED))}
        seen.add(f"{entry.code}-{style}", picture, [asked(entry, style)], partners)
    seen.close()
    plain = [c for c in styles if not set(atlas.concepts[c].label.split()) & {*drawings.COLOURS, *drawings.GREYS}]
    plain = [c for c in plain if atlas.concepts[c].subgroup in packages.CORE]
    for concept in rng.sample(plain, min(50, len(plain))):
        entry = atlas.concepts[concept]
        tint = rng.choice([colour for colour in drawings.COLOURS if colour != entry.colour])
        picture = Variant(tint=tint).paint(atlas.drawing(concept, SHADED))
        colours.add(f"{entry.code}-{tint}", picture, [f"{tint} {entry.label}"], {})
    colours.close()
