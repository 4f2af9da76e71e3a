"""The npm packages that the pictures come from: fetched, opened, and the emoji to learn chosen from them."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mahlstick.errors import MahlstickError

log = logging.getLogger(__name__)

SHADED = "3d"  # the style that words without a style mean
LINES = "high-contrast"
WORDS = "emojibase-data"

# style → npm package with its drawings; the shaded one has pictures, the others are vectors
PACKAGES = {
    SHADED: "@lobehub/fluent-emoji-3d",
    "gradient": "@iconify-json/fluent-emoji",
    "flat": "@iconify-json/fluent-emoji-flat",
    LINES: "@iconify-json/fluent-emoji-high-contrast",
    "noto": "@iconify-json/noto",
    "twemoji": "@iconify-json/twemoji",
}
STYLES = tuple(PACKAGES)
CLIPS = tuple(f"@lobehub/fluent-emoji-anim-{number}" for number in range(1, 5))  # the shaded style in motion
VERSIONS = {
    "@lobehub/fluent-emoji-3d": "1.1.0",
    "@iconify-json/fluent-emoji": "1.2.7",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/fluent-emoji-high-contrast": "1.2.6",
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/twemoji": "1.2.5",
    WORDS: "17.0.0",
    **dict.fromkeys(CLIPS, "1.0.0"),
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
# Never mirrored: these have letters or digits, or close to one side.
ONE_WAY = re.compile(r"taxi|^bus$|ambulance|police car$|fire engine|slot machine|salt|kimono|martial arts|game die")
SKIN_TONE = re.compile("1f3f[b-f]")  # in a code point sequence
HELD_OUT_SHARE = 12  # one in so many of the other concepts is kept out of all training


@dataclass(frozen=True)
class Concept:
    """One thing that can be drawn: what it is called, and whether training may see it.

    ``colour`` is what it mostly has; ``subgroup`` is emojibase's.
    """

    code: str
    label: str
    tags: tuple[str, ...]
    colour: str
    held_out: bool
    subgroup: str = ""


def fetch(package: str, folder: Path) -> Path:
    """The package's tarball in ``folder``, fetched with ``npm pack`` when it is not there yet."""
    version = VERSIONS[package]
    tarball = folder / f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if tarball.exists():
        return tarball
    if shutil.which("npm") is None:
        raise MahlstickError(
            f"npm is not installed, so {package}@{version} cannot be fetched; "
            f"install Node.js, or put {tarball.name} into {folder}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    log.info("fetching %s@%s", package, version)
    done = subprocess.run(["npm", "pack", f"{package}@{version}"], cwd=folder, capture_output=True, text=True)
    if done.returncode or not tarball.exists():
        raise MahlstickError(f"npm pack {package}@{version} failed: {done.stderr.strip()[-200:]}; try again online")
    return tarball


def member(tarball: Path, name: str) -> Any:
    """A JSON file of an npm tarball, parsed."""
    with tarfile.open(tarball) as archive:
        file = archive.extractfile(f"package/{name}")
        assert file is not None
        return json.load(file)


def shaded(folder: Path) -> dict[str, bytes]:
    """The shaded style's WebP files, by code point sequence."""
    with tarfile.open(fetch(PACKAGES[SHADED], folder)) as archive:
        members = (m for m in archive if m.name.endswith(".webp"))
        return {bare(Path(m.name).stem): archive.extractfile(m).read() for m in members}  # type: ignore[union-attr]


def bare(code: str) -> str:
    """A code point sequence without variation selectors: the key that all packages agree on."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def choose(folder: Path) -> list[tuple[Concept, dict[str, str]]]:
    """The concepts to learn, each with its icon's name by style: those drawn in every style and in SUBGROUPS."""
    names = {SHADED: {code: code for code in shaded(folder)}}
    for style in STYLES[1:]:  # the gradient set's own table is empty; its names are those of the flat set
        table = member(fetch(PACKAGES["flat" if style == "gradient" else style], folder), "chars.json")
        names[style] = {bare(code): name for code, name in table.items()}
    words = fetch(WORDS, folder)
    subgroups = member(words, "meta/groups.json")["subgroups"]
    chosen = []
    for entry in member(words, "en/data.json"):
        code, label = bare(entry["hexcode"]), entry["label"]
        subgroup = subgroups.get(str(entry.get("subgroup")), "")
        wanted = subgroup in SUBGROUPS and not UNWANTED.search(label)
        if not wanted or any(code not in style for style in names.values()):
            continue
        lot = int(hashlib.sha1(code.encode()).hexdigest(), 16) % HELD_OUT_SHARE
        held_out = lot == 0 and not PROTECTED.search(label)
        concept = Concept(code, label.lower(), tuple(t.lower() for t in entry.get("tags", ())), "", held_out, subgroup)
        chosen.append((concept, {style: table[code] for style, table in names.items()}))
    return chosen
