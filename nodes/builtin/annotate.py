"""Nodes that make control pictures: ComfyUI's Canny, and this suite's annotators.

The annotators go by the class names and inputs of comfyui_controlnet_aux where one does the same work; they are this
suite's own, so lines and depths are like those, not equal. Weights load when a node first runs.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

import cv2
import numpy as np
import torch
from torch import Tensor

from mahlstick import pictures
from mahlstick.annotators import registry
from mahlstick.errors import MahlstickError
from mahlstick.nodes import progress
from mahlstick.nodes.builtin.images import MAX_SIDE
from mahlstick.nodes.resample import from_picture, not_empty, paired, resized_mask, to_picture
from mahlstick.nodes.schema import Widget, node
from mahlstick.nodes.values import ImageT, MaskT

Threshold = Annotated[float, Widget(min=0.01, max=0.99, step=0.01)]
Level = Annotated[int, Widget(min=0, max=255, step=1, optional=True)]
Enabled = Annotated[str, Widget(choices=("enable", "disable"), optional=True)]
Disabled = Annotated[str, Widget(choices=("disable", "enable"), optional=True)]
Resolution = Annotated[
    int, Widget(min=64, max=MAX_SIDE, step=64, optional=True, tooltip="Pixels of the result's shorter side.")
]


@node("image/preprocessors")
def Canny(*, image: ImageT, low_threshold: Threshold = 0.4, high_threshold: Threshold = 0.8) -> ImageT:
    """Canny edges of the blurred brightness, white on black.

    The thresholds are lengths of Sobel's gradient of a brightness in [0, 1]. As ComfyUI's node, which is kornia's;
    OpenCV follows the edges here, and keeps one of two equally strong neighbours where kornia drops both.
    """
    if low_threshold > high_threshold:
        raise MahlstickError(f"low_threshold {low_threshold} exceeds high_threshold {high_threshold}; exchange them.")
    edges = [_canny(each.cpu().float().numpy(), low_threshold, high_threshold) for each in not_empty(image)[..., :3]]
    return torch.from_numpy(np.stack(edges)).float()[..., None].expand(-1, -1, -1, 3) / 255


def _canny(pixels: np.ndarray[Any, Any], low: float, high: float) -> np.ndarray[Any, Any]:
    brightness = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    blurred = cv2.GaussianBlur(brightness, (5, 5), 1.0)
    unit = 8000  # OpenCV takes gradients of 16 bits, and Sobel's reach 4
    across, down = (
        (unit * cv2.Sobel(blurred, cv2.CV_32F, *order, borderType=cv2.BORDER_REPLICATE)).round().astype(np.int16)
        for order in ((1, 0), (0, 1))
    )
    edges: np.ndarray[Any, Any] = cv2.Canny(across, down, unit * low, unit * high, L2gradient=True)
    return edges


def annotated(image: Tensor, annotator: str, resolution: int, /, **options: Any) -> Tensor:
    """What an annotator makes of each picture, scaled first so that the shorter side is ``resolution`` pixels."""
    found = registry.get(annotator)
    own = found.options.get("resolution")
    if own is not None and own.range is not None:
        options.setdefault("resolution", min(resolution, int(own.range.high)))
    made = []
    for index, each in enumerate(not_empty(image)[..., :3]):
        picture = to_picture(each)
        factor = resolution / min(picture.size)
        scaled = pictures.resize(picture, (round(picture.width * factor), round(picture.height * factor)))
        made.append(from_picture(found(scaled, **options)))
        progress.report(index + 1, len(image))
    return torch.stack(made)


@node("annotators", display_name="Annotate")
def MahlstickAnnotate(
    *,
    image: ImageT,
    annotator: Annotated[str, Widget(choices=registry.names)],
    resolution: Resolution = 512,
    options: Annotated[str, Widget(multiline=True, optional=True, tooltip='JSON, such as {"low": 50}.')] = "{}",
) -> ImageT:
    """A control picture by any annotator of this suite, with its own options as JSON."""
    try:
        given = json.loads(options or "{}")
    except ValueError as error:
        raise MahlstickError(f'options is not JSON ({error}); write it like {{"low": 50}}.') from error
    if not isinstance(given, dict):
        raise MahlstickError(f'options is {options!r}; write an object like {{"low": 50}}.')
    for name, option in registry.get(annotator).options.items():
        is_free = option.type is object or (option.type is str and not option.choices)
        if name in given and is_free:  # would let a workflow of somebody else's name any file or hub id
            raise MahlstickError(f"options: {name} cannot be set by a workflow; leave it out.")
    return annotated(image, annotator, resolution, **given)


_LINES = "ControlNet Preprocessors/Line Extractors"
_SHAPES = "ControlNet Preprocessors/Normal and Depth Estimators"
_POSES = "ControlNet Preprocessors/Faces and Poses Estimators"
_COLOURS = "ControlNet Preprocessors/T2IAdapter-only"


@node(_LINES, display_name="Canny Edge")
def CannyEdgePreprocessor(
    *, image: ImageT, low_threshold: Level = 100, high_threshold: Level = 200, resolution: Resolution = 512
) -> ImageT:
    """Canny edges, one pixel wide, by OpenCV."""
    return annotated(image, "canny", resolution, low=low_threshold, high=high_threshold)


@node(_LINES, display_name="HED Soft-Edge Lines")
def HEDPreprocessor(*, image: ImageT, safe: Enabled = "enable", resolution: Resolution = 512) -> ImageT:
    """Soft edges by a network (HED); ``safe`` leaves out detail that a model could read back."""
    return annotated(image, "softedge", resolution, safe=safe == "enable")


@node(_LINES, display_name="Realistic Lineart")
def LineArtPreprocessor(*, image: ImageT, coarse: Disabled = "disable", resolution: Resolution = 512) -> ImageT:
    """Line art by a network; coarse has fewer lines."""
    return annotated(image, "lineart_realistic", resolution, coarse=coarse == "enable")


@node(_LINES, display_name="Scribble Lines")
def ScribblePreprocessor(*, image: ImageT, resolution: Resolution = 512) -> ImageT:
    """Thick strokes along the main edges."""
    return annotated(image, "scribble", resolution)


@node(_LINES, name="M-LSDPreprocessor", display_name="M-LSD Lines")
def MLSDPreprocessor(
    *,
    image: ImageT,
    score_threshold: Annotated[float, Widget(min=0.01, max=2.0, step=0.01, optional=True)] = 0.1,
    dist_threshold: Annotated[float, Widget(min=0.01, max=20.0, step=0.01, optional=True)] = 0.1,
    resolution: Resolution = 512,
) -> ImageT:
    """Straight lines by a network (M-LSD)."""
    return annotated(image, "mlsd", resolution, score=score_threshold, distance=dist_threshold)


@node(_SHAPES, name="MiDaS-DepthMapPreprocessor", display_name="MiDaS Depth Map")
def MiDaSDepthMapPreprocessor(
    *,
    image: ImageT,
    a: Annotated[float, Widget(min=0.0, max=5 * math.pi, optional=True, tooltip="Not used.")] = 2 * math.pi,
    bg_threshold: Annotated[float, Widget(min=0.0, max=1.0, optional=True, tooltip="Not used.")] = 0.1,
    resolution: Resolution = 512,
) -> ImageT:
    """Depth, near white; by Depth Anything V2, not MiDaS, which has no use for the other numbers."""
    return annotated(image, "depth", resolution)


_DEPTH_MODELS = {
    f"depth_anything_v2_vit{size[0].lower()}.pth": f"depth-anything/Depth-Anything-V2-{size}-hf"
    for size in ("Large", "Base", "Small")
}


@node(_SHAPES, display_name="Depth Anything V2 - Relative")
def DepthAnythingV2Preprocessor(
    *,
    image: ImageT,
    ckpt_name: Annotated[str, Widget(choices=tuple(_DEPTH_MODELS), optional=True)] = "depth_anything_v2_vitl.pth",
    resolution: Resolution = 512,
) -> ImageT:
    """Depth, near white, by Depth Anything V2; the checkpoint names its size."""
    return annotated(image, "depth", resolution, model=_DEPTH_MODELS[ckpt_name])


def _poses(
    *,
    image: ImageT,
    detect_hand: Enabled = "enable",
    detect_body: Enabled = "enable",
    detect_face: Enabled = "enable",
    resolution: Resolution = 512,
) -> ImageT:
    """Human poses in OpenPose's colours; hands and face come together, and never without the body."""
    if detect_body == "disable":
        raise MahlstickError("detect_body is disable, and poses are drawn with the body only; enable it.")
    parts = "whole" if "enable" in (detect_hand, detect_face) else "body"
    return annotated(image, "pose", resolution, parts=parts)


