"""Whether an adapter works: pictures made with it and without it, from the same words and seeds, and both measured;
or whether a base does: without an adapter its own pictures are; or whether clips of a motion module move as true ones.

    from mahlstick.training.evaluate import EvaluateConfig, evaluate

    found = evaluate(EvaluateConfig(data="held_out", control="my_net", annotator="canny", out="report"))
    found.figures["edge_f1"]["with"].value  # 0.68

The pictures stay in the report's folder, each with a key of all that made it, so that a run that was stopped goes on
and a changed setting makes them anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, cast

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from pydantic import Field, model_validator
from tqdm import tqdm

from mahlstick import annotators
from mahlstick.adapters.motion import MotionAttachment
from mahlstick.errors import MahlstickError
from mahlstick.pictures import load_picture, save_png
from mahlstick.pipelines.attach import attach
from mahlstick.pipelines.generate import EMBEDDED_GUIDANCE, check_adapter, check_folder
from mahlstick.pipelines.load import Loader, adapter_path, embedded_folder, unet_config
from mahlstick.pipelines.measures import Encode, frame_encoder, measure_clip
from mahlstick.pipelines.recipe import fingerprint
from mahlstick.pipelines.request import Scale, Seed, Side, Spec
from mahlstick.pipelines.sheet import contact_sheet
from mahlstick.pipelines.units import Control, ImagePrompt, Motion, Unit
from mahlstick.training import data, judges, metrics
from mahlstick.training.data import Example, Kind

Array = np.ndarray[Any, Any]
Values = dict[str, Array]  # by column, a number for each picture or clip; NaN where there is none
T = TypeVar("T")

WITHOUT, WITH, TRUE, DIFFERENCE, RATIO = "without", "with", "true", "difference", "ratio"
RECALLS = (1, 5, 10)
NAMED = (1, 5)
SHOWN = 12  # pictures or clips on the contact sheet
SHOWN_FRAMES = 8  # of each clip
FEW = 30  # pictures or clips below which a bootstrap interval is too narrow

_KEY = "mahlstick-evaluate"  # of the PNG's text
_FORMAT = 1  # raise it when pictures of before must not be taken for today's
_TITLES = {
    "edge_f1": "edge F1",
    "mask_iou": "mask IoU",
    "mean_iou": "mean IoU",
    "skeleton_iou": "skeleton IoU",
    "rmse": "RMSE",
    "depth_rmse": "depth RMSE",
    "normal_angle": "normal angle (°)",
    "clip_t": "CLIP-T",
    "clip_i": "CLIP-I",
    "frechet_distance": "FID",
    "psnr": "PSNR of the VAE (dB)",
    "text_wins": "text wins",
    "itm": "ITM",
    "vqa_accuracy": "VQA accuracy",
}


class EvaluateConfig(Spec):
    """What to evaluate, and how. Scales are units' scales, sizes pixels."""

    data: str = Field(description="pictures (motion: clips) with captions, of any kind that `read_dataset` reads")
    out: str = Field("evaluation", description="folder of the report and its pictures")
    base: str = Field("embedded", description="'embedded', a diffusers folder, a hub id or a .safetensors file")
    base_config: str | None = Field(None, description="folder or hub id with the configs of a single-file base")

    control: str | None = Field(None, description="a ControlNet: a path, a hub id or an embedded one's name")
    control_scale: Scale = 1.0
    annotator: str | None = Field(None, description="makes the control pictures where there are none, and measures")
    annotator_options: dict[str, Any] = Field({}, description="of the annotator, e.g. low=80")
    control_pictures: str | None = Field(None, description="folder of control pictures, named like the pictures")

    image_prompt: str | None = Field(None, description="an IP-Adapter: a path, a hub id or 'ip-adapter'")
    image_prompt_scale: Scale = 1.0
    image_encoder: str | None = Field(None, description="vision model of the IP-Adapter; left out, the base's own")
    references: str | None = Field(None, description="folder of references; left out, the pictures themselves")

    motion: str | None = Field(None, description="a motion module: a path, a hub id or 'motion'")
    motion_scale: Scale = 1.0
    frames: int = Field(16, ge=2, le=256, description="of a clip")
    fps: float = Field(8, gt=0, le=240, description="frames a second taken from a video; those of a folder are taken"
        " as they are")  # fmt: skip

    judge: str | None = Field(None, description="a CLIP's folder or hub id; left out, the base's own image encoder")
    classifier: str | None = Field(None, description="an image classifier's folder or hub id, to name the pictures")
    features: str | None = Field(None, description="a vision model's folder or hub id, for likeness and FID")
    matcher: str | None = Field(None, description="a BLIP, BLIP-2 or ViLT with a matching head: do words and picture"
        " belong together")  # fmt: skip
    asker: str | None = Field(None, description="a BLIP or ViLT that answers questions: does the caption follow from"
        " the picture")  # fmt: skip
    questions: str | None = Field(None, description="lines of JSON with questions for the asker, see `read_questions`")

    count: int | None = Field(None, ge=1, description="how many of the pictures, drawn by the seed; left out, all")
    resolution: Side | None = Field(None, description="of a side; left out, the base's own")
    batch: int = Field(4, ge=1, le=256, description="pictures at once")
    steps: int = Field(20, ge=1, le=1000)
    guidance: float | None = Field(None, ge=0, le=100, description="left out, as suits the base")
    seed: Seed = 0

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.annotator is not None and self.control is None:
            raise ValueError("annotator is given without control; it measures how a control is kept")
        for name, needed in (("control_pictures", "control"), ("references", "image_prompt"),
                             ("image_encoder", "image_prompt")):  # fmt: skip
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise ValueError(f"{name} is given without {needed}; give both, or leave it out")
        if self.questions is not None and self.asker is None:
            raise ValueError("questions are given without asker, who answers them; give both, or leave them out")
        for name in ("control", "image_prompt", "classifier", "features", "matcher", "asker"):
            if self.motion is not None and getattr(self, name) is not None:
                raise ValueError(f"{name} is given with motion, which is judged alone; leave one of them out")
        return self

    @property
    def kind(self) -> Kind:
        """What is made."""
        return "pictures" if self.motion is None else "clips"

    @property
    def adapters(self) -> list[str]:
        """What is to be judged; where there is none, the base alone is."""
        return [name for name in (self.control, self.image_prompt, self.motion) if name]


