"""Sampling as ComfyUI samples: its outputs, and what must hold for conditionings, ControlNets, masks and guidance."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import load_file
from torch import Tensor

import mahlstick as ms
from benchmarks import tiny
from mahlstick.nodes import progress
from mahlstick.nodes.builtin import control, samplers, sampling
from mahlstick.nodes.sampling.conditions import resolve
from mahlstick.nodes.sampling.models import model_from_pipeline, model_from_unet
from mahlstick.nodes.sampling.network import SamplingClock, clipped_on
from mahlstick.nodes.sampling.noise import RandomNoise, prepare_noise
from mahlstick.nodes.sampling.samplers import named
from mahlstick.nodes.sampling.schedules import percent_to_sigma, schedule
from mahlstick.nodes.values import ControlHint, Model

GOLDENS = Path(__file__).parents[2] / "shared" / "goldens"
GOLDEN = [
    "|".join([sampler, f"denoise={denoise}|control={window}|batch={batch}"])
    for sampler in ("euler|normal", "dpmpp_2m|karras", "euler_ancestral|normal")
    for denoise, window, batch in (
        (1.0, None, 1),
        (0.6, None, 1),
        (1.0, (0.7, 0.1, 0.6), 1),
        (1.0, None, 2),
    )
    if "ancestral" in sampler or (denoise, window, batch) != (1.0, None, 1)  # otherwise the first of the batch of 2
]
SIDE = tiny.SIZE // 8  # latents along one side
SMALL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
}


# ComfyUI's own numbers ----------------------------------------------------------------------------------------------


@cache
def family() -> tuple[Model, ms.ControlNet, dict[str, Tensor]]:
    """Model and ControlNet with which ComfyUI was run, its inputs and its outputs."""
    path = GOLDENS / "cldm_family.weights.safetensors"
    net = ms.ControlNet.from_pretrained(path, dtype=torch.float32)
    fields = signature(UNet2DConditionModel).parameters
    config = {name: value for name, value in net.config.items() if name in fields}
    config["up_block_types"] = [kind.replace("Down", "Up") for kind in reversed(config["down_block_types"])]
    unet = UNet2DConditionModel(**config).eval()
    weights = convert_ldm_unet_checkpoint(load_file(path), dict(unet.config))
    unet.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return model_from_unet(unet), net, load_file(GOLDENS / "comfy_ksampler.safetensors")


@pytest.mark.skipif(not GOLDENS.is_dir(), reason="ComfyUI's outputs are not beside this checkout")
@pytest.mark.parametrize("name", GOLDEN)
def test_latents_are_comfyuis(name: str) -> None:
    model, net, io = family()
    sampler, scheduler, *given = name.split("|")
    denoise, window, batch = (ast.literal_eval(each.split("=")[1]) for each in given)
    positive, negative = [[io["positive"], {}]], [[io["negative"], {}]]
    if window:
        positive, negative = control.ControlNetApplyAdvanced(
            positive=positive, negative=negative, control_net=net, image=io["hint_bhwc"],
            strength=window[0], start_percent=window[1], end_percent=window[2],
        )  # fmt: skip
    latent = {"samples": io["init_latent"] if denoise < 1 else torch.zeros(batch, 4, 16, 16)}
    (found,) = sampling.KSampler(
        model=model, seed=1234, steps=10, cfg=5.0, sampler_name=sampler, scheduler=scheduler, denoise=denoise,
        positive=positive, negative=negative, latent_image=latent,
    )  # fmt: skip
    assert relative(found["samples"], io[name]) < 1e-5
    if "ancestral" not in name:
        assert relative(found["samples"][:1], io[name.replace("batch=2", "batch=1")]) < 1e-5


# Tiny models --------------------------------------------------------------------------------------------------------


def unet(**changes: Any) -> Any:
    return tiny.unet("sd1", **SMALL | changes)


@cache
def model(**changes: Any) -> Model:
    return model_from_unet(unet(**changes))


@cache
def net(seed: int = 0) -> ms.ControlNet:
    torch.manual_seed(seed)
    fresh = ms.ControlNet.from_unet(unet(), conditioning_embedding_out_channels=(4, 6, 6, 8))
    with torch.no_grad():
        return tiny.awake(fresh)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(seed: int, length: int = 7, width: int = tiny.WIDTH) -> Tensor:
    return noise(1, length, width, seed=seed)


def picture(seed: int, count: int = 1) -> Tensor:
    return torch.rand(count, 96, 64, 3, generator=torch.Generator().manual_seed(seed))


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def close(found: Tensor, wanted: Tensor) -> bool:
    return relative(found, wanted) < 1e-5


@contextmanager
def counted(unet: Any) -> Iterator[list[int]]:
    """The number of rows of each call of the UNet."""
    calls: list[int] = []
    hook = unet.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    yield calls
    hook.remove()


@torch.no_grad()
def estimates(
    model: Model, x: Tensor, sigma: float, mask: Tensor | None = None, **conditionings: Any
) -> dict[str, Tensor]:
    """What the denoiser makes of conditionings, at one sigma."""
    sigmas = torch.tensor([sigma, 0.0])
    with clipped_on(model, sigmas) as network:
        return network.estimates(x, sigmas[:1].expand(len(x)), resolve(model, conditionings, x, mask))


def estimate(model: Model, x: Tensor, sigma: float, *positive: Any) -> Tensor:
    return estimates(model, x, sigma, positive=list(positive))["positive"]


@torch.no_grad()
def by_hand(x: Tensor, text: Tensor, *units: ms.Control) -> Tensor:
    """x0 from one call of the UNet, which predicts the noise."""
    network = model().unet
    with ms.attach(network, *units):
        return x - SIGMA * network(x / math.sqrt(SIGMA**2 + 1), TIMESTEP, text.expand(len(x), -1, -1)).sample


def run(model: Model, latent: Any = None, node: Any = sampling.KSampler, **changes: Any) -> Tensor:
    inputs = {
        "model": model, "steps": 3, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal",
        "positive": [[text(1), {}]], "negative": [[text(2), {}]],
        "latent_image": latent or {"samples": torch.zeros(1, 4, SIDE, SIDE)},
    }  # fmt: skip
    return node(**inputs | changes)[0]["samples"]


SIGMA, TIMESTEP = float(model().sigmas[401]), 401


# Estimates ----------------------------------------------------------------------------------------------------------


def test_the_three_parameterisations() -> None:
    x, network = noise(2, 4, SIDE, SIDE), model().unet
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler.set_timesteps(timesteps=[TIMESTEP, 0])
    with torch.no_grad():
        output = network(x / math.sqrt(SIGMA**2 + 1), TIMESTEP, text(1).expand(2, -1, -1)).sample
    for kind in ("epsilon", "v_prediction"):
        scheduler.register_to_config(prediction_type=kind)
        scheduler._step_index = 0
        wanted = scheduler.step(output, scheduler.timesteps[0], x).pred_original_sample
        assert close(estimate(model_from_unet(network, kind), x, SIGMA, [text(1), {}]), wanted)
    assert close(estimate(model_from_unet(network, "sample"), x, SIGMA, [text(1), {}]), output)
    with pytest.raises(ms.MahlstickError, match="prediction_type"):
        model_from_unet(network, "flow")


def test_a_latent_consistency_model_knows_every_twentieth_step() -> None:
    (distilled,) = samplers.ModelSamplingDiscrete(model=model(), sampling="lcm")
    assert torch.equal(distilled.table, model().sigmas[19::20])
    asked: list[int] = []
    hook = distilled.unet.register_forward_pre_hook(lambda _, args: asked.append(int(args[1][0])))
    found = run(distilled, sampler_name="lcm", scheduler="sgm_uniform", steps=5, cfg=1.0)
    hook.remove()
    assert asked == [999, 799, 599, 419, 219] and found.isfinite().all()  # near 999, 803, 607, 411 and 215
    for again, steps in (("lcm", 50), ("eps", 1000)):
        assert len(samplers.ModelSamplingDiscrete(model=distilled, sampling=again)[0].table) == steps


def test_a_latent_consistency_model_keeps_x_where_there_is_no_noise() -> None:
    x, trained = noise(2, 4, SIDE, SIDE), model().sigmas[::10]  # of 100 steps every second, the first of them 1
    (distilled,) = samplers.ModelSamplingDiscrete(model=replace(model(), sigmas=trained), sampling="lcm")
    sigma = float(trained[1])
    with torch.no_grad():
        x0 = x - sigma * model().unet(x / math.sqrt(sigma**2 + 1), 1, text(1).expand(2, -1, -1)).sample
    angle = math.atan(1 * 10 / 0.5)
    assert close(estimate(distilled, x, sigma, [text(1), {}]), math.cos(angle) ** 2 * x + math.sin(angle) * x0)


@pytest.mark.parametrize(
    "options",
    [
        {"area": (SIDE, SIDE, 0, 0)},
        {"area": ("percentage", 1.0, 1.0, 0.0, 0.0), "strength": 0.3},
        {"mask": torch.full((1, 40, 40), 0.5), "mask_strength": 0.7},
        {"mask": torch.ones(5, 5), "set_area_to_bounds": True},
        {"start_percent": 0.0, "end_percent": 1.0},
    ],
)
def test_what_covers_everything_changes_nothing(options: dict[str, Any]) -> None:
    x = noise(1, 4, SIDE, SIDE)
    assert close(estimate(model(), x, SIGMA, [text(1), options]), estimate(model(), x, SIGMA, [text(1), {}]))


def test_masks_weigh_their_conditionings() -> None:
    x, mask = noise(2, 4, SIDE, SIDE), torch.rand(1, SIDE, SIDE, generator=torch.Generator().manual_seed(4))
    one, other = (estimate(model(), x, SIGMA, [text(seed), {}]) for seed in (1, 2))
    found = estimate(model(), x, SIGMA, [text(1), {"mask": mask}], [text(2), {"mask": 1 - mask}])
    assert close(found, mask * one + (1 - mask) * other)
    weighed = estimate(model(), x, SIGMA, [text(1), {"strength": 3.0}], [text(2), {}])
    assert close(weighed, (3 * one + other) / 4)


def test_areas_are_cut_out_and_feathered() -> None:
    x = noise(1, 4, 16, 16)
    # The right half, and the lower left quarter with latents to spare: 8 rows of 8.
    right, lower = {"area": (16, 8, 0, 8)}, {"area": ("percentage", 0.5, 0.5, 0.5, 0.0), "strength": 2.0}
    found = estimate(model(), x, SIGMA, [text(1), {}], [text(2), right], [text(3), lower])
    fade = torch.tensor([0.5, 1, 1, 1, 1, 1, 1, 1])
    sums, weights = estimate(model(), x, SIGMA, [text(1), {}]), torch.ones(1, 1, 16, 16)
    sums[..., 8:] += fade * estimate(model(), x[..., 8:], SIGMA, [text(2), {}])
    weights[..., 8:] += fade
    corner = 2.0 * fade[:, None] * fade.flip(0)
    sums[..., 8:, :8] += corner * estimate(model(), x[..., 8:, :8], SIGMA, [text(3), {}])
    weights[..., 8:, :8] += corner
    assert close(found, sums / weights)


def test_areas_are_counted_in_eight_pixels_whatever_the_model() -> None:
    x = noise(1, 4, 16, 16)
    found = estimate(replace(model(), factor=4), x, SIGMA, [text(1), {}], [text(2), {"area": (8, 4, 0, 4)}])
    assert close(found, estimate(model(), x, SIGMA, [text(1), {}], [text(2), {"area": (16, 8, 0, 8)}]))


def test_an_area_has_its_like_in_the_negative() -> None:
    x, area = noise(1, 4, 16, 16), {"area": (16, 8, 0, 0), "strength": 5.0}
    with counted(model().unet) as calls:
        found = estimates(model(), x, SIGMA, positive=[[text(1), area]], negative=[[text(2), {}]])
    assert calls == [1, 2], "the cut-outs share a call"
    wanted = estimate(model(), x, SIGMA, [text(2), {}], [text(2), area])
    assert close(found["negative"], wanted)
    assert float(found["positive"][..., 8:].abs().max()) == 0, "what no conditioning covers is grey"


def test_bounds_of_a_mask() -> None:
    def area(mask: Tensor) -> Any:
        given = {"positive": [[text(1), {"mask": mask, "set_area_to_bounds": True}]]}
        return resolve(model(), given, torch.zeros(1, 4, 24, 24))["positive"][0].area

    mask = torch.zeros(1, 24, 24)
    mask[:, 10:20, 3:5] = 1
    assert area(mask) == (10, 8, 10, 3)
    assert area(0 * mask) == (8, 8, 0, 0)


@pytest.mark.parametrize(("lengths", "rows"), [((7, 14), [2]), ((14, 21), [2]), ((5, 7), [1, 1])])
def test_texts_of_different_lengths(lengths: tuple[int, int], rows: list[int]) -> None:
    x, (one, other) = noise(1, 4, SIDE, SIDE), (text(seed, length) for seed, length in enumerate(lengths))
    with counted(model().unet) as calls:
        found = estimates(model(), x, SIGMA, positive=[[one, {}]], negative=[[other, {}]])
    assert calls == rows
    assert close(found["positive"], estimate(model(), x, SIGMA, [one, {}]))
    assert close(found["negative"], estimate(model(), x, SIGMA, [other, {}]))


def test_a_range_holds_where_comfyui_lets_it() -> None:
    x, sigmas = noise(1, 4, SIDE, SIDE), schedule("sgm_uniform", model().sigmas, 10)
    wanted, other = (estimate(model(), x, float(sigmas[3]), [text(seed), {}]) for seed in (1, 2))
    early, late = {"start_percent": 0.0, "end_percent": 0.3}, {"start_percent": 0.3, "end_percent": 1.0}
    found = [estimate(model(), x, float(sigmas[step]), [text(1), early], [text(2), late]) for step in (2, 3, 4)]
    assert close(found[1], (wanted + other) / 2), "0.3 is this very step, and both ends count"
    assert close(found[0], estimate(model(), x, float(sigmas[2]), [text(1), {}]))
    assert close(found[2], estimate(model(), x, float(sigmas[4]), [text(2), {}]))


def test_windows_of_units_end_where_comfyui_ends_them() -> None:
    distilled = replace(model(), stride=20)
    # 749.25 lies between the steps 739 and 759.
    assert percent_to_sigma(distilled.table, 0.25, 20) == pytest.approx(
        float(model().sigmas[739] ** (1 - 10.25 / 20) * model().sigmas[759] ** (10.25 / 20))
    )
    for known, scheduler, steps in (
        (model(), "sgm_uniform", 20),
        (model(), "normal", 21),
        (model(), "karras", 7),
        (distilled, "sgm_uniform", 20),
    ):
        percents = [(k / 20, percent_to_sigma(known.table, k / 20, known.stride)) for k in range(21)]
        clock = SamplingClock(known, sigmas := schedule(scheduler, known.table, steps))
        for step, sigma in enumerate(sigmas[:-1].tolist()):
            clock.tell(sigma, ("cond",))
            assert clock.position(0) == (step, steps)
            done = clock.done(0)
            for percent, edge in percents:
                assert (done >= percent, done <= percent) == (edge >= sigma, sigma >= edge)


# ControlNets --------------------------------------------------------------------------------------------------------


def unit(hint: ControlHint, rows: int = 1) -> ms.Control:
    """The hint's picture cut to the middle square, at its nearest pixels."""
    square = torch.nn.functional.interpolate(hint.image.movedim(-1, 1)[:, :, 16:80], (64, 64), mode="nearest-exact")
    return ms.Control(hint.net, square[torch.arange(rows) % len(square)], hint.strength)


