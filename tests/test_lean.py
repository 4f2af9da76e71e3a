"""What training keeps less of, it computes again to the bit."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from mahlstick.training import lean
from tests import zoo


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean, "WORTH_IT", 0)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return zoo.embeddings(0, 2, 4, 16, 16), torch.tensor([3, 900]), zoo.embeddings(1, 2, 77, zoo.DIM)


def learned(net: Any, autocast: bool, small: bool) -> tuple[Tensor, dict[str, Tensor | None], int]:
    """The output, every gradient, and the bytes kept for the backward pass."""
    sample, t, text = inputs()
    sample.requires_grad_()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), lean.Lean([net] if small else []):
            out = net(sample, t, text).sample
        loss = out.float().square().mean()
    loss.backward()
    return out, {"sample": sample.grad} | {name: p.grad for name, p in net.named_parameters()}, sum(kept.values())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("learns", ["", "norm", "bias", "weight", "."])
def test_the_same_bits_from_less_memory(learns: str, autocast: bool) -> None:
    unet = zoo.unet()
    for name, p in unet.named_parameters():
        p.requires_grad_(bool(learns) and learns in name)
    out, grads, kept = learned(unet, autocast, small=False)
    unet.zero_grad()
    lean_out, lean_grads, lean_kept = learned(unet, autocast, small=True)
    assert torch.equal(out, lean_out)
    for name, grad in grads.items():
        other = lean_grads[name]
        assert (grad is None and other is None) or (grad is not None and torch.equal(grad, other)), name
    assert lean_kept < 0.9 * kept


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_vae(layout: torch.memory_format) -> None:
    vae = copy.deepcopy(zoo.vae()).requires_grad_(True).to(memory_format=layout)
    x, found = zoo.embeddings(0, 2, 3, 32, 32).to(memory_format=layout), []
    for nets in [], [vae]:
        vae.zero_grad()
        with lean.Lean(nets):
            out = vae(x).sample
        out.square().mean().backward()
        found.append([out, *(p.grad for p in vae.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_afterwards_everything_is_as_before() -> None:
    unet = zoo.unet()
    kinds = [type(module) for module in unet.modules()]
    with pytest.raises(ZeroDivisionError), lean.Lean([unet]):
        assert lean.LeanResnet in map(type, unet.modules())
        raise ZeroDivisionError
    assert [type(module) for module in unet.modules()] == kinds


def test_a_second_derivative_is_refused() -> None:
    unet = zoo.unet()
    sample, t, text = inputs()
    sample.requires_grad_()
    with lean.Lean([unet]):
        out = unet(sample, t, text).sample
    (grad,) = torch.autograd.grad(out.sum(), sample, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("change", [
    lambda block: setattr(block.dropout, "p", 0.1),
    lambda block: setattr(block, "output_scale_factor", math.sqrt(2)),
    lambda block: setattr(block, "nonlinearity", nn.Mish()),
    lambda block: setattr(block, "conv1", nn.Sequential(block.conv1)),
    lambda block: setattr(block, "conv2", nn.Conv2d(8, 8, 3, padding=1, bias=False)),
    lambda block: setattr(block, "conv2", nn.Conv2d(8, 8, 3, padding="same")),
    lambda block: setattr(block.conv1, "padding_mode", "circular"),
    lambda block: setattr(block.conv1, "forward", block.conv1.forward),
    lambda block: block.norm2.register_forward_hook(lambda *_: None),
])  # fmt: skip
def test_blocks_that_compute_something_else_are_left_alone(change: Any) -> None:
    block = ResnetBlock2D(in_channels=8, out_channels=8, temb_channels=8, groups=4)
    assert lean.Lean([block]).modules
    change(block)
    assert not lean.Lean([block]).modules
