"""The training stages of the embedded model, each a loss over batches, all through one small loop.

``vae`` and ``clip`` need only the pictures; ``base`` needs both; ``controlnet`` and ``ip-adapter`` need the base.
A stage is bounded by minutes or by steps, writes a checkpoint every two minutes, and goes on from it when run again.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from mahlstick.training.embedded import data, models

log = logging.getLogger(__name__)

MOVED = 0.5  # share of a base's batch that is warped: without, the UNet knows its pictures by heart and draws no other
CONTROL_CAPTIONS = (0.4, 0.25, 0.15)  # shares when a ControlNet is trained: empty, unknown words, another thing's name
COPIES = 12  # warped copies of each picture
# Shares of empty captions and of unknown words when the base is trained. Empty ones are for classifier-free guidance;
# most of those of warped pictures are one or the other, since a thing's name stands for its picture as it is.
STILL_CAPTIONS, MOVED_CAPTIONS = (0.12, 0.1), (0.2, 0.5)
MIN_SNR = 5.0  # γ of 2303.09556
LESSON = 0.03  # weight of Reading's loss
FLOOR = 0.5  # added to it: see Noise.loss


@dataclass
class Run:
    """How a stage is run. ``minutes`` and ``steps`` both bound it; the one nearer its end sets the learning rate."""

    cache: Path
    minutes: float = 10.0
    steps: int | None = None
    batch: int = 16
    lr: float = 6e-4
    ema: float = 0.998
    size: str = "full"
    seed: int = data.SEED
    device: str = "cpu"
    save_every: float = 120.0
    fresh: bool = False
    steps_done: int = field(default=0, init=False)


# ---- the loop


def has_bf16(device: str) -> bool:
    """Whether the hardware multiplies in bf16 (CUDA, AVX512-BF16): elsewhere it is ten times slower than float32."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return device.startswith("cuda") or bool(supported())


def autocast(device: str) -> AbstractContextManager[Any]:
    """bf16 where the hardware has it, else full precision."""
    return torch.autocast(device.split(":")[0], torch.bfloat16) if has_bf16(device) else nullcontext()


def memory_format(device: str) -> torch.memory_format:
    """Channels last for bf16; in float32 oneDNN's own blocked layout is faster."""
    return torch.channels_last if has_bf16(device) else torch.contiguous_format


def rate(progress: float, step: int, warmup: int = 50) -> float:
    """The learning rate's factor: linear warm-up, then constant, then linear to zero over the second half."""
    return min(1.0, (step + 1) / warmup) * min(1.0, max(0.02, 2 * (1 - progress)))


def decay(step: int, ema: float) -> float:
    """The moving average's decay at a step: short at first, so that the random start is soon forgotten."""
    return min(ema, (1 + step) / (10 + step))


def parameters_of(modules: dict[str, nn.Module]) -> list[nn.Parameter]:
    """Every parameter that asks for a gradient, in a fixed order."""
    return [p for m in modules.values() for p in m.parameters() if p.requires_grad]


