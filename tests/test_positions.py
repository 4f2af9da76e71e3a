"""Positions: published tables and rotations, what must hold of them, and their extension to more frames."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mahlstick as ms
from mahlstick.adapters import positions

# tables


def test_the_table_is_diffusers() -> None:
    from diffusers.models.embeddings import SinusoidalPositionalEmbedding

    wanted = SinusoidalPositionalEmbedding(24, max_seq_length=16).pe[0]
    assert torch.allclose(positions.sinusoidal(torch.arange(16), 24), wanted, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 12), st.integers(1, 40), st.sampled_from(["interpolate", "ntk", "repeat"]))
def test_extension_is_exact_up_to_the_trained_length(length: int, frames: int, how: positions.Extension) -> None:
    table = positions.sinusoidal(torch.arange(length), 8)[None]
    found = positions.extend(table, frames, how)
    assert found.shape == (1, frames, 8)
    if frames <= length:
        assert torch.equal(found, table[:, :frames])
    elif how == "interpolate":
        assert torch.allclose(found[:, [0, -1]], table[:, [0, -1]], atol=1e-6)
        assert found.abs().max() <= table.abs().max() + 1e-6
    elif how == "repeat":
        assert torch.equal(found[:, length:], found[:, : frames - length])
    else:
        assert torch.allclose(found[0, :, 0], torch.arange(frames).float().sin(), atol=1e-5), "the fastest stays"
        slowest = positions.sinusoidal(torch.tensor([float(length - 1)]), 8)[0, -2:]
        assert torch.allclose(found[0, -1, -2:], slowest, atol=1e-4), "the slowest turns as far as it did"


def sincos_by_hand(frames: int, height: int, width: int, dim: int) -> np.ndarray:
    """The formula, number by number."""
    space = 2 * int(3 * dim / 16)
    table = np.zeros((1 + frames * height * width, dim))
    row = 0
    for t in range(frames):
        for y in range(height):
            for x in range(width):
                row += 1
                channel = 0
                for place, part in ((t, dim - 2 * space), (y, space), (x, space)):
                    for i in range(part):
                        angle = place / 10000 ** (2 * (i // 2) / part)
                        table[row, channel] = np.cos(angle) if i % 2 else np.sin(angle)
                        channel += 1
    return table


@pytest.mark.parametrize("shape", [(3, 2, 4, 16), (2, 3, 3, 32), (1, 1, 5, 48), (4, 2, 2, 6), (2, 2, 2, 20)])
def test_the_table_of_three_axes_by_hand(shape: tuple[int, int, int, int]) -> None:
    found = positions.sincos_3d(*shape)
    assert np.allclose(found.numpy(), sincos_by_hand(*shape), atol=1e-5)
    assert torch.equal(positions.sincos_3d(*shape, class_token=False), found[1:])


def test_the_table_of_three_axes_is_diffusers_in_another_order() -> None:
    """Which puts the column before the row, and all sines before the cosines."""
    from diffusers.models.embeddings import get_3d_sincos_pos_embed

    frames, height, width, dim = 3, 2, 4, 32
    wanted = get_3d_sincos_pos_embed(dim, (width, height), frames).flatten(0, 1)
    time, row, column = positions.sincos_3d(frames, height, width, dim)[1:].split([8, 12, 12], dim=-1)
    found = [half for part in (time, column, row) for half in (part[:, 0::2], part[:, 1::2])]
    assert torch.allclose(torch.cat(found, dim=-1), wanted.float(), atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.integers(6, 70))
def test_each_axis_has_channels_of_its_own(frames: int, height: int, width: int, dim: int) -> None:
    table = positions.sincos_3d(frames, height, width, dim)
    assert table.shape == (1 + frames * height * width, dim)
    assert not table[0].any(), "the class token is nowhere"
    space = dim * 3 // 16 * 2
    time, row, column = table[1:].view(frames, height, width, dim).split([dim - 2 * space, space, space], dim=-1)
    assert torch.equal(time, time[:, :1, :1].expand_as(time)), "time is the same everywhere"
    assert torch.equal(row, row[:1, :, :1].expand_as(row))
    assert torch.equal(column, column[:1, :1].expand_as(column)), "space is the same at any time"
    assert len(table[1:].unique(dim=0)) == frames * height * width, "every patch has a place of its own"


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 4), st.booleans())
def test_a_table_of_three_axes_is_extended_along_time(length: int, frames: int, space: int, half: bool) -> None:
    table = torch.randn(1, 1 + length * space, 8, generator=torch.Generator().manual_seed(length))
    table = table.half() if half else table
    found = positions.extend_3d(table, length, frames)
    assert found.shape == (1, 1 + frames * space, 8) and found.dtype == table.dtype
    assert torch.equal(found[:, 0], table[:, 0]), "the class token stays"
    if frames <= length:
        assert torch.equal(found, table[:, : 1 + frames * space])
        return
    for place in range(space):
        alone = positions.extend(table[:, 1 + place :: space], frames, "interpolate")
        assert torch.equal(found[:, 1 + place :: space], alone), "no place hears of another"
    if length > 1:
        assert torch.allclose(found[:, -space:], table[:, -space:], atol=1e-3), "the end stays the end"


def test_tables_that_cannot_be_are_refused() -> None:
    for shape in ((2, 2, 2, 5), (0, 2, 2, 16), (2, 0, 2, 16)):
        with pytest.raises(ms.MahlstickError, match="at least 6 channels, one frame and one patch"):
            positions.sincos_3d(*shape)


# rotations


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.integers(0, 2**31))
def test_rotations_shift(shift: int, seed: int) -> None:
    torch.manual_seed(seed)
    q, k = torch.randn(2, 6, 16, dtype=torch.float64), torch.randn(2, 6, 16, dtype=torch.float64)
    places = torch.arange(6)

    def products(at: Tensor) -> Tensor:
        return positions.rotate(q, at) @ positions.rotate(k, at).mT

    assert torch.allclose(products(places), products(places + shift), atol=1e-2)
    assert torch.allclose(positions.rotate(q, places).norm(dim=-1), q.norm(dim=-1), atol=1e-6)


SHIFTS = st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))


@settings(deadline=None, max_examples=40)
@given(SHIFTS, st.sampled_from([6, 8, 16, 20, 64]), st.integers(0, 2**31))
def test_rotations_in_three_axes_shift(shift: tuple[int, int, int], width: int, seed: int) -> None:
    """Along every axis alone, and along all of them together."""
    torch.manual_seed(seed)
    places = positions.places_3d(2, 3, 2)
    q, k = torch.randn(2, 2, len(places), width, dtype=torch.float64)

    def products(at: Tensor) -> Tensor:
        return positions.rotate_3d(q, at) @ positions.rotate_3d(k, at).mT

    wanted = products(places)
    axes = torch.diag(torch.tensor(shift))
    for moved in (*axes, axes.sum(dim=0)):
        assert torch.allclose(products(places + moved), wanted, atol=1e-3)
    turned = positions.rotate_3d(q, places)
    assert torch.allclose(turned.norm(dim=-1), q.norm(dim=-1), atol=1e-6)
    for axis in range(3):
        assert not torch.allclose(products(places * (torch.arange(3) != axis)), wanted, atol=1e-3)


@pytest.mark.parametrize("width", [6, 16, 64])
def test_of_three_axes_each_turns_its_part(width: int) -> None:
    torch.manual_seed(0)
    x, along = torch.randn(2, 5, width), torch.arange(5)
    still, space = torch.zeros(5, dtype=torch.long), width // 6 * 2
    time = width - 2 * space
    for axis, part in enumerate((slice(0, time), slice(time, time + space), slice(time + space, width))):
        found = positions.rotate_3d(x, torch.stack([along if i == axis else still for i in range(3)], dim=-1))
        wanted = x.clone()
        wanted[..., part] = positions.rotate(x[..., part], along)
        assert torch.equal(found, wanted)


def test_rotations_in_three_axes_are_wans() -> None:
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    frames, height, width, dim = 3, 4, 5, 20
    cos, sin = WanRotaryPosEmbed(dim, (1, 1, 1), 16)(torch.empty(1, 1, frames, height, width))
    torch.manual_seed(0)
    x = torch.randn(1, frames * height * width, dim)
    turned = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    wanted = x * cos[:, :, 0] + turned * sin[:, :, 0]
    found = positions.rotate_3d(x, positions.places_3d(frames, height, width))
    assert torch.allclose(found, wanted.float(), atol=1e-5)


@pytest.mark.parametrize("width", [4, 9])
def test_a_width_that_three_axes_cannot_share_is_refused(width: int) -> None:
    with pytest.raises(ms.MahlstickError, match="an even width of at least 6"):
        positions.rotate_3d(torch.zeros(1, 2, width), torch.zeros(2, 3))


# sparse sampling


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 500), st.integers(1, 40))
def test_sparse_frames_are_the_middles_of_equal_segments(count: int, frames: int) -> None:
    found = positions.sample_sparsely(count, frames)
    assert len(found) == frames
    assert all(0 <= index < count for index in found)
    assert found == sorted(found)
    segment = count / frames
    assert all(abs(index + 0.5 - (i + 0.5) * segment) <= 0.5 + 1e-9 for i, index in enumerate(found))
    assert (len(set(found)) == frames) == (count >= frames), "only a short clip repeats"
    mirrored = [count - 1 - index for index in reversed(found)]
    assert all(0 <= a - b <= 1 for a, b in zip(found, mirrored, strict=True))
    if count % frames == 0 and count // frames % 2:
        assert found == mirrored, "where every segment has one middle, there is no earlier and later"


def test_sparse_frames_of_known_clips() -> None:
    assert positions.sample_sparsely(24, 8) == [1, 4, 7, 10, 13, 16, 19, 22]
    assert positions.sample_sparsely(8, 8) == list(range(8))
    assert positions.sample_sparsely(2, 4) == [0, 0, 1, 1]
    assert positions.sample_sparsely(16, 1) == [8]


@pytest.mark.parametrize(("count", "frames"), [(0, 8), (8, 0)])
def test_an_empty_clip_is_refused(count: int, frames: int) -> None:
    with pytest.raises(ms.MahlstickError, match="both must be at least 1"):
        positions.sample_sparsely(count, frames)
