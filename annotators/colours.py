"""Control pictures of colour: tile, shuffle, colour grid, grey."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from PIL import Image

from mahlstick.annotators.options import Range

if TYPE_CHECKING:
    import numpy as np


def tile(picture: Image.Image, *, factor: Annotated[float, Range(1, 64)] = 8.0) -> Image.Image:
    """The picture without its fine detail: scaled down by ``factor`` and back up."""
    small = (max(1, round(picture.width / factor)), max(1, round(picture.height / factor)))
    return picture.resize(small, Image.Resampling.BOX).resize(picture.size, Image.Resampling.BICUBIC)


def shuffle(
    picture: Image.Image,
    *,
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0,
    scale: Annotated[float, Range(0.05, 2)] = 0.5,
) -> Image.Image:
    """The picture's colours in another arrangement: each pixel is fetched along a smooth random flow.

    ``scale`` is the size of the swirls as a fraction of the shorter side (ControlNet 1.1, content shuffle).
    """
    import cv2
    import numpy as np
    from scipy import ndimage

    pixels = np.asarray(picture)
    height, width = pixels.shape[:2]
    grain = max(1, round(scale * min(height, width)))
    random = np.random.default_rng(seed)

    def smooth_noise() -> np.ndarray[Any, Any]:
        """(height, width) float32 that spans [0, 1]."""
        coarse = random.random((height // grain + 2, width // grain + 2), np.float32)
        fine = cv2.resize(coarse, (width + 2 * grain, height + 2 * grain), interpolation=cv2.INTER_CUBIC)
        fine = fine[grain : grain + height, grain : grain + width]
        return (fine - fine.min()) / max(float(np.ptp(fine)), 1e-6)

    flow = [smooth_noise() * (height - 1), smooth_noise() * (width - 1)]
    channels = [ndimage.map_coordinates(pixels[:, :, channel], flow, order=1) for channel in range(3)]
    return Image.fromarray(np.stack(channels, axis=2))


def color(picture: Image.Image, *, cells: Annotated[int, Range(1, 512)] = 8) -> Image.Image:
    """A grid of flat colours, each the mean of its cell; ``cells`` is their number along the shorter side.

    T2I-Adapter's colour condition is 8 cells on a picture of 512 pixels.
    """
    import numpy as np

    pixels = np.asarray(picture)
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    across, down = (min(side, round(min(cells, shorter) * side / shorter)) for side in (width, height))
    rows, columns = np.arange(down) * height // down, np.arange(across) * width // across
    tall, wide = np.diff(rows, append=height), np.diff(columns, append=width)
    sums = np.add.reduceat(np.add.reduceat(pixels, rows, axis=0, dtype=np.int64), columns, axis=1)
    means = np.rint(sums / (tall[:, None, None] * wide[None, :, None])).astype(np.uint8)
    return Image.fromarray(means.repeat(tall, axis=0).repeat(wide, axis=1))


def grey(picture: Image.Image) -> Image.Image:
    """The brightness alone, by ITU-R 601 weights."""
    return picture.convert("L").convert("RGB")