def train(
    name: str,
    modules: dict[str, nn.Module],
    loss_of: Callable[[random.Random], Tensor],
    run: Run,
    preview: Callable[[dict[str, nn.Module]], None] | None = None,
) -> dict[str, nn.Module]:
    """Minimise ``loss_of(rng)`` over the modules' parameters and return the modules with their averaged weights.

    The checkpoint holds weights, average, optimiser, random state and time spent, so a stage that was stopped goes on,
    and a finished one returns at once; a longer ``minutes`` extends it.
    """
    path = run.cache / f"{name}.pt"
    modules = {k: m.to(run.device).to(memory_format=memory_format(run.device)).train() for k, m in modules.items()}
    weights = parameters_of(modules)
    decayed, plain = [p for p in weights if p.ndim > 1], [p for p in weights if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 1e-2}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=run.lr, betas=(0.9, 0.98), fused=True)
    average = [p.detach().clone() for p in weights]
    rng, step, spent, mean = random.Random(run.seed), 0, 0.0, 0.0
    torch.manual_seed(run.seed)
    if path.exists() and not run.fresh:
        state = torch.load(path, weights_only=True)
        with torch.no_grad():
            for p, w, a, b in zip(weights, state["weights"], average, state["average"], strict=True):
                p.copy_(w)
                a.copy_(b)
        optimiser.load_state_dict(state["optimiser"])
        step, spent, mean = state["step"], state["spent"], state["loss"]
        rng.seed(run.seed + step)
        torch.manual_seed(run.seed + step)
        log.info("%s goes on from step %d, %.1f minutes in", name, step, spent / 60)

    def progress() -> float:
        return max(spent / 60 / run.minutes, step / run.steps if run.steps else 0.0)

    def save() -> None:
        state = {"weights": [p.detach() for p in weights], "average": average, "optimiser": optimiser.state_dict()}
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state | {"step": step, "spent": spent, "loss": mean}, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def averaged() -> dict[str, nn.Module]:
        twins = copy.deepcopy(modules)
        with torch.no_grad():
            for p, a in zip(parameters_of(twins), average, strict=True):
                p.copy_(a)
        return {k: m.eval() for k, m in twins.items()}

    clock = saved = shown = time.monotonic()
    rank = int(os.environ.get("RANK", "0"))
    if rank:  # the helpers of a distributed run draw other batches, and leave writing to the first process
        rng.seed(run.seed + step + rank)
        torch.manual_seed(run.seed + step + rank)
    bar = tqdm(
        disable=rank > 0,
        total=1000,
        desc=name,
        initial=min(1000, int(1000 * progress())),
        bar_format="{desc} {percentage:3.0f}% {elapsed} {postfix}",
    )
    while progress() < 1:
        for group in optimiser.param_groups:
            group["lr"] = run.lr * rate(progress(), step)
        with autocast(run.device):
            loss = loss_of(rng)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        spent = share(weights, spent)
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        torch._foreach_lerp_(average, [p.detach() for p in weights], 1 - decay(step, run.ema))
        step += 1
        mean += (loss.detach().item() - mean) * max(0.01, 1 / step)
        now = time.monotonic()
        spent, clock = spent + now - clock, now
        bar.n = min(1000, int(1000 * progress()))
        bar.set_postfix_str(f"step {step} loss {mean:.4f} {step * run.batch / spent:.1f}/s", refresh=step % 10 == 0)
        if now - saved > run.save_every and not rank:
            save()
            if preview and now - shown > 5 * run.save_every:
                preview(averaged())
                shown = time.monotonic()
            saved = clock = time.monotonic()
    bar.close()
    if rank:
        raise SystemExit(0)
    if step > 0 and (not path.exists() or step != torch.load(path, weights_only=True, mmap=True)["step"]):
        save()
    run.steps_done = step
    done = averaged()
    if preview and step:
        preview(done)
    note(
        run.cache,
        name,
        {
            "steps": step,
            "minutes": round(spent / 60, 1),
            "batch": run.batch * int(os.environ.get("WORLD_SIZE", "1")),
            "lr": run.lr,
            "loss": round(mean, 4),
            "seed": run.seed,
        },
    )
    return done