def test_controls_of_their_own_for_positive_and_negative() -> None:
    x = noise(3, 4, SIDE, SIDE)
    one, two, three = (
        ControlHint(net(), picture(1), 0.7),
        ControlHint(net(1), picture(2)),
        ControlHint(net(), picture(3, 2)),
    )
    with counted(model().unet) as calls:
        found = estimates(
            model(), x, SIGMA,
            positive=[[text(1), {"control": (one, two)}], [text(3), {}]], negative=[[text(2), {"control": (three,)}]],
        )  # fmt: skip
    assert calls == [3, 3, 3]
    with_both = by_hand(x, text(1), unit(one), unit(two))
    assert close(found["positive"], (with_both + by_hand(x, text(3))) / 2)
    assert close(found["negative"], by_hand(x, text(2), unit(three, rows=3)))


def test_each_control_picture_is_encoded_once_in_a_run() -> None:
    encoded: list[int] = []
    hook = net().controlnet_cond_embedding.register_forward_pre_hook(lambda _, args: encoded.append(len(args[0])))
    positive, negative = ([[text(seed), {"control": (ControlHint(net(), picture(seed)),)}]] for seed in (1, 2))
    run(model(), positive=positive, negative=negative)
    hook.remove()
    assert encoded == [1, 1]


def test_the_same_control_serves_both_in_one_call() -> None:
    x, shown = noise(1, 4, SIDE, SIDE), picture(1)
    positive, negative = control.ControlNetApplyAdvanced(
        positive=[[text(1), {}]], negative=[[text(2), {}]], control_net=net(), image=shown
    )
    (for_both,) = control.ControlNetApply(conditioning=[[text(1), {}]], control_net=net(), image=shown)
    with counted(model().unet) as calls:
        found = estimates(model(), x, SIGMA, positive=positive, negative=negative)
        shared = estimates(model(), x, SIGMA, positive=for_both, negative=[[text(2), {}]])
        apart = estimates(model(), x, SIGMA, positive=positive, negative=[[text(2), {}]])
    assert calls == [2, 2, 1, 1]
    assert torch.equal(found["negative"], shared["negative"])
    assert not torch.allclose(found["negative"], apart["negative"])


