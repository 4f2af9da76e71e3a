"""How a clip moves, and how steadily.

    found = measure_clip(frames, borders=[16, 32])
    found.seam  # 1.04

A clip is seen one frame after another, and little is kept of each, so that memory is flat in the number of frames.
Pixels are compared at `SIDE`, so that figures of clips of several sizes compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mahlstick.errors import MahlstickError
from mahlstick.pictures import load_picture, resize

if TYPE_CHECKING:
    from mahlstick.pictures import PictureSource

Array = np.ndarray[Any, Any]
Encode = Callable[[list[Image.Image]], Tensor | Array]  # n pictures to n vectors

SIDE = 128  # pixels of the longer side at which frames are compared
_FASTEST = 0.05  # the share of the picture that tells how fast it moves
_UNSEEN = 1e-4  # change between two frames below which there is none: 1/40 of a step of 8 bits
_BATCH = 16  # frames encoded at once


@dataclass(frozen=True)
class ClipFigures:
    """Means over the neighbours in a clip; a single frame has none, and does not change.

    ``motion``: how fast what moves fastest moves, in longer sides of the picture for each frame: the mean of the
    largest 5 % of the optical flow, as VBench's dynamic degree has it (arXiv 2311.17982). Only places count from which
    the flow leads to the neighbour and back, so that flicker is hardly taken for motion.

    ``change``: mean absolute difference of neighbours, in [0, 1]. It tells nothing of why they differ.

    ``flicker``: what comes and goes, in [0, 1]: |x[t−1] − 2 x[t] + x[t+1]| / 2 along the flow, where it leads there and
    back. It is the warping error (arXiv 1808.00449) of second order, so that a fade is none; of a brightness that goes
    back and forth it is the difference of the two.

    ``consistency``: mean cosine of the features of neighbours (Gen-1's frame consistency, arXiv 2302.03011); None
    without an encoder.

    ``seam``: the change from window to window against the change inside windows; 1 where no border shows. None without
    borders, and where nothing but borders is.
    """

    motion: float
    change: float
    flicker: float
    consistency: float | None = None
    seam: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        """The figures by name."""
        return asdict(self)


class ClipMeasures:
    """Measures a clip frame by frame; ``encode`` gives the features for its consistency, see `frame_encoder`."""

    def __init__(self, encode: Encode | None = None) -> None:
        self.encode = encode
        self._size: tuple[int, int] | None = None
        self._last: Array | None = None  # frame
        self._before: tuple[Array, Array] | None = None  # the frame before the last, brought to it, and where it fits
        self._speeds: list[float] = []
        self._changes: list[float] = []
        self._flickers: list[float] = []
        self._cosines: list[float] = []
        self._waiting: list[Image.Image] = []  # frames to encode
        self._features: Tensor | None = None  # (1, d) of the last that was

    def add(self, picture: PictureSource) -> None:
        """The next frame. Raises ``MahlstickError`` for one of another size."""
        rgb = load_picture(picture, name="frame")
        self._size = self._size or rgb.size
        if rgb.size != self._size:
            (width, height), (first_width, first_height) = rgb.size, self._size
            raise MahlstickError(
                f"a frame is {width}x{height} and the first {first_width}x{first_height}; bring all to one size"
            )
        frame = _small(rgb)
        if self._last is not None:
            self._compare(self._last, frame)
        self._last = frame
        if self.encode is not None:
            self._waiting.append(rgb)
            if len(self._waiting) == _BATCH:
                self._encode(self.encode)

    def result(self, borders: Sequence[int] = ()) -> ClipFigures:
        """The figures of the frames so far; each of ``borders`` is the first frame of another window.

        Of windows that stand elsewhere at each step, give the borders of those that stand still. Raises
        ``MahlstickError`` for a clip without a frame, and for borders outside it.
        """
        if self._last is None:
            raise MahlstickError("the clip has no frames; give at least one")
        if self.encode is not None and self._waiting:
            self._encode(self.encode)
        return ClipFigures(
            motion=_mean(self._speeds),
            change=_mean(self._changes),
            flicker=_mean(self._flickers),
            consistency=None if self.encode is None else _mean(self._cosines, 1.0),
            seam=self._seam(set(borders)),
        )

    def _compare(self, last: Array, frame: Array) -> None:
        there, back = _flow(last, frame), _flow(frame, last)
        known = _leads_back(there, back), _leads_back(back, there)
        self._speeds.append((_speed(there, known[0]) + _speed(back, known[1])) / 2)
        self._changes.append(float(abs(frame - last).mean()))
        if self._before is not None:
            before, fits = self._before
            fits = fits & known[0]
            bend = abs(before - 2 * last + _along(there, frame)).mean(axis=2) / 2
            self._flickers.append(float(bend[fits].mean()) if fits.any() else 0.0)
        self._before = _along(back, last), known[1]

    @torch.no_grad()
    def _encode(self, encode: Encode) -> None:
        found = torch.as_tensor(encode(self._waiting)).double().cpu()
        found = found if self._features is None else torch.cat([self._features, found])
        self._cosines += F.cosine_similarity(found[:-1], found[1:]).tolist()
        self._features = found[-1:]
        self._waiting = []

    def _seam(self, borders: set[int]) -> float | None:
        last = len(self._changes)
        for border in borders:
            if not 1 <= border <= last:
                raise MahlstickError(f"border {border} is no frame that follows another; give numbers from 1 to {last}")
        inside = [change for i, change in enumerate(self._changes, 1) if i not in borders]
        if not borders or not inside:
            return None
        across = [self._changes[border - 1] for border in borders]
        return (_mean(across) + _UNSEEN) / (_mean(inside) + _UNSEEN)


def measure_clip(
    frames: Iterable[PictureSource], borders: Sequence[int] = (), encode: Encode | None = None
) -> ClipFigures:
    """The figures of a clip whose frames come one after another; see `ClipMeasures`."""
    measures = ClipMeasures(encode)
    for frame in frames:
        measures.add(frame)
    return measures.result(borders)


def frame_encoder(pipe: Any) -> Encode | None:
    """Features by the image encoder of a pipeline; None where it has none."""
    model, processor = (getattr(pipe, name, None) for name in ("image_encoder", "feature_extractor"))
    if model is None or processor is None:
        return None

    @torch.no_grad()
    def encode(pictures: list[Image.Image]) -> Tensor:
        pixels = processor(images=pictures, return_tensors="pt")["pixel_values"].to(model.dtype)
        if model.device.type != "meta":  # accelerate's sequential offload places the input itself
            pixels = pixels.to(model.device)
        return cast(Tensor, model(pixels).image_embeds)

    return encode


def _mean(values: Sequence[float], of_none: float = 0.0) -> float:
    return float(np.mean(values)) if values else of_none


def _small(picture: Image.Image) -> Array:
    """(height, width, 3), floats in [0, 1]."""
    ratio = SIDE / max(picture.size)
    width, height = (max(1, round(side * ratio)) for side in picture.size)
    return np.asarray(resize(picture, (width, height)), np.float32) / 255


def _flow(a: Array, b: Array) -> Array:
    """(height, width, 2): where in ``b`` each pixel of ``a`` went, in pixels (Farnebäck 2003)."""
    flow: Array = cv2.calcOpticalFlowFarneback(
        _even(a), _even(b), None, pyr_scale=0.5, levels=4, winsize=15, iterations=3, poly_n=5, poly_sigma=1.2, flags=0
    )
    return flow


def _even(frame: Array) -> Array:
    """(height, width): the brightness around a mean of 0 and as wide as pictures have it, so that frames that are only
    darker or paler are the same."""
    grey = 255 * cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    evened: Array = (grey - grey.mean()) * (64 / max(grey.std(), 8))
    return evened


def _along(flow: Array, frame: Array) -> Array:
    """``frame`` at the places to which the flow leads."""
    x, y = _ends(flow)
    moved: Array = cv2.remap(frame, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return moved


def _ends(flow: Array) -> tuple[Array, Array]:
    height, width = flow.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return x + flow[..., 0], y + flow[..., 1]


def _leads_back(there: Array, back: Array) -> Array:
    """(height, width): where the flow stays in the picture, and the flow the other way leads back; within the bounds of
    arXiv 1604.08610."""
    height, width = there.shape[:2]
    x, y = _ends(there)
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    returned = _along(there, back)
    found: Array = inside & (_squared(there + returned) <= 0.01 * (_squared(there) + _squared(returned)) + 0.5)
    return found


def _squared(flow: Array) -> Array:
    """(height, width): squared lengths."""
    lengths: Array = flow[..., 0] ** 2 + flow[..., 1] ** 2
    return lengths


def _speed(flow: Array, known: Array) -> float:
    """Mean length of the largest flows that are known, in longer sides."""
    lengths = np.sort(np.sqrt(_squared(flow) * known), axis=None)
    return float(lengths[-max(1, round(_FASTEST * lengths.size)) :].mean() / max(known.shape))
