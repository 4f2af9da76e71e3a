"""Tasks: what is learned, from which features, by which loss. The loop knows none of it."""

from __future__ import annotations

import hashlib
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mahlstick import annotators
from mahlstick.adapters.controlnet import ControlNet
from mahlstick.adapters.ip_adapter import IPAdapter, load_encoder
from mahlstick.errors import MahlstickError
from mahlstick.pipelines.attach import attach
from mahlstick.pipelines.generate import EMBEDDED_GUIDANCE
from mahlstick.pipelines.load import load_pipeline
from mahlstick.pipelines.units import Control, ImagePrompt, Unit
from mahlstick.training import data, metrics
from mahlstick.training.config import TrainConfig
from mahlstick.training.data import Example
from mahlstick.training.objective import Objective

Features = dict[str, Tensor]

SCORE = "score"  # of a validation: the higher, the better
SAMPLE_STEPS = 20

TEXT_DROPOUT = {"controlnet": 0.5, "ip-adapter": 0.05, "lora": 0.0, "base": 0.1}  # as their papers and programs have it


class Task(nn.Module, ABC):
    """What is learned. Registered submodules are trained and saved; ``frozen`` ones are out of sight of ``state_dict``,
    of the optimiser and of whatever wraps the task for several processes.

    Called with a batch it gives each row's loss (B,).
    """

    #: Whether a row's loss depends on the other rows of the batch, so that the batch must not be split.
    whole_batch: ClassVar[bool] = False

    def __init__(self, config: TrainConfig, pipe: Any = None) -> None:
        super().__init__()
        self.config = config
        pipe = pipe if pipe is not None else load_pipeline(config.base, device="cpu", dtype="float32")
        self._pipe = (pipe,)  # in a tuple, so that a UNet among its parts is no submodule of ours
        self.frozen: dict[str, Any] = {}

    @property
    def pipe(self) -> Any:
        """The base, as a diffusers pipeline."""
        return self._pipe[0]

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What the encoded features depend on, beside the example itself: the key of their cache."""

    @abstractmethod
    def encode(self, examples: Sequence[Example]) -> list[Features]:
        """Everything of an example that no training step changes, made once."""

    @abstractmethod
    def draw(self, features: Features, random: torch.Generator) -> Features:
        """A row of a batch: the features with this step's random choices made."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what was learned into ``folder``, in the layout that diffusers and ComfyUI load."""

    def sample(self, examples: Sequence[Example]) -> tuple[dict[str, float], list[list[Image.Image]]]:
        """Figures on held-out examples, and rows of pictures to look at; by default none."""
        return {}, []

    def to_encode(self, device: torch.device) -> None:
        """Place the frozen modules for :meth:`encode`, in full precision."""
        for module in self.frozen.values():
            cast_to(module, device, torch.float32).eval().requires_grad_(False)

    def to_learn(self, device: torch.device, dtype: torch.dtype) -> None:
        """Place the frozen modules for the steps: the UNet where they are taken, the encoders out of the way."""
        for name, module in self.frozen.items():
            if name == "unet":
                cast_to(module, device, dtype)
            else:
                module.to("cpu")
                if device.type == "cpu":  # which is in the way of itself
                    rest(module)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


