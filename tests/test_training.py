"""Every task learns, stops, goes on with the same bits, and what it learned loads elsewhere."""

from __future__ import annotations

import copy
import errno
import json
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image, ImageDraw
from safetensors.torch import load_file

import mahlstick as ms
from benchmarks import tiny
from benchmarks.full_size import resident
from mahlstick.training.cache import FeatureCache
from mahlstick.training.checkpoint import Checkpoints, write_whole
from mahlstick.training.config import TrainConfig, from_flags
from mahlstick.training.data import read_dataset
from mahlstick.training.loop import Loop, new_accelerator
from mahlstick.training.objective import Objective, generator, strata
from mahlstick.training.run import train
from mahlstick.training.tasks import TASKS as TASKS_BY_NAME
from mahlstick.training.tasks import ControlNetTask, rest

TASKS = ["controlnet", "ip-adapter", "lora", "base", "vae", "clip", "captioner"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight shapes with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(8):
        picture = Image.new("RGB", (tiny.SIZE, tiny.SIZE), "white")
        left, top = (int(v) for v in rng.integers(4, 24, 2))
        colour = tuple(int(v) for v in rng.integers(0, 200, 3))
        ImageDraw.Draw(picture).ellipse((left, top, left + 30, top + 30), fill=colour)
        picture.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"shape {i}\na round thing\n")
    return folder


def pipe() -> Any:
    """A tiny base of one's own: training changes it."""
    return tiny.quiet(StableDiffusionPipeline(**copy.deepcopy(tiny.components("sd1"))))


def config(task: str, pictures: Path, out: Path, **fields: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "steps": 4, "batch": 2, "validate_every": 0, "checkpoint_every": 2, "warmup": 1, "rate": 1e-3, "held_out": 0.2,
        "resolution": tiny.SIZE, "log_every": 1, "cache": str(out.parent / f"cache-{task}"),
    }  # fmt: skip
    if task == "controlnet":
        defaults["annotator"] = "canny"
    return TrainConfig(task=task, data=str(pictures), out=str(out), **defaults | fields)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Everything learned that lies in a result's folder."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        inside = path.relative_to(folder)
        if inside.parts[0] not in ("checkpoints", "cache", "best"):
            found |= {f"{inside}:{name}": value for name, value in load_file(path).items()}
    assert found
    return found