@dataclass(frozen=True)
class Mean:
    """A mean with its 95 % interval, which a distance of distributions has not."""

    value: float
    low: float | None = None
    high: float | None = None

    def text(self, sign: Literal["+", "-"] = "-", decimals: int = 3) -> str:
        """As people read it; ``+`` shows the sign of what is positive too."""
        shown = [f"{number:{sign}.{decimals}f}" for number in (self.value, self.low, self.high) if number is not None]
        return shown[0] if len(shown) == 1 else f"{shown[0]} ({shown[1]} to {shown[2]})"


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    ``figures``: by measure (a name that `metrics.higher_is_better` knows) and column: ``without`` the
    adapters, ``with`` them if there are any, the ``difference`` picture by picture, and of the ``true`` pictures
    where that tells the ceiling. Of clips, by the names of `ClipFigures`: ``with``, ``true``, and the ``ratio`` of the
    two means. ``rows``: one for each picture or clip. ``notes``: sentences on what was left out and what to beware of.
    """

    config: EvaluateConfig
    figures: dict[str, dict[str, Mean]]
    rows: list[dict[str, Any]]
    notes: list[str]

    @property
    def report(self) -> Path:
        """The report for people; ``figures.json``, ``report.jsonl`` and ``contact_sheet.png`` lie beside it."""
        return Path(self.config.out) / "report.md"

    def to_json(self) -> str:
        """Settings, figures and notes, without the rows."""
        figures = {name: {key: asdict(mean) for key, mean in of.items()} for name, of in self.figures.items()}
        facts = {"settings": self.config.model_dump(), self.config.kind: len(self.rows), "figures": figures}
        return json.dumps(facts | {"notes": self.notes}, indent=1, ensure_ascii=False)

    def table(self) -> list[list[str]]:
        """The figures as text: a header, and a row for each measure with an arrow to where it is better; of clips none
        is, but as that of the true ones."""
        if self.config.motion is not None:
            clips = [["", "made", "true clips", "ratio"]]
            for name, of in self.figures.items():
                ratio = of[RATIO].text() if RATIO in of else ""
                clips.append([title(name), *(of[column].text(decimals=4) for column in (WITH, TRUE)), ratio])
            return clips
        adapted = bool(self.config.adapters)
        rows = [["", *(["without", "with", "difference"] if adapted else ["the base"]), "true pictures"]]
        for name, of in self.figures.items():
            arrow = "↑" if metrics.higher_is_better(name) else "↓"
            true = of[TRUE].text() if TRUE in of else ""
            made = [of[WITHOUT].text(), *([of[WITH].text(), verdict(name, of)] if adapted else [])]
            rows.append([f"{title(name)} {arrow}", *made, true])
        return rows


def verdict(measure: str, of: Mapping[str, Mean]) -> str:
    """The difference, and whether it is better: unclear where its interval holds zero."""
    change = of[DIFFERENCE]
    if change.low is None or change.high is None:
        return change.text("+")
    better = (change.value > 0) == metrics.higher_is_better(measure)
    return f"{change.text('+')}, {'unclear' if change.low <= 0 <= change.high else 'better' if better else 'worse'}"


def title(measure: str) -> str:
    """A measure's name as people write it."""
    return _TITLES.get(measure) or measure.replace("_at_", "@").replace("_", " ")


# ---- pictures


def draw(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    size: tuple[int, int],
    units: Sequence[Unit] = (),
    *,
    steps: int = 20,
    guidance: float | None = None,
) -> list[Image.Image]:
    """N pictures of ``size`` (width, height) in one call of the pipeline, for N prompts and N seeds.

    ``units`` have one condition for each picture, or one for all. The noise of a picture comes from its own seed, so
    that the others in the call change it by rounding alone. ``guidance`` left open is the pipeline's default. Raises
    ``MahlstickError`` for units that do not fit and for pictures of NaN.
    """
    pipe.set_progress_bar_config(disable=True)
    with attach(pipe, *units):
        made = pipe(
            list(prompts), width=size[0], height=size[1], num_inference_steps=steps, output_type="np",
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            **({} if guidance is None else {"guidance_scale": guidance}),
        )  # fmt: skip
    if not np.isfinite(made.images).all():
        raise MahlstickError(f"the pictures are NaN: weights are broken, or {pipe.dtype} is too narrow; try float32")
    return cast(list[Image.Image], pipe.image_processor.numpy_to_pil(made.images))