def share(weights: list[nn.Parameter], spent: float) -> float:
    """Average the gradients, and the time spent, over the processes of a run under ``torchrun``; else do nothing.

    On processors that other work competes for, one thread in each of several processes is faster than several threads
    in one: there is one wait a step instead of one in every operation.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return spent
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    flat = torch.cat([p.grad.flatten() for p in weights if p.grad is not None] + [torch.tensor([spent])])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    at = 0
    for p in weights:
        if p.grad is not None:
            p.grad.copy_(flat[at : at + p.numel()].view_as(p.grad))
            at += p.numel()
    return float(flat[-1])


def note(cache: Path, stage: str, facts: dict[str, Any]) -> None:
    """Keep what a stage did in ``training.json``, for the model card."""
    path = cache / "training.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known[stage] = facts
    path.write_text(json.dumps(known, indent=1))


def sheet(rows: Iterable[Tensor], path: Path) -> None:
    """Rows of pictures (N, 3, 64, 64) in [−1, 1] as one PNG grid."""
    from PIL import Image

    grid = torch.stack([torch.cat(list(row.clamp(-1, 1)), dim=-1) for row in rows])  # (R, 3, 64, N·64)
    picture = torch.cat(list(grid), dim=-2)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(data.to_uint8(picture.float().cpu())).save(path)


def some(indices: Tensor, count: int, rng: random.Random) -> Tensor:
    """``count`` of the indices, drawn with replacement."""
    return indices[torch.tensor([rng.randrange(len(indices)) for _ in range(count)])]


# ---- VAE


def vae_pictures(pictures: data.Pictures, count: int, rng: random.Random) -> Tensor:
    """A batch for the VAE: half 3D, half any style, one in eight recoloured, shifted; (B, 3, 64, 64) in [−1, 1]."""
    half = count // 2
    index = torch.cat([some(pictures.of("3d"), count - half, rng), some(pictures.training(), half, rng)])
    rgba = pictures.rgba[index]
    for i in range(count):
        if rng.random() < 0.125:
            rgba[i : i + 1] = data.recolour(rgba[i : i + 1], rng.choice(list(data.COLOURS)))
        shift = rng.randint(-4, 4), rng.randint(-4, 4)
        rgba[i] = rgba[i].roll(shift, (1, 2))
    x = data.on_white(rgba)
    return x.flip(-1) if rng.random() < 0.5 else x


def vae_loss(vae: AutoencoderKL, colours: nn.Module, x: Tensor, kl_weight: float = 1e-4) -> Tensor:
    """L1 + L1 of the picture's gradients (sharp lines) + colour, of latents and result; x (B, 3, 64, 64).

    ``colours`` reads each 4 × 4 block's mean colour off its latent, linearly. Without it the four channels go to light
    and detail first, and greens and pinks stay grey for a long time.
    """
    posterior = vae.encode(x).latent_dist
    y = vae.decode(posterior.sample()).sample
    blocks = F.avg_pool2d(x, 4)
    gradient = F.l1_loss(y.diff(dim=-1), x.diff(dim=-1)) + F.l1_loss(y.diff(dim=-2), x.diff(dim=-2))
    colour = 2 * F.l1_loss(colours(posterior.mean), blocks) + F.l1_loss(F.avg_pool2d(y, 4), blocks)
    return F.l1_loss(y, x) + gradient + colour + kl_weight * posterior.kl().mean() / posterior.mean[0].numel()


def train_vae(pictures: data.Pictures, run: Run) -> AutoencoderKL:
    """Train the VAE, standardise its latents, and write it to ``cache/vae``."""
    vae, colours = models.make_vae(run.size), nn.Conv2d(4, 3, 1)
    watched = data.on_white(pictures.rgba[pictures.of("3d", held_out=True)[:12]])

    def preview(nets: dict[str, nn.Module]) -> None:
        y = reconstruct(nets["vae"], watched)
        psnr = -10 * (((y - watched) / 2) ** 2).mean().log10()
        tqdm.write(f"vae: {psnr:.1f} dB on held-out pictures")
        sheet([watched, y], run.cache / "sheets" / "vae.png")

    def loss_of(rng: random.Random) -> Tensor:
        x = vae_pictures(pictures, run.batch, rng).to(run.device)
        return vae_loss(vae, colours, x.contiguous(memory_format=memory_format(run.device)))

    best: AutoencoderKL = train("vae", {"vae": vae, "colours": colours}, loss_of, run, preview)["vae"].cpu()
    with torch.no_grad():
        x = data.on_white(pictures.rgba[pictures.of("3d")])
        models.standardise(best, torch.cat([best.encode(b).latent_dist.mean for b in x.split(32)]))
    best.save_pretrained(run.cache / "vae")
    return best


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """Through the VAE and back: (B, 3, 64, 64) → the same."""
    device = next(vae.parameters()).device
    return vae.decode(vae.encode(x.to(device)).latent_dist.mean).sample.cpu()


# ---- CLIP


def tokenizer_of(pictures: data.Pictures, run: Run) -> CLIPTokenizer:
    """The tokenizer of this cache, made from the training captions the first time."""
    folder = run.cache / "tokenizer"
    if not (folder / "vocab.json").exists():
        return models.make_tokenizer(data.corpus(pictures), folder)
    return models.load_tokenizer(folder)


def clip_loss(image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE with a learned temperature (2103.00020); embeddings (B, width) each."""
    logits = log_scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def train_clip(pictures: data.Pictures, run: Run) -> tuple[CLIPTextModel, CLIPVisionModelWithProjection]:
    """Train the two towers on all styles, one picture a concept in each batch; write them to ``cache/clip-*``."""
    tokenizer = tokenizer_of(pictures, run)
    text, image = models.make_text(tokenizer, run.size), models.make_image(run.size)
    temperature = nn.Module()
    temperature.log_scale = nn.Parameter(torch.tensor(2.66))
    by_concept: dict[int, list[int]] = {}
    for i in pictures.training().tolist():
        by_concept.setdefault(int(pictures.concept[i]), []).append(i)
    known = sorted(by_concept)

    def loss_of(rng: random.Random) -> Tensor:
        chosen = rng.sample(known, min(run.batch, len(known)))
        rgba, words = [], []
        for c in chosen:
            one = data.warp(pictures.rgba[rng.choice(by_concept[c])], rng)
            colour = rng.choice(list(data.COLOURS)) if rng.random() < 0.25 else None
            rgba.append(data.recolour(one[None], colour)[0] if colour else one)
            words.append(data.caption(pictures.concepts[c], rng, colour))
        x = data.on_white(torch.stack(rgba)).to(run.device)
        ids = models.encode(tokenizer, words).to(run.device)
        return clip_loss(
            image(pixel_values=x).image_embeds,
            text(ids).pooler_output,
            cast(Tensor, temperature.log_scale).clamp(max=4.6),
        )

    nets = train("clip", {"text": text, "image": image, "temperature": temperature}, loss_of, run)
    nets["text"].cpu().save_pretrained(run.cache / "clip-text")  # type: ignore[operator]
    nets["image"].cpu().save_pretrained(run.cache / "clip-image")  # type: ignore[operator]
    return nets["text"], nets["image"]


