"""Evaluation: the report's figures are those of the pictures beside it, and no picture is made twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageDraw

import mahlstick as ms
from benchmarks import tiny
from mahlstick import cli
from mahlstick.errors import MahlstickError
from mahlstick.pipelines.load import Loader
from mahlstick.training import metrics
from mahlstick.training.evaluate import (
    EvaluateConfig,
    Evaluation,
    Mean,
    choose_examples,
    choose_judge,
    draw,
    evaluate,
    summarise,
    verdict,
)
from tests.tiny import save_models, sd, sdxl

CAPTIONS = ["a red fox", "an owl", "an owl", "a green tree", ""]
WAYS = ("without", "with", "true")
LOADER = Loader()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, ``net``, ``ip``; ``clip``; and ``data``, five shapes of which four have captions."""
    folder = save_models(tmp_path_factory.mktemp("models"))
    text, vision = tiny.text_encoder().config.to_dict(), tiny.image_encoder().config.to_dict()
    torch.manual_seed(0)
    clip = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    for part in (transformers.CLIPModel(clip), tiny.feature_extractor(), tiny.tokenizer()):
        part.save_pretrained(folder / "clip")
    known = {"num_labels": 3, "id2label": {0: "red fox", 1: "owl", 2: "tree, bush"}}
    small = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
        **known,
    )
    transformers.ViTForImageClassification(small).save_pretrained(folder / "classifier")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "classifier")
    (folder / "data").mkdir()
    for i, caption in enumerate(CAPTIONS):
        picture = Image.new("RGB", (80, 64), "white")
        ImageDraw.Draw(picture).ellipse((10 + 4 * i, 8, 50 + 4 * i, 40 + 4 * i), fill=(40 * i, 90, 200 - 40 * i))
        picture.save(folder / "data" / f"{i}.png")
        (folder / "data" / f"{i}.txt").write_text(caption)
    (folder / "wordless").mkdir()
    Image.new("RGB", (64, 64)).save(folder / "wordless" / "0.png")
    return folder


def config(models: Path, out: Path, **fields: Any) -> EvaluateConfig:
    given = {"data": models / "data", "base": models / "base", "control": models / "net", "out": out}
    paths = {name: str(path) for name, path in given.items()}
    return EvaluateConfig(**paths | {"annotator": "canny", "steps": 2, "guidance": 2, "batch": 5} | fields)


def run(models: Path, out: Path, **fields: Any) -> Evaluation:
    return evaluate(config(models, out, **fields), loader=LOADER, device="cpu", progress=False)


@pytest.fixture(scope="module")
def found(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """Everything at once."""
    more = {"image_prompt": models / "ip", "judge": models / "clip", "features": models / "clip"}
    out = tmp_path_factory.mktemp("report")
    return run(models, out, batch=3, annotator_options={"low": 50}, **{name: str(path) for name, path in more.items()})


def files(found: Evaluation, column: str) -> list[Path]:
    return [found.report.parent / column / row["picture"] for row in found.rows]


def pixels(path: Path) -> list[Any]:
    return np.asarray(Image.open(path)).tolist()


def stamps(out: Path) -> dict[str, int]:
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in out.glob("*/*.png")}


# pictures


def test_a_picture_in_a_batch_is_its_own() -> None:
    pipe = sd()
    net = tiny.awake(ms.ControlNet.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32, 32, 32)))
    prompts, seeds, controls = ["fox", "owl"], [3, 8], [tiny.picture(0), tiny.picture(1)]
    both = draw(pipe, prompts, seeds, (64, 64), [ms.Control(net, controls)], steps=2)
    for i in range(2):
        alone = draw(pipe, prompts[i : i + 1], seeds[i : i + 1], (64, 64), [ms.Control(net, controls[i])], steps=2)
        assert abs(np.asarray(alone[0], int) - np.asarray(both[i], int)).max() <= 1
    free = draw(pipe, prompts, seeds, (64, 64), steps=2)
    assert abs(np.asarray(free[0], int) - np.asarray(both[0], int)).max() > 1
    assert draw(pipe, ["fox"], [3], (64, 64), steps=2) == free[:1], "attached and detached without a trace"


