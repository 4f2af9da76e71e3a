"""What `mahlstick train` needs before, between and after: ``python -m mahlstick.training.recipes STAGE``."""

from __future__ import annotations

import argparse
import json
import logging
import random
from pathlib import Path

import torch
from torch import Tensor

from mahlstick.training.embedded.data import on_white
from mahlstick.training.recipes import emoji, judge, models

HERE = Path(__file__).parent
JUDGED = {"concepts": "concept", "styles": "style", "colours": "colour"}

STAGES = {
    "pictures": "fetch the packages with npm and write the folders of pictures into CACHE/pictures",
    "judges": "teach MobileNetV2 to name concepts, styles and colours of real pictures: CACHE/judges",
    "start": "write CACHE/model, a pipeline folder: the UNet and the text encoder of --known, everything else fresh",
    "adopt-vae": "put the trained VAE of CACHE/runs/vae into CACHE/model",
}


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    lines = "\n".join(f"  {name:<10} {what}" for name, what in STAGES.items())
    recipes = "\n".join(f"  mahlstick train --config {path.name}" for path in sorted(HERE.glob("*.toml")))
    p = argparse.ArgumentParser(
        prog="python -m mahlstick.training.recipes",
        description="Make the embedded model: this command prepares, and mahlstick train teaches.",
        epilog=f"stages:\n{lines}\n\ntrainings, in {HERE.name}/:\n{recipes}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("stage", choices=STAGES, help="what to do; see below")
    p.add_argument("--cache", type=Path, default=Path(".cache/recipes"), help="where all of it lies (.cache/recipes)")
    p.add_argument("--known", type=Path, default=Path("assets/embedded"), help="an earlier model (assets/embedded)")
    return p


def main(argv: list[str] | None = None) -> None:
    """Do one stage."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    cache: Path = args.cache
    if args.stage == "pictures":
        emoji.write(emoji.load(cache), cache / "pictures")
    elif args.stage == "judges":
        teach_judges(cache)
    elif args.stage == "start":
        models.start(args.known, cache / "model")
    elif args.stage == "adopt-vae":
        models.adopt_vae(cache / "model", cache / "runs" / "vae", args.known, shaded(emoji.load(cache)))


def teach_judges(cache: Path) -> None:
    """Judges from the real pictures that training sees, and how often they are right on others."""
    rows = [json.loads(line) for line in (cache / "pictures" / "learn" / "metadata.jsonl").read_text().splitlines()]
    files = [cache / "pictures" / "learn" / row["file_name"] for row in rows]
    labels = {name: [row[fact] for row in rows] for name, fact in JUDGED.items()}
    right = judge.train(files, labels, cache / "packages", cache / "judges")
    (cache / "judges" / "figures.json").write_text(json.dumps(right, indent=1) + "\n")


def shaded(atlas: emoji.Atlas, count: int = 512) -> Tensor:
    """Some drawings that training sees, over white: (N, 3, 128, 128) in [−1, 1]."""
    some = random.Random(0).sample(atlas.pairs(held_out=False), count)
    return on_white(torch.stack([atlas.drawing(*pair) for pair in some]))


if __name__ == "__main__":
    main()
