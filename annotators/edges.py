"""Control pictures of lines, always white on black: canny, soft edge, line art, scribble, straight lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from PIL import Image

from mahlstick.annotators import weights
from mahlstick.annotators.options import Range
from mahlstick.errors import MahlstickError

if TYPE_CHECKING:
    import numpy as np

Source = Literal["auto", "picture", "drawing"]

#: Sobel gradients of 8-bit pixels, |dx| + |dy|, reach this.
_STEEPEST = 2040


def canny(
    picture: Image.Image,
    *,
    low: Annotated[int, Range(0, _STEEPEST)] = 100,
    high: Annotated[int, Range(0, _STEEPEST)] = 200,
) -> Image.Image:
    """Canny edges, one pixel wide, black and white.

    A gradient above ``high`` starts an edge, one above ``low`` continues it. Exactly OpenCV's, as ControlNet
    was trained on.
    """
    import cv2
    import numpy as np

    if low > high:
        raise MahlstickError(f"low is {low} and high is {high}; low must not exceed high")
    return _white_on_black(cv2.Canny(np.asarray(picture), low, high))


def lineart(
    picture: Image.Image,
    *,
    sigma: Annotated[float, Range(0.3, 20)] = 1.0,
    threshold: Annotated[float, Range(0, 0.95)] = 0.2,
    source: Source = "auto",
) -> Image.Image:
    """Soft lines where the picture turns dark, without weights; a drawing keeps its own lines.

    The positive lobe of a difference of Gaussians of ``sigma`` and 1.6 ``sigma`` pixels (Marr and Hildreth's
    approximation of the Laplacian), strongest colour channel, as a fraction of the strongest lines; fainter than
    ``threshold`` is black. ``source`` says whether the picture is a drawing, dark lines on light or the reverse.
    """
    import cv2
    import numpy as np

    drawn = _drawing(picture, source)
    if drawn is not None:
        return _white_on_black(drawn)
    pixels = np.asarray(picture, np.float32) / 255
    narrow, wide = (cv2.GaussianBlur(pixels, (0, 0), deviation) for deviation in (sigma, 1.6 * sigma))
    lines = (wide - narrow).max(axis=2).clip(0)
    noise = 0.02  # a flat picture's strongest "line" is noise, and stays faint
    strong = max(float(np.percentile(lines, 97)), float(lines.max()) / 3, noise)
    strength = lines / strong
    return _white_on_black(_to_bytes((strength - threshold) / (1 - threshold)))


def scribble(
    picture: Image.Image,
    *,
    low: Annotated[int, Range(0, _STEEPEST)] = 60,
    high: Annotated[int, Range(0, _STEEPEST)] = 120,
    thickness: Annotated[float, Range(0.1, 10)] = 0.8,
    source: Source = "auto",
) -> Image.Image:
    """Thick strokes along the main edges, without weights, black and white; a drawing keeps its own lines.

    Canny edges (``low``, ``high``) of the smoothed picture; ``thickness`` is in percent of the shorter side.
    """
    import cv2
    import numpy as np

    side = min(picture.size)
    drawn = _drawing(picture, source)
    if drawn is None:
        smooth = cv2.GaussianBlur(np.asarray(picture), (0, 0), max(0.3, side / 256))
        lines = np.asarray(canny(Image.fromarray(smooth), low=low, high=high).convert("L"))
    else:
        lines = np.where(drawn > 127, np.uint8(255), np.uint8(0))
    width = max(1, round(side * thickness / 100))
    return _white_on_black(cv2.dilate(lines, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))))


def softedge(
    picture: Image.Image,
    *,
    model: str = "lllyasviel/Annotators",
    resolution: Annotated[int, Range(64, 2048)] = 512,
    safe: bool = False,
) -> Image.Image:
    """Soft edges by a holistically nested edge detector (HED, arXiv 1504.06375), through controlnet-aux.

    ``model`` is a folder with ControlNetHED.pth, or a hub id; ``safe`` quantises the edges, which hides faint detail
    that a diffusion model could read back.
    """
    return weights.detect("HEDdetector", model, picture, resolution, safe=safe)


def lineart_realistic(
    picture: Image.Image,
    *,
    model: str = "lllyasviel/Annotators",
    resolution: Annotated[int, Range(64, 2048)] = 512,
    coarse: bool = False,
) -> Image.Image:
    """Line art by the networks of informative drawings (arXiv 2203.12691), through controlnet-aux.

    ``model`` is a folder with sk_model.pth and sk_model2.pth, or a hub id; ``coarse`` uses the second, of fewer lines.
    """
    return weights.detect("LineartDetector", model, picture, resolution, coarse=coarse)


def mlsd(
    picture: Image.Image,
    *,
    model: str = "lllyasviel/Annotators",
    resolution: Annotated[int, Range(64, 2048)] = 512,
    score: Annotated[float, Range(0, 1)] = 0.1,
    distance: Annotated[float, Range(0, 20)] = 0.1,
) -> Image.Image:
    """Straight lines by M-LSD (arXiv 2106.00186), through controlnet-aux.

    ``model`` is a folder with mlsd_large_512_fp32.pth, or a hub id. Lines below ``score``, and lines shorter than
    ``distance`` pixels at half the resolution, are left out.
    """
    return weights.detect("MLSDdetector", model, picture, resolution, thr_v=score, thr_d=distance)


def _drawing(picture: Image.Image, source: Source) -> np.ndarray[Any, Any] | None:
    """The (height, width) uint8 lines of a drawing, light on dark, stretched to full range; None for a picture."""
    import cv2
    import numpy as np

    if source == "picture":
        return None
    grey = np.asarray(picture.convert("L"))
    paper = int(np.median(grey))
    ink = cv2.absdiff(grey, np.full_like(grey, paper))
    if source == "auto" and not _is_line_drawing(np.asarray(picture), paper, ink):
        return None
    return _to_bytes(ink / max(int(ink.max()), 1))


def _is_line_drawing(pixels: np.ndarray[Any, Any], paper: int, ink: np.ndarray[Any, Any]) -> bool:
    """Whether there are thin colourless strokes on plain paper that is nearly white or nearly black."""
    import cv2
    import numpy as np

    if 40 < paper < 215:
        return False
    colourful = np.ptp(pixels, axis=2) > 40
    strokes = np.where(ink > 96, np.uint8(255), np.uint8(0))
    inked, plain = np.count_nonzero(strokes), np.count_nonzero(ink < 24)
    if not inked or colourful.mean() > 0.01 or plain < 0.6 * ink.size:
        return False
    brush = max(3, round(min(ink.shape) * 0.04)) | 1
    solid = cv2.morphologyEx(strokes, cv2.MORPH_OPEN, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (brush, brush)))
    return bool(np.count_nonzero(solid) < 0.2 * inked)


def _to_bytes(unit: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    import numpy as np

    pixels: np.ndarray[Any, Any] = np.rint(unit.clip(0, 1) * 255).astype(np.uint8)
    return pixels


def _white_on_black(lines: np.ndarray[Any, Any]) -> Image.Image:
    """(height, width) uint8 as an RGB picture."""
    return Image.fromarray(lines).convert("RGB")
