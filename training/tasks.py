"""Tasks: what is learned, from which features, by which loss. The loop knows none of it."""

from __future__ import annotations

import copy
import hashlib
import math
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mahlstick.adapters import qformer
from mahlstick.adapters.controlnet import ControlNet
from mahlstick.adapters.formats import inspect, write
from mahlstick.adapters.image_encoder import ImageEncoder, checked_layer, load_encoder
from mahlstick.adapters.ip_adapter import IPAdapter, load_tokenizer
from mahlstick.adapters.load import load_qformer
from mahlstick.adapters.motion import MotionAdapter
from mahlstick.adapters.positions import sample_sparsely
from mahlstick.adapters.projectors import Querying
from mahlstick.adapters.qformer import ImageText
from mahlstick.errors import MahlstickError
from mahlstick.pipelines.load import load_pipeline
from mahlstick.pipelines.measures import measure_clip
from mahlstick.pipelines.units import Control, ImagePrompt, Motion, Unit
from mahlstick.training import alignment, data, metrics
from mahlstick.training.captions import embedded
from mahlstick.training.config import TrainConfig
from mahlstick.training.data import Example
from mahlstick.training.evaluate import control_of, draw, guidance_of
from mahlstick.training.objective import Objective, prediction_of

Features = dict[str, Tensor]
T = TypeVar("T")

SCORE = "score"  # of a validation: the higher, the better
SAMPLE_STEPS = 20
LONGEST = 256  # frames kept of a clip: half a minute at eight a second
SHOWN = 8  # of a clip's frames in a row of pictures

# as their papers and programs have it
TEXT_DROPOUT = {"controlnet": 0.5, "ip-adapter": 0.05, "motion": 0.1, "lora": 0.0, "base": 0.1}