def same(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("task", TASKS)
def test_a_run_in_two_parts_ends_with_the_same_bits(task: str, pictures: Path, tmp_path: Path) -> None:
    ema = {"ema": 0.9} if task in ("controlnet", "base") else {}
    whole = train(config(task, pictures, tmp_path / "whole", **ema), pipe())
    start = train(config(task, pictures, tmp_path / "start", steps=2, **ema), pipe())
    assert not same(whole, start)  # the steps after do something
    parts = train(config(task, pictures, tmp_path / "start", **ema), pipe())
    assert same(whole, parts)
    log = [json.loads(line) for line in (parts / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert all(np.isfinite(line["loss"]) for line in log)


@pytest.mark.parametrize("task", ["controlnet", "ip-adapter", "lora"])
def test_micro_batches_change_nothing_but_rounding(task: str, pictures: Path, tmp_path: Path) -> None:
    whole = weights(train(config(task, pictures, tmp_path / "whole", batch=4, steps=2), pipe()))
    parts = weights(train(config(task, pictures, tmp_path / "parts", batch=4, steps=2, micro_batch=1), pipe()))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=2e-4, rtol=1e-3)


def test_a_damaged_checkpoint_is_passed_over(pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = train(config("controlnet", pictures, tmp_path / "whole", steps=6), pipe())
    out = train(config("controlnet", pictures, tmp_path / "out"), pipe())
    last = out / "checkpoints" / "step-00000004" / "model.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    assert same(whole, train(config("controlnet", pictures, tmp_path / "out", steps=6), pipe()))
    assert "step-00000004: model.safetensors is damaged; going back" in caplog.text


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    checkpoints.write(1, lambda folder: (folder / "a").write_text("whole") and None)

    def overflow(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ms.MahlstickError, match=r"the disk is full, and the checkpoint of step 1 is whole"):
        checkpoints.write(2, overflow)
    assert checkpoints.newest() == 1 and [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        checkpoints.write(step, lambda folder: (folder / "a").write_text("x") and None)
    assert checkpoints.steps() == [3, 4]


@pytest.mark.parametrize("task", TASKS)
def test_checkpointed_gradients_are_the_same(task: str, pictures: Path, tmp_path: Path) -> None:
    plain = weights(train(config(task, pictures, tmp_path / "plain", steps=2), pipe()))
    again = weights(train(config(task, pictures, tmp_path / "again", steps=2, gradient_checkpointing=True), pipe()))
    assert all(torch.allclose(plain[name], again[name], atol=1e-6) for name in plain)


def test_a_base_learns_with_its_text_encoder(pictures: Path, tmp_path: Path) -> None:
    fields = {"train_text": True, "ema": 0.9, "held_out": 0.3}
    before = pipe()
    whole = train(config("base", pictures, tmp_path / "whole", **fields), pipe())
    train(config("base", pictures, tmp_path / "parts", steps=2, **fields), pipe())
    assert same(whole, train(config("base", pictures, tmp_path / "parts", **fields), pipe()))
    encoder = type(before.text_encoder).from_pretrained(whole / "text_encoder")
    ids = before.tokenizer("shape 1", return_tensors="pt").input_ids
    assert (encoder(ids)[0] - before.text_encoder(ids)[0]).abs().max() > 1e-3
    again = TASKS_BY_NAME["base"](config("base", pictures, tmp_path, start=str(whole), **fields), pipe())
    assert torch.equal(again.pipe.text_encoder(ids)[0], encoder(ids)[0])


def test_a_base_of_sdxl_uses_all_that_it_learns(pictures: Path, tmp_path: Path) -> None:
    """What gets no gradient would stop several processes."""
    parts = copy.deepcopy(tiny.components("sdxl"))
    task = TASKS_BY_NAME["base"](
        config("base", pictures, tmp_path, train_text=True), StableDiffusionXLPipeline(**parts)
    )
    task.to_learn(torch.device("cpu"), torch.float32)
    rows = [task.draw(row, torch.Generator().manual_seed(0)) for row in task.encode(read_dataset(pictures)[:2])]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]} | {"u": torch.tensor([0.3, 0.7])}
    task(batch).sum().backward()
    learned = {name for name, p in task.named_parameters() if p.requires_grad}
    assert learned == {name for name, p in task.named_parameters() if p.grad is not None}
    assert {name.split(".")[1] for name in learned if name.startswith("texts")} == {"text_encoder", "text_encoder_2"}


def test_a_base_and_its_text_encoder_stay_together(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "earlier" / "text_encoder").mkdir(parents=True)
    with pytest.raises(ms.MahlstickError, match="learned with its text encoder; add --train-text"):
        TASKS_BY_NAME["base"](config("base", pictures, tmp_path, start=str(tmp_path / "earlier")), pipe())


def test_a_decoder_learns_for_latents_that_stay(pictures: Path, tmp_path: Path) -> None:
    before = pipe().vae
    fields = {"decoder_only": True, "ema": 0.5}
    whole = train(config("vae", pictures, tmp_path / "whole", **fields), pipe())
    train(config("vae", pictures, tmp_path / "parts", steps=2, **fields), pipe())
    assert same(whole, train(config("vae", pictures, tmp_path / "parts", **fields), pipe()))
    after = AutoencoderKL.from_pretrained(whole)
    x = torch.rand(2, 3, tiny.SIZE, tiny.SIZE) * 2 - 1
    known = before.state_dict()
    for name, value in after.state_dict().items():
        assert torch.equal(value, known[name]) or not name.startswith(("encoder.", "quant_conv.")), name
    with torch.no_grad():
        z = before.encode(x).latent_dist.mean
        assert (before.decode(z).sample - after.decode(z).sample).abs().max() > 1e-3


def test_a_decoder_sees_latents_as_noisy_as_asked(pictures: Path, tmp_path: Path) -> None:
    """The noise's deviation is |N(0, τ²)|, with mean τ √(2/π), in the UNet's units."""
    base = pipe()
    factor = base.vae.config.scaling_factor

    def deviations(noise: float) -> torch.Tensor:
        fields = {"decoder_only": True, "latent_noise": noise}
        task = TASKS_BY_NAME["vae"](config("vae", pictures, tmp_path, **fields), base)
        lots = torch.Generator().manual_seed(0)
        return torch.stack([task.draw({}, lots)["deviation"] for _ in range(500)]) * factor

    assert deviations(0.0).abs().max() == 0
    assert deviations(0.3).min() >= 0
    assert deviations(0.3).mean() == pytest.approx(0.3 * (2 / torch.pi) ** 0.5, rel=0.1)

    task = TASKS_BY_NAME["vae"](config("vae", pictures, tmp_path, decoder_only=True), base)
    seen: list[torch.Tensor] = []
    task.vae.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.randint(256, (1, 3, tiny.SIZE, tiny.SIZE), dtype=torch.uint8)
    batch = {name: value[None] for name, value in task.draw({}, torch.Generator().manual_seed(0)).items()}
    for deviation in (0.0, 1.0, 2.0):
        task({**batch, "pixels": x, "deviation": torch.full((1, 1, 1, 1), deviation)})
    plain, one, two = seen
    assert (two - plain).norm() > 1.5 * (one - plain).norm() > 0


@pytest.mark.parametrize("task", ["controlnet", "ip-adapter", "lora"])
def test_a_run_goes_on_with_its_own_unet_alone(task: str, pictures: Path, tmp_path: Path) -> None:
    train(config(task, pictures, tmp_path / "out", steps=2), pipe())
    other = pipe()
    with torch.no_grad():
        other.unet.conv_out.bias += 0.1
    with pytest.raises(ms.MahlstickError, match="holds a run on another UNet than"):
        train(config(task, pictures, tmp_path / "out"), other)
    assert json.loads((train(config(task, pictures, tmp_path / "out"), pipe()) / "training.json").read_text())["unet"]


def test_a_base_that_predicts_something_else_draws_so(pictures: Path, tmp_path: Path) -> None:
    task = TASKS_BY_NAME["base"](config("base", pictures, tmp_path, prediction="v_prediction"), pipe())
    assert task.pipe.scheduler.config.prediction_type == "v_prediction"
    task.save(tmp_path / "out")
    assert (
        json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())["prediction_type"] == "v_prediction"
    )


def test_a_vae_from_scratch_learns_with_a_head_that_is_not_saved(pictures: Path, tmp_path: Path) -> None:
    fields = {"start": "scratch", "ema": 0.9}
    whole = train(config("vae", pictures, tmp_path / "whole", **fields), pipe())
    train(config("vae", pictures, tmp_path / "parts", steps=2, **fields), pipe())
    assert same(whole, train(config("vae", pictures, tmp_path / "parts", **fields), pipe()))
    assert type(pipe().vae).from_pretrained(whole) is not None
    assert not any("colours" in name for name in weights(whole))


@pytest.mark.parametrize(("task", "figure", "columns"), [("base", "held_out_loss", 2), ("vae", "psnr", 2)])
def test_samples_beside_the_true_pictures(task: str, figure: str, columns: int, pictures: Path, tmp_path: Path) -> None:
    out = train(config(task, pictures, tmp_path / "out", steps=1, validate_every=1, held_out=0.3), pipe())
    assert np.isfinite(json.loads((out / "log.jsonl").read_text().splitlines()[-1])[figure])
    with Image.open(out / "samples" / "step-00000001.png") as grid:
        assert grid.width == columns * tiny.SIZE


@pytest.mark.parametrize("optimiser", ["schedule-free", "muon"])
def test_another_optimiser_learns_and_goes_on(optimiser: str, pictures: Path, tmp_path: Path) -> None:
    if optimiser == "schedule-free":
        pytest.importorskip("schedulefree")
    fields = {"optimiser": optimiser, "validate_every": 2}
    whole = train(config("vae", pictures, tmp_path / "whole", **fields), pipe())
    train(config("vae", pictures, tmp_path / "parts", steps=2, **fields), pipe())
    assert same(whole, train(config("vae", pictures, tmp_path / "parts", **fields), pipe()))


@pytest.mark.parametrize("task", ["lora", "clip"])
def test_validating_changes_nothing(task: str, pictures: Path, tmp_path: Path) -> None:
    seen = config(task, pictures, tmp_path / "seen", precision="bf16", validate_every=1, held_out=0.3)
    unseen = config(task, pictures, tmp_path / "unseen", precision="bf16", held_out=0.3)
    assert same(train(seen, pipe()), train(unseen, pipe()))
    log = [json.loads(line) for line in (tmp_path / "seen" / "log.jsonl").read_text().splitlines()]
    losses = [line["held_out_loss"] for line in log if "held_out_loss" in line]
    assert len(losses) == 4 and len(set(losses)) > 1  # it depends on what was learned


def test_half_precision_on_a_cpu_keeps_off_the_kernel_that_is_slow_there(pictures: Path, tmp_path: Path) -> None:
    for precision, flash in (("fp32", True), ("bf16", False)):
        loop = loop_of(pictures, tmp_path / precision, precision=precision)
        with torch.profiler.profile() as seen:
            loop.gradients(loop.rows[0])
        assert flash == any("flash_attention" in event.key for event in seen.key_averages())


def test_a_lora_goes_on_from_another(pictures: Path, tmp_path: Path) -> None:
    first = train(config("lora", pictures, tmp_path / "first"), pipe())
    unmoved = train(config("lora", pictures, tmp_path / "unmoved", start=str(first), steps=1, rate=1e-12), pipe())
    one, other = weights(first), weights(unmoved)
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)
    with pytest.raises(ms.MahlstickError, match=r"^rank: .* has 8, not 4"):
        train(config("lora", pictures, tmp_path / "narrow", start=str(first), rank=4), pipe())


