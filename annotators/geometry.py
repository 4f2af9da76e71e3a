"""Control pictures of shape: depth, normals, pose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from PIL import Image

from mahlstick import pictures
from mahlstick.annotators import weights
from mahlstick.annotators.options import Range

if TYPE_CHECKING:
    import numpy as np

_DEPTH_MODEL = "depth-anything/Depth-Anything-V2-Small-hf"


def depth(picture: Image.Image, *, model: str = _DEPTH_MODEL, invert: bool = False) -> Image.Image:
    """Depth, the nearest white and the farthest black, by a depth-estimation model of transformers.

    ``model`` is a folder or a hub id (Depth Anything arXiv 2406.09414, DPT, ZoeDepth, …). Most predict inverse depth;
    ``invert`` is for those that predict distance.
    """
    import numpy as np

    nearness = _nearness(picture, model)
    levels = np.rint((1 - nearness if invert else nearness) * 255).astype(np.uint8)
    return Image.fromarray(levels).convert("RGB")


def normal(
    picture: Image.Image,
    *,
    model: str = _DEPTH_MODEL,
    source: Literal["picture", "depth"] = "picture",
    strength: Annotated[float, Range(0.01, 10)] = 0.5,
    smooth: Annotated[float, Range(0, 5)] = 0.5,
) -> Image.Image:
    """Surface normals from depth: red where a surface faces left, green up, blue the viewer.

    These are the colours of ControlNet 1.1's normal model. ``source`` "depth" takes the picture for a depth map, near
    white, and needs no weights. ``strength`` is the height of the nearest point over the farthest, ``smooth`` the blur
    before differentiation, the first as a fraction and the second in percent of the shorter side.
    """
    import cv2
    import numpy as np

    grey = np.asarray(picture.convert("L"), np.float32) / 255
    height = _nearness(picture, model) if source == "picture" else grey
    shorter = min(picture.size)
    if smooth:
        height = cv2.GaussianBlur(height, (0, 0), max(0.1, smooth * shorter / 100))
    return Image.fromarray(np.rint((normals(height * strength * shorter) + 1) * 127.5).astype(np.uint8))


def normals(height: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Unit normals (height, width, 3), as (left, up, towards the viewer), of a height field in pixels."""
    import numpy as np

    padded = np.pad(height.astype(np.float64), 1, mode="edge")
    left = (padded[1:-1, 2:] - padded[1:-1, :-2]) / 2
    up = (padded[2:, 1:-1] - padded[:-2, 1:-1]) / 2
    vectors = np.stack([left, up, np.ones_like(left)], axis=2)
    unit: np.ndarray[Any, Any] = vectors / np.linalg.norm(vectors, axis=2, keepdims=True)
    return unit


def pose(
    picture: Image.Image,
    *,
    model: str = "rtmw",
    parts: Literal["body", "whole"] = "whole",
    threshold: Annotated[float, Range(0, 10)] = 0.3,
) -> Image.Image:
    """Human poses in OpenPose's colours on black, by RTMPose (arXiv 2303.07399) through rtmlib.

    ``model`` is "rtmw", which rtmlib downloads, or a folder with detector.onnx (YOLOX) and pose.onnx (RTMPose, 133
    points). ``parts`` "whole" adds hands and face to the body; points that score below ``threshold`` are left out.
    """
    import numpy as np

    people, points = weights.pose_estimator(model)
    from rtmlib import draw_skeleton

    frame = np.ascontiguousarray(np.asarray(picture)[:, :, ::-1])  # rtmlib reads BGR, as OpenCV does
    canvas = np.zeros_like(frame)
    boxes = people(frame)
    if len(boxes):  # without one, rtmlib would pose the whole picture
        keypoints, scores = points(frame, bboxes=boxes)
        if parts == "body":
            keypoints, scores = keypoints[:, :18], scores[:, :18]
        canvas = draw_skeleton(canvas, keypoints, scores, openpose_skeleton=True, kpt_thr=threshold)
    return Image.fromarray(canvas)


def _nearness(picture: Image.Image, model: str) -> np.ndarray[Any, Any]:
    """(height, width) float32 in [0, 1]; all 0 where the model sees no depth at all."""
    import cv2
    import numpy as np

    size = (max(picture.width, 16), max(picture.height, 16))  # the pipeline drops sides of one pixel
    found = weights.depth_estimator(model)(pictures.resize(picture, size))
    estimate = cv2.resize(found["predicted_depth"].float().numpy(), picture.size, interpolation=cv2.INTER_AREA)
    nearness: np.ndarray[Any, Any] = (estimate - estimate.min()) / (np.ptp(estimate) or 1)
    return nearness