def guidance_of(base: str) -> float | None:
    """The guidance that suits the base; None is its pipeline's default."""
    return EMBEDDED_GUIDANCE if base == "embedded" else None


def control_of(example: Example, fitted: Image.Image, annotator: str | None, options: Mapping[str, Any]) -> Image.Image:
    """The example's control picture for its picture as ``fitted``: the dataset's own, or else the annotator's.

    Raises ``MahlstickError`` where there is neither.
    """
    if example.control is not None:
        picture, control = example.load(), example.load("control")
        return data.fit_control(control, picture, fitted.size, f"control of {example.name!r}")
    if annotator is None:
        raise MahlstickError(f"{example.name!r} has no control picture; add it, or name an annotator")
    return annotators.annotate(annotator, fitted, **options).convert("RGB")


@dataclass(frozen=True)
class Case:
    """An example, its seed, and the files of its pictures by column, or the folders of its clips' frames; ``key``
    stands for all that they depend on. ``frames``: of a clip."""

    example: Example
    seed: int
    key: str
    files: dict[str, Path]
    frames: int | None = None

    @property
    def caption(self) -> str:
        return self.example.captions[0]

    @property
    def is_made(self) -> bool:
        pictures = [picture for column in self.files for picture in self.pictures(column)]
        return all(_key_in(picture) == self.key for picture in pictures)

    def pictures(self, column: str) -> list[Path]:
        """The file, or a clip's frames in their order."""
        file = self.files[column]
        return [file] if self.frames is None else [file / f"{j:04d}.png" for j in range(self.frames)]


def _key_in(file: Path) -> str | None:
    try:
        with Image.open(file) as picture:
            return cast("str | None", picture.info.get(_KEY))
    except (OSError, ValueError, SyntaxError):
        return None


@dataclass(frozen=True)
class Painter:
    """The base with the adapters to be judged."""

    config: EvaluateConfig
    pipe: Any
    size: tuple[int, int]
    net: Any = None
    adapter: Any = None
    motion: Any = None

    @classmethod
    def load(cls, config: EvaluateConfig, loader: Loader, device: str | None, dtype: str | None) -> Self:
        pipe = loader.pipeline(config.base, device=device, dtype=dtype, config=config.base_config)

        def load(source: str | None, encoder: str | None = None) -> Any:
            if source is None:
                return None
            return loader.adapter(adapter_path(source), image_encoder=encoder, dtype=pipe.dtype, base=pipe.unet)

        sample = pipe.unet.config.sample_size
        height, width = (sample, sample) if isinstance(sample, int) else sample
        size = (width * pipe.vae_scale_factor, height * pipe.vae_scale_factor)
        if config.resolution is not None:
            size = (config.resolution, config.resolution)
        adapter = load(config.image_prompt, config.image_encoder)
        return cls(config, pipe, size, load(config.control), adapter, load(config.motion))

    def cases(self, examples: Sequence[Example], progress: bool = False) -> list[Case]:
        """Example i with seed + i and its files; reads every picture once, so that a broken one shows at the start."""
        config = self.config
        parts: list[data.Part] = ["control"] if config.control else []
        parts += ["reference"] if config.image_prompt and examples[0].reference else []
        settings = self._settings()
        found = []
        for i, example in enumerate(tqdm(examples, "read", disable=not progress, leave=False)):
            example.load()
            for part in parts:
                if getattr(example, part) is not None:
                    example.load(part)
            key = _digest([settings, example.digest(), config.seed + i])
            columns = (TRUE, WITHOUT, *((WITH,) if config.adapters else ()), *parts)
            files = {column: Path(config.out) / column / f"{i:05d}.png" for column in columns}
            found.append(Case(example, config.seed + i, key, files))
        return found

    def _settings(self) -> dict[str, Any]:
        """All that the pictures depend on beside example and seed; weights by content, since a name may be reused."""
        config = self.config
        fields = ("control_scale", "annotator", "annotator_options", "image_prompt_scale", "steps", "guidance")
        base = embedded_folder() if config.base == "embedded" else Path(config.base).expanduser()
        weights = [base, *(Path(name).expanduser() for name in (config.base_config, config.image_encoder) if name)]
        weights += [Path(adapter_path(name)).expanduser() for name in config.adapters]
        return {
            "format": _FORMAT,
            "weights": [fingerprint(path) for path in weights],
            "size": self.size,
            "dtype": str(self.pipe.dtype),
            **config.model_dump(include=set(fields)),
        }

    @property
    def _guidance(self) -> float | None:
        return guidance_of(self.config.base) if self.config.guidance is None else self.config.guidance

    def paint(self, cases: Sequence[Case]) -> None:
        """Make and write all pictures of the cases, in one batch."""
        config = self.config
        prompts, seeds = [case.caption for case in cases], [case.seed for case in cases]
        made = {TRUE: [data.fit(case.example.load(), self.size) for case in cases]}
        pairs = list(zip((case.example for case in cases), made[TRUE], strict=True))
        units: list[Unit] = []
        if self.net is not None:
            made["control"] = [control_of(*pair, config.annotator, config.annotator_options) for pair in pairs]
            units.append(Control(self.net, made["control"], scale=config.control_scale))
        if self.adapter is not None:
            made["reference"] = [e.load("reference") if e.reference is not None else true for e, true in pairs]
            references = [[reference] for reference in made["reference"]]  # a group for each picture
            units.append(ImagePrompt(self.adapter, references, scale=config.image_prompt_scale, prompt=prompts))
        guidance = self._guidance
        for column, clipped in ((WITHOUT, []), (WITH, units)):
            if column not in cases[0].files:
                continue
            made[column] = draw(self.pipe, prompts, seeds, self.size, clipped, steps=config.steps, guidance=guidance)
        for i, case in enumerate(cases):
            for column, file in case.files.items():
                save_png(made[column][i], file, {_KEY: case.key})