def test_clip_goes_on_from_another(pictures: Path, tmp_path: Path) -> None:
    first = train(config("clip", pictures, tmp_path / "first"), pipe())
    unmoved = train(config("clip", pictures, tmp_path / "unmoved", start=str(first), steps=1, rate=1e-12), pipe())
    one, other = weights(first), weights(unmoved)
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


def loop_of(pictures: Path, out: Path, **fields: Any) -> Loop:
    """A run that is ready to take its first step."""
    wanted = config("controlnet", pictures, out, **fields)
    examples = read_dataset(pictures)
    torch.manual_seed(0)
    task = ControlNetTask(wanted, pipe())
    cache = FeatureCache(wanted.cache_folder, task.settings())
    cache.fill(examples, task.encode)
    return Loop(new_accelerator(wanted), task, cache, examples, [])


def test_a_gradient_that_is_not_finite_changes_nothing_and_three_stop_the_run(pictures: Path, tmp_path: Path) -> None:
    loop = loop_of(pictures, tmp_path / "out", ema=0.9)
    before = {name: value.clone() for name, value in loop.task.state_dict().items()}
    batch = loop.rows[0]
    broken = batch | {"latents": batch["latents"] * float("nan")}
    loop.step(broken)
    loop.step(broken)
    assert all(torch.equal(value, before[name]) for name, value in loop.task.state_dict().items())
    assert (loop.progress.step, loop.progress.bad, loop.progress.skipped) == (2, 2, 2)
    loop.step(batch)
    assert loop.progress.bad == 0
    assert not all(torch.equal(value, before[name]) for name, value in loop.task.state_dict().items())
    loop.step(broken)
    loop.step(broken)
    with pytest.raises(ms.MahlstickError, match="3 steps in a row without a finite gradient; there is no checkpoint"):
        loop.step(broken)