# ---- base


@dataclass
class Latents:
    """Encoded pictures: ``z`` (N, 4, 16, 16), each one's concept, weight, and the colour it was given (or None).

    The first ``plain`` of them have their own colours.
    """

    z: Tensor
    concept: list[int]
    colour: list[str | None]
    weight: list[float]
    plain: int

    def draw(self, count: int, rng: random.Random, tinted: float = 0.15) -> list[int]:
        """Indices of a batch by weight, a share of them recoloured pictures."""
        drawn = rng.choices(range(self.plain), self.weight[: self.plain], k=count)
        copies = len(self.concept) // self.plain - 1
        return [i + self.plain * rng.randint(1, copies) if rng.random() < tinted else i for i in drawn]


def kept(run: Run, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``make`` returns, from ``cache/name`` when that is newer than the VAE: encoding takes a minute."""
    path, vae = run.cache / name, run.cache / "vae" / "config.json"
    if not path.exists() or path.stat().st_mtime < vae.stat().st_mtime:
        torch.save(make(), path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
    return dict(torch.load(path, weights_only=True))


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """(N, 3, 64, 64) in [−1, 1] → latents (N, 4, 16, 16): the posterior's mean."""
    return torch.cat([vae.encode(b).latent_dist.mean for b in x.split(64)])


def base_latents(pictures: data.Pictures, vae: AutoencoderKL) -> Latents:
    """Latents of the 3D pictures: as they are, and in each colour."""
    index = pictures.of("3d")
    rgba = pictures.rgba[index]
    parts = [data.on_white(rgba), *(data.on_white(data.recolour(rgba, c)) for c in data.COLOURS)]
    concept = pictures.concept[index].tolist() * len(parts)
    return Latents(
        z=encode_pictures(vae, torch.cat(parts)),
        concept=concept,
        colour=[c for c in (None, *data.COLOURS) for _ in index],
        weight=[pictures.concepts[c].weight for c in concept],
        plain=len(index),
    )


class Noise:
    """The forward process of DDPM: noise schedule ᾱ, v-targets and min-SNR weights."""

    def __init__(self, device: str) -> None:
        self.alphas: Tensor = models.make_scheduler().alphas_cumprod.to(device)

    def times(self, count: int, share: float = 1.0) -> Tensor:
        """Timesteps (B,), one from each of B equal slices: the same as uniform, with less variance."""
        u = (torch.randperm(count) + torch.rand(count)) / count
        return (1000 * (1 - (1 - u) * share)).long().clamp(0, 999).to(self.alphas.device)

    def add(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Noised latents z_t = √ᾱ z + √(1−ᾱ) ε and the target v = √ᾱ ε − √(1−ᾱ) z, both (B, 4, h, w)."""
        a = self.alphas[t].view(-1, 1, 1, 1)
        eps = torch.randn_like(z)
        noised, v = a.sqrt() * z + (1 - a).sqrt() * eps, a.sqrt() * eps - (1 - a).sqrt() * z
        layout = memory_format(str(z.device))
        return noised.contiguous(memory_format=layout), v.contiguous(memory_format=layout)

    def loss(self, prediction: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """Squared error of v, weighted by (min(SNR, γ) + ½)/(SNR + 1).

        Min-SNR with a floor: without the ½ the noisiest steps, in which the words decide what is drawn, hardly count.
        """
        snr = self.alphas[t] / (1 - self.alphas[t])
        weight = (snr.clamp(max=MIN_SNR) + FLOOR) / (snr + 1)
        return (weight * (prediction.float() - v).square().mean((1, 2, 3))).mean()


SAMPLES = (
    "red apple",
    "penguin",
    "cactus",
    "hamburger",
    "red penguin",
    "dog",
    "butterfly",
    "rocket",
    "blue cat",
    "house",
    "pizza",
    "fox",
)


@torch.no_grad()
def sample(
    unet: nn.Module,
    text: CLIPTextModel,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    prompts: list[str],
    steps: int = 20,
    seed: int = 0,
) -> Tensor:
    """A quick look without a pipeline: DPM-Solver++ at guidance 4; → (N, 3, 64, 64)."""
    from diffusers import DPMSolverMultistepScheduler

    device = next(unet.parameters()).device
    scheduler = DPMSolverMultistepScheduler.from_config(models.make_scheduler().config)
    scheduler.set_timesteps(steps)
    context = text(models.encode(tokenizer, [*prompts, *[""] * len(prompts)]).to(device)).last_hidden_state
    z = torch.randn(len(prompts), 4, 16, 16, generator=torch.Generator().manual_seed(seed)).to(device)
    for t in scheduler.timesteps:
        conditional, free = unet(torch.cat([z, z]), t.to(device), context).sample.chunk(2)
        z = scheduler.step(free + 4 * (conditional - free), t, z).prev_sample
    return vae.to(device).decode(z).sample.cpu()


def train_layout(pictures: data.Pictures, run: Run) -> None:
    """Teach the text encoder where things are, before any UNet is there: write ``cache/text-layout``.

    A UNet without positions takes long to turn one vector into a picture. So the last 16 of the 32 tokens learn to
    say what the 4 × 4 blocks of the picture look like: token 16 + k → (linear) → the k-th block's latents (4, 4, 4).
    The text encoder alone is twenty times cheaper than a step of the base, whose attention then finds the layout
    ready to read.
    """
    tokenizer = tokenizer_of(pictures, run)
    vae = AutoencoderKL.from_pretrained(run.cache / "vae").eval()
    known = run.cache / "text"
    text = CLIPTextModel.from_pretrained(known if known.exists() else run.cache / "clip-text")
    head = nn.Linear(int(text.config.hidden_size), 64)
    latents = Latents(**kept(run, "latents.pt", lambda: vars(base_latents(pictures, vae))))
    # (N, 4, 16, 16) → (N, 16 blocks, 4 · 4 · 4)
    blocks = latents.z.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2).to(run.device)

    def loss_of(rng: random.Random) -> Tensor:
        index = latents.draw(run.batch, rng)
        words = [data.caption(pictures.concepts[latents.concept[i]], rng, latents.colour[i]) for i in index]
        hidden = text(models.encode(tokenizer, words).to(run.device)).last_hidden_state
        return F.mse_loss(head(hidden[:, -16:]), blocks[index])

    nets = train("text-layout", {"text": text, "head": head}, loss_of, run)
    nets["text"].cpu().save_pretrained(run.cache / "text-layout")  # type: ignore[operator]


class Reading:
    """Attention lessons: half of the heads at each place look at the token that describes that block of the picture.

    Follows the UNet's cross-attention layers through hooks; ``loss()`` is the cross-entropy of their attention, over
    all layers of the last forward pass, against the layout tokens of ``train_layout``.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.losses: list[Tensor] = []
        for name, module in unet.named_modules():
            if name.endswith("attn2"):
                module.register_forward_pre_hook(self.read, with_kwargs=True)

    def read(self, attention: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        """x (B, n², channels) and the context (B, 32, width) of one layer → its cross-entropy."""
        x, context = args[0], kwargs["encoder_hidden_states"]
        heads, taught, side = attention.heads, max(1, attention.heads // 2), int(x.shape[1] ** 0.5)
        q = attention.to_q(x).unflatten(-1, (heads, -1))[:, :, :taught]
        k = attention.to_k(context).unflatten(-1, (heads, -1))[:, :, :taught]
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * attention.scale
        at = torch.arange(side, device=x.device) * 4 // side
        token = models.TOKENS - 16 + (at[:, None] * 4 + at).flatten()
        self.losses.append(F.cross_entropy(logits.flatten(0, 2), token.repeat(len(x) * taught)))

    def loss(self) -> Tensor:
        """The mean over the layers read since the last call."""
        total = torch.stack(self.losses).mean()
        self.losses.clear()
        return total


def unknown_words(tokenizer: CLIPTokenizer, pictures: data.Pictures) -> data.UnknownWords:
    """Unknown words of the tokenizer's short pieces."""
    pieces = (token for token in tokenizer.get_vocab() if re.fullmatch("[a-z]{2,6}", token))
    return data.UnknownWords(pieces, pictures.concepts)


def train_base(pictures: data.Pictures, run: Run) -> None:
    """Train the UNet on the latents of the 3D pictures, the text encoder frozen: ``cache/unet`` and ``cache/text``."""
    tokenizer = tokenizer_of(pictures, run)
    vae = AutoencoderKL.from_pretrained(run.cache / "vae").eval()
    text = CLIPTextModel.from_pretrained(run.cache / "text-layout").requires_grad_(False)
    unet, noise = models.make_unet(run.size), Noise(run.device)
    reading = Reading(unet)
    latents = Latents(**kept(run, "latents.pt", lambda: vars(base_latents(pictures, vae))))
    drawn = Drawings(**kept(run, "drawings.pt", lambda: vars(drawings(pictures, vae, COPIES, run.seed))))

    strange = unknown_words(tokenizer, pictures)

    def words(of: Latents | Drawings, i: int, empty: float, unknown: float, rng: random.Random) -> str:
        concept, colour, lot = pictures.concepts[of.concept[i]], of.colour[i], rng.random()
        if lot < empty:
            return ""
        if lot < empty + unknown:
            return strange.draw(rng, colour or concept.colour)
        return data.caption(concept, rng, colour)

    def loss_of(rng: random.Random) -> Tensor:
        moved = [rng.randrange(len(drawn.concept)) for _ in range(int(run.batch * MOVED))]
        index = latents.draw(run.batch - len(moved), rng)
        prompts = [words(latents, i, *STILL_CAPTIONS, rng) for i in index]
        prompts += [words(drawn, i, *MOVED_CAPTIONS, rng) for i in moved]
        t = noise.times(run.batch)
        noised, v = noise.add(torch.cat([latents.z[index], drawn.z[moved]]).to(run.device), t)
        context = text(models.encode(tokenizer, prompts).to(run.device)).last_hidden_state
        return noise.loss(unet(noised, t, context).sample, v, t) + LESSON * reading.loss()

    def preview(nets: dict[str, nn.Module]) -> None:
        for module in nets["unet"].modules():
            module._forward_pre_hooks.clear()
        x = sample(nets["unet"], nets["text"], vae, tokenizer, list(SAMPLES))
        sheet([x], run.cache / "sheets" / "base.png")
        nets["unet"].save_pretrained(run.cache / "unet")  # type: ignore[operator]
        nets["text"].save_pretrained(run.cache / "text")  # type: ignore[operator]

    train("base", {"unet": unet, "text": text}, loss_of, run, preview)


def load_base(run: Run) -> tuple[UNet2DConditionModel, CLIPTextModel, AutoencoderKL]:
    """The base's averaged weights, frozen."""
    unet = UNet2DConditionModel.from_pretrained(run.cache / "unet")
    text = CLIPTextModel.from_pretrained(run.cache / "text")
    vae = AutoencoderKL.from_pretrained(run.cache / "vae")
    for net in (unet, text, vae):
        net.to(run.device).eval().requires_grad_(False)
    return unet, text, vae


# ---- ControlNet


@dataclass
class Drawings:
    """Warped pictures with their latents: what a ControlNet learns from, and what nobody has seen before."""

    rgba: Tensor
    z: Tensor
    concept: list[int]
    colour: list[str | None]


def drawings(pictures: data.Pictures, vae: AutoencoderKL, copies: int, seed: int) -> Drawings:
    """``copies`` of each 3D picture, warped and mirrored at random, one in four recoloured."""
    rng = random.Random(seed)
    rgba, concept, colours = [], [], []
    for i in pictures.of("3d").tolist():
        for _ in range(copies):
            one = data.warp(pictures.rgba[i], rng) if rng.random() < 0.8 else pictures.rgba[i]
            colour = rng.choice(list(data.COLOURS)) if rng.random() < 0.25 else None
            rgba.append(data.recolour(one[None], colour)[0] if colour else one)
            concept.append(int(pictures.concept[i]))
            colours.append(colour)
    stacked = torch.stack(rgba)
    z = torch.cat([encode_pictures(vae, data.on_white(part)) for part in stacked.split(256)])
    return Drawings(stacked, z, concept, colours)


def control_caption(
    pictures: data.Pictures, drawn: Drawings, i: int, strange: data.UnknownWords, rng: random.Random
) -> str:
    """Words for a drawing: none, unknown ones, another thing's name, or its own; a colour is the drawing's.

    So the drawing decides what is where, whatever the words say.
    """
    own, tint = pictures.concepts[drawn.concept[i]], drawn.colour[i]
    empty, unknown, other = CONTROL_CAPTIONS
    lot = rng.random()
    if lot < empty:
        return ""
    if lot < empty + unknown:
        return strange.draw(rng, tint or own.colour)
    if lot < empty + unknown + other:
        another = pictures.concepts[drawn.concept[rng.randrange(len(drawn.concept))]]
        return data.caption(another, rng, tint or own.colour)
    return data.caption(own, rng, tint)


def train_controlnet(pictures: data.Pictures, run: Run) -> None:
    """Train the line-art ControlNet on the frozen base (2302.05543) with :func:`control_caption`: ``cache/controlnet``.

    The loss is the plain one on v: min-SNR would weigh down exactly the noisy steps in which the drawing decides.
    """
    tokenizer = tokenizer_of(pictures, run)
    unet, text, vae = load_base(run)
    controlnet, noise = models.make_controlnet(unet, run.size), Noise(run.device)
    controlnet.requires_grad_(True)
    drawn = Drawings(**kept(run, "drawings.pt", lambda: vars(drawings(pictures, vae.cpu(), COPIES, run.seed))))
    drawn.z = drawn.z.to(run.device)
    strange = unknown_words(tokenizer, pictures)

    def loss_of(rng: random.Random) -> Tensor:
        index = [rng.randrange(len(drawn.concept)) for _ in range(run.batch)]
        words = [control_caption(pictures, drawn, i, strange, rng) for i in index]
        lines = torch.stack([data.line_art(drawn.rgba[i], rng) for i in index]).to(run.device)
        t = noise.times(len(index))
        noised, v = noise.add(drawn.z[index], t)
        context = text(models.encode(tokenizer, words).to(run.device)).last_hidden_state
        down, middle = controlnet(noised, t, context, controlnet_cond=lines, return_dict=False)
        prediction = unet(
            noised, t, context, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample
        return F.mse_loss(prediction.float(), v)

    def preview(nets: dict[str, nn.Module]) -> None:
        nets["controlnet"].save_pretrained(run.cache / "controlnet")  # type: ignore[operator]

    train("controlnet", {"controlnet": controlnet}, loss_of, run, preview)


# ---- IP-Adapter


class ImagePrompts(nn.Module):
    """The trainable part of an IP-Adapter: the projector, and one pair of key and value layers per cross-attention."""

    def __init__(self, unet: UNet2DConditionModel, features: int, tokens: int = 4) -> None:
        super().__init__()
        from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0

        width = int(unet.config.cross_attention_dim)
        self.image_proj = models.ImageTokens(features, width, tokens)
        processors: dict[str, Any] = {}
        weights = unet.state_dict()
        self.ip_adapter = nn.ModuleDict()
        for i, name in enumerate(unet.attn_processors):  # down blocks, up blocks, middle: the published numbering
            if name.endswith("attn1.processor"):
                processors[name] = AttnProcessor2_0()
                continue
            to_k, to_v = (weights[name.replace("processor", f"to_{x}.weight")] for x in "kv")
            processor = IPAdapterAttnProcessor2_0(to_k.shape[0], width, num_tokens=(tokens,))
            processor.to_k_ip[0].weight.data.copy_(to_k)  # decoupled attention starts from the text's own layers
            processor.to_v_ip[0].weight.data.copy_(to_v)
            processors[name] = processor
            self.ip_adapter[str(i)] = processor
        unet.set_attn_processor(processors)

    def published(self) -> dict[str, Tensor]:
        """The weights under the names of IP-Adapter's original files."""
        weights = {f"image_proj.{k}": v for k, v in self.image_proj.state_dict().items()}
        for i, processor in self.ip_adapter.items():
            weights[f"ip_adapter.{i}.to_k_ip.weight"] = processor.to_k_ip[0].weight  # type: ignore[index,union-attr]
            weights[f"ip_adapter.{i}.to_v_ip.weight"] = processor.to_v_ip[0].weight  # type: ignore[index,union-attr]
        return {k: v.detach().cpu().contiguous() for k, v in weights.items()}


def train_ip_adapter(pictures: data.Pictures, run: Run) -> None:
    """Train image prompts on the frozen base (2308.06721); write ``cache/ip_adapter.safetensors``.

    The reference is the same concept in any style, warped, in the target's colour. The reference is dropped in 10 %
    (the words too in half of these); the words alone in another 45 %, so that the reference has to be looked at.
    """
    from safetensors.torch import save_file

    tokenizer = tokenizer_of(pictures, run)
    unet, text, vae = load_base(run)
    image = (
        CLIPVisionModelWithProjection.from_pretrained(run.cache / "clip-image")
        .to(run.device)
        .eval()
        .requires_grad_(False)
    )
    prompts, noise = ImagePrompts(unet, int(image.config.projection_dim)), Noise(run.device)
    latents = Latents(**kept(run, "latents.pt", lambda: vars(base_latents(pictures, vae.cpu()))))
    latents.z = latents.z.to(run.device)
    by_concept: dict[int, list[int]] = {}
    for i in pictures.training().tolist():
        by_concept.setdefault(int(pictures.concept[i]), []).append(i)

    def loss_of(rng: random.Random) -> Tensor:
        index = latents.draw(run.batch, rng, tinted=0.4)
        words, references, present = [], [], []
        for i in index:
            concept, colour, lot = latents.concept[i], latents.colour[i], rng.random()
            one = data.warp(pictures.rgba[rng.choice(by_concept[concept])], rng)
            references.append(data.recolour(one[None], colour)[0] if colour else one)
            present.append(0.0 if lot < 0.10 else 1.0)  # 5 % the reference alone, 5 % both
            full = data.caption(pictures.concepts[concept], rng, colour if rng.random() < 0.5 else None)
            words.append("" if 0.05 <= lot < 0.55 else full)
        x = data.on_white(torch.stack(references)).to(run.device)
        with torch.no_grad():
            features = image(pixel_values=x).image_embeds * torch.tensor(present, device=run.device)[:, None]
            context = text(models.encode(tokenizer, words).to(run.device)).last_hidden_state
        t = noise.times(len(index))
        noised, v = noise.add(latents.z[index], t)
        tokens = prompts.image_proj(features)
        return F.mse_loss(unet(noised, t, (context, [tokens])).sample.float(), v)

    def preview(nets: dict[str, nn.Module]) -> None:
        save_file(nets["prompts"].published(), run.cache / "ip_adapter.safetensors")  # type: ignore[operator]

    train("ip-adapter", {"prompts": prompts}, loss_of, run, preview)