class DiffusionTask(Task):
    """A task on a base's denoising: latents and text are cached, z_t and the target are made from the row's draws."""

    def __init__(self, config: TrainConfig, pipe: Any = None) -> None:
        super().__init__(config, pipe)
        self.objective = Objective(self.pipe.scheduler, config.prediction, config.min_snr)
        dropout = config.text_dropout
        self.text_dropout = TEXT_DROPOUT[config.task] if dropout is None else dropout
        self.resolution = config.resolution or self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor
        step = self.pipe.vae_scale_factor * 2 ** (len(self.pipe.unet.config.block_out_channels) - 1)
        square = [(self.resolution, self.resolution)]
        self.buckets = data.bucket_sizes(self.resolution, step=step) if config.buckets else square
        self.frozen = {name: module for name, module in self.pipe.components.items() if isinstance(module, nn.Module)}
        self.empty = self._text([""])[0]

    def settings(self) -> dict[str, Any]:
        encoders = {name: fingerprint(module) for name, module in self.frozen.items() if name.startswith("text_enc")}
        return {"resolution": self.resolution, "buckets": self.buckets, "vae": fingerprint(self.pipe.vae), **encoders}

    @torch.no_grad()
    def encode(self, examples: Sequence[Example]) -> list[Features]:
        made = []
        for example in examples:
            fitted = self._fitted(example)
            row = {"latents": self._latents(fitted), **self._sizes(example, fitted)}
            for k, text in enumerate(self._text(list(example.captions))):
                row |= {f"{name}.{k}": value for name, value in text.items()}
            made.append(row | self._extra(example, fitted))
        return made

    def _fitted(self, example: Example) -> Image.Image:
        """The picture at the size of its bucket."""
        picture = example.load()
        return data.fit(picture, data.nearest_bucket(picture.size, self.buckets))

    def _extra(self, example: Example, fitted: Image.Image) -> Features:
        """What a task needs beside latents and text."""
        return {}

    def _latents(self, picture: Image.Image) -> Tensor:
        """The posterior's mean, scaled: (4, h, w)."""
        vae = self.pipe.vae
        x = to_tensor(picture)[None].to(vae.device, vae.dtype) * 2 - 1
        z = vae.encode(x).latent_dist.mean[0]
        return ((z - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor).float().cpu()

    def _sizes(self, example: Example, fitted: Image.Image) -> Features:
        """SDXL is told the picture's size, where it was cropped and what became of it, each as height, width."""
        if self.pipe.unet.config.addition_embed_type != "text_time":
            return {}
        picture, (width, height) = example.load(), fitted.size
        scale = max(width / picture.width, height / picture.height)
        top, left = round((picture.height * scale - height) / 2), round((picture.width * scale - width) / 2)
        return {"time_ids": torch.tensor([picture.height, picture.width, top, left, height, width]).float()}

    @torch.no_grad()
    def _text(self, captions: list[str]) -> list[Features]:
        """Each caption as ``text`` (length, dim) and, for SDXL, ``pooled`` (dim,)."""
        encoder = getattr(self.pipe, "text_encoder", None) or self.pipe.text_encoder_2
        found = self.pipe.encode_prompt(captions, device=encoder.device, num_images_per_prompt=1,
                                        do_classifier_free_guidance=False)  # fmt: skip
        text = found[0].float().cpu()
        if len(found) == 2:
            return [{"text": row} for row in text]
        pooled = found[2].float().cpu()
        if self.pipe.config.force_zeros_for_empty_prompt and captions == [""]:
            text, pooled = torch.zeros_like(text), torch.zeros_like(pooled)
        return [{"text": row, "pooled": vector} for row, vector in zip(text, pooled, strict=True)]

    def draw(self, features: Features, random: torch.Generator) -> Features:
        lot = torch.rand(2, generator=random)
        row = {name: value for name, value in features.items() if "." not in name}
        row |= self.empty if lot[0] < self.text_dropout else _caption(features, float(lot[1]))
        return row | {"noise": self._noise(row["latents"], random)}

    def _noise(self, z: Tensor, random: torch.Generator) -> Tensor:
        noise = torch.randn(z.shape, generator=random)
        if self.config.noise_offset:
            noise = noise + self.config.noise_offset * torch.randn(z.shape[0], 1, 1, generator=random)
        return noise

    def forward(self, batch: Features) -> Tensor:
        noised, t, target, weight = self.objective.noised(batch["latents"], batch["noise"], batch["u"])
        dtype = self.pipe.unet.conv_in.weight.dtype  # to ask the UNet itself is to have it walk through all its modules
        arguments: dict[str, Any] = {"encoder_hidden_states": batch["text"].to(dtype)}
        if "time_ids" in batch:
            added = {"text_embeds": batch["pooled"].to(dtype), "time_ids": batch["time_ids"]}
            arguments["added_cond_kwargs"] = added
        prediction = self.predict(noised.to(dtype), t, batch, arguments)
        return weight * (prediction.float() - target.float()).square().mean((1, 2, 3))

    def _draw(self, example: Example | None, size: tuple[int, int], seed: int, unit: Unit) -> Image.Image:
        """A picture by the pipeline under a unit, with the example's first caption or without words."""
        guidance = {"guidance_scale": EMBEDDED_GUIDANCE} if self.config.base == "embedded" else {}
        self.pipe.set_progress_bar_config(disable=True)
        with attach(self.pipe, unit):
            made = self.pipe(
                example.captions[0] if example is not None else "", width=size[0], height=size[1],
                num_inference_steps=SAMPLE_STEPS, generator=torch.Generator().manual_seed(seed), **guidance,
            )  # fmt: skip
        return cast(Image.Image, made.images[0])

    @abstractmethod
    def predict(self, noised: Tensor, t: Tensor, batch: Features, arguments: dict[str, Any]) -> Tensor:
        """The UNet's output under what is learned."""


def _caption(features: Features, lot: float) -> Features:
    """One of the example's captions by a lot in [0, 1)."""
    count = sum(name.startswith("text.") for name in features)
    k = min(int(lot * count), count - 1)
    return {name: features[f"{name}.{k}"] for name in ("text", "pooled") if f"{name}.{k}" in features}


class ControlNetTask(DiffusionTask):
    """A ControlNet on the frozen base (2302.05543)."""

    def __init__(self, config: TrainConfig, pipe: Any = None) -> None:
        super().__init__(config, pipe)
        halvings = len(self.pipe.vae.config.block_out_channels) - 1
        if config.start is not None:
            self.net = ControlNet.from_pretrained(config.start, dtype=torch.float32)
        else:
            widths = (16, 32, 96, 256)[: halvings + 1]
            self.net = ControlNet.from_unet(self.pipe.unet, conditioning_embedding_out_channels=widths)
        self.net.requires_grad_(True)
        if config.gradient_checkpointing:
            checkpoint_blocks(self.net)

    def settings(self) -> dict[str, Any]:
        how = {"annotator": self.config.annotator, "options": self.config.annotator_options}
        return super().settings() | {"control": how if self.config.annotator else "files"}

    def _extra(self, example: Example, fitted: Image.Image) -> Features:
        return {"control": torch.from_numpy(np.array(self._control(example, fitted))).permute(2, 0, 1)}

    def _control(self, example: Example, fitted: Image.Image) -> Image.Image:
        if example.control is not None:
            picture = example.load()
            return data.fit_control(example.load("control"), picture, fitted.size, f"control of {example.name!r}")
        if self.config.annotator is None:
            raise MahlstickError(f"{example.name!r} has no control picture; add it, or name an annotator")
        return annotators.annotate(self.config.annotator, fitted, **self.config.annotator_options).convert("RGB")

    def predict(self, noised: Tensor, t: Tensor, batch: Features, arguments: dict[str, Any]) -> Tensor:
        image = batch["control"].float() / 255
        down, mid = self.net(noised, t, image=image, **arguments)
        residuals = {"down_block_additional_residuals": [d.to(noised.dtype) for d in down],
                     "mid_block_additional_residual": mid.to(noised.dtype)}  # fmt: skip
        return cast(Tensor, self.pipe.unet(noised, t, **arguments, **residuals).sample)

    def sample(self, examples: Sequence[Example]) -> tuple[dict[str, float], list[list[Image.Image]]]:
        """Rows of control picture, result and true picture; how far the result's own control picture is from it."""
        rows, found, measure = [], [], ""
        for seed, example in enumerate(examples):
            fitted = self._fitted(example)
            control = self._control(example, fitted)
            result = self._draw(example, fitted.size, seed, Control(self.net, control))
            rows.append([control, result, fitted])
            if self.config.annotator is not None:
                options = self.config.annotator_options
                measure, value = metrics.condition_error(self.config.annotator, control, result, **options)
                found.append(value)
        if not found:
            return {}, rows
        mean = sum(found) / len(found)
        return {measure: mean, SCORE: mean if metrics.higher_is_better(measure) else -mean}, rows

    def save(self, folder: Path) -> None:
        self.net.save_pretrained(folder)


class IPAdapterTask(DiffusionTask):
    """An IP-Adapter on the frozen base (2308.06721): a projector, and keys and values beside the text's."""

    def __init__(self, config: TrainConfig, pipe: Any = None) -> None:
        super().__init__(config, pipe)
        self.pooled = config.projector == "linear"
        encoder, processor = self._encoder()
        if config.start is not None:
            self.adapter = IPAdapter.from_pretrained(config.start, dtype=torch.float32)
        else:
            width = encoder.config.projection_dim if self.pooled else encoder.config.hidden_size
            self.adapter = IPAdapter.from_unet(self.pipe.unet, config.projector, config.tokens, width)
        self.adapter.use_encoder(encoder, processor)
        self.adapter.requires_grad_(True)
        self.frozen["image_encoder"] = encoder
        self.nothing = self.adapter.features([Image.new("RGB", (8, 8))])[1][0].float()
        self.attachment = self.adapter.attach(self.pipe.unet, torch.empty(0))

    def _encoder(self) -> tuple[Any, Any]:
        """The vision model and its image processor."""
        if self.config.image_encoder is not None:
            return load_encoder(self.config.image_encoder)
        if getattr(self.pipe, "image_encoder", None) is None:
            raise MahlstickError(f"image_encoder: {self.config.base} has none; give a vision model's folder or hub id")
        return self.pipe.image_encoder, getattr(self.pipe, "feature_extractor", None)

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"image": fingerprint(self.frozen["image_encoder"]), "pooled": self.pooled}

    def _extra(self, example: Example, fitted: Image.Image) -> Features:
        return {"image": self.adapter.features([self._reference(example, fitted)])[0][0].float().cpu()}

    def _reference(self, example: Example, fitted: Image.Image) -> Image.Image:
        return example.load("reference") if example.reference is not None else fitted

    def draw(self, features: Features, random: torch.Generator) -> Features:
        """As published, three cases apart: words left out, picture left out, both left out."""
        row = super().draw(features, random)
        lot, share = float(torch.rand((), generator=random)), self.config.image_dropout
        if lot < 2 * share:
            row["image"] = self.nothing
        if lot < share:
            row |= self.empty
        return row

    def predict(self, noised: Tensor, t: Tensor, batch: Features, arguments: dict[str, Any]) -> Tensor:
        self.attachment.use(self.adapter(batch["image"]))
        return cast(Tensor, self.pipe.unet(noised, t, **arguments).sample)

    def sample(self, examples: Sequence[Example]) -> tuple[dict[str, float], list[list[Image.Image]]]:
        """Rows of reference and result, without words; the cosine of their features."""
        rows = []
        self.attachment.detach()
        try:
            for seed, example in enumerate(examples):
                reference = self._reference(example, self._fitted(example))
                unit = ImagePrompt(self.adapter, reference)
                size = data.nearest_bucket(reference.size, self.buckets)
                rows.append([reference, self._draw(None, size, seed, unit)])
            wanted, found = (self.adapter.features([row[i] for row in rows])[0].flatten(1) for i in (0, 1))
            likeness = float(F.cosine_similarity(wanted, found).mean())
        finally:
            self.attachment = self.adapter.attach(self.pipe.unet, torch.empty(0))
        return {"likeness": likeness, SCORE: likeness}, rows

    def save(self, folder: Path) -> None:
        self.adapter.save_pretrained(folder / "ip_adapter.safetensors")


