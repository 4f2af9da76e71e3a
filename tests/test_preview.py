"""A forming picture can be shown without the autoencoder's decoder."""

from __future__ import annotations

import copy

import numpy as np
import torch
from PIL import Image

import mahlstick as ms
from benchmarks.tiny import vae
from mahlstick.pipelines.preview import fit, preview


def test_latents_look_like_the_picture_that_they_are_of():
    vae = ms.load_pipeline("embedded").vae
    rng = np.random.default_rng(1)
    colours = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(
        (128, 128), Image.Resampling.BICUBIC
    )
    pixels = torch.from_numpy(np.asarray(colours).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mode()
    shown = preview(latents, vae)
    assert shown.size == latents.shape[-1:-3:-1]
    true = np.asarray(colours.resize(shown.size, Image.Resampling.BOX))
    assert np.corrcoef(np.asarray(shown).ravel(), true.ravel())[0, 1] > 0.95


def test_an_autoencoder_that_overflows_in_halves_is_fitted_in_float32():
    autoencoder = copy.deepcopy(vae()).half()
    autoencoder.encoder.conv_in.weight.data *= 1e5
    assert fit(autoencoder).isfinite().all()
    assert autoencoder.dtype == torch.float16
