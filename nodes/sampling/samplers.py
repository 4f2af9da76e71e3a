"""ComfyUI's samplers by name, with the noise that ComfyUI gives them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from mahlstick.errors import MahlstickError
from mahlstick.nodes.sampling import adaptive, multistep, singlestep
from mahlstick.nodes.sampling.noise import NoiseSampler, brownian, independent
from mahlstick.nodes.sampling.steps import Callback, silent
from mahlstick.nodes.values import Denoiser, Sampler


@dataclass(frozen=True)
class Method:
    """A sampler's function ``run(denoiser, x, sigmas, callback=, **settings)``, and the noise it takes as ``noise=``.

    ``brownian_gpu`` is the same noise drawn where the picture is, which on a GPU gives other numbers.
    """

    run: Callable[..., Tensor]
    noise: Literal["none", "independent", "brownian", "brownian_gpu"] = "none"


def sample(
    sampler: str,
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    seed: int = 0,
    in_run: bool = False,
    callback: Callback = silent,
    **settings: Any,
) -> Tensor:
    """Run a sampler by its ComfyUI name, from ``x`` with noise of ``sigmas[0]`` down to ``sigmas[-1]``.

    ``denoiser(x, sigma) -> x0`` estimates the picture, with ``sigma`` of shape ``(batch,)``; one that guides also has
    ``both(x, sigma) -> (x0, x0 without condition)``, which the ``*_cfg_pp`` samplers ask. ``callback(step, x0)`` hears
    of each step. ``settings`` are the sampler's own (``eta``, ``order``; a ``noise`` in place of the seed's).

    Noise is what ComfyUI's sampler draws on the CPU after ``torch.manual_seed(seed)``; with ``in_run``, what it draws
    in a run of this seed, where the picture is. Torch's own random state is neither read nor changed. Raises
    ``MahlstickError`` for an unknown sampler.
    """
    if sampler not in SAMPLERS:
        raise MahlstickError(f"{sampler!r}: no such sampler; choose one of {', '.join(SAMPLERS)}.")
    if len(sigmas) < 2:
        return x
    method = SAMPLERS[sampler]
    sigmas = sigmas.cpu()  # Branches on them then wait for no GPU.
    if method.noise != "none":
        settings.setdefault("noise", _noise(method.noise, x, sigmas, seed, in_run))
    with torch.no_grad():
        return method.run(denoiser, x, sigmas, callback=callback, **settings)


def named(sampler: str, **settings: Any) -> Sampler:
    """A SAMPLER by its ComfyUI name, with settings of its own."""
    return Sampler(partial(sample, sampler), settings, new_noise=sampler == "ddim")


def _noise(kind: str, x: Tensor, sigmas: Tensor, seed: int, in_run: bool) -> NoiseSampler:
    if kind == "independent":
        # On a CPU the first step of a run thus adds the initial noise again: ComfyUI's numbers until the end of 2025.
        return independent(x, torch.Generator(x.device if in_run else "cpu").manual_seed(seed))
    if not in_run:
        seed = int(torch.randint(0, 2**63 - 1, (), generator=torch.Generator().manual_seed(seed)))
    return brownian(x, sigmas, seed, x.device if kind == "brownian_gpu" else "cpu")


_heun_x0 = partial(singlestep.seeds_2, r=1.0, solver_type="phi_2")
_2m_sde_heun = partial(multistep.dpmpp_2m_sde, solver_type="heun")

#: In ComfyUI's order.
SAMPLERS: dict[str, Method] = {
    "euler": Method(singlestep.euler),
    "euler_cfg_pp": Method(partial(singlestep.euler_ancestral, eta=0.0, cfg_pp=True), "independent"),
    "euler_ancestral": Method(singlestep.euler_ancestral, "independent"),
    "euler_ancestral_cfg_pp": Method(partial(singlestep.euler_ancestral, cfg_pp=True), "independent"),
    "heun": Method(singlestep.heun),
    "heunpp2": Method(singlestep.heunpp2),
    "exp_heun_2_x0": Method(partial(_heun_x0, eta=0.0), "independent"),
    "exp_heun_2_x0_sde": Method(_heun_x0, "independent"),
    "dpm_2": Method(singlestep.dpm_2),
    "dpm_2_ancestral": Method(singlestep.dpm_2_ancestral, "independent"),
    "lms": Method(multistep.lms),
    "dpm_fast": Method(adaptive.dpm_fast),
    "dpm_adaptive": Method(adaptive.dpm_adaptive, "independent"),
    "dpmpp_2s_ancestral": Method(singlestep.dpmpp_2s_ancestral, "independent"),
    "dpmpp_2s_ancestral_cfg_pp": Method(partial(singlestep.dpmpp_2s_ancestral, cfg_pp=True), "independent"),
    "dpmpp_sde": Method(singlestep.dpmpp_sde, "brownian"),
    "dpmpp_sde_gpu": Method(singlestep.dpmpp_sde, "brownian_gpu"),
    "dpmpp_2m": Method(multistep.dpmpp_2m),
    "dpmpp_2m_cfg_pp": Method(partial(multistep.dpmpp_2m, cfg_pp=True)),
    "dpmpp_2m_sde": Method(multistep.dpmpp_2m_sde, "brownian"),
    "dpmpp_2m_sde_gpu": Method(multistep.dpmpp_2m_sde, "brownian_gpu"),
    "dpmpp_2m_sde_heun": Method(_2m_sde_heun, "brownian"),
    "dpmpp_2m_sde_heun_gpu": Method(_2m_sde_heun, "brownian_gpu"),
    "dpmpp_3m_sde": Method(multistep.dpmpp_3m_sde, "brownian"),
    "dpmpp_3m_sde_gpu": Method(multistep.dpmpp_3m_sde, "brownian_gpu"),
    # In the coordinates of sigma DDPM's posterior is an ancestral step with eta 1.
    "ddpm": Method(singlestep.euler_ancestral, "independent"),
    "lcm": Method(singlestep.lcm, "independent"),
    "ipndm": Method(multistep.ipndm),
    "ipndm_v": Method(multistep.ipndm_v),
    "deis": Method(multistep.deis),
    "res_multistep": Method(partial(multistep.res_multistep, eta=0.0), "independent"),
    "res_multistep_cfg_pp": Method(partial(multistep.res_multistep, eta=0.0, cfg_pp=True), "independent"),
    "res_multistep_ancestral": Method(multistep.res_multistep, "independent"),
    "res_multistep_ancestral_cfg_pp": Method(partial(multistep.res_multistep, cfg_pp=True), "independent"),
    "gradient_estimation": Method(multistep.gradient_estimation),
    "gradient_estimation_cfg_pp": Method(partial(multistep.gradient_estimation, cfg_pp=True)),
    "er_sde": Method(multistep.er_sde, "independent"),
    "seeds_2": Method(singlestep.seeds_2, "independent"),
    "seeds_3": Method(singlestep.seeds_3, "independent"),
    "sa_solver": Method(multistep.sa_solver, "independent"),
    "sa_solver_pece": Method(partial(multistep.sa_solver, use_pece=True), "independent"),
    "ddim": Method(singlestep.euler),
    "uni_pc": Method(multistep.uni_pc),
    "uni_pc_bh2": Method(partial(multistep.uni_pc, variant="bh2")),
}
