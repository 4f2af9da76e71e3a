"""Motion modules learn from clips: a row of a batch is a clip, only the module learns, and what it learned loads."""

from __future__ import annotations

import copy
import json
import tarfile
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image, ImageDraw
from safetensors.torch import load_file

import mahlstick as ms
from benchmarks import tiny
from mahlstick.pipelines.video import VideoWriter
from mahlstick.training.config import TrainConfig, from_flags
from mahlstick.training.data import FolderSource, read_dataset
from mahlstick.training.objective import Objective
from mahlstick.training.run import train
from mahlstick.training.tasks import MotionTask, evenly, heads_of

FRAMES = 4
SHALLOW = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def moving(seed: int, count: int = 6) -> list[Image.Image]:
    """A disc that crosses the picture."""
    rng = np.random.default_rng(seed)
    colour, top = tuple(int(v) for v in rng.integers(0, 200, 3)), int(rng.integers(4, 30))
    frames = []
    for i in range(count):
        frames.append(Image.new("RGB", (tiny.SIZE, tiny.SIZE), "white"))
        ImageDraw.Draw(frames[-1]).ellipse((7 * i, top, 7 * i + 30, top + 30), fill=colour)
    return frames


def lay(folder: Path, frames: list[Image.Image]) -> Path:
    """Frames as a folder."""
    folder.mkdir(parents=True)
    for i, frame in enumerate(frames):
        frame.save(folder / f"{i}.png")
    return folder


def film(path: Path, frames: list[Image.Image], fps: float = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, fps, frames[0].size) as video:
        for frame in frames:
            video.write(frame)
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four folders of frames with captions; one clip is longer than the others."""
    folder = tmp_path_factory.mktemp("clips")
    for i in range(4):
        lay(folder / f"{i}", moving(i, 6 + 2 * (i == 3)))
        (folder / f"{i}.txt").write_text(f"disc {i}\na round thing\n")
    return folder


def pipe(family: str = "sd1") -> Any:
    """A tiny base of one's own."""
    if family == "sdxl":
        return tiny.quiet(StableDiffusionXLPipeline(**copy.deepcopy(tiny.components(family))))
    return tiny.quiet(StableDiffusionPipeline(**copy.deepcopy(tiny.components(family, **SHALLOW))))