@dataclass(frozen=True)
class Animator(Painter):
    """The base with the motion module to be judged."""

    def cases(self, examples: Sequence[Example], progress: bool = False) -> list[Case]:
        """Clip i with seed + i · frames, from which on each of its frames has one; reads every clip once, so that one
        that is broken or too short shows at the start."""
        config = self.config
        settings, found = self._settings(), []
        for i, example in enumerate(tqdm(examples, "read", disable=not progress, leave=False)):
            self._true(example)
            seed = config.seed + i * config.frames
            files = {column: Path(config.out) / column / f"{i:05d}" for column in (TRUE, WITH)}
            found.append(Case(example, seed, _digest([settings, example.digest(), seed]), files, config.frames))
        return found

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | self.config.model_dump(include={"motion_scale", "frames", "fps"})

    def _true(self, example: Example) -> list[Image.Image]:
        """The beginning of the clip. Raises ``MahlstickError`` where it is too short."""
        wanted = self.config.frames
        frames = list(islice(example.frames(self.config.fps), wanted))
        if len(frames) < wanted:
            raise MahlstickError(
                f"{example.name!r} has {len(frames)} of {wanted} frames; give fewer --frames, or a higher --fps"
            )
        return frames

    def paint(self, cases: Sequence[Case]) -> None:
        """Make and write the clips of the cases, one by one."""
        config = self.config
        for case in cases:
            seeds = range(case.seed, case.seed + config.frames)
            made = {
                TRUE: [data.fit(frame, self.size) for frame in self._true(case.example)],
                WITH: draw(
                    self.pipe, [case.caption] * config.frames, seeds, self.size, [self._unit], steps=config.steps,
                    guidance=self._guidance,
                ),
            }  # fmt: skip
            for column, frames in made.items():
                files = case.pictures(column)
                for frame, file in zip(frames, files, strict=True):
                    save_png(frame, file, {_KEY: case.key})
                for left in {*case.files[column].glob("*.png")} - {*files}:  # of a longer clip before
                    left.unlink()

    @property
    def _unit(self) -> Motion:
        return Motion(self.motion, self.config.frames, self.config.motion_scale)

    def borders(self) -> list[int]:
        """Where windows begin, if the module does not see a clip as a whole."""
        with attach(self.pipe, self._unit) as attached:
            [motion] = cast(list[MotionAttachment], attached.attachments)
            return motion.context.borders(self.config.frames) if motion.windowed(self.config.frames) else []


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


# ---- measures


def measure_condition(cases: Sequence[Case], annotator: str, options: Mapping[str, Any], progress: bool) -> Values:
    """`metrics.condition_error` of each picture against its control picture."""
    found: dict[str, list[float]] = {WITHOUT: [], WITH: [], TRUE: []}
    for case in tqdm(cases, "measure", disable=not progress, leave=False):
        for column, values in found.items():
            control, picture = case.files["control"], case.files[column]
            values.append(metrics.condition_error(annotator, control, picture, **options)[1])
    return {column: np.array(values) for column, values in found.items()}


def judged(cases: Sequence[Case]) -> list[str]:
    """The columns of pictures that measures look at."""
    return [column for column in (WITHOUT, WITH, TRUE) if column in cases[0].files]


def measure_pictures(cases: Sequence[Case], judge: metrics.ClipJudge) -> dict[str, Values]:
    """CLIP-I against the references or true pictures; where the judge reads, CLIP-T and recall among the captions."""
    seen = {column: judge.images([case.files[column] for case in cases]) for column in judged(cases)}
    found: dict[str, Values] = {}
    captions = [case.caption.strip() for case in cases]
    if judge.tokenizer is not None and any(captions):
        found |= _measure_words(seen, captions, judge)
    if "reference" in cases[0].files:
        wanted = judge.images([case.files["reference"] for case in cases])
    else:
        wanted = seen.pop(TRUE)  # likeness to itself tells nothing
    return found | {"clip_i": {column: metrics.cosines(vectors, wanted) for column, vectors in seen.items()}}


def _measure_words(seen: Values, captions: Sequence[str], judge: metrics.ClipJudge) -> dict[str, Values]:
    """``seen``: unit vectors (N, d) by column. A picture without a caption has NaN."""
    distinct = sorted({caption for caption in captions if caption})
    texts = judge.texts(distinct)
    worded = {i: distinct.index(caption) for i, caption in enumerate(captions) if caption}

    def of_each(value: Callable[[Array, int], float]) -> Values:
        found = {column: np.full(len(captions), np.nan) for column in seen}
        for column, vectors in seen.items():
            for i, own in worded.items():
                found[column][i] = value(vectors[i : i + 1], own)
        return found

    scores = {"clip_t": of_each(lambda picture, own: metrics.clip_t(picture, texts[own : own + 1]))}
    for k in RECALLS:
        if k < len(distinct):
            scores[f"recall_at_{k}"] = of_each(partial(_recall, k, texts))
            scores[f"image_recall_at_{k}"] = _image_recall(k, texts, seen, worded)
    return scores


