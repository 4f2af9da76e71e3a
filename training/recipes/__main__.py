"""What `mahlstick train` needs before, between and after: ``python -m mahlstick.training.recipes STAGE``."""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import sys
import zlib
from pathlib import Path

import torch
from torch import Tensor

from mahlstick.errors import MahlstickError
from mahlstick.training.embedded.data import on_white
from mahlstick.training.recipes import emoji, judge, models

CACHE = Path(".cache/recipes")  # where the files of settings look, too
JUDGED = {"concepts": "concept", "styles": "style", "colours": "colour"}

STAGES = {
    "pictures": "fetch the packages with npm and write the folders of pictures",
    "judges": "teach MobileNetV2 to name concepts, styles and colours of real pictures",
    "start": "write the model to begin with: the UNet and the text encoder of --known, everything else fresh",
    "adopt-vae": "put the trained VAE into the model, and --known's UNet, translated to its latents",
    "adopt-base": "put the trained UNet and text encoder into the model",
    "adopt-clip": "put the trained image encoder into the model",
}
# where in a run the nets lie, and where in the model they belong
ADOPTED = {
    "base": {"": "unet", "text_encoder": "text_encoder"},
    "clip": {"image_encoder": "image_encoder"},
}
ORDER = """pictures, judges, start,
  mahlstick train --config training/recipes/vae.toml, adopt-vae,
  mahlstick train --config training/recipes/clip.toml, adopt-clip,
  mahlstick train --config training/recipes/base.toml, adopt-base,
  and then those of the controlnets and the ip-adapters.

All of it lies in .cache/recipes below the folder where the commands are given. What was trained on an earlier model of
the folder does not follow when another base is adopted: train it again."""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    lines = "\n".join(f"  {name:<10} {what}" for name, what in STAGES.items())
    p = argparse.ArgumentParser(
        prog="python -m mahlstick.training.recipes",
        description="Make the embedded model of 128 px: this command prepares, and mahlstick train teaches.",
        epilog=f"stages:\n{lines}\n\nin this order:\n  {ORDER}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("stage", choices=STAGES, help="what to do; see below")
    p.add_argument("--known", type=Path, default=Path("assets/embedded"), help="a model of 64 px (assets/embedded)")
    return p


def main(argv: list[str] | None = None) -> int:
    """Do one stage; 2 where it can't be done, with the reason on standard error."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        do(args.stage, args.known)
    except MahlstickError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def do(stage: str, known: Path) -> None:
    """One stage. Raises ``MahlstickError`` where what it builds on is not there."""
    model = CACHE / "model"
    if stage == "pictures":
        emoji.write(emoji.load(CACHE), CACHE / "pictures")
    elif stage == "judges":
        teach_judges()
    elif stage == "start":
        models.start(known, model)
    elif stage == "adopt-vae":
        models.adopt_vae(model, result("vae"), known, drawings(emoji.load(CACHE)))
    else:
        adopt(stage.removeprefix("adopt-"), model)


def teach_judges() -> None:
    """Judges from the real pictures that training sees.

    How often they are right is taken on pairs of concept and style that they do not learn, one in ten of those beside
    the shaded style, so that every name is learned.
    """
    folder = CACHE / "pictures" / "learn"
    if not folder.is_dir():
        raise MahlstickError(f"{folder} is missing; do the stage pictures first")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    labels = {name: [row[fact] for row in rows] for name, fact in JUDGED.items()}
    others = [row["style"] != emoji.SHADED and zlib.crc32(f"{row['concept']} {row['style']}".encode()) % 10 == 0
              for row in rows]  # fmt: skip
    right = judge.train(
        [folder / row["file_name"] for row in rows], labels, others, CACHE / "packages", CACHE / "judges"
    )
    (CACHE / "judges" / "figures.json").write_text(json.dumps(right, indent=1) + "\n")


def result(run: str, part: str = "") -> Path:
    """A training's result, or while it goes on its best so far. Raises ``MahlstickError`` where there is neither."""
    folders = [CACHE / "runs" / run / part, CACHE / "runs" / run / "best" / part]
    found = next((folder for folder in folders if (folder / "config.json").is_file()), None)
    if found is None:
        recipe = f"training/recipes/{run}.toml"
        raise MahlstickError(f"{folders[0]} holds no result yet; mahlstick train --config {recipe} makes it")
    return found


def adopt(run: str, model: Path) -> None:
    """Copy trained nets into the model's folder, all or none."""
    sources = {target: result(run, part) for part, target in ADOPTED[run].items()}
    for target, source in sources.items():
        (model / target).mkdir(exist_ok=True)
        for path in (source / "config.json", *source.glob("*.safetensors")):
            shutil.copy(path, model / target / path.name)


def drawings(atlas: emoji.Atlas, count: int = 512) -> Tensor:
    """Some drawings that training sees, over white: (N, 3, 128, 128) in [−1, 1]."""
    some = random.Random(0).sample(atlas.pairs(held_out=False), count)
    return on_white(torch.stack([atlas.drawing(*pair) for pair in some]))


if __name__ == "__main__":
    raise SystemExit(main())