def test_out_of_memory_halves_the_micro_batch(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loop = loop_of(pictures, tmp_path / "out", batch=4)
    calm = loop_of(pictures, tmp_path / "calm", batch=4, micro_batch=1)
    forward = loop.task.net.forward

    def greedy(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(sample) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(sample, *args, **kwargs)

    monkeypatch.setattr(loop.task.net, "forward", greedy)
    loop.step(loop.rows[0])
    calm.step(calm.rows[0])
    assert loop.micro == 1 and "from here on 1 pictures at once" in caplog.text
    ours, theirs = loop.task.state_dict(), calm.task.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


# --- what is learned from


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_at_rest_take_no_memory() -> None:
    module = torch.nn.Linear(4096, 4096).requires_grad_(False)
    x = torch.ones(1, 4096)
    before, whole = module(x), resident()
    rest(module)
    assert resident() < whole - 50 * 2**20  # of 64
    torch.testing.assert_close(module(x), before)  # where weights lie decides how sums are rounded


def test_targets_are_those_of_diffusers() -> None:
    torch.manual_seed(0)
    z, noise, u = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0.0, 0.5, 0.9999])
    for kind in ("epsilon", "v_prediction"):
        scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=kind)
        noised, t, target, weight = Objective(scheduler).noised(z, noise, u)
        assert t.tolist() == [0, 500, 999] and weight.tolist() == [1, 1, 1]
        torch.testing.assert_close(noised, scheduler.add_noise(z, noise, t))
        torch.testing.assert_close(target, noise if kind == "epsilon" else scheduler.get_velocity(z, noise, t))
    flow = Objective(FlowMatchEulerDiscreteScheduler())
    noised, t, target, _ = flow.noised(z, noise, u)
    torch.testing.assert_close(target, noise - z)
    torch.testing.assert_close(noised - (t / 1000).view(-1, 1, 1, 1) * target, z)  # one straight line from z to ε


