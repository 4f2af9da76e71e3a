"""The first minute: the embedded model with each unit alone, with both, and with neither."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from mahlstick.errors import MahlstickError
from mahlstick.pictures import load_picture, save_png
from mahlstick.pipelines.generate import check_folder, generate
from mahlstick.pipelines.load import Loader
from mahlstick.pipelines.request import ControlSpec, ImagePromptSpec, Request
from mahlstick.pipelines.sheet import contact_sheet

COLUMNS = ("drawing", "reference", "words alone", "+ drawing", "+ reference", "+ both")
SEED = 7
CONTROL_SCALE, REFERENCE_SCALE = 0.9, 1.2


@dataclass(frozen=True)
class Shown:
    """What the demo wrote: the contact sheet, the pictures, and a (drawing, reference) pair to go on with."""

    sheet: Path
    images: list[Path]
    example: tuple[Path, Path]


def examples_folder() -> Path:
    """The example pictures, with ``examples.json``: a list of ``{"prompt", "drawing", "reference"}``."""
    return Path(str(files("mahlstick.assets"))) / "examples"


def run(
    out: Path,
    *,
    steps: int = 20,
    device: str | None = None,
    progress: bool = True,
    base: str = "embedded",
    examples: Path | None = None,
) -> Shown:
    """Makes every example in the four ways and a contact sheet of all; pictures that exist in ``out`` are replaced.

    Raises :class:`MahlstickError` where ``out`` is no folder or the examples are not installed.
    """
    if out.suffix.lower() == ".png":
        raise MahlstickError(f"{out}: the demo writes several pictures; give a folder")
    check_folder(out)
    folder = examples or examples_folder()
    rows = _read(folder)
    loader = Loader()
    images: list[Path] = []
    table: list[tuple[str, list[Image.Image | None]]] = []
    for row in tqdm(rows, desc="demo", disable=not progress, unit="row"):
        drawing, reference = folder / row["drawing"], folder / row["reference"]
        control = [ControlSpec(adapter="lineart", image=drawing, scale=CONTROL_SCALE)]
        prompt = [ImagePromptSpec(images=[reference], scale=REFERENCE_SCALE)]
        made: list[Image.Image | None] = []
        units = {"words": ([], []), "drawing": (control, []), "reference": ([], prompt), "both": (control, prompt)}
        for name, (controls, prompts) in units.items():
            request = Request(
                prompt=row["prompt"], base=base, seed=SEED, steps=steps, controls=controls, image_prompts=prompts
            )
            result = generate(request, loader=loader, device=device, progress=False)
            images += result.save(out / f"{row['prompt'].replace(' ', '-')}-{name}.png")
            made += result.images
        table.append((row["prompt"], [load_picture(drawing), load_picture(reference), *made]))
    sheet = save_png(contact_sheet(COLUMNS, table), out / "contact_sheet.png")
    return Shown(sheet, images, (folder / rows[0]["drawing"], folder / rows[0]["reference"]))


def _read(folder: Path) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MahlstickError(
            f"{folder}: the example pictures are missing; install mahlstick with its assets"
        ) from error
    return rows[:4]