OpenposePreprocessor = node(_POSES, name="OpenposePreprocessor", display_name="OpenPose Pose")(_poses)
DWPreprocessor = node(_POSES, name="DWPreprocessor", display_name="DWPose Estimator")(_poses)


@node(_SHAPES, name="BAE-NormalMapPreprocessor", display_name="BAE Normal Map")
def BAENormalMapPreprocessor(*, image: ImageT, resolution: Resolution = 512) -> ImageT:
    """Surface normals in the colours of ControlNet 1.1, from the depth of Depth Anything V2."""
    return annotated(image, "normal", resolution)


@node("ControlNet Preprocessors/Semantic Segmentation", display_name="Semantic Segmentor")
def SemSegPreprocessor(*, image: ImageT, resolution: Resolution = 512) -> ImageT:
    """Areas by class in ADE20K's colours."""
    return annotated(image, "segmentation", resolution)


@node("ControlNet Preprocessors/tile", display_name="Tile")
def TilePreprocessor(
    *,
    image: ImageT,
    pyrUp_iters: Annotated[int, Widget(min=1, max=10, step=1, optional=True)] = 3,
    resolution: Resolution = 512,
) -> ImageT:
    """The pictures without fine detail: halved and doubled so many times."""
    return annotated(image, "tile", resolution, factor=min(64, 2**pyrUp_iters))


