"""The ruler for networks: sizes, jumps and receptive fields, against what the gradient reaches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mahlstick as ms
from benchmarks import tiny
from mahlstick import cli
from mahlstick.adapters.controlnet import HintEncoder
from mahlstick.adapters.receptive import Layer, receptive_fields_of

INPUT = (61, 47)  # no side divides into strides evenly


class Branches(nn.Module):
    """The sum of what several networks make of one input, and of the input itself."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return x + sum(branch(x) for branch in self.branches)


def pair(low: int, high: int) -> Any:
    return st.tuples(st.integers(low, high), st.integers(low, high))


convolutions = st.builds(
    lambda kernel, stride, padding, dilation: nn.Conv2d(1, 1, kernel, stride, padding, dilation),
    pair(1, 4), pair(1, 3), pair(0, 3), pair(1, 3),
)  # fmt: skip
same = st.builds(
    lambda half, dilation: nn.Conv2d(1, 1, 2 * half + 1, padding=half * dilation, dilation=dilation),
    st.integers(0, 2), st.integers(1, 3),
)  # fmt: skip
pools = st.builds(
    lambda kernel, stride, padding, ceil: nn.AvgPool2d(kernel, stride, min(padding, kernel // 2), ceil),
    st.integers(1, 4), st.integers(1, 3), st.integers(0, 2), st.booleans(),
)  # fmt: skip
pads = st.builds(lambda *sides: nn.ZeroPad2d(sides), *[st.integers(0, 2)] * 4)
branches = st.builds(Branches, same, same)
stacks = st.lists(convolutions | pools | pads | branches, min_size=1, max_size=4).map(
    lambda parts: nn.Sequential(nn.Conv2d(1, 1, 1), *parts, nn.Conv2d(1, 1, 1))  # the last sees what all before it see
)


def supports(stack: nn.Module, x: Tensor, place: tuple[int, int]) -> list[tuple[int, int]]:
    """First and last row, and column, of the input that an output's gradient reaches."""
    (gradient,) = torch.autograd.grad(stack(x)[0, 0][place], x)
    reached = [gradient[0, 0].any(dim=axis).nonzero() for axis in (1, 0)]
    return [(int(axis.min()), int(axis.max())) for axis in reached]


@settings(deadline=None, max_examples=100, derandomize=True)
@given(stacks)
def test_every_figure_is_what_the_gradient_says(stack: nn.Sequential) -> None:
    for convolution in stack.modules():
        if isinstance(convolution, nn.Conv2d):
            nn.init.ones_(convolution.weight)  # nothing cancels out
    x = torch.ones(1, 1, *INPUT, requires_grad=True)
    try:
        y = stack(x)
    except RuntimeError:  # too small for the kernels
        assume(False)
    last = ms.receptive_fields(stack, INPUT)[-1]
    assert last.size == y.shape[-2:]
    compared = 0
    for places in zip(*(torch.linspace(0, side - 1, 5).long().tolist() for side in y.shape[-2:]), strict=True):
        expected = []
        for place, jump, field, start in zip(places, last.jump, last.field, last.start, strict=True):
            first = start - (field - 1) / 2 + place * jump
            expected.append((first, first + field - 1))
        if all(0 <= first and end < side for (first, end), side in zip(expected, INPUT, strict=True)):
            assert supports(stack, x, places) == expected
            compared += 1
    assume(compared)


def test_the_example_that_a_common_summary_gets_wrong() -> None:
    stack = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1))
    layers = ms.receptive_fields(stack, 32)
    assert [layer.field for layer in layers] == [(3, 3), (4, 4), (8, 8)]
    assert [layer.name for layer in layers] == ["0", "max pool", "2"]


def test_a_max_pool_is_measured_as_a_mean_pool() -> None:
    for options in ((3, 2, 1), (2, 2, 0), (3, 3, 1)):
        each = [ms.receptive_fields(nn.Sequential(nn.Conv2d(1, 1, 3), pool(*options, ceil_mode=True)), (20, 31))[-1]
                for pool in (nn.MaxPool2d, nn.AvgPool2d)]  # fmt: skip
        assert each[0].size == nn.MaxPool2d(*options, ceil_mode=True)(torch.zeros(1, 1, 18, 29)).shape[-2:]
        assert (each[0].field, each[0].size, each[0].jump, each[0].start) == (
            each[1].field, each[1].size, each[1].jump, each[1].start)  # fmt: skip


def test_the_hint_encoder_of_stable_diffusion() -> None:
    layers = ms.receptive_fields(HintEncoder(320, 3, (16, 32, 96, 256)), 512)
    assert [layer.field[0] for layer in layers] == [3, 5, 7, 11, 15, 23, 31, 47]
    assert [layer.jump[0] for layer in layers] == [1, 1, 2, 2, 4, 4, 8, 8]
    assert layers[-1].size == (64, 64)
    assert layers[-1].name == "conv_out" and layers[2].name == "blocks.1"


