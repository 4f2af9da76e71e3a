"""``mahlstick caption``: write captions, score them, keep those that fit, and go on after any interruption.

    from mahlstick.training.captions.run import CaptionConfig, caption

    done = caption(CaptionConfig(data="my_pictures", captions=4, filter="my_clip", quantile=0.2))
    done.kept  # captions that are learned from now on

What is found of a picture is in the journal before the next pictures are looked at; the journal is all that a run goes
on from. ``metadata.jsonl`` is replaced when everything is there.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from PIL import Image
from pydantic import Field, model_validator
from tqdm import tqdm

from mahlstick.errors import MahlstickError
from mahlstick.pipelines.generate import check_folder
from mahlstick.pipelines.load import choose_device
from mahlstick.pipelines.request import Seed, Spec
from mahlstick.training import judges
from mahlstick.training.captions import captioners, table
from mahlstick.training.captions.filter import Outcome, Scored, check_filter, write_report
from mahlstick.training.captions.journal import Journal
from mahlstick.training.captions.table import Row, distinct
from mahlstick.training.data import Example

log = logging.getLogger(__name__)

Texts = tuple[list[str], list[str]]  # a picture's original captions, and those written
Scores = Mapping[str, Mapping[str, float]]  # by digest and caption

NONE = "none"
_MANY = 500  # files from which on a progress bar is worth its line
_FORMAT = 1  # raise it when captions of before must not be taken for today's
_BROKEN = (MahlstickError, OSError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises for bad files


class CaptionConfig(Spec):
    """What to caption, and how."""

    data: str = Field(description="a folder of pictures")
    model: str = Field("embedded", description="'embedded', a captioner's folder or hub id, or 'none' to write none")
    prompt: str | None = Field(None, description="what the captioner is told; left out, as suits its family")
    captions: int = Field(1, ge=1, le=64, description="of a picture; of several each is drawn, a single one is the"
        " likeliest")  # fmt: skip
    tokens: int = Field(60, ge=1, le=1024, description="of a caption at most")
    temperature: float = Field(1.0, gt=0, le=10, description="of drawing: less is surer")
    top_p: float = Field(0.9, gt=0, le=1, description="what is drawn from reaches this share of probability")
    seed: Seed = 0
    existing: Literal["add", "skip", "replace"] = Field(
        "add", description="pictures that have captions get more, are skipped, or learn from the new ones alone"
    )
    unnamed: bool = Field(False, description="pictures that metadata.jsonl does not name are captioned and added to it")
    filter: str | None = Field(None, description="what scores the captions: a CLIP, a BLIP, BLIP-2 or ViLT with a"
        " matching head, or 'embedded'")  # fmt: skip
    threshold: float | None = Field(None, description="score that a caption must reach; left out, the filter's own")
    quantile: float | None = Field(
        None, gt=0, lt=1, description="share of the captions to drop, instead of a threshold"
    )
    report: str = Field("caption-report", description="folder of the filter's report")
    batch: int = Field(8, ge=1, le=1024, description="pictures at once")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        check_filter(self.threshold, self.quantile, self.filter is not None)
        if self.model == NONE and self.filter is None:
            raise ValueError("model is 'none' and there is no filter, so there is nothing to do; name one of them")
        return self


@dataclass(frozen=True)
class Done:
    """What a run left: how many pictures, captions that are learned from, and pictures that could not be read; of a
    filter its outcome and its report."""

    pictures: int
    kept: int
    skipped: list[tuple[str, str]]
    outcome: Outcome | None = None
    report: Path | None = None

    def to_json(self) -> str:
        """For programs."""
        return json.dumps(asdict(self), default=str, ensure_ascii=False)


def caption(
    config: CaptionConfig, *, device: str | None = None, dtype: str | None = None, progress: bool = True
) -> Done:
    """Caption and filter the folder, and write its ``metadata.jsonl``. Raises ``MahlstickError`` for what is wrong with
    it before anything is written, and where no picture can be read."""
    folder = Path(config.data)
    rows = table.read(folder, config.unnamed)
    writes, filters = config.model != NONE, config.filter is not None
    captioner = captioners.load(config.model, config.prompt, device, dtype) if writes else None
    matcher = judges.load_matcher(config.filter, choose_device(device)) if config.filter is not None else None
    if filters:
        check_folder(Path(config.report))
    run = Run(config, rows, Journal(folder), progress)
    texts = {row.example.name: (row.original, row.written) for row in run.rows}
    if captioner is not None:
        texts |= run.write(captioner)
    scores = run.score(matcher, texts) if matcher is not None else None
    return run.settle(texts, scores, matcher)


class Run:
    """One run over the rows of a folder: what is in the journal is not found again."""

    def __init__(self, config: CaptionConfig, rows: Sequence[Row], journal: Journal, progress: bool) -> None:
        self.config, self.all, self.journal, self.progress = config, rows, journal, progress
        self.examples: dict[str, Example] = {}  # by digest: a picture of two names is one
        self.skipped: dict[str, str] = {}  # why, by name
        for row in tqdm(rows, "hashing", disable=not progress or len(rows) < _MANY):
            try:
                self.examples[row.example.picture_digest] = row.example
            except MahlstickError as error:
                self._skip(row.example, error)

    @property
    def rows(self) -> list[Row]:
        """Those whose pictures could be read."""
        return [row for row in self.all if row.example.name not in self.skipped]

    def write(self, captioner: captioners.Captioner) -> dict[str, Texts]:
        """Captions by the pictures' names, the journal's or new ones."""
        config = self.config
        asked = {"prompt": captioner.prompt, "tokens": config.tokens, "captions": config.captions}
        drawing = {"seed": config.seed, "temperature": config.temperature, "top_p": config.top_p}
        key = _key("captions", {**captioner.facts, **asked, **(drawing if config.captions > 1 else {})})

        def find(pictures: Mapping[str, Image.Image]) -> dict[str, list[str]]:
            options: dict[str, Any] = {"do_sample": False, "num_return_sequences": 1}
            if config.captions > 1:
                keys = [f"{config.seed} {digest}" for digest in pictures]
                options = captioners.sampling(keys, config.captions, config.temperature, config.top_p)
            made = captioner.generate([*pictures.values()], max_new_tokens=config.tokens, **options)
            texts = np.array([" ".join(text.split()) for text in made], object).reshape(len(pictures), -1)
            return {digest: distinct(filter(None, of)) for digest, of in zip(pictures, texts, strict=True)}

        wanted = [row for row in self.rows if not (config.existing == "skip" and row.original)]
        digests = distinct(row.example.picture_digest for row in wanted)
        found = self._find("captions", key, [digest for digest in digests if digest not in self.journal.of(key)],
                           len(digests), find)  # fmt: skip
        return {
            row.example.name: (row.original, found[row.example.picture_digest])
            for row in wanted
            if row.example.picture_digest in found
        }

    def score(self, matcher: judges.Matcher, texts: Mapping[str, Texts]) -> Scores:
        """Scores by digest and caption, the journal's or new ones."""
        key = _key("scores", {"judge": matcher.key, "measure": matcher.measure})
        wanted: dict[str, list[str]] = {}
        for row in self.rows:
            digest, of = row.example.picture_digest, texts[row.example.name]
            wanted[digest] = distinct([*wanted.get(digest, []), *of[0], *of[1]])

        def missing(digest: str) -> list[str]:
            known = self.journal.of(key).get(digest, {})
            return [text for text in wanted[digest] if text not in known]

        def find(pictures: Mapping[str, Image.Image]) -> dict[str, dict[str, float]]:
            asked = [missing(digest) for digest in pictures]
            scores = matcher.scores([*pictures.values()], asked)
            return {
                digest: dict(zip(of, values, strict=True))
                for digest, of, values in zip(pictures, asked, scores, strict=True)
            }

        return self._find("scores", key, [digest for digest in wanted if missing(digest)], len(wanted), find)

    def _find(
        self,
        what: str,
        key: str,
        todo: Sequence[str],
        total: int,
        find: Callable[[Mapping[str, Image.Image]], Mapping[str, Any]],
    ) -> Mapping[str, Any]:
        """Find what is to do, some pictures at a time, each part in the journal before the next begins; → all that the
        journal has."""
        batch = self.config.batch
        with tqdm(total=total, initial=total - len(todo), desc=what, disable=not self.progress) as bar:
            for at in range(0, len(todo), batch):
                part = todo[at : at + batch]
                if pictures := self._load(part):
                    self.journal.add(key, find(pictures))
                bar.update(len(part))
        if not self.rows:
            name, reason = next(iter(self.skipped.items()))
            raise MahlstickError(f"none of {len(self.all)} pictures can be read; the first is {name!r}: {reason}")
        return self.journal.of(key)

    def _load(self, digests: Sequence[str]) -> dict[str, Image.Image]:
        """The pictures that can be read."""
        found = {}
        for digest in digests:
            try:
                found[digest] = self.examples[digest].load()
            except _BROKEN as error:
                for row in self.rows:
                    if row.example.picture_digest == digest:
                        self._skip(row.example, error)
        return found

    def _skip(self, example: Example, error: Exception) -> None:
        log.warning("%s is left out: %s", example.name, error)
        self.skipped[example.name] = str(error)

    def settle(self, texts: Mapping[str, Texts], scores: Scores | None, matcher: judges.Matcher | None) -> Done:
        """Choose what is learned from, write the report and then ``metadata.jsonl``."""
        scored = [Scored(row, text, scores[row.example.picture_digest][text])
                  for row in self.rows for text in self._candidates(*texts[row.example.name])
                  ] if scores is not None else []  # fmt: skip
        threshold = self._threshold(scored, matcher)
        dropped = [one for one in scored if threshold is not None and one.score < threshold]
        without = {(id(one.row), one.caption) for one in dropped}
        for row in self.rows:
            original, written = texts[row.example.name]
            kept = [text for text in self._candidates(original, written) if (id(row), text) not in without]
            known = None if scores is None else scores.get(row.example.picture_digest, {})
            row.settle(original, written, kept, known)
        outcome = report = None
        if matcher is not None and scored:
            mean = float(np.mean([one.score for one in scored]))
            bare = sum(not row.fields[table.TEXT] for row in self.rows)
            outcome = Outcome(matcher.measure, threshold, len(scored), len(dropped), bare, mean)
            report = write_report(Path(self.config.report), scored, outcome, str(self.config.filter))
        table.write(self.all)
        kept_texts = sum(len(row.fields[table.TEXT]) for row in self.rows)
        return Done(len(self.rows), kept_texts, list(self.skipped.items()), outcome, report)

    def _threshold(self, scored: Sequence[Scored], matcher: judges.Matcher | None) -> float | None:
        config = self.config
        if config.quantile is not None and scored:
            return float(np.quantile([one.score for one in scored], config.quantile))
        own = matcher.threshold if matcher is not None else None
        return own if config.threshold is None else config.threshold

    def _candidates(self, original: Sequence[str], written: Sequence[str]) -> list[str]:
        """The captions that may be learned from, before any filter."""
        if self.config.existing == "replace" and written:
            return distinct(written)
        return distinct([*original, *written])


def _key(what: str, facts: Mapping[str, Any]) -> str:
    text = json.dumps({"format": _FORMAT, "what": what, **facts}, sort_keys=True)
    return f"{what}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