def test_a_control_acts_in_its_part_of_the_noise() -> None:
    def controlled(start: float, end: float) -> Tensor:
        positive, negative = control.ControlNetApplyAdvanced(
            positive=[[text(1), {}]], negative=[[text(2), {}]], control_net=net(), image=picture(1),
            start_percent=start, end_percent=end,
        )  # fmt: skip
        return run(model(), positive=positive, negative=negative, scheduler="sgm_uniform", steps=2)

    plain = run(model(), scheduler="sgm_uniform", steps=2)  # the steps are at 0 and 0.5
    assert torch.equal(controlled(0.6, 1.0), plain)
    assert torch.equal(controlled(0.0, 0.5), controlled(0.0, 1.0))
    assert torch.equal(controlled(0.9, 0.1), plain), "a window that ends before it begins never acts"
    assert not torch.allclose(controlled(0.5, 1.0), controlled(0.0, 1.0))


def test_loading_and_applying_nets(tmp_path: Path) -> None:
    from mahlstick.nodes import folders

    net().save_pretrained(tmp_path / "models" / "controlnet" / "mine")
    with folders.using(folders.Folders(models=tmp_path / "models")):
        info = control.ControlNetLoader.info["input"]["required"]["control_net_name"][0]
        assert info == ["mine", "embedded:lineart"]
        for loader in (control.ControlNetLoader, control.DiffControlNetLoader):
            given = {"model": model()} if loader is control.DiffControlNetLoader else {}
            (loaded,) = loader(control_net_name="mine", **given)
            assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), net().parameters(), strict=True))
        (embedded,) = control.ControlNetLoader(control_net_name="embedded:lineart")
        assert isinstance(embedded, ms.ControlNet)
        fingerprint = control.ControlNetLoader.fingerprint
        assert fingerprint is not None and fingerprint("mine") != fingerprint("embedded:lineart") != fingerprint(None)
    given = [[text(1), {}]]
    assert control.ControlNetApply(conditioning=given, control_net=net(), image=picture(1), strength=0.0) == (given,)
    with pytest.raises(ms.MahlstickError, match="ControlNet"):
        control.ControlNetApply(conditioning=given, control_net=model(), image=picture(1))
    assert given == [[given[0][0], {}]], "what flows in stays as it is"