class BaseTask(DiffusionTask):
    """The UNet itself, fine-tuned or (``start = "scratch"``) from nothing."""

    def __init__(self, config: TrainConfig, pipe: Any = None) -> None:
        super().__init__(config, pipe)
        unet = self.frozen.pop("unet")
        if config.start == "scratch":
            unet = type(unet).from_config(unet.config)
        elif config.start is not None:
            unet = type(unet).from_pretrained(config.start)
        self.pipe.unet = self.trained = cast(Any, unet).float().train().requires_grad_(True)
        if config.gradient_checkpointing:
            self.trained.enable_gradient_checkpointing()

    def predict(self, noised: Tensor, t: Tensor, batch: Features, arguments: dict[str, Any]) -> Tensor:
        return cast(Tensor, self.trained(noised, t, **arguments).sample)

    def save(self, folder: Path) -> None:
        self.trained.save_pretrained(folder)


class LoraTask(DiffusionTask):
    """Low-rank updates of the UNet's attention (2106.09685) through peft."""

    TARGETS: ClassVar[list[str]] = ["to_q", "to_k", "to_v", "to_out.0"]

    def __init__(self, config: TrainConfig, pipe: Any = None) -> None:
        from peft import LoraConfig

        super().__init__(config, pipe)
        unet = self.pipe.unet.requires_grad_(False)
        if config.start is not None:
            self.pipe.load_lora_weights(config.start)
        else:
            torch.manual_seed(config.seed)
            unet.add_adapter(
                LoraConfig(
                    r=config.rank, lora_alpha=config.rank, init_lora_weights="gaussian", target_modules=self.TARGETS
                )
            )
        learned = {name: p for name, p in unet.named_parameters() if "lora_" in name}
        self.lora = nn.ParameterDict({name.replace(".", "/"): p for name, p in learned.items()})

    def to_learn(self, device: torch.device, dtype: torch.dtype) -> None:
        super().to_learn(device, dtype)
        for p in self.lora.values():
            p.data = p.data.float()
            p.requires_grad_(True)

    def predict(self, noised: Tensor, t: Tensor, batch: Features, arguments: dict[str, Any]) -> Tensor:
        return cast(Tensor, self.pipe.unet(noised, t, **arguments).sample)

    def save(self, folder: Path) -> None:
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft.utils import get_peft_model_state_dict

        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.pipe.unet))
        self.pipe.save_lora_weights(folder, unet_lora_layers=layers)