def _recall(k: int, texts: Array, picture: Array, own: int) -> float:
    return metrics.recall_at(k, picture, texts, [own])


def _image_recall(k: int, texts: Array, seen: Values, worded: Mapping[int, int]) -> Values:
    """One value for each text: it stands with the text's first picture, and the others have NaN."""
    rows, own = list(worded), np.array(list(worded.values()))
    first = {text: rows[own.tolist().index(text)] for text in set(own.tolist())}
    found = {column: np.full(len(vectors), np.nan) for column, vectors in seen.items()}
    for column, vectors in seen.items():
        for text, row in first.items():
            found[column][row] = metrics.image_recall_at(
                k, texts[text : text + 1], vectors[rows], np.where(own == text, 0, -1).tolist()
            )
    return found


def measure_names(cases: Sequence[Case], classifier: metrics.Classifier) -> dict[str, Values]:
    """`metrics.named_at` of the name that a picture's caption holds, and with references `metrics.text_wins` against
    what the classifier takes the reference for; NaN where the caption holds none, or the same."""
    wanted = [classifier.named_in(case.caption) for case in cases]
    scores = {column: classifier.scores([case.files[column] for case in cases]) for column in judged(cases)}

    def right(k: int, of: Array) -> Array:
        pairs = zip(of, wanted, strict=True)
        return np.array([np.nan if own is None else metrics.named_at(k, row, own) for row, own in pairs])

    found = {
        f"named_at_{k}": {column: right(k, of) for column, of in scores.items()}
        for k in NAMED
        if k < len(classifier.names)
    }
    if "reference" in cases[0].files:
        shown = classifier.scores([case.files["reference"] for case in cases]).argmax(1).tolist()
        rivals = list(zip(wanted, shown, strict=True))
        if any(own not in (None, other) for own, other in rivals):
            found["text_wins"] = {column: _text_wins(scores[column], rivals) for column in (WITHOUT, WITH)}
    return found


def _text_wins(scores: Array, rivals: Sequence[tuple[int | None, int]]) -> Array:
    pairs = zip(scores, rivals, strict=True)
    return np.array(
        [np.nan if own in (None, other) else metrics.text_wins(row, own, other) for row, (own, other) in pairs]
    )


def measure_match(cases: Sequence[Case], matcher: judges.Matcher) -> dict[str, Values]:
    """The matcher's score of each picture and its caption; NaN without one."""
    return {matcher.measure: _of_worded(cases, lambda files, texts: matcher.scores(files, [[text] for text in texts]))}


def measure_entailment(cases: Sequence[Case], asker: judges.Asker) -> dict[str, Values]:
    """Whether the caption follows from the picture, and whether it is contradicted; what is neither is neutral."""
    ways = _of_worded(cases, lambda files, texts: list(map(judges.ENTAILMENTS.index, asker.entailments(files, texts))))

    def share(way: judges.Entailment) -> Values:
        wanted = judges.ENTAILMENTS.index(way)
        return {column: np.where(np.isnan(found), np.nan, found == wanted) for column, found in ways.items()}

    return {"entailed": share("entailment"), "contradicted": share("contradiction")}


def _of_worded(cases: Sequence[Case], judge: Callable[[list[Path], list[str]], Any]) -> Values:
    """A number for each picture that has a caption, by column; NaN for the others."""
    worded = [i for i, case in enumerate(cases) if case.caption.strip()]
    found = {column: np.full(len(cases), np.nan) for column in judged(cases)}
    for column, values in found.items():
        if worded:
            files, texts = [cases[i].files[column] for i in worded], [cases[i].caption for i in worded]
            values[worded] = np.array(judge(files, texts), float).reshape(-1)
    return found


def measure_answers(
    cases: Sequence[Case], asker: judges.Asker, questions: Sequence[judges.Question]
) -> dict[str, Values]:
    """The share of its questions that are answered right of each picture; NaN for one that none is about."""
    pairs = [
        (i, question.text.replace("{caption}", case.caption), question)
        for i, case in enumerate(cases)
        for question in questions
        if question.name in (None, case.example.name) and ("{caption}" not in question.text or case.caption.strip())
    ]
    found = {column: np.full(len(cases), np.nan) for column in judged(cases)}
    for column, values in found.items():
        answers = asker.answers([cases[i].files[column] for i, _, _ in pairs], [text for _, text, _ in pairs])
        right: dict[int, list[bool]] = {}
        for (i, _, question), answer in zip(pairs, answers, strict=True):
            right.setdefault(i, []).append(question.is_right(answer))
        for i, of in right.items():
            values[i] = np.mean(of)
    return {"vqa_accuracy": found} if pairs else {}


def measure_likeness(cases: Sequence[Case], features: Values) -> Values:
    """The cosine of each picture and its reference or true picture, over the features (N, d) by column: CLIP-I by
    another network, which had no part in making them."""
    wanted = features["reference" if "reference" in features else TRUE]
    return {column: metrics.cosines(features[column], wanted) for column in judged(cases) if column != TRUE}


