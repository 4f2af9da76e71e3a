"""Clips longer than a motion module sees: windows around the UNet's call, and what every unit sees in them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mahlstick as ms
from benchmarks import tiny
from mahlstick.adapters.context import Context, Schedule, halving, weights

LONG, SEEN = 7, 4
STATIC: dict[str, Any] = {"context": SEEN, "overlap": 2, "schedule": "static"}


# which frames


@settings(deadline=None, max_examples=80)
@given(st.integers(2, 40), st.integers(2, 12), st.data(), st.sampled_from(["uniform", "static", "looped"]))
def test_windows_hold_every_frame(frames: int, length: int, data: Any, schedule: Schedule) -> None:
    overlap, step = data.draw(st.integers(0, length - 1)), data.draw(st.integers(0, 50))
    windows = Context(length, overlap, schedule).windows(frames, step)
    assert {frame for window in windows for frame in window} == set(range(frames))
    assert all(len(window) == min(length, frames) for window in windows)
    for window in windows:
        steps = {(b - a) % frames for a, b in pairwise(window)}
        assert steps <= {1}, "a window's frames follow each other"
    if frames <= length:
        assert windows == [list(range(frames))]
    elif schedule != "looped":
        assert all(b[0] - a[0] <= length - overlap for a, b in pairwise(windows))
        stride = length - overlap
        assert len(windows) <= -(-(frames - overlap) // stride) + 1, (
            "no more windows than needed, and one for the shift"
        )


def test_borders_move_from_step_to_step() -> None:
    uniform = Context(16, 4, "uniform")
    starts = [tuple(window[0] for window in uniform.windows(64, step)) for step in range(8)]
    assert len(set(starts)) == 8
    assert len({tuple(w[0] for w in Context(16, 4, "static").windows(64, step)) for step in range(8)}) == 1
    assert [halving(step) for step in range(6)] == [0, 0.5, 0.25, 0.75, 0.125, 0.625]
    assert weights(5).tolist() == [1, 2, 3, 2, 1] and weights(4).tolist() == [1, 2, 2, 1]
    assert weights(3, "flat").tolist() == [1, 1, 1]
    wrapped = [window for window in Context(4, 1, "looped").windows(8) if window[0] > window[-1]]
    assert wrapped, "a loop's end and beginning share a window"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"context": 1}, "context must be a whole number of at least 2 frames; got 1"),
        ({"context": 4, "overlap": 4}, "overlap must be a whole number from 0 to 3; got 4"),
        ({"context": 4, "schedule": "random"}, "schedule must be one of uniform, static, looped"),
        ({"context": 9}, "9 frames are more than the 8"),
    ],
)
def test_what_no_window_can_be(options: dict[str, Any], told: str) -> None:
    unet = tiny.unet("sd1")
    with pytest.raises(ms.MahlstickError, match=told):
        ms.attach(unet, ms.Motion(tiny.motion_adapter(unet), **options))


# what is computed


def averaged(by_window: dict[tuple[int, ...], Tensor]) -> Tensor:
    """Outputs (parts · frames of a window, ...) joined as MultiDiffusion does, in plain loops."""
    total: dict[int, Any] = {}
    for window, output in by_window.items():
        rows = output.unflatten(0, (-1, len(window)))
        for place, frame in enumerate(window):
            weight = min(place + 1, len(window) - place)
            one, whole = total.get(frame, (0, 0))
            total[frame] = one + weight * rows[:, place], whole + weight
    return torch.stack([total[frame][0] / total[frame][1] for frame in sorted(total)], dim=1).flatten(0, 1)


def rows_of(value: Any, window: tuple[int, ...], parts: int) -> Any:
    if isinstance(value, dict):
        return {name: rows_of(inner, window, parts) for name, inner in value.items()}
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    return torch.cat([part[list(window)] for part in value.chunk(parts)])


@torch.no_grad()
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("guidance", [False, True])
def test_windows_are_calls_of_their_own(family: str, guidance: bool) -> None:
    """With a control picture, a mask and a reference for each frame: the windowed call is the average of calls that
    each see their own frames' conditions."""
    unet, parts = tiny.unet(family), 2 if guidance else 1
    motion, net = tiny.motion_adapter(unet), tiny.controlnet(family)
    control, ip = ms.ControlNet.from_unet(unet, conditioning_embedding_out_channels=(4, 6, 6, 8)), None
    control.load_state_dict(net.state_dict())
    ip = ms.IPAdapter.from_unet(unet, tokens=2, feature_dim=tiny.WIDTH)
    inputs = tiny.unet_inputs(family, batch=parts * LONG)
    frames = torch.rand(LONG, 3, tiny.SIZE, tiny.SIZE)
    features, masks = torch.randn(LONG, tiny.WIDTH), torch.rand(LONG, 1, tiny.SIZE, tiny.SIZE)

    def units(at: list[int], **options: Any) -> list[ms.pipelines.units.Unit]:
        return [
            ms.Control(control, frames[at], scale=0.8, mask=masks[at], mode="control"),
            ms.Motion(motion, **options),
            ms.ImagePrompt(ip, features=features[at], negative_features=features[:1] * 0, mask=masks[:1, 0]),
        ]

    everything = list(range(LONG))
    with ms.attach(unet, *units(everything, **STATIC), guidance=guidance):
        found = unet(**inputs).sample
        again = unet(**inputs, return_dict=False)[0]
    windows = [tuple(w) for w in Context(SEEN, 2, "static").windows(LONG)]
    assert len(windows) == 3
    alone = {}
    for window in windows:
        with ms.attach(unet, *units(list(window)), guidance=guidance):
            alone[window] = unet(**rows_of(inputs, window, parts)).sample
    assert torch.allclose(found, averaged(alone), atol=1e-5)
    assert torch.equal(found, again)
    with ms.attach(unet, *units(everything, extend="interpolate"), guidance=guidance):
        assert (unet(**inputs).sample - found).abs().max() > 1e-4