# Whole runs ---------------------------------------------------------------------------------------------------------


def test_advanced_in_two_halves_is_the_whole() -> None:
    whole = run(model(), seed=5, steps=4, scheduler="karras", sampler_name="dpmpp_2m")
    options = {"node": sampling.KSamplerAdvanced, "noise_seed": 5, "steps": 4, "scheduler": "karras"}
    assert torch.equal(run(model(), sampler_name="dpmpp_2m", **options), whole)
    euler = run(model(), seed=5, steps=4, scheduler="karras")
    first = run(model(), end_at_step=2, return_with_leftover_noise="enable", **options)
    latent = {"samples": first}
    second = run(model(), latent, start_at_step=2, add_noise="disable", **options)
    assert close(second, euler)
    assert torch.equal(run(model(), latent, start_at_step=4, **options), first), "nothing left to do"
    assert not torch.allclose(run(model(), end_at_step=2, **options), first), "without leftover noise it ends at 0"


def test_custom_samplers_are_ksampler_in_parts() -> None:
    wanted, sigmas = run(model(), seed=5), schedule("normal", model().sigmas, 3)
    sampler = named("euler")
    latent = {"samples": torch.zeros(1, 4, SIDE, SIDE), "downscale_ratio_spacial": 8}
    positive, negative = [[text(1), {}]], [[text(2), {}]]
    output, denoised = sampling.SamplerCustom(
        model=model(), noise_seed=5, cfg=4.0, positive=positive, negative=negative, sampler=sampler, sigmas=sigmas,
        latent_image=latent,
    )  # fmt: skip
    assert torch.equal(output["samples"], wanted) and close(denoised["samples"], wanted)
    assert set(output) == {"samples"}
    parts = {"noise": RandomNoise(5), "sampler": sampler, "sigmas": sigmas, "latent_image": latent}
    (guider,) = sampling.CFGGuider(model=model(), positive=positive, negative=negative, cfg=4.0)
    assert torch.equal(sampling.SamplerCustomAdvanced(guider=guider, **parts)[0]["samples"], wanted)
    (basic,) = sampling.BasicGuider(model=model(), conditioning=positive)
    with counted(model().unet) as calls:
        found = sampling.SamplerCustomAdvanced(guider=basic, **parts)[0]["samples"]
        assert torch.equal(found, run(model(), seed=5, cfg=1.0))
    assert calls == [1] * 6, "at cfg 1 nothing is computed of the negative"