class VAETask(Task):
    """The autoencoder: L1 of the picture and of its gradients, and a little KL (2112.10752, G)."""

    KL = 1e-4

    def __init__(self, config: TrainConfig, pipe: Any = None) -> None:
        super().__init__(config, pipe)
        vae = self.pipe.vae
        if config.start == "scratch":
            vae = type(vae).from_config(vae.config)
        elif config.start is not None:
            vae = type(vae).from_pretrained(config.start)
        self.vae = vae.float().train().requires_grad_(True)
        self.resolution = config.resolution or int(vae.config.sample_size)

    def settings(self) -> dict[str, Any]:
        return {"pixels": self.resolution}

    def encode(self, examples: Sequence[Example]) -> list[Features]:
        size = (self.resolution, self.resolution)
        return [
            {"pixels": torch.from_numpy(np.array(data.fit(example.load(), size))).permute(2, 0, 1)}
            for example in examples
        ]

    def draw(self, features: Features, random: torch.Generator) -> Features:
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        side = self.resolution // factor
        noise = torch.randn(self.vae.config.latent_channels, side, side, generator=random)
        return features | {"noise": noise}

    def forward(self, batch: Features) -> Tensor:
        x = batch["pixels"].float() / 127.5 - 1
        posterior = self.vae.encode(x).latent_dist
        y = self.vae.decode(posterior.mean + posterior.std * batch["noise"]).sample
        across, down = y.diff(dim=-1) - x.diff(dim=-1), y.diff(dim=-2) - x.diff(dim=-2)
        detail = across.abs().mean((1, 2, 3)) + down.abs().mean((1, 2, 3))
        return (y - x).abs().mean((1, 2, 3)) + detail + self.KL * posterior.kl() / posterior.mean[0].numel()

    def save(self, folder: Path) -> None:
        self.vae.save_pretrained(folder)