def measure_vae(cases: Sequence[Case], pipe: Any) -> Values:
    """`metrics.psnr` of what the base's VAE makes of the true pictures: no picture of it is nearer."""
    found, dtype = [], pipe.vae.dtype
    vae = pipe.vae.to(torch.float32)  # that of SDXL overflows in half precision
    for case in cases:
        true = np.asarray(load_picture(case.files[TRUE]))
        x = pipe.image_processor.preprocess(Image.fromarray(true)).to(pipe.device, torch.float32)
        with torch.no_grad():
            y = vae.decode(vae.encode(x).latent_dist.mean).sample
        found.append(metrics.psnr(true, np.asarray(pipe.image_processor.postprocess(y)[0])))
    vae.to(dtype)
    return {WITHOUT: np.array(found)}


def measure_distance(cases: Sequence[Case], features: Values) -> dict[str, Mean]:
    """`metrics.frechet_distance` to the true pictures, over the features (N, d) by column; and of one half of the true
    pictures to the other, which says what is near."""
    features = {column: features[column] for column in judged(cases)}
    true = features.pop(TRUE)
    found = {column: Mean(metrics.frechet_distance(made, true)) for column, made in features.items()}
    if WITH in found:
        found[DIFFERENCE] = Mean(found[WITH].value - found[WITHOUT].value)
    if len(true) >= 4:  # a half of fewer has no distribution
        found[TRUE] = Mean(metrics.frechet_distance(true[::2], true[1::2]))
    return found


def measure_clips(
    cases: Sequence[Case], encode: Encode | None, borders: Sequence[int], progress: bool
) -> dict[str, Values]:
    """What `measure_clip` finds, by measure."""
    found: dict[str, dict[str, list[float]]] = {}
    for case in tqdm(cases, "measure", disable=not progress, leave=False):
        for column in judged(cases):
            for name, value in measure_clip(case.pictures(column), borders, encode).to_dict().items():
                if value is not None:
                    found.setdefault(name, {}).setdefault(column, []).append(value)
    return {name: {column: np.array(values) for column, values in of.items()} for name, of in found.items()}


def compare(values: Values) -> dict[str, Mean]:
    """Means over the clips, and the ratio of the made ones' to the true ones', if that is above 0."""
    found = {column: Mean(*metrics.mean_with_interval(each)) for column, each in values.items()}
    if values[TRUE].mean() > 0:
        found[RATIO] = Mean(*metrics.ratio_with_interval(values[WITH], values[TRUE]))
    return found


def summarise(values: Values) -> dict[str, Mean]:
    """Means over the pictures that have a value, and that of the difference, with minus without, picture by picture."""
    pairs = values | ({DIFFERENCE: values[WITH] - values[WITHOUT]} if WITH in values else {})
    return {column: Mean(*metrics.mean_with_interval(each[~np.isnan(each)])) for column, each in pairs.items()}


def choose_judge(config: EvaluateConfig, pipe: Any) -> tuple[metrics.ClipJudge | None, list[str]]:
    """The judge and what to say of it; one without a tokenizer reads no words.

    Left open, it is the base's own image encoder. A text encoder with a projection to the same width is taken for its
    other tower. One without a projection has none: that of Stable Diffusion 1 is half a CLIP of another width, and the
    embedded base's was trained on with its UNet.
    """
    if config.judge is not None:
        return metrics.ClipJudge.load(config.judge, str(pipe.device)), []
    if config.base == judges.EMBEDDED and judges.shipped_tower() is not None:
        note = "CLIP-T, CLIP-I and recall are by the embedded CLIP, whose image encoder the embedded IP-Adapters read."
        return judges.embedded_judge(str(pipe.device)), [note]
    encoder, processor = (getattr(pipe, name, None) for name in ("image_encoder", "feature_extractor"))
    if encoder is None or processor is None:
        return None, [f"CLIP-T, CLIP-I and recall are left out: {config.base} has no image encoder; name a judge."]
    notes = [f"CLIP-I is by the image encoder of {config.base}, which flatters an IP-Adapter that reads it."]
    for suffix in ("", "_2"):
        text, tokenizer = (getattr(pipe, name + suffix, None) for name in ("text_encoder", "tokenizer"))
        if (
            text is not None
            and hasattr(text, "text_projection")
            and text.config.projection_dim == encoder.config.projection_dim
        ):
            return metrics.ClipJudge.of_towers(text, tokenizer, encoder, processor), notes
    notes.append(f"CLIP-T and recall are left out: {config.base} has no text tower that goes with it; name a judge.")
    return metrics.ClipJudge(encoder, processor, None), notes


def choose_encoder(config: EvaluateConfig, pipe: Any) -> tuple[Encode | None, list[str]]:
    """What tells whether neighbouring frames are alike, and what to say of it: the judge, or else the base's own image
    encoder."""
    if config.judge is not None:
        return metrics.ClipJudge.load(config.judge, str(pipe.device)).images, []
    found = frame_encoder(pipe)
    return found, [] if found else [f"Consistency is left out: {config.base} has no image encoder; name a judge."]


