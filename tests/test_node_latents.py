"""Nodes for latents: through an autoencoder and back, scaled, combined, batched, saved, as ComfyUI does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import tiny
from mahlstick.errors import MahlstickError
from mahlstick.nodes import folders, progress
from mahlstick.nodes.builtin import latents as L
from mahlstick.nodes.schema import Returned
from mahlstick.nodes.values import Vae
from mahlstick.pipelines.load import embedded_folder

few = settings(max_examples=25, deadline=None)


@pytest.fixture(scope="module")
def embedded() -> Vae:
    """The embedded model's, which has learned to reconstruct."""
    return Vae(AutoencoderKL.from_pretrained(embedded_folder() / "vae").eval())


def scene(height: int, width: int, batch: int = 1) -> Tensor:
    """Smooth pictures."""
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 4, width), indexing="ij")
    waves = [0.5 + 0.4 * torch.sin(x * (k + 1) + y + k) for k in range(3)]
    return torch.stack([torch.stack(waves, -1).roll(index, 0) for index in range(batch)])


def latent(batch: int = 1, height: int = 8, width: int = 10, seed: int = 0, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {"samples": torch.randn(batch, 4, height, width, generator=generator)} | more


def one(values: tuple[Any, ...]) -> Any:
    (value,) = values
    return value


def grid(values: tuple[Any, ...]) -> Tensor:
    samples: Tensor = one(values)["samples"]
    return samples


# --- through the autoencoder


def test_empty_latents() -> None:
    made = one(L.EmptyLatentImage(width=100, height=64, batch_size=3))
    assert made["samples"].shape == (3, 4, 8, 12) and not made["samples"].any()
    assert made["downscale_ratio_spacial"] == 8


def test_a_picture_comes_back_from_its_latents(embedded: Vae) -> None:
    pixels = scene(64, 96, batch=2)
    found = one(L.VAEEncode(pixels=pixels, vae=embedded))
    factor = embedded.factor
    assert found["samples"].shape[2:] == (64 // factor, 96 // factor)
    again = one(L.VAEDecode(samples=found, vae=embedded))
    assert again.shape == pixels.shape and 0 <= again.min() and again.max() <= 1
    assert (again - pixels).abs().mean() < 0.1


def test_encoding_takes_the_mean_of_the_middle() -> None:
    vae = Vae(tiny.vae())
    pixels = torch.rand(1, 70, 85, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        middle = pixels[:, 3:67, 2:82, :3].permute(0, 3, 1, 2) * 2 - 1
        expected = vae.autoencoder.encode(middle).latent_dist.mean
        decoded = vae.autoencoder.decode(expected).sample
    found = grid(L.VAEEncode(pixels=pixels, vae=vae))
    assert torch.allclose(found, expected, atol=1e-6)
    pictures = one(L.VAEDecode(samples={"samples": found}, vae=vae))
    assert torch.allclose(pictures, (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), atol=1e-6)
    with pytest.raises(MahlstickError, match="7x64"):
        L.VAEEncode(pixels=torch.zeros(1, 64, 7, 3), vae=vae)
    for decode in (L.VAEDecode, L.VAEDecodeTiled):
        with pytest.raises(MahlstickError, match="16 channels and the VAE takes 4"):
            decode(samples={"samples": torch.zeros(1, 16, 8, 8)}, vae=vae)
        with pytest.raises(MahlstickError, match="batch is empty"):
            decode(samples={"samples": torch.zeros(0, 4, 8, 8)}, vae=vae)


def test_tiles_join_without_seams(embedded: Vae) -> None:
    """Nearly what comes in one piece; and no jump where tiles meet that is not there in one piece."""
    pixels = scene(96, 128)
    whole = one(L.VAEEncode(pixels=pixels, vae=embedded))
    heard: list[tuple[int, int]] = []
    with progress.listening(lambda value, total, preview=None: heard.append((value, total))):
        tiled = one(L.VAEEncodeTiled(pixels=pixels, vae=embedded, tile_size=64, overlap=16))
    assert heard[-1][0] == heard[-1][1] == len(heard) > 3
    spread = whole["samples"].std()
    assert tiled["samples"].shape == whole["samples"].shape
    assert (tiled["samples"] - whole["samples"]).abs().mean() < 0.15 * spread
    in_one = one(L.VAEDecode(samples=whole, vae=embedded))
    in_tiles = one(L.VAEDecodeTiled(samples=whole, vae=embedded, tile_size=64, overlap=16))
    assert in_tiles.shape == in_one.shape and (in_tiles - in_one).abs().mean() < 0.02
    for dim in (1, 2):
        assert in_tiles.diff(dim=dim).abs().max() < in_one.diff(dim=dim).abs().max() + 0.05


def test_tiles_of_a_function_that_sees_no_edges_are_exact() -> None:
    """Then nothing is left of the tiling: enlarging or taking means of blocks is the same in parts."""
    batch = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    for tile, shared in ((16, 4), (16, 0), (32, 8), (128, 16)):
        enlarged = L._tiled(lambda area: area.repeat_interleave(2, 2).repeat_interleave(2, 3), batch, tile, shared, 2)
        assert torch.allclose(enlarged, batch.repeat_interleave(2, 2).repeat_interleave(2, 3), atol=1e-6)
        shrunk = L._tiled(lambda area: torch.nn.functional.avg_pool2d(area, 4), batch, tile, shared, 1 / 4)
        assert torch.allclose(shrunk, torch.nn.functional.avg_pool2d(batch, 4), atol=1e-6)


def test_inpainting_greys_the_masked_and_grows_the_mask() -> None:
    vae = Vae(tiny.vae())
    pixels = scene(68, 64)
    mask = torch.zeros(1, 34, 32)
    mask[:, 10:14, 8:12] = 1  # of the pictures 20 to 28 and 16 to 24, and cropped 18 to 26
    found = one(L.VAEEncodeForInpaint(pixels=pixels, vae=vae, mask=mask, grow_mask_by=6))
    grown = torch.zeros(1, 1, 64, 64)
    grown[..., 16:29, 14:27] = 1  # by six pixels in all, an even square's extra one at the end
    assert torch.equal(found["noise_mask"], grown)
    greyed = pixels[:, 2:66].clone()
    greyed[:, 18:26, 16:24] = 0.5
    assert torch.allclose(found["samples"], grid(L.VAEEncode(pixels=greyed, vae=vae)), atol=1e-5)

    text = [[torch.zeros(1, 3, 4), {"pooled_output": 1}]]
    positive, negative, latents = L.InpaintModelConditioning(
        positive=text, negative=text, vae=vae, pixels=pixels, mask=mask
    )
    assert text[0][1] == {"pooled_output": 1} and positive[0][1]["pooled_output"] == 1
    assert torch.equal(positive[0][1]["concat_latent_image"], found["samples"])
    assert torch.equal(negative[0][1]["concat_mask"], latents["noise_mask"])
    assert torch.equal(latents["samples"], grid(L.VAEEncode(pixels=pixels, vae=vae)))
    bare = L.InpaintModelConditioning(positive=text, negative=text, vae=vae, pixels=pixels, mask=mask, noise_mask=False)
    assert "noise_mask" not in bare[2]
    several = one(L.VAEEncodeForInpaint(pixels=scene(64, 64, 2), vae=vae, mask=torch.ones(3, 8, 8)))
    assert several["samples"].shape == (3, 4, 8, 8)
    assert one(L.SetLatentNoiseMask(samples=latent(), mask=mask[0]))["noise_mask"].shape == (1, 1, 34, 32)


# --- size and place


def test_latents_scale_to_pixels() -> None:
    samples = latent(2, 8, 16)

    def size(**inputs: Any) -> tuple[int, ...]:
        return tuple(grid(L.LatentUpscale(samples=samples, upscale_method="bislerp", **inputs)).shape[2:])

    assert size(width=256, height=0, crop="disabled") == (16, 32)
    assert size(width=0, height=8, crop="disabled") == (8, 16)  # never below 64 pixels
    assert size(width=0, height=0, crop="disabled") == (8, 16)
    assert size(width=64, height=64, crop="center") == (8, 8)
    assert grid(L.LatentUpscaleBy(samples=samples, upscale_method="area", scale_by=1.5)).shape == (2, 4, 12, 24)
    for method in ("bislerp", "bilinear", "nearest-exact"):
        same = grid(L.LatentUpscaleBy(samples=samples, upscale_method=method, scale_by=1.0))
        assert torch.allclose(same, samples["samples"], atol=1e-5)


def test_latents_turn_flip_and_crop() -> None:
    samples = latent(more="kept")
    turned = one(L.LatentRotate(samples=samples, rotation="90 degrees"))
    assert turned["more"] == "kept"
    assert torch.equal(turned["samples"][..., 0, -1], samples["samples"][..., 0, 0])
    assert torch.equal(grid(L.LatentRotate(samples=turned, rotation="270 degrees")), samples["samples"])
    flipped = one(L.LatentFlip(samples=samples, flip_method="y-axis: horizontally"))
    assert torch.equal(flipped["samples"][..., 0], samples["samples"][..., -1])
    cropped = grid(L.LatentCrop(samples=latent(1, 12, 20), width=64, height=64, x=400, y=16))
    assert torch.equal(cropped, latent(1, 12, 20)["samples"][..., 2:10, 12:20])


@few
@given(x=st.integers(0, 100), y=st.integers(0, 100), feather=st.integers(0, 24))
def test_composites_of_latents_against_numpy(x: int, y: int, feather: int) -> None:
    below, above = latent(2, 9, 11), latent(1, 5, 6, seed=1)
    laid = grid(L.LatentComposite(samples_to=below, samples_from=above, x=x, y=y, feather=feather))
    left, top, fade = x // 8, y // 8, feather // 8
    expected = below["samples"].numpy().copy()
    high, wide = min(5, 9 - top), min(6, 11 - left)
    for row in range(max(0, high)):
        for column in range(max(0, wide)):
            share = 1.0
            for place, inside in (
                (row, top > 0),
                (high - 1 - row, top + high < 9),
                (column, left > 0),
                (wide - 1 - column, left + wide < 11),
            ):
                share *= min(1.0, (place + 1) / fade) if inside and fade else 1.0
            under = expected[:, :, top + row, left + column]
            over = above["samples"][:, :, row, column].numpy()
            expected[:, :, top + row, left + column] = share * over + (1 - share) * under
    assert np.allclose(laid, expected, atol=1e-6)
    masked = L.LatentCompositeMasked(destination=below, source=above, x=x, y=y, mask=torch.zeros(1, 40, 48))
    assert torch.equal(grid(masked), below["samples"])
    covered = L.LatentCompositeMasked(destination=below, source=above, x=x, y=y, mask=torch.ones(40, 48))
    assert np.allclose(
        grid(covered), grid(L.LatentComposite(samples_to=below, samples_from=above, x=x, y=y)), atol=1e-6
    )


def test_arithmetic() -> None:
    first, second = latent(2), latent(1, 4, 5, seed=1)
    matched = torch.nn.functional.interpolate(second["samples"], (8, 10), mode="bilinear")
    assert torch.allclose(grid(L.LatentAdd(samples1=first, samples2=second)), first["samples"] + matched)
    assert torch.allclose(grid(L.LatentSubtract(samples1=first, samples2=second)), first["samples"] - matched)
    assert torch.equal(grid(L.LatentMultiply(samples=first, multiplier=-2.0)), -2 * first["samples"])
    for ratio, end in ((1.0, first["samples"]), (0.0, matched.expand(2, -1, -1, -1))):
        mixed = grid(L.LatentInterpolate(samples1=first, samples2=second, ratio=ratio))
        assert torch.allclose(mixed, end, atol=1e-5)
    halfway = grid(L.LatentInterpolate(samples1=first, samples2=second, ratio=0.5))
    lengths = (first["samples"].norm(dim=1) + matched.norm(dim=1)) / 2
    assert torch.allclose(halfway.norm(dim=1), lengths, atol=1e-5)
    blended = grid(L.LatentBlend(samples1=first, samples2=latent(2, seed=2), blend_factor=0.25))
    assert torch.allclose(blended, 0.25 * first["samples"] + 0.75 * latent(2, seed=2)["samples"])
    several = grid(L.LatentBlend(samples1=first, samples2=latent(3, seed=2), blend_factor=0.0))
    assert torch.equal(several, latent(3, seed=2)["samples"])
    other = {"samples": torch.randn(2, 16, 8, 10)}
    for node, names in (
        (L.LatentAdd, ("samples1", "samples2")), (L.LatentBatch, ("samples1", "samples2")),
        (L.LatentBlend, ("samples1", "samples2")), (L.LatentComposite, ("samples_to", "samples_from")),
        (L.LatentCompositeMasked, ("destination", "source")),
    ):  # fmt: skip
        with pytest.raises(MahlstickError, match="of 16 and of 4 channels"):
            node(**dict(zip(names, (first, other), strict=True)))


# --- batches


def test_parts_of_a_batch_keep_their_noise_and_mask() -> None:
    masks = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    samples = latent(5, noise_mask=masks)
    part = one(L.LatentFromBatch(samples=samples, batch_index=3, length=9))
    assert torch.equal(part["samples"], samples["samples"][3:]) and part["batch_index"] == [3, 4]
    assert torch.equal(part["noise_mask"], masks[[1, 0]])
    last = one(L.LatentFromBatch(samples=part, batch_index=-1))
    assert last["batch_index"] == [4] and torch.equal(last["samples"], samples["samples"][4:])
    single = one(L.LatentFromBatch(samples=latent(3, noise_mask=masks[:1]), batch_index=1))
    assert torch.equal(single["noise_mask"], masks[:1])
    assert "batch_index" not in samples


def test_a_repeated_batch_goes_on_counting() -> None:
    masks = torch.rand(2, 1, 4, 4)
    repeated = one(L.RepeatLatentBatch(samples=latent(2, noise_mask=masks, batch_index=[3, 5]), amount=3))
    assert repeated["batch_index"] == [3, 5, 6, 8, 9, 11] and len(repeated["samples"]) == 6
    assert torch.equal(repeated["noise_mask"], masks.repeat(3, 1, 1, 1))
    bare = one(L.RepeatLatentBatch(samples=latent(2, noise_mask=masks[:1]), amount=2))
    assert "batch_index" not in bare and bare["noise_mask"].shape[0] == 1

    joined = one(L.LatentBatch(samples1=latent(2), samples2=latent(1, 4, 4, batch_index=[7])))
    assert joined["samples"].shape == (3, 4, 8, 10) and joined["batch_index"] == [0, 1, 7]
    fixed = one(L.LatentBatchSeedBehavior(samples=joined, seed_behavior="fixed"))
    assert fixed["batch_index"] == [0, 0, 0]
    assert "batch_index" not in one(L.LatentBatchSeedBehavior(samples=fixed, seed_behavior="random"))


def test_rebatching_keeps_order_size_masks_and_noise() -> None:
    mask = torch.zeros(1, 1, 8, 10)
    given = [latent(3), latent(2, noise_mask=mask, batch_index=[9, 4]), latent(2, 4, 4)]
    parts = one(L.RebatchLatents(latents=given, batch_size=[2]))
    assert [part["batch_index"] for part in parts] == [[0, 1], [2, 9], [4], [5, 6]]
    assert torch.equal(torch.cat([part["samples"] for part in parts[:3]]), torch.cat([g["samples"] for g in given[:2]]))
    assert ["noise_mask" in part for part in parts] == [False, True, True, False]
    assert parts[1]["noise_mask"].shape == (2, 1, 64, 80)
    assert parts[1]["noise_mask"][0].all() and not parts[1]["noise_mask"][1].any()


# --- files


def test_saved_latents_load_as_they_were(tmp_path: Path) -> None:
    with folders.using(folders.Folders(input=tmp_path / "in", output=tmp_path / "out")) as here:
        here.input.mkdir()
        samples = latent(2)
        result = L.SaveLatent.function(samples=samples, prompt={"1": {}}, extra_pnginfo={"workflow": [1]})
        assert isinstance(result, Returned) and result.ui is not None
        saved = result.ui["latents"][0]
        assert saved == {"filename": "ComfyUI_00001_.latent", "subfolder": "latents", "type": "output"}
        path = here.output / "latents" / saved["filename"]
        with safe_open(path, "pt") as opened:
            assert {key: json.loads(text) for key, text in opened.metadata().items()} == {
                "prompt": {"1": {}},
                "workflow": [1],
            }
        path.rename(here.input / "a.latent")
        assert torch.equal(grid(L.LoadLatent(latent="a.latent")), samples["samples"])
        save_file({"latent_tensor": samples["samples"]}, here.input / "old.latent")
        assert torch.allclose(grid(L.LoadLatent(latent="old.latent")) * 0.18215, samples["samples"])
        assert L.LoadLatent.inputs[0].choices == ("a.latent", "old.latent")
        (here.input / "bad.latent").write_bytes(b"nothing")
        with pytest.raises(MahlstickError, match=r"bad\.latent"):
            L.LoadLatent(latent="bad.latent")
        assert isinstance(L.LoadLatent.check("../a.latent"), str)
