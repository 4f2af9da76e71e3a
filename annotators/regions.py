"""Control pictures of areas: segmentation, mask, inpaint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from mahlstick import pictures
from mahlstick.annotators import weights
from mahlstick.errors import MahlstickError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mahlstick.pictures import PictureSource


def segmentation(picture: Image.Image, *, model: str = "openmmlab/upernet-convnext-small") -> Image.Image:
    """Areas by class in ADE20K's colours, by a segmentation model of transformers.

    ``model`` is a folder or a hub id of a semantic or universal segmentation model. ControlNet's segmentation nets know
    the 150 colours of ADE20K; of a model with more classes, those beyond 150 use them again.
    """
    import numpy as np
    import torch

    processor, network = weights.segmenter(model)
    with torch.no_grad():
        outputs = network(**processor(images=picture, return_tensors="pt"))
    (classes,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[picture.size[::-1]])
    palette = np.asarray(weights.ade_palette(), np.uint8)
    return Image.fromarray(palette[classes.numpy() % len(palette)])


def mask(
    picture: Image.Image,
    *,
    method: Literal["auto", "alpha", "threshold", "subject"] = "auto",
    invert: bool = False,
) -> Image.Image:
    """The subject white on black, from transparency, brightness or a cut-out, without weights.

    ``alpha`` takes the picture's own transparency; ``threshold`` splits the brightness (Otsu), and takes for the
    subject what touches the border less; ``subject`` cuts out what differs from the border (GrabCut); ``auto`` takes
    the transparency where there is some, else cuts out.
    """
    import numpy as np

    if method == "alpha" and picture.mode != "RGBA":
        raise MahlstickError("the picture has no transparency; use method threshold or subject")
    if picture.mode == "RGBA" and method in ("auto", "alpha"):
        subject = np.asarray(picture.getchannel("A"))
    else:
        pixels = np.asarray(pictures.load_picture(picture))
        subject = _darker_or_lighter(pixels) if method == "threshold" else _cut_out(pixels)
    return Image.fromarray(255 - subject if invert else subject).convert("RGB")


def inpaint(picture: Image.Image, *, mask: Any = None) -> Image.Image:
    """The picture with what is to be repainted in black: a preview of `inpaint_condition`.

    ``mask`` is a picture, white where it is repainted; without it, the transparent parts are.
    """
    repaint = _repaint(picture, mask)
    black = Image.new("RGB", picture.size)
    return Image.composite(black, pictures.load_picture(picture), repaint)


def inpaint_condition(picture: PictureSource, mask: PictureSource | None = None) -> torch.Tensor:
    """What ControlNet's inpainting nets are conditioned on: (1, 3, height, width), [0, 1], and -1 where repainted.

    No picture holds -1, so this is a tensor, which `Control` uses as it is: ``Control(net, inpaint_condition(…))``.
    ``mask`` is white where it is repainted (from half grey on); without it, the transparent parts are.
    """
    import numpy as np
    import torch

    picture = pictures.load_picture(picture, alpha=True)
    pixels = np.asarray(pictures.load_picture(picture), np.float32) / 255
    repainted = np.asarray(_repaint(picture, mask))[:, :, None] > 0
    condition = torch.from_numpy(np.where(repainted, np.float32(-1), pixels))
    return condition.permute(2, 0, 1)[None].contiguous()


def _repaint(picture: Image.Image, mask: PictureSource | None) -> Image.Image:
    """White where the picture is to be repainted, else black; mode L, of the picture's size."""
    if mask is not None:
        white = pictures.resize(pictures.load_mask(mask), picture.size)
    elif picture.mode == "RGBA":
        white = picture.getchannel("A").point(lambda alpha: 255 - alpha)
    else:
        raise MahlstickError("the picture has no transparent part; give mask=, white where it is to be repainted")
    return white.point(lambda level: 255 * (level > 127))


def _darker_or_lighter(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    import cv2
    import numpy as np

    _, light = cv2.threshold(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    border = np.concatenate([light[0], light[-1], light[:, 0], light[:, -1]])
    return 255 - light if border.mean() > 127 else light


def _cut_out(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """GrabCut (Rother et al. 2004) from a rectangle just inside the border, at most 320 pixels wide or high."""
    import cv2
    import numpy as np

    height, width = pixels.shape[:2]
    ratio = min(1, 320 / max(height, width))
    size = (max(1, round(width * ratio)), max(1, round(height * ratio)))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    if min(small.shape[:2]) < 8 or small.max() == small.min():
        return _darker_or_lighter(pixels)  # too little for its colour models
    labels = np.zeros(small.shape[:2], np.uint8)
    inset = max(1, round(0.02 * min(labels.shape)))
    box = (inset, inset, labels.shape[1] - 2 * inset, labels.shape[0] - 2 * inset)
    cv2.setRNGSeed(0)  # its clustering draws from OpenCV's generator
    cv2.grabCut(small[:, :, ::-1].copy(), labels, box, np.zeros((1, 65)), np.zeros((1, 65)), 5, cv2.GC_INIT_WITH_RECT)
    subject = np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.uint8) * 255
    enlarged = cv2.resize(subject, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.where(enlarged > 127, np.uint8(255), np.uint8(0))
