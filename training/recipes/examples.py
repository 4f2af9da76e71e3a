"""The example inputs in assets/examples: line drawings, most by hand in coordinates, and references."""

from __future__ import annotations

import io
import json
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from mahlstick.training.recipes import packages

SIZE, FINE = 256, 4  # pixels of a side, and how much finer it is drawn before it is reduced
WIDTH = 4  # of a line: 2 pixels of the model's 128

# prompt → the drawing and the reference that go with it; the first four make the demo's contact sheet
ROWS = (
    ("red apple", "apple", "lotus"),
    ("penguin", "penguin", "gem-stone"),
    ("cactus", "cactus", "shamrock"),
    ("tropical fish", "fish", "lollipop"),
    ("green tree", "tree", "shamrock"),
    ("white bird", "dove", "gem-stone"),
)
UNSEEN = ("dove",)  # drawings taken from held-out pictures


class Pen:
    """White lines on a black sheet; coordinates run from 0 to 1, x to the right and y down."""

    def __init__(self) -> None:
        self.sheet = np.zeros((SIZE * FINE, SIZE * FINE), np.uint8)

    def line(self, *points: tuple[float, float], closed: bool = False) -> None:
        """A polyline through ``points``."""
        path = (np.array(points) * SIZE * FINE).round().astype(np.int32)
        cv2.polylines(self.sheet, [path], closed, 255, WIDTH * FINE, cv2.LINE_AA)

    def curve(self, *points: tuple[float, float], closed: bool = False) -> None:
        """A smooth curve through ``points`` (Catmull–Rom)."""
        p = [points[-1], *points, *points[:2]] if closed else [points[0], *points, points[-1]]
        at = np.linspace(0, 1, 16, endpoint=False)[:, None]
        path: list[tuple[float, float]] = []
        for a, b, c, d in zip(*(np.array(p[i : len(p) - 3 + i]) for i in range(4)), strict=True):
            smooth = (
                b + at * (c - a) / 2 + at**2 * (a - 2.5 * b + 2 * c - d / 2) + at**3 * (1.5 * (b - c) + (d - a) / 2)
            )
            path += [(float(x), float(y)) for x, y in smooth]
        self.line(*path, *([] if closed else [points[-1]]), closed=closed)

    def oval(self, x: float, y: float, rx: float, ry: float) -> None:
        """An ellipse around (x, y)."""
        turns = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        self.line(*((x + rx * float(np.cos(t)), y + ry * float(np.sin(t))) for t in turns), closed=True)

    def picture(self) -> Image.Image:
        """The sheet at its final size."""
        return Image.fromarray(self.sheet).resize((SIZE, SIZE), Image.Resampling.BOX).convert("RGB")


def apple(pen: Pen) -> None:
    """A round apple with a leaf."""
    right = (
        (0.5, 0.30),
        (0.62, 0.24),
        (0.78, 0.28),
        (0.86, 0.46),
        (0.82, 0.68),
        (0.70, 0.86),
        (0.58, 0.90),
        (0.5, 0.87),
    )
    pen.curve(*right, *((1 - x, y) for x, y in right[-2:0:-1]), closed=True)
    pen.curve((0.5, 0.30), (0.52, 0.2), (0.58, 0.1))
    pen.curve((0.53, 0.2), (0.64, 0.1), (0.76, 0.1), (0.68, 0.2), (0.53, 0.2))


def penguin(pen: Pen) -> None:
    """A penguin from the front."""
    pen.curve(
        (0.5, 0.08),
        (0.68, 0.16),
        (0.74, 0.4),
        (0.76, 0.66),
        (0.66, 0.88),
        (0.5, 0.92),
        (0.34, 0.88),
        (0.24, 0.66),
        (0.26, 0.4),
        (0.32, 0.16),
        closed=True,
    )
    pen.curve(
        (0.5, 0.28),
        (0.62, 0.24),
        (0.64, 0.4),
        (0.66, 0.64),
        (0.5, 0.84),
        (0.34, 0.64),
        (0.36, 0.4),
        (0.38, 0.24),
        closed=True,
    )
    pen.curve((0.75, 0.42), (0.88, 0.56), (0.84, 0.68), (0.76, 0.62))
    pen.curve((0.25, 0.42), (0.12, 0.56), (0.16, 0.68), (0.24, 0.62))
    pen.oval(0.43, 0.32, 0.012, 0.02)
    pen.oval(0.57, 0.32, 0.012, 0.02)
    pen.line((0.45, 0.39), (0.55, 0.39), (0.5, 0.46), closed=True)
    pen.curve((0.3, 0.88), (0.28, 0.95), (0.44, 0.95), (0.44, 0.9))
    pen.curve((0.7, 0.88), (0.72, 0.95), (0.56, 0.95), (0.56, 0.9))


