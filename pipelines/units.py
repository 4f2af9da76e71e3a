"""Units: an adapter with its condition and its dose, ready to be clipped on a pipeline."""

from __future__ import annotations

import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mahlstick import pictures
from mahlstick.adapters.base import Attachment, Clock, Excerpt, Window
from mahlstick.adapters.context import Fuse, Schedule
from mahlstick.adapters.controlnet import ControlAttachment, ControlNet, Mode, shown
from mahlstick.adapters.ip_adapter import Blocks, ImageAttachment, IPAdapter
from mahlstick.adapters.motion import MotionAdapter, MotionAttachment, Norm
from mahlstick.adapters.positions import Extension, sample_sparsely
from mahlstick.adapters.sparse_control import SparseAttachment, SparseControlNet
from mahlstick.adapters.travel import TextAttachment
from mahlstick.errors import MahlstickError
from mahlstick.pipelines.prompts import embeddings, parse_weights

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, UNet2DConditionModel

    from mahlstick.pipelines.library import Hit, Library

_AT_ONCE = 16  # references that go through the image encoder together

# What a person may hand over as a picture: a path, a PIL picture, NumPy (H, W[, C]) or torch (batch, 3, H, W).
PictureLike = str | Path | Image.Image | np.ndarray[Any, Any] | Tensor


class Unit(ABC):
    """An adapter with its condition and its dose."""

    @abstractmethod
    def prepare(self, unet: UNet2DConditionModel, clock: Clock, pipe: DiffusionPipeline | None) -> Attachment:
        """Check everything and return the attachment, not yet fastened.

        Raises ``MahlstickError`` where the unit does not fit.
        """


@dataclass(eq=False)
class Control(Unit):
    """A ControlNet with its control picture.

    ``image``: one picture, or a list with one for each picture of the batch; a tensor ``(n, 3, H, W)`` in [0, 1] is
    used as it is, other pictures are brought to the size that is made (``resize``: stretch, crop or pad).
    ``scale``: a number, or one for each residual in the order of the network, the middle block last.
    ``start``, ``end``: fractions of the steps, or of the noise schedule with ``window="noise"``.
    ``mask``: 1 or white where the unit acts. ``mode``: ``balanced``, ``prompt``, ``control`` or ``guess``.
    A SparseCtrl encoder has pictures of some frames of a clip: ``at`` says of which (negative ones from the end),
    ``frames`` how many a clip has, left out all of the call's.
    """

    net: ControlNet
    image: PictureLike | Sequence[PictureLike]
    scale: float | Sequence[float] = 1.0
    start: float = 0.0
    end: float = 1.0
    mask: PictureLike | None = None
    mode: Mode = "balanced"
    resize: pictures.ResizeMode = "stretch"
    window: Literal["steps", "noise"] = "steps"
    at: Sequence[int] | None = None
    frames: int | None = None

    def prepare(self, unet: UNet2DConditionModel, clock: Clock, pipe: DiffusionPipeline | None) -> ControlAttachment:
        if not isinstance(self.net, ControlNet):
            raise MahlstickError(f"Control takes a ControlNet; got {type(self.net).__name__}.")
        image = _Resized(self.image, self.resize)
        mask, window = as_mask(self.mask), Window(self.start, self.end, self.window)
        if isinstance(self.net, SparseControlNet):
            given = _Latents(image, pipe) if self.net.takes_latents else image
            where = (self.at, self.frames)
            return SparseAttachment(self.net, unet, given, *where, self.scale, mask, self.mode, window, clock)
        if self.at is not None:
            raise MahlstickError("at= is for a SparseCtrl encoder: a ControlNet has a picture for every frame.")
        return ControlAttachment(self.net, unet, image, self.scale, mask, self.mode, window, clock)