def test_broken_weights_are_told() -> None:
    pipe = sd()
    with torch.no_grad():
        pipe.unet.conv_in.weight.fill_(float("nan"))
    with pytest.raises(MahlstickError, match=r"pictures are NaN.*try float32"):
        draw(pipe, ["fox"], [0], (64, 64), steps=1)


def test_the_same_words_and_seed_without_and_with(models: Path, tmp_path: Path) -> None:
    found = run(models, tmp_path, control_scale=0.0, count=2)
    for without, with_ in zip(files(found, "without"), files(found, "with"), strict=True):
        assert pixels(without) == pixels(with_)
    assert found.figures["edge_f1"]["difference"] == Mean(0.0, 0.0, 0.0)


def test_pictures_lie_fitted_in_columns(found: Evaluation) -> None:
    out = found.report.parent
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"control", "true", "without", "with"}
    for column in ("control", *WAYS):
        assert all(Image.open(file).size == (64, 64) for file in files(found, column))
    assert not list(out.rglob(".*")), "nothing half-written"


# figures


def test_figures_are_those_of_the_pictures(found: Evaluation, models: Path) -> None:
    judge, figures = metrics.ClipJudge.load(str(models / "clip")), found.figures
    seen = {way: judge.images(files(found, way)) for way in WAYS}
    worded = [i for i, row in enumerate(found.rows) if row["caption"]]
    captions = [found.rows[i]["caption"] for i in worded]
    texts = sorted(set(captions))
    own = [texts.index(caption) for caption in captions]
    network = metrics.feature_network(str(models / "clip"))
    assert len(worded) == 4 and len(texts) == 3
    for way in WAYS:
        pairs = zip(files(found, "control"), files(found, way), strict=True)
        kept = [metrics.condition_error("canny", control, picture, low=50)[1] for control, picture in pairs]
        assert figures["edge_f1"][way].value == pytest.approx(np.mean(kept))
        assert [row[way]["edge_f1"] for row in found.rows] == kept
        vectors = seen[way][worded]
        assert figures["clip_t"][way].value == pytest.approx(metrics.clip_t(vectors, judge.texts(captions)))
        recall = metrics.recall_at(1, vectors, judge.texts(texts), own)
        assert figures["recall_at_1"][way].value == pytest.approx(recall)
        back = metrics.image_recall_at(1, judge.texts(texts), vectors, own)
        assert figures["image_recall_at_1"][way].value == pytest.approx(back)
        if way != "true":
            assert figures["clip_i"][way].value == pytest.approx(metrics.clip_i(seen[way], seen["true"]))
            pair = network(files(found, way)), network(files(found, "true"))
            assert figures["likeness"][way].value == pytest.approx(metrics.clip_i(*pair))
            distance = metrics.frechet_distance(*pair)
            assert figures["frechet_distance"][way].value == pytest.approx(distance)
    assert figures["edge_f1"]["true"].value == 1
    assert "recall_at_5" not in figures, "five of three captions is no test"
    assert "true" not in figures["clip_i"], "a picture is like itself"


