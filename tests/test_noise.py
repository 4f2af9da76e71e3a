"""Where a clip begins: noise of its own for each frame, of one window, or of a pass before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.pipelines import free_noise_utils
from diffusers.pipelines.free_init_utils import FreeInitMixin
from diffusers.pipelines.free_noise_utils import AnimateDiffFreeNoiseMixin
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mahlstick.pipelines.noise import free_init, free_noise, independent


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_longer_clip_begins_like_a_shorter_one() -> None:
    assert torch.equal(independent(9, (4, 2, 2), seeded())[:5], independent(5, (4, 2, 2), seeded()))


@pytest.mark.parametrize(("frames", "stride"), [(20, 4), (19, 4), (30, 8), (8, 4), (5, 4)])
def test_free_noise_is_diffusers(frames: int, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    peer: Any = AnimateDiffFreeNoiseMixin()
    peer._free_noise_context_length, peer._free_noise_context_stride = 8, stride
    peer._free_noise_noise_type, peer.vae_scale_factor = "shuffle_context", 8
    noise = torch.randn(frames, 4, 2, 2, generator=seeded(1))
    # It shuffles nothing but what it drew itself: so it draws our numbers.
    monkeypatch.setattr(free_noise_utils, "randn_tensor", lambda *_, **__: noise.transpose(0, 1)[None].clone())
    wanted = peer._prepare_latents_free_noise(1, 4, frames, 16, 16, torch.float32, torch.device("cpu"), seeded(2))
    assert torch.equal(free_noise(noise[:8], frames, stride, seeded(2)), wanted[0].transpose(0, 1))


@given(st.integers(2, 12), st.integers(1, 60), st.data())
def test_free_noise_holds_nothing_new(length: int, frames: int, data: Any) -> None:
    stride = data.draw(st.integers(1, length))
    noise = torch.arange(float(length))
    found = free_noise(noise, frames, stride, seeded())
    assert found.shape == (frames,) and set(found.tolist()) <= set(noise.tolist())
    for start in range(length, frames - stride + 1, stride):
        behind, ahead = found[start - length : start - length + stride], found[start : start + stride]
        assert sorted(behind.tolist()) == sorted(ahead.tolist())


def test_free_init_is_diffusers() -> None:
    peer: Any = FreeInitMixin()
    clip, first, fresh = (torch.randn(6, 4, 8, 4, generator=seeded(i)) for i in range(3))
    signal = 0.01

    def by_frames_last(x: Tensor) -> Tensor:
        return x.transpose(0, 1)[None]

    keep = peer._get_free_init_freq_filter((1, 4, 6, 8, 4), "cpu", "butterworth", 4, 0.25, 0.25)
    noised = signal**0.5 * clip + (1 - signal) ** 0.5 * first
    wanted = peer._apply_freq_filter(by_frames_last(noised), by_frames_last(fresh), keep)[0].transpose(0, 1)
    assert torch.allclose(free_init(clip, first, fresh, signal), wanted, atol=1e-5)


def test_free_init_keeps_what_changes_slowly() -> None:
    still = torch.ones(8, 1, 8, 8) * 3
    found = free_init(still, torch.zeros_like(still), torch.zeros_like(still), signal=1.0)
    assert torch.allclose(found, still, atol=1e-4)
    flicker = still * torch.tensor([1.0, -1.0]).repeat(4).view(8, 1, 1, 1)
    gone = free_init(flicker, torch.zeros_like(still), torch.zeros_like(still), signal=1.0)
    assert gone.abs().max() < 1e-3
