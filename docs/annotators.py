"""Makes what docs/annotators.md shows: its picture sheet and its tables. Run: python docs/annotators.py"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

from mahlstick import annotators, pictures

HERE = Path(__file__).parent
PAGE = HERE / "annotators.md"
SHEET = HERE / "images" / "annotators.png"
BEGIN, END = "<!-- made by docs/annotators.py -->\n", "<!-- end -->\n"
CELL, LABEL = 144, 16


def table() -> str:
    """The annotators and their options, in Markdown."""
    lines = ["| annotator | makes | needs | options |", "|---|---|---|---|"]
    for name in annotators.names():
        annotator = annotators.get(name)
        options = "<br>".join(
            f"`{option.name}={option.default}`: {option.expects}" for option in annotator.options.values()
        )
        lines.append(f"| `{name}` | {annotator.description} | {annotator.needs} | {options} |")
    aliases = ", ".join(f"`{alias}` = `{name}`" for alias, name in annotators.ALIASES.items())
    return "\n".join(lines) + f"\n\nOther names for them: {aliases}.\n"


def page(text: str) -> str:
    """The page with its table as the registry is now."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


def row(picture: Image.Image, mask: Image.Image) -> dict[str, Image.Image]:
    """The picture and all control pictures of it that need no weights."""
    free = [name for name in annotators.names() if annotators.get(name).needs == "nothing"]
    made = {name: annotators.annotate(name, picture, **({"mask": mask} if name == "inpaint" else {})) for name in free}
    return {"picture": picture, **made}


def sheet(rows: list[dict[str, Image.Image]]) -> Image.Image:
    """Rows of pictures under their names."""
    canvas = Image.new("RGB", (CELL * len(rows[0]), LABEL + CELL * len(rows)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, name in enumerate(rows[0]):
        draw.text((column * CELL + 4, 2), name, fill="black")
        for line, made in enumerate(rows):
            cell = pictures.resize(made[name], (CELL - 4, CELL - 4))
            canvas.paste(cell, (column * CELL + 2, LABEL + line * CELL + 2))
    return canvas


def main() -> None:
    import skimage.data

    astronaut = pictures.resize(pictures.load_picture(skimage.data.astronaut()), (384, 384))
    coffee = pictures.resize(pictures.load_picture(skimage.data.coffee()), (384, 384), "crop")
    mask = Image.new("L", (384, 384))
    ImageDraw.Draw(mask).ellipse((110, 20, 250, 190), fill=255)
    made = sheet([row(astronaut, mask), row(coffee, mask)])
    pictures.save_png(made.quantize(128, dither=Image.Dither.NONE), SHEET)
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