def choose_classifier(config: EvaluateConfig, examples: Sequence[Example], device: str) -> metrics.Classifier | None:
    """The classifier, if one is given. Raises ``MahlstickError`` where no caption holds one of its names."""
    if config.classifier is None:
        return None
    found = metrics.Classifier.load(config.classifier, device)
    if all(found.named_in(example.captions[0]) is None for example in examples):
        some = ", ".join(repr(name) for name in found.names[:3])
        raise MahlstickError(f"classifier: no caption of {config.data} holds one of its names ({some} …); give another")
    return found


def choose_matcher(config: EvaluateConfig, device: str) -> judges.Matcher | None:
    """The matcher, if one is given. Raises ``MahlstickError`` for a CLIP, whose scores are CLIP-T."""
    found = judges.load_matcher(config.matcher, device) if config.matcher is not None else None
    if found is not None and found.measure == "clip_t":
        raise MahlstickError(f"matcher: {config.matcher} is a CLIP; give it as --judge, or a network with an ITM head")
    return found


def choose_questions(config: EvaluateConfig, examples: Sequence[Example]) -> list[judges.Question]:
    """The questions, if a file of them is given. Raises ``MahlstickError`` for one that is about no picture."""
    if config.questions is None:
        return []
    found, names = judges.read_questions(config.questions), {example.name for example in examples}
    strange = [question.name for question in found if question.name not in (None, *names)]
    if strange and config.count is None:
        raise MahlstickError(
            f"{config.questions}: {strange[0]!r} is no picture of {config.data}; give its path in there"
        )
    return found


# ---- evaluate


def evaluate(
    config: EvaluateConfig,
    *,
    loader: Loader | None = None,
    device: str | None = None,
    dtype: str | None = None,
    progress: bool = True,
) -> Evaluation:
    """Make the pictures that are not there yet, measure all, and write the report into ``config.out``.

    ``loader`` keeps the base and the adapters between calls; ``device`` and ``dtype`` are `load_pipeline`'s. Raises
    ``MahlstickError``, before a picture is made, for data, adapters and models that do not do.
    """
    examples = choose_examples(config)
    _check(config, examples)
    questions = choose_questions(config, examples)
    loader = loader or Loader()
    if config.motion is not None:
        return _evaluate_clips(Animator.load(config, loader, device, dtype), examples, progress)
    painter = Painter.load(config, loader, device, dtype)
    judge, notes = choose_judge(config, painter.pipe)
    network = metrics.feature_network(config.features, str(painter.pipe.device)) if config.features else None
    classifier = choose_classifier(config, examples, str(painter.pipe.device))
    matcher = choose_matcher(config, str(painter.pipe.device))
    asker = judges.load_asker(config.asker, str(painter.pipe.device)) if config.asker else None
    cases = _painted(painter, examples, progress)
    found: dict[str, Values] = {}
    if config.annotator is not None:
        measure = metrics.measure_of(config.annotator)
        found[measure] = measure_condition(cases, config.annotator, config.annotator_options, progress)
    if judge is not None:
        found |= measure_pictures(cases, judge)
    if classifier is not None:
        found |= measure_names(cases, classifier)
    if matcher is not None:
        found |= measure_match(cases, matcher)
    if asker is not None:
        found |= measure_entailment(cases, asker) | measure_answers(cases, asker, questions)
    if not config.adapters and isinstance(painter.pipe.vae, AutoencoderKL):
        found["psnr"] = measure_vae(cases, painter.pipe)
    features = {}
    if network is not None:
        columns = [column for column in (*judged(cases), "reference") if column in cases[0].files]
        features = {column: network([case.files[column] for case in cases]) for column in columns}
        found["likeness"] = measure_likeness(cases, features)
    figures = {name: summarise(values) for name, values in found.items()}
    if features:
        figures["frechet_distance"] = measure_distance(cases, features)
    evaluation = Evaluation(config, figures, _rows(cases, found), notes + _notes(config, cases, found))
    _write(evaluation, cases)
    return evaluation


def _evaluate_clips(animator: Animator, examples: Sequence[Example], progress: bool) -> Evaluation:
    config = animator.config
    encode, notes = choose_encoder(config, animator.pipe)
    cases = _painted(animator, examples, progress)
    found = measure_clips(cases, encode, animator.borders(), progress)
    figures = {name: compare(values) for name, values in found.items()}
    evaluation = Evaluation(config, figures, _rows(cases, found), notes + _notes(config, cases, found))
    _write(evaluation, cases)
    return evaluation


def _painted(painter: Painter, examples: Sequence[Example], progress: bool) -> list[Case]:
    """The cases, once all of their pictures are there."""
    cases, batch = painter.cases(examples, progress), painter.config.batch
    todo = [case for case in cases if not case.is_made]
    with tqdm(total=len(cases), initial=len(cases) - len(todo), desc="evaluate", disable=not progress) as bar:
        for start in range(0, len(todo), batch):
            painter.paint(part := todo[start : start + batch])
            bar.update(len(part))
    return cases


def choose_examples(config: EvaluateConfig) -> list[Example]:
    """The dataset in an order drawn by the seed, up to ``count``: a larger count goes on with the same pictures."""
    examples = data.read_dataset(config.data, config.control_pictures, config.references, config.kind)
    random.Random(config.seed).shuffle(examples)
    return examples[: config.count]