def test_dual_guidance() -> None:
    x, sigma = noise(1, 4, SIDE, SIDE), torch.tensor([SIGMA])
    given = {"cond1": [[text(1), {}]], "cond2": [[text(2), {}]], "negative": [[text(3), {}]]}
    first, second, negative = (estimate(model(), x, SIGMA, *each) for each in given.values())
    found = {"positive": first, "middle": second, "negative": negative}
    options = {"cfg_conds": 3.0, "cfg_cond2_negative": 2.0}
    (regular,) = sampling.DualCFGGuider(model=model(), **given, **options)
    assert close(regular.combine(found, x, sigma), negative + 2 * (second - negative) + 3 * (first - second))
    (nested,) = sampling.DualCFGGuider(model=model(), **given, **options, style="nested")
    wanted = negative + 2 * (second + 3 * (first - second) - negative)
    assert close(nested.combine(found, x, sigma), wanted)
    (plain,) = sampling.DualCFGGuider(model=model(), **given, cfg_conds=1.0, cfg_cond2_negative=1.0)
    assert plain.unused == {"negative", "middle"}


def test_rescaled_guidance() -> None:
    guided = run(model())
    (same,) = sampling.RescaleCFG(model=model(), multiplier=0.0)
    assert close(run(same), guided)
    (rescaled,) = sampling.RescaleCFG(model=model(), multiplier=1.0)
    x, sigma = noise(2, 4, SIDE, SIDE), torch.full((2,), SIGMA)
    cond, uncond = noise(2, 4, SIDE, SIDE, seed=1), noise(2, 4, SIDE, SIDE, seed=2)
    kept = x / (SIGMA**2 + 1)
    found = rescaled.guide(cond, uncond, 7.0, x, sigma)
    assert torch.allclose((kept - found).std(dim=(1, 2, 3)), (kept - cond).std(dim=(1, 2, 3)), rtol=1e-4)
    assert model().guide is None and not torch.allclose(run(rescaled), guided)


