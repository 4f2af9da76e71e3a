"""Whatever a person hands over is either the right 8-bit picture or one sentence that names it."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mahlstick import pictures
from mahlstick.errors import MahlstickError


def gradient(width: int = 24, height: int = 16) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 10 % 256, y * 15 % 256, (x + y) * 6 % 256], axis=2).astype(np.uint8))


def refused(source: object, *words: str, load=pictures.load_picture) -> None:
    with pytest.raises(MahlstickError) as caught:
        load(source)
    message = str(caught.value)
    assert "\n" not in message
    assert ";" in message, f"no way out is named: {message}"
    for word in words:
        assert word in message, message


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises width x height and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# --- what is read


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_files_read_exactly(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "picture"
    gradient().save(path, format=kind)
    assert pictures.load_picture(path).mode == "RGB"
    assert np.array_equal(pictures.load_picture(str(path)), gradient())


def test_bytes_of_a_file() -> None:
    buffer = io.BytesIO()
    gradient().save(buffer, format="PNG")
    assert np.array_equal(pictures.load_picture(buffer.getvalue()), gradient())
    refused(buffer.getvalue()[:60], "picture", "damaged")
    refused(b"some words", "not a picture")
    refused(png_header(60000, 60000), "too large")


def test_a_renamed_jpeg_is_fine(tmp_path: Path) -> None:
    path = tmp_path / "renamed.png"
    gradient().save(path, format="JPEG", quality=95)
    assert np.abs(np.asarray(pictures.load_picture(path), int) - np.asarray(gradient(), int)).mean() < 8


def test_transparency_shows_white(tmp_path: Path) -> None:
    half = Image.new("RGBA", (4, 2), (200, 0, 0, 0))
    half.putpixel((0, 0), (200, 0, 0, 255))
    half.putpixel((1, 0), (0, 0, 0, 128))
    expected = {(0, 0): (200, 0, 0), (1, 0): (127, 127, 127), (3, 1): (255, 255, 255)}
    loaded = pictures.load_picture(half)
    assert {xy: loaded.getpixel(xy) for xy in expected} == expected

    grey = Image.new("LA", (2, 1), (10, 0))
    grey.putpixel((0, 0), (10, 255))
    assert np.asarray(pictures.load_picture(grey)).tolist() == [[[10, 10, 10], [255, 255, 255]]]

    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([9, 8, 7, 1, 2, 3])
    palette.putpixel((1, 0), 1)
    path = tmp_path / "palette.png"
    palette.save(path, transparency=1)
    assert np.asarray(pictures.load_picture(path)).tolist() == [[[9, 8, 7], [255, 255, 255]]]

    path = tmp_path / "key.png"
    gradient().save(path, transparency=gradient().getpixel((3, 3)))
    assert pictures.load_picture(path).getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    lab_white = Image.new("LAB", (3, 2), (255, 128, 128))
    loaded = pictures.load_picture(lab_white if mode == "LAB" else Image.new("RGB", (3, 2), "white").convert(mode))
    assert loaded.mode == "RGB" and loaded.size == (3, 2)
    assert np.asarray(loaded).min() >= 250


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(4, 16)
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(ramp).save(path)
    expected = np.rint(ramp / 257).astype(np.uint8)
    assert np.array_equal(np.asarray(pictures.load_picture(path))[:, :, 1], expected)
    assert np.array_equal(np.asarray(pictures.load_mask(path)), expected)
    assert np.array_equal(np.asarray(pictures.load_mask(ramp)), expected)


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for name in ("moving.gif", "moving.webp", "moving.png", "pages.tif"):
        path = tmp_path / name
        frames[0].save(path, save_all=True, append_images=frames[1:], **({"lossless": True} if "webp" in name else {}))
        assert pictures.load_picture(path).getpixel((4, 4)) == (255, 0, 0), name


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    path = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = orientation
    gradient().save(path, exif=exif)
    pixels = np.asarray(gradient())
    upright = {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1],
        5: pixels.transpose(1, 0, 2), 6: np.rot90(pixels, -1), 7: np.rot90(pixels, 2).transpose(1, 0, 2),
        8: np.rot90(pixels),
    }  # fmt: skip
    assert np.array_equal(pictures.load_picture(path), upright[orientation])


def test_arrays() -> None:
    pixels = np.asarray(gradient())
    for array in (pixels, pixels / 255, (pixels / 255).astype(np.float32), pixels.astype(np.uint16) * 257):
        if array.dtype == np.uint16:
            array = array[:, :, 0]
            assert np.array_equal(np.asarray(pictures.load_picture(array))[:, :, 0], pixels[:, :, 0])
        else:
            assert np.array_equal(pictures.load_picture(array), pixels)
    assert np.array_equal(np.asarray(pictures.load_mask(pixels[:, :, :1])), pixels[:, :, 0])
    assert np.asarray(pictures.load_mask(np.eye(5, dtype=bool))).tolist() == (np.eye(5, dtype=int) * 255).tolist()
    assert np.array_equal(pictures.load_picture(pixels[::2, ::-3]), pixels[::2, ::-3])
    transparent = np.dstack([pixels, np.zeros_like(pixels[:, :, 0])])
    assert np.asarray(pictures.load_picture(transparent)).min() == 255


def test_the_source_is_left_as_it_was() -> None:
    source = gradient().convert("RGBA")
    before = source.tobytes()
    pictures.load_picture(source).putpixel((0, 0), (1, 2, 3))
    rgb = gradient()
    pictures.load_picture(rgb).putpixel((0, 0), (1, 2, 3))
    assert source.tobytes() == before and rgb.tobytes() == gradient().tobytes()


def test_masks() -> None:
    alpha = gradient().getchannel("R")
    painted = Image.merge("RGBA", [*Image.new("RGB", alpha.size, "white").split(), alpha])
    assert np.array_equal(pictures.load_mask(painted), alpha)
    for constant in (0, 255):
        flat = gradient().convert("RGBA")
        flat.putalpha(constant)
        assert np.array_equal(pictures.load_mask(flat), gradient().convert("L"))
    assert pictures.load_picture(painted, alpha=True).mode == "RGBA"
    assert pictures.load_picture(gradient().convert("RGBA"), alpha=True).mode == "RGB"
    assert pictures.load_mask(Image.new("1", (2, 2), 1)).getpixel((0, 0)) == 255


# --- what is refused


def test_missing_folder_text_and_empty_files(tmp_path: Path) -> None:
    refused(tmp_path / "none.png", "none.png", "does not exist")
    refused(tmp_path, tmp_path.name, "folder")
    contents = {"text.png": b"not a picture at all", "empty.jpg": b"", "weights.png": b"PK\x03\x04" * 99}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, name, "not a picture")
        refused(tmp_path / name, name, "mask", load=pictures.load_mask)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_unreadable(tmp_path: Path) -> None:
    gradient().save(tmp_path / "secret.png")
    (tmp_path / "secret.png").chmod(0)
    refused(tmp_path / "secret.png", "secret.png", "permissions")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated(tmp_path: Path, kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, format=kind)
    path = tmp_path / "short.picture"
    path.write_bytes(buffer.getvalue()[: buffer.tell() // 2])
    refused(path, "short.picture")
    if kind in ("PNG", "JPEG"):  # the others already fail in Pillow's hands
        refused(Image.open(path), "short.picture", "damaged")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]), data=st.data())
def test_damaged_bytes_never_raise_anything_else(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    buffer = io.BytesIO()
    gradient().save(buffer, format=kind)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged"
    path.write_bytes(content)
    try:
        assert pictures.load_picture(path).mode == "RGB"
    except MahlstickError as error:
        assert "damaged" in str(error)


@pytest.mark.parametrize("size", [(8193, 8192), (12000, 9000), (60000, 60000)])
@pytest.mark.filterwarnings("error")
def test_decompression_bombs_are_refused_from_the_header(tmp_path: Path, size: tuple[int, int]) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    (tmp_path / "bomb.png").write_bytes(png_header(*size))
    refused(tmp_path / "bomb.png", "bomb.png", "too large", "67 million pixels")
    assert limit == Image.MAX_IMAGE_PIXELS and pictures.MAX_PIXELS < limit


def test_a_large_array_is_refused_too() -> None:
    refused(np.broadcast_to(np.zeros((), np.uint8), (8193, 8192)), "too large")


@pytest.mark.parametrize(
    ("array", "word"),
    [
        (np.zeros((0, 5), np.uint8), "empty"),
        (np.zeros(5, np.uint8), "shape"),
        (np.zeros((3, 8, 8), np.uint8), "shape"),
        (np.zeros((1, 8, 8, 3), np.uint8), "shape"),
        (np.zeros((8, 8, 2)), "shape"),
        (np.zeros((8, 8), np.int64), "dtype"),
        (np.zeros((8, 8), complex), "dtype"),
        (np.full((8, 8), np.nan), "NaN"),
        (np.full((8, 8), np.inf), "NaN"),
        (np.full((8, 8), 255.0), "255"),
        (np.full((8, 8), -1.0), "-1"),
    ],
)
def test_wrong_arrays(array: np.ndarray, word: str) -> None:
    refused(array, word, "picture")
    refused(array, word, "mask", load=pictures.load_mask)


@pytest.mark.parametrize("source", [None, 3, [[0]], Image, io.BytesIO()])
def test_other_types(source: object) -> None:
    refused(source, "give a path")


def test_empty_pictures_and_other_odd_ones(tmp_path: Path) -> None:
    refused(Image.new("RGB", (0, 4)), "empty")
    refused(Image.fromarray(np.array([[70000]], np.int32)), "65535")
    refused(Image.fromarray(np.array([[np.nan]], np.float32)), "NaN")
    gradient().save(tmp_path / "page.eps")
    refused(tmp_path / "page.eps", "page.eps", "PNG")
    refused(Image.open(tmp_path / "page.eps"), "page.eps", "PNG")


# --- resize


@pytest.mark.parametrize("mode", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (37, 11)])
@pytest.mark.parametrize("target", [(64, 64), (48, 96), (1, 7)])
def test_resize_gives_the_size(mode: pictures.ResizeMode, size: tuple[int, int], target: tuple[int, int]) -> None:
    for picture in (Image.new("RGB", size, "red"), Image.new("L", size, 200)):
        assert pictures.resize(picture, target, mode).size == target
        assert pictures.resize(picture, target, mode).mode == picture.mode


def test_resize_modes_differ_as_said() -> None:
    wide = Image.new("RGB", (64, 32), "lime")
    wide.paste("red", (0, 0, 8, 32))
    pad = np.asarray(pictures.resize(wide, (64, 64), "pad"))
    assert pad[:16].max() == 0 and pad[48:].max() == 0
    assert np.array_equal(pad[16:48], np.asarray(wide))
    crop = np.asarray(pictures.resize(wide, (32, 32), "crop"))
    assert (crop == (0, 255, 0)).all()
    stretch = np.asarray(pictures.resize(wide, (32, 32)))
    assert (stretch[:, 0] == (255, 0, 0)).all() and (stretch[:, 8:] == (0, 255, 0)).all()
    same = pictures.resize(wide, wide.size)
    assert same.tobytes() == wide.tobytes() and same is not wide


def test_resize_refuses() -> None:
    with pytest.raises(MahlstickError, match="0x8"):
        pictures.resize(gradient(), (0, 8))
    with pytest.raises(MahlstickError, match="'fill' is unknown; use one of stretch, crop, pad"):
        pictures.resize(gradient(), (8, 8), "fill")  # type: ignore[arg-type]


def test_aspect_differs() -> None:
    assert not pictures.aspect_differs(Image.new("L", (640, 480)), (64, 48))
    assert not pictures.aspect_differs(Image.new("L", (513, 512)), (512, 512))
    assert pictures.aspect_differs(Image.new("L", (640, 480)), (64, 64))
    assert pictures.aspect_differs(Image.new("L", (480, 640)), (64, 64))
    assert not pictures.aspect_differs(Image.new("L", (640, 480)), (64, 64), tolerance=0.5)


# --- save


def test_save_png_keeps_pixels_and_words(tmp_path: Path) -> None:
    text = {"mahlstick": '{"prompt": "ein Füchslein 🦊"}', "title": "plain"}
    path = pictures.save_png(gradient(), tmp_path / "new" / "folder" / "out.png", text)
    with Image.open(path) as read:
        assert read.text == text
        assert np.array_equal(read, gradient())
    assert [p.name for p in path.parent.iterdir()] == ["out.png"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pictures.save_png(gradient(), tmp_path / "out.png")
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(MahlstickError, match=r"out\.png.*No space left"):
        pictures.save_png(Image.new("RGB", (9, 9)), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out.png"]


def test_save_png_refuses(tmp_path: Path) -> None:
    with pytest.raises(MahlstickError, match=r"out\.jpg.*\.png"):
        pictures.save_png(gradient(), tmp_path / "out.jpg")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MahlstickError, match=r"out\.png.*another place"):
        pictures.save_png(gradient(), tmp_path / "file" / "out.png")