def test_min_snr_weighs_both_predictions_alike() -> None:
    """ε and v errors differ by a factor √(SNR + 1)/√SNR, so weights for the same x₀ loss differ by (SNR + 1)/SNR."""
    z = torch.zeros(4, 4, 8, 8)
    u = torch.tensor([0.05, 0.3, 0.6, 0.95])
    found = {}
    for kind in ("epsilon", "v_prediction"):
        scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=kind)
        _, t, _, found[kind] = Objective(scheduler, min_snr=5.0).noised(z, z, u)
    a = scheduler.alphas_cumprod[t]
    snr = a / (1 - a)
    torch.testing.assert_close(found["epsilon"], snr.clamp(max=5) / snr)
    torch.testing.assert_close(found["v_prediction"] * (snr + 1), found["epsilon"] * snr)


def test_draws_depend_on_the_key_alone() -> None:
    first = torch.randn(4, generator=generator(1, 2, "row"))
    torch.manual_seed(9)
    assert torch.equal(first, torch.randn(4, generator=generator(1, 2, "row")))
    assert not torch.equal(first, torch.randn(4, generator=generator(1, 3, "row")))
    u = strata(0, 5, 8).sort().values
    torch.testing.assert_close(u.diff(), torch.full((7,), 1 / 8))


# --- what was learned loads elsewhere


def test_a_trained_controlnet_is_the_same_in_diffusers(pictures: Path, tmp_path: Path) -> None:
    out = train(config("controlnet", pictures, tmp_path / "out"), pipe())
    theirs, ours = ControlNetModel.from_pretrained(out), ms.ControlNet.from_pretrained(out)
    inputs = tiny.unet_inputs("sd1")
    image = torch.rand(2, 3, tiny.SIZE, tiny.SIZE)
    with torch.no_grad():
        down, mid = ours(**inputs, image=image)
        wanted, middle = theirs(**inputs, controlnet_cond=image, return_dict=False)
    for found, other in zip([*down, mid], [*wanted, middle], strict=True):
        assert found.abs().max() > 0
        torch.testing.assert_close(found, other, atol=1e-5, rtol=0)


def test_a_trained_ip_adapter_is_the_same_in_diffusers(pictures: Path, tmp_path: Path) -> None:
    out = train(config("ip-adapter", pictures, tmp_path / "out"), pipe())
    ours, theirs = pipe(), pipe()
    reference = Image.open(pictures / "0.png")
    call = {"prompt": "a fox", "num_inference_steps": 3, "output_type": "np", "height": tiny.SIZE, "width": tiny.SIZE}
    plain = ours(**call, generator=torch.Generator().manual_seed(0)).images
    with ms.attach(ours, ms.ImagePrompt(ms.IPAdapter.from_pretrained(out / "ip_adapter.safetensors"), reference)):
        found = ours(**call, generator=torch.Generator().manual_seed(0)).images
    theirs.load_ip_adapter(str(out), subfolder="", weight_name="ip_adapter.safetensors", image_encoder_folder=None)
    wanted = theirs(**call, ip_adapter_image=reference, generator=torch.Generator().manual_seed(0)).images
    assert np.abs(found - wanted).max() <= 1e-5 < np.abs(found - plain).max()


def test_a_trained_lora_loads_in_diffusers(pictures: Path, tmp_path: Path) -> None:
    out = train(config("lora", pictures, tmp_path / "out", steps=20, rate=0.05), pipe())
    theirs = pipe()
    inputs = tiny.unet_inputs("sd1")
    with torch.no_grad():
        plain = theirs.unet(**inputs).sample
        theirs.load_lora_weights(out)
        assert (theirs.unet(**inputs).sample - plain).abs().max() > 1e-3


# --- knowing, and saying what is wrong