def test_cfg_pp_asks_for_the_negative() -> None:
    with counted(model().unet) as calls:
        found = run(model(), sampler_name="euler_cfg_pp", cfg=1.0)
    assert calls == [2] * 3 and not torch.allclose(found, run(model(), cfg=1.0))


def test_a_mask_keeps_what_it_does_not_cover() -> None:
    original, mask = noise(2, 4, SIDE, SIDE), torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1
    latent = {"samples": original, "noise_mask": mask}
    for sampler in ("euler", "dpmpp_2m", "ddim"):
        found = run(model(), latent, sampler_name=sampler)
        assert torch.equal(found[..., : SIDE // 2], original[..., : SIDE // 2]), sampler
        assert not torch.allclose(found[..., SIDE // 2 :], original[..., SIDE // 2 :])
    everything = run(model(), {"samples": original, "noise_mask": torch.ones(64, 64)})
    assert close(everything, run(model(), {"samples": original}))
    assert not torch.allclose(run(model(), latent), run(model(), latent, sampler_name="ddim")), "ddim has other noise"
    leftover = {"node": sampling.KSamplerAdvanced, "end_at_step": 1, "return_with_leftover_noise": "enable"}
    assert not torch.allclose(run(model(), latent, **leftover)[..., : SIDE // 2], original[..., : SIDE // 2])


def test_an_inpainting_unet_sees_mask_and_picture() -> None:
    inpainting = model(in_channels=9)
    x, mask, kept = noise(2, 4, SIDE, SIDE), torch.rand(1, 1, 32, 32), noise(1, 4, SIDE, SIDE, seed=1)
    options = {"concat_mask": mask, "concat_latent_image": kept}
    small = torch.nn.functional.interpolate(mask, (SIDE, SIDE), mode="bilinear").round()
    beside = torch.cat([small, kept * 0.18215], dim=1).expand(2, -1, -1, -1)
    with torch.no_grad():
        seen = torch.cat([x / math.sqrt(SIGMA**2 + 1), beside], dim=1)
        output = inpainting.unet(seen, TIMESTEP, text(1).expand(2, -1, -1)).sample
    assert close(estimate(inpainting, x, SIGMA, [text(1), options]), x - SIGMA * output)
    whole = estimates(inpainting, x, SIGMA, torch.ones(2, 4, SIDE, SIDE), positive=[[text(1), {}]])["positive"]
    assert not torch.allclose(whole, estimate(inpainting, x, SIGMA, [text(1), {}])), "without a mask it sees grey"
    assert run(inpainting).shape == (1, 4, SIDE, SIDE)
    with pytest.raises(ms.MahlstickError, match="5"):
        run(model(in_channels=8))


def test_the_batch_index_chooses_the_noise() -> None:
    three = run(model(), {"samples": torch.zeros(3, 4, SIDE, SIDE), "batch_index": [0, 1, 2]}, seed=9)
    alone = run(model(), {"samples": torch.zeros(2, 4, SIDE, SIDE), "batch_index": [2, 0]}, seed=9)
    assert close(alone, three[[2, 0]])


def test_empty_latents_become_the_models_own() -> None:
    latent = {"samples": torch.zeros(1, 16, 4, 6), "downscale_ratio_spacial": 16}
    assert torch.equal(run(model(), latent), run(model(), {"samples": torch.zeros(1, 4, 8, 12)}))
    with pytest.raises(ms.MahlstickError, match="16 channels"):
        run(model(), {"samples": torch.ones(1, 16, SIDE, SIDE)})
    assert torch.equal(run(model(), latent, denoise=0.0), torch.zeros(1, 4, 8, 12))


@pytest.mark.parametrize(
    ("conditioning", "told"),
    [([[text(1, width=8), {}]], "8 wide"), ([[text(1), {"area": (8, 8, 80, 0)}]], "outside")],
)
def test_what_does_not_fit_is_named(conditioning: Any, told: str) -> None:
    with pytest.raises(ms.MahlstickError, match=told):
        run(model(), positive=conditioning)


def test_sdxl_takes_pooled_text_and_sizes() -> None:
    xl, x = model_from_unet(tiny.unet("sdxl")), noise(1, 4, SIDE, SIDE)
    words, pooled = text(1, width=2 * tiny.WIDTH), noise(1, tiny.WIDTH, seed=3)
    sizes = {"width": 96, "height": 80, "crop_w": 8, "crop_h": 16, "target_width": 64, "target_height": 72}
    found = estimate(xl, x, SIGMA, [words, {"pooled_output": pooled, **sizes}])
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[80.0, 96, 16, 8, 72, 64]])}
    with torch.no_grad():
        output = xl.unet(x / math.sqrt(SIGMA**2 + 1), TIMESTEP, words, added_cond_kwargs=added).sample
    assert close(found, x - SIGMA * output)
    other = [[text(2, length=14, width=2 * tiny.WIDTH), {"pooled_output": pooled}]]
    assert run(xl, positive=[[words, {}]], negative=other).shape == (1, 4, SIDE, SIDE)


def test_the_refiner_takes_a_score_in_place_of_the_target_size() -> None:
    base = tiny.unet("sdxl").config
    dim = base.projection_class_embeddings_input_dim - base.addition_time_embed_dim
    refiner, x = model_from_unet(tiny.unet("sdxl", projection_class_embeddings_input_dim=dim)), noise(1, 4, SIDE, SIDE)
    words, pooled = text(1, width=2 * tiny.WIDTH), noise(1, tiny.WIDTH, seed=3)
    entry = [words, {"pooled_output": pooled, "width": 96, "height": 80}]
    found = estimates(refiner, x, SIGMA, positive=[entry], negative=[entry])
    for name, score in (("positive", 6.0), ("negative", 2.5)):
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[80.0, 96, 0, 0, score]])}
        with torch.no_grad():
            output = refiner.unet(x / math.sqrt(SIGMA**2 + 1), TIMESTEP, words, added_cond_kwargs=added).sample
        assert close(found[name], x - SIGMA * output), name


