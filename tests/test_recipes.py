"""What makes the embedded model: the pictures, the nets that the trainings begin with, the judges."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

from mahlstick.training.config import TrainConfig, read_config
from mahlstick.training.data import read_dataset
from mahlstick.training.embedded.data import COLOURS, Concept
from mahlstick.training.metrics import Classifier
from mahlstick.training.recipes import __main__ as command
from mahlstick.training.recipes import emoji, judge, models

EMBEDDED = Path(__file__).resolve().parents[1] / "assets" / "embedded"
RECIPES = Path(emoji.__file__).parent
SIDE, COUNT = 32, 20


@pytest.fixture(scope="module")
def atlas() -> emoji.Atlas:
    """Discs that all styles paint in their own grey; no training may see two of the things."""
    rgba = torch.zeros(COUNT, len(emoji.STYLES), 4, SIDE, SIDE, dtype=torch.uint8)
    for concept in range(COUNT):
        rgba[concept, :, 3, 4 + concept % 7 : 24, 6 : 26 - concept % 5] = 255
        rgba[concept, :, :3] = torch.arange(len(emoji.STYLES)).view(-1, 1, 1, 1) * 40
    concepts = [Concept(f"{i:x}", f"thing {i}", ("round",), "", i % 12 == 0, "drink") for i in range(COUNT)]
    return emoji.Atlas(rgba, concepts)


def test_what_is_held_out(atlas: emoji.Atlas) -> None:
    kept, learned = atlas.pairs(held_out=True), atlas.pairs(held_out=False)
    assert len(kept) + len(learned) == COUNT * len(emoji.STYLES) and not {*kept} & {*learned}
    whole = {concept for concept, _ in kept} - {concept for concept, _ in learned}
    assert whole == {0, 12}
    parts = [(concept, style) for concept, style in kept if concept not in whole]
    assert 0 < len(parts) < COUNT and all(style != emoji.SHADED for _, style in parts), (
        "each is known in the shaded style"
    )
    assert atlas.styles().keys() == {concept for concept, _ in learned}


def test_folders_of_pictures(atlas: emoji.Atlas, tmp_path: Path) -> None:
    emoji.write(atlas, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "learn" / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == sum(1 + emoji.copies_of(atlas.concepts[c], style) for c, style in atlas.pairs(held_out=False))
    examples = read_dataset(tmp_path / "learn", control=tmp_path / "learn-control")
    assert len(examples) == len(rows) and examples[0].load("control").size == (SIDE, SIDE)
    assert all(e.reference for e in read_dataset(tmp_path / "learn", reference=tmp_path / "learn-reference"))
    said = {caption for row in rows for caption in row["text"]}
    assert not any(f"thing {i}" in caption.split(",")[0] for caption in said for i in (12,))
    assert {row["style"] for row in rows} == {*emoji.STYLES} - {emoji.LINES} | {"black and white"}
    unseen = read_dataset(tmp_path / "unseen", control=tmp_path / "unseen-glyph")
    assert {example.captions for example in unseen} == {(f"thing {i}",) for i in (0, 12)}
    assert len(read_dataset(tmp_path / "seen")) == len(read_dataset(tmp_path / "colours")) == COUNT - 2
    pairs = read_dataset(tmp_path / "pairs")
    assert len(pairs) == len(atlas.pairs(held_out=True)) - 2 * len(emoji.STYLES)
    assert not any(emoji.SHADED in example.captions[0] for example in pairs)

    before = {path.name: path.read_bytes() for path in (tmp_path / "learn").iterdir()}
    emoji.write(atlas, tmp_path)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "learn").iterdir()}


def test_a_control_picture_lies_on_its_picture(atlas: emoji.Atlas) -> None:
    drawing, rng = atlas.drawing(1, "flat"), random.Random(0)
    for variant in (emoji.Variant(), *emoji.variants("flat", rng, 8)):
        picture, mask = variant.paint(drawing).astype(int), emoji.mask(drawing, variant)[..., 0] > 127
        ground = np.array(emoji.pale(variant.ground) if variant.ground else (255, 255, 255))
        painted = (abs(picture - ground) > 40).any(-1)
        assert (painted & mask).sum() / (painted | mask).sum() > 0.8


def test_words_say_style_and_colours() -> None:
    concept, rng = Concept("1", "owl", (), "brown", False), random.Random(0)
    for style in emoji.STYLES:
        called = emoji.CALLED.get(style, style)
        said = [emoji.words(concept, style, emoji.Variant(1, "blue", "red"), rng) for _ in range(60)]
        assert all("blue owl" in text and text.endswith("on a red background") for text in said)
        share = sum(called in text for text in said) / len(said)
        assert 0.3 < share < 0.7 if style == emoji.SHADED else share == 1
        assert not any(f"{called} a" in text for text in said)


@pytest.mark.skipif(not (EMBEDDED / "unet").is_dir(), reason="assets/embedded is missing")
def test_the_nets_to_begin_with_are_translated(tmp_path: Path) -> None:
    """Through a VAE that only turns the old latents, the UNet gives what it gave before, turned."""
    models.start(EMBEDDED, tmp_path / "model")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    x = torch.rand(24, 3, emoji.SIZE, emoji.SIZE) * 2 - 1
    assert models.latents_of(pipe.vae, x).shape == (24, models.LATENTS, 16, 16)
    pipe.vae.save_pretrained(tmp_path / "vae")
    models.adopt_vae(tmp_path / "model", tmp_path / "vae", EMBEDDED, x)
    vae = AutoencoderKL.from_pretrained(tmp_path / "model" / "vae")
    z = models.latents_of(vae, x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(models.LATENTS), atol=1e-3, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(models.LATENTS), atol=1e-3, rtol=0)

    torch.manual_seed(0)
    old = UNet2DConditionModel.from_pretrained(EMBEDDED / "unet")
    turn = torch.linalg.qr(torch.randn(models.LATENTS, 4)).Q  # z′ = B z, and z = Bᵀ z′
    new = models.translated(old, turn.T, turn)
    z_old, t, text = torch.randn(2, 4, 16, 16), torch.tensor([10, 900]), torch.randn(2, 32, 192)
    with torch.no_grad():
        wanted = torch.einsum("ji,bihw->bjhw", turn, old(z_old, t, text).sample)
        found = new(torch.einsum("ji,bihw->bjhw", turn, z_old), t, text).sample
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


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
        Image.new("RGB", (SIDE, SIDE), tuple(min(255, v + i) for v in COLOURS[colour])).save(tmp_path / f"{i}.png")
        files.append(tmp_path / f"{i}.png")
        colours.append(colour)
    others = [i % 5 == 0 for i in range(40)]
    right = judge.train(files, {"colours": colours}, others, tmp_path, tmp_path / "judges")
    assert right == {"colours": 1.0}
    classifier = Classifier.load(str(tmp_path / "judges" / "colours"))
    assert classifier.names == ("blue", "green", "red")
    named = [classifier.names[i] for i in classifier.scores(files).argmax(1)]
    assert named == colours


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
    wanted = {"unet": "base", "text_encoder": "text_encoder"}  # the second is there only in the best so far
    names = ("config.json", "weights.safetensors")
    assert adopted == {f"{part}/{name}": text for part, text in wanted.items() for name in names}
    (run / "best" / "text_encoder" / "config.json").unlink()
    (run / "config.json").write_text("new")
    assert command.main(["adopt-base"]) == 2 and (model / "unet" / "config.json").read_text() == "base"
    assert command.main(["judges"]) == 2 and "do the stage pictures first" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_a_recipe_is_a_run(recipe: Path) -> None:
    config = TrainConfig(**read_config(str(recipe)))
    assert Path(config.out).name == recipe.stem and f"--config training/recipes/{recipe.name}" in recipe.read_text()