@dataclass(eq=False)
class ImagePrompt(Unit):
    """An IP-Adapter with its reference pictures.

    ``images``: one reference; a list as long as the batch (one each); any other list (all of them for every picture);
    or a list of lists (for each picture of the batch its own). ``features`` is the encoder's output instead of
    pictures, pooled ``(n, feature_dim)`` or per patch ``(n, length, feature_dim)``. An adapter with a video projector
    takes ``video`` in their place: a sequence of frames, of which it sees some, evenly spaced. Or ``search`` are words
    that find ``count`` references in a ``library`` (a `Library` or its file), all of which every picture takes after;
    ``least`` is the similarity that they must have. ``found`` tells what was found, which stays for this unit.
    ``negative``, ``negative_features``: what the unconditional half sees; without them no picture.
    ``resize``: what becomes of a reference that is not square: its middle (crop, as the encoders' own preparation
    does), all of it with a margin (pad) or out of shape (stretch).
    ``mask``: 1 or white where the unit acts. ``blocks``: ``all``, ``style``, ``layout`` or a share for each block by
    name. ``prompt``: what the pipeline is called with, for an adapter whose projector reads it, one or one for each
    prompt of the call; others take no notice. What the unconditional half sees is read with the empty prompt.
    """

    adapter: IPAdapter
    images: PictureLike | Sequence[PictureLike] | Sequence[Sequence[PictureLike]] | None = None
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mask: PictureLike | None = None
    blocks: Blocks = "all"
    negative: PictureLike | Sequence[PictureLike] | None = None
    features: Tensor | None = None
    negative_features: Tensor | None = None
    resize: pictures.ResizeMode = "crop"
    window: Literal["steps", "noise"] = "steps"
    video: Sequence[PictureLike] | None = None
    prompt: str | Sequence[str] | None = None
    search: str | None = None
    library: Library | str | Path | None = None
    count: int = 1
    least: float | None = None
    found: list[Hit] | None = field(default=None, init=False)

    def prepare(self, unet: UNet2DConditionModel, clock: Clock, pipe: DiffusionPipeline | None) -> ImageAttachment:
        if not isinstance(self.adapter, IPAdapter):
            raise MahlstickError(f"ImagePrompt takes an IPAdapter; got {type(self.adapter).__name__}.")
        window, mask = Window(self.start, self.end, self.window), as_mask(self.mask)
        # Built once without tokens, so that a unit that does not fit is refused before any picture is encoded.
        attachment = ImageAttachment(
            self.adapter, unet, torch.empty(0), None, self.scale, mask, self.blocks, window, clock
        )
        if attachment.acts:
            self.adapter.widen(unet.dtype)  # before it makes tokens of the pictures
            attachment.use(*self._tokens(pipe))
        return attachment

    @torch.no_grad()
    def _tokens(self, pipe: DiffusionPipeline | None) -> tuple[_References, _References]:
        encoder = (getattr(pipe, "image_encoder", None), getattr(pipe, "feature_extractor", None))
        groups = [1]
        if sum(given is not None for given in (self.images, self.video, self.features, self.search)) != 1:
            raise MahlstickError("ImagePrompt needs either images=, video=, features= or search=.")
        if self.features is None and (self.video is not None) != (self.adapter.config["projector"] == "video"):
            raise MahlstickError(
                "an adapter with a video projector takes video=, every other one images=; this one's is "
                f"{self.adapter.config['projector']}."
            )
        if self.features is not None:
            features, nothing = self.features, torch.zeros_like(self.features[:1])
            if not bool(torch.isfinite(features).all()):
                raise MahlstickError("features hold NaN or infinity; give the image encoder's output.")
        elif self.video is not None:
            seen = sample_sparsely(len(self.video), self.adapter.config["frames"])
            frames = _flat([self.video[place] for place in seen], "frame")
            features, nothing = self.adapter.features([self._square(frame) for frame in frames], encoder)
        else:
            references, groups = _grouped(self.images if self.search is None else [self._searched(self.search)])
            features, nothing = self._encoded(references, encoder)
        if self.negative_features is not None:
            nothing = self.negative_features
        elif self.negative is not None:
            nothing, _ = self.adapter.features([self._square(n) for n in _flat(self.negative, "negative")], encoder)
        if not self.adapter.reads:
            tokens = _References(self.adapter.tokens(features), groups)
            return tokens, _References(self.adapter.tokens(nothing), [1])
        words, empty = self._words(pipe)
        features, words, groups = _paired(features, words, groups)
        tokens = _References(self.adapter.tokens(features, words), groups)
        return tokens, _References(self.adapter.tokens(nothing, empty), [1])

    def _searched(self, words: str) -> list[PictureLike]:
        """The pictures that the words find, looked for once."""
        from mahlstick.pipelines.library import LIBRARY, Library

        if self.found is None:
            library = self.library if isinstance(self.library, Library) else Library(self.library or LIBRARY)
            self.found = library.references(words, self.count, self.least)
        return [hit.file for hit in self.found]

    def _words(self, pipe: DiffusionPipeline | None) -> tuple[Tensor, Tensor]:
        """The prompts without their weights, and the empty one, as the adapter's projector reads them."""
        if self.prompt is None:
            raise MahlstickError("this IP-Adapter's projector reads the prompt: give prompt= to ImagePrompt.")
        prompts = [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)
        texts = ["".join(text for text, _ in parse_weights(prompt)) for prompt in prompts]
        words = self.adapter.words([*texts, ""], getattr(pipe, "tokenizer", None))
        return words[:-1], words[-1:]

    def _encoded(self, references: Sequence[Image.Image], encoder: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
        """Features of the references, a few at a time, and of none."""
        starts = range(0, len(references), _AT_ONCE)
        chunks = [[self._square(reference) for reference in references[start : start + _AT_ONCE]] for start in starts]
        features, nothings = zip(*(self.adapter.features(chunk, encoder) for chunk in chunks), strict=True)
        return torch.cat(features), nothings[0]

    def _square(self, picture: Image.Image) -> Image.Image:
        side = max(picture.size)
        return picture if self.resize == "crop" else pictures.resize(picture, (side, side), self.resize)


@dataclass(eq=False)
class Motion(Unit):
    """A motion module: the pictures that one prompt makes in a call are the frames of a clip.

    ``frames``: of a clip, left out all of the call's; give it with several prompts. ``scale``: how strongly the frames
    mix. ``norm``: ``frame`` or ``clip``, left out as the module's file implies.
    A longer clip than the module's positions tell apart is made in windows of ``context`` frames (left out, 16), of
    which ``overlap`` are the next one's too (left out, a quarter); ``schedule``: ``uniform``, ``static`` or ``looped``
    (the end flows into the beginning); ``fuse``: how windows are averaged, ``pyramid`` or ``flat``. Or ``extend``
    stretches the positions over all of it: ``interpolate``, ``ntk`` or ``repeat``.
    ``mask``: white where it moves.
    """

    module: MotionAdapter
    frames: int | None = None
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    norm: Norm | None = None
    context: int | None = None
    overlap: int | None = None
    schedule: Schedule = "uniform"
    fuse: Fuse = "pyramid"
    extend: Extension = "none"
    mask: PictureLike | None = None
    window: Literal["steps", "noise"] = "steps"

    def prepare(self, unet: UNet2DConditionModel, clock: Clock, pipe: DiffusionPipeline | None) -> MotionAttachment:
        if not isinstance(self.module, MotionAdapter):
            raise MahlstickError(f"Motion takes a MotionAdapter; got {type(self.module).__name__}.")
        window = Window(self.start, self.end, self.window)
        return MotionAttachment(
            self.module,
            unet,
            self.frames,
            self.scale,
            self.norm,
            self.extend,
            self.context,
            self.overlap,
            self.schedule,
            self.fuse,
            as_mask(self.mask),
            window,
            clock,
        )


@dataclass(eq=False)
class PromptTravel(Unit):
    """Prompts that change over a clip: each is the text of its frame, and frames between two have the mixture of both.

    ``prompts``: by the number of the frame, counted from 0; ``(word:1.2)`` weighs here too. They stand in place of the
    pipeline's own prompt, whose negative stays. ``frames``: of a clip, left out all of the call's.
    """

    prompts: Mapping[int, str]
    frames: int | None = None

    def prepare(self, unet: UNet2DConditionModel, clock: Clock, pipe: DiffusionPipeline | None) -> TextAttachment:
        if pipe is None:
            raise MahlstickError("PromptTravel needs the text encoder: attach it to the pipeline, not to its UNet.")
        if not self.prompts:
            raise MahlstickError("PromptTravel has no prompts: give them by frame, e.g. {0: 'spring', 32: 'winter'}.")
        for frame in self.prompts:
            if not isinstance(frame, int) or not 0 <= frame < (self.frames or sys.maxsize):
                length = f"; the clip has {self.frames} frames" if self.frames else ""
                raise MahlstickError(f"prompts: frame {frame!r} must be a whole number from 0 on{length}.")
        keys = sorted(self.prompts)
        text, pooled = embeddings(pipe, [self.prompts[frame] for frame in keys])
        return TextAttachment(unet, keys, text, pooled, self.frames, clock)


class _Resized:
    """Control pictures at whatever size is made: ``(height, width)`` to ``(n, 3, height, width)``.

    A sequence that is no list, as that of a video's frames, is left where it is and read as its pictures are seen.
    """

    def __init__(self, image: Any, mode: pictures.ResizeMode) -> None:
        self.mode = mode
        if mode not in get_args(pictures.ResizeMode):
            raise MahlstickError(f"resize must be one of {', '.join(get_args(pictures.ResizeMode))}; got {mode!r}.")
        if isinstance(image, (list, tuple)) and image and all(isinstance(one, Tensor) for one in image):
            image = torch.cat([_checked(one) for one in image])
        self.tensor = _checked(image) if isinstance(image, Tensor) else None
        lazy = self.tensor is None and _is_lazy(image)
        given = [] if self.tensor is not None else image if lazy else _flat(image, "control picture")
        self.pictures: Sequence[Image.Image] = given

    def __call__(self, height: int, width: int, excerpt: Excerpt | None) -> Tensor:
        return shown(self.tensor, excerpt) if self.tensor is not None else self._resized(height, width, excerpt)

    # A compiled UNet asks once, and there is nothing to compile in Pillow.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _resized(self, height: int, width: int, excerpt: Excerpt | None) -> Tensor:
        count = len(self.pictures)
        places = range(count) if excerpt is None or count == 1 else excerpt.of(count)
        seen = [self.pictures[place] for place in places]
        for picture in seen:
            if self.mode == "stretch" and pictures.aspect_differs(picture, (width, height)):
                warnings.warn(
                    f"a control picture of {picture.width}x{picture.height} is stretched to {width}x{height}; "
                    "resize='crop' or 'pad' keeps its proportions",
                    stacklevel=2,
                )
        sized = [pictures.resize(picture, (width, height), self.mode) for picture in seen]
        return torch.stack([_to_tensor(picture) for picture in sized])


class _Latents:
    """Control pictures as the latents that a SparseCtrl encoder for colour pictures takes, made once for each size.

    They are the mean of what the VAE's encoder gives; the original and diffusers draw from it. A tensor of latents is
    used as it is.
    """

    def __init__(self, image: _Resized, pipe: Any) -> None:
        self.image, self.pipe = image, pipe
        self._made: dict[tuple[int, int], Tensor] = {}
        self.given = image.tensor if image.tensor is not None and image.tensor.shape[1] != 3 else None
        if self.given is None and pipe is None:
            raise MahlstickError(
                "this SparseCtrl encoder takes latents: attach to a pipeline, whose VAE makes them, or give them as a "
                "tensor."
            )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def __call__(self, height: int, width: int, excerpt: Excerpt | None) -> Tensor:
        if self.given is not None:
            return self.given
        if (height, width) not in self._made:
            vae, factor = self.pipe.vae, self.pipe.vae_scale_factor
            picture = self.image(height * factor, width * factor, None).to(self.pipe._execution_device, vae.dtype)
            latents = [vae.encode(2 * one - 1).latent_dist.mode() for one in picture.split(1)]
            self._made[height, width] = torch.cat(latents) * vae.config.scaling_factor
        return self._made[height, width]


class _References:
    """Image tokens by picture of the batch: ``n`` references in groups, one group for each picture or one for all."""

    def __init__(self, tokens: Tensor, groups: list[int]) -> None:
        self.tokens, self.groups = tokens, groups

    def __call__(self, batch: int) -> Tensor:
        if self.groups == [1] and len(self.tokens) == batch:
            return self.tokens
        if len(self.groups) == 1:
            return _joined(self.tokens)
        return torch.cat([_joined(group) for group in self.tokens.split(self.groups)])


def _paired(features: Tensor, words: Tensor, groups: list[int]) -> tuple[Tensor, Tensor, list[int]]:
    """A reference and words in each row, and the rows' groups: of several prompts one for each. References that are in
    no groups are a prompt's own where they are as many, and otherwise all prompts'."""
    prompts, references = len(words), len(features)
    if prompts == 1:
        return features, words.expand(references, -1), groups
    if len(groups) == 1:
        own = groups == [1] and references == prompts
        groups = [1 if own else references] * prompts
        features = features.repeat(sum(groups) // references, *[1] * (features.ndim - 1))
    if len(groups) != prompts:
        raise MahlstickError(f"prompt: {prompts} prompts do not go with {len(groups)} groups of references.")
    return features, words.repeat_interleave(torch.tensor(groups), dim=0), groups


def _joined(tokens: Tensor) -> Tensor:
    """Tokens ``(n, t, d)`` of n references as one longer prompt ``(1, n · t, d)``."""
    return tokens.flatten(0, 1)[None]


def _is_lazy(images: Any) -> bool:
    """Whether pictures are read one at a time, as a video's frames are."""
    return isinstance(images, Sequence) and not isinstance(images, (str, list, tuple)) and len(images) > 0


def _grouped(images: Any) -> tuple[Sequence[Image.Image], list[int]]:
    """References in one list, and how many each picture has; ``[1]`` where a flat list leaves that open."""
    if _is_lazy(images):
        return images, [1]
    if isinstance(images, (list, tuple)) and any(isinstance(i, (list, tuple)) for i in images):
        groups = [_flat(group, "reference") for group in images]
        if len({len(group) for group in groups}) != 1:
            raise MahlstickError(
                "every picture of the batch needs the same number of references; repeat one where it has fewer."
            )
        return [picture for group in groups for picture in group], [len(group) for group in groups]
    return _flat(images, "reference"), [1]


def _flat(images: Any, name: str) -> list[Image.Image]:
    """One picture or several, as RGB pictures."""
    if isinstance(images, Tensor):
        images = [_from_tensor(row) for row in _checked(images)]
    elif isinstance(images, np.ndarray) and images.ndim == 4:
        images = list(images)
    elif not isinstance(images, (list, tuple)):
        images = [images]
    if not images:
        raise MahlstickError(f"no {name} was given: the list is empty.")
    flat = [_from_tensor(image) if isinstance(image, Tensor) else image for image in images]
    return [pictures.load_picture(image, name=name) for image in flat]


def _checked(image: Tensor) -> Tensor:
    if image.ndim == 3:
        image = image[None]
    if image.ndim != 4 or not image.is_floating_point() or not bool(torch.isfinite(image).all()):
        raise MahlstickError(
            f"a picture as a tensor must be finite floats of shape (batch, 3, H, W); "
            f"got {image.dtype} {tuple(image.shape)}."
        )
    return image


def _from_tensor(image: Tensor) -> Image.Image:
    image = _checked(image)[0]
    image = image.expand(3, -1, -1) if image.shape[0] == 1 else image
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def _to_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture, dtype=np.float32) / 255.0).permute(2, 0, 1)


def as_mask(mask: Any) -> Tensor | None:
    """A mask ``(n, 1, H, W)`` in [0, 1] from a picture, a path, an array or a tensor ``([n, [1,]] H, W)``."""
    if mask is None:
        return None
    if isinstance(mask, Tensor):
        mask = mask[None] if mask.ndim == 2 else mask
        mask = mask[:, None] if mask.ndim == 3 else mask
        if mask.ndim != 4 or mask.shape[1] != 1 or not bool(((mask >= 0) & (mask <= 1)).all()):
            raise MahlstickError(f"a mask as a tensor must be (n, 1, H, W) in [0, 1]; got shape {tuple(mask.shape)}.")
        return mask.float()
    picture = pictures.load_mask(mask, name="mask")
    return torch.from_numpy(np.array(picture, dtype=np.float32) / 255.0)[None, None]