class Task(nn.Module, ABC):
    """What is learned. Registered submodules are trained and saved; ``frozen`` ones are out of sight of ``state_dict``,
    of the optimiser and of whatever wraps the task for several processes.

    Called with a batch it gives each row's loss (B,).
    """

    #: Whether a row's loss depends on the other rows of the batch, so that the batch must not be split.
    whole_batch: ClassVar[bool] = False
    #: What it learns from.
    kind: ClassVar[data.Kind] = "pictures"

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

    @classmethod
    def read(cls, config: TrainConfig) -> list[Example]:
        """The examples that the config names; see `data.read_dataset`."""
        return data.read_dataset(config.data, config.control, config.reference)

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What the encoded features depend on, beside the example itself: the key of their cache."""

    @abstractmethod
    def encode(self, examples: Sequence[Example]) -> list[Features]:
        """Everything of an example that no training step changes, made once."""

    def alike(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Any, ...]:
        """What two examples must share to lie in one batch: the shapes of what is cached, whatever the captions'
        number."""
        return tuple(sorted((name, tuple(shape)) for name, shape in shapes.items() if "." not in name))

    @abstractmethod
    def draw(self, features: Features, random: torch.Generator) -> Features:
        """A row of a batch: the features with this step's random choices made."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what was learned into ``folder``, in the layout that diffusers and ComfyUI load."""

    def sample(self, examples: Sequence[Example]) -> tuple[dict[str, float], list[list[Image.Image]]]:
        """Figures on held-out examples, and rows of pictures to look at; by default none."""
        return {}, []

    def stepped(self) -> None:
        """The optimiser has taken a step."""

    def to_encode(self, device: torch.device) -> None:
        """Place the frozen modules for :meth:`encode`, in full precision."""
        for module in self.frozen.values():
            self._place(module.eval(), device, torch.float32)

    def to_learn(self, device: torch.device, dtype: torch.dtype) -> None:
        """Place the frozen modules for the steps: the UNet where they are taken, the encoders out of the way."""
        for name, module in self.frozen.items():
            if name == "unet":
                self._place(module, device, dtype)
            else:
                module.to("cpu")
                if device.type == "cpu":  # which is in the way of itself
                    rest(module)

    def _place(self, module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        """Move a module. What is learned of it keeps its precision: rounded once, it would stay so."""
        learned = {id(p) for p in self.parameters()}
        module.to(device)
        for p in module.parameters():
            if id(p) not in learned:
                p.requires_grad_(False).data = p.data.to(dtype)
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.data = buffer.data.to(dtype)

    def frozen_unet(self) -> str | None:
        """A fingerprint of the UNet's weights that stay as they are: what is learned belongs to them."""
        unet = self.frozen.get("unet")
        return None if unet is None else fingerprint(unet)

    def checkpoint_blocks(self) -> None:
        """Recompute the activations of all nets' blocks in the backward pass instead of keeping them."""
        module: Any
        for net in (self, *self.frozen.values()):
            for module in net.modules():
                if hasattr(module, "gradient_checkpointing"):
                    module.gradient_checkpointing = True
                    module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def size_of_weights(self) -> int:
        """Bytes of all weights, learned and frozen."""
        nets = [self, *self.frozen.values()]
        return sum(p.numel() * p.element_size() for p in {id(p): p for net in nets for p in net.parameters()}.values())


class DiffusionTask(Task):
    """A task on a base's denoising: latents and text are cached, z_t and the target are made from the row's draws."""

    def __init__(self, config: TrainConfig, pipe: Any = None) -> None:
        super().__init__(config, pipe)
        self.check_prediction()
        self.objective = Objective(self.pipe.scheduler, config.prediction, config.min_snr)
        dropout = config.text_dropout
        self.text_dropout = TEXT_DROPOUT[config.task] if dropout is None else dropout
        self.resolution = config.resolution or self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor
        step = self.pipe.vae_scale_factor * 2 ** (len(self.pipe.unet.config.block_out_channels) - 1)
        check_resolution(self.resolution, step)
        square = [(self.resolution, self.resolution)]
        self.buckets = data.bucket_sizes(self.resolution, step=step) if config.buckets else square
        self.frozen = {name: module for name, module in self.pipe.components.items() if isinstance(module, nn.Module)}
        encoders = {name: part for name, part in self.frozen.items() if name.startswith("text_encoder")}
        self.encoders = encoders if config.train_text else {}  # those that learn
        self.empty = self._text([""])[0]

    def check_prediction(self) -> None:
        """Raise ``MahlstickError`` where the config asks a frozen UNet for what it was not taught."""
        asked, known = self.config.prediction, prediction_of(self.pipe.scheduler)
        if asked not in (None, known):
            raise MahlstickError(
                f"prediction: {self.config.base} predicts {known}, and stays as it is; leave {asked} out"
            )

    def settings(self) -> dict[str, Any]:
        vae = self.pipe.vae
        found: dict[str, Any] = {"resolution": self.resolution, "buckets": self.buckets, "vae": fingerprint(vae)}
        found["scaling"] = vae.config.scaling_factor, vae.config.shift_factor
        for name, part in self.pipe.components.items():
            if name.startswith("text_enc") and part is not None and name not in self.encoders:
                found[name] = fingerprint(part)
            elif name.startswith("tokenizer") and part is not None:
                found[name] = vocabulary(part)
        return found

    @torch.no_grad()
    def encode(self, examples: Sequence[Example]) -> list[Features]:
        made = []
        for example in examples:
            row = self._seen(example)
            for k, text in enumerate(self._text(list(example.captions))):
                row |= {f"{name}.{k}": value for name, value in text.items()}
            made.append(row)
        return made

    def _seen(self, example: Example) -> Features:
        """Everything but the words."""
        fitted = self._fitted(example)
        row = {"latents": self._latents(fitted), **self._sizes(example.load(), fitted)}
        return row | self._extra(example, fitted)

    def _fitted(self, example: Example) -> Image.Image:
        """The picture at the size of its bucket."""
        picture = example.load()
        return data.fit(picture, data.nearest_bucket(picture.size, self.buckets))

    def _extra(self, example: Example, fitted: Image.Image) -> Features:
        """What a task needs beside latents and text."""
        return {}

    def _latents(self, picture: Image.Image) -> Tensor:
        """The posterior's mean, scaled: (channels, h, w)."""
        vae = self.pipe.vae
        x = to_tensor(picture)[None].to(vae.device, vae.dtype) * 2 - 1
        z = vae.encode(x).latent_dist.mean[0]
        return ((z - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor).float().cpu()

    def _sizes(self, picture: Image.Image, fitted: Image.Image) -> Features:
        """SDXL is told the picture's size, where it was cropped and what became of it, each as height, width."""
        if self.pipe.unet.config.addition_embed_type != "text_time":
            return {}
        width, height = fitted.size
        scale = max(width / picture.width, height / picture.height)
        top, left = round((picture.height * scale - height) / 2), round((picture.width * scale - width) / 2)
        return {"time_ids": torch.tensor([picture.height, picture.width, top, left, height, width]).float()}

    def to_learn(self, device: torch.device, dtype: torch.dtype) -> None:
        super().to_learn(device, dtype)
        for encoder in self.encoders.values():
            self._place(encoder, device, dtype)

    def _tokenizers(self) -> dict[str, Any]:
        """By the names that their token ids have in a batch."""
        found = {"text": getattr(self.pipe, "tokenizer", None), "text_2": getattr(self.pipe, "tokenizer_2", None)}
        return {name: tokenizer for name, tokenizer in found.items() if tokenizer is not None}

    @torch.no_grad()
    def _text(self, captions: list[str]) -> list[Features]:
        """Each caption as ``text`` (length, dim) and, for SDXL, ``pooled`` (dim,); or, where the text encoders learn,
        as token ids (length,), which are encoded in the step."""
        if self.encoders:
            ids = {name: token_ids(tokenizer, captions) for name, tokenizer in self._tokenizers().items()}
            return [{name: rows[i] for name, rows in ids.items()} for i in range(len(captions))]
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
            noise = noise + self.config.noise_offset * torch.randn(*z.shape[:-2], 1, 1, generator=random)
        return noise

    def _encoded(self, batch: Features) -> Features:
        """Token ids as the pipelines encode them: the last layer, or, in SDXL, both encoders' last but one."""
        if len(self.encoders) == 1:
            (encoder,), (name,) = self.encoders.values(), self._tokenizers()
            return {"text": encoder(batch[name])[0]}
        both = zip(self.encoders.values(), self._tokenizers(), strict=True)
        first, second = (encoder(batch[name], output_hidden_states=True) for encoder, name in both)
        text, pooled = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second[0]
        if self.pipe.config.force_zeros_for_empty_prompt:
            said = (batch["text"] != self.empty["text"].to(text.device)).any(dim=1)
            text, pooled = text * said.view(-1, 1, 1), pooled * said.view(-1, 1)
        return {"text": text, "pooled": pooled}

    def forward(self, batch: Features) -> Tensor:
        if self.encoders:
            batch = batch | self._encoded(batch)
        noised, t, target, weight = self.objective.noised(batch["latents"], batch["noise"], batch["u"])
        dtype = self.pipe.unet.conv_in.weight.dtype  # to ask the UNet itself is to have it walk through all its modules
        arguments: dict[str, Any] = {"encoder_hidden_states": batch["text"].to(dtype)}
        if "time_ids" in batch:
            added = {"text_embeds": batch["pooled"].to(dtype), "time_ids": batch["time_ids"]}
            arguments["added_cond_kwargs"] = added
        prediction = self.predict(noised.to(dtype), t, batch, arguments)
        return weight * (prediction.float() - target.float()).square().mean((1, 2, 3))

    def sample(self, examples: Sequence[Example]) -> tuple[dict[str, float], list[list[Image.Image]]]:
        """Rows of result and true picture."""
        fitted = [self._fitted(example) for example in examples]
        return {}, [
            [self._draw(example, true.size, seed), true]
            for seed, (example, true) in enumerate(zip(examples, fitted, strict=True))
        ]

    def _draw(self, example: Example | None, size: tuple[int, int], seed: int, *units: Unit) -> Image.Image:
        """A picture by the pipeline under the units, with the example's first caption or without words."""
        prompt = example.captions[0] if example is not None else ""
        guidance = guidance_of(self.config.base)
        return draw(self.pipe, [prompt], [seed], size, units, steps=SAMPLE_STEPS, guidance=guidance)[0]

    @abstractmethod
    def predict(self, noised: Tensor, t: Tensor, batch: Features, arguments: dict[str, Any]) -> Tensor:
        """The UNet's output under what is learned."""


def _caption(features: Features, lot: float) -> Features:
    """One of the example's captions by a lot in [0, 1)."""
    count = len({name.partition(".")[2] for name in features if "." in name})
    k = min(int(lot * count), count - 1)
    names = ("text", "pooled", "text_2", "words")
    return {name: features[f"{name}.{k}"] for name in names if f"{name}.{k}" in features}


class ControlNetTask(DiffusionTask):
    """A ControlNet on the frozen base (2302.05543)."""

    def __init__(self, config: TrainConfig, pipe: Any = None) -> None:
        super().__init__(config, pipe)
        halvings = len(self.pipe.vae.config.block_out_channels) - 1
        if config.start is not None:
            self.net = ControlNet.from_pretrained(config.start, dtype=torch.float32)
        else:
            widths = (16, 32, 96, 256)[: halvings + 1]
            self.net = ControlNet.from_unet(self.pipe.unet, conditioning_embedding_out_channels=widths).float()
        self.net.requires_grad_(True)

    def settings(self) -> dict[str, Any]:
        how = {"annotator": self.config.annotator, "options": self.config.annotator_options}
        return super().settings() | {"control": how if self.config.annotator else "files"}

    def _extra(self, example: Example, fitted: Image.Image) -> Features:
        return {"control": torch.from_numpy(np.array(self._control(example, fitted))).permute(2, 0, 1)}

    def _control(self, example: Example, fitted: Image.Image) -> Image.Image:
        return control_of(example, fitted, self.config.annotator, self.config.annotator_options)

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

    reads = False  # the captions, in its projector

    def __init__(self, config: TrainConfig, pipe: Any = None) -> None:
        super().__init__(config, pipe)
        encoder, self.processor = image_encoder_of(config, self.pipe)
        if config.start is None:
            self.adapter = self._fresh(ImageEncoder(encoder, self.processor))
        elif inspect(config.start).kind == "qformer":
            self.adapter = self._on_qformer(config.start)
        else:
            self.adapter = IPAdapter.from_pretrained(config.start, dtype=torch.float32)
        self.adapter.use_encoder(encoder, self.processor)
        self.adapter.requires_grad_(True)
        self.frozen["image_encoder"] = encoder
        if self.adapter.reads:
            self.reads, self.adapter.tokenizer = True, tokenizer_of(config, self.pipe)
            self.empty = self._text([""])[0]
        black = [Image.new("RGB", (8, 8))] * self.adapter.config.get("frames", 1)
        self.nothing = self.adapter.features(black)[1][0].float()
        self.attachment = self.adapter.attach(self.pipe.unet, torch.empty(0))

    @classmethod
    def read(cls, config: TrainConfig) -> list[Example]:
        """A projector for videos learns from clips."""
        return data.read_dataset(config.data, kind="clips") if config.projector == "video" else super().read(config)

    def _fresh(self, encoder: ImageEncoder, **sizes: Any) -> IPAdapter:
        """An adapter of the config's sizes, or of others."""
        config = self.config
        layer = checked_layer(config.image_layer, config.projector == "linear")
        given: dict[str, Any] = {
            "tokens": config.tokens, "depth": config.depth, "heads": config.heads, "join": config.join,
            "feature_dim": encoder.width(layer) or 0, "layer": config.image_layer,
        }  # fmt: skip
        if config.projector == "video":
            seen = encoder.features([Image.new("RGB", (8, 8))], layer)
            given |= {"frames": config.frames, "grid": math.isqrt(seen.shape[1])}
        if config.projector == "instruct_qformer":
            given |= words_of(tokenizer_of(config, self.pipe))
        return IPAdapter.from_unet(self.pipe.unet, config.projector, **given | sizes).float()

    def _on_qformer(self, start: str) -> IPAdapter:
        """A fresh adapter whose projector begins with a Q-Former after its first stage (2301.12597, section 3.2)."""
        projector, found = self.config.projector, load_qformer(start)
        if projector not in ("qformer", "instruct_qformer"):
            raise MahlstickError(f"start: {start} is a Q-Former; give --projector qformer or instruct_qformer")
        known = found.config
        if projector == "instruct_qformer" and not known["vocabulary"]:
            raise MahlstickError(f"start: {start} is a Q-Former that does not read; give --projector qformer")
        sizes = {name: known[name] for name in ("depth", "heads", "feature_dim", "vocabulary", "places")}
        sizes |= {"tokens": known["queries"], "head_dim": known["width"] // known["heads"]}
        adapter = self._fresh(ImageEncoder(*image_encoder_of(self.config, self.pipe)), **sizes)
        learned, begun = found.qformer.state_dict(), cast(Querying, adapter.image_proj).qformer
        try:
            begun.load_state_dict({name: learned[name] for name in begun.state_dict()})
        except (KeyError, RuntimeError) as error:
            raise MahlstickError(f"start: {start} is a Q-Former of a form that no projector has") from error
        return adapter

    def settings(self) -> dict[str, Any]:
        processor = self.processor.to_dict() if self.processor is not None else None
        layer, pooled = self.adapter.config["layer"], self.adapter.image_proj.pooled
        found = {"image": fingerprint(self.frozen["image_encoder"]), "processor": processor,
                 "pooled": pooled if layer is None else layer}  # fmt: skip
        if self.reads:
            found["words"] = vocabulary(self.adapter.tokenizer), self.adapter.config["places"]
        return super().settings() | found

    def _text(self, captions: list[str]) -> list[Features]:
        """With the words for a projector that reads."""
        found = super()._text(captions)
        if not self.reads:
            return found
        return [text | {"words": row} for text, row in zip(found, self.adapter.words(captions), strict=True)]

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
        self.attachment.use(self.adapter(batch["image"], batch.get("words")))
        return cast(Tensor, self.pipe.unet(noised, t, **arguments).sample)

    def sample(self, examples: Sequence[Example]) -> tuple[dict[str, float], list[list[Image.Image]]]:
        """Rows of reference and result, without words; the cosine of their features."""
        rows, alike = [], []
        self.attachment.detach()
        try:
            for seed, example in enumerate(examples):
                shown = self._shown(example)
                made = self._draw(None, data.nearest_bucket(shown[0].size, self.buckets), seed, self._unit(shown))
                rows.append([*evenly(shown, SHOWN), made])
                wanted, found = (self.adapter.features(seen)[0].flatten(1) for seen in (shown, [made] * len(shown)))
                alike.append(float(F.cosine_similarity(wanted, found).mean()))
        finally:
            self.attachment = self.adapter.attach(self.pipe.unet, torch.empty(0))
        likeness = sum(alike) / len(alike)
        return {"likeness": likeness, SCORE: likeness}, rows

    def _shown(self, example: Example) -> list[Image.Image]:
        """What the adapter sees of an example."""
        return [self._reference(example, self._fitted(example))]

    def _unit(self, shown: list[Image.Image]) -> ImagePrompt:
        return ImagePrompt(self.adapter, shown, prompt="")

    def save(self, folder: Path) -> None:
        self.adapter.save_pretrained(folder / "ip_adapter.safetensors")
        if self.reads:
            self.adapter.tokenizer.save_pretrained(folder / "tokenizer")


class VideoPromptTask(IPAdapterTask):
    """An IP-Adapter whose projector reads a clip: each of the frames that it sees is learned from all of them."""

    kind = "clips"

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"frames": self.config.frames, "fps": self.config.fps, "longest": LONGEST}

    def _seen(self, example: Example) -> Features:
        """The frames' latents (frames, channels, h, w) and features (frames, length, dim)."""
        shown = self._shown(example)
        size = data.nearest_bucket(shown[0].size, self.buckets)
        fitted = [data.fit(frame, size) for frame in shown]
        latents = torch.stack([self._latents(frame) for frame in fitted])
        features = self.adapter.features(shown)[0][0].float().cpu()
        return {"latents": latents, "image": features, **self._sizes(shown[0], fitted[0])}

    def _shown(self, example: Example) -> list[Image.Image]:
        frames = list(islice(example.frames(self.config.fps), LONGEST))
        return [frames[place] for place in sample_sparsely(len(frames), self.adapter.config["frames"])]

    def _unit(self, shown: list[Image.Image]) -> ImagePrompt:
        return ImagePrompt(self.adapter, video=shown)

    def draw(self, features: Features, random: torch.Generator) -> Features:
        """One of the frames as the picture to learn."""
        latents = features["latents"]
        chosen = int(torch.randint(len(latents), (), generator=random))
        return super().draw(features | {"latents": latents[chosen]}, random)


class MotionTask(DiffusionTask):
    """A motion module on the frozen base (2307.04725). A row of a batch is a clip: its frames have a noise each, and
    one time and one text together (section 4.2)."""

    kind = "clips"

    def __init__(self, config: TrainConfig, pipe: Any = None) -> None:
        super().__init__(config, pipe)
        unet = self.pipe.unet
        if config.start is not None:
            self.motion = MotionAdapter.from_pretrained(config.start, dtype=torch.float32)
            places = self.motion.config["motion_max_seq_length"]
            if places is not None and places < config.frames:
                raise MahlstickError(f"frames: {config.start} tells {places} apart, not {config.frames}; give fewer")
        else:
            heads = heads_of(unet, pairs=config.positions == "rotary")
            self.motion = MotionAdapter.from_unet(
                unet,
                config.frames,
                positions=config.positions,
                heads=heads,
                mid_block=config.mid_block,
                norm=config.norm,
            ).float()
        self.motion.requires_grad_(True)
        self.attachment = self.motion.attach(unet, config.frames)

    @classmethod
    def read(cls, config: TrainConfig) -> list[Example]:
        return data.read_dataset(config.data, kind=cls.kind)

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"frames": self.config.frames, "fps": self.config.fps, "longest": LONGEST}

    def alike(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Any, ...]:
        """As many frames as are drawn have all clips."""
        return super().alike({**shapes, "latents": shapes["latents"][1:]})

    def _seen(self, example: Example) -> Features:
        """All frames' latents (frames, channels, h, w). Raises ``MahlstickError`` for a clip that is too short."""
        sizes, latents, wanted = Features(), list[Tensor](), self.config.frames
        for frame, fitted in self._clip(example, LONGEST):
            sizes = sizes or self._sizes(frame, fitted)
            latents.append(self._latents(fitted))
        if len(latents) < wanted:
            raise MahlstickError(
                f"{example.name!r} has {len(latents)} of {wanted} frames; give fewer --frames, or a higher --fps"
            )
        return {"latents": torch.stack(latents), **sizes}

    def _clip(self, example: Example, most: int) -> Iterator[tuple[Image.Image, Image.Image]]:
        """The first frames, each as it is and at the size of the clip's bucket."""
        size = None
        for frame in islice(example.frames(self.config.fps), most):
            size = size or data.nearest_bucket(frame.size, self.buckets)
            yield frame, data.fit(frame, size)

    def draw(self, features: Features, random: torch.Generator) -> Features:
        """Some of the clip, as long as a batch has it."""
        latents, frames = features["latents"], self.config.frames
        first = int(torch.randint(len(latents) - frames + 1, (), generator=random))
        return super().draw(features | {"latents": latents[first : first + frames]}, random)

    def forward(self, batch: Features) -> Tensor:
        frames = self.config.frames
        rows = {
            name: value.flatten(0, 1) if name in ("latents", "noise") else value.repeat_interleave(frames, dim=0)
            for name, value in batch.items()
        }
        return super().forward(rows).view(-1, frames).mean(dim=1)

    def predict(self, noised: Tensor, t: Tensor, batch: Features, arguments: dict[str, Any]) -> Tensor:
        return cast(Tensor, self.pipe.unet(noised, t, **arguments).sample)

    def sample(self, examples: Sequence[Example]) -> tuple[dict[str, float], list[list[Image.Image]]]:
        """Rows of frames of a clip and of the true one; how much the clips move, against the true ones."""
        rows, moved = [], []
        self.attachment.detach()
        try:
            for seed, example in enumerate(examples):
                true = [fitted for _, fitted in self._clip(example, self.config.frames)]
                made = self._animate(example, true[0].size, seed)
                rows.append([*evenly(made, SHOWN), *evenly(true, SHOWN)])
                moved.append([measure_clip(clip) for clip in (made, true)])
        finally:
            self.attachment = self.motion.attach(self.pipe.unet, self.config.frames)
        figures = {}
        for name in ("motion", "change"):
            ours, theirs = (sum(getattr(clip, name) for clip in clips) for clips in zip(*moved, strict=True))
            if theirs:
                figures[f"{name}_ratio"] = ours / theirs
        return figures, rows

    def _animate(self, example: Example, size: tuple[int, int], seed: int) -> list[Image.Image]:
        """A clip by the pipeline under the module, with the example's first caption."""
        frames = self.config.frames
        seeds = range(seed * frames, (seed + 1) * frames)
        return draw(self.pipe, [example.captions[0]] * frames, seeds, size, [Motion(self.motion, frames)],
                    steps=SAMPLE_STEPS, guidance=guidance_of(self.config.base))  # fmt: skip

    def save(self, folder: Path) -> None:
        self.motion.save_pretrained(folder)


class BaseTask(DiffusionTask):
    """The UNet and, with ``train_text``, the text encoders: fine-tuned or (``start = "scratch"``) from nothing."""

    def __init__(self, config: TrainConfig, pipe: Any = None) -> None:
        super().__init__(config, pipe)
        unet = self.frozen.pop("unet")
        for name in self.encoders:
            del self.frozen[name]
        if config.start == "scratch":
            unet = type(unet).from_config(unet.config)
            self.encoders = {name: type(part)(part.config) for name, part in self.encoders.items()}
        elif config.start is not None:
            unet = type(unet).from_pretrained(check_folder(config.start))
            self.encoders = {name: self._started(name, part, config.start) for name, part in self.encoders.items()}
        for name, part in {"unet": unet, **self.encoders}.items():
            setattr(self.pipe, name, cast(Any, part).float().train().requires_grad_(True))
        if len(self.encoders) == 2:  # SDXL does not use its first encoder's last layer
            first = self.encoders["text_encoder"]
            unused = ("final_layer_norm.", f"layers.{first.config.num_hidden_layers - 1}.")
            for name, p in first.named_parameters():
                p.requires_grad_(not any(part in name for part in unused))
        self.trained, self.texts = self.pipe.unet, nn.ModuleDict(self.encoders)
        scheduler = self.pipe.scheduler
        if self.objective.prediction != prediction_of(scheduler):
            self.pipe.scheduler = type(scheduler).from_config(
                scheduler.config, prediction_type=self.objective.prediction
            )

    def _started(self, name: str, encoder: Any, start: str) -> Any:
        """The text encoder of an earlier result, or the base's where that has none."""
        folder = Path(start).expanduser() / name
        return type(encoder).from_pretrained(folder) if folder.is_dir() else encoder

    def check_prediction(self) -> None:
        """It may be taught to predict something else."""
        start = self.config.start
        if self.config.train_text or start in (None, "scratch"):
            return
        if (Path(start).expanduser() / "text_encoder").is_dir():
            raise MahlstickError(f"start: {start} learned with its text encoder; add --train-text")

    def predict(self, noised: Tensor, t: Tensor, batch: Features, arguments: dict[str, Any]) -> Tensor:
        return cast(Tensor, self.trained(noised, t, **arguments).sample)

    def save(self, folder: Path) -> None:
        self.trained.save_pretrained(folder)
        for name, encoder in self.encoders.items():
            encoder.save_pretrained(folder / name)
        self.pipe.scheduler.save_pretrained(folder / "scheduler")


class LoraTask(DiffusionTask):
    """Low-rank updates of the UNet's attention, and of the text encoders' with ``train_text`` (2106.09685), through
    peft."""

    TARGETS: ClassVar[list[str]] = ["to_q", "to_k", "to_v", "to_out.0"]
    TEXT_TARGETS: ClassVar[list[str]] = ["q_proj", "k_proj", "v_proj", "out_proj"]

    def __init__(self, config: TrainConfig, pipe: Any = None) -> None:
        super().__init__(config, pipe)
        learning = {"unet": self.pipe.unet, **self.encoders}
        for module in learning.values():
            module.requires_grad_(False)
        if config.start is not None:
            self._start(config.start)
        torch.manual_seed(config.seed)
        for name, module in learning.items():
            if not any("lora_" in inside for inside, _ in module.named_parameters()):
                module.add_adapter(self._updates(name))
        self.lora = nn.ParameterDict(
            {f"{name}.{inside}".removeprefix("unet.").replace(".", "/"): p
             for name, module in learning.items() for inside, p in module.named_parameters() if "lora_" in inside}
        )  # fmt: skip

    def _start(self, source: str) -> None:
        """Go on from a LoRA. Raises ``MahlstickError`` where it holds another rank, scale or part than is learned."""
        self.pipe.load_lora_weights(source, adapter_name="default")
        if not self.config.train_text and any(
            name.startswith("text_encoder") and hasattr(part, "peft_config") for name, part in self.frozen.items()
        ):
            raise MahlstickError(f"start: {source} holds text encoders' layers too; add --train-text")
        known = self.pipe.unet.peft_config["default"]
        if known.r != self.config.rank:
            raise MahlstickError(f"rank: {source} has {known.r}, not {self.config.rank}; give --rank {known.r}")
        if known.lora_alpha != known.r:
            raise MahlstickError(f"start: {source} scales its layers by {known.lora_alpha}/{known.r}, which its result"
                                 " could not say; go on from one that is not scaled")  # fmt: skip

    def _updates(self, name: str) -> Any:
        from peft import LoraConfig

        where: dict[str, Any] = {"target_modules": self.TARGETS}
        if name != "unet":
            # SDXL does not use its first encoder's last layer, which would stay without a gradient.
            layers = self.encoders[name].config.num_hidden_layers - (len(self.encoders) == 2 and name == "text_encoder")
            where = {"target_modules": self.TEXT_TARGETS, "layers_to_transform": list(range(layers)),
                     "layers_pattern": "layers"}  # fmt: skip
        return LoraConfig(r=self.config.rank, lora_alpha=self.config.rank, init_lora_weights="gaussian", **where)

    def predict(self, noised: Tensor, t: Tensor, batch: Features, arguments: dict[str, Any]) -> Tensor:
        return cast(Tensor, self.pipe.unet(noised, t, **arguments).sample)

    def save(self, folder: Path) -> None:
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft.utils import get_peft_model_state_dict

        learned = {"unet": self.pipe.unet, **self.encoders}
        layers = {
            f"{name}_lora_layers": convert_state_dict_to_diffusers(get_peft_model_state_dict(module))
            for name, module in learned.items()
        }
        self.pipe.save_lora_weights(folder, **layers)


class VAETask(Task):
    """The autoencoder: L1 of the picture and of its gradients, and a little KL (2112.10752, G). The decoder alone may
    learn, for a base whose UNet knows the latents; with ``latent_noise`` τ it learns on latents with noise of deviation
    σ ~ |N(0, τ²)| (2510.11690, noise-augmented decoding), as those that a UNet makes are never free of it.

    From scratch, colours are left for last, and everything is brown for long. So there a linear layer, which is not
    saved, reads each block's mean colour off its latent, and the result is compared by blocks as well.
    """

    KL = 1e-4

    def __init__(self, config: TrainConfig, pipe: Any = None) -> None:
        super().__init__(config, pipe)
        vae = self.pipe.vae
        if config.start == "scratch":
            vae = type(vae).from_config(vae.config)
        elif config.start is not None:
            vae = type(vae).from_pretrained(check_folder(config.start))
        self.vae = vae.float().train().requires_grad_(True)
        if config.decoder_only:
            for part in (vae.encoder, vae.quant_conv):
                if part is not None:
                    part.requires_grad_(False)
        self.colours = nn.Conv2d(vae.config.latent_channels, 3, 1) if config.start == "scratch" else None
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.resolution = config.resolution or int(vae.config.sample_size)
        check_resolution(self.resolution, self.factor)

    def settings(self) -> dict[str, Any]:
        return {"pixels": self.resolution}

    def encode(self, examples: Sequence[Example]) -> list[Features]:
        size = (self.resolution, self.resolution)
        return [
            {"pixels": torch.from_numpy(np.array(data.fit(example.load(), size))).permute(2, 0, 1)}
            for example in examples
        ]

    def draw(self, features: Features, random: torch.Generator) -> Features:
        side = self.resolution // self.factor
        noise = torch.randn(self.vae.config.latent_channels, side, side, generator=random)
        deviation = self.config.latent_noise * torch.randn(1, 1, 1, generator=random).abs()
        return features | {"noise": noise, "deviation": deviation / self.vae.config.scaling_factor}

    def forward(self, batch: Features) -> Tensor:
        x = batch["pixels"].float() / 127.5 - 1
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.decoder_only):
            posterior = self.vae.encode(x).latent_dist
        std = torch.hypot(posterior.std, batch["deviation"])
        y = self.vae.decode(posterior.mean + std * batch["noise"]).sample
        across, down = y.diff(dim=-1) - x.diff(dim=-1), y.diff(dim=-2) - x.diff(dim=-2)
        detail = across.abs().mean((1, 2, 3)) + down.abs().mean((1, 2, 3))
        loss = (y - x).abs().mean((1, 2, 3)) + detail + self.KL * posterior.kl() / posterior.mean[0].numel()
        return loss if self.colours is None else loss + self._colour_loss(self.colours(posterior.mean), x, y)

    def _colour_loss(self, read: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """(B,): how far the blocks' colours, as ``read`` off the latents and as decoded in ``y``, are from ``x``."""
        wanted, decoded = (F.avg_pool2d(part, self.factor) for part in (x, y))
        return (2 * (read - wanted).abs() + (decoded - wanted).abs()).mean((1, 2, 3))

    def sample(self, examples: Sequence[Example]) -> tuple[dict[str, float], list[list[Image.Image]]]:
        """Rows of result and true picture; how near they are in decibels."""
        rows = []
        for example in examples:
            true = data.fit(example.load(), (self.resolution, self.resolution))
            x = to_tensor(true)[None].to(self.device) * 2 - 1
            y = self.vae.decode(self.vae.encode(x).latent_dist.mean).sample[0].float().cpu()
            rows.append([to_picture(y), true])
        psnr = sum(metrics.psnr(np.asarray(true), np.asarray(found)) for found, true in rows) / len(rows)
        # Of a decoder for noisy latents, pictures of clean ones are not what is to be best.
        return {"psnr": psnr} | ({} if self.config.latent_noise else {SCORE: psnr}), rows

    def save(self, folder: Path) -> None:
        self.vae.save_pretrained(folder)


class CLIPTask(Task):
    """Text and image towers, contrastively: symmetric InfoNCE with a learned temperature (2103.00020, figure 3); the
    text tower alone with ``locked_image`` (LiT, 2111.07991)."""

    whole_batch = True

    def __init__(self, config: TrainConfig, pipe: Any = None) -> None:
        super().__init__(config, pipe)
        if getattr(self.pipe, "image_encoder", None) is None:
            raise MahlstickError(f"base: {config.base} has no image encoder to train; give a base that has one")
        text, image = self.pipe.text_encoder, self.pipe.image_encoder
        if config.start == "scratch":
            text, image = type(text)(text.config), type(image)(image.config)
        elif config.start is not None:
            text, image = (
                part.from_pretrained(check_folder(config.start, name))
                for part, name in ((type(text), "text_encoder"), (type(image), "image_encoder"))
            )
        self.text, image = text.float().train().requires_grad_(True), image.float()
        if config.locked_image:
            self.frozen = {"image_encoder": image}
        else:
            self.image = image.train().requires_grad_(True)
        self.log_scale = nn.Parameter(torch.tensor(2.6593))  # ln(1/0.07)

    @property
    def _image(self) -> Any:
        return self.frozen["image_encoder"] if self.config.locked_image else self.image

    def settings(self) -> dict[str, Any]:
        image = fingerprint(self._image) if self.config.locked_image else int(self._image.config.image_size)
        return {"clip": image, "processor": self.pipe.feature_extractor.to_dict(),
                "tokenizer": vocabulary(self.pipe.tokenizer)}  # fmt: skip

    @torch.no_grad()
    def encode(self, examples: Sequence[Example]) -> list[Features]:
        pipe = self.pipe
        made = []
        for example in examples:
            pixels = pipe.feature_extractor(images=example.load(), return_tensors="pt")["pixel_values"][0]
            seen = {"pixels": pixels}
            if self.config.locked_image:
                seen = {"image": self._image(pixel_values=pixels[None].to(self._image.device)).image_embeds[0]}
            ids = token_ids(pipe.tokenizer, list(example.captions))
            made.append({**seen, **{f"text.{k}": row for k, row in enumerate(ids)}})
        return made

    def draw(self, features: Features, random: torch.Generator) -> Features:
        row = {name: value for name, value in features.items() if "." not in name}
        return row | _caption(features, float(torch.rand((), generator=random)))

    def forward(self, batch: Features) -> Tensor:
        seen = batch["image"] if self.config.locked_image else self.image(pixel_values=batch["pixels"]).image_embeds
        image = F.normalize(seen.float(), dim=-1)
        text = F.normalize(self.text(batch["text"]).pooler_output.float(), dim=-1)
        # Validation runs in one process alone, which must not wait for the others.
        images, texts, first = gathered(image, text) if self.training else (image, text, 0)
        scale = self.log_scale.exp().clamp(max=100)
        own = first + torch.arange(len(image), device=image.device)
        both = F.cross_entropy(scale * image @ texts.T, own, reduction="none")
        return (both + F.cross_entropy(scale * text @ images.T, own, reduction="none")) / 2

    def save(self, folder: Path) -> None:
        """A folder that `metrics.ClipJudge` reads."""
        parts = {"text_encoder": self.text, "image_encoder": self._image}
        for name, part in (
            parts | {name: getattr(self.pipe, name) for name in ("tokenizer", "feature_extractor")}
        ).items():
            part.save_pretrained(folder / name)


class CaptionerTask(Task):
    """A small decoder that writes captions from the features of the base's frozen image encoder (2201.12086, 3.1)."""

    def __init__(self, config: TrainConfig, pipe: Any = None) -> None:
        super().__init__(config, pipe)
        encoder, tokenizer = getattr(self.pipe, "image_encoder", None), getattr(self.pipe, "tokenizer", None)
        if encoder is None or tokenizer is None:
            raise MahlstickError(f"base: {config.base} has no image encoder or no tokenizer; give a base that has both")
        self.decoder = embedded.make_decoder(encoder, tokenizer)
        if config.start is not None:
            self.decoder = type(self.decoder).from_pretrained(check_folder(config.start, embedded.DECODER))
        self.decoder.float().requires_grad_(True)
        self.frozen = {"image_encoder": encoder}

    def settings(self) -> dict[str, Any]:
        encoder, processor = fingerprint(self.frozen["image_encoder"]), self.pipe.feature_extractor.to_dict()
        return {"captioner": encoder, "processor": processor, "tokenizer": vocabulary(self.pipe.tokenizer)}

    @torch.no_grad()
    def encode(self, examples: Sequence[Example]) -> list[Features]:
        encoder = self.frozen["image_encoder"]
        pictures = [example.load() for example in examples]
        pixels = self.pipe.feature_extractor(images=pictures, return_tensors="pt")["pixel_values"]
        seen = embedded.features_of(encoder, pixels.to(encoder.device, encoder.dtype)).half()
        made = []
        for example, features in zip(examples, seen, strict=True):
            ids = token_ids(self.pipe.tokenizer, list(example.captions))
            made.append({"features": features, **{f"text.{k}": row for k, row in enumerate(ids)}})
        return made

    def draw(self, features: Features, random: torch.Generator) -> Features:
        return {"features": features["features"], **_caption(features, float(torch.rand((), generator=random)))}

    def forward(self, batch: Features) -> Tensor:
        return embedded.loss_of(self.decoder, batch["features"], batch["text"])

    def save(self, folder: Path) -> None:
        """A folder that ``mahlstick caption --model`` reads."""
        parts = {embedded.DECODER: self.decoder, **{name: getattr(self.pipe, name) for name in embedded.PARTS}}
        for name, part in parts.items():
            part.save_pretrained(folder / name)


class QFormerTask(Task):
    """A Q-Former's first stage on a frozen image encoder: contrast, match and caption (2301.12597, section 3.1)."""

    whole_batch = True
    CONTRAST_DIM = 256

    def __init__(self, config: TrainConfig, pipe: Any = None) -> None:
        super().__init__(config, pipe)
        if config.batch < 2:
            raise MahlstickError("batch: a qformer tells pictures of a batch apart; give at least 2")
        encoder, self.processor = image_encoder_of(config, self.pipe)
        self.tokenizer = tokenizer_of(config, self.pipe)
        self.layer = checked_layer(config.image_layer, False)
        self.frozen = {"image_encoder": encoder}
        self.net = ImageText(self._sizes()).float().requires_grad_(True)
        if config.start is not None:  # which may lack heads, or all that reads
            self.net.load_state_dict(self._begun.state_dict(), strict=False)
        self.log_scale = nn.Parameter(torch.tensor(2.6593))  # ln(1/0.07)
        self.slow = copy.deepcopy(self.net).requires_grad_(False) if config.momentum else None

    @cached_property
    def _begun(self) -> ImageText:
        return load_qformer(cast(str, self.config.start))

    def _sizes(self) -> dict[str, Any]:
        config, words = self.config, words_of(self.tokenizer)
        heads = {"contrast_dim": self.CONTRAST_DIM, "match": True, "caption": True}
        if config.start is not None:
            known = {name: value for name, value in self._begun.config.items() if value}
            return self._begun.config | words | heads | known
        width = ImageEncoder(self.frozen["image_encoder"], self.processor).width(self.layer)
        return {
            "feature_dim": width, "queries": config.tokens, "depth": config.depth, "heads": config.heads,
            "width": 64 * config.heads, "inner": 256 * config.heads, "every": 2, **words, **heads,
        }  # fmt: skip

    def settings(self) -> dict[str, Any]:
        processor = self.processor.to_dict() if self.processor is not None else None
        return {"image": fingerprint(self.frozen["image_encoder"]), "processor": processor, "layer": self.layer,
                "words": [vocabulary(self.tokenizer), self.net.config["places"]]}  # fmt: skip

    @torch.no_grad()
    def encode(self, examples: Sequence[Example]) -> list[Features]:
        encoder, made = ImageEncoder(self.frozen["image_encoder"], self.processor), []
        for example in examples:
            seen = encoder.features([example.load()], self.layer)[0].float().cpu()
            made.append({"image": seen, **{f"words.{k}": row for k, row in enumerate(self._words(example.captions))}})
        return made

    def _words(self, captions: Sequence[str]) -> Tensor:
        known = self.net.config
        return qformer.token_ids(self.tokenizer, captions, known["vocabulary"], known["places"])

    def draw(self, features: Features, random: torch.Generator) -> Features:
        lots = torch.rand(3, generator=random)
        return {"image": features["image"], "lots": lots[1:], **_caption(features, float(lots[0]))}

    def forward(self, batch: Features) -> Tensor:
        image, words, net = batch["image"], batch["words"], self.net
        pictures, texts = net.images(image), net.texts(words)
        others = {"image": image, "words": words, "pictures": pictures, "texts": texts}
        if self.training:  # validation runs in one process alone, which must not wait for the others
            # In one go: two gatherings through which gradients flow back may have theirs mixed up.
            vectors = everywhere(torch.cat([pictures, texts[:, None]], dim=1))
            others = {"image": everywhere(image), "words": everywhere(words), "pictures": vectors[:, :-1],
                      "texts": vectors[:, -1]}  # fmt: skip
        own = alignment.same_words(words, others["words"])
        scale = self.log_scale.exp().clamp(max=100)
        by_image, by_text = (scale * found for found in both_ways(pictures, texts, others))
        soft, said = self._soft(batch, others, scale)
        wanted = (alignment.targets(own, soft and soft[0]), alignment.targets(own, soft and soft[1]))
        itc = alignment.contrast(by_image, by_text, wanted)
        itg = alignment.wording(net.next_words(image, words), words, said)
        return itc + self._matching(batch, others, own, by_image.detach(), by_text.detach()) + itg

    def _matching(self, batch: Features, others: Features, own: Tensor, by_image: Tensor, by_text: Tensor) -> Tensor:
        """ITM ``(B,)``: each pair, its picture with a wrong text, and its text with a wrong picture."""
        image, words = batch["image"], batch["words"]
        text, there = alignment.hard_negatives(by_image, own, batch["lots"][:, 0])
        picture, _ = alignment.hard_negatives(by_text, own, batch["lots"][:, 1])
        logits = self.net.matches(
            torch.cat([image, image, others["image"][picture]]), torch.cat([words, others["words"][text], words])
        )
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        labels[: len(image)] = 1
        right, *wrong = F.cross_entropy(logits, labels, reduction="none").chunk(3)
        return (right + there * (wrong[0] + wrong[1])) / (1 + 2 * there)

    @torch.no_grad()
    def _soft(
        self, batch: Features, others: Features, scale: Tensor
    ) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
        """What the slow model says: similarities both ways, and logits of the words."""
        if self.slow is None:
            return None, None
        pictures, texts = self.slow.images(batch["image"]), self.slow.texts(batch["words"])
        slow = {"pictures": self.slow.images(others["image"]), "texts": self.slow.texts(others["words"])}
        by_image, by_text = (scale * found for found in both_ways(pictures, texts, slow))
        return (by_image, by_text), self.slow.next_words(batch["image"], batch["words"])

    @torch.no_grad()
    def stepped(self) -> None:
        if self.slow is not None:
            for slow, fast in zip(self.slow.parameters(), self.net.parameters(), strict=True):
                slow.lerp_(fast, 1 - self.config.momentum)

    @torch.no_grad()
    def sample(self, examples: Sequence[Example]) -> tuple[dict[str, float], list[list[Image.Image]]]:
        """How many of a few pictures find their own caption among all of theirs."""
        image = torch.stack([row["image"] for row in self.encode(examples)]).to(self.device)
        words = self._words([example.captions[0] for example in examples]).to(self.device)
        nearest = qformer.similarity(self.net.images(image), self.net.texts(words)).argmax(dim=1)
        found = (words[nearest] == words).all(dim=1).float().mean()
        return {"recall_at_1": float(found)}, []

    def save(self, folder: Path) -> None:
        write(folder, "qformer", self.net.config, self.net.state_dict())


def both_ways(pictures: Tensor, texts: Tensor, others: Features) -> tuple[Tensor, Tensor]:
    """Similarities of pictures to all texts and of texts to all pictures, ``(B, N)`` each."""
    to_texts = qformer.similarity(pictures, others["texts"])
    return to_texts, qformer.similarity(others["pictures"], texts).T


TASKS: dict[str, type[Task]] = {
    "controlnet": ControlNetTask,
    "ip-adapter": IPAdapterTask,
    "motion": MotionTask,
    "lora": LoraTask,
    "base": BaseTask,
    "vae": VAETask,
    "clip": CLIPTask,
    "captioner": CaptionerTask,
    "qformer": QFormerTask,
}


def task_of(config: TrainConfig) -> type[Task]:
    """The task that a config asks for."""
    return VideoPromptTask if (config.task, config.projector) == ("ip-adapter", "video") else TASKS[config.task]


def image_encoder_of(config: TrainConfig, pipe: Any) -> tuple[Any, Any]:
    """The vision model that the config names, or the base's, and its image processor."""
    if config.image_encoder is not None:
        return load_encoder(config.image_encoder)
    if getattr(pipe, "image_encoder", None) is None:
        raise MahlstickError(f"image_encoder: {config.base} has none; give a vision model's folder or hub id")
    return pipe.image_encoder, getattr(pipe, "feature_extractor", None)


def tokenizer_of(config: TrainConfig, pipe: Any) -> Any:
    """The tokenizer that the config names, or the base's."""
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer)
    if getattr(pipe, "tokenizer", None) is None:
        raise MahlstickError(f"tokenizer: {config.base} has none; give the folder of one")
    return pipe.tokenizer


