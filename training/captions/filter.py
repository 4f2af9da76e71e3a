"""CapFilt's filter (2201.12086, section 3.3): captions that do not fit their pictures are dropped, and a report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mahlstick.errors import MahlstickError
from mahlstick.pictures import load_picture, save_png
from mahlstick.pipelines.sheet import contact_sheet
from mahlstick.training.captions.journal import replace_whole
from mahlstick.training.captions.table import Row

BORDER = 8  # captions shown on either side of the threshold
BINS, BAR, HEIGHT, MARGIN = 40, 14, 220, 24
KEPT, DROPPED, INK = "#4c78a8", "#d5d5d5", "#222222"


@dataclass(frozen=True)
class Scored:
    """A caption of a picture and how well it fits."""

    row: Row
    caption: str
    score: float


@dataclass(frozen=True)
class Outcome:
    """What a filter did: how many captions it saw and dropped, and how many pictures were left without one."""

    measure: str
    threshold: float | None
    captions: int
    dropped: int
    bare: int
    mean: float


def write_report(out: Path, scored: Sequence[Scored], outcome: Outcome, judge: str) -> Path:
    """``report.md`` with the histogram and the captions next to the threshold as pictures, and ``figures.json``."""
    ordered = sorted(scored, key=lambda one: -one.score)
    at = sum(one.score >= (outcome.threshold or -np.inf) for one in ordered)
    shown = ordered[max(0, at - BORDER) : at + BORDER]
    if outcome.threshold is None:
        shown = [*ordered[:BORDER], *ordered[BORDER:][-BORDER:]]
    save_png(histogram([one.score for one in scored], outcome.threshold), out / "histogram.png")
    save_png(_sheet(shown, outcome.threshold), out / "border.png")
    replace_whole(out / "figures.json", json.dumps({"judge": judge, **asdict(outcome)}, indent=1) + "\n")
    replace_whole(out / "report.md", _markdown(outcome, judge))
    return out / "report.md"


def histogram(scores: Sequence[float], threshold: float | None) -> Image.Image:
    """How often which score is: blue what is kept, grey what is dropped, a line at the threshold."""
    low, high = min(scores), max(scores)
    counts, edges = np.histogram(scores, BINS, (low, high) if high > low else (low - 0.5, low + 0.5))
    sheet = Image.new("RGB", (2 * MARGIN + BINS * BAR, HEIGHT + 2 * MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)

    def across(score: float) -> float:
        return float(MARGIN + (score - edges[0]) / (edges[-1] - edges[0]) * BINS * BAR)

    floor = MARGIN + HEIGHT
    for count, left, right in zip(counts, edges, edges[1:], strict=False):
        kept = threshold is None or (left + right) / 2 >= threshold
        top = floor - round(count / counts.max() * HEIGHT)
        draw.rectangle((across(left), top, across(right) - 2, floor), fill=KEPT if kept else DROPPED)
    for score in (edges[0], edges[-1]):
        draw.text((across(score), floor + 4), f"{score:.2f}", INK, font, anchor="ma")
    if threshold is not None and edges[0] <= threshold <= edges[-1]:
        draw.line((across(threshold), MARGIN - 4, across(threshold), floor), INK, 2)
        draw.text((across(threshold), 6), f"{threshold:.3f}", INK, font, anchor="ma")
    return sheet


def _sheet(shown: Sequence[Scored], threshold: float | None) -> Image.Image:
    """The pictures with their captions and scores, in the column of what became of them."""
    rows = []
    for one in shown:
        picture = load_picture(one.row.example.load())
        kept = threshold is None or one.score >= threshold
        rows.append((f"{one.score:.3f} {one.caption}", [picture, None] if kept else [None, picture]))
    return contact_sheet(["kept", "dropped"], rows, cell=112)


def _markdown(outcome: Outcome, judge: str) -> str:
    cosine = outcome.measure == "clip_t"
    what = "cosine of picture and caption" if cosine else "how likely picture and caption belong together"
    border = "On the border of the threshold" if outcome.threshold is not None else "The best and the worst"
    rule = (
        f"What is below {outcome.threshold:.4f} is dropped: {outcome.dropped} captions."
        if outcome.threshold is not None
        else "Nothing is dropped: no threshold was given. Choose one by the pictures below."
    )
    return f"""# Captions by `{judge}`

{outcome.captions} captions, scored by the {what}; their mean is {outcome.mean:.4f}. {rule}
{outcome.bare} pictures have no caption left and are learned without words. The captions that were dropped stay in
`metadata.jsonl`, with all scores.

![How often which score is](histogram.png)

{border}:

![{border}](border.png)
"""


def check_filter(threshold: float | None, quantile: float | None, has_filter: bool) -> None:
    """Raise ``MahlstickError`` for settings of a filter that do not go together."""
    if not has_filter and (threshold is not None or quantile is not None):
        raise MahlstickError("threshold and quantile are of a filter; name one, e.g. --filter my_clip")
    if threshold is not None and quantile is not None:
        raise MahlstickError("threshold and quantile are both given; give one of them")
