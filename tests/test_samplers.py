"""Samplers and schedules: ComfyUI's numbers, the methods' orders, and what each sampler must leave alone."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mahlstick.errors import MahlstickError
from mahlstick.nodes.builtin import samplers as builtin
from mahlstick.nodes.progress import Interrupted
from mahlstick.nodes.sampling import noise as noises
from mahlstick.nodes.sampling import schedules
from mahlstick.nodes.sampling.noise import EmptyNoise, RandomNoise, independent, prepare_noise
from mahlstick.nodes.sampling.samplers import SAMPLERS, sample
from mahlstick.nodes.sampling.schedules import SCHEDULERS, schedule, sigmas, training_sigmas
from mahlstick.nodes.values import Model

GOLDENS = Path(__file__).parents[2] / "shared" / "goldens" / "comfy_samplers.safetensors"
needs_goldens = pytest.mark.skipif(not GOLDENS.is_file(), reason="ComfyUI's outputs are not beside this checkout")

STOCHASTIC = [name for name, method in SAMPLERS.items() if method.noise != "none"]
CFG_PP = [
    name
    for name in SAMPLERS
    if f"{name}_cfg_pp" in SAMPLERS and name != "dpmpp_2s_ancestral"  # another algorithm there
]
CHOOSE_THEIR_STEPS = {"dpm_fast", "dpm_adaptive"}
MEAN, SPREAD = 0.7, 0.5


def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    """The best one for pictures whose pixels are normal, of mean 0.7 and standard deviation 0.5."""
    variance = (sigma**2).view(-1, 1, 1, 1)
    return (SPREAD**2 * x + variance * MEAN) / (SPREAD**2 + variance)


def exact(x: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Where the probability flow leads ``x`` from one sigma to another."""
    return MEAN + (x - MEAN) * ((SPREAD**2 + end**2) / (SPREAD**2 + start**2)).sqrt()


def noisy(start: Tensor, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=start.dtype) * start


# ComfyUI's numbers


@cache
def goldens() -> dict[str, Tensor]:
    return load_file(GOLDENS)


@needs_goldens
def test_schedules_are_comfyui_s() -> None:
    assert torch.equal(training_sigmas(), goldens()["model.sigmas"])
    for name, wanted in goldens().items():
        if name.startswith("sigmas."):
            _, scheduler, steps = name.split(".")
            torch.testing.assert_close(sigmas(scheduler, int(steps)), wanted, rtol=1e-6, atol=0)


@needs_goldens
def test_samplers_are_comfyui_s() -> None:
    found = [name for name in goldens() if name.count(".") == 2 and name.startswith("toy.")]
    mu = goldens()["toy.mu"].double()

    def toy(x: Tensor, sigma: Tensor) -> Tensor:
        variance = (sigma.double() ** 2).view(-1, 1, 1, 1)
        return ((0.25 * x.double() + variance * mu) / (0.25 + variance)).to(x.dtype)

    assert found
    for name in found:
        _, sampler, scheduler = name.split(".")
        steps = sigmas(scheduler, 12)
        made = sample(sampler, toy, goldens()["toy.noise"] * steps[0], steps, seed=99)
        assert (made - goldens()[name]).abs().max() < 1e-6 * goldens()[name].abs().max(), name


# Noise


def test_the_first_noise_is_torch_s_after_its_seed() -> None:
    samples = torch.zeros(3, 4, 2, 2)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        wanted = torch.randn(5, 4, 2, 2)
    single = torch.Generator().manual_seed(5)
    one_by_one = torch.cat([torch.randn(1, 4, 2, 2, generator=single) for _ in range(5)])
    assert torch.equal(prepare_noise(samples, 5), wanted[:3])
    assert torch.equal(prepare_noise(samples, 5, [4, 1, 4]), one_by_one[[4, 1, 4]])
    assert torch.equal(RandomNoise(5).draw({"samples": samples, "batch_index": [0, 3]}), one_by_one[[0, 3]])
    assert not EmptyNoise().draw({"samples": samples}).any()
    assert prepare_noise(samples.half(), 5).dtype == torch.float16