def config(clips: Path, out: Path, **fields: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "frames": FRAMES, "steps": 4, "batch": 2, "validate_every": 0, "checkpoint_every": 2, "warmup": 1, "rate": 1e-3,
        "held_out": 0.0, "resolution": tiny.SIZE, "log_every": 1, "cache": str(clips.parent / "encoded"),
    }  # fmt: skip
    return TrainConfig(task="motion", data=str(clips), out=str(out), **defaults | fields)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def same(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def batch_of(task: MotionTask, clips: Path, count: int = 2) -> dict[str, torch.Tensor]:
    """The first clips, drawn and noised the same at each call."""
    features = task.encode(read_dataset(clips, kind="clips")[:count])
    rows = [task.draw(row, torch.Generator().manual_seed(i)) for i, row in enumerate(features)]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    task.to_learn(torch.device("cpu"), torch.float32)
    return batch | {"u": torch.linspace(0.2, 0.8, count)}


def awake(task: MotionTask) -> MotionTask:
    """Away from the zeros with which a module begins."""
    tiny.awake(task.motion)
    return task


# --- the task


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_row_is_a_clip_of_one_time_and_one_text(family: str, clips: Path, tmp_path: Path) -> None:
    """Its loss is the mean over the frames of what the bare UNet under the module gives."""
    task = awake(MotionTask(config(clips, tmp_path), pipe(family)))
    batch = batch_of(task, clips)
    assert batch["latents"].shape == batch["noise"].shape == (2, FRAMES, 4, 8, 8) and batch["text"].ndim == 3
    assert len({float(noise.sum()) for noise in batch["noise"].flatten(0, 1)}) == 2 * FRAMES
    found = task(batch)
    task.attachment.detach()
    objective, unet = Objective(task.pipe.scheduler), task.pipe.unet
    for i in range(2):
        u, frames = batch["u"][i].expand(FRAMES), [FRAMES, -1, -1]
        noised, t, target, _ = objective.noised(batch["latents"][i], batch["noise"][i], u)
        added = {}
        if family == "sdxl":
            pooled, sizes = (batch[name][i].expand(FRAMES, -1) for name in ("pooled", "time_ids"))
            added["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
            assert batch["time_ids"][i].tolist() == [tiny.SIZE, tiny.SIZE, 0, 0, tiny.SIZE, tiny.SIZE]
        with ms.attach(unet, ms.Motion(task.motion)):
            moved = unet(noised, t, batch["text"][i].expand(frames), **added).sample
        still = unet(noised, t, batch["text"][i].expand(frames), **added).sample
        torch.testing.assert_close(found[i], (moved - target).square().mean())
        assert abs(found[i] - (still - target).square().mean()) > 1e-3


def test_only_the_module_learns(clips: Path, tmp_path: Path) -> None:
    task = awake(MotionTask(config(clips, tmp_path), pipe()))
    task(batch_of(task, clips)).sum().backward()
    learned = dict(task.named_parameters())
    assert {name.split(".")[0] for name in learned} == {"motion"}
    assert all(p.grad is not None and p.grad.any() for p in learned.values())
    assert all(p.grad is None for part in task.frozen.values() for p in part.parameters())


def test_checkpointed_gradients_are_the_same(clips: Path, tmp_path: Path) -> None:
    plain = weights(train(config(clips, tmp_path / "plain", steps=2), pipe()))
    again = weights(train(config(clips, tmp_path / "again", steps=2, gradient_checkpointing=True), pipe()))
    assert all(torch.allclose(plain[name], again[name], atol=1e-6) for name in plain)


def test_a_window_of_each_clip_follows_from_the_draw(clips: Path, tmp_path: Path) -> None:
    task = MotionTask(config(clips, tmp_path, noise_offset=0.1), pipe())
    (features,) = task.encode(read_dataset(clips, kind="clips")[3:])
    assert len(features["latents"]) == 8
    found = [task.draw(features, torch.Generator().manual_seed(seed)) for seed in range(40)]
    starts = [[torch.equal(row["latents"], features["latents"][i : i + FRAMES]) for i in range(5)] for row in found]
    assert {row.index(True) for row in starts} == {0, 1, 2, 3, 4}
    again = task.draw(features, torch.Generator().manual_seed(0))
    assert all(torch.equal(value, again[name]) for name, value in found[0].items())


def test_a_run_in_two_parts_ends_with_the_same_bits(clips: Path, tmp_path: Path) -> None:
    fields = {"ema": 0.9, "held_out": 0.3}
    whole = train(config(clips, tmp_path / "whole", validate_every=4, **fields), pipe())
    start = train(config(clips, tmp_path / "parts", steps=2, **fields), pipe())
    assert not same(whole, start)
    assert same(whole, train(config(clips, tmp_path / "parts", **fields), pipe()))
    log = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert np.isfinite([line["loss"] for line in log if "loss" in line]).all()
    assert log[-1]["motion_ratio"] >= 0 and log[-1]["change_ratio"] > 0
    with Image.open(whole / "samples" / "step-00000004.png") as grid:
        assert grid.width == 2 * FRAMES * tiny.SIZE
    assert "trained with mahlstick on 3 clips" in (whole / "README.md").read_text()


def test_micro_batches_change_nothing_but_rounding(clips: Path, tmp_path: Path) -> None:
    whole = weights(train(config(clips, tmp_path / "whole", batch=4, steps=1), pipe()))
    parts = weights(train(config(clips, tmp_path / "parts", batch=4, steps=1, micro_batch=2), pipe()))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=2e-4, rtol=1e-3)


def test_one_moving_clip_is_learned(clips: Path, tmp_path: Path) -> None:
    task = MotionTask(config(clips, tmp_path, text_dropout=0.0), pipe())
    batch = batch_of(task, clips, count=1)
    optimiser = torch.optim.Adam(task.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        losses.append(task(batch).mean())
        losses[-1].backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < 0.8 * losses[0]


def test_the_result_is_the_same_in_diffusers(clips: Path, tmp_path: Path) -> None:
    base = pipe()
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    out = train(config(clips, tmp_path / "out", rate=1e-2), base)
    assert all(torch.equal(value, before[name]) for name, value in base.unet.state_dict().items())
    ours, theirs = ms.MotionAdapter.from_pretrained(out), diffusers.MotionAdapter.from_pretrained(out)
    base = pipe()  # with nothing attached
    unet = diffusers.UNetMotionModel.from_unet2d(base.unet, theirs).eval()
    x, text = torch.randn(FRAMES, 4, 8, 8), torch.randn(1, 7, tiny.WIDTH)
    with torch.no_grad():
        wanted = unet(x.transpose(0, 1)[None], 401, text.expand(FRAMES, -1, -1)).sample[0].transpose(0, 1)
        still = base.unet(x, 401, text.expand(FRAMES, -1, -1)).sample
        with ms.attach(base.unet, ms.Motion(ours)):
            found = base.unet(x, 401, text.expand(FRAMES, -1, -1)).sample
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert (found - still).abs().max() > 1e-3


def test_another_module_is_gone_on_from(clips: Path, tmp_path: Path) -> None:
    fresh = {"positions": "learned", "norm": "frame", "mid_block": False}
    first = train(config(clips, tmp_path / "first", **fresh, steps=1), pipe())
    unmoved = train(config(clips, tmp_path / "unmoved", start=str(first), steps=1, rate=1e-12), pipe())
    one, other = weights(first), weights(unmoved)
    assert one.keys() == other.keys() and all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)
    module = ms.MotionAdapter.from_pretrained(unmoved)
    assert (module.config["positions"], module.config["norm"], module.mid_block) == ("learned", "frame", None)
    short = train(config(clips, tmp_path / "short", frames=2, steps=1), pipe())
    with pytest.raises(ms.MahlstickError, match="tells 2 apart, not 4"):
        MotionTask(config(clips, tmp_path, start=str(short)), pipe())


def test_clips_that_are_too_short_are_left_out(clips: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(config(clips, tmp_path / "out", frames=8, steps=1, batch=1), pipe())
    assert "3 of 4 examples were skipped" in caplog.text and "'0' has 6 of 8 frames" in caplog.text
    with pytest.raises(ms.MahlstickError, match="none of 4 examples can be read; the first is '0': '0' has 6 of 9"):
        train(config(clips, tmp_path / "none", frames=9), pipe())


def test_flags_are_those_of_the_task(tmp_path: Path) -> None:
    found = from_flags("motion --data clips --out it --frames 24 --fps 12.5 --positions rotary".split())
    assert (found.frames, found.fps, found.positions, found.norm) == (24, 12.5, "rotary", "clip")
    assert found.peak_rate == 1e-4 and MotionTask(config(tmp_path, tmp_path), pipe()).text_dropout == 0.1


def test_heads_divide_every_width() -> None:
    assert heads_of(tiny.unet("sd1")) == 8
    assert heads_of(tiny.unet("sd1", block_out_channels=(12, 24, 24, 24))) == 6
    assert heads_of(tiny.unet("sd1"), pairs=True) == 4
    assert evenly(range(16), 8) == [0, 2, 4, 6, 8, 10, 12, 14] and evenly([1, 2], 8) == [1, 2]


# --- its data


def test_every_kind_of_clip_is_read(tmp_path: Path) -> None:
    frames = moving(1, 8)
    lay(tmp_path / "set" / "deep" / "folder.v2", frames)
    for name in ("a.mp4", "b.webp", "deep/c.gif"):
        film(tmp_path / "set" / name, frames)
    for name in ("a", "b", "deep/folder.v2"):
        (tmp_path / "set" / f"{name}.txt").write_text(f"{name} moves\nanother\n")
    examples = read_dataset(tmp_path / "set", kind="clips")
    found = {example.name: example.captions for example in examples}
    assert found == {
        "a.mp4": ("a moves", "another"),
        "b.webp": ("b moves", "another"),
        "deep/c.gif": ("",),
        "deep/folder.v2": ("deep/folder.v2 moves", "another"),
    }
    for example in examples:
        shown = list(example.frames(8))
        assert len(shown) == 8 and shown[0].size == (tiny.SIZE, tiny.SIZE)
        wrong = np.abs(np.stack(shown).astype(int) - np.stack(frames)).mean()
        assert wrong == 0 if example.name == "deep/folder.v2" else wrong < 8, example.name
    assert len(list(examples[0].frames(4))) == 4, "every second frame"
    assert len(list(examples[3].frames(4))) == 8, "a folder has no rate"
    assert len({example.digest() for example in examples}) == 4


def test_a_folder_is_known_by_its_frames(tmp_path: Path) -> None:
    one, other = lay(tmp_path / "set" / "one", moving(1)), lay(tmp_path / "set" / "other", moving(1))
    a, b = read_dataset(tmp_path / "set", kind="clips")
    assert isinstance(a.picture, FolderSource) and a.picture_digest == b.picture_digest
    moving(2)[0].save(other / "0.png")
    changed = read_dataset(tmp_path / "set", kind="clips")
    assert changed[0].digest() == a.digest() and changed[1].digest() != b.digest()
    (one / "notes.md").write_text("no frame")
    assert read_dataset(tmp_path / "set", kind="clips")[0].digest() == a.digest()


def test_metadata_names_files_and_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lay(tmp_path / "in" / "one", moving(1))
    lay(tmp_path / "in" / "spare", moving(2))
    film(tmp_path / "two.webp", moving(3))
    rows = [{"file_name": "in/one", "text": ["a", "b"]}, {"file_name": "two.webp", "caption": "c"}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = read_dataset(tmp_path, kind="clips")
    assert [(example.name, example.captions) for example in examples] == [("in/one", ("a", "b")), ("two.webp", ("c",))]
    assert [len(list(example.frames(8))) for example in examples] == [6, 6]
    assert "does not name them: 'in/spare'" in caplog.text


def test_shards_hold_videos(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    film(outside / "fox.webp", moving(1))
    film(outside / "owl.mp4", moving(2))
    (outside / "fox.txt").write_text("a fox")
    (tmp_path / "owl.json").write_text(json.dumps({"text": "an owl"}))
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as archive:
        for file in (*outside.iterdir(), tmp_path / "owl.json"):
            archive.add(file, file.name)
    fox, owl = read_dataset(tmp_path / "shards", kind="clips")
    assert (fox.name, fox.captions, owl.name, owl.captions) == ("0.tar/fox", ("a fox",), "0.tar/owl", ("an owl",))
    for inside, beside in zip((fox, owl), read_dataset(outside, kind="clips"), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(inside.frames(8), beside.frames(8), strict=True))


def refused(path: Path, *words: str) -> None:
    with pytest.raises(ms.MahlstickError) as caught:
        for example in read_dataset(path, kind="clips"):
            list(example.frames(8))
    assert "\n" not in str(caught.value) and ";" in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_what_cannot_be_learned_from_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", "does not exist")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no clips", "mp4", "folders of frames")
    refused(lay(tmp_path / "flat", moving(1)), "flat", "put the frames of each clip into a subfolder")
    lay(tmp_path / "twice" / "fox", moving(1))
    film(tmp_path / "twice" / "fox.webp", moving(1))
    refused(tmp_path / "twice", "fox.webp", "share one name")
    lay(tmp_path / "lone" / "fox", moving(1))
    (tmp_path / "lone" / "owl.txt").write_text("an owl")
    refused(tmp_path / "lone", "captions without clips", "'owl.txt'")
    lay(tmp_path / "named" / "fox", moving(1))
    (tmp_path / "named" / "metadata.jsonl").write_text(json.dumps({"file_name": "owl", "text": "an owl"}))
    refused(tmp_path / "named", "names 'owl', which is not there")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "fox.mp4").write_bytes(b"no video at all")
    refused(tmp_path / "broken", "fox.mp4")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    refused(tmp_path / "saved", "Hugging Face dataset", ".tar shards")
