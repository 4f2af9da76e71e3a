"""Judges of pictures and words: equal to their networks asked directly, and right pairs beat shuffled ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from benchmarks import tiny
from mahlstick.errors import MahlstickError
from mahlstick.pipelines.load import Loader
from mahlstick.training import judges, metrics
from mahlstick.training.config import TrainConfig
from mahlstick.training.evaluate import EvaluateConfig, evaluate
from mahlstick.training.tasks import CLIPTask
from tests import seers
from tests.tiny import save_models

PICTURES = [tiny.picture(i, 40) for i in range(3)]
TEXTS = [["a fox", "an owl"], [], ["a fox is in the green wood"]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, all askers and BLIP's matcher, and ``data``."""
    folder = save_models(tmp_path_factory.mktemp("models"))
    seers.save(seers.MATCHERS["blip"], folder / "matcher")
    for name, make in seers.ASKERS.items():
        seers.save(make, folder / name)
    (folder / "data").mkdir()
    for i, caption in enumerate(("a fox", "an owl", "")):
        tiny.picture(i).save(folder / "data" / f"{i}.png")
        (folder / "data" / f"{i}.txt").write_text(caption)
    return folder


# ---- matching


@pytest.mark.parametrize("kind", seers.MATCHERS)
def test_a_score_is_of_the_pair_alone(kind: str, tmp_path: Path) -> None:
    matcher = judges.load_matcher(str(seers.save(seers.MATCHERS[kind], tmp_path)))
    scores = matcher.scores(PICTURES, TEXTS)
    assert [len(of) for of in scores] == [2, 0, 1]
    for picture, texts, of in zip(PICTURES, TEXTS, scores, strict=True):
        for text, score in zip(texts, of, strict=True):
            assert matcher.scores([picture], [[text]])[0][0] == pytest.approx(score, abs=1e-5)
    contrasts = kind in ("clip", "siglip")
    assert matcher.measure == ("clip_t" if contrasts else "itm")
    assert matcher.threshold == (0.5 if kind.startswith("blip") else None)
    assert all((-1 if contrasts else 0) <= score <= 1 for of in scores for score in of)
    other = matcher.scores(PICTURES[1:], [TEXTS[0], TEXTS[0]])
    assert abs(np.array(other) - scores[0]).min() > 1e-6, "it looks at the picture"
    assert abs(other[0][0] - other[0][1]) > 1e-6, "and reads the words"


def test_matching_is_the_heads_second_class(models: Path) -> None:
    matcher = judges.load_matcher(str(models / "matcher"))
    inputs = matcher.processor(images=PICTURES[:1], text=["a fox"], return_tensors="pt")  # type: ignore[attr-defined]
    with torch.no_grad():
        logits = matcher.model(**inputs).itm_score[0]  # type: ignore[attr-defined]
    assert matcher.scores(PICTURES[:1], [["a fox"]])[0][0] == pytest.approx(float(logits.softmax(-1)[1]), abs=1e-6)


def test_a_network_without_the_head_is_refused(tmp_path: Path) -> None:
    seers.save(seers.blip, tmp_path)
    with pytest.raises(MahlstickError, match="lacks the weights itm_head"):
        judges.load_matcher(str(tmp_path))
    with pytest.raises(MahlstickError, match="lacks the weights"):
        judges.load_asker(str(tmp_path))
    with pytest.raises(MahlstickError, match="cannot be loaded from"):
        judges.load_matcher(str(tmp_path / "nowhere"))


def test_without_a_text_tower_the_embedded_judge_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judges, "shipped_tower", lambda: None)
    with pytest.raises(MahlstickError, match="give a CLIP's folder or hub id, such as what `mahlstick train clip`"):
        judges.load_matcher("embedded")


# ---- answers


@pytest.mark.parametrize("kind", ["blip", "vilt"])
def test_answers_and_their_weights(kind: str, models: Path) -> None:
    asker = judges.load_asker(str(models / kind))
    questions = ["is there a fox?", "how many?", "what is it?"]
    answers = asker.answers(PICTURES, questions)
    assert len(answers) == 3 and asker.answers(PICTURES[1:2], questions[1:2]) == answers[1:2]
    weights = asker.weights_of(PICTURES, questions, ("yes", "no", "fox"))
    assert weights.shape == (3, 3) and np.allclose(weights.sum(1), 1) and (weights > 0).all()
    alone = asker.weights_of(PICTURES[1:2], questions[1:2], ("yes", "no", "fox"))
    assert np.allclose(alone, weights[1:2], atol=1e-5)
    pair = asker.weights_of(PICTURES, questions, ("yes", "no"))
    assert np.allclose(pair[:, 0], weights[:, 0] / weights[:, :2].sum(1), atol=1e-6)
    if kind == "vilt":
        assert set(answers) <= {"yes", "no", "fox", "2"}
        with pytest.raises(MahlstickError, match="has no answer 'maybe'"):
            asker.weights_of(PICTURES, questions, ("maybe",))