def test_parts_of_a_brownian_step_add_up() -> None:
    x = torch.zeros(1, 1, 100, 100)
    noise = noises.brownian(x, torch.tensor([8.0, 1.0, 0.0]), 3)
    high, middle, low = torch.tensor([8.0, 3.0, 1.0])
    whole = noise(high, low) * (high - low).sqrt()
    parts = noise(high, middle) * (high - middle).sqrt() + noise(middle, low) * (middle - low).sqrt()
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-5)
    assert noise(high, middle).std() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_same_seed_gives_the_same_and_torch_s_own_state_is_left_alone(name: str) -> None:
    steps = sigmas("karras", 5)
    x = noisy(steps[0], 2, 1, 4, 4)
    state = torch.random.get_rng_state()
    once, again, other = (sample(name, denoiser, x, steps, seed=seed) for seed in (1, 1, 2))
    in_run = sample(name, denoiser, x, steps, seed=1, in_run=True)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(once, again)
    adds_noise = not torch.equal(once, other)
    assert adds_noise <= (name in STOCHASTIC)
    assert SAMPLERS[name].noise.startswith("brownian") == (not torch.equal(once, in_run))


# Methods


# lcm takes estimates for pictures, the other follows a slip of ComfyUI's; on the CPU those for a GPU are the same.
@pytest.mark.parametrize(
    "name", [name for name in SAMPLERS if name not in ("lcm", "dpmpp_2s_ancestral_cfg_pp") and name[-4:] != "_gpu"]
)
def test_samples_are_of_the_pictures_distribution(name: str) -> None:
    steps = sigmas("exponential", 30)
    made = sample(name, denoiser, noisy(steps[0], 1, 1, 64, 64), steps, seed=3)
    end = float(steps[-2]) if name in CHOOSE_THEIR_STEPS else 0.0
    assert made.mean() == pytest.approx(MEAN, abs=0.03)
    assert made.std() == pytest.approx(math.hypot(SPREAD, end), rel=0.1)


ORDERS: list[tuple[str, float, dict[str, Any]]] = [
    ("euler", 1, {}),
    ("heunpp2", 1, {}),
    ("gradient_estimation", 0.9, {}),
    ("heun", 2, {}),
    ("exp_heun_2_x0", 2, {}),
    ("dpm_2", 2, {}),
    ("dpm_fast", 2, {}),
    ("dpmpp_2m", 2, {}),
    ("ipndm", 2, {}),
    ("ipndm_v", 2.6, {}),
    ("deis", 2.8, {}),
    ("lms", 3.4, {}),
    ("uni_pc", 2, {}),
    ("uni_pc_bh2", 2, {}),
    ("res_multistep", 2, {}),
    ("dpmpp_2s_ancestral", 2, {"eta": 0.0}),
    ("dpmpp_sde", 2, {"eta": 0.0}),
    ("dpmpp_2m_sde_heun", 2, {"eta": 0.0}),
    ("dpmpp_3m_sde", 2.1, {"eta": 0.0}),
    ("seeds_2", 2, {"eta": 0.0}),
    ("seeds_3", 2.9, {"eta": 0.0}),
    ("sa_solver", 3.9, {"eta": 0.0}),
    ("sa_solver_pece", 3.9, {"eta": 0.0}),
    ("er_sde", 1.8, {"noise_scaler": lambda sigma: sigma, "s_noise": 0.0}),
]


@pytest.mark.parametrize(("name", "order", "settings"), ORDERS, ids=[name for name, *_ in ORDERS])
def test_converges_to_the_exact_solution_at_its_order(name: str, order: float, settings: dict[str, Any]) -> None:
    def error(count: int) -> float:
        steps = torch.linspace(math.log(10), math.log(0.1), count + 1, dtype=torch.float64).exp()
        x = torch.full((1, 1, 1, 1), 9.0, dtype=torch.float64)
        return float((sample(name, denoiser, x, steps, **settings) - exact(x, steps[0], steps[-1])).abs().max())

    coarse, fine = error(48), error(96)
    assert fine < 0.01
    assert math.log2(coarse / fine) > order - 0.15


