"""Models that look at a picture and words together: do they fit, what is the answer, does it follow?

    judge = load_matcher("path/to/blip-itm")
    judge.scores([picture], [["a red fox", "a blue car"]])  # [[0.98, 0.02]]

`Matcher` scores words for a picture, by a CLIP's cosine or by a matching head. `Asker` answers questions, and says by
them whether a text follows from a picture.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from mahlstick.annotators import weights
from mahlstick.errors import MahlstickError
from mahlstick.pictures import load_picture
from mahlstick.pipelines.load import embedded_folder, text_tower
from mahlstick.pipelines.recipe import fingerprint
from mahlstick.training import metrics

if TYPE_CHECKING:
    from mahlstick.pictures import PictureSource

    Array = np.ndarray[Any, Any]

T = TypeVar("T")
Entailment = Literal["entailment", "neutral", "contradiction"]
ENTAILMENTS: tuple[Entailment, ...] = ("entailment", "neutral", "contradiction")

EMBEDDED = "embedded"
SHOWS = "Does the picture show {text}?"  # after VQAScore (2404.01291), in the short form of VQAv2's questions
THIRD = 1 / 3
_BATCH = 16  # pairs at once

# the networks by model_type
_MATCHERS = {"blip": "BlipForImageTextRetrieval", "blip-2": "Blip2ForImageTextRetrieval",
             "vilt": "ViltForImageAndTextRetrieval"}  # fmt: skip
_ASKERS = {"blip": "BlipForQuestionAnswering", "vilt": "ViltForQuestionAnswering"}


# ---- do words fit a picture


class Matcher(Protocol):
    """Scores words for pictures. ``measure``: ``clip_t``, a cosine, or ``itm``, from 0 to 1. ``threshold``: below which
    words do not fit, where the model was taught one."""

    @property
    def measure(self) -> str: ...
    @property
    def threshold(self) -> float | None: ...
    @property
    def key(self) -> str:
        """What its scores depend on."""

    def scores(self, images: Sequence[PictureSource], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """For each of N pictures the scores of its texts."""


@dataclass(frozen=True)
class ClipMatcher:
    """Image–text contrast (ITC): the cosine in a CLIP-like encoder's space."""

    judge: metrics.ClipJudge
    key: str
    measure: str = "clip_t"
    threshold: float | None = None

    def scores(self, images: Sequence[PictureSource], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """As `Matcher.scores`."""
        flat = list(dict.fromkeys(text for of in texts for text in of))
        if not flat:
            return [[] for _ in texts]
        seen, read = self.judge.images(images), dict(zip(flat, self.judge.texts(flat), strict=True))
        return [[float(picture @ read[text]) for text in of] for picture, of in zip(seen, texts, strict=True)]


@dataclass(frozen=True)
class PairMatcher:
    """Image–text matching (ITM): a network that reads both at once, with a head that says whether they belong together.

    BLIP's and BLIP-2's say how likely (2201.12086, section 3.2). ViLT's says a rank (2102.03334), here brought to 0 to
    1 by a sigmoid, which is not calibrated.
    """

    model: Any
    processor: Any
    key: str
    measure: str = "itm"

    @property
    def threshold(self) -> float | None:
        """Half, as CapFilt has it, for heads of two classes."""
        return None if self.model.config.model_type == "vilt" else 0.5

    def scores(self, images: Sequence[PictureSource], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """As `Matcher.scores`."""
        pairs = [(image, text) for image, of in zip(images, texts, strict=True) for text in of]
        flat = _by_parts(pairs, lambda part: self._fits(*_inputs(part, self.processor, self.model)))
        found = iter(flat)
        return [[float(next(found)) for _ in of] for of in texts]

    def _fits(self, inputs: Any, kind: str) -> Tensor:
        if kind == "blip":
            return self.model(**inputs, use_itm_head=True).itm_score.softmax(-1)[:, 1]
        if kind == "blip-2":
            return self.model(**inputs, use_image_text_matching_head=True).logits_per_image.softmax(-1)[:, 1]
        return self.model(**inputs).logits[:, 0].sigmoid()


def load_matcher(model: str, device: str = "cpu") -> Matcher:
    """By a folder or hub id: BLIP, BLIP-2 or ViLT with a matching head, else a CLIP (`metrics.ClipJudge.load`); or the
    CLIP that comes with the ``embedded`` model. Raises ``MahlstickError`` where it is not there."""
    if model == EMBEDDED:
        tower = shipped_tower()
        if tower is None:
            raise MahlstickError(
                "the embedded model comes without a text tower to judge by yet; give a CLIP's folder or hub id, such as"
                " what `mahlstick train clip` writes"
            )
        return ClipMatcher(embedded_judge(device), fingerprint(tower))
    path = Path(model).expanduser()
    if (path / "text_encoder").is_dir():
        parts = [fingerprint(path / name) for name in ("text_encoder", "image_encoder")]
        return ClipMatcher(metrics.ClipJudge.load(str(path), device), " ".join(parts))
    kind = _kind(model, "a CLIP, or a BLIP, BLIP-2 or ViLT with a matching head,")
    if kind not in _MATCHERS:
        return ClipMatcher(metrics.ClipJudge.load(model, device), fingerprint(path))
    return PairMatcher(*_load(model, kind, _MATCHERS[kind], device), fingerprint(path))


def shipped_tower() -> Path | None:
    """The text tower that comes with the embedded model, where it does."""
    return text_tower(embedded_folder())


def embedded_judge(device: str = "cpu") -> metrics.ClipJudge:
    """The embedded image encoder with the text tower that learned to match it, ``clip/text_encoder``; the text encoder
    of the pipeline learned on with its UNet and does not."""
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPTextModel, CLIPVisionModelWithProjection

    folder = embedded_folder()
    return metrics.ClipJudge.of_towers(
        CLIPTextModel.from_pretrained(folder / "clip" / "text_encoder").eval().to(device),
        AutoTokenizer.from_pretrained(folder / "tokenizer"),
        CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder").eval().to(device),
        AutoImageProcessor.from_pretrained(folder / "feature_extractor"),
    )


# ---- what is the answer, and does it follow


@dataclass(frozen=True)
class Asker:
    """A network that answers questions about pictures: BLIP's writes its answers, ViLT's chooses among its labels."""

    model: Any
    processor: Any
    key: str

    def answers(self, images: Sequence[PictureSource], questions: Sequence[str]) -> list[str]:
        """The answer to each of N questions about N pictures."""
        return _by_questions(images, questions, self._answers)

    def _answers(self, pairs: Sequence[tuple[PictureSource, str]]) -> list[str]:
        inputs, kind = _inputs(pairs, self.processor, self.model)
        if kind == "vilt":
            return [self.model.config.id2label[i] for i in self.model(**inputs).logits.argmax(-1).tolist()]
        made = self.model.generate(**inputs, max_new_tokens=10)
        texts = self.processor.tokenizer.batch_decode(made, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def weights_of(self, images: Sequence[PictureSource], questions: Sequence[str], candidates: Sequence[str]) -> Array:
        """(N, candidates): how likely each of the candidates is as the answer, which together make 1.

        BLIP ranks them by their likelihood (2201.12086, section 4.4), ViLT by its labels' sigmoids. Raises
        ``MahlstickError`` for a candidate that ViLT has no label for.
        """
        rows = _by_questions(
            images, questions, lambda pairs: self._weights_of(*_inputs(pairs, self.processor, self.model), candidates)
        )
        return np.array([row.tolist() for row in rows])

    def _weights_of(self, inputs: Any, kind: str, candidates: Sequence[str]) -> Tensor:
        if kind != "vilt":
            return self._likelihoods(inputs, candidates).softmax(-1)
        labels = self.model.config.label2id
        if missing := [text for text in candidates if text not in labels]:
            raise MahlstickError(f"{self.model.name_or_path}: has no answer {missing[0]!r}; give a model of VQA")
        chosen = self.model(**inputs).logits[:, [labels[text] for text in candidates]].sigmoid()
        return chosen / chosen.sum(-1, keepdim=True)

    def _likelihoods(self, inputs: Any, candidates: Sequence[str]) -> Tensor:
        """(N, candidates): log p of each candidate to its end, after the question and the picture."""
        model, tokenizer = self.model, self.processor.tokenizer
        seen = model.vision_model(pixel_values=inputs["pixel_values"]).last_hidden_state
        mask = inputs["attention_mask"]
        asked = model.text_encoder(inputs["input_ids"], attention_mask=mask, encoder_hidden_states=seen)
        columns = []
        for text in candidates:
            ids = tokenizer(text, return_tensors="pt").input_ids.to(seen.device).repeat(len(seen), 1)
            ids[:, 0] = model.decoder_start_token_id
            said = model.text_decoder(
                ids, encoder_hidden_states=asked.last_hidden_state, encoder_attention_mask=mask
            ).logits[:, :-1].log_softmax(-1)  # fmt: skip
            columns.append(said.gather(-1, ids[:, 1:, None]).sum((1, 2)))
        return torch.stack(columns, dim=-1)

    def entailments(self, images: Sequence[PictureSource], texts: Sequence[str]) -> list[Entailment]:
        """Whether each of N texts follows from its picture: visual entailment's three ways (SNLI-VE, 1901.06706).

        A classifier whose labels are these three is taken at its word. Another is asked whether the picture shows the
        text, and by p(yes) / (p(yes) + p(no)), as VQAScore has it (2404.01291), the lower third is a contradiction and
        the upper one an entailment. The thirds are a convention: what lies between has not been said by anyone.
        """
        labels = {label.lower(): label for label in getattr(self.model.config, "label2id", {})}
        if set(labels) == set(ENTAILMENTS):
            return [cast(Entailment, answer.lower()) for answer in self.answers(images, texts)]
        questions = [SHOWS.format(text=text.strip().rstrip(".")) for text in texts]
        yes = self.weights_of(images, questions, ("yes", "no"))[:, 0]
        return ["contradiction" if p < THIRD else "entailment" if p > 2 * THIRD else "neutral" for p in yes]


def load_asker(model: str, device: str = "cpu") -> Asker:
    """From a folder or hub id: a BLIP or a ViLT for questions. Raises ``MahlstickError`` where it is neither."""
    needed = "a BLIP or a ViLT that answers questions"
    kind = _kind(model, needed)
    if kind not in _ASKERS:
        raise MahlstickError(f"{model}: is a {kind}; give {needed}")
    return Asker(*_load(model, kind, _ASKERS[kind], device), fingerprint(Path(model).expanduser()))


@dataclass(frozen=True)
class Question:
    """``text`` may hold ``{caption}``; of the ``answers`` any is right; ``name``: of the only picture it is about."""

    text: str
    answers: tuple[str, ...]
    name: str | None = None

    def is_right(self, answer: str) -> bool:
        """Whether an answer is one of the right ones, but for case, articles and punctuation, as VQA compares them."""
        return plain(answer) in {plain(known) for known in self.answers}


def plain(answer: str) -> str:
    """An answer as VQA's evaluation compares it (1505.00468): small letters, without articles and punctuation."""
    words = re.sub(r"[^\w\s]", " ", answer.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def read_questions(path: str) -> list[Question]:
    """From lines of JSON: ``{"question": "is there a fox?", "answer": "yes", "file_name": "fox.png"}``; the answer, a
    text or a list, is yes and the question about every picture unless given. Raises ``MahlstickError`` for others."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MahlstickError(
            f"{path}: cannot be read ({error}); give a file of questions, a line of JSON each"
        ) from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            answers = row.get("answer", "yes")
            question = Question(row["question"], tuple([answers] if isinstance(answers, str) else answers),
                                row.get("file_name"))  # fmt: skip
            if not all(isinstance(text, str) for text in (question.text, *question.answers)):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MahlstickError(
                f'{path} line {number}: is no question; write {{"question": "is there a fox?", "answer": "yes"}}'
            ) from error
        found.append(question)
    if not found:
        raise MahlstickError(f"{path}: holds no question; write a line of JSON for each")
    return found


# ---- networks


def _kind(model: str, needed: str) -> str:
    def load(local: bool) -> str:
        from transformers import AutoConfig

        return cast(str, AutoConfig.from_pretrained(model, local_files_only=local).model_type)

    return cast(str, weights.load(model, needed, load))


def _load(model: str, kind: str, name: str, device: str) -> tuple[Any, Any]:
    def load(local: bool) -> tuple[Any, Any, Any]:
        import transformers

        network, found = getattr(transformers, name).from_pretrained(
            model, local_files_only=local, output_loading_info=True
        )
        processor = transformers.AutoProcessor.from_pretrained(model, local_files_only=local)
        return network.eval().to(device), processor, found["missing_keys"]

    network, processor, missing = weights.load(model, f"a {name}", load)
    metrics.refuse_untrained(model, missing)
    config, tokenizer = network.config, processor.tokenizer
    text = next((getattr(config, name) for name in ("qformer_config", "text_config") if hasattr(config, name)), config)
    tokenizer.model_max_length = min(tokenizer.model_max_length, text.max_position_embeddings)
    return network, processor


def _inputs(pairs: Sequence[tuple[PictureSource, str]], processor: Any, model: Any) -> tuple[Any, str]:
    """(the network's inputs, its kind)."""
    images, texts = [load_picture(image) for image, _ in pairs], [text for _, text in pairs]
    inputs = processor(images=images, text=texts, padding=True, truncation=True, return_tensors="pt")
    return inputs.to(model.device, model.dtype), model.config.model_type


def _by_questions(images: Sequence[PictureSource], questions: Sequence[str], judge: Any) -> list[Any]:
    """As `_by_parts`, pictures of one question together: BLIP's decoder would read what fills up a shorter one."""
    found: list[Any] = [None] * len(questions)
    for text in dict.fromkeys(questions):
        at = [i for i, question in enumerate(questions) if question == text]
        for i, answer in zip(at, _by_parts([(images[i], text) for i in at], judge), strict=True):
            found[i] = answer
    return found


def _by_parts(items: Sequence[Any], judge: Any) -> list[Any]:
    """What ``judge`` finds for each of the items, some at a time."""
    with torch.no_grad():
        return [found for at in range(0, len(items), _BATCH) for found in judge(items[at : at + _BATCH])]