def test_validation_writes_figures_and_a_grid(pictures: Path, tmp_path: Path) -> None:
    out = train(config("controlnet", pictures, tmp_path / "out", steps=2, validate_every=2, held_out=0.3), pipe())
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert 0 <= last["edge_f1"] <= 1 and np.isfinite(last["held_out_loss"])
    with Image.open(out / "samples" / "step-00000002.png") as grid:
        assert grid.width == 3 * tiny.SIZE
    card = (out / "README.md").read_text()
    assert "edge_f1" in card and "held_out_loss" in card and "`best/` holds the weights of step 2" in card
    assert same(out / "best", out)
    known = json.loads((out / "training.json").read_text())
    assert known["config"]["annotator"] == "canny" and "torch" in known["versions"]


@pytest.mark.parametrize("task", ["controlnet", "ip-adapter"])
def test_a_half_precision_base_is_validated_and_learned_on(task: str, pictures: Path, tmp_path: Path) -> None:
    """What is learned is float32 from the start: the validation's float32 UNet must not change it half way."""
    out = train(config(task, pictures, tmp_path / "out", validate_every=1), pipe().to(torch.bfloat16))
    assert {value.dtype for value in weights(out).values()} == {torch.float32}


def test_an_annotator_without_a_measure_trains_all_the_same(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = config("controlnet", pictures, tmp_path / "out", steps=2, validate_every=2, held_out=0.3)
    out = train(wanted.model_copy(update={"annotator": "shuffle", "cache": None}), pipe())
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert last["score"] == -last["held_out_loss"]
    assert "step 2: no samples (annotator 'shuffle' has no measure" in caplog.text


def test_a_kill_between_checkpoint_and_validation_has_it_made_again(pictures: Path, tmp_path: Path) -> None:
    wanted = config("vae", pictures, tmp_path / "out", steps=2, validate_every=2, held_out=0.3)
    out = train(wanted, pipe())
    log = (out / "log.jsonl").read_text()
    assert json.loads(log.splitlines()[-1])["step"] == 2 and "held_out_loss" in log.splitlines()[-1]
    (out / "log.jsonl").write_text("".join(f"{line}\n" for line in log.splitlines()[:-1]))
    shutil.rmtree(out / "best")
    train(wanted, pipe())
    assert (out / "log.jsonl").read_text() == log and (out / "best").is_dir()
    train(wanted, pipe())  # and not once more
    assert (out / "log.jsonl").read_text() == log


@pytest.mark.parametrize("last", [2, 3], ids=["between lines of the log", "at a line of the log"])
def test_ctrl_c_finishes_the_step_and_keeps_it(
    last: int, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, Any] = {"steps": 4, "checkpoint_every": 100, "log_every": 3, "ema": 0.9}
    whole = train(config("controlnet", pictures, tmp_path / "whole", **fields), pipe())
    took = iter(range(1, 5))
    with monkeypatch.context() as patch:
        patch.setattr(ControlNetTask, "stepped", lambda _: next(took) == last and signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train(config("controlnet", pictures, tmp_path / "parts", **fields), pipe())
    assert Checkpoints(tmp_path / "parts" / "checkpoints", 2).newest() == last
    parts = train(config("controlnet", pictures, tmp_path / "parts", **fields), pipe())
    assert same(whole, parts)
    losses = [
        [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()] for out in (whole, parts)
    ]
    assert losses[0] == losses[1]


def test_a_text_is_written_whole_though_two_write_it(tmp_path: Path) -> None:
    path, texts = tmp_path / "state.json", ["a" * 100_000, "b" * 100_000]
    with ThreadPoolExecutor(4) as threads:
        for found in [threads.submit(write_whole, path, texts[i % 2]) for i in range(40)]:
            found.result()
    assert path.read_text() in texts and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(
    ("task", "fields", "complaint"),
    [
        ("clip", {"start": "nowhere"}, "start"),
        ("base", {"start": "nowhere"}, "start"),
        ("controlnet", {"resolution": tiny.SIZE + 4}, "resolution"),
        ("vae", {"resolution": tiny.SIZE + 1}, "resolution"),
        ("lora", {"prediction": "v_prediction"}, "prediction"),
    ],
)
def test_settings_that_do_not_go_with_the_base_are_refused(
    task: str, fields: dict[str, Any], complaint: str, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(ms.MahlstickError, match=f"^{complaint}: "):
        train(config(task, pictures, tmp_path / "out", **fields), pipe())
    assert not (tmp_path / "out").exists()


def test_a_base_taught_another_prediction_comes_with_its_scheduler(pictures: Path, tmp_path: Path) -> None:
    out = train(config("base", pictures, tmp_path / "out", steps=1, prediction="v_prediction"), pipe())
    assert DDPMScheduler.from_pretrained(out / "scheduler").config.prediction_type == "v_prediction"


def test_an_unreadable_picture_is_skipped_and_counted(pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    (folder / "9.png").symlink_to(tmp_path / "missing.png")
    (folder / "9.txt").write_text("gone")
    (folder / "8.png").write_bytes(b"no picture")
    (folder / "8.txt").write_text("broken")
    for _ in range(2):  # the second run goes on with the same data
        out = train(config("vae", folder, tmp_path / "out", steps=1), pipe())
    assert "2 could not be read" in (out / "README.md").read_text()


def test_another_config_or_other_data_is_refused(pictures: Path, tmp_path: Path) -> None:
    train(config("lora", pictures, tmp_path / "out", steps=1), pipe())
    older = json.loads((tmp_path / "out" / "training.json").read_text())
    del older["config"]["depth"]  # a field that the version of the run did not know
    (tmp_path / "out" / "training.json").write_text(json.dumps(older))
    train(config("lora", pictures, tmp_path / "out", steps=1), pipe())
    with pytest.raises(ms.MahlstickError, match=r"holds a run with rate = 0\.001, not 0\.01"):
        train(config("lora", pictures, tmp_path / "out", steps=2, rate=0.01), pipe())
    other = tmp_path / "other"
    other.mkdir()
    for i in range(3):
        tiny.picture(i).save(other / f"{i}.png")
    fields = json.loads(config("lora", pictures, tmp_path / "out", steps=2).to_json())
    with pytest.raises(ms.MahlstickError, match="holds a run on other data than"):
        train(TrainConfig(**fields | {"data": str(other)}), pipe())


def test_what_is_repeated_is_learned_from_more_often(tmp_path: Path) -> None:
    """A run on two pictures one of which counts a thousand times is all but that on the one alone."""

    def learned(name: str, *rows: dict[str, Any]) -> dict[str, Any]:
        folder = tmp_path / name
        folder.mkdir()
        for i in range(len(rows)):
            tiny.picture(i).save(folder / f"{i}.png")
        table = [json.dumps({"file_name": f"{i}.png", "text": "a", **row}) for i, row in enumerate(rows)]
        (folder / "metadata.jsonl").write_text("\n".join(table))
        return weights(train(config("vae", folder, tmp_path / f"{name}-out", steps=2, held_out=0), pipe()))

    alone, often, even = learned("alone", {}), learned("often", {"repeats": 1000}, {}), learned("even", {}, {})
    assert all(torch.equal(alone[name], often[name]) for name in alone)
    assert not all(torch.equal(alone[name], even[name]) for name in alone)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("", "say what is learned"),
        ("contronet", "invalid choice: 'contronet'"),
        ("lora --out o", "data: is missing"),
        ("lora --data d --out o --steps many", "steps: should be a valid integer"),
        ("lora --data d --out o --batch 4 --micro-batch 3", "3 does not divide 4"),
        ("lora --data d --out o --ema 1", "ema: should be less than 1"),
        ("lora --data d --out o --annotator-options low", "give NAME=VALUE"),
        ("lora --data d --out o --start scratch", "a lora starts fresh by itself"),
        ("vae --data d --out o --start scratch --decoder-only", "decoder_only is for a vae that is not from scratch"),
        ("vae --data d --out o --latent-noise 0.2", "latent_noise is for a vae with decoder_only"),
        ("clip --data d --out o --train-text", "train_text is for a base or a LoRA; a clip learns without"),
        ("lora --config none.toml", "none.toml: cannot be read"),
    ],
)
def test_bad_flags_are_one_sentence(words: str, complaint: str) -> None:
    with pytest.raises(ms.MahlstickError) as caught:
        from_flags(words.split())
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["run.toml", "run.yaml"])
def test_a_file_says_the_same_as_flags(name: str, tmp_path: Path) -> None:
    equals = " = " if name.endswith("toml") else ": "
    lines = ['task@"controlnet"', 'data@"d"', 'out@"o"', 'annotator@"canny"', "steps@7", "min_snr@5.0"]
    (tmp_path / name).write_text("\n".join(lines).replace("@", equals))
    flags = "controlnet --data d --out o --annotator canny --steps 9 --min-snr 5"
    assert from_flags(["--config", str(tmp_path / name), "--steps", "9"]) == from_flags(flags.split())