@pytest.mark.parametrize("order", [2, 3])
def test_the_adaptive_solver_keeps_its_tolerance(order: int) -> None:
    steps = torch.tensor([10.0, 0.1], dtype=torch.float64)
    x = noisy(steps[0], 1, 1, 8, 8)
    errors, counts = [], []
    for tolerance in (1e-2, 1e-4):
        heard: list[int] = []
        made = sample(
            "dpm_adaptive", denoiser, x, steps, order=order, rtol=tolerance, atol=tolerance,
            callback=lambda step, _, heard=heard: heard.append(step),
        )  # fmt: skip
        errors.append((made - exact(x, *steps)).abs().max())
        counts.append(len(heard))
    assert errors[0] < 0.1 and errors[1] < 3e-3
    assert counts[1] > counts[0]
    with pytest.raises(MahlstickError, match=r"eta"):
        sample("dpm_adaptive", denoiser, x, steps.flip(0), eta=1.0)


@pytest.mark.parametrize(
    ("one", "other", "settings"),
    [
        ("euler_ancestral", "euler", {"eta": 0.0}),
        ("euler_ancestral", "ddim", {"eta": 0.0}),
        ("dpm_2_ancestral", "dpm_2", {"eta": 0.0}),
        ("dpmpp_2m_sde", "dpmpp_2m", {"eta": 0.0}),
        ("res_multistep_ancestral", "res_multistep", {"eta": 0.0}),
        ("exp_heun_2_x0_sde", "exp_heun_2_x0", {"eta": 0.0}),
        ("seeds_2", "exp_heun_2_x0_sde", {"r": 1.0, "solver_type": "phi_2"}),
        ("dpmpp_2m_sde", "dpmpp_2m_sde_heun_gpu", {"solver_type": "heun"}),
        ("dpmpp_2s_ancestral", "dpmpp_2m", {"eta": 0.0}),
        *((f"{name}_cfg_pp", name, {}) for name in CFG_PP),
    ],
)
def test_twins_agree(one: str, other: str, settings: dict[str, Any]) -> None:
    """Also CFG++ samplers with those they are of, where nothing guides."""
    steps = sigmas("karras", 200 if one == "dpmpp_2s_ancestral" and settings else 9)
    x = noisy(steps[0], 1, 1, 4, 4)
    made = [sample(one, denoiser, x, steps, seed=4, **settings), sample(other, denoiser, x, steps, seed=4)]
    torch.testing.assert_close(*made, rtol=0, atol=2e-3 if len(steps) > 100 else 2e-5)


def test_ddpm_is_the_posterior_of_ho_et_al() -> None:
    """Their equation 7, in x scaled to unit variance."""
    steps = sigmas("normal", 6)
    x = noisy(steps[0], 1, 1, 4, 4)
    made = sample("ddpm", denoiser, x, steps, seed=2)
    generator = torch.Generator().manual_seed(2)
    bars = 1 / (1 + steps**2)
    x = x * bars[0].sqrt()
    for i, (bar, bar_next) in enumerate(pairwise(bars)):
        alpha = bar / bar_next
        x0 = denoiser(x / bar.sqrt(), steps[i : i + 1])
        x = (bar_next.sqrt() * (1 - alpha) * x0 + alpha.sqrt() * (1 - bar_next) * x) / (1 - bar)
        if bar_next < 1:
            x = x + ((1 - bar_next) / (1 - bar) * (1 - alpha)).sqrt() * torch.randn(x.shape, generator=generator)
    torch.testing.assert_close(made, x)


