"""Captions are written, filtered and kept: nothing that was there is lost, and nothing is asked twice."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from benchmarks import tiny
from benchmarks.kill_resume import kill_before, on_writes
from mahlstick import cli
from mahlstick.errors import MahlstickError
from mahlstick.training import judges
from mahlstick.training.captions import captioners, embedded, table
from mahlstick.training.captions.journal import Journal
from mahlstick.training.captions.run import CaptionConfig, Done, caption
from mahlstick.training.config import TrainConfig
from mahlstick.training.data import read_dataset
from mahlstick.training.run import train
from tests import seers

COUNT = 5
PICTURES = [tiny.picture(i, 40) for i in range(3)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``captioner``, as training leaves one, and ``clip``."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    parts = {"image_encoder": tiny.image_encoder(), "feature_extractor": tiny.feature_extractor(),
             "tokenizer": tiny.tokenizer()}  # fmt: skip
    decoder = embedded.make_decoder(parts["image_encoder"], parts["tokenizer"])
    with torch.no_grad():
        for weight in decoder.parameters():
            weight.mul_(3)  # so that its words vary
    for name, part in {embedded.DECODER: decoder, **parts}.items():
        part.save_pretrained(folder / "captioner" / name)
    seers.save(seers.clip, folder / "clip")
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(COUNT):
        tiny.picture(i, 40).save(folder / f"{i}.png")
    return folder


def config(models: Path, pictures: Path, **fields: Any) -> CaptionConfig:
    given = {"model": str(models / "captioner"), "tokens": 6, "batch": 2, "report": str(pictures.parent / "report")}
    return CaptionConfig(data=str(pictures), **given | fields)


def run(models: Path, pictures: Path, **fields: Any) -> Done:
    return caption(config(models, pictures, **fields), device="cpu", progress=False)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


# ---- captioners


@pytest.mark.parametrize("kind", seers.CAPTIONERS)
def test_a_family_writes_through_its_real_class(kind: str, tmp_path: Path) -> None:
    captioner = captioners.load(str(seers.save(seers.CAPTIONERS[kind], tmp_path)), device="cpu")
    assert captioner.prompt == captioners.FAMILIES[kind].prompt
    likeliest = captioner.generate(PICTURES, max_new_tokens=5, do_sample=False)
    assert len(likeliest) == 3
    assert max(len(text.split()) for text in likeliest) <= 5, "the prompt is no part of the caption"
    drawn = captioner.generate(PICTURES, max_new_tokens=5, **captioners.sampling("abc", 2, 1.0, 1.0))
    assert len(drawn) == 6 and len(set(drawn)) > 1
    alone = captioner.generate(PICTURES[1:2], max_new_tokens=5, **captioners.sampling("b", 2, 1.0, 1.0))
    assert alone == drawn[2:4], "what a picture is called does not depend on its neighbours"


def test_a_prompt_is_told_and_not_repeated(tmp_path: Path) -> None:
    folder = str(seers.save(seers.blip, tmp_path))
    plain, told = (captioners.load(folder, prompt, device="cpu") for prompt in (None, "a b c"))
    options = {"max_new_tokens": 8, "do_sample": False}
    assert plain.generate(PICTURES, **options) != told.generate(PICTURES, **options)
    assert max(len(text.split()) for text in told.generate(PICTURES, **options)) <= 8
    with pytest.raises(MahlstickError, match="reads none; leave it out"):
        captioners.load(str(seers.save(seers.encoder_decoder, tmp_path / "other")), "a b c", device="cpu")


def test_the_trained_captioner_sees(models: Path) -> None:
    captioner = captioners.load(str(models / "captioner"), device="cpu")
    options = {"max_new_tokens": 8, "do_sample": False}
    both = captioner.generate(PICTURES, **options)
    assert both == [captioner.generate([picture], **options)[0] for picture in PICTURES]
    black = Image.new("RGB", (40, 40))
    features = [embedded.features_of(captioner.encoder, captioner.processor(images=[picture], return_tensors="pt")
                                     ["pixel_values"]) for picture in (black, PICTURES[0])]  # fmt: skip
    assert torch.allclose(features[0].mean(-1), torch.zeros(()), atol=1e-5)
    assert not torch.allclose(*features, atol=0.1)


def test_a_captioner_learns_to_name_what_it_sees(pictures: Path, tmp_path: Path) -> None:
    names = ("red", "lime", "blue", "cyan", "black")
    for i, name in enumerate(names):
        Image.new("RGB", (32, 32), name).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(name)
    pipe = StableDiffusionPipeline(**tiny.components("sd1"))
    out = train(
        TrainConfig(task="captioner", data=str(pictures), out=str(tmp_path / "out"), steps=150, batch=5, rate=3e-3,
                    warmup=1, held_out=0, validate_every=0, checkpoint_every=100),
        pipe,
    )  # fmt: skip
    captioner = captioners.load(str(out), device="cpu")
    made = captioner.generate([Image.open(pictures / f"{i}.png") for i in range(5)], max_new_tokens=8, do_sample=False)
    assert ["".join(text.split()) for text in made] == list(names)


def test_the_loss_ends_at_the_first_end_of_text() -> None:
    tokenizer, encoder = tiny.tokenizer(), tiny.image_encoder()
    decoder = embedded.make_decoder(encoder, tokenizer).eval()
    features = torch.randn(2, 4, encoder.config.hidden_size)
    ids = tokenizer(["a red fox", "owl"], padding="max_length", max_length=20, return_tensors="pt").input_ids
    both = embedded.loss_of(decoder, features, ids)
    length = 5  # start, three letters, end
    alone = embedded.loss_of(decoder, features[1:], ids[1:, :length])
    assert torch.allclose(both[1], alone[0], atol=1e-5)
    said = decoder(ids[1:, :length], encoder_hidden_states=features[1:]).logits[0, :-1].log_softmax(-1)
    wanted = -said.gather(-1, ids[1, 1:length, None]).mean()
    assert torch.allclose(alone[0], wanted, atol=1e-5)


def test_lots_draw_what_the_logits_say_from_the_nucleus_alone() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    rows = 4000
    lots = captioners.Lots([str(i) for i in range(rows)], 1.0, 0.9)
    drawn = lots(torch.zeros(rows, 1).long(), logits.expand(rows, -1)).argmax(1)
    shares = torch.bincount(drawn, minlength=4) / rows
    assert shares[3] == 0, "the first three reach 0.9"
    assert np.allclose(shares[:3], np.array([0.5, 0.3, 0.15]) / 0.95, atol=0.03)
    sure = captioners.Lots([str(i) for i in range(rows)], 0.1, 1.0)
    assert (sure(torch.zeros(rows, 1).long(), logits.expand(rows, -1)).argmax(1) == 0).float().mean() > 0.98


def test_a_missing_model_is_told_with_three_ways_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MahlstickError) as told:
        captioners.load("owner/captioner")
    assert "give --model a folder" in str(told.value) and "hf download owner/captioner" in str(told.value)
    assert "leave --model out for the embedded captioner" in str(told.value) and "\n" not in str(told.value)
    monkeypatch.setattr(captioners, "shipped_captioner", lambda: None)
    with pytest.raises(MahlstickError, match="mahlstick train captioner --data"):
        captioners.load()


def test_what_is_no_captioner_is_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(MahlstickError, match=r"is a clip, which is no captioner; give one of blip, blip-2"):
        captioners.load(str(models / "clip"))
    seers.save(seers.MATCHERS["blip"], tmp_path)
    with pytest.raises(MahlstickError, match="lacks the weights"):
        captioners.load(str(tmp_path))


# ---- journal


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 200), st.integers(1, 3))
def test_a_journal_cut_anywhere_loses_no_whole_line(tmp_path_factory: pytest.TempPathFactory, cut: int, n: int) -> None:
    folder = tmp_path_factory.mktemp("journal")
    for i in range(3):
        Journal(folder).add("key", {f"picture {i}": [f"ein fräulein {i}"]})
    data = (folder / ".captions.jsonl").read_bytes()
    cut = min(cut, len(data))
    (folder / ".captions.jsonl").write_bytes(data[:cut])
    whole = [i for i, end in enumerate(np.cumsum([len(line) + 1 for line in data.split(b"\n")])[:3]) if cut >= end - 1]
    assert [*Journal(folder).of("key")] == [f"picture {i}" for i in whole]
    for i in range(n):
        Journal(folder).add("key", {f"new {i}": ["x"]})
    wanted = {f"picture {i}": [f"ein fräulein {i}"] for i in whole} | {f"new {i}": ["x"] for i in range(n)}
    assert Journal(folder).of("key") == wanted and not Journal(folder).of("other")


def test_a_folder_that_cannot_be_written_is_told_before_a_model_writes(models: Path, pictures: Path) -> None:
    (pictures / ".captions.jsonl").mkdir()
    with pytest.raises(MahlstickError, match="cannot be written"):
        run(models, pictures)


# ---- what is written


def test_pictures_get_captions_that_training_reads(models: Path, pictures: Path) -> None:
    done = run(models, pictures)
    assert (done.pictures, done.kept, done.skipped) == (COUNT, COUNT, [])
    wanted = captioners.load(str(models / "captioner"), device="cpu").generate(
        [Image.open(pictures / f"{i}.png") for i in range(COUNT)], max_new_tokens=6, do_sample=False
    )
    assert [" ".join(text.split()) for text in wanted] == [row["text"][0] for row in lines(pictures)]
    assert [example.captions for example in read_dataset(pictures)] == [tuple(row["text"]) for row in lines(pictures)]


def test_several_captions_are_drawn_by_the_seed_and_not_repeated(models: Path, pictures: Path) -> None:
    run(models, pictures, captions=4, seed=3)
    first = lines(pictures)
    assert all(1 < len(row["text"]) <= 4 and len(set(row["text"])) == len(row["text"]) for row in first)
    run(models, pictures, captions=4, seed=4)
    assert lines(pictures) != first
    run(models, pictures, captions=4, seed=3, batch=5)
    assert lines(pictures) == first


def test_what_was_there_is_kept(models: Path, pictures: Path) -> None:
    facts = [{"file_name": "1.png", "text": "an owl", "rating": 5, "box": [1, 2]},
             {"file_name": "0.png", "caption": ["a fox", "Füchse"], "by": None},
             {"file_name": "2.png"}]  # fmt: skip
    (pictures / "metadata.jsonl").write_text("\n\n".join(json.dumps(row) for row in facts))
    run(models, pictures)
    found = lines(pictures)
    own = ("text", "caption_original", "caption_written")
    assert [{name: value for name, value in row.items() if name not in own} for row in found] == [
        {name: value for name, value in row.items() if name != "text"} for row in facts
    ], "in their order, with every fact, and without the pictures that were not named"
    assert [row["caption_original"] for row in found] == [["an owl"], ["a fox", "Füchse"], []]
    assert [row["text"] for row in found] == [row["caption_original"] + row["caption_written"] for row in found]
    before = (pictures / "metadata.jsonl").read_bytes()
    run(models, pictures)
    assert (pictures / "metadata.jsonl").read_bytes() == before, "again is no change"
    run(models, pictures, existing="replace")
    assert [row["text"] for row in lines(pictures)] == [row["caption_written"] for row in found]
    run(models, pictures)
    assert (pictures / "metadata.jsonl").read_bytes() == before
    shutil.rmtree(pictures / ".captions.jsonl", ignore_errors=True)
    run(models, pictures, existing="skip", captions=3)
    assert [len(row["caption_written"]) > 1 for row in lines(pictures)] == [False, False, True]


def test_a_caption_put_in_by_hand_counts_as_ones_own(models: Path, pictures: Path) -> None:
    run(models, pictures)
    rows = lines(pictures)
    rows[0]["text"] = ["my words"]
    (pictures / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(models, pictures, captions=2)
    assert lines(pictures)[0]["caption_original"] == ["my words"] and "my words" in lines(pictures)[0]["text"]


def test_caption_files_partners_and_subfolders_stay_what_they_were(models: Path, pictures: Path) -> None:
    (pictures / "deep").mkdir()
    tiny.picture(9, 40).save(pictures / "deep" / "9.png")
    (pictures / "0.txt").write_text("a fox\nan animal\n")
    for i in (*range(COUNT), "deep/9"):
        (pictures / "control" / str(i)).parent.mkdir(parents=True, exist_ok=True)
        tiny.picture(1, 40).save(pictures / "control" / f"{i}.png")
    before = read_dataset(pictures)
    run(models, pictures)
    after = read_dataset(pictures)
    assert [(e.name, e.picture, e.control) for e in before] == [(e.name, e.picture, e.control) for e in after]
    assert after[0].captions[:2] == ("a fox", "an animal") and (pictures / "0.txt").exists()


def test_each_table_is_written_where_it_was(models: Path, pictures: Path) -> None:
    for name in ("one", "two"):
        (pictures / name).mkdir()
        shutil.move(pictures / ("0.png" if name == "one" else "1.png"), pictures / name / "p.png")
        (pictures / name / "metadata.jsonl").write_text(json.dumps({"file_name": "p.png", "of": name}) + "\n")
    run(models, pictures)
    assert [lines(pictures / name)[0]["of"] for name in ("one", "two")] == ["one", "two"]
    assert not (pictures / "metadata.jsonl").exists(), "pictures that no table names are left alone"
    run(models, pictures, unnamed=True)
    assert [row["file_name"] for row in lines(pictures)] == ["2.png", "3.png", "4.png"]


def test_broken_pictures_are_named_and_left_as_they_are(
    models: Path, pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (pictures / "1.png").write_bytes((pictures / "1.png").read_bytes()[:200])
    (pictures / "1.txt").write_text("half a fox")
    with caplog.at_level(logging.WARNING):
        done = run(models, pictures, filter=str(models / "clip"))
    assert [name for name, _ in done.skipped] == ["1.png"] and "1.png is left out" in caplog.text
    assert read_dataset(pictures)[1].captions in (("",), ("half a fox",))
    for i in range(COUNT):
        (pictures / f"{i}.png").write_bytes(b"no picture")
    with pytest.raises(MahlstickError, match=r"none of 5 pictures can be read; the first is '0.png'"):
        run(models, pictures)


def test_two_names_of_one_picture_are_one(models: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(pictures / "0.png", pictures / "copy.png")
    seen: list[int] = []
    generate = embedded.EmbeddedCaptioner.generate

    def counted(self: Any, images: Any, **options: Any) -> list[str]:
        seen.append(len(images))
        return generate(self, images, **options)

    monkeypatch.setattr(embedded.EmbeddedCaptioner, "generate", counted)
    run(models, pictures)
    assert sum(seen) == COUNT and lines(pictures)[0]["text"] == lines(pictures)[-1]["text"]
    run(models, pictures)
    assert sum(seen) == COUNT, "nothing is asked twice"


# ---- filter


def test_what_does_not_fit_is_dropped_and_stays_beside(models: Path, pictures: Path) -> None:
    done = run(models, pictures, captions=4, filter=str(models / "clip"), quantile=0.5)
    assert done.outcome is not None and done.report is not None
    assert abs(done.outcome.dropped - done.outcome.captions / 2) <= 1
    judge = judges.load_matcher(str(models / "clip"))
    kept = 0
    for row in lines(pictures):
        [wanted] = judge.scores([pictures / row["file_name"]], [row["caption_written"]])
        assert row["caption_scores"] == pytest.approx(wanted, abs=1e-5)
        fits = [text for text, score in zip(row["caption_written"], wanted, strict=True)
                if score >= done.outcome.threshold]  # fmt: skip
        assert row["text"] == fits
        kept += len(fits)
    assert kept == done.kept == done.outcome.captions - done.outcome.dropped
    told = done.report.read_text()
    assert f"{done.outcome.dropped} captions" in told and f"{done.outcome.bare} pictures have no caption left" in told
    for name in ("histogram.png", "border.png"):
        assert name in told and Image.open(done.report.parent / name).getcolors(2**24) is not None
    assert len(read_dataset(pictures)) == COUNT


def test_another_threshold_asks_no_model_again(models: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"captions": 3, "filter": str(models / "clip")}
    first = run(models, pictures, **options)
    assert first.outcome and first.outcome.threshold is None and first.outcome.dropped == 0
    monkeypatch.setattr(judges.ClipMatcher, "scores", None)
    monkeypatch.setattr(embedded.EmbeddedCaptioner, "generate", None)
    scores = sorted(score for row in lines(pictures) for score in row["caption_scores"])
    done = run(models, pictures, **options, threshold=scores[3] + 1e-5)
    assert done.outcome and done.outcome.dropped >= 4
    assert run(models, pictures, **options).kept == first.kept, "what was dropped is not lost"


def test_captions_that_are_there_are_filtered_without_a_captioner(models: Path, pictures: Path) -> None:
    for i in range(COUNT):
        (pictures / f"{i}.txt").write_text(f"caption {i}\na b c\n")
    done = run(models, pictures, model="none", filter=str(models / "clip"), quantile=0.3)
    assert done.outcome and done.outcome.captions == 2 * COUNT and done.outcome.dropped == 3
    assert all(row["caption_original"] == [f"caption {i}", "a b c"] for i, row in enumerate(lines(pictures)))
    with pytest.raises(MahlstickError, match="there is nothing to do"):
        config(models, pictures, model="none")
    with pytest.raises(MahlstickError, match=r"name one, e\.g\. --filter"):
        config(models, pictures, threshold=0.2)
    with pytest.raises(MahlstickError, match="give one of them"):
        config(models, pictures, filter="clip", threshold=0.2, quantile=0.1)


# ---- interruptions


def test_a_kill_before_any_write_loses_and_repeats_nothing(models: Path, pictures: Path, tmp_path: Path) -> None:
    """SIGKILL before each change of a file; then the command again."""
    options = {"captions": 2, "filter": str(models / "clip"), "quantile": 0.3, "batch": 3, "tokens": 3}
    whole = shutil.copytree(pictures, tmp_path / "whole")
    (tmp_path / "w").mkdir()
    assert forked(models, whole, tmp_path / "w", None, options) == 0
    wanted = lines(whole)
    for write in range(100):
        folder = shutil.copytree(pictures, tmp_path / f"killed-{write}" / "pictures")
        if forked(models, folder, folder.parent, write, options) == 0:
            break
        assert forked(models, folder, folder.parent, None, options) == 0
        assert lines(folder) == wanted
        journal = [json.loads(line) for line in (folder / ".captions.jsonl").read_text().splitlines()]
        found = [(row["key"], row["picture"]) for row in journal]
        assert len(found) == len(set(found)) == 2 * COUNT, "each picture is captioned once and scored once"
        assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}
        shutil.rmtree(folder.parent)
    assert 8 < write < 99, "it was killed at each of its writes"


def forked(models: Path, folder: Path, here: Path, write: int | None, options: dict[str, Any]) -> int:
    """The command in a process of its own; → its exit code, negative for a signal."""
    if not (pid := os.fork()):
        code = 1
        try:
            torch.set_num_threads(1)  # a fork takes no threads along
            os.chdir(here)
            if write is not None:
                on_writes(lambda current: kill_before(write, current))
            run(models, folder, **options)
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code


# ---- the command


def test_the_command(models: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["caption", str(pictures), "--model", str(models / "captioner"), "--tokens", "6", "--device", "cpu"]
    more = ["--filter", str(models / "clip"), "--quantile", "0.4", "--report", str(pictures.parent / "report")]
    assert cli.main([*given, *more]) == 0
    told = capsys.readouterr().out
    assert "metadata.jsonl  3 captions of 5 pictures" in told and "2 of 5 captions dropped; look at" in told
    assert cli.main([*given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == COUNT


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["nowhere"], "'nowhere' is no folder"),
        (["{pictures}", "--captions", "0"], "captions"),
        (["{pictures}", "--quantile", "0.2"], "--filter my_clip"),
        (["{pictures}", "--model", "no/where"], "hf download no/where"),
    ],
)
def test_the_command_says_what_is_wrong(
    arguments: list[str], error: str, pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert cli.main(["caption", *(text.format(pictures=pictures) for text in arguments)]) == 2
    told = capsys.readouterr().err
    assert error in told and told.count("\n") == 1 and not (pictures / "metadata.jsonl").exists()


def test_a_packed_dataset_is_refused(models: Path, tmp_path: Path) -> None:
    import tarfile

    tiny.picture(0).save(tmp_path / "0.png")
    (tmp_path / "packed").mkdir()
    with tarfile.open(tmp_path / "packed" / "0.tar", "w") as archive:
        archive.add(tmp_path / "0.png", "0.png")
    with pytest.raises(MahlstickError, match="unpack its pictures"):
        table.read(tmp_path / "packed")
