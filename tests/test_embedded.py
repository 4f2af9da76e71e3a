"""The embedded model as shipped, and the stages that train it."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from mahlstick.training.data import read_dataset
from mahlstick.training.embedded import __main__ as command
from mahlstick.training.embedded import data, evaluate, models, train

ASSETS = Path(__file__).resolve().parents[1] / "assets"
FOLDER = ASSETS / "embedded"
shipped = pytest.mark.skipif(
    not (FOLDER / "model_index.json").exists(),
    reason="assets/embedded is missing: python -m mahlstick.training.embedded all",
)


# ---- the shipped model


@pytest.fixture(scope="module")
def pipe():
    """The embedded model through plain diffusers."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt: str, seed: int = 3, **kwargs) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    return pipe(
        prompt, num_inference_steps=4, height=64, width=64, generator=generator, output_type="np", **kwargs
    ).images


@shipped
def test_loads_without_warnings(caplog):
    from diffusers import StableDiffusionPipeline

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe = StableDiffusionPipeline.from_pretrained(FOLDER)
    ours = [str(w.message) for w in caught if "torch" not in w.filename]
    assert not ours
    assert not [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")]
    assert (
        {p.dtype for p in pipe.unet.parameters()}
        == {p.dtype for p in pipe.text_encoder.parameters()}
        == {torch.float32}
    )
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.safety_checker is None and not pipe.config.requires_safety_checker


@shipped
def test_is_small():
    assert sum(f.stat().st_size for f in ASSETS.rglob("*") if f.is_file()) <= evaluate.LIMIT


@shipped
def test_draws_finite_and_deterministic(pipe):
    first, second = draw(pipe, "red apple"), draw(pipe, "red apple")
    assert first.shape == (1, 64, 64, 3) and np.isfinite(first).all() and first.std() > 0.02
    assert np.array_equal(first, second)
    assert not np.array_equal(first, draw(pipe, "red apple", seed=4))


@shipped
def test_controlnet_and_ip_adapter_load_in_diffusers(pipe):
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    net = ControlNetModel.from_pretrained(FOLDER / "controlnet-lineart")
    controlled = StableDiffusionControlNetPipeline(**pipe.components, controlnet=net, requires_safety_checker=False)
    controlled.set_progress_bar_config(disable=True)
    lines = torch.zeros(1, 3, 64, 64)
    lines[..., 16:48, 16:18] = 1
    assert not np.array_equal(draw(controlled, "cactus", image=lines), draw(pipe, "cactus"))
    before = draw(pipe, "cactus")
    encoder, processor = pipe.image_encoder, pipe.feature_extractor
    pipe.load_ip_adapter(
        str(FOLDER), subfolder="ip-adapter", weight_name="ip_adapter.safetensors", image_encoder_folder=None
    )
    try:
        features = torch.zeros(2, 1, models.WIDTH)
        features[1] = 1
        assert not np.array_equal(draw(pipe, "cactus", ip_adapter_image_embeds=[features]), before)
    finally:
        pipe.unload_ip_adapter()
        pipe.register_modules(image_encoder=encoder, feature_extractor=processor)
    assert np.array_equal(draw(pipe, "cactus"), before)


@shipped
def test_names_no_machine():
    for path in FOLDER.rglob("*.json"):
        assert "/work" not in path.read_text() and "_name_or_path" not in path.read_text()


# ---- the stages, at toy size


@pytest.fixture
def pictures() -> data.Pictures:
    """Six concepts in five styles: coloured discs and boxes."""
    concepts, rgba, concept, style = [], [], [], []
    for i, label in enumerate(["red apple", "penguin", "green tree", "blue car", "dog", "unseen thing"]):
        concepts.append(
            data.Concept(f"{i:x}", label, ("nice", "small"), "red", label.startswith("unseen"), "food-fruit")
        )
        for s in range(len(data.STYLES)):
            picture = torch.zeros(4, 64, 64, dtype=torch.uint8)
            picture[:3] = torch.tensor([40 * i, 30 * s, 90]).view(3, 1, 1)
            picture[3, 10 + i : 50, 12 + s : 52 - i] = 255
            rgba.append(picture)
            concept.append(i)
            style.append(s)
    return data.Pictures(torch.stack(rgba), torch.tensor(concept), torch.tensor(style), concepts)


def test_pictures_are_written_as_folders_to_train_on(pictures, tmp_path):
    data.export(pictures, tmp_path, copies=2)
    learned, unseen = (read_dataset(tmp_path / name) for name in ("learn", "unseen"))
    assert len(learned) == 5 * 3 and len(unseen) == 1
    assert unseen[0].captions == ("unseen thing",)
    assert not {e.captions for e in unseen} & {e.captions for e in learned}
    assert all(e.load().size == (64, 64) for e in [*learned, *unseen])


def tiny(cache: Path, steps: int = 2) -> train.Run:
    return train.Run(cache=cache, minutes=10, steps=steps, batch=2, size="tiny")


def test_every_stage_trains_resumes_assembles_and_is_measured(pictures, tmp_path, monkeypatch):
    data.save(pictures, tmp_path / "data.pt")
    assert data.split_counts(data.load(tmp_path)) == (5, 1)
    stages = [
        ("vae", train.train_vae),
        ("clip", train.train_clip),
        ("text-layout", train.train_layout),
        ("base", train.train_base),
        ("controlnet", train.train_controlnet),
        ("ip-adapter", train.train_ip_adapter),
    ]
    for name, stage in stages:
        for steps in (2, 3):  # the second run goes on where the first one stopped
            run = tiny(tmp_path, steps)
            stage(pictures, run)
            assert run.steps_done == steps
        state = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert state["step"] == 3 and all(w.isfinite().all() for w in state["weights"])
    evaluate.assemble(pictures, tiny(tmp_path), tmp_path / "assets")
    monkeypatch.setattr(evaluate, "STEPS", 2)
    figures = evaluate.evaluate(pictures, tiny(tmp_path), tmp_path / "assets")
    assert figures["control"]["all"]["pairs"] == 3 and figures["reference"]["references"] == 1
    card = (tmp_path / "assets" / "embedded" / "MODEL_CARD.md").read_text()
    assert "unseen thing" in card and str(figures["vae_psnr"]) in card


def test_standardised_latents_have_mean_0_and_deviation_1():
    torch.manual_seed(0)
    vae = models.make_vae("tiny").eval()
    x = torch.rand(8, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = vae.encode(x).latent_dist
        decoded = vae.decode(before.mean).sample
        models.standardise(vae, before.mean)
        after = vae.encode(x).latent_dist
        torch.testing.assert_close(after.mean.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(after.mean.std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
        torch.testing.assert_close(vae.decode(after.mean).sample, decoded, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(after.std / before.std, (after.std / before.std)[:1, :, :1, :1].expand_as(after.std))


def test_tokenizer_knows_every_byte(tmp_path):
    tokenizer = models.make_tokenizer(["red apple", "a penguin, bird"] * 3, tmp_path)
    for text in ("Red apple!", "naïve 日本 🦊 4k", "x" * 200):
        ids = models.encode(tokenizer, [text])
        assert ids.shape == (1, models.TOKENS) and ids[0, 0] == tokenizer.bos_token_id
        assert tokenizer.eos_token_id in ids[0].tolist()
    words = models.encode(tokenizer, ["red apple"])[0]
    assert words.tolist().index(tokenizer.eos_token_id) == 3


def test_captions_say_the_colour():
    rng = random.Random(0)
    penguin = data.Concept("1", "penguin", ("bird",), "black", False)
    apple = data.Concept("2", "red apple", (), "red", False)
    for _ in range(20):
        assert "blue penguin" in data.caption(penguin, rng, "blue")
        assert "blue apple" in data.caption(apple, rng, "blue")
        assert "red apple" in data.caption(apple, rng)


def test_unknown_words_name_nothing_and_follow_from_the_seed():
    concepts = [data.Concept("1", "sun", ("sunny", "key ring"), "yellow", False)]
    made = [
        data.UnknownWords(pieces, concepts) for pieces in ({"sun", "ny", "ring", "oo"}, {"oo", "ring", "ny", "sun"})
    ]
    first, second = ([words.draw(random.Random(seed), "red") for seed in range(200)] for words in made)
    assert first == second
    said = {word for words in first for word in words.split()}
    assert "red" in said
    assert not said & {"sun", "sunny", "key", "ring"}


def test_recolour_and_line_art(pictures):
    rgba = pictures.rgba[:1]
    for colour in data.COLOURS:
        tinted = data.recolour(rgba, colour)[0].permute(1, 2, 0).numpy()
        assert tinted.shape == (64, 64, 4) and (tinted[..., 3] == rgba[0, 3].numpy()).all()
    lines = data.line_art(pictures.rgba[0])
    assert lines.shape == (3, 64, 64) and set(lines.unique().tolist()) == {0.0, 1.0}
    soft = data.line_art(pictures.rgba[0], random.Random(1))
    assert 0 <= float(soft.min()) and float(soft.max()) <= 1


def test_missing_npm_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="npm is not installed"):
        data.fetch("emojibase-data", "17.0.0", tmp_path)


def test_help_names_every_stage(capsys):
    with pytest.raises(SystemExit) as done:
        command.main(["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert all(stage in text for stage in command.STAGES)