@node(_COLOURS, display_name="Color Pallete")
def ColorPreprocessor(*, image: ImageT, resolution: Resolution = 512) -> ImageT:
    """A grid of flat colours."""
    return annotated(image, "color", resolution)


@node(_COLOURS, display_name="Content Shuffle")
def ShufflePreprocessor(*, image: ImageT, resolution: Resolution = 512) -> ImageT:
    """The pictures' colours in another arrangement."""
    return annotated(image, "shuffle", resolution)


@node("ControlNet Preprocessors/others", display_name="Inpaint Preprocessor")
def InpaintPreprocessor(
    *, image: ImageT, mask: MaskT, black_pixel_for_xinsir_cn: Annotated[bool, Widget(optional=True)] = False
) -> ImageT:
    """The pictures with -1 where the mask is, as ControlNet's inpainting nets take them; for some, with black."""
    image, scaled = paired(image, resized_mask(mask, image.shape[1:3]).movedim(1, -1))
    return torch.where(scaled > 0.5, 0.0 if black_pixel_for_xinsir_cn else -1.0, image)


_PREPROCESSORS = {
    each.name: each
    for each in (
        CannyEdgePreprocessor,
        HEDPreprocessor,
        LineArtPreprocessor,
        ScribblePreprocessor,
        MLSDPreprocessor,
        MiDaSDepthMapPreprocessor,
        DepthAnythingV2Preprocessor,
        BAENormalMapPreprocessor,
        OpenposePreprocessor,
        DWPreprocessor,
        SemSegPreprocessor,
        TilePreprocessor,
        ColorPreprocessor,
        ShufflePreprocessor,
    )
}


@node("ControlNet Preprocessors", display_name="AIO Aux Preprocessor")
def AIO_Preprocessor(
    *,
    image: ImageT,
    preprocessor: Annotated[str, Widget(choices=("none", *_PREPROCESSORS), optional=True)] = "none",
    resolution: Resolution = 512,
) -> ImageT:
    """A control picture by any of the preprocessors, with its usual settings."""
    if preprocessor == "none":
        return image
    result: Tensor = _PREPROCESSORS[preprocessor].function(image=image, resolution=resolution)
    return result
