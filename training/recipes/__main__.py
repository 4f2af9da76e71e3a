"""What `mahlstick train` needs before, between and after: ``python -m mahlstick.training.recipes STAGE``."""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import sys
import zlib
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mahlstick.errors import MahlstickError
from mahlstick.training.recipes import assemble, card, clips, emoji, examples, gallery, judge, models
from mahlstick.training.recipes.drawings import on_white
from mahlstick.training.recipes.figures import measure
from mahlstick.training.recipes.packages import SHADED

CACHE = Path(".cache/recipes")  # where the files of settings look, too
ASSETS = Path("assets")
# The same drawings, once rendered and once with painted shades: at 128 px they look alike, and count as one style.
LOOKS = dict.fromkeys((SHADED, "gradient"), f"{SHADED}, gradient")

STAGES = {
    "pictures": "fetch the packages with npm and write the folders of pictures",
    "clips": "fetch the packages of animations with npm (730 MB, one at a time) and write the folders of clips",
    "judges": "teach MobileNetV2 to name concepts, styles and colours of real pictures",
    "start": "write the model to begin with: fresh nets, or the UNet and the text encoder of --known",
    "adopt-vae": "put the trained VAE into the model, and --known's UNet, translated to its latents",
    "adopt-clip": "put the trained image encoder into the model",
    "adopt-base": "put the trained UNet and text encoder into the model",
    "assemble": "write assets/embedded from the model and the trained adapters, in half precision",
    "figures": "measure it all with mahlstick evaluate; --only NAME for one of the evaluations",
    "card": "write the model card from the figures",
    "examples": "draw the example inputs into assets/examples",
    "gallery": "write docs/gallery.md and its pictures",
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
  the same with controlnet.toml, ip-adapter.toml and ip-adapter-plus.toml,
  clips, mahlstick train --config training/recipes/motion.toml,
  mahlstick train --config training/recipes/captioner.toml,
  examples, assemble, figures, card, gallery.

All of it lies in .cache/recipes below the folder where the commands are given. What was trained on an earlier model of
the folder does not follow when another base is adopted: train it again. For a small run of any of them, ten minutes or
so, give mahlstick train a smaller --steps as well."""


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
    p.add_argument("--known", type=Path, help="an earlier model to go on from, such as assets/embedded")
    p.add_argument("--only", nargs="+", help="of the evaluations, those of these names")
    return p


def main(argv: list[str] | None = None) -> int:
    """Do one stage; 2 where it can't be done, with the reason on standard error."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        do(args)
    except MahlstickError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def do(args: argparse.Namespace) -> None:
    """One stage. Raises ``MahlstickError`` where what it builds on is not there."""
    model, stage, figures = CACHE / "model", args.stage, ASSETS / "embedded" / "figures.json"
    if stage == "pictures":
        emoji.write(emoji.load(CACHE), CACHE / "pictures")
    elif stage == "clips":
        clips.write(CACHE, emoji.load(CACHE).concepts)
    elif stage == "judges":
        teach_judges()
    elif stage == "start":
        models.start(model, emoji.load(CACHE).concepts, args.known)
    elif stage == "adopt-vae":
        models.adopt_vae(model, result("vae"), args.known, drawings(emoji.load(CACHE)))
    elif stage == "assemble":
        assemble.assemble(model, {name: result(name, [extra.part]) for name, extra in assemble.EXTRAS.items()}, ASSETS)
    elif stage == "figures":
        measure(CACHE, figures, args.only)
    elif stage == "card":
        write_card(figures)
    elif stage == "examples":
        examples.write(CACHE, ASSETS)
    elif stage == "gallery":
        gallery.write(ASSETS / "examples", CACHE / "pictures" / "unseen", Path("docs"))
    else:
        adopt(stage.removeprefix("adopt-"), model)


def write_card(figures: Path) -> None:
    """The card beside the figures; what a person saw in the pictures is in remarks.md here."""
    judges = CACHE / "judges" / "figures.json"
    for path, stage in ((figures, "figures"), (judges, "judges")):
        if not path.is_file():
            raise MahlstickError(f"{path} is missing; do the stage {stage} first")
    text = card.card(
        figures.parent, json.loads(figures.read_text()), json.loads(judges.read_text()), emoji.load(CACHE).concepts,
        CACHE / "runs", (Path(__file__).parent / "remarks.md").read_text(encoding="utf-8"),
    )  # fmt: skip
    (figures.parent / "MODEL_CARD.md").write_text(text, encoding="utf-8")


def written() -> Path:
    """The folder of the folders of pictures. Raises ``MahlstickError`` where they are not there yet."""
    if not (CACHE / "pictures" / "learn").is_dir():
        raise MahlstickError(f"{CACHE / 'pictures' / 'learn'} is missing; do the stage pictures first")
    return CACHE / "pictures"


def teach_judges() -> None:
    """Judges from the real pictures that training sees; that of styles from the drawings as they are."""
    folder = written() / "learn"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    right = {
        **taught(folder, rows, {"concepts": "concept", "colours": "colour"}, kept=LOOKS),
        **taught(folder, [*filter(emoji.is_plain, rows)], {"styles": "style"}, kept=(SHADED,), whole=True),
    }
    (CACHE / "judges" / "figures.json").write_text(json.dumps(right, indent=1) + "\n")


def taught(
    folder: Path, rows: list[dict[str, Any]], facts: dict[str, str], kept: Container[str], whole: bool = False
) -> dict[str, float]:
    """How often each judge in ``facts`` is right, which learned to tell that fact of the rows' pictures.

    It is taken on pairs of concept and style that the judges do not learn: one in ten of those in other styles than the
    ``kept``, so that every name is learned.
    """
    labels = {name: [LOOKS.get(row[fact], row[fact]) for row in rows] for name, fact in facts.items()}
    others = [row["style"] not in kept and zlib.crc32(f"{row['concept']} {row['style']}".encode()) % 10 == 0
              for row in rows]  # fmt: skip
    files = [folder / row["file_name"] for row in rows]
    return judge.train(files, labels, others, CACHE / "packages", CACHE / "judges", whole)


def result(run: str, parts: Iterable[str] = ("",)) -> Path:
    """A training's result, or while it goes on its best so far, whichever has all the parts. Raises ``MahlstickError``
    where neither has."""
    folders = [CACHE / "runs" / run, CACHE / "runs" / run / "best"]
    for folder in folders:
        if all(any((folder / part).glob("*.safetensors")) for part in parts):
            return folder
    recipe = f"training/recipes/{run}.toml"
    raise MahlstickError(f"{folders[0]} holds no result yet; mahlstick train --config {recipe} makes it")


def adopt(run: str, model: Path) -> None:
    """Copy trained nets, of one run and one step, into the model's folder."""
    found = result(run, ADOPTED[run])
    for source, target in ((found / part, target) for part, target in ADOPTED[run].items()):
        (model / target).mkdir(exist_ok=True)
        for path in (*source.glob("config.json"), *source.glob("*.safetensors")):
            shutil.copy(path, model / target / path.name)


def drawings(atlas: emoji.Atlas, count: int = 512) -> Tensor:
    """Some drawings that training sees, over white: (N, 3, 128, 128) in [−1, 1]."""
    some = random.Random(0).sample(atlas.pairs(held_out=False), count)
    return on_white(torch.stack([atlas.drawing(*pair) for pair in some]))


if __name__ == "__main__":
    raise SystemExit(main())