def test_no_picture_is_made_for_nobody() -> None:
    unfit = replace(model(), autoencoder=torch.nn.Identity())
    assert torch.equal(run(unfit), run(model()))
    with pytest.raises(AttributeError), progress.listening(lambda value, total, preview=None: None):
        run(unfit)


def test_the_unet_is_afterwards_what_it_was() -> None:
    network, inputs = unet(), tiny.unet_inputs("sd1")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in network.modules()]
    with torch.no_grad():
        output = network(**inputs).sample

    @contextmanager
    def louder(patched: Any) -> Iterator[None]:
        weight = patched.conv_out.weight.data
        patched.conv_out.weight.data = weight * 1.5
        try:
            yield
        finally:
            patched.conv_out.weight.data = weight

    ip = ms.IPAdapter.from_unet(network, tokens=2, feature_dim=tiny.WIDTH)
    prompt = ms.ImagePrompt(ip, features=noise(1, tiny.WIDTH), window="noise", end=0.9)
    changed = model_from_unet(network).with_units(prompt).with_patch(louder)
    hint = (ControlHint(net(), picture(1)),)
    inputs_of_run = {"positive": [[text(1), {"control": hint}]]}

    def unchanged() -> None:
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
        assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in network.modules()] == hooks
        with torch.no_grad():
            assert torch.equal(network(**inputs).sample, output)

    def interrupt(value: int, total: int, preview: Any = None) -> None:
        if value == 2:
            raise progress.Interrupted

    assert not torch.allclose(run(changed, **inputs_of_run), run(model_from_unet(network), **inputs_of_run))
    unchanged()
    with pytest.raises(progress.Interrupted), progress.listening(interrupt):
        run(changed, **inputs_of_run)
    unchanged()
    wrong = ControlHint(ms.ControlNet.from_unet(tiny.unet("sdxl")), picture(1))
    with pytest.raises(ms.MahlstickError, match="SDXL"):
        run(changed, positive=[[text(1), {"control": (*hint, wrong)}]])
    unchanged()


