"""docs/gallery.md: what the embedded model draws, and what it fails at, one sheet for each kind of work."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from mahlstick.annotators import annotate
from mahlstick.pictures import load_picture, save_png
from mahlstick.pipelines.animate import animate
from mahlstick.pipelines.generate import generate
from mahlstick.pipelines.load import Loader
from mahlstick.pipelines.request import ControlSpec, ImagePromptSpec, Request, VideoRequest
from mahlstick.pipelines.sheet import contact_sheet
from mahlstick.pipelines.video import iterate_video
from mahlstick.training.recipes.captions import CALLED
from mahlstick.training.recipes.packages import STYLES

CELL = 128
SEEDS = range(1, 9)
FRAMES = 16
MOVING = ("rocket", "red heart", "fox", "clown face")


# its label, what is given, and what is to be made
Row = tuple[str, list[Image.Image | None], Sequence[Request | VideoRequest]]


@dataclass
class Sheet:
    """A picture of the gallery: its title, a sentence, its columns, and rows of label, given pictures and requests."""

    name: str
    title: str
    text: str
    columns: Sequence[str]
    rows: list[Row] = field(default_factory=list)


def sheets(examples: Path, unseen: Path) -> Iterator[Sheet]:
    """The gallery's plan, sheet by sheet: inpainting draws what it then paints on. ``examples`` are the pictures that
    ship, ``unseen`` a folder of things not trained on."""
    yield words()
    yield styles()
    yield colours()
    yield controls(examples)
    yield kinds(unseen)
    yield references(examples)
    yield inpainting()
    yield clips()
    yield failures()


def words() -> Sheet:
    """Prompts by seeds."""
    prompts = ("fox", "penguin", "hamburger", "cactus", "butterfly", "sailboat", "guitar", "house")
    rows: list[Row] = [(prompt, [], [Request(prompt=prompt, seed=seed) for seed in SEEDS]) for prompt in prompts]
    text = "Each row is one prompt, each column one seed. Nothing is picked out."
    return Sheet("words", "Words", text, [f"seed {seed}" for seed in SEEDS], rows)


def styles() -> Sheet:
    """Things by styles, at one seed."""
    called = [CALLED.get(style, style) for style in STYLES]
    rows: list[Row] = []
    for thing in ("owl", "pizza", "rocket", "tulip", "octopus"):
        rows.append((thing, [], [Request(prompt=f"{style} {thing}", seed=3) for style in called]))
    return Sheet("styles", "Styles", "The prompt is the style and the thing: “flat owl”.", called, rows)


def colours() -> Sheet:
    """Things in colours that they do not have, and on grounds."""
    tints = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
    rows: list[Row] = []
    for thing in ("apple", "cat face", "mushroom"):
        rows.append((thing, [], [Request(prompt=f"{tint} {thing}", seed=5) for tint in tints]))
    grounds = [Request(prompt=f"fox on a {tint} background", seed=5) for tint in tints]
    rows.append(("fox on a … background", [], grounds))
    return Sheet("colours", "Colours", "Most of these were in no training picture.", tints, rows)


def controls(examples: Path) -> Sheet:
    """Drawings, each as several things."""
    rows: list[Row] = []
    for name, prompts in (
        ("apple", ("red apple", "green apple", "flat tomato", "lemon")),
        ("penguin", ("penguin", "blue penguin", "twemoji penguin", "owl")),
        ("fish", ("tropical fish", "red fish", "black and white fish", "shark")),
        ("tree", ("deciduous tree", "mushroom", "broccoli", "orange tree")),
    ):
        drawing = load_picture(examples / f"{name}-drawing.png")
        made = [Request(prompt=p, seed=7, controls=[ControlSpec(adapter="lineart", image=drawing)]) for p in prompts]
        rows.append((", ".join(prompts), [drawing], made))
    text = "One drawing, four prompts. The drawings were made by hand for this project."
    return Sheet("drawings", "Drawings", text, ["drawing", "", "", "", ""], rows)


def kinds(unseen: Path) -> Sheet:
    """Each kind of control, of things that no training saw."""
    nets = ("canny", "lineart", "scribble", "color", "mask")
    rows: list[Row] = []
    for file in sorted(unseen.glob("*.png"))[:32:8]:
        picture = load_picture(file)
        pictures: list[Image.Image | None] = [picture]
        made = []
        for net in nets:
            hint = annotate(net, picture)
            pictures.append(hint)
            made.append(Request(prompt="", seed=2, controls=[ControlSpec(adapter=net, image=hint)]))
        rows.append(("without words", pictures, made))
    text = "A thing that is in no training picture, what each annotator sees of it, and what is drawn from that alone."
    return Sheet("controls", "Kinds of control", text, ["thing", *nets, *nets], rows)


def references(examples: Path) -> Sheet:
    """Image prompts, alone, with words, and with both adapters."""
    rows: list[Row] = []
    for name, prompt in (
        ("lotus", "cat face"),
        ("gem-stone", "butterfly"),
        ("shamrock", "heart"),
        ("lollipop", "snail"),
    ):
        reference = load_picture(examples / f"{name}-reference.png")
        made = []
        for adapter in ("ip-adapter", "ip-adapter-plus"):
            for said, scale in (("", 1.0), (prompt, 0.6)):
                specs = [ImagePromptSpec(adapter=adapter, images=[reference], scale=scale)]
                made.append(Request(prompt=said, seed=4, image_prompts=specs))
        rows.append((prompt, [reference], [Request(prompt=prompt, seed=4), *made]))
    columns = ["reference", "words alone", "base alone", "base 0.6 + words", "plus alone", "plus 0.6 + words"]
    text = "References that no training saw; from each, new pictures without words, and with words for something else."
    return Sheet("references", "Image prompts", text, columns, rows)


def inpainting() -> Sheet:
    """A mask filled in."""
    rows: list[Row] = []
    whole = generate(Request(prompt="hamburger", seed=1)).images[0]
    mask = Image.new("L", whole.size, 0)
    mask.paste(255, (0, 0, whole.width, whole.height // 2))
    prompts = ("pizza", "snowman", "cactus", "frog")
    made = [Request(prompt=p, seed=6, init=whole, mask=mask, strength=1.0) for p in prompts]
    rows.append(("the upper half made anew", [whole, mask.convert("RGB")], made))
    return Sheet("inpainting", "Inpainting", "A mask filled in.", ["picture", "mask", *prompts], rows)


def clips() -> Sheet:
    """Clips as strips of frames."""
    rows: list[Row] = [(p, [], [VideoRequest(prompt=p, seed=1, frames=FRAMES)]) for p in MOVING]
    text = f"{FRAMES} frames at 8 a second, every other one shown."
    return Sheet("clips", "Clips", text, [f"frame {i}" for i in range(0, FRAMES, 2)], rows)


def failures() -> Sheet:
    """What it cannot do."""
    prompts = (
        "two cats",
        "a dog on a skateboard",
        "the word hello",
        "a city at night",
        "five apples",
        "portrait of a man",
    )
    rows: list[Row] = [(p, [], [Request(prompt=p, seed=seed) for seed in SEEDS]) for p in prompts]
    text = "Numbers, scenes, letters, people and relations between things are beyond it."
    return Sheet("failures", "What fails", text, [f"seed {seed}" for seed in SEEDS], rows)


def write(examples: Path, unseen: Path, docs: Path, steps: int = 20) -> Path:
    """Make ``docs/gallery.md`` and its pictures in ``docs/images``."""
    loader, lines = Loader(), ["# Gallery", "", INTRODUCTION, ""]
    for sheet in sheets(examples, unseen):
        rows = []
        for label, given, requests in tqdm(sheet.rows, sheet.name):
            made = [drawn(request.model_copy(update={"steps": steps}), loader) for request in requests]
            rows.append((label, [*given, *chain(*made)]))
        file = save_png(contact_sheet(sheet.columns, rows, CELL), docs / "images" / f"gallery-{sheet.name}.png")
        lines += [f"## {sheet.title}", "", sheet.text, "", f"![{sheet.title}](images/{file.name})", ""]
    page = docs / "gallery.md"
    page.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return page


def drawn(request: Request | VideoRequest, loader: Loader) -> list[Image.Image]:
    """The picture, or every other frame of the clip."""
    if isinstance(request, Request):
        return list(generate(request, loader=loader, progress=False).images[:1])
    with tempfile.TemporaryDirectory() as folder:
        clip = animate(request, Path(folder) / "clip.webp", loader=loader, progress=False)
        return list(iterate_video(clip.path))[::2]


INTRODUCTION = """What the embedded model draws: 128 px, 20 steps, guidance 4, on a CPU. One command makes this page,
and nothing on it is chosen by hand:

```sh
python -m mahlstick.training.recipes gallery
```"""
