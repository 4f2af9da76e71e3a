"""Figures of clips against clips whose motion, flicker and seams are known, and the evaluation of a motion module."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import mahlstick as ms
from benchmarks import tiny
from mahlstick import cli
from mahlstick.errors import MahlstickError
from mahlstick.pipelines.load import Loader
from mahlstick.pipelines.measures import SIDE, ClipFigures, ClipMeasures, frame_encoder, measure_clip
from mahlstick.training import metrics
from mahlstick.training.evaluate import EvaluateConfig, Evaluation, Mean, compare, evaluate
from tests.tiny import sd

Clip = list[Image.Image]

ENCODE = frame_encoder(sd())

quickly = settings(max_examples=6, deadline=None)
levels = st.integers(0, 255)
speeds = st.integers(1, 8)  # working pixels a frame


def plain(level: int) -> Image.Image:
    return Image.new("RGB", (40, 30), (level, level, level))


def texture(side: int, seed: int = 0) -> Image.Image:
    """Soft blots of colour."""
    coarse = np.random.default_rng(seed).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def moving_square(speed: int, frames: int = 5, side: int = SIDE, seed: int = 0) -> Clip:
    """A patch that goes to the right, ``speed`` SIDEths of the side a frame, over a white ground."""
    patch, clip = texture(3 * side // 8, seed), []
    for i in range(frames):
        clip.append(Image.new("RGB", (side, side), "white"))
        clip[-1].paste(patch, (side // 16 + speed * i * side // SIDE, side // 4))
    return clip


def pan(speed: int, frames: int) -> Clip:
    """A wide picture that passes by."""
    wide = texture(SIDE + speed * frames)
    return [wide.crop((speed * i, 0, speed * i + SIDE, SIDE)) for i in range(frames)]


def brighter(clip: Clip, factors: Sequence[float]) -> Clip:
    return [frame.point(lambda x, f=factor: round(x * f)) for frame, factor in zip(clip, factors, strict=True)]


def same(a: ClipFigures, b: ClipFigures, relative: float = 0, absolute: float = 1e-6) -> bool:
    one, other = (np.array([*figures.to_dict().values()], float) for figures in (a, b))
    return np.allclose(one, other, relative, absolute, equal_nan=True)


# motion


@quickly
@given(speeds, st.sampled_from([None, *Image.Transpose]), st.integers(0, 99))
def test_motion_is_the_speed_of_what_moves_wherever_it_goes(
    speed: int, turn: Image.Transpose | None, seed: int
) -> None:
    clip = moving_square(speed, seed=seed)
    clip = clip if turn is None else [frame.transpose(turn) for frame in clip]
    assert measure_clip(clip).motion == pytest.approx(speed / SIDE, rel=0.1)


def test_motion_grows_with_the_speed_of_a_pan_too() -> None:
    for speed in (1, 4, 12):
        found = measure_clip(pan(speed, 4))
        assert found.motion == pytest.approx(speed / SIDE, rel=0.1)
        assert found.flicker < 0.01 < found.change


def test_flicker_is_hardly_motion_and_motion_hardly_flicker() -> None:
    moves = moving_square(4, 6)
    flickers = brighter([moves[0]] * 6, [0.85, 1.0] * 3)
    moving, flickering, both = (measure_clip(c) for c in (moves, flickers, brighter(moves, [0.85, 1.0] * 3)))
    assert flickering.change > 3 * moving.change, "though the pixels change more"
    assert flickering.motion < moving.motion / 20
    assert moving.flicker < flickering.flicker / 20
    assert both.motion == pytest.approx(moving.motion, rel=0.2)
    assert both.flicker == pytest.approx(flickering.flicker, rel=0.2)


# flicker and change


@quickly
@given(levels, levels, st.integers(3, 7))
def test_flicker_of_brightness_that_goes_back_and_forth_is_its_amplitude(a: int, b: int, frames: int) -> None:
    found = measure_clip([plain((a, b)[i % 2]) for i in range(frames)])
    assert found.flicker == pytest.approx(abs(a - b) / 255, abs=1e-6)
    assert found.change == pytest.approx(abs(a - b) / 255, abs=1e-6) and found.motion == 0


@quickly
@given(st.integers(0, 50), st.integers(-10, 10), st.integers(3, 6))
def test_a_fade_changes_and_does_not_flicker(dark: int, step: int, frames: int) -> None:
    start = dark if step > 0 else 255 - dark
    found = measure_clip([plain(start + step * i) for i in range(frames)])
    assert found.flicker == pytest.approx(0, abs=1e-6)
    assert found.change == pytest.approx(abs(step) / 255, abs=1e-6)


# the same clip in another way


@settings(quickly, max_examples=3)
@given(speeds, st.floats(0.7, 1.0))
def test_backwards_it_is_as_fast(speed: int, factor: float) -> None:
    clip = brighter(moving_square(speed, 6), [1.0, factor] * 3)
    assert same(measure_clip(clip[::-1], [1, 4], ENCODE), measure_clip(clip, [2, 5], ENCODE), 1e-4)


@pytest.mark.parametrize("side", [64, 300])
def test_figures_do_not_hang_on_the_number_of_pixels(side: int) -> None:
    clip = moving_square(4, 4)
    scaled = [frame.resize((side, side), Image.Resampling.LANCZOS) for frame in clip]
    assert same(measure_clip(scaled, [2], ENCODE), measure_clip(clip, [2], ENCODE), 0.1, 2e-4)


def test_a_still_clip_is_still_and_so_is_a_frame() -> None:
    for frames in (1, 4):
        found = measure_clip([texture(64)] * frames, encode=ENCODE)
        assert same(found, ClipFigures(0, 0, 0, consistency=1), absolute=1e-3), "at its rim the flow is not quite 0"


@pytest.mark.parametrize("size", [(200, 1), (1, 200), (17, 31), (1, 1)])
def test_odd_sizes(size: tuple[int, int]) -> None:
    found = measure_clip([texture(64, seed).resize(size) for seed in range(3)])
    assert np.isfinite([found.motion, found.change, found.flicker]).all() and found.change > 0


# seams


@pytest.mark.parametrize("speed", [0, 3])
def test_there_is_no_seam_where_all_moves_alike(speed: int) -> None:
    assert measure_clip(pan(speed, 9), [3, 6]).seam == pytest.approx(1, abs=0.05)


@quickly
@given(st.sets(st.integers(1, 5), min_size=1, max_size=3), st.integers(20, 80), st.randoms())
def test_a_jump_is_a_seam_where_a_border_is(borders: set[int], jump: int, random: object) -> None:
    """Levels go up by 5 a frame, and at the borders by more."""
    clip, level = [], 0
    for i in range(6):
        level += (5 if i else 0) + (jump // 3 if i in borders else 0)
        clip.append(plain(level))
    told = [*borders, *borders]
    random.shuffle(told)  # type: ignore[attr-defined]
    expected = (5 + jump // 3) / 5
    assert measure_clip(clip, told).seam == pytest.approx(expected, rel=0.02)
    elsewhere = [i for i in range(1, 6) if i not in borders]
    assert measure_clip(clip, elsewhere).seam == pytest.approx(1 / expected, rel=0.02)


def test_a_jump_of_a_still_clip_is_a_finite_seam() -> None:
    assert 100 < measure_clip([plain(10)] * 3 + [plain(90)] * 3, [3]).seam < 1e4


def test_no_seam_without_borders_or_without_an_inside() -> None:
    assert measure_clip(pan(2, 3)).seam is None
    assert measure_clip(pan(2, 3), [1, 2]).seam is None


# consistency


def test_consistency_is_the_mean_cosine_of_all_neighbours() -> None:
    angles = np.random.default_rng(0).integers(0, 90, 37).tolist()
    batches: list[int] = []

    def encode(frames: Clip) -> torch.Tensor:
        batches.append(len(frames))
        turned = torch.tensor([frame.getpixel((0, 0))[0] for frame in frames]).deg2rad()
        return 3 * torch.stack([turned.cos(), turned.sin()], dim=1)

    found = measure_clip([plain(angle) for angle in angles], encode=encode).consistency
    assert found == pytest.approx(np.cos(np.deg2rad(np.diff(angles))).mean(), abs=1e-6)
    assert sum(batches) == 37 and max(batches) < 37, "each once, and not all at once"


def test_the_encoder_of_a_pipeline() -> None:
    pipe, frames = sd(), [tiny.picture(i) for i in range(3)]
    with torch.no_grad():
        pixels = tiny.feature_extractor()(images=frames, return_tensors="pt")["pixel_values"]
        x = torch.nn.functional.normalize(pipe.image_encoder(pixels).image_embeds)
    expected = (x[0] @ x[1] + x[1] @ x[2]).item() / 2
    assert measure_clip(frames, encode=frame_encoder(pipe)).consistency == pytest.approx(expected, abs=1e-5)
    pipe.image_encoder = None
    assert frame_encoder(pipe) is None and measure_clip(frames).consistency is None


# one by one


def test_figures_so_far_can_be_asked_for_and_the_clip_goes_on() -> None:
    clip, measures = moving_square(3, 4), ClipMeasures(ENCODE)
    for i, frame in enumerate(clip):
        measures.add(frame)
        assert same(measures.result(), measure_clip(clip[: i + 1], encode=ENCODE))


def test_memory_does_not_grow_with_the_frames() -> None:
    measures = ClipMeasures()
    tracemalloc.start()
    kept = []
    for i in range(24):
        measures.add(texture(64, i))
        kept.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert kept[-1] - kept[3] < 20_000, "a frame at work takes ten times as much"


# errors


def test_bad_input() -> None:
    with pytest.raises(MahlstickError, match="the clip has no frames"):
        measure_clip([])
    with pytest.raises(MahlstickError, match="a frame is 30x40 and the first 40x30; bring all to one size"):
        measure_clip([plain(0), plain(0).transpose(Image.Transpose.ROTATE_90)])
    for border in (0, 3, -1):
        with pytest.raises(MahlstickError, match=rf"border {border} is no frame .* give numbers from 1 to 2"):
            measure_clip([plain(0)] * 3, [border])


# ---- mahlstick evaluate --motion

FRAMES = 4
CAPTIONS = {"slow": "a slow square", "fast": "a fast square", "still": ""}
LOADER = Loader()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, ``motion`` that knows four frames, and ``clips``: two folders of frames and an animation."""
    folder = tmp_path_factory.mktemp("models")
    pipe = sd()
    pipe.save_pretrained(folder / "base")
    module = tiny.awake(ms.MotionAdapter.from_unet(pipe.unet, max_frames=FRAMES, heads=2))
    module.save_pretrained(folder / "motion")
    ms.ControlNet.from_unet(pipe.unet).save_pretrained(folder / "net")
    for name, speed in (("slow", 2), ("fast", 6)):
        (folder / "clips" / name).mkdir(parents=True)
        for i, frame in enumerate(moving_square(speed, 6)):
            frame.save(folder / "clips" / name / f"{i}.png")
    frames = [texture(64, i // 2) for i in range(12)]
    frames[0].save(folder / "clips" / "still.webp", save_all=True, append_images=frames[1:], duration=62, lossless=True)
    for name, caption in CAPTIONS.items():
        (folder / "clips" / f"{name}.txt").write_text(caption)
    return folder


def run(models: Path, out: Path, **fields: Any) -> Evaluation:
    given = {"data": models / "clips", "base": models / "base", "motion": models / "motion", "out": out}
    settings = {name: str(path) for name, path in given.items()} | {"frames": FRAMES, "steps": 1, "guidance": 2}
    return evaluate(EvaluateConfig(**settings | fields), loader=LOADER, device="cpu", progress=False)


@pytest.fixture(scope="module")
def found(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return run(models, tmp_path_factory.mktemp("report"))


def clip_of(found: Evaluation, column: str, row: dict[str, Any]) -> list[Path]:
    return sorted((found.report.parent / column / row["picture"]).iterdir())


def stamps(out: Path) -> dict[str, int]:
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in out.glob("*/*/*.png")}


def test_figures_are_those_of_the_clips(found: Evaluation) -> None:
    names = ("motion", "change", "flicker", "consistency")
    assert tuple(found.figures) == names and len(found.rows) == 3
    for column in ("with", "true"):
        clips = [clip_of(found, column, row) for row in found.rows]
        assert [len(clip) for clip in clips] == [FRAMES] * 3
        measured = [measure_clip(clip, encode=ENCODE).to_dict() for clip in clips]
        for name in names:
            assert [row[column][name] for row in found.rows] == pytest.approx([of[name] for of in measured], abs=1e-5)
            mean = np.mean([of[name] for of in measured])
            assert found.figures[name][column].value == pytest.approx(mean, abs=1e-5)
    for name in names:
        of = found.figures[name]
        assert of["ratio"].value == pytest.approx(of["with"].value / of["true"].value)


def test_a_clip_is_made_with_the_module_from_the_seeds_of_its_frames(found: Evaluation, models: Path) -> None:
    pipe, module = sd(), ms.MotionAdapter.from_pretrained(models / "motion")
    row = found.rows[1]
    assert row["seed"] == FRAMES and row["caption"] == CAPTIONS[Path(row["name"]).stem]
    seeds = [torch.Generator().manual_seed(row["seed"] + j) for j in range(FRAMES)]
    with ms.attach(pipe, ms.Motion(module)):
        made = pipe(
            row["caption"], num_images_per_prompt=FRAMES, generator=seeds, num_inference_steps=1, guidance_scale=2
        ).images
    for frame, file in zip(made, clip_of(found, "with", row), strict=True):
        assert abs(np.asarray(frame, int) - np.asarray(Image.open(file), int)).max() <= 1


def test_true_clips_are_the_beginnings_of_those_given(found: Evaluation, models: Path) -> None:
    for row in found.rows:
        shown = [Image.open(file) for file in clip_of(found, "true", row)]
        assert all(frame.size == (64, 64) for frame in shown)
        if row["name"] == "still.webp":  # 16 frames a second, of which every other one is taken, and no two are alike
            assert [frame.tobytes() for frame in shown] == [texture(64, i).tobytes() for i in range(FRAMES)]
        else:
            given = Image.open(models / "clips" / row["name"] / "3.png").resize((64, 64), Image.Resampling.LANCZOS)
            assert shown[3].tobytes() == given.tobytes()


def test_the_report_tells_all(found: Evaluation) -> None:
    out = found.report.parent
    assert found.table()[0] == ["", "made", "true clips", "ratio"]
    text = found.report.read_text(encoding="utf-8")
    assert "3 clips of" in text and "4 frames at 8 a second" in text and "| motion |" in text
    assert "Of only 3 clips" in text and "↑" not in text
    kept = json.loads((out / "figures.json").read_text(encoding="utf-8"))
    assert kept["clips"] == 3 and EvaluateConfig(**kept["settings"]) == found.config
    rows = [json.loads(line) for line in (out / "report.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == found.rows
    sheet = Image.open(out / "contact_sheet.png")
    assert sheet.height > 6 * 96, "two rows for each clip"


def test_nothing_is_made_twice_and_nothing_is_left_of_longer_clips(models: Path, tmp_path: Path) -> None:
    run(models, tmp_path, count=2)
    before = stamps(tmp_path)
    (tmp_path / "with" / "00001" / "0002.png").unlink()
    run(models, tmp_path, count=2)
    after = stamps(tmp_path)
    assert {name for name in before if after[name] != before[name]} == {name for name in before if "00001" in name}
    run(models, tmp_path, count=2, frames=3)
    assert len(stamps(tmp_path)) == 2 * 2 * 3


def test_a_clip_made_in_windows_has_a_seam(models: Path, tmp_path: Path) -> None:
    found = run(models, tmp_path, frames=6, count=1, fps=16)
    motion = ms.Motion(ms.MotionAdapter.from_pretrained(models / "motion"), 6)
    with ms.attach(sd(), motion) as attached:
        borders = attached.attachments[0].context.borders(6)
    assert borders
    for column in ("with", "true"):
        seam = measure_clip(clip_of(found, column, found.rows[0]), borders).seam
        assert found.figures["seam"][column].value == pytest.approx(seam)


def test_without_an_image_encoder_consistency_is_left_out(models: Path, tmp_path: Path) -> None:
    pipe = sd()
    pipe.image_encoder = pipe.feature_extractor = None
    pipe.save_pretrained(tmp_path / "base")
    found = run(models, tmp_path / "out", base=str(tmp_path / "base"), count=1)
    assert "consistency" not in found.figures and "Consistency is left out" in found.notes[0]


def test_no_ratio_to_clips_that_stand_still() -> None:
    values = {"with": np.array([0.2, 0.4]), "true": np.zeros(2)}
    assert "ratio" not in compare(values)
    assert compare(values)["true"] == Mean(0.0, 0.0, 0.0)


@quickly
@given(st.lists(st.floats(0.1, 5), min_size=2, max_size=9), st.floats(0.2, 5))
def test_ratio_of_means(values: list[float], factor: float) -> None:
    assert metrics.ratio_with_interval(np.multiply(values, factor), values) == pytest.approx((factor,) * 3)
    ratio, low, high = metrics.ratio_with_interval(values, values[::-1])
    assert ratio == pytest.approx(1) and low <= 1 <= high


def test_ratio_of_means_leaves_out_draws_of_nothing() -> None:
    ratio, low, high = metrics.ratio_with_interval([1, 1], [0, 1])
    assert (ratio, low, high) == (2, 1, 2)
    with pytest.raises(MahlstickError, match="no ratio to a mean of 0"):
        metrics.ratio_with_interval([1], [0])


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"frames": 7}, "'(fast|slow|still.webp)' has 6 of 7 frames; give fewer --frames, or a higher --fps"),
        ({"control": "{models}/net"}, "control is given with motion, which is judged alone"),
        ({"motion": "{models}/net"}, "motion: .*net holds a controlnet; give a motion_adapter"),
        ({"motion": "nowhere"}, "nowhere: neither a file or folder nor an embedded adapter"),
        ({"data": "{models}/motion"}, "motion' holds no clips"),
        ({"frames": 1}, "frames: should be greater than or equal to 2, not 1"),
    ],
)
def test_bad_settings(models: Path, tmp_path: Path, fields: dict[str, Any], error: str) -> None:
    given = {name: value.format(models=models) if isinstance(value, str) else value for name, value in fields.items()}
    with pytest.raises(MahlstickError, match=error):
        run(models, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_a_broken_clip_is_named_before_anything_is_made(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "clips", tmp_path / "clips")
    (tmp_path / "clips" / "fast" / "2.png").write_bytes(b"no picture")
    with pytest.raises(MahlstickError, match=r"fast.2\.png"):
        run(models, tmp_path / "out", data=str(tmp_path / "clips"))
    assert not (tmp_path / "out").exists()


def test_the_command(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "--data", str(models / "clips"), "--base", str(models / "base")]
    command += ["--motion", f"{models / 'motion'}:0.5", "--frames", "3", "--fps", "16", "--steps", "1", "--count", "1"]
    assert cli.main([*command, "--out", str(tmp_path / "out"), "--device", "cpu", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    settings = told["settings"]
    assert (settings["motion_scale"], settings["frames"], settings["fps"]) == (0.5, 3, 16) and told["clips"] == 1