def test_units_know_the_halves_of_a_batch() -> None:
    network = unet()
    torch.manual_seed(1)
    ip = ms.IPAdapter.from_unet(network, tokens=2, feature_dim=tiny.WIDTH)
    features = noise(1, tiny.WIDTH)
    x = noise(1, 4, SIDE, SIDE)
    prompted = model_from_unet(network).with_units(ms.ImagePrompt(ip, features=features))
    found = estimates(prompted, x, SIGMA, positive=[[text(1), {}], [text(3), {}]], negative=[[text(2), {}]])
    sample = x / math.sqrt(SIGMA**2 + 1)
    with torch.no_grad(), ms.attach(network, ms.ImagePrompt(ip, features=features), guidance=True):
        output = network(sample.expand(2, -1, -1, -1), TIMESTEP, torch.cat([text(2), text(1)])).sample
    assert close(found["negative"], x - SIGMA * output[:1])
    with torch.no_grad(), ms.attach(network, ms.ImagePrompt(ip, features=features), guidance=True):
        other = network(sample.expand(2, -1, -1, -1), TIMESTEP, torch.cat([text(2), text(3)])).sample
    assert close(found["positive"], x - SIGMA * (output[1:] + other[1:]) / 2)


def test_the_embedded_model_draws_what_diffusers_draws() -> None:
    pipe = tiny.quiet(ms.load_pipeline("embedded", device="cpu"))
    embedded = model_from_pipeline(pipe)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    assert embedded.prediction == "v_prediction" and embedded.factor == 4
    positive, negative = pipe.encode_prompt("a red fox", "cpu", 1, True, "grey")
    start = prepare_noise(torch.zeros(1, 4, 16, 16), 3)
    highest = float(embedded.sigmas[-1])
    wanted = pipe(
        prompt_embeds=positive, negative_prompt_embeds=negative, guidance_scale=5.0, num_inference_steps=2,
        height=64, width=64, output_type="latent", latents=start * math.sqrt(1 + highest**2) / highest,
    ).images  # fmt: skip
    seen: list[Any] = []
    with progress.listening(lambda value, total, preview=None: seen.append((value, total, preview.size))):
        found = run(
            embedded, {"samples": torch.zeros(1, 4, 8, 8), "downscale_ratio_spacial": 8}, seed=3, steps=2, cfg=5.0,
            positive=[[positive, {}]], negative=[[negative, {}]],
        )  # fmt: skip
    assert relative(embedded.scaled(found), wanted) < 1e-4
    assert seen == [(step, 2, (16, 16)) for step in (1, 2)]


def test_the_nodes_have_comfyuis_inputs() -> None:
    info = sampling.KSampler.info
    assert info["input_order"]["required"] == [
        "model", "seed", "steps", "cfg", "sampler_name", "scheduler", "positive", "negative", "latent_image", "denoise",
    ]  # fmt: skip
    required = info["input"]["required"]
    assert required["seed"][1] | {"tooltip": ""} == {
        "default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True, "tooltip": "",
    }  # fmt: skip
    assert required["scheduler"][0][0] == "simple" and "uni_pc_bh2" in required["sampler_name"][0]
    advanced = control.ControlNetApplyAdvanced.info
    assert advanced["input_order"] == {
        "required": ["positive", "negative", "control_net", "image", "strength", "start_percent", "end_percent"],
        "optional": ["vae"],
    }
    assert sampling.SamplerCustom.info["output_name"] == ["output", "denoised_output"]
    with pytest.raises(ms.MahlstickError, match="sampler"):
        run(model(), sampler_name="eulr")