def test_a_likelihood_is_that_of_the_networks_own_loss(models: Path) -> None:
    asker = judges.load_asker(str(models / "blip"))
    inputs = asker.processor(images=PICTURES[:1], text=["is it?"], return_tensors="pt")
    with torch.no_grad():
        mine = asker._likelihoods(inputs, ("yes", "no"))[0]
        for text, found in zip(("yes", "no"), mine, strict=True):
            labels = asker.processor.tokenizer(text, return_tensors="pt").input_ids
            labels[:, 0] = asker.model.decoder_start_token_id
            loss = asker.model(**inputs, labels=labels).loss
            assert float(found) == pytest.approx(-float(loss) * (labels.shape[1] - 1), abs=1e-4)


def test_entailment_is_by_thirds_or_by_a_classifiers_own_word(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asker = judges.load_asker(str(models / "vilt"))
    given = np.array([[p, 1 - p] for p in (0.0, 0.3, 0.34, 0.66, 0.67, 1.0)])
    asked: list[str] = []

    def weights_of(self: Any, images: Any, questions: list[str], candidates: tuple[str, ...]) -> np.ndarray:
        asked.extend(questions)
        return given

    monkeypatch.setattr(judges.Asker, "weights_of", weights_of)
    found = asker.entailments([PICTURES[0]] * 6, ["a red fox."] * 6)
    assert found == ["contradiction", "contradiction", "neutral", "neutral", "entailment", "entailment"]
    assert set(asked) == {"Does the picture show a red fox?"}
    classifier = judges.load_asker(str(models / "entailment"))
    assert classifier.entailments(PICTURES, ["a", "b", "c"]) == classifier.answers(PICTURES, ["a", "b", "c"])


@pytest.mark.parametrize(
    ("answer", "known", "right"),
    [("Yes.", "yes", True), ("a red fox", "the red fox", True), ("two foxes", "fox", False), ("2", "2", True)],
)
def test_answers_are_compared_as_vqa_does(answer: str, known: str, right: bool) -> None:
    assert judges.Question("?", ("never", known)).is_right(answer) == right


@pytest.mark.parametrize("line", ["is there a fox?", "[]", '{"answer": "yes"}', '{"question": 3}', "\n"])
def test_a_file_of_no_questions_is_told(line: str, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(line)
    with pytest.raises(MahlstickError, match=r"q\.jsonl"):
        judges.read_questions(str(tmp_path / "q.jsonl"))
    with pytest.raises(MahlstickError, match="cannot be read"):
        judges.read_questions(str(tmp_path / "nowhere.jsonl"))


# ---- in an evaluation


def test_an_evaluation_asks_and_matches(models: Path, tmp_path: Path) -> None:
    questions = [{"question": "is there {caption}?"}, {"question": "how many?", "answer": ["2", "fox"]},
                 {"question": "is it?", "file_name": "1.png", "answer": "no"}]  # fmt: skip
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, questions)))
    settings = EvaluateConfig(
        data=str(models / "data"), base=str(models / "base"), out=str(tmp_path / "out"), steps=1, guidance=1, batch=3,
        matcher=str(models / "matcher"), asker=str(models / "vilt"), questions=str(file),
    )  # fmt: skip
    found = evaluate(settings, loader=Loader(), device="cpu", progress=False)
    asker, matcher = judges.load_asker(str(models / "vilt")), judges.load_matcher(str(models / "matcher"))
    for row in found.rows:
        picture, caption = found.report.parent / "without" / row["picture"], row["caption"]
        told = row["without"]
        asked = [(f"is there {caption}?", ["yes"])] if caption else []
        asked += [("how many?", ["2", "fox"])] + ([("is it?", ["no"])] if row["name"] == "1.png" else [])
        right = [asker.answers([picture], [text])[0] in answers for text, answers in asked]
        assert told["vqa_accuracy"] == pytest.approx(np.mean(right))
        if not caption:
            assert not {"itm", "entailed", "contradicted"} & set(told)
            continue
        assert told["itm"] == pytest.approx(matcher.scores([picture], [[caption]])[0][0], abs=1e-5)
        [way] = asker.entailments([picture], [caption])
        assert (told["entailed"], told["contradicted"]) == (way == "entailment", way == "contradiction")
    table = {row[0] for row in found.table()}
    assert {"ITM ↑", "VQA accuracy ↑", "entailed ↑", "contradicted ↓"} <= table