class CLIPTask(Task):
    """Text and image towers, contrastively: symmetric InfoNCE with a learned temperature (2103.00020, figure 3)."""

    whole_batch = True

    def __init__(self, config: TrainConfig, pipe: Any = None) -> None:
        super().__init__(config, pipe)
        if getattr(self.pipe, "image_encoder", None) is None:
            raise MahlstickError(f"base: {config.base} has no image encoder to train; give a base that has one")
        text, image = self.pipe.text_encoder, self.pipe.image_encoder
        if config.start == "scratch":
            text, image = type(text)(text.config), type(image)(image.config)
        self.text, self.image = (net.float().train().requires_grad_(True) for net in (text, image))
        self.log_scale = nn.Parameter(torch.tensor(2.6593))  # ln(1/0.07)

    def settings(self) -> dict[str, Any]:
        tokenizer = self.pipe.tokenizer
        vocabulary = hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]
        return {"clip": int(self.image.config.image_size), "vocabulary": vocabulary}

    def encode(self, examples: Sequence[Example]) -> list[Features]:
        pipe = self.pipe
        made = []
        for example in examples:
            pixels = pipe.feature_extractor(images=example.load(), return_tensors="pt")["pixel_values"][0]
            ids = pipe.tokenizer(
                list(example.captions), padding="max_length", truncation=True,
                max_length=pipe.tokenizer.model_max_length, return_tensors="pt",
            ).input_ids  # fmt: skip
            made.append({"pixels": pixels, **{f"text.{k}": row for k, row in enumerate(ids)}})
        return made

    def draw(self, features: Features, random: torch.Generator) -> Features:
        return {"pixels": features["pixels"], **_caption(features, float(torch.rand((), generator=random)))}

    def forward(self, batch: Features) -> Tensor:
        image = F.normalize(self.image(pixel_values=batch["pixels"]).image_embeds.float(), dim=-1)
        text = F.normalize(self.text(batch["text"]).pooler_output.float(), dim=-1)
        logits = self.log_scale.exp().clamp(max=100) * image @ text.T
        own = torch.arange(len(logits), device=logits.device)
        both = F.cross_entropy(logits, own, reduction="none") + F.cross_entropy(logits.T, own, reduction="none")
        return both / 2

    def save(self, folder: Path) -> None:
        self.text.save_pretrained(folder / "text_encoder")
        self.image.save_pretrained(folder / "image_encoder")