def _check(config: EvaluateConfig, examples: Sequence[Example]) -> None:
    """What can be known before a model is loaded."""
    check_folder(Path(config.out))
    if config.annotator is not None:
        metrics.measure_of(config.annotator)
    elif config.control is not None and examples[0].control is None:
        raise MahlstickError(f"{config.data}: has no control pictures; add them, or name an annotator")
    if config.features is not None and len(examples) < 2:
        raise MahlstickError("features: one picture has no distribution; evaluate at least two")
    unet = unet_config(config.base)
    for field, kind in (("control", "controlnet"), ("image_prompt", "ip_adapter"), ("motion", "motion_adapter")):
        if (source := getattr(config, field)) is not None:
            check_adapter(field, kind, source, unet)


def _rows(cases: Sequence[Case], found: Mapping[str, Values]) -> list[dict[str, Any]]:
    """For each picture what it is and its values by column, without those that it lacks."""
    rows = []
    for i, case in enumerate(cases):
        row: dict[str, Any] = {"name": case.example.name, "caption": case.caption, "seed": case.seed}
        row["picture"] = case.files[TRUE].name
        for column in judged(cases):
            values = {name: of[column][i] for name, of in found.items() if column in of}
            row[column] = {name: float(value) for name, value in values.items() if not np.isnan(value)}
        rows.append(row)
    return rows


def _notes(config: EvaluateConfig, cases: Sequence[Case], found: Mapping[str, Values]) -> list[str]:
    """What to beware of."""
    notes = []
    if "named_at_1" in found and (unnamed := int(np.isnan(found["named_at_1"][TRUE]).sum())):
        notes.append(f"{unnamed} captions hold none of the names of {config.classifier}; named@k leaves them out.")
    if config.control is not None and config.annotator is None:
        notes.append("How well the control is kept is not measured: no annotator is named.")
    if not any(case.caption.strip() for case in cases):
        notes.append(f"None of the {config.kind} has a caption, so all were made without words.")
    if config.features is not None:
        notes.append(
            f"Likeness and FID are taken over {config.features}; few pictures raise FID, so compare equal numbers of"
            " them. That of the true pictures is of one half to the other, which is raised more and no ceiling."
        )
    if len(cases) < FEW:
        notes.append(f"Of only {len(cases)} {config.kind} the intervals are too narrow.")
    return notes


# ---- report

_READING = """\
In brackets: where the mean of other pictures of this kind would lie, 95 % (bootstrap). A difference is taken picture
by picture, and unclear where its interval holds zero. An arrow shows where a measure is better, the true pictures how
far it goes.
"""
_READING_CLIPS = """\
In brackets: where the mean of other clips of this kind would lie, 95 % (bootstrap). Neither more nor less of a measure
is better: the nearer the ratio is to 1, the more the clips move as the true ones do.
"""


def _write(evaluation: Evaluation, cases: Sequence[Case]) -> None:
    out = evaluation.report.parent
    save_png(_sheet(cases) if evaluation.config.motion is None else _strips(cases), out / "contact_sheet.png")
    lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in evaluation.rows)
    texts = {"report.jsonl": lines, "figures.json": evaluation.to_json() + "\n", "report.md": _markdown(evaluation)}
    for name, text in texts.items():
        beside = out / f".{name}"
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, out / name)


def _sheet(cases: Sequence[Case]) -> Image.Image:
    """A row for each of the first cases."""
    columns = [name for name in ("control", "reference", WITHOUT, WITH, TRUE) if name in cases[0].files]
    rows = [
        (case.caption or case.example.name, [load_picture(case.files[name]) for name in columns])
        for case in cases[:SHOWN]
    ]
    return contact_sheet(columns, rows)


def _strips(cases: Sequence[Case]) -> Image.Image:
    """Frames of each of the first clips, and below them those of the true one."""
    shown = evenly(range(cases[0].frames or 0), SHOWN_FRAMES)
    rows = [
        (label, [load_picture(case.pictures(column)[frame]) for frame in shown])
        for case in cases[:SHOWN]
        for column, label in ((WITH, case.caption or case.example.name), (TRUE, "true"))
    ]
    return contact_sheet([f"frame {frame}" for frame in shown], rows, cell=96)


def evenly(items: Sequence[T], count: int) -> list[T]:
    """``count`` of the items, or all, at even distances from the first on."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _markdown(evaluation: Evaluation) -> str:
    config, (header, *body) = evaluation.config, evaluation.table()
    units = " and ".join(f"`{name}`" for name in config.adapters)
    how = "each made without and with, from the same words and the same seed" if units else "each made from its words"
    shown = f"Without and with {units}, and the true pictures" if units else "Made, and the true pictures"
    reading = _READING
    if config.motion is not None:
        how = f"each made from its words, {config.frames} frames at {config.fps:g} a second"
        shown, reading = "Frames of the clips that were made, each above those of the true one", _READING_CLIPS
    table = [header, ["---"] * len(header), *body]
    notes = "".join(f"- {note}\n" for note in evaluation.notes)
    settings = json.dumps(config.model_dump(exclude_defaults=True), indent=1, ensure_ascii=False)
    return f"""# {f"{units} on " if units else ""}`{config.base}`

{len(evaluation.rows)} {config.kind} of `{config.data}`, {how}.

{chr(10).join(f"| {' | '.join(row)} |" for row in table)}

{reading}
{notes}
![{shown}](contact_sheet.png)

The figures of each are in `report.jsonl`, the settings below and all figures in `figures.json`.

```json
{settings}
```
"""