@torch.no_grad()
def test_two_clips_in_windows() -> None:
    unet = tiny.unet("sd1")
    module, inputs = tiny.motion_adapter(unet), tiny.unet_inputs("sd1", batch=2 * LONG)
    with ms.attach(unet, ms.Motion(module, frames=LONG, **STATIC)):
        both = unet(**inputs).sample
    for clip in range(2):
        one = {name: value[clip * LONG : (clip + 1) * LONG] if value.ndim else value for name, value in inputs.items()}
        with ms.attach(unet, ms.Motion(module, **STATIC)):
            assert torch.allclose(unet(**one).sample, both[clip * LONG : (clip + 1) * LONG], atol=1e-5)


@torch.no_grad()
def test_two_motion_modules_in_windows() -> None:
    """The outer one's windows are those of both; with per-frame controls each still sees its own."""
    unet, inputs = tiny.unet("sd1"), tiny.unet_inputs("sd1", batch=LONG)
    module = tiny.motion_adapter(unet)
    net = ms.ControlNet.from_unet(unet, conditioning_embedding_out_channels=(4, 6, 6, 8))
    net.load_state_dict(tiny.controlnet("sd1").state_dict())
    control = ms.Control(net, torch.rand(LONG, 3, tiny.SIZE, tiny.SIZE))
    half = ms.Motion(module, frames=LONG, scale=0.5, **STATIC)
    with ms.attach(unet, half, control, ms.Motion(module, frames=LONG, scale=0.5, context=5, overlap=2)):
        found = unet(**inputs).sample
    with ms.attach(unet, half, control):
        assert found.isfinite().all() and (unet(**inputs).sample - found).abs().max() > 1e-4


@torch.no_grad()
def test_up_to_the_context_it_is_the_plain_call() -> None:
    unet = tiny.unet("sd1")
    module, inputs = tiny.motion_adapter(unet), tiny.unet_inputs("sd1", batch=LONG)
    with ms.attach(unet, ms.Motion(module)):
        plain = unet(**inputs).sample
    with ms.attach(unet, ms.Motion(module, context=LONG)):
        assert torch.equal(unet(**inputs).sample, plain)


@torch.no_grad()
def test_windows_that_nobody_asked_for_are_said() -> None:
    unet = tiny.unet("sd1")
    with ms.attach(unet, ms.Motion(tiny.motion_adapter(unet))) as attached, pytest.warns(UserWarning) as told:
        for _ in range(2):
            unet(**tiny.unet_inputs("sd1", batch=9))
    assert [str(warning.message)[:86] for warning in told] == [
        "9 frames are more than the 8 that this motion module knows, so they are made in window"
    ]
    assert attached.attachments[0].context == Context(8, 2)  # type: ignore[attr-defined]