def test_an_evaluation_refuses_judges_that_do_not_do(models: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"data": str(models / "data"), "base": str(models / "base"), "out": str(tmp_path / "out")}
    with pytest.raises(MahlstickError, match="questions are given without asker"):
        EvaluateConfig(**fields, questions="q.jsonl")
    seers.save(seers.clip, tmp_path / "clip")
    (tmp_path / "q.jsonl").write_text('{"question": "is it?", "file_name": "9.png"}')
    for more, error in (
        ({"matcher": str(tmp_path / "clip")}, "is a CLIP; give it as --judge"),
        ({"asker": str(models / "blip"), "questions": str(tmp_path / "q.jsonl")}, "'9.png' is no picture"),
    ):
        with pytest.raises(MahlstickError, match=error):
            evaluate(EvaluateConfig(**fields, **more), loader=Loader(), device="cpu", progress=False)


# ---- right pairs and shuffled ones


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shapes of eight colours with captions."""
    folder = tmp_path_factory.mktemp("shapes")
    names = ("red", "lime", "blue", "black", "yellow", "cyan", "magenta", "gray")
    rows = []
    for i, name in enumerate(names):
        picture = Image.new("RGB", (32, 32), "white")
        ImageDraw.Draw(picture).rectangle((2, 2, 30, 30), fill=name)
        picture.save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": name}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def test_a_text_tower_learns_to_match_a_locked_image_encoder(shapes: Path, tmp_path: Path) -> None:
    """LiT: the image encoder stays to the bit, and afterwards right pairs beat all shuffled ones."""
    from diffusers import StableDiffusionPipeline

    from mahlstick.training.run import train

    pipe = StableDiffusionPipeline(**tiny.components("sd1"))
    before = {name: value.clone() for name, value in pipe.image_encoder.state_dict().items()}
    torch.manual_seed(0)
    pipe.text_encoder = type(pipe.text_encoder)(pipe.text_encoder.config)  # the tests' own stays as it is
    out = train(
        TrainConfig(task="clip", data=str(shapes), out=str(tmp_path / "out"), locked_image=True, steps=30, batch=8,
                    rate=1e-2, warmup=1, held_out=0, validate_every=0, checkpoint_every=100),
        pipe,
    )  # fmt: skip
    matcher = judges.load_matcher(str(out))
    assert isinstance(matcher, judges.ClipMatcher)
    for name, value in matcher.judge.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    texts = [json.loads(line)["text"] for line in (shapes / "metadata.jsonl").read_text().splitlines()]
    scores = np.array(matcher.scores([shapes / f"{i}.png" for i in range(8)], [texts] * 8))
    shuffled = [metrics.clip_t(matcher.judge.images([shapes / f"{i}.png" for i in range(8)]),
                               np.roll(matcher.judge.texts(texts), k, 0)) for k in range(8)]  # fmt: skip
    assert max(shuffled[1:]) < shuffled[0] == pytest.approx(scores.diagonal().mean())
    with pytest.raises(MahlstickError, match="locked_image is for a clip"):
        TrainConfig(task="clip", data="x", out="y", locked_image=True, start="scratch")
    assert CLIPTask.whole_batch


@pytest.mark.skipif(judges.shipped_tower() is None, reason="the embedded model comes without a text tower")
def test_right_pairs_beat_shuffled_ones_in_the_embedded_clip() -> None:
    folder = Path(__file__).parent.parent / "assets" / "examples"
    facts = json.loads((folder / "examples.json").read_text())
    names = sorted({fact["reference"] for fact in facts})
    texts = [name.removesuffix("-reference.png").replace("-", " ") for name in names]
    scores = np.array(judges.load_matcher("embedded").scores([folder / name for name in names], [texts] * len(texts)))
    assert scores.diagonal().mean() > scores[~np.eye(len(texts), dtype=bool)].mean()