class Guided:
    """Knows an estimate with condition and guidance, and one without."""

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.both(x, sigma)[0]

    def both(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return denoiser(x, sigma), denoiser(x, sigma) - 0.3


def test_cfg_pp_adds_the_unconditional_noise_back() -> None:
    high, low = steps = torch.tensor([10.0, 4.0])
    x = noisy(high, 1, 1, 4, 4)
    x0 = denoiser(x, high)
    wanted = x0 + (x - (x0 - 0.3)) / high * low
    for name in ("euler_cfg_pp", "gradient_estimation_cfg_pp", "res_multistep_cfg_pp", "dpmpp_2m_cfg_pp"):
        torch.testing.assert_close(sample(name, Guided(), x, steps), wanted)
    assert not torch.allclose(sample("euler", Guided(), x, steps), wanted)


# Diffusers' schedulers, where they have the same method


def beside(scheduler: Any, x: Tensor, steps: int, **options: Any) -> tuple[Tensor, Tensor]:
    """What a diffusers scheduler makes of ``x`` of unit variance, and its sigmas."""
    scheduler.set_timesteps(steps)
    start = getattr(scheduler, "sigmas_interpol", scheduler.sigmas)[0]
    preserving = isinstance(scheduler, diffusers.DPMSolverMultistepScheduler)
    z = x * start / (1 + start**2).sqrt() if preserving else x * start
    for i, timestep in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas_interpol[i] if hasattr(scheduler, "sigmas_interpol") else scheduler.sigmas[i]
        here = z * (1 + sigma**2).sqrt() if preserving else z
        noise = (here - denoiser(here, sigma.reshape(1))) / sigma
        z = scheduler.step(noise, timestep, z, **options).prev_sample
    return z, scheduler.sigmas


@pytest.mark.parametrize(
    ("name", "peer", "settings"),
    [
        ("euler", "EulerDiscreteScheduler", {}),
        ("euler_ancestral", "EulerAncestralDiscreteScheduler", {}),
        ("heun", "HeunDiscreteScheduler", {}),
        ("dpmpp_2m", "DPMSolverMultistepScheduler", {"final_sigmas_type": "zero"}),
        ("dpmpp_2m_sde", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_diffusers_has_the_same(name: str, peer: str, settings: dict[str, Any]) -> None:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = getattr(diffusers, peer)(**betas, timestep_spacing="linspace", **settings)
    x = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    takes_generator = {} if name in ("euler", "heun") else {"generator": torch.Generator().manual_seed(7)}
    wanted, steps = beside(scheduler, x, 12, **takes_generator)
    steps = steps.unique().flip(0)
    ours = {"noise": independent(x, torch.Generator().manual_seed(7))} if name == "dpmpp_2m_sde" else {}
    made = sample(name, denoiser, x * steps[0], steps, seed=7, **ours)
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)


# The face


@pytest.mark.parametrize("name", SAMPLERS)
def test_tells_of_each_step_once_and_asks_for_the_whole_batch(name: str) -> None:
    steps, x = sigmas("normal", 6), noisy(torch.tensor(14.6), 2, 1, 4, 4)
    asked: list[Tensor] = []
    heard: list[tuple[int, torch.Size]] = []

    def asking(x: Tensor, sigma: Tensor) -> Tensor:
        asked.append(sigma)
        return denoiser(x, sigma)

    made = sample(name, asking, x, steps, callback=lambda step, x0: heard.append((step, x0.shape)))
    assert {sigma.shape for sigma in asked} == {(2,)}
    assert [step for step, _ in heard] == list(range(len(heard)))
    assert name in CHOOSE_THEIR_STEPS or len(heard) == 6
    assert {shape for _, shape in heard} == {made.shape} and made.shape == x.shape
    if name not in STOCHASTIC:
        torch.testing.assert_close(made[:1], sample(name, denoiser, x[:1], steps))


def test_what_the_callback_raises_ends_the_sampling() -> None:
    asked = []

    def stop(step: int, x0: Tensor) -> None:
        if step == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        sample("euler", lambda x, s: asked.append(s) or denoiser(x, s), torch.ones(1, 1, 2, 2), sigmas("simple", 9),
               callback=stop)  # fmt: skip
    assert len(asked) == 3


def test_sigmas_and_latents_are_not_changed() -> None:
    for name in SAMPLERS:
        steps = sigmas("normal", 4)
        x = noisy(steps[0], 1, 1, 2, 2)
        before = steps.clone(), x.clone()
        sample(name, denoiser, x, steps)
        assert torch.equal(steps, before[0]) and torch.equal(x, before[1]), name


def test_no_steps_change_nothing() -> None:
    x = torch.ones(1, 1, 2, 2)
    for steps in (torch.zeros(0), torch.tensor([3.0])):
        assert all(sample(name, denoiser, x, steps) is x for name in SAMPLERS)


def test_unknown_names_name_the_known() -> None:
    with pytest.raises(MahlstickError, match=r"'eular'.*euler_ancestral"):
        sample("eular", denoiser, torch.ones(1, 1, 2, 2), sigmas("normal", 2))
    with pytest.raises(MahlstickError, match=r"'carras'.*karras"):
        sigmas("carras", 3)
    with pytest.raises(MahlstickError, match=r"0 steps"):
        sigmas("karras", 0)
    with pytest.raises(MahlstickError, match=r"'cosine'.*scaled_linear"):
        training_sigmas(beta_schedule="cosine")
    with pytest.raises(MahlstickError, match=r"alpha and beta above 0"):
        builtin.BetaSamplingScheduler(model=Model(None, training_sigmas()), alpha=0.0)


# Schedules


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules_fall_from_the_noisiest_to_zero(name: str) -> None:
    table = training_sigmas()
    for steps in (1, 2, 7, 20, 50):
        found = sigmas(name, steps)
        assert found.dtype == torch.float32 and found[-1] == 0 and (found.diff() < 0).all()
        assert found[0] <= table[-1] * (1 + 1e-6)
        # 1000 divides by 7 with a rest, and beta's quantiles fall together.
        assert len(found) == steps + 1 or name in ("ddim_uniform", "beta")
    part = schedule(name, table, 10, denoise=0.5)
    assert torch.equal(part, schedule(name, table, 20)[-11:])
    assert len(schedule(name, table, 10, denoise=0.0)) == 0


def test_some_samplers_leave_out_the_last_sigma_above_zero() -> None:
    table = training_sigmas()
    for name in ("dpm_2", "dpm_2_ancestral", "uni_pc", "uni_pc_bh2"):
        assert torch.equal(schedule("karras", table, 8, sampler=name)[:-1], sigmas("karras", 9)[:-2])
    assert torch.equal(schedule("karras", table, 8, sampler="heun"), sigmas("karras", 8))


@pytest.mark.parametrize("name", ["scaled_linear", "linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("rescale", [False, True])
def test_tables_are_of_diffusers_configs(name: str, rescale: bool) -> None:
    peer = diffusers.DDIMScheduler(
        beta_start=0.001, beta_end=0.02, beta_schedule=name, num_train_timesteps=500, rescale_betas_zero_snr=rescale
    )
    bar = peer.alphas_cumprod[: 499 if rescale else 500].double()  # the last is 0 there, and nearly 0 in ComfyUI
    found = schedules.sigmas_from_config(peer.config)
    torch.testing.assert_close(found[: len(bar)], ((1 - bar) / bar).sqrt().float(), rtol=2e-3, atol=0)
    assert found[-1] == pytest.approx(4518.76, rel=1e-4) or not rescale
    if not rescale:
        trained = schedules.sigmas_from_config({"trained_betas": peer.betas.tolist()})
        torch.testing.assert_close(trained, found, rtol=1e-4, atol=0)


def test_timesteps_and_sigmas_are_inverse() -> None:
    table, steps = training_sigmas(), torch.tensor([0, 1, 500, 999])
    torch.testing.assert_close(schedules.sigma_at(table, steps), table[steps])
    assert torch.equal(schedules.timestep_at(table, table[steps]), steps)
    assert schedules.timestep_at(table, torch.tensor([1e5, 1e-5])).tolist() == [999, 0]
    between = schedules.sigma_at(table, torch.tensor(41.5))
    assert float(between) == pytest.approx(math.sqrt(table[41] * table[42]), rel=1e-6)
    assert schedules.percent_to_sigma(table, 0.0) > 1e8 and schedules.percent_to_sigma(table, 1.0) == 0
    assert schedules.percent_to_sigma(table, 0.25) == float(schedules.sigma_at(table, torch.tensor(749.25)))


# Nodes


@pytest.fixture
def model() -> Model:
    return Model(None, training_sigmas(), latent_scale=0.5, latent_shift=0.1)


def test_sampler_nodes_make_samplers(model: Model) -> None:
    steps = sigmas("karras", 6)
    x = noisy(steps[0], 1, 1, 4, 4)
    made = {}
    for found in vars(builtin).values():
        if getattr(found, "category", "").endswith("samplers"):
            inputs = {each.name: each.choices[0] if each.choices else False for each in found.inputs
                      if "default" not in each.options and each.type != "MODEL"}  # fmt: skip
            given = {"model": model} if found.name == "SamplerSASolver" else {}
            (sampler,) = found(**inputs, **given)
            made[found.name] = sampler.run(denoiser, x, steps, seed=1, in_run=True, **sampler.options)
    same = {
        "KSamplerSelect": "euler",
        "SamplerEulerAncestral": "euler_ancestral",
        "SamplerEulerAncestralCFGPP": "euler_ancestral_cfg_pp",
        "SamplerLMS": "lms",
        "SamplerDPMPP_3M_SDE": "dpmpp_3m_sde_gpu",
        "SamplerDPMPP_2M_SDE": "dpmpp_2m_sde_gpu",
        "SamplerDPMPP_SDE": "dpmpp_sde_gpu",
        "SamplerDPMPP_2S_Ancestral": "dpmpp_2s_ancestral",
        "SamplerDPMAdaptative": "dpm_adaptive",
        "SamplerER_SDE": "er_sde",
        "SamplerSASolver": "sa_solver",
        "SamplerSEEDS2": "seeds_2",
    }
    assert made.keys() == same.keys()
    for name, sampler in same.items():
        assert torch.equal(made[name], sample(sampler, denoiser, x, steps, seed=1, in_run=True)), name
    assert builtin.KSamplerSelect(sampler_name="ddim")[0].new_noise
    (ode,) = builtin.SamplerER_SDE(solver_type="ODE", max_stage=1)
    straight = ode.run(denoiser, x, steps, **ode.options)
    torch.testing.assert_close(straight, sample("euler", denoiser, x, steps), rtol=0, atol=1e-5)


def test_scheduler_nodes_make_schedules(model: Model) -> None:
    (basic,) = builtin.BasicScheduler(model=model, scheduler="ddim_uniform", steps=7, denoise=1.0)
    assert torch.equal(basic, sigmas("ddim_uniform", 7)[-8:])
    ends = {"sigma_max": float(model.sigmas[-1]), "sigma_min": float(model.sigmas[0])}
    for made, name in ((builtin.KarrasScheduler, "karras"), (builtin.ExponentialScheduler, "exponential")):
        assert torch.equal(made(steps=9, **ends)[0], sigmas(name, 9))
    torch.testing.assert_close(builtin.PolyexponentialScheduler(steps=9, **ends)[0], sigmas("exponential", 9))
    assert torch.equal(builtin.BetaSamplingScheduler(model=model, steps=9)[0], sigmas("beta", 9))
    turbo = builtin.SDTurboScheduler(model=model, steps=2, denoise=0.5)[0]
    torch.testing.assert_close(turbo, torch.tensor([*model.sigmas[[499, 399]], 0]))
    laplace = builtin.LaplaceScheduler(steps=5)[0]
    assert len(laplace) == 5 and float(laplace[2]) == pytest.approx(1, abs=1e-3)
    preserving = builtin.VPScheduler(steps=5)[0]
    assert preserving[0] == pytest.approx(math.sqrt(math.expm1(19.9 / 2 + 0.1)), rel=1e-5) and preserving[-1] == 0
    aligned = builtin.AlignYourStepsScheduler(model_type="SD1", steps=10)[0]
    torch.testing.assert_close(aligned[:3], torch.tensor([14.6146, 6.4746, 3.8637]), rtol=1e-4, atol=0)
    assert aligned[-1] == 0 and len(builtin.AlignYourStepsScheduler(model_type="SVD", steps=20, denoise=0.5)[0]) == 11


def test_sigma_nodes_make_of_one_schedule_another(model: Model) -> None:
    steps = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0])
    before = steps.clone()
    high, low = builtin.SplitSigmas(sigmas=steps, step=1)
    assert high.tolist() == [8, 4] and low.tolist() == [4, 2, 1, 0]
    high, low = builtin.SplitSigmasDenoise(sigmas=steps, denoise=0.5)
    assert high.tolist() == [8, 4, 2] and low.tolist() == [2, 1, 0]
    torch.testing.assert_close(builtin.FlipSigmas(sigmas=steps)[0], torch.tensor([1e-4, 1, 2, 4, 8]))
    assert builtin.SetFirstSigma(sigmas=steps, sigma=9.5)[0].tolist() == [9.5, 4, 2, 1, 0]
    extended = builtin.ExtendIntermediateSigmas(
        sigmas=steps, steps=2, start_at_sigma=5.0, end_at_sigma=2.0, spacing="linear"
    )[0]
    assert extended.tolist() == [8, 4, 3, 2, 1.5, 1, 0]
    sine = builtin.ExtendIntermediateSigmas(sigmas=steps, steps=3, end_at_sigma=8.0, spacing="sine")[0]
    torch.testing.assert_close(sine[:4], 8 - 4 * (1 - torch.tensor([0.0, math.pi / 6, math.pi / 3, math.pi / 2]).cos()))
    assert builtin.ManualSigmas(sigmas="14.6, 2.5 ; .5\n0")[0].tolist() == pytest.approx([14.6, 2.5, 0.5, 0])
    assert builtin.SamplingPercentToSigma(model=model, sampling_percent=0.0, return_actual_sigma=True) == (
        float(model.sigmas[-1]),
    )
    assert torch.equal(steps, before)


def test_noise_nodes(model: Model) -> None:
    latent = {"samples": torch.ones(2, 4, 2, 2), "batch_index": [0, 1]}
    (noise,) = builtin.RandomNoise(noise_seed=4)
    (none,) = builtin.DisableNoise()
    assert noise.seed == 4 and not none.draw(latent).any()
    (noisier,) = builtin.AddNoise(model=model, noise=noise, sigmas=torch.tensor([3.0, 1.0]), latent_image=latent)
    torch.testing.assert_close(noisier["samples"], latent["samples"] + noise.draw(latent) * 2 / 0.5)
    assert noisier["batch_index"] == [0, 1] and (latent["samples"] == 1).all()
    assert builtin.AddNoise(model=model, noise=noise, sigmas=torch.zeros(0), latent_image=latent)[0] is latent


def test_a_model_can_be_told_what_it_predicts(model: Model) -> None:
    (other,) = builtin.ModelSamplingDiscrete(model=model, sampling="v_prediction", zsnr=True)
    assert other.prediction == "v_prediction" and model.prediction == "epsilon"
    torch.testing.assert_close(other.sigmas, training_sigmas(zero_terminal_snr=True), rtol=1e-4, atol=0)
    # The first step stays, the last is almost nothing but noise.
    assert float(other.sigmas[0]) == pytest.approx(float(model.sigmas[0]), rel=1e-5) and other.sigmas[-1] > 4000