def words_of(tokenizer: Any) -> dict[str, int]:
    """How many words a Q-Former knows, [DEC] beside the tokenizer's, and how many it reads."""
    return {"vocabulary": len(tokenizer) + 1, "places": min(tokenizer.model_max_length, qformer.LONGEST)}


def everywhere(rows: Tensor) -> Tensor:
    """(B, …) with the rows of all processes, gradients flowing back to each."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(rows.contiguous()))


def gathered(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor, int]:
    """Both (B, dim) with the rows of all processes, gradients flowing back to each, and this process's first row."""
    if not (dist.is_available() and dist.is_initialized()):
        return one, other, 0
    from torch.distributed.nn.functional import all_gather

    ones, others = torch.cat(all_gather(torch.stack([one, other], dim=1))).unbind(dim=1)
    return ones, others, dist.get_rank() * len(one)


def to_tensor(picture: Image.Image) -> Tensor:
    """(3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)


def to_picture(x: Tensor) -> Image.Image:
    """Of (3, H, W) in [−1, 1]."""
    return Image.fromarray(((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy())


def heads_of(unet: Any, pairs: bool = False) -> int:
    """As many heads as divide all of its widths, up to the eight of AnimateDiff; in ``pairs`` of channels, which rotary
    positions turn."""
    widths = [width // 2 if pairs else width for width in unet.config.block_out_channels]
    return max(heads for heads in range(1, 9) if not any(width % heads for width in widths))


def evenly(items: Sequence[T], count: int) -> list[T]:
    """``count`` of the items, or all, at even distances from the first on."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def vocabulary(tokenizer: Any) -> str:
    """A tokenizer's words and their numbers as a short text."""
    return hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