@torch.no_grad()
def test_no_call_is_larger_than_a_window() -> None:
    """Neither the UNet's nor a ControlNet's, nor its hint's, however long the clip."""
    unet = tiny.unet("sd1")
    net = ms.ControlNet.from_unet(unet, conditioning_embedding_out_channels=(4, 6, 6, 8))
    seen: set[int] = set()
    for module in (unet.conv_in, net.conv_in, net.controlnet_cond_embedding.conv_in):
        module.register_forward_pre_hook(lambda _, args: seen.add(args[0].shape[0]))
    frames = torch.rand(10, 3, tiny.SIZE, tiny.SIZE)
    for scale in (1.0, 0.0):
        motion = ms.Motion(tiny.motion_adapter(unet), context=SEEN, scale=scale)
        with ms.attach(unet, motion, ms.Control(net, frames), guidance=True):
            unet(**tiny.unet_inputs("sd1", batch=20))
        assert seen == {2 * SEEN, SEEN}


@torch.no_grad()
def test_a_prompt_for_all_frames_needs_one_row() -> None:
    unet = tiny.unet("sdxl")
    inputs = tiny.unet_inputs("sdxl", batch=2 * LONG)
    two = {
        "encoder_hidden_states": inputs["encoder_hidden_states"][:2],
        "added_cond_kwargs": {name: value[:2] for name, value in inputs["added_cond_kwargs"].items()},
    }

    def repeated(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: repeated(inner) for name, inner in value.items()}
        return value.repeat_interleave(LONG, dim=0)

    for options in ({}, STATIC):
        with ms.attach(unet, ms.Motion(tiny.motion_adapter(unet), **options), guidance=True):
            short = unet(**inputs | two).sample
            whole = unet(**inputs | {name: repeated(value) for name, value in two.items()}).sample
        assert torch.equal(short, whole)


@torch.no_grad()
def test_a_call_that_fails_leaves_nothing() -> None:
    unet = tiny.unet("sd1")
    module, inputs = tiny.motion_adapter(unet), tiny.unet_inputs("sd1", batch=LONG)
    plain = unet(**inputs).sample
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls in (2, 5):  # within a window's own call, and in the one that goes on
            raise RuntimeError("out of memory")

    attached = ms.attach(unet, ms.Motion(module, **STATIC))
    wanted = unet(**inputs).sample
    handle = unet.mid_block.register_forward_pre_hook(fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            unet(**inputs)
    assert calls == 5
    handle.remove()
    assert torch.equal(unet(**inputs).sample, wanted)
    attached.detach()
    assert torch.equal(unet(**inputs).sample, plain)


def test_windows_on_a_pipeline() -> None:
    """Uniform windows move with the pipeline's steps; text, controls and guidance are the stock pipeline's."""
    pipe = tiny.quiet(diffusers.StableDiffusionPipeline(**tiny.components("sd1")))
    module = tiny.motion_adapter(pipe.unet)
    frames = [tiny.picture(seed) for seed in range(LONG)]
    net = ms.ControlNet.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 6, 6, 8))
    starts: list[Any] = []

    def make(**options: Any) -> Tensor:
        with ms.attach(pipe, ms.Control(net, frames), ms.Motion(module, **options)) as attached:
            attachment: Any = attached.attachments[1]
            before = attachment.excerpts
            attachment.excerpts = lambda arguments: starts.append(before(arguments)) or starts[-1]
            call = pipe("fox", num_images_per_prompt=LONG, num_inference_steps=3, output_type="latent", height=64,
                        width=64, generator=torch.Generator().manual_seed(1))  # fmt: skip
        return call.images

    uniform = make(context=SEEN, overlap=0)
    assert len({tuple(e.pictures for e in step) for step in starts}) > 1
    assert (make(context=SEEN, overlap=0, schedule="static") - uniform).abs().max() > 1e-4
    assert torch.equal(make(context=SEEN, overlap=0), uniform)