TASKS: dict[str, type[Task]] = {
    "controlnet": ControlNetTask,
    "ip-adapter": IPAdapterTask,
    "lora": LoraTask,
    "base": BaseTask,
    "vae": VAETask,
    "clip": CLIPTask,
}


def to_tensor(picture: Image.Image) -> Tensor:
    """(3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)


def cast_to(module: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """``module.to``, without the dtype where it is the same: diffusers warns of every cast."""
    return module.to(device) if module.dtype == dtype else module.to(device, dtype)


@torch.no_grad()
def rest(module: nn.Module) -> None:
    """Lay a module's frozen weights in a file, mapped in their place: they take memory again when they are used."""
    weights = {str(i): p for i, p in enumerate(module.parameters()) if not p.requires_grad}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # the mapping outlives its file's name
        save_file({name: p.contiguous() for name, p in weights.items()}, Path(folder) / "weights.safetensors")
        for name, value in load_file(Path(folder) / "weights.safetensors").items():
            weights[name].data = value


def fingerprint(module: nn.Module) -> str:
    """A module's weights as a short text: what is encoded by other weights must not be mistaken for its own."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def checkpoint_blocks(net: nn.Module) -> None:
    """Recompute the activations of a net's blocks in the backward pass instead of keeping them."""
    module: Any
    for module in net.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
