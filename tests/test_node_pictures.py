"""Nodes for pictures, masks and plain values do what ComfyUI's do, and stay inside their folders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from torch import Tensor

from mahlstick.errors import MahlstickError
from mahlstick.nodes import files, folders
from mahlstick.nodes.builtin import annotate, images, masks, primitives
from mahlstick.nodes.resample import bislerp, resample
from mahlstick.nodes.schema import Returned
from tests.tiny import picture

few = settings(max_examples=25, deadline=None)


@pytest.fixture
def here(tmp_path: Path) -> Iterator[folders.Folders]:
    with folders.using(folders.Folders(*(tmp_path / name for name in ("models", "input", "output", "temp")))) as found:
        found.input.mkdir()
        yield found


def pixels(batch: int = 1, height: int = 12, width: int = 16, channels: int = 3, seed: int = 0) -> Tensor:
    """Random levels of 8 bits."""
    levels = np.random.default_rng(seed).integers(0, 256, (batch, height, width, channels))
    return torch.from_numpy(levels.astype(np.float32) / 255)


def one(values: tuple[Any, ...]) -> Any:
    (value,) = values
    return value


def shown(node: Any, **inputs: Any) -> dict[str, Any]:
    """What the page is told."""
    result = node.function(**inputs)
    assert isinstance(result, Returned) and result.ui is not None
    return dict(result.ui)


# --- files


def test_saved_pictures_load_as_they_were_and_carry_the_workflow(here: folders.Folders) -> None:
    batch = pixels(2)
    prompt, workflow = {"3": {"class_type": "SaveImage", "inputs": {"text": "füchse"}}}, {"nodes": [1, 2]}
    ui = shown(
        images.SaveImage,
        images=batch,
        filename_prefix="day/fox_%width%x%height%_%batch_num%",
        prompt=prompt,
        extra_pnginfo={"workflow": workflow},
    )
    assert ui["images"] == [
        {"filename": f"fox_16x12_{index}_0000{index + 1}_.png", "subfolder": "day", "type": "output"}
        for index in (0, 1)
    ]
    for index, saved in enumerate(ui["images"]):
        path = here.output / saved["subfolder"] / saved["filename"]
        with Image.open(path) as opened:
            assert json.loads(opened.text["prompt"]) == prompt and json.loads(opened.text["workflow"]) == workflow
        assert b"tEXtworkflow" in path.read_bytes()  # the only kind of chunk from which every ComfyUI page reads
        loaded, mask = images.LoadImage(image=f"day/{saved['filename']} [output]")
        assert torch.equal(loaded, batch[index : index + 1])
        assert mask.shape == (1, 64, 64) and not mask.any()
    assert not list(here.output.rglob("*.tmp"))


def test_numbers_go_on_and_nothing_is_written_over(here: folders.Folders) -> None:
    def names(prefix: str) -> list[str]:
        return [
            each["filename"] for each in shown(images.SaveImage, images=pixels(2), filename_prefix=prefix)["images"]
        ]

    assert names("a") == ["a_00001_.png", "a_00002_.png"]
    (here.output / "a_00041_.webp").touch()
    (here.output / "ab_00099_.png").touch()
    assert names("a") == ["a_00042_.png", "a_00043_.png"]
    assert not {*names("%batch_num%")} & {*names("%batch_num%")}
    preview = shown(images.PreviewImage, images=pixels())["images"][0]
    assert preview["type"] == "temp" and (here.temp / preview["filename"]).is_file()


def test_prefixes_are_filled_in_as_by_comfyuis_page(here: folders.Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(files.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Clock:
            return cls(2025, 3, 7, 16, 5, 9)

    monkeypatch.setattr(files, "datetime", Clock)
    prompt = {
        "1": {"class_type": "KSampler", "inputs": {"seed": 5, "model": ["2", 0]}, "_meta": {"title": "Main"}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a/b: c"}},
    }

    def stem(prefix: str) -> str:
        (path,) = files.new_files(here.output, prefix, ".png", size_wh=(3, 4), prompt=prompt)
        return path.relative_to(here.output.resolve()).as_posix().removesuffix("_00001_.png")

    assert stem("%date:yyyy-MM-dd%/%date:yy.M.d hhmm ss%") == "2025-03-07/25.3.7 1605 09"
    assert stem("%year%%month%%day%-%hour%%minute%%second%") == "20250307-160509"
    assert stem("%KSampler.seed%-%Main.seed%-%CLIPTextEncode.text%") == "5-5-a_b_ c"
    assert stem("%KSampler.model%%nobody.seed%%width%") == "%KSampler.model%%nobody.seed%3"


@pytest.mark.parametrize("name", ["../out", "{here}/out", "a/../../b", ".", "a/..", "x\0y"])
def test_nothing_is_saved_or_loaded_outside(here: folders.Folders, name: str) -> None:
    name = name.format(here=here.input.parent)
    with pytest.raises(MahlstickError) as caught:
        images.SaveImage(images=pixels(), filename_prefix=name)
    assert ";" in str(caught.value)
    (here.input.parent / "out").write_bytes(b"secret")
    assert isinstance(images.LoadImage.check(name), str)
    with pytest.raises(MahlstickError):
        images.LoadImage(image=name)
    assert {each.name for each in here.input.parent.iterdir()} <= {"input", "output", "out"}


def test_loading_turns_masks_batches_and_refuses(here: folders.Folders) -> None:
    upright = picture(8, 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(here.input / "turned.png", exif=exif)
    assert np.array_equal(images.to_picture(images.LoadImage(image="turned.png")[0][0]), upright)

    clear = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8) * 5)
    upright.copy().save(here.input / "plain.png")
    see_through = upright.copy()
    see_through.putalpha(clear)
    see_through.save(here.input / "alpha.png")
    loaded, mask = images.LoadImage(image="alpha.png")
    assert np.array_equal(images.to_picture(loaded[0]), upright)  # also where nothing is seen of it
    assert torch.allclose(mask[0], 1 - torch.from_numpy(np.asarray(clear) / np.float32(255)))
    assert torch.equal(one(images.LoadImageMask(image="alpha.png", channel="alpha")), mask)
    assert torch.equal(one(images.LoadImageMask(image="plain.png", channel="alpha")), torch.zeros(1, 6, 8))
    assert torch.equal(one(images.LoadImageMask(image="plain.png", channel="green")), loaded[..., 1])

    frames = pixels(3)
    ui = shown(images.SaveAnimatedPNG, images=frames, prompt={"1": {}})
    name = ui["images"][0]["filename"]
    assert ui["animated"] == (True,) and b'comfprompt\0{"1": {}}' in (here.output / name).read_bytes()
    assert torch.equal(images.LoadImageOutput(image=f"{name} [output]")[0], frames)
    ui = shown(
        images.SaveAnimatedWEBP, images=frames, method="fastest", prompt={"1": {}}, extra_pnginfo={"workflow": 2}
    )
    name = ui["images"][0]["filename"]
    with Image.open(here.output / name) as webp:
        assert webp.getexif()[0x0110] == 'prompt:{"1": {}}' and webp.getexif()[0x010F] == "workflow:2"
    assert torch.equal(images.LoadImageOutput(image=f"{name} [output]")[0], frames)

    (here.input / "broken.png").write_bytes((here.input / "plain.png").read_bytes()[:60])
    (here.input / "words.txt").write_text("no picture")
    for bad in ("broken.png", "words.txt", "absent.png"):
        with pytest.raises(MahlstickError, match=bad):
            images.LoadImage(image=bad)
    assert images.LoadImage.inputs[0].choices == ("alpha.png", "broken.png", "plain.png", "turned.png")


def test_a_changed_file_runs_again(here: folders.Folders) -> None:
    path = here.input / "a.png"
    picture(seed=1).save(path)
    first = images.LoadImage.fingerprint("a.png")
    path.touch()
    assert images.LoadImage.fingerprint("a.png") == first
    picture(seed=2).save(path)
    assert images.LoadImage.fingerprint("a.png") != first
    assert images.LoadImage.check("a.png") is True and images.LoadImage.check(None) is True


# --- scaling


@few
@given(
    height=st.integers(1, 20), width=st.integers(1, 20), method=st.sampled_from(["nearest-exact", "area", "bicubic"])
)
def test_scaled_to_its_own_size_a_picture_stays(height: int, width: int, method: str) -> None:
    image = pixels(2, height, width)
    for crop in ("disabled", "center"):
        scaled = one(images.ImageScale(image=image, upscale_method=method, width=width, height=height, crop=crop))
        assert torch.allclose(scaled, image, atol=1e-6)
    lanczos = one(images.ImageScaleBy(image=image, upscale_method="lanczos", scale_by=1.0))
    assert torch.equal(lanczos, image)


def test_sizes_follow_and_crops_keep_the_middle() -> None:
    image = pixels(1, 10, 30)

    def size(**inputs: Any) -> tuple[int, int]:
        return tuple(one(images.ImageScale(image=image, upscale_method="bilinear", **inputs)).shape[1:3])

    assert size(width=60, height=0, crop="disabled") == (20, 60)
    assert size(width=0, height=5, crop="disabled") == (5, 15)
    assert size(width=0, height=0, crop="center") == (10, 30)
    middle = one(images.ImageScale(image=image, upscale_method="nearest-exact", width=10, height=10, crop="center"))
    assert torch.equal(middle, image[:, :, 10:20])
    total = one(
        images.ImageScaleToTotalPixels(image=image, upscale_method="area", megapixels=0.01, resolution_steps=16)
    )
    assert total.shape[1:3] == (64, 176)
    with pytest.raises(MahlstickError, match="0x0"):
        images.ImageScaleBy(image=image, upscale_method="area", scale_by=0.01)
    thin, stretched = (
        one(images.ImageScale(image=image[:, :2], upscale_method="area", width=400, height=2, crop=crop))
        for crop in ("center", "disabled")
    )
    assert torch.equal(thin, stretched), "nothing can be cut off two rows"


def test_lanczos_is_pillows_also_of_masks_and_alpha() -> None:
    for channels in (1, 3, 4):
        image = pixels(2, 9, 7, channels, seed=channels)
        scaled = resample(image.movedim(-1, 1), 14, 5, "lanczos").movedim(1, -1)
        for before, after in zip(image, scaled, strict=True):
            levels = np.rint(before.numpy() * 255).astype(np.uint8).squeeze()
            expected = np.asarray(Image.fromarray(levels).resize((14, 5), Image.Resampling.LANCZOS))
            assert np.array_equal(np.rint(after.numpy() * 255).astype(np.uint8).squeeze(), expected)


@few
@given(before=st.tuples(st.integers(1, 5), st.integers(1, 5)), after=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_bislerp_is_slerp_along_each_side(before: tuple[int, int], after: tuple[int, int]) -> None:
    """By a loop over single vectors, as ComfyUI defines it."""

    def slerp(a: np.ndarray, b: np.ndarray, share: float) -> np.ndarray:
        length_a, length_b = np.linalg.norm(a), np.linalg.norm(b)
        cosine = float(a @ b / max(length_a * length_b, 1e-30))
        if cosine > 1 - 1e-5:
            return a
        if cosine < 1e-5 - 1:
            return (1 - share) * a + share * b
        angle = np.arccos(cosine)
        direction = np.sin((1 - share) * angle) * a / max(length_a, 1e-30) + np.sin(share * angle) * b / max(
            length_b, 1e-30
        )
        return direction / np.sin(angle) * (length_a * (1 - share) + length_b * share)

    def along(rows: np.ndarray, length: int) -> np.ndarray:
        """Of (places, others, channels)."""
        made = []
        for place in range(length):
            position = min(max((place + 0.5) * len(rows) / length - 0.5, 0), len(rows) - 1)
            first = int(position)
            second = min(first + 1, len(rows) - 1)
            made.append([slerp(a, b, position - first) for a, b in zip(rows[first], rows[second], strict=True)])
        return np.array(made)

    generator = torch.Generator().manual_seed(before[0] * 10 + before[1])
    latent = torch.randn(1, 4, *before, generator=generator)
    latent[:, :, 0, 0] = 0
    grid = latent[0].permute(2, 1, 0).double().numpy()  # (width, height, channels)
    wide = along(grid, after[1])
    expected = along(wide.transpose(1, 0, 2), after[0])
    assert np.allclose(bislerp(latent, after[1], after[0])[0].permute(1, 2, 0), expected, atol=1e-4)


# --- colour, place, batches


def test_inverting_turning_and_mirroring_come_back() -> None:
    image = pixels(2, channels=4)
    inverted = one(images.ImageInvert(image=image))
    assert torch.equal(inverted[..., 3], image[..., 3]) and not torch.equal(inverted, image)
    assert torch.allclose(one(images.ImageInvert(image=inverted)), image, atol=1e-6)
    quarter = one(images.ImageRotate(image=image, rotation="90 degrees"))
    assert torch.equal(quarter[0, 0, -1], image[0, 0, 0])  # clockwise: what was top left is top right
    assert torch.equal(one(images.ImageRotate(image=quarter, rotation="270 degrees")), image)
    upside_down = one(images.ImageFlip(image=image, flip_method="x-axis: vertically"))
    assert torch.equal(upside_down[:, 0], image[:, -1])
    half = one(images.ImageFlip(image=upside_down, flip_method="y-axis: horizontally"))
    assert torch.equal(half, one(images.ImageRotate(image=image, rotation="180 degrees")))


@few
@given(x=st.integers(-9, 20), y=st.integers(-9, 20), masked=st.booleans())
def test_compositing_against_numpy(x: int, y: int, masked: bool) -> None:
    below, above = pixels(2, 9, 11), pixels(1, 6, 5, seed=1)
    mask = torch.rand(1, 6, 5, generator=torch.Generator().manual_seed(3)) if masked else None
    kept = below.clone()
    laid = one(images.ImageCompositeMasked(destination=below, source=above, x=x, y=y, mask=mask))
    assert torch.equal(below, kept)
    expected = below.numpy().copy()
    for row in range(6):
        for column in range(5):
            if 0 <= y + row < 9 and 0 <= x + column < 11:
                share = 1.0 if mask is None else float(mask[0, row, column])
                here = expected[:, y + row, x + column]
                expected[:, y + row, x + column] = share * above[0, row, column].numpy() + (1 - share) * here
    assert np.allclose(laid, expected, atol=1e-6)


def test_a_source_may_be_scaled_and_lack_alpha() -> None:
    below, above = pixels(1, 9, 11, 4), pixels(1, 3, 3)
    laid = one(images.ImageCompositeMasked(destination=below, source=above, resize_source=True))
    assert laid.shape == below.shape and torch.allclose(laid[..., 3], torch.ones(()))


def test_batches() -> None:
    image = pixels(5)
    assert torch.equal(one(images.ImageFromBatch(image=image, batch_index=-2, length=9)), image[3:])
    assert torch.equal(one(images.RepeatImageBatch(image=image, amount=2)), torch.cat([image, image]))
    joined = one(images.ImageBatch(image1=image, image2=pixels(1, 24, 16, 4)))
    assert joined.shape == (6, 12, 16, 4) and (joined[:5, ..., 3] == 1).all()
    parts = one(images.RebatchImages(images=[image, image[:1]], batch_size=[4]))
    assert [len(part) for part in parts] == [4, 2] and torch.equal(torch.cat(parts), joined[[*range(5), 0], ..., :3])
    with pytest.raises(MahlstickError, match="several sizes"):
        images.RebatchImages(images=[image, pixels(1, 3, 4)], batch_size=[4])
    assert images.GetImageSize(image=image) == (16, 12, 5)
    assert one(images.ImageCrop(image=image, width=100, height=3, x=10, y=99)).shape == (5, 1, 6, 3)


def test_outpainting_fades_inwards_from_the_added_sides_only() -> None:
    padded, mask = images.ImagePadForOutpaint(image=pixels(1, 30, 40), left=8, bottom=16, feathering=10)
    assert padded.shape == (1, 46, 48, 3) and mask.shape == (1, 46, 48)
    assert (padded[:, :, :8] == 0.5).all() and (mask[:, :, :8] == 1).all() and (mask[:, 30:] == 1).all()
    for row in range(30):
        for column in range(40):
            distance = min(column, 30 - row)
            expected = max(0, (10 - distance) / 10) ** 2
            assert mask[0, row, column + 8] == pytest.approx(expected, abs=1e-6)
    assert not images.ImagePadForOutpaint(image=pixels(1, 20, 20), top=8, feathering=10)[1][:, 8:].any()


def test_blends_and_filters() -> None:
    image, other = pixels(seed=1), pixels(1, 24, 32, seed=2)

    def blend(mode: str, factor: float = 1.0) -> Tensor:
        return one(images.ImageBlend(image1=image, image2=other, blend_factor=factor, blend_mode=mode))

    above = resample(other.movedim(-1, 1), 16, 12, "bicubic").movedim(1, -1)
    assert torch.allclose(blend("normal"), above.clamp(0, 1), atol=1e-6)
    assert torch.allclose(blend("multiply", 0.25), (0.75 * image + 0.25 * image * above).clamp(0, 1), atol=1e-6)
    assert torch.allclose(blend("screen"), (image + above - image * above).clamp(0, 1), atol=1e-6)
    assert torch.allclose(blend("difference"), (image - above).clamp(0, 1), atol=1e-6)
    for mode in ("overlay", "soft_light"):
        assert torch.equal(blend(mode, 0.0), image) and not torch.equal(blend(mode), image)
    several = one(images.ImageBlend(image1=pixels(2), image2=pixels(3, seed=1), blend_factor=1.0, blend_mode="normal"))
    assert torch.equal(several, pixels(3, seed=1))

    flat = torch.full((1, 12, 16, 3), 0.3)
    for name, more in (("Blur", {"blur_radius": 3}), ("Sharpen", {"sharpen_radius": 3})):
        node = getattr(images, f"Image{name}")
        assert torch.allclose(one(node(image=flat, **more)), flat, atol=1e-5)
        with pytest.raises(MahlstickError, match="radius of 12"):
            node(image=flat, **{key: 12 for key in more})
    blurred = one(images.ImageBlur(image=image, blur_radius=2, sigma=0.7))
    weights = np.exp(-(np.linspace(-1, 1, 5) ** 2) / (2 * 0.7**2))
    by_scipy = ndimage.convolve(
        image[0].numpy(), np.outer(weights, weights)[..., None] / weights.sum() ** 2, mode="mirror"
    )
    assert np.allclose(blurred[0], by_scipy, atol=1e-5)
    for dither in ("none", "floyd-steinberg", "bayer-2", "bayer-16"):
        quantized = one(images.ImageQuantize(image=image, colors=4, dither=dither))
        assert len(np.unique(quantized.reshape(-1, 3), axis=0)) <= 4
    red = one(images.EmptyImage(width=3, height=2, batch_size=2, color=0xFF8000))
    assert red.shape == (2, 2, 3, 3) and torch.allclose(red[0, 0, 0], torch.tensor([1, 128 / 255, 0]))


# --- masks


def random_mask(batch: int = 2, height: int = 7, width: int = 9, seed: int = 0) -> Tensor:
    return torch.rand(batch, height, width, generator=torch.Generator().manual_seed(seed))


def test_masks_and_pictures_turn_into_one_another() -> None:
    mask, image = random_mask(), pixels()
    grey = one(masks.MaskToImage(mask=mask))
    assert grey.shape == (2, 7, 9, 3) and torch.equal(one(masks.ImageToMask(image=grey, channel="blue")), mask)
    with pytest.raises(MahlstickError, match="alpha"):
        masks.ImageToMask(image=image, channel="alpha")
    red, green, blue = (int(level) for level in torch.round(image[0, 3, 4] * 255))
    found = one(masks.ImageColorToMask(image=image, color=red << 16 | green << 8 | blue))
    assert found[0, 3, 4] == 1 and found.sum() == (image == image[0, 3, 4]).all(-1).sum()
    assert torch.allclose(one(masks.InvertMask(mask=one(masks.InvertMask(mask=mask)))), mask)
    assert torch.equal(one(masks.CropMask(mask=mask, x=2, y=1, width=3, height=99)), mask[:, 1:, 2:5])
    assert torch.equal(one(masks.ThresholdMask(mask=mask, value=0.5)), (mask > 0.5).float())
    assert one(masks.SolidMask(value=0.25, width=3, height=2)).tolist() == [[[0.25] * 3] * 2]


@few
@given(expand=st.integers(-4, 4), tapered=st.booleans())
def test_growing_is_grey_dilation_and_erosion(expand: int, tapered: bool) -> None:
    mask = random_mask(seed=expand)
    footprint = ndimage.generate_binary_structure(2, 1 if tapered else 2)
    expected = mask.numpy()
    for _ in range(abs(expand)):
        step = ndimage.grey_dilation if expand > 0 else ndimage.grey_erosion
        expected = np.stack([step(each, footprint=footprint) for each in expected])
    assert np.array_equal(one(masks.GrowMask(mask=mask, expand=expand, tapered_corners=tapered)), expected)


@few
@given(sides=st.tuples(*[st.integers(0, 12)] * 4))
def test_feathering_multiplies_by_each_edges_ramp(sides: tuple[int, int, int, int]) -> None:
    mask = random_mask(1)
    left, top, right, bottom = sides
    expected = mask.numpy().copy()
    height, width = expected.shape[1:]
    for index in range(min(left, width)):
        expected[:, :, index] *= (index + 1) / min(left, width)
    for index in range(min(right, width)):
        expected[:, :, width - 1 - index] *= (index + 1) / min(right, width)
    for index in range(min(top, height)):
        expected[:, index] *= (index + 1) / min(top, height)
    for index in range(min(bottom, height)):
        expected[:, height - 1 - index] *= (index + 1) / min(bottom, height)
    feathered = one(masks.FeatherMask(mask=mask, left=left, top=top, right=right, bottom=bottom))
    assert np.allclose(feathered, expected, atol=1e-6)


def test_masks_combine_where_they_overlap() -> None:
    below, above = random_mask(1), random_mask(1, 4, 4, seed=5)
    both = below[0, 5:7, 7:9], above[0, :2, :2]
    for operation, expected in {
        "multiply": both[0] * both[1],
        "add": (both[0] + both[1]).clamp(max=1),
        "subtract": (both[0] - both[1]).clamp(min=0),
        "and": (both[0].round() * both[1].round()),
        "or": torch.maximum(both[0].round(), both[1].round()),
        "xor": (both[0].round() - both[1].round()).abs(),
    }.items():
        combined = one(masks.MaskComposite(destination=below, source=above, x=7, y=5, operation=operation))
        assert torch.equal(combined[0, 5:7, 7:9], expected)
        assert torch.equal(combined[0, :5], below[0, :5])
    outside = one(masks.MaskComposite(destination=below, source=above, x=50, y=0, operation="add"))
    assert torch.equal(outside, below)
    two, three = random_mask(2), random_mask(3, seed=1)
    several = one(masks.MaskComposite(destination=two, source=three, operation="multiply"))
    assert torch.equal(several, two[[0, 1, 0]] * three)


def test_nothing_is_made_of_an_empty_batch() -> None:
    empty, mask = torch.zeros(0, 8, 8, 3), torch.zeros(0, 8, 8)
    for call in (
        lambda: images.SaveAnimatedPNG(images=empty),
        lambda: images.RepeatImageBatch(image=empty, amount=2),
        lambda: images.ImageQuantize(image=empty, colors=4, dither="none"),
        lambda: images.ImageCompositeMasked(destination=pixels(), source=pixels(), mask=mask),
        lambda: masks.MaskComposite(destination=random_mask(), source=mask, operation="add"),
        lambda: annotate.Canny(image=empty),
        lambda: annotate.CannyEdgePreprocessor(image=empty),
    ):
        with pytest.raises(MahlstickError, match="batch is empty"):
            call()


# --- control pictures and plain values


def test_canny_finds_the_edge_between_its_thresholds() -> None:
    step = torch.zeros(1, 32, 32, 3)
    step[:, :, 16:] = 0.5
    edges = one(annotate.Canny(image=step, low_threshold=0.1, high_threshold=0.2))
    assert edges.shape == step.shape and {*edges.unique().tolist()} == {0.0, 1.0}
    assert (edges[0, 1:-1].sum(dim=(0, 2)) > 0).nonzero().ravel().tolist() in ([15], [16])
    # Blurred by a Gaussian of 1 pixel over 5, a step of 0.5 has a Sobel gradient of 1.29.
    assert not one(annotate.Canny(image=step * 0.3, low_threshold=0.2, high_threshold=0.5)).any()
    assert one(annotate.Canny(image=step * 0.3, low_threshold=0.2, high_threshold=0.3)).any()
    with pytest.raises(MahlstickError, match="low_threshold"):
        annotate.Canny(image=step, low_threshold=0.9, high_threshold=0.2)


def test_annotators_by_their_names_in_comfyui() -> None:
    image = pixels(2, 32, 48)
    edges = one(annotate.CannyEdgePreprocessor(image=image, low_threshold=50, high_threshold=90, resolution=64))
    assert edges.shape == (2, 64, 96, 3)
    options = json.dumps({"low": 50, "high": 90})
    same = annotate.MahlstickAnnotate(image=image, annotator="canny", resolution=64, options=options)
    assert torch.equal(one(same), edges)
    tiled = one(annotate.TilePreprocessor(image=image, resolution=64))
    assert torch.equal(
        one(annotate.AIO_Preprocessor(image=image, preprocessor="TilePreprocessor", resolution=64)), tiled
    )
    assert one(annotate.AIO_Preprocessor(image=image)) is image
    for bad, word in (("[1]", "object"), ("{", "JSON"), ('{"image": 1}', "image")):
        with pytest.raises(MahlstickError, match=word):
            annotate.MahlstickAnnotate(image=image, annotator="canny", options=bad)
    repainted = one(annotate.InpaintPreprocessor(image=image, mask=torch.eye(2)[None]))
    several = annotate.InpaintPreprocessor(image=image, mask=torch.ones(3, 2, 2))
    assert torch.equal(one(several), -torch.ones(3, 32, 48, 3))
    assert (repainted[:, :16, :24] == -1).all() and torch.equal(repainted[:, :14, 26:], image[:, :14, 26:])


def test_plain_values() -> None:
    assert primitives.PrimitiveInt(value=3) == (3,) and primitives.PrimitiveBoolean(value=False) == (False,)
    assert primitives.StringConcatenate(string_a="a", string_b="b", delimiter=", ") == ("a, b",)
    for value, text in (("x", "x"), (2.5, "2.5"), (None, "None"), ({"a": [1]}, '{\n    "a": [\n        1\n    ]\n}')):
        assert shown(primitives.PreviewAny, source=value) == {"text": (text,)}
    assert "tensor" in one(primitives.PreviewAny(source=torch.zeros(1)))