def cactus(pen: Pen) -> None:
    """A cactus with two arms."""
    pen.curve(
        (0.4, 0.94), (0.4, 0.6), (0.4, 0.2), (0.43, 0.1), (0.5, 0.06), (0.57, 0.1), (0.6, 0.2), (0.6, 0.6), (0.6, 0.94)
    )
    pen.line((0.4, 0.94), (0.6, 0.94))
    pen.curve((0.4, 0.7), (0.26, 0.68), (0.16, 0.58), (0.15, 0.4), (0.2, 0.34), (0.27, 0.4), (0.28, 0.52), (0.4, 0.55))
    pen.curve((0.6, 0.6), (0.74, 0.58), (0.84, 0.48), (0.85, 0.3), (0.8, 0.24), (0.73, 0.3), (0.72, 0.42), (0.6, 0.45))
    pen.line((0.5, 0.2), (0.5, 0.84))


def fish(pen: Pen) -> None:
    """A fish that swims to the left."""
    pen.curve(
        (0.08, 0.5),
        (0.2, 0.34),
        (0.42, 0.26),
        (0.62, 0.36),
        (0.74, 0.48),
        (0.62, 0.64),
        (0.42, 0.74),
        (0.2, 0.66),
        closed=True,
    )
    pen.curve((0.74, 0.48), (0.82, 0.34), (0.94, 0.28), (0.88, 0.5), (0.94, 0.72), (0.82, 0.64), (0.74, 0.52))
    pen.curve((0.34, 0.27), (0.44, 0.14), (0.58, 0.16), (0.6, 0.34))
    pen.curve((0.38, 0.73), (0.46, 0.85), (0.56, 0.82), (0.56, 0.68))
    pen.curve((0.32, 0.3), (0.38, 0.5), (0.32, 0.7))
    pen.oval(0.22, 0.45, 0.025, 0.025)


def tree(pen: Pen) -> None:
    """A tree with a round crown."""
    pen.curve(
        (0.5, 0.06),
        (0.7, 0.12),
        (0.84, 0.3),
        (0.82, 0.5),
        (0.66, 0.62),
        (0.5, 0.64),
        (0.34, 0.62),
        (0.18, 0.5),
        (0.16, 0.3),
        (0.3, 0.12),
        closed=True,
    )
    pen.line((0.44, 0.64), (0.42, 0.94), (0.58, 0.94), (0.56, 0.64))


DRAWN = {draw.__name__: draw for draw in (apple, penguin, cactus, fish, tree)}


def unseen(folder: Path, label: str) -> Image.Image:
    """The 3D picture of a held-out concept at 256 px, over white; ``folder`` holds the packages."""
    code = next(c.code for c, _ in packages.choose(folder) if c.label == label and c.held_out)
    picture = Image.open(io.BytesIO(packages.shaded(folder)[code])).convert("RGBA")
    picture = picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def outline(picture: Image.Image) -> Image.Image:
    """White lines on black from a picture: Canny edges as thick as the pen's lines."""
    soft = cv2.GaussianBlur(np.asarray(picture), (0, 0), 2.0)
    lines = cv2.dilate(cv2.Canny(soft, 30, 70), cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (WIDTH - 1, WIDTH - 1)))
    return Image.fromarray(cv2.GaussianBlur(lines, (0, 0), 0.8)).convert("RGB")


def write(cache: Path, out: Path) -> None:
    """Draw the examples into ``out/examples``, with ``examples.json`` to say which belong together."""
    folder, tarballs = out / "examples", cache / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    for _, drawing, reference in ROWS:
        if drawing in UNSEEN:
            sheet = outline(unseen(tarballs, drawing))
        else:
            DRAWN[drawing](pen := Pen())
            sheet = pen.picture()
        sheet.save(folder / f"{drawing}-drawing.png", optimize=True)
        unseen(tarballs, reference.replace("-", " ")).save(folder / f"{reference}-reference.png", optimize=True)
    rows = [{"prompt": p, "drawing": f"{d}-drawing.png", "reference": f"{r}-reference.png"} for p, d, r in ROWS]
    (folder / "examples.json").write_text(json.dumps(rows, indent=1) + "\n")