def test_a_base_alone_is_judged_by_a_classifier(models: Path, tmp_path: Path) -> None:
    fields = {
        "control": None,
        "annotator": None,
        "classifier": str(models / "classifier"),
        "features": str(models / "clip"),
    }
    found = run(models, tmp_path, **fields)
    classifier = metrics.Classifier.load(fields["classifier"])
    named = {"a red fox": 0, "an owl": 1, "a green tree": 2}
    for way in ("without", "true"):
        likeliest = classifier.scores(files(found, way)).argmax(1)
        right = [float(likeliest[i] == named[row["caption"]]) for i, row in enumerate(found.rows) if row["caption"]]
        assert len(right) == 4
        assert found.figures["named_at_1"][way].value == pytest.approx(np.mean(right))
    features = metrics.feature_network(str(models / "clip"))(files(found, "true"))
    halves = metrics.frechet_distance(features[::2], features[1::2])
    assert found.figures["frechet_distance"]["true"].value == pytest.approx(halves)
    pipe, errors = sd(), []
    for file in files(found, "true"):
        true = torch.from_numpy(np.asarray(Image.open(file), np.float32)).permute(2, 0, 1) / 127.5 - 1
        with torch.no_grad():
            y = pipe.vae.decode(pipe.vae.encode(true[None]).latent_dist.mean).sample[0].clamp(-1, 1)
        errors.append(-10 * torch.log10(((y - true) / 2).square().mean()).item())
    assert found.figures["psnr"]["without"].value == pytest.approx(np.mean(errors), abs=0.02), "rounded to bytes"
    assert not (tmp_path / "with").exists() and found.table()[0] == ["", "the base", "true pictures"]
    report = found.report.read_text()
    assert "each made from its words" in report and "with " not in report.splitlines()[0]
    assert "named_at_5" not in found.figures, "five of three names is no test"


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        ("a Red Fox runs", 0),
        ("an owlet", None),
        ("a tree", 2),
        ("the owl and a bush", 1),
        ("a fox", None),
        ("", None),
    ],
)
def test_the_longest_name_in_a_caption(models: Path, caption: str, named: int | None) -> None:
    assert metrics.Classifier.load(str(models / "classifier")).named_in(caption) == named


def test_means_and_their_intervals() -> None:
    values = {"without": np.array([0.0, 0.5, np.nan, 1.0]), "with": np.array([0.4, 0.8, np.nan, 1.2])}
    told = summarise(values)
    assert told["with"].value == pytest.approx(0.8)
    change = told["difference"]
    mean, low, high = metrics.mean_with_interval([0.4, 0.3, 0.2])
    assert (change.value, change.low, change.high) == pytest.approx((mean, low, high))


@pytest.mark.parametrize(
    ("measure", "change", "told"),
    [
        ("edge_f1", Mean(0.2, 0.1, 0.3), "+0.200 (+0.100 to +0.300), better"),
        ("depth_rmse", Mean(0.2, 0.1, 0.3), "+0.200 (+0.100 to +0.300), worse"),
        ("depth_rmse", Mean(-0.2, -0.3, -0.1), "-0.200 (-0.300 to -0.100), better"),
        ("clip_t", Mean(0.2, -0.1, 0.3), "+0.200 (-0.100 to +0.300), unclear"),
        ("frechet_distance", Mean(-3.0), "-3.000"),
    ],
)
def test_verdict(measure: str, change: Mean, told: str) -> None:
    assert verdict(measure, {"difference": change}) == told


