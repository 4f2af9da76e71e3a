"""What to make, as one typed value: JSON in and out, versioned, checked field by field."""

from __future__ import annotations

import base64
import difflib
import io
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import numpy as np
from PIL import Image
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticSerializationError

from mahlstick.errors import MahlstickError
from mahlstick.pictures import load_mask, load_picture

SIDE_LIMIT = 8192  # pixels
FRAME_LIMIT = 8192  # of a clip: at 8 frames a second a quarter of an hour
SEED_LIMIT = 2**53 - 1  # the largest integer that every JSON reader keeps exact
_DATA_URL = "data:image/png;base64,"


def data_url(picture: Image.Image) -> str:
    """The picture as PNG in a ``data:`` URL."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return _DATA_URL + base64.b64encode(buffer.getvalue()).decode()


def decoded(source: Any, name: str) -> Any:
    """A ``data:`` URL as the bytes of the file in it; every other source as it is."""
    if not (isinstance(source, str) and source.startswith("data:")):
        return source
    try:
        return base64.b64decode(source.partition(",")[2], validate=True)
    except ValueError as error:
        raise MahlstickError(f"{name}: the data URL is not base64; embed a PNG or JPEG as base64") from error


def open_picture(source: Any, name: str, alpha: bool = False) -> Image.Image:
    """:func:`mahlstick.pictures.load_picture` that also reads ``data:`` URLs."""
    return load_picture(decoded(source, name), name=name, alpha=alpha)


def open_mask(source: Any, name: str) -> Image.Image:
    """:func:`mahlstick.pictures.load_mask` that also reads ``data:`` URLs."""
    return load_mask(decoded(source, name), name=name)


def _check_picture(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str | Image.Image | np.ndarray):
        return value
    raise ValueError("should be a path, a PIL picture, a NumPy array or a data URL")


def _check_adapter(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str) or callable(getattr(value, "attach", None)):
        return value
    raise ValueError("should be a path, a name such as 'lineart', or an adapter object")


def _dump_picture(value: Any) -> str:
    return value if isinstance(value, str) else data_url(load_picture(value, alpha=True))


def _dump_mask(value: Any) -> str:
    return value if isinstance(value, str) else data_url(load_mask(value))


def _dump_adapter(value: Any) -> str:
    if isinstance(value, str):
        return value
    raise MahlstickError(
        f"adapter: {type(value).__name__} objects cannot be written as JSON; save_pretrained it and give the path"
    )


def _json(dump: Callable[[Any], str]) -> PlainSerializer:
    return PlainSerializer(dump, return_type=str, when_used="json-unless-none")


Picture = Annotated[Any, BeforeValidator(_check_picture), _json(_dump_picture)]
Mask = Annotated[Any, BeforeValidator(_check_picture), _json(_dump_mask)]
AdapterSource = Annotated[Any, BeforeValidator(_check_adapter), _json(_dump_adapter)]
Scale = Annotated[float, Field(ge=-10.0, le=10.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Side = Annotated[int, Field(ge=8, le=SIDE_LIMIT, multiple_of=8)]
Seed = Annotated[int, Field(ge=0, le=SEED_LIMIT)]


def _field(location: Iterable[int | str]) -> str:
    """("controls", 0, "scale") -> "controls[0].scale"; pydantic's names for the arms of a union are left out."""
    text = ""
    for part in location:
        if isinstance(part, str) and not part.isidentifier():
            continue
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _known_fields(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    inner = get_args(model.model_fields[str(location[0])].annotation) if len(location) > 1 else ()
    return list((inner[0] if inner else model).model_fields)


def one_line(model: type[BaseModel], error: ValidationError) -> str:
    """The first fault of a ValidationError as a sentence that names the field."""
    faults = error.errors(include_url=False)
    # Of the arms of a union (a number or a list) the one that got furthest is the one that was meant.
    fault = max((f for f in faults if f["loc"][:1] == faults[0]["loc"][:1]), key=lambda f: len(f["loc"]))
    location = fault["loc"]
    message = fault["msg"].removeprefix("Value error, ").replace("Input should", "should").rstrip(".")
    given = fault.get("input")
    if fault["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(location[-1]), _known_fields(model, location), n=1)
        message = f"is not a field{f'; did you mean {close[0]}?' if close else ''}"
    elif location == ("version",):
        message = f"{given!r} is not known here; it was written by a newer mahlstick: update this one"
    elif fault["type"] == "missing":
        message = "is missing"
    elif fault["type"] == "json_invalid":
        return f"{model.__name__.lower()}: not valid JSON ({message})"
    elif isinstance(given, str | int | float) and fault["type"] != "value_error":
        message += f", not {str(given)[:60]!r}" if isinstance(given, str) else f", not {given}"
    field = _field(location)
    return f"{field}: {message}" if field else message


class Spec(BaseModel):
    """A pydantic model whose faults are :class:`MahlstickError` sentences."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise MahlstickError(one_line(type(self), error)) from None

    # Without this mark pydantic would call __init__ for nested specs too, and the outer field names would be lost.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Reads what :meth:`to_json` wrote, by this or an earlier version."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise MahlstickError(one_line(cls, error)) from None

    def to_json(self, indent: int | None = 2) -> str:
        """JSON text; pictures given as objects become ``data:`` URLs, adapters given as objects are refused."""
        try:
            return json.dumps(self.model_dump(mode="json"), indent=indent, ensure_ascii=False)
        except PydanticSerializationError as error:
            raise (error.__cause__ if isinstance(error.__cause__, MahlstickError) else error) from None


class _Unit(Spec):
    adapter: AdapterSource
    start: Fraction = 0.0
    end: Fraction = 1.0
    window: Literal["steps", "noise"] = Field("steps", description="of what start and end are fractions")
    mask: Mask | None = None

    @model_validator(mode="after")
    def _forward(self) -> Self:
        if self.start >= self.end:
            raise ValueError(f"start {self.start:g} is not before end {self.end:g}; give a smaller start")
        return self


class ControlSpec(_Unit):
    """A control net and the picture it follows."""

    scale: Scale | list[Scale] = 1.0
    adapter: AdapterSource = Field(description="path or hub id of the weights, or an embedded net such as 'lineart'")
    image: Picture = Field(description="the control picture, or with annotator the picture it is made from")
    annotator: str | None = Field(None, description="makes the control picture from image, e.g. 'canny'")
    options: dict[str, Any] = Field(default_factory=dict, description="of the annotator")
    mode: Literal["balanced", "prompt", "control", "guess"] = "balanced"
    resize: Literal["stretch", "crop", "pad"] = "stretch"


class Found(Spec):
    """A picture that words have found in a library."""

    file: str = Field(min_length=1, description="its name in the library")
    sha256: str = Field(pattern=r"[0-9a-f]{64}")


class ImagePromptSpec(_Unit):
    """An IP-Adapter and its reference pictures, or the words that find them in a library."""

    scale: Scale = 1.0
    adapter: AdapterSource = Field(
        "ip-adapter", description="path or hub id of the weights; left open, the embedded one"
    )
    image_encoder: str | None = Field(
        None, description="folder or hub id of the CLIP, SigLIP or DINOv2 that the adapter reads, where needed"
    )
    search: str | None = Field(None, min_length=1, description="in place of images, words that find them in a library")
    library: str | None = Field(None, description="file of the library; left open, library.sqlite")
    count: int = Field(1, ge=1, le=64, description="how many pictures search takes")
    least: float | None = Field(None, ge=-1.0, le=1.0, description="similarity that they must have")
    found: list[Found] = Field(
        default_factory=list, max_length=64, description="what search found; given, it finds these again"
    )
    images: list[Picture] = Field(default_factory=list, max_length=64, validate_default=True)
    resize: Literal["crop", "pad", "stretch"] = Field("crop", description="of references that are not square")
    blocks: Literal["all", "style", "layout"] | dict[str, Scale] = "all"
    negative: Picture | None = None

    @field_validator("images")
    @classmethod
    def _references(cls, images: list[Any], info: ValidationInfo) -> list[Any]:
        words, found = info.data.get("search"), info.data.get("found")
        if not images and words is None:
            raise ValueError("give at least one picture, or search, the words that find one in a library")
        if images and words is not None and not found:
            raise ValueError("search is given too; keep one")
        return images


def read_fields(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of a request in a JSON file, not yet checked: others may complete them."""
    try:
        fields = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise MahlstickError(f"{path}: cannot be read ({error.strerror}); give a JSON request file") from error
    except ValueError as error:
        raise MahlstickError(f"{path}: request: not valid JSON ({error})") from error
    if not isinstance(fields, dict):
        raise MahlstickError(f"{path}: request: should be a JSON object, not a {type(fields).__name__}")
    return fields


class _Making(Spec):
    """What pictures and clips have in common."""

    version: Literal[1] = 1
    prompt: str = Field(max_length=20_000)
    negative_prompt: str = Field("", max_length=20_000)
    base: str = Field("embedded", min_length=1, description="'embedded', a folder, a hub id or a .safetensors file")
    base_config: str | None = Field(None, description="folder or hub id with the configs of a single-file base")
    seed: Seed | None = Field(None, description="of several pictures the next has seed + 1; left open, one is drawn")
    steps: int = Field(20, ge=1, le=1000)
    guidance: float | None = Field(
        None,
        ge=0.0,
        le=100.0,
        description="left open, diffusers' default for the pipeline, and 4 for the embedded base",
    )
    width: Side | None = None
    height: Side | None = None
    scheduler: str | None = Field(None, description="a short or diffusers' name; left open, the base model's own")
    strength: float | None = Field(
        None, gt=0.0, le=1.0, description="how much of init is repainted; left open, 0.8, and 1 when inpainting"
    )
    image_prompts: list[ImagePromptSpec] = Field(default_factory=list, max_length=32)

    @model_validator(mode="after")
    def _both_sides(self) -> Self:
        if (self.width is None) != (self.height is None):
            raise ValueError("width and height: give both or neither")
        return self

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a request from a JSON file; paths in it are relative to the working directory."""
        fields = read_fields(path)
        try:
            return cls(**fields)
        except MahlstickError as error:
            raise MahlstickError(f"{path}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the request as JSON, all or nothing."""
        target = Path(path)
        part = target.with_name(f".{target.name}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(self.to_json() + "\n", encoding="utf-8")
            os.replace(part, target)
        except OSError as error:
            raise MahlstickError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
        finally:
            part.unlink(missing_ok=True)
        return target


class Request(_Making):
    """What to make. Every field has a default but the prompt, and ``generate`` fills in what was left open."""

    seeds: list[Seed] | None = Field(None, min_length=1, max_length=10_000, description="one per picture")
    images: int = Field(1, ge=1, le=10_000, description="how many pictures")
    batch: int = Field(1, ge=1, le=256, description="how many go through the model together")
    init: Picture | None = Field(None, description="image-to-image: the picture to start from")
    mask: Mask | None = Field(None, description="inpainting: white is repainted, black stays byte for byte")
    controls: list[ControlSpec] = Field(default_factory=list, max_length=32)

    @model_validator(mode="before")
    @classmethod
    def _count(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and "images" not in fields and isinstance(fields.get("seeds"), list):
            return {**fields, "images": max(len(fields["seeds"]), 1)}
        return fields

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.seeds is not None and self.seed is not None:
            raise ValueError("seed and seeds are both given; keep one")
        if self.seeds is not None and len(self.seeds) != self.images:
            raise ValueError(f"seeds: {len(self.seeds)} seeds for {self.images} images; give one each")
        if self.mask is not None and self.init is None:
            raise ValueError("mask: inpainting needs init, the picture to repaint")
        strength = self.effective_strength
        if self.init is not None and int(self.steps * strength) < 1:
            raise ValueError(f"strength: {strength:g} of {self.steps} steps leaves no step; raise strength or steps")
        return self

    @property
    def task(self) -> Literal["text", "img2img", "inpaint"]:
        return "text" if self.init is None else "img2img" if self.mask is None else "inpaint"

    @property
    def effective_strength(self) -> float:
        """``strength``, or what it is when left open."""
        return self.strength if self.strength is not None else 1.0 if self.mask is not None else 0.8


class ClipControlSpec(ControlSpec):
    """A control net and what it follows: a video, a picture for all frames, or a list with one for each."""

    image: list[Picture] | Picture = Field(description="a video, a folder of frames, a picture, or a picture a frame")
    at: list[int] | None = Field(
        None, description="of a SparseCtrl encoder: the frames of the pictures, from the end if negative"
    )


class MotionLora(Spec):
    """A LoRA of a motion module, such as a camera's movement."""

    path: str = Field(min_length=1)
    scale: Scale = 1.0


class VideoRequest(_Making):
    """The clip to make. Every field has a default but the prompt, and ``animate`` fills in what was left open."""

    frames: int | None = Field(
        None, ge=2, le=FRAME_LIMIT, description="left open, those of init or of a control video, else 16"
    )
    fps: float | None = Field(
        None, gt=0, le=240, description="frames a second; left open, those of init or of a control video, else 8"
    )
    prompts: dict[int, str] = Field(
        default_factory=dict, max_length=1000, description="from these frames on other prompts, and mixtures between"
    )
    init: str | None = Field(None, min_length=1, description="video to video: the video or folder of frames")
    audio: str | None = Field(None, min_length=1, description="a file whose sound is kept; left open, init's")
    controls: list[ClipControlSpec] = Field(default_factory=list, max_length=32)
    motion: AdapterSource = Field(
        "motion", description="path or hub id of the motion module; left open, the embedded one"
    )
    motion_scale: Scale = Field(1.0, description="how strongly the frames mix")
    motion_loras: list[MotionLora] = Field(default_factory=list, max_length=32)
    norm: Literal["frame", "clip"] | None = Field(None, description="left open, what the module's file implies")
    context: int | None = Field(None, ge=2, description="frames of a window over a long clip; left open, 16")
    overlap: int | None = Field(None, ge=0, description="frames that two windows share; left open, a quarter")
    schedule: Literal["uniform", "static", "looped"] = "uniform"
    extend: Literal["none", "interpolate", "ntk", "repeat"] = Field(
        "none", description="stretch the module's positions over a long clip in place of windows"
    )
    free_noise: bool | None = Field(
        None, description="begin all windows from the same noise, shuffled; left open, where there are windows"
    )
    free_init: int = Field(0, ge=0, le=10, description="passes more, each from the last one's slow part")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.frames is not None:
            self._check_places(self.frames)
        if self.strength is not None and self.init is None:
            raise ValueError("strength: tells how much of init is repainted; give init, or leave it out")
        if self.init is not None and self.free_init:
            raise ValueError("free_init: is for clips from words alone; leave it out, or init")
        if int(self.steps * self.effective_strength) < 1:
            raise ValueError(
                f"strength: {self.effective_strength:g} of {self.steps} steps leaves no step; raise strength or steps"
            )
        return self

    def _check_places(self, frames: int) -> None:
        """Raise ``ValueError`` where a prompt or a control picture stands outside of the clip."""
        named = [("prompts", frame) for frame in self.prompts if not 0 <= frame < frames]
        for i, spec in enumerate(self.controls):
            named += [(f"controls[{i}].at", frame) for frame in spec.at or [] if not -frames <= frame < frames]
        for name, frame in named:
            raise ValueError(f"{name}: frame {frame} is none of the clip's, which are 0 to {frames - 1}")

    @property
    def effective_strength(self) -> float:
        """``strength``, or what it is when left open."""
        return self.strength if self.strength is not None else 0.8 if self.init is not None else 1.0
