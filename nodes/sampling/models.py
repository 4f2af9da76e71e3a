"""A MODEL of what diffusers loads."""

from __future__ import annotations

from typing import Any, cast

from mahlstick.errors import MahlstickError
from mahlstick.nodes.sampling.schedules import sigmas_from_config, training_sigmas
from mahlstick.nodes.values import Model, Prediction, Vae

_PREDICTIONS = ("epsilon", "v_prediction", "sample")


def model_from_unet(unet: Any, prediction_type: Prediction = "epsilon") -> Model:
    """A MODEL of a bare ``UNet2DConditionModel``, with the noise schedule and latent scale of Stable Diffusion 1.5."""
    return Model(unet, training_sigmas(), _known(prediction_type), latent_scale=0.18215)


def model_from_pipeline(pipe: Any) -> Model:
    """A MODEL of a pipeline's UNet, which it shares, with what its scheduler and VAE say of noise and latents."""
    vae = pipe.vae
    return Model(
        pipe.unet,
        sigmas_from_config(pipe.scheduler.config),
        _known(pipe.scheduler.config.get("prediction_type", "epsilon")),
        latent_scale=vae.config.scaling_factor,
        latent_shift=vae.config.get("shift_factor") or 0.0,
        factor=Vae(vae).factor,
        autoencoder=vae,
    )


def _known(prediction: Any) -> Prediction:
    if prediction not in _PREDICTIONS:
        raise MahlstickError(f"prediction_type {prediction!r} is unknown; use {', '.join(_PREDICTIONS)}.")
    return cast(Prediction, prediction)