def test_the_report_tells_all(found: Evaluation, models: Path) -> None:
    out = found.report.parent
    text = found.report.read_text(encoding="utf-8")
    for cell in ("| edge F1 ↑ |", "| CLIP-T ↑ |", "| CLIP-I ↑ |", "| recall@1 ↑ |", "| FID ↓ |", "(contact_sheet.png)"):
        assert cell in text
    assert f"over {models / 'clip'}" in text and "Of only 5 pictures" in text
    kept = json.loads((out / "figures.json").read_text(encoding="utf-8"))
    assert EvaluateConfig(**kept["settings"]) == found.config
    assert kept["figures"]["edge_f1"]["with"]["value"] == found.figures["edge_f1"]["with"].value
    rows = [json.loads(line) for line in (out / "report.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == found.rows and {row["name"] for row in rows} == {f"{i}.png" for i in range(5)}
    assert Image.open(out / "contact_sheet.png").height > 5 * 160


def test_references_and_control_pictures_of_the_dataset(models: Path, tmp_path: Path) -> None:
    for part, seed in (("control", 0), ("reference", 10)):
        (tmp_path / part).mkdir()
        for i in range(5):
            tiny.picture(seed + i, 80).resize((80, 64)).save(tmp_path / part / f"{i}.png")
    more = {"image_prompt": str(models / "ip"), "references": str(tmp_path / "reference"), "count": 2}
    more["classifier"] = str(models / "classifier")
    found = run(models, tmp_path / "out", annotator=None, control_pictures=str(tmp_path / "control"), **more)
    classifier = metrics.Classifier.load(str(models / "classifier"))
    own = [classifier.named_in(row["caption"]) for row in found.rows]
    shown = classifier.scores(files(found, "reference")).argmax(1)
    for way in ("without", "with"):
        scores = zip(classifier.scores(files(found, way)), own, shown, strict=True)
        wins = [metrics.text_wins(row, a, b) for row, a, b in scores if a is not None and a != b]
        assert wins and found.figures["text_wins"][way].value == pytest.approx(np.mean(wins))
    assert set(found.figures) == {"clip_i", "named_at_1", "text_wins"} and "true" in found.figures["clip_i"]
    assert "How well the control is kept is not measured" in found.notes[2]
    judge, _ = choose_judge(found.config, sd())
    assert judge is not None
    wanted = judge.images(files(found, "reference"))
    assert found.figures["clip_i"]["with"].value == pytest.approx(
        metrics.clip_i(judge.images(files(found, "with")), wanted), abs=1e-5
    )
    for row in found.rows:
        given = tmp_path / "reference" / row["name"]
        assert pixels(found.report.parent / "reference" / row["picture"]) == pixels(given)


# the judge


def test_a_judge_of_the_base_reads_only_with_a_tower_of_its_own(models: Path, tmp_path: Path) -> None:
    wanted = config(models, tmp_path)
    judge, notes = choose_judge(wanted, sd())
    assert judge is not None and judge.tokenizer is None
    assert "flatters" in notes[0] and "CLIP-T and recall are left out" in notes[1]

    xl = sdxl()
    assert choose_judge(wanted, xl)[0].text_model is xl.text_encoder_2  # type: ignore[union-attr]
    xl.image_encoder = None
    judge, notes = choose_judge(wanted, xl)
    assert judge is None and notes[0].startswith("CLIP-T, CLIP-I and recall are left out")


# going on


def test_nothing_is_made_twice(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run(models, out, count=3)
    before, picture = stamps(out), np.asarray(Image.open(out / "with" / "00001.png"), int)
    again = run(models, out, count=3, judge=str(models / "clip"))  # measured in another way
    assert stamps(out) == before and again.figures["edge_f1"] == first.figures["edge_f1"]

    (out / "with" / "00001.png").unlink()
    run(models, out, count=4)  # one was lost, one more is wanted
    after = stamps(out)
    assert {name for name in before if after[name] == before[name]} == {n for n in before if "00001" not in n}
    assert len(after) == len(before) + 4
    assert abs(np.asarray(Image.open(out / "with" / "00001.png"), int) - picture).max() <= 1

    run(models, out, count=3, control_scale=0.5)
    changed = stamps(out)
    assert all(changed[name] != after[name] for name in before)


def test_changed_weights_and_pictures_are_made_anew(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "net", tmp_path / "net")
    shutil.copytree(models / "data", tmp_path / "data")
    here = {"control": str(tmp_path / "net"), "data": str(tmp_path / "data"), "steps": 1}
    out = tmp_path / "out"
    run(models, out, **here)
    before = stamps(out)
    (tmp_path / "data" / "3.txt").write_text("a blue tree")
    found = run(models, out, **here)
    made = {name for name, stamp in stamps(out).items() if stamp != before[name]}
    [row] = [row for row in found.rows if row["name"] == "3.png"]
    assert made == {f"{column}/{row['picture']}" for column in ("control", *WAYS)}

    net = ms.ControlNet.from_pretrained(tmp_path / "net")
    with torch.no_grad():
        net.controlnet_mid_block.weight += 1
    net.save_pretrained(tmp_path / "net")
    before = stamps(out)
    run(models, out, **here)
    assert not set(stamps(out).items()) & set(before.items())


def test_a_larger_count_goes_on_with_the_same_pictures(models: Path, tmp_path: Path) -> None:
    names = [[e.name for e in choose_examples(config(models, tmp_path, count=n))] for n in (2, 4)]
    assert names[0] == names[1][:2]
    other = [e.name for e in choose_examples(config(models, tmp_path, seed=1))]
    assert sorted(other) == [f"{i}.png" for i in range(5)] and other[:4] != names[1]


# errors


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"control": None, "image_prompt": "ip"}, "annotator is given without control"),
        ({"references": "refs"}, "references is given without image_prompt"),
        ({"classifier": "{models}/clip"}, "clip' lacks the weights classifier"),
        (
            {"classifier": "{models}/classifier", "data": "{models}/wordless"},
            "no caption of .*wordless holds one of its",
        ),
        ({"annotator": "kanny"}, "annotator 'kanny' is unknown; did you mean canny"),
        ({"annotator": "shuffle"}, "annotator 'shuffle' has no measure; one of these has"),
        ({"annotator": None}, "has no control pictures; add them, or name an annotator"),
        ({"annotator_options": {"sharp": 1}}, "annotator 'canny' has no option 'sharp'; it takes low, high"),
        ({"control": "{models}/ip"}, "control: .*ip holds a ip_adapter; give a controlnet"),
        ({"control": "nowhere"}, "nowhere: neither a file or folder nor an embedded adapter"),
        ({"control": "lineart"}, "lineart: this ControlNet was made for"),
        ({"data": "nowhere"}, "dataset 'nowhere' does not exist"),
        ({"base": "nowhere"}, "nowhere: no such file or folder"),
        ({"judge": "{models}/data"}, "data' .*give model= a folder"),
        ({"features": "{models}/data"}, "data' .*give model= a folder"),
        ({"features": "{models}/clip", "count": 1}, "features: one picture has no distribution"),
        ({"steps": 0}, "steps: should be greater than or equal to 1, not 0"),
        ({"resolution": 65}, "resolution: should be a multiple of 8, not 65"),
    ],
)
def test_bad_input(models: Path, tmp_path: Path, fields: dict[str, Any], error: str) -> None:
    given = {name: value.format(models=models) if isinstance(value, str) else value for name, value in fields.items()}
    with pytest.raises(MahlstickError, match=error):
        run(models, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_a_broken_picture_is_named_before_anything_is_made(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "data", tmp_path / "data")
    whole = (tmp_path / "data" / "2.png").read_bytes()
    (tmp_path / "data" / "2.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MahlstickError, match=r"picture '2\.png' is damaged"):
        run(models, tmp_path / "out", data=str(tmp_path / "data"))
    assert not (tmp_path / "out").exists()


# the command


def test_the_command_on_the_embedded_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = Path(ms.__file__).parents[2] / "assets" / "examples"
    (tmp_path / "data").mkdir()
    for name in ("lotus", "lollipop"):
        shutil.copy(examples / f"{name}-reference.png", tmp_path / "data" / f"{name}.png")
        (tmp_path / "data" / f"{name}.txt").write_text(name)
    monkeypatch.chdir(tmp_path)
    command = ["evaluate", "--data", "data", "--control", "lineart@lineart:0.9", "--image-prompt", "ip-adapter"]
    command += ["-o", "sigma=1.5", "--steps", "4", "--out", "report", "--device", "cpu"]
    assert cli.main(command) == 0
    told = capsys.readouterr().out
    assert "edge F1 ↑" in told and "CLIP-T and recall are left out" in told and "report/report.md" in told

    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    settings = found["settings"]
    assert (settings["annotator"], settings["control_scale"], settings["guidance"]) == ("lineart", 0.9, None)
    assert settings["annotator_options"] == {"sigma": 1.5} and found["pictures"] == 2
    assert found["figures"]["clip_i"]["with"]["value"] > found["figures"]["clip_i"]["without"]["value"]
    assert sorted(path.name for path in Path("report").iterdir() if path.is_file()) == [
        "contact_sheet.png", "figures.json", "report.jsonl", "report.md",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "--data is missing; give a folder of pictures"),
        (["--data", "x", "--control", "net@canny", "-o", "low"], "--option low: give NAME=VALUE"),
        (["--data", "x", "--control", "net@canny:99"], "control_scale: should be less than or equal to 10"),
    ],
)
def test_the_command_says_what_is_wrong(arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", *arguments]) == 2
    told = capsys.readouterr().err
    assert error in told and told.count("\n") == 1
