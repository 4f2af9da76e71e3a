"""Animated emoji as clips that ``mahlstick train motion`` reads: 128 px, eight frames a second, each on one ground.

They are the shaded style's drawings in motion, most of them three seconds that begin anew without a seam.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import random
import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mahlstick.training.checkpoint import write_whole
from mahlstick.training.recipes import captions, drawings, emoji, packages
from mahlstick.training.recipes.emoji import Variant
from mahlstick.training.recipes.packages import PROTECTED, SHADED, WORDS, Concept

log = logging.getLogger(__name__)

FOLDERS = ("learn", "held", "unseen")
RATE = 8  # frames a second
EVERY = 3  # of the packages' 24 frames a second
FRAMES = 24  # of a clip
STILL = 0.005  # mean change of neighbouring frames on white, in [0, 1], below which a clip hardly moves
COPIES = 2  # moved ones of a clip whose thing the base has learned, so that these are seen three times as often
HELD_OUT_SHARE = 10  # one concept in so many is held out, beside those that no picture to learn from shows


def write(cache: Path, known: Sequence[Concept]) -> None:
    """Folders of clips with captions in ``cache/clips``: ``learn``; ``held`` with things that the pictures to learn
    from show, and no clip of ``learn``; and ``unseen`` with things that neither shows. ``known``: the pictures'
    concepts.

    One package is fetched at a time, and removed when its clips are written; a run that was stopped goes on with the
    package that it was at.
    """
    made, folder = cache / ".clips", cache / "clips"
    concepts = {concept.code: concept for concept in known}
    entries = _entries(cache / "packages")
    for package in packages.CLIPS:
        part = made / f"{package.rpartition('-')[2]}.jsonl"
        if not part.exists():
            tarball = packages.fetch(package, cache / "packages")
            lines = [json.dumps(row) for row in _write_package(tarball, made, concepts, entries)]
            write_whole(part, "".join(f"{line}\n" for line in lines))
            tarball.unlink()
    parts = sorted(made.glob("*.jsonl"))
    rows = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
    for name in FOLDERS:
        inside = [row for row in rows if row["folder"] == name]
        (made / name / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in inside))
        log.info("%s: %d clips of %d things", name, len(inside), len({row["concept"] for row in inside}))
    for part in parts:
        part.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    made.rename(folder)


def _entries(folder: Path) -> dict[str, Concept]:
    """Every emoji's words, by its code."""
    data = packages.member(packages.fetch(WORDS, folder), "en/data.json")
    return {
        packages.bare(entry["hexcode"]): Concept(
            packages.bare(entry["hexcode"]), entry["label"].lower(), tuple(t.lower() for t in entry.get("tags", ())),
            "", False,
        )
        for entry in data
    }  # fmt: skip


def _write_package(
    tarball: Path, made: Path, known: Mapping[str, Concept], entries: Mapping[str, Concept]
) -> Iterator[dict[str, object]]:
    """Write the clips of a package; gives a row for each, with the folder in which it lies."""
    for name in FOLDERS:
        (made / name).mkdir(parents=True, exist_ok=True)
    left_out = 0
    for code, data in tqdm(animations(tarball), tarball.name):
        concept = known.get(code) or entries.get(code)
        if concept is None:
            continue
        frames = read(data)
        if frames is None or change(frames) < STILL:
            left_out += 1
            continue
        entry = replace(concept, colour=drawings.colour_of(frames[0].permute(1, 2, 0).numpy()))
        folder, rng = folder_of(entry, code in known), random.Random(code)
        copies = COPIES if folder == "learn" and code in known else 0
        for number, variant in enumerate(emoji.variants(entry, SHADED, rng, copies)):
            file, said = f"{code}-{number}.webp", [entry.label]
            if folder == "learn":
                said = [captions.words(entry, SHADED, rng, variant.tint, variant.ground) for _ in range(4)]
            save(frames, variant, made / folder / file)
            yield {"folder": folder, "file_name": file, "text": said, "concept": entry.label}
    log.info("%s: %d are left out, since they do not move or hardly", tarball.name, left_out)


def animations(tarball: Path) -> Iterator[tuple[str, bytes]]:
    """The package's animations by code point, those of a skin tone left out."""
    with tarfile.open(tarball) as archive:
        for member in archive:
            code = packages.bare(Path(member.name).stem)
            if member.name.endswith(".webp") and not packages.SKIN_TONE.search(code):
                file = archive.extractfile(member)
                assert file is not None
                yield code, file.read()


def read(data: bytes) -> Tensor | None:
    """(FRAMES, 4, 128, 128) uint8 at RATE, a shorter animation from its beginning again; None of a still picture."""
    with Image.open(io.BytesIO(data)) as picture:
        count = getattr(picture, "n_frames", 1)
        if count == 1:
            return None
        wanted = [i * EVERY % count for i in range(FRAMES)]
        drawn = {}
        for i in range(max(wanted) + 1):  # one after the other: each is a change of the one before
            picture.seek(i)
            if i in wanted:
                drawn[i] = drawings.shrink(picture, emoji.SIZE)
    return torch.from_numpy(np.stack([drawn[i] for i in wanted])).permute(0, 3, 1, 2)


def change(frames: Tensor) -> float:
    """The mean change of neighbouring frames (n, 4, H, W) on white, in [0, 1]."""
    return float(drawings.on_white(frames).diff(dim=0).abs().mean() / 2)


def folder_of(concept: Concept, known: bool) -> str:
    """Of FOLDERS that to which a concept's clips belong."""
    lot = int(hashlib.sha1(f"{concept.code} clip".encode()).hexdigest(), 16) % HELD_OUT_SHARE
    if concept.held_out or (lot == 0 and not known):
        return "unseen"
    return "held" if lot == 0 and not PROTECTED.search(concept.label) else "learn"


def save(frames: Tensor, variant: Variant, path: Path) -> None:
    """The frames, all moved and tinted alike, as a lossless animation."""
    painted = [Image.fromarray(variant.paint(frame)) for frame in frames]
    painted[0].save(
        path, save_all=True, append_images=painted[1:], duration=1000 // RATE, loop=0, lossless=True, quality=20,
        method=0,
    )  # fmt: skip