def check_folder(start: str, part: str = "") -> Path:
    """The folder of a model to go on from. Raises ``MahlstickError`` where there is none."""
    folder = Path(start).expanduser() / part
    if not (folder / "config.json").is_file():
        raise MahlstickError(f"start: {folder} holds no model; give the folder of an earlier result")
    return folder


def check_resolution(resolution: int, step: int) -> None:
    """Raise ``MahlstickError`` for a side that the base's nets cannot halve as often as they do."""
    if resolution % step:
        below = resolution // step * step
        near = " or ".join(str(side) for side in (below, below + step) if side)
        raise MahlstickError(f"resolution: {resolution} is no multiple of {step}, which this base needs; give {near}")


def token_ids(tokenizer: Any, captions: list[str]) -> Tensor:
    """(captions, length), filled up or cut to the encoder's length."""
    length = tokenizer.model_max_length
    found = tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return cast(Tensor, found.input_ids)


@torch.no_grad()
def rest(module: nn.Module) -> None:
    """Lay a module's frozen weights in a file, mapped in their place: they take memory again when they are used."""
    weights = {str(i): p for i, p in enumerate(module.parameters()) if not p.requires_grad}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # the mapping outlives its file's name
        save_file({name: p.contiguous() for name, p in weights.items()}, Path(folder) / "weights.safetensors")
        for name, value in load_file(Path(folder) / "weights.safetensors").items():
            weights[name].data = value


def fingerprint(module: nn.Module) -> str:
    """A module's weights as a short text: what is encoded by other weights must not be mistaken for its own. Those of a
    LoRA in it do not count."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if "lora_" in name:
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