def test_the_module_is_left_as_it_is() -> None:
    encoder = HintEncoder(8, 3, (4, 6))
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with torch.no_grad():
        ms.receptive_fields(encoder, (16, 24))
    assert all(torch.equal(value, before[name]) and not value.is_meta for name, value in encoder.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in encoder.parameters())


def test_what_is_pooled_or_attended_has_seen_everything() -> None:
    class Squeeze(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.gate, self.last = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid())

    layers = ms.receptive_fields(Squeeze(), 16)
    assert [(layer.name, layer.field, layer.whole) for layer in layers] == [
        ("first", (3, 3), False),
        ("last", (5, 5), True),
    ]


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Linear(3, 4), "Linear has no 2-d convolution"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Upsample(scale_factor=2)), "UpsampleNearest2D resamples the picture"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(2)), "AdaptiveAvgPool2D resamples the picture"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 2)), "1 is a transposed convolution"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.Unflatten(2, (8, 2)), nn.Conv2d(4, 4, 1)),
            "3 reads places",
        ),
        (nn.Sequential(nn.Conv2d(3, 4, 9)), r"does not run on an input of 3 x 6 x 6 \("),
    ],
)
def test_what_cannot_be_followed_is_refused(module: nn.Module, message: str) -> None:
    with pytest.raises(ms.MahlstickError, match=message):
        ms.receptive_fields(module, 6)


# files


def figures(layers: list[Layer]) -> list[Any]:
    return [(layer.name, layer.size, layer.jump, layer.field, layer.start, layer.whole) for layer in layers]


def test_a_controlnet_in_each_layout_by_its_hint_encoder_and_what_is_behind(tmp_path: Path) -> None:
    net = ms.ControlNet.from_unet(tiny.unet("sdxl"), conditioning_embedding_out_channels=(4, 6, 6, 8))
    folder = net.save_pretrained(tmp_path / "net")
    file = net.save_pretrained(tmp_path / "net.safetensors", layout="original")
    layers = receptive_fields_of(folder, (128, 64))
    assert figures(layers) == figures(receptive_fields_of(file, (128, 64)))
    hints = figures(ms.receptive_fields(net.controlnet_cond_embedding, (128, 64)))
    assert [(f"controlnet_cond_embedding.{name}", *rest) for name, *rest in hints] == figures(layers)[:8]
    assert layers[7].size == (16, 8)
    first = next(i for i, layer in enumerate(layers) if layer.whole)
    assert first > 8 and all(layer.whole for layer in layers[first:])
    assert layers[-1].name == "mid_block.resnets.1.conv2"


def test_a_unets_encoder_as_far_as_convolutions_go(tmp_path: Path) -> None:
    """Against the gradient: attentions and norms, which see everything, are taken out."""
    unet = tiny.unet("sd1", down_block_types=("DownBlock2D",) * 4, mid_block_type=None, sample_size=32)
    unet.save_pretrained(tmp_path / "unet")
    layers = receptive_fields_of(tmp_path, 32)
    downs = [layer for layer in layers if "downsamplers" in layer.name]
    assert [layer.jump[0] for layer in downs] == [2, 4, 8]
    # conv_in 3, then a level: two residual blocks of two convolutions each, and a downsampler.
    fields, field, jump = [], 3, 1
    for _ in range(3):
        field += 5 * 2 * jump
        fields.append(field)
        jump *= 2
    assert [layer.field[0] for layer in downs] == fields
    assert not any(layer.whole for layer in layers)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    file = ms.IPAdapter.from_unet(tiny.unet("sd1"), tokens=2, feature_dim=8).save_pretrained(
        tmp_path / "ip.safetensors"
    )
    with pytest.raises(ms.MahlstickError, match="is an IP-Adapter: the strides of its convolutions are not known"):
        receptive_fields_of(file)


# the command


def test_the_table_and_its_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = ms.ControlNet.from_unet(tiny.unet("sd1"), conditioning_embedding_out_channels=(4, 6, 6, 8))
    folder = str(net.save_pretrained(tmp_path / "net"))
    assert cli.main(["inspect", folder, "--layers", "--size", "64x128"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == "layer kernel stride padding dilation output jump field start".split()
    assert lines[8].split() == ["controlnet_cond_embedding.conv_out", "3", "1", "1", "1", "16x8", "8", "47", "0"]
    assert any(line.startswith("*  behind an attention") for line in lines)
    starts = {line.find(word) for line, word in zip(lines[:9:8], ("output", "16x8"), strict=True)}
    assert len(starts) == 1, "columns are aligned"
    assert cli.main(["inspect", folder, "--layers", "--size", "64x128", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert (rows[7]["size"], rows[7]["field"], rows[7]["whole"]) == ([16, 8], [47, 47], False)


def test_embedded_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "lineart", "--layers"]) == 0
    assert "controlnet_cond_embedding.conv_in" in capsys.readouterr().out
    assert cli.main(["inspect", "embedded", "--layers", "--size", "16"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("conv_in")
    assert cli.main(["inspect", "lineart", "--size", "16"]) == 2
    assert "--size: is for --layers" in capsys.readouterr().err
